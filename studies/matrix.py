"""Every reported run by name: run any row, skip what is done, resume what was cut off.

    python studies/matrix.py --list                    # rows and commands, what is done
    python studies/matrix.py --only ddpo-seed1 't2-*'  # some rows, or all without --only
    python studies/matrix.py --tune                    # the learning-rate grid's rows
    python studies/matrix.py --report                  # results/tables.md and curves.png

A row works in runs/<set>/<row>, which git ignores. Its text and pictures are then copied
to results/<set>/<row>, which is committed: a row there is done, and reported.
"""

import shutil
import subprocess
import sys
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from eval import guarded
from files import read_json, write_text
from processes import Parser, die
from run_folder import read_metrics
from studies import curves, table5
from studies.common import markdown
from studies.compare import gain

RESULTS = ROOT / "results"

# Of every run, beside the tiny model's own settings
COMMON = dict(model="tiny", reward="clip", eval_images=1, save_every=8)
BRANCHES = 3  # of the methods with BS; it divides the queries, so every row has as many
SEEDS = (0, 1, 2)
# The grid, alike for vanilla and bpt-bs, on a seed that no other row has. With a clip range of
# 3e-3 vanilla clipped at most 1 % of its ratios when the world was built: so a third of it
TUNE = dict(method=("vanilla", "bpt-bs"), lr=(2.5e-4, 5e-4, 1e-3), clip_range=(1e-3,), seed=(100,))
SHORT = dict(rounds=12, save_every=4)  # half of the other rows' rounds
# Chosen by it, for each method apart, the same for both: the largest gain in CLIPScore on the
# training list. bpt, bs and forward-bs take it over.
CHOSEN = dict(lr=1e-3, clip_range=1e-3)
IMAGES = {"train": 8, "unseen": 4}  # pictures a prompt; template 1 has 45 and 90 prompts
LARGE = dict(update_size=128, epochs=1)  # Table 6: four times ours; one pass, as in [ddpo]
METHODS = {
    "vanilla": dict(no_bpt=True, no_bs=True, **LARGE),
    "bpt": dict(no_bs=True, **LARGE),
    "bs": dict(no_bpt=True),
    "bpt-bs": {},
    "forward-bs": dict(interval="forward"),  # TempFlow-GRPO's claim: from the noise
}
TWO = ("vanilla", "bpt-bs")
# Algorithm, template, methods; what BPT+BS gains over vanilla in the paper: CLIPScore on
# unseen prompts (Table 3), inception score (Tables 1, 2), SD 1.4
MATRIX = (
    ("ddpo", 1, tuple(METHODS), (0.0050, 0.0241)),
    ("ddpo", 2, TWO, (0.0077, 0.0256)),
    ("ddpo", 3, TWO, (0.0049, 0.0075)),
    ("pg", 1, TWO, (None, 0.0434)),
    ("dpok", 1, TWO, (None, 0.0220)),
    ("dpo", 1, TWO, (None, 0.0156)),
)
STUDIES = {"table5": ("table5", {}), "last-step": ("last_step", dict(roots=128))}
STUDIES |= {f"table5-t{t}": ("table5", dict(template=t)) for t in (2, 3)} | {"tree": ("tree", {})}


def prefix(algo, template, method):
    """ddpo, ddpo-bpt, ..., pg, t2-ddpo: all but the seed of a row's name."""
    words = [f"t{template}", algo] if template > 1 else [algo]
    return "-".join(words if method == "vanilla" else [*words, method])


def training(algo, template, method, **more):
    """The settings of a training run, as config.json has them."""
    settings = COMMON | dict(algo=algo, template=template) | METHODS[method] | more
    return settings if "no_bs" in settings else settings | dict(branches=BRANCHES)


def scoring(template, folder, **model):
    """The steps that score one model on both prompt lists of a template."""
    for split, images in IMAGES.items():
        flags = dict(template=template, split=split, images=images, metrics="clip,is")
        yield "eval.py", model | flags, f"{folder}/eval-{split}"


def between(template, folder):
    """The steps that score the LoRAs kept on the way: style entropy over queries, for curves."""
    for done in (8, 16):  # of 24
        lora = f"runs/{folder}/lora-round{done:04d}.safetensors"
        flags = dict(lora=lora, no_base=True, template=template, metrics="clip")
        yield "eval.py", flags | dict(images=IMAGES["train"]), f"{folder}/eval-round{done:04d}"


