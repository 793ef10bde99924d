"""Two methods at equal queries: the paired difference of their runs over seeds.

    python studies/compare.py A-seed0 A-seed1 --against B-seed0 B-seed1
    python studies/compare.py A/ B/                  # two folders that hold run folders

Runs of one seed are a pair: equal LoRA at the start, equal keys of all noise. Gains from
before.json to after.json are on the same noise, so pictures are paired as well. +- is a
standard error over seeds and pictures, `two_way`; of one seed, over pictures alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from files import read_json
from processes import Parser, die
from run_folder import read_config
from studies.common import markdown
from studies.curves import common_rounds, group_runs

# What must agree if scores are to be compared, and pictures to be of the same noise
ALIKE = ("model", "reward", "template", "prompts", "image_size", "T", "eta", "guidance")


def two_way(differences):
    """Mean and standard error of differences (S, n) of S seeds on the same n pictures.

    Both are random. The variance of the mean is that of the seeds' means / S plus that
    of the pictures' means / n, less what is in both: the rest's / (S n).
    """
    (S, n), mean = differences.shape, differences.mean()
    of_seed, of_picture = differences.mean(1), differences.mean(0)
    rest = (differences - of_seed[:, None] - of_picture + mean).square().sum().item()
    seed = of_seed.var().item() / S if S > 1 else 0.0
    picture = of_picture.var().item() / n if n > 1 else 0.0
    both = rest / max(1, (S - 1) * (n - 1)) / (S * n)
    return mean.item(), max(seed, picture, seed + picture - both) ** 0.5


def gain(x, y):
    """x - y, (S, n), as a cell: mean and error, but no error of one number."""
    mean, error = two_way(x - y)
    return f"{mean:+.4f} +- {error:.4f}" if x.numel() > 1 else f"{mean:+.4f}"


def find_runs(paths):
    """Runs of one method, or folders that hold some: {seed: (folder, metrics lines)}."""
    folders = []
    for path in map(Path, paths):
        inside = [] if (path / "config.json").exists() else path.glob("*/config.json")
        folders += sorted(file.parent for file in inside) or [path]
    groups = group_runs(folders)
    if len(groups) > 1:
        die(f"{' '.join(map(str, paths))}: runs of several methods: {'; '.join(groups)}")
    (runs,) = groups.values()
    return {seed: (f, lines) for f, (seed, lines) in zip(folders, runs.items())}


def measures(folder, lines, queries):
    """{what: (n,)} of a run: rewards at `queries`, gains of n pictures."""
    rewards = [line["reward_mean"] for line in lines if line["queries"] in queries]
    out = {f"reward at {queries[-1]} queries": rewards[-1:]}
    out[f"mean reward of {len(rewards)} rounds"] = [sum(rewards) / len(rewards)]
    before, after = (read_json(folder / f"{when}.json") for when in ("before", "after"))
    try:
        for name in before if before and after else ():
            for what, old in before[name].items():
                pairs = zip(old or (), after[name][what] or (), strict=True)
                out[f"gain in {name} {what}"] = [b - a for a, b in pairs]
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in out.items() if v}
    except (AttributeError, KeyError, TypeError, ValueError):
        die(f"{folder}: before.json or after.json is damaged")


def compare(a, b):
    """Markdown lines: A, B and A - B, each {seed: (folder, metrics lines)}."""
    seeds, rows = sorted(a), []
    if seeds != sorted(b):
        die(f"the seeds differ: {', '.join(seeds)} and {', '.join(sorted(b))}")
    runs = [of[seed] for of in (a, b) for seed in seeds]
    for name in ALIKE:
        found = sorted({str(read_config(folder).get(name)) for folder, _ in runs})
        if len(found) > 1:
            die(f"the runs differ in {name}, {' and '.join(found)}: nothing to compare")
    queries, _ = common_rounds([lines for _, lines in runs], "reward_mean")
    found = [measures(folder, lines, queries) for folder, lines in runs]
    for what, first in found[0].items():
        if any(what not in run or len(run[what]) != len(first) for run in found):
            die(f"{what}: the runs have different pictures, or one is not finished")
        x, y = torch.stack([run[what] for run in found]).unflatten(0, (2, -1))  # (S, n)
        each = [f"{d:+.4f}" for d in (x - y).mean(1).tolist()]
        rows.append([what, f"{x.mean():.4f}", f"{y.mean():.4f}", gain(x, y), *each])
    return markdown(["", "A", "B", "A - B", *(f"seed {seed}" for seed in seeds)], rows)


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="A", help="runs of a method, or a folder of them")
    add("--against", nargs="+", metavar="B", help="of the other (left out in: A/ B/)")
    args = parser.parse_args(argv)
    if args.against is None and len(args.runs) != 2:
        die("give A's runs --against B's, or two folders that hold runs")
    a, b = (args.runs, args.against) if args.against else (args.runs[:1], args.runs[1:])
    print(f"A: {' '.join(a)}\nB: {' '.join(b)}\n")
    print("\n".join(compare(find_runs(a), find_runs(b))))


if __name__ == "__main__":
    main()
