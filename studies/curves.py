"""Fig. 5, 6, 8: reward and more against queries and minutes, by method, over seeds.

    python studies/curves.py --runs runs/A-seed0 runs/A-seed1 runs/B-seed0 ...

Runs of one method and equal settings are the seeds of one line. Minutes are those of the
rounds, mean over seeds. Diversity is the spread within a prompt over that of the first
round: pictures of a branch are alike, so with BS and without the values do not compare.
BPT's are more alike at tau0 than later, at T. Style entropy is drawn at the rounds whose LoRA
eval.py has scored with --out RUN/eval-round0004, and so on; the last in RUN/eval-train.
"""

import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from eval import guarded
from files import read_json, write_json
from processes import Parser, die
from run_folder import WITH_RESUME, method_slug, read_config, read_metrics
from studies.common import markdown, pyplot, save_figure

# What may differ between the runs of one line: it changes no expectation
SAME_LINE = {*WITH_RESUME, "seed", "out", "preset", "device", "precision", "grid_every"}
SAME_LINE |= {"eval_images", "eval_prompts", "validation_prompt", "tensorboard"}
SAME_LINE -= {"rounds"}
KINDS = dict(algo=str, no_bpt=bool, no_bs=bool, interval=str, seed=int)
DRAWN = {"reward_mean": "mean reward of the round"}  # and what else of it the runs have
DRAWN["recognised"] = "recognised by the judge"
DRAWN["kl_to_base"] = "KL to the base model, nats a step"
DRAWN["style_entropy"] = "style entropy, nats"
DRAWN["spread_within_prompt"] = "spread within a prompt / first round"


def group_runs(folders):
    """Run folders -> {label: {seed: metrics lines}}; ends with one line for a bad one.

    A label is the method, and the settings in which its runs differ but for `SAME_LINE`.
    """
    runs, groups, given = [], {}, {}
    for folder in folders:
        config, lines = read_config(folder), read_metrics(folder)
        if any(type(config.get(name)) is not kind for name, kind in KINDS.items()):
            die(f"{folder} holds no run of train.py: its config.json names no method")
        if not lines:
            die(f"the run {folder} has not finished a round")
        minutes = accumulate(sum(line.get("seconds", {}).values()) / 60 for line in lines)
        lines = [line | {"minutes": value} for line, value in zip(lines, minutes)]
        lines = [line | style_entropy(folder, line, lines[-1]) for line in lines]
        runs.append((folder, method_slug(config), config, lines))
    for folder, method, config, lines in runs:
        alike = [c for _, m, c, _ in runs if m == method]
        keys = sorted({k for c in alike for k in c} - SAME_LINE)  # not there: off or 0
        vary = [k for k in keys if len({str(c.get(k) or 0) for c in alike}) > 1]
        label = ", ".join([method, *(f"{k} {config.get(k, 0)}" for k in vary)])
        seed = str(config["seed"])
        if seed in groups.setdefault(label, {}):
            die(f"{given[label, seed]} and {folder} are one run: {label}, seed {seed}")
        groups[label][seed], given[label, seed] = lines, folder
    return groups


def style_entropy(folder, line, last):
    """{"style_entropy": nats} of the tiny model after a round, if eval.py has scored it."""
    name = "eval-train" if line is last else f"eval-round{line.get('round', 0):04d}"
    results = (read_json(Path(folder) / name / "scores.json") or {}).get("results", {})
    found = [row["style entropy"] for row in results.values() if "style entropy" in row]
    return {"style_entropy": found[0]} if found else {}


def common_rounds(runs, what):
    """The queries (n,) that R runs have in common, and `what` there, (R, n)."""
    tables = [{x["queries"]: x[what] for x in lines if x.get(what) is not None} for lines in runs]
    queries = sorted(set.intersection(*map(set, tables)))
    if not queries:
        die(f"the runs have no round with {what} at equal queries")
    rows = [[table[q] for q in queries] for table in tables]
    return queries, torch.tensor(rows, dtype=torch.float64)


def has(lines, what):
    """Do a run's metrics have `what`?"""
    return any(line.get(what) is not None for line in lines)


def curve(runs, what):
    """Queries, mean and spread (unbiased std) of `what` over runs, (n,) each."""
    queries, rows = common_rounds(runs, what)
    spread = rows.std(0) if len(rows) > 1 else torch.zeros(len(queries))
    return queries, rows.mean(0), spread


def curves(args):
    """Draw the figure, print first and last rounds, write the numbers by label."""
    plt, groups, folder = pyplot(), group_runs(args.runs), Path(args.out)
    result, table = {}, []
    every = [seeds.values() for seeds in groups.values()]
    drawn = [what for what in DRAWN if all(has(line, what) for runs in every for line in runs)]
    size, layout = (4.5 * len(drawn), 7), "constrained"
    figure, axes = plt.subplots(2, len(drawn), figsize=size, layout=layout, squeeze=False)
    for label, seeds in groups.items():
        result[label] = {"seeds": len(seeds)}
        for column, what in zip(axes.T, drawn):
            queries, mean, spread = curve(seeds.values(), what)
            minutes = dict(zip(*curve(seeds.values(), "minutes")[:2]))
            if what == "spread_within_prompt" and mean[0] > 0:
                mean, spread = mean / mean[0], spread / mean[0]
            minutes = [minutes[q].item() for q in queries]
            for ax, x, name in zip(column, (queries, minutes), ("reward queries", "minutes")):
                mark = "o" if len(x) < 4 else ""
                ax.plot(x, mean, marker=mark, label=f"{label}, seeds: {len(seeds)}")
                ax.fill_between(x, mean - spread, mean + spread, alpha=0.2)
                ax.set(xlabel=name, ylabel=DRAWN[what])
            values = {"queries": queries, "minutes": minutes}
            result[label][what] = values | {"mean": mean.tolist(), "std": spread.tolist()}
        queries, _, mean, spread = result[label]["reward_mean"].values()
        row = [f"{mean[0]:.4f}", f"{mean[-1]:.4f}", f"{spread[-1]:.4f}"]
        table.append([label, len(seeds), queries[-1], *row])
    axes[1, 0].legend(loc="upper left", bbox_to_anchor=(0, -0.15), ncol=2)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(figure, folder / "curves.png")
    write_json(folder / "curves.json", result)
    head = ["method", "seeds", "queries", "first reward", "last", "spread over seeds"]
    print("\n".join(markdown(head, table)))
    print(f"\nNumbers and picture: {folder}/curves.json, .png")


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--runs", nargs="+", required=True, metavar="RUN", help="run folders")
    add("--out", default="runs/curves", help="folder for numbers and picture")
    args = parser.parse_args(argv)
    if any(Path(args.out).glob("*.json")):
        die(f"{args.out} holds results: take another --out")
    guarded(curves, args)


if __name__ == "__main__":
    main()