def rows():
    """{<set>/<row>: [(script, flags, folder)]}, in order."""
    out, base = {}, dict(model=COMMON["model"])

    def add(name, *steps):
        assert name not in out, f"two rows are called {name}"
        out[name] = steps

    for template in dict.fromkeys(template for _, template, *_ in MATRIX):
        name = f"main/base-t{template}"
        add(name, *scoring(template, name, **base))
    for algo, template, methods, _ in MATRIX:
        for seed, method in product(SEEDS, methods):  # cut short, all methods compare
            name = f"main/{prefix(algo, template, method)}-seed{seed}"
            settings = training(algo, template, method, **CHOSEN, seed=seed)
            train = ("train.py", settings, name)
            steps = scoring(template, name, lora=f"runs/{name}", no_base=True)
            add(name, train, *steps, *between(template, name) if template == 1 else ())
        # Fig. 4: a noise a column, a method of the paper a row. Fig. 9: unseen prompts
        names = [prefix(algo, template, method) for method in methods[:4]]
        loras = [f"runs/main/{name}-seed{SEEDS[0]}" for name in names]
        for split in IMAGES if methods is MATRIX[0][2] else ("train",):
            grid = {"train": "grid", "unseen": "grid-unseen"}[split]
            name = f"main/{prefix(algo, template, grid)}"
            add(name, ("eval.py", dict(lora=loras, template=template, split=split, images=1), name))
    for row, (study, flags) in STUDIES.items():
        add(f"main/{row}", (f"studies/{study}.py", flags | base, f"main/{row}"))
    for method, lr, clip, seed in product(*TUNE.values()):
        name = f"tune/{prefix('ddpo', 1, method)}-lr{lr:g}-clip{clip:g}-seed{seed}"
        more = dict(lr=lr, clip_range=clip, seed=seed, eval_images=2, **SHORT)
        settings = training("ddpo", 1, method, **more)
        add(name, ("train.py", settings, name))
    return out


def command(script, flags, folder):
    """The words of a step after `python`."""
    words = [script]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return [*words, "--out", f"runs/{folder}"]


def is_done(root, script, _, folder):
    """Does the last file that a step writes lie in its folder under `root`?"""
    name = Path(script).stem.replace("_", "-")
    last = {"train": "summary", "eval": "scores"}.get(name, name)
    return (root / folder / f"{last}.json").exists()


def other_settings(folder, settings):
    """The first setting in which the run in `folder` differs from the table, or None."""
    config = read_json(folder / "config.json") or settings
    for name, value in settings.items():
        if config.get(name) != value:
            return f"{name} is {config.get(name)}, the table says {value}"


def run_row(name, steps, again=False):
    """Run the steps of a row that are not done, then copy it to results/."""
    work, kept = ROOT / "runs" / name, RESULTS / name
    settings = steps[0][1] if steps[0][0] == "train.py" else {}
    for folder in (work, kept):
        if again:
            shutil.rmtree(folder, ignore_errors=True)
        if problem := other_settings(folder, settings):
            die(f"{folder}: {problem}. --again starts anew")
    if all(is_done(RESULTS, *step) for step in steps):
        return print(f"{name}: done")
    for step in [step for step in steps if not is_done(ROOT / "runs", *step)]:
        words = command(*step)
        if step[0] == "train.py" and (work / "config.json").exists():
            words = ["train.py", "--resume", f"runs/{name}"]
        print(f"{name}: python {' '.join(words)}", flush=True)
        if code := subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
            die(f"{name} ended with code {code}; the same command goes on")
    kinds = ("", ".json", ".jsonl", ".png")  # of grids the last evaluation's is enough
    drop = lambda _, names: [n for n in names if n == "grids" or Path(n).suffix not in kinds]
    shutil.copytree(work, kept, ignore=drop, dirs_exist_ok=True)


# ---------------------------------------------------------------- report

COLUMNS = [*product(("CLIPScore", "recognised"), IMAGES)]
COLUMNS += [("inception score", "train"), ("style entropy", "train")]
NOTE = """+- is the standard deviation over seeds; of a gain, on the same noise, the
standard error over seeds and pictures (of the inception score by the jackknife)."""


def evaluated(name):
    """{list: scores} of a row, None if it is not done."""
    out = {s: read_json(RESULTS / f"main/{name}/eval-{s}/scores.json") for s in IMAGES}
    if all(out.values()):
        return {split: next(iter(data["results"].values())) for split, data in out.items()}


def figures(runs, column, split):
    """What S runs say of a column: (S, n), n pictures or 1; their mean is the column's."""
    rows = []
    for scores in (run[split] for run in runs):
        row = scores[column]
        if column in ("CLIPScore", "recognised"):
            row = scores["scores"]["clip" if column == "CLIPScore" else column]
        elif column == "inception score":  # the jackknife's pseudo-values, its mean
            left_out = scores["inception score, left out"]
            scale, middle = len(left_out) - 1, mean(left_out)
            row = [row[0] + scale * (middle - value) for value in left_out]
        rows.append(torch.tensor(row, dtype=torch.float64).view(-1))
    return torch.stack(rows)


def table_row(name, runs, before=None):
    """Means over S runs and their spread; or gains over S other runs or one."""
    cells = []
    for column in COLUMNS:
        x = figures(runs, *column)
        spread = f" +- {x.mean(1).std():.4f}" if len(x) > 1 else ""
        cells.append(gain(x, figures(before, *column)) if before else f"{x.mean():.4f}{spread}")
    return [name, len(runs), *cells]


def comparison(algo, template, methods, paper):
    """The table of a line of MATRIX, Markdown lines; only the seeds that are done."""
    base, vanilla = evaluated(f"base-t{template}"), {}
    if not base:
        return ["The base model is not scored yet."]
    table = [table_row("base", [base])]
    for method in methods:
        name = prefix(algo, template, method)
        runs = {seed: run for seed in SEEDS if (run := evaluated(f"{name}-seed{seed}"))}
        if not runs:
            continue
        table.append(table_row(name, list(runs.values())))
        table.append(table_row(f"{name} over base", list(runs.values()), [base]))
        if both := [seed for seed in runs if seed in vanilla]:
            after, before = ([of[seed] for seed in both] for of in (runs, vanilla))
            table.append(table_row(f"{name} over vanilla", after, before))
        table += [table_row(f"{name}-seed{s} over base", [run], [base]) for s, run in runs.items()]
        vanilla = runs if method == "vanilla" else vanilla
    clip, inception = (f"{v:+.4f}" if v else "" for v in paper)
    table.append(["paper: BPT+BS over vanilla", "", "", clip, "", "", inception, ""])
    return markdown(["", "seeds", *map(", ".join, COLUMNS)], table)


def run_table(group):
    """A line a training run: cost and gains, from metrics.jsonl and summary.json."""
    table, lists = [], ("train_score", "unseen_score", "train_recognised")
    for name, steps in rows().items():
        summary, lines = read_json(RESULTS / name / "summary.json"), read_metrics(RESULTS / name)
        if name.startswith(group) and summary and lines:
            minutes = sum(sum(line["seconds"].values()) for line in lines) / 60
            cost = [steps[0][1]["lr"], sum(line["updates"] for line in lines), f"{minutes:.1f}"]
            kl = max(line.get("kl_to_base", 0.0) for line in lines)
            gains = ["{gain:+.4f} +- {error:.4f}".format(**summary[k]) for k in lists]
            table.append([Path(name).name, *cost, f"{kl:.3f}", *gains])
    return markdown(["run", "lr", "updates", "minutes", "largest KL", *lists], table)


def report():
    """Write results/tables.md, and curves.png from the runs that are there."""
    out = ["Written by `python studies/matrix.py --report`; do not edit.", NOTE, ""]
    for algo, template, methods, paper in MATRIX:
        pairs = product(methods, SEEDS)
        names = [f"main/{prefix(algo, template, m)}-seed{seed}" for m, seed in pairs]
        folders = [str(RESULTS / name) for name in names if read_metrics(RESULTS / name)]
        target = f"main/{prefix(algo, template, 'curves')}"
        if folders:
            (RESULTS / target / "curves.json").unlink(missing_ok=True)
            curves.main(["--runs", *folders, "--out", str(RESULTS / target)])
            out += [f"## {algo}, template {template}", ""]
            out += [*comparison(algo, template, methods, paper), ""]
            out += [f"![reward over queries]({target}/curves.png)", ""]
    for template, row in enumerate(("table5", "table5-t2", "table5-t3"), 1):
        if shares := read_json(RESULTS / f"main/{row}/table5.json"):
            out += [f"## Table 5, template {template}", "", *table5.table(shares), ""]
    for title, group in (("Training runs", "main"), ("The learning-rate grid", "tune")):
        out += [f"## {title}", "", *run_table(group), ""]
    write_text(RESULTS / "tables.md", "\n".join(out))
    print("\nWritten: results/tables.md")


def run(args):
    if args.report:
        return report()
    group = "tune" if args.tune else "main"
    patterns = [f"{group}/{pattern}" for pattern in args.only or ["*"]]
    chosen = {n: steps for n, steps in rows().items() if any(fnmatch(n, p) for p in patterns)}
    if not chosen:
        die(f"no row is called {' or '.join(patterns)}: see --list")
    for name, steps in chosen.items():
        if args.list:
            done = all(is_done(RESULTS, *step) for step in steps)
            print(f"{name}{': done' if done else ''}")
            print("\n".join(f"    python {' '.join(command(*step))}" for step in steps))
        else:
            run_row(name, steps, args.again)


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.set_defaults(out="results")
    add = parser.add_argument
    add("--only", nargs="+", metavar="ROW", help="rows to run, by name or shell pattern")
    add("--tune", action="store_true", help="the rows of the learning-rate grid instead")
    add("--list", action="store_true", help="print the rows and commands, run nothing")
    add("--again", action="store_true", help="delete and rerun the rows of --only")
    add("--report", action="store_true", help="write results/tables.md")
    args = parser.parse_args(argv)
    if args.again and not args.only:
        die("--again deletes results: name the rows with --only")
    guarded(run, args)


if __name__ == "__main__":
    main()
