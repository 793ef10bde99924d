"""Every reported run by name: run any row, skip what is done, resume what was cut off, report.

    python results/run_all.py --list                    # rows, what is done, their commands
    python results/run_all.py                           # all rows of `MATRIX`, in order
    python results/run_all.py --only ddpo-seed1 'bs-*'  # some rows, shell patterns
    python results/run_all.py --tune                    # the learning-rate grid, other seeds
    python results/run_all.py --report                  # results/tables.md and curves.png

A row works in runs/<set>/<row>, which git ignores; its text and pictures are then copied to
results/<set>/<row>, which is committed and which alone the report reads. A row there is done.
"""

import argparse
import fnmatch
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- settings

COMMON = {  # of every training run: flags of train.py; the tiny model's own but for rounds, eval, threads
    "model": "tiny", "rounds": 10, "queries": 200, "update-size": 32, "clip-range": 3e-3,
    "epochs": 1, "tau0": 18, "skip-last": 13, "threshold": 0.5, "eval-images": 1, "threads": 1,
}  # fmt: skip
BRANCHES = 4  # of the methods with BS; queries is a multiple, so every row has as many queries
# Chosen by the grid below: the largest CLIPScore gain on the training list, which ddpo and bpt-bs
# have of their own; bpt updates on every sample as ddpo does, bs on pairs as bpt-bs does.
LR = {"vanilla": 1e-3, "bpt": 1e-3, "bs": 1e-3, "bpt-bs": 1e-3, "bpt-bs-3epochs": 1e-3,
      "vanilla-update128": 1e-3, "forward-bs": 1e-3}  # fmt: skip
SEEDS = (0, 1, 2)
EVAL = {  # of every evaluation: flags of eval.py; template 1 has 45 and 90 prompts
    "train": {"images": 8, "metrics": "clip,is"}, "unseen": {"images": 4, "metrics": "clip,is"},
}  # fmt: skip
TUNE = {"methods": ("vanilla", "bpt-bs"), "lr": (5e-4, 1e-3, 2e-3), "seeds": (100,),
        "settings": {"eval-images": 2}}  # fmt: skip
METHODS = {"vanilla": ["--no-bpt", "--no-bs"], "bpt": ["--no-bs"], "bs": ["--no-bpt"], "bpt-bs": [],
           "bpt-bs-3epochs": [], "vanilla-update128": ["--no-bpt", "--no-bs"],
           "forward-bs": ["--interval", "forward"]}  # fmt: skip
OF_METHOD = {  # settings that belong to a method
    "bpt-bs-3epochs": {"epochs": 3},  # Eq. 5 keeps a third: as many updates as DDPO
    "vanilla-update128": {"update-size": 128},  # Table 6: DDPO accumulates 4 times as much
    "forward-bs": {"tau0": 3, "skip-last": 0},  # the interval grows from the noise: 20..18 first
}
# One line a comparison, the first set first; a line may have its own "lr" (as LR) and "settings"
# (more flags of train.py), and then has a "name", which starts those of its rows.
MATRIX = (
    {"algo": "ddpo", "reward": "clip", "template": 1,
     # the last three were added after the first four had been run: two ways to equal numbers of
     # updates, and the ablation that TempFlow-GRPO suggests
     "methods": ("vanilla", "bpt", "bs", "bpt-bs", "bpt-bs-3epochs", "vanilla-update128",
                 "forward-bs")},  # fmt: skip
    # Fig. 4 and 5, Tables 1 and 3 on the other templates; Fig. 8, Table 2
    {"algo": "ddpo", "reward": "clip", "template": 2, "methods": ("vanilla", "bpt-bs")},
    {"algo": "ddpo", "reward": "clip", "template": 3, "methods": ("vanilla", "bpt-bs")},
    {"algo": "pg", "reward": "clip", "template": 1, "methods": ("vanilla", "bpt-bs")},
    {"algo": "dpok", "reward": "clip", "template": 1, "methods": ("vanilla", "bpt-bs")},
    {"algo": "dpo", "reward": "clip", "template": 1, "methods": ("vanilla", "bpt-bs")},
)  # fmt: skip
STUDIES = {"table5": {"roots": 128, "branches": 4}, "last-step": {"roots": 128}, "tree": {}}

# Table 3 (CLIPScore, unseen prompts) and Table 1 (inception score), SD 1.4, templates 1, 2, 3
PAPER = {
    "base": {"unseen": (0.3515, 0.3168, 0.2977), "is": (1.3179, 1.4133, 1.3582)},
    "vanilla": {"unseen": (0.3698, 0.3175, 0.3134), "is": (1.2886, 1.3323, 1.3273)},
    "bpt-bs": {"unseen": (0.3748, 0.3252, 0.3183), "is": (1.3127, 1.3579, 1.3348)},
}
PAPER_TABLE2 = {"dpok": (1.2785, 1.3005), "pg": (1.2462, 1.2896), "dpo": (1.2895, 1.3051)}

# ---------------------------------------------------------------- rows


def flags(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def prefix(line, method):
    """ddpo, ddpo-bpt, ..., pg, jpeg-ddpo, t2-ddpo: all but the seed of a row's name."""
    parts = [line["name"]] if "name" in line else []
    parts += [] if line["template"] == 1 else [f"t{line['template']}"]
    parts += [] if line["reward"] == "clip" else [line["reward"].replace(".py:", "-")]
    return "-".join([*parts, line["algo"], *([] if method == "vanilla" else [method])])


def training(line, method, seed, lr, folder):
    """A training run: its settings as train.py's config.json has them, and its step."""
    settings = COMMON | {k: line[k] for k in ("algo", "reward", "template")}
    settings |= {"branches": BRANCHES, "lr": lr, "seed": seed, "out": folder}
    settings |= OF_METHOD.get(method, {}) | line.get("settings", {})
    if "bs" not in method:
        del settings["branches"]
    return settings, (["train.py", *flags(settings), *METHODS[method]], "summary.json")


def evaluations(template, folder, model):
    """The steps that score one model on both prompt lists of a template."""
    return [
        (["eval.py", *model, "--template", str(template), "--split", split, *flags(EVAL[split]),
          "--out", f"{folder}/eval-{split}"], f"eval-{split}/scores.json")
        for split in ("train", "unseen")
    ]  # fmt: skip


def of_base():
    """The flags of a row without a run to take them from: the base model as it was trained on."""
    return flags({k: COMMON[k] for k in ("model", "T", "eta", "guidance") if k in COMMON})


def rows():
    """{set: {row: (settings or None, [(command, file that shows it is done)])}}, in order."""
    first, tune = {}, {}

    def add(name, settings, steps):
        if name in first:
            raise SystemExit(f"error: two rows are called {name}: give a line of MATRIX a \"name\"")
        first[name] = settings, steps

    for template in dict.fromkeys(line["template"] for line in MATRIX):
        name = f"base-t{template}"
        add(name, None, evaluations(template, f"runs/first/{name}", of_base()))
    for line in MATRIX:
        for seed in SEEDS:  # seed by seed: a set cut short still compares all methods
            for method in line["methods"]:
                name = f"{prefix(line, method)}-seed{seed}"
                folder = f"runs/first/{name}"
                settings, step = training(line, method, seed, line.get("lr", LR)[method], folder)
                model = ["--lora", folder, "--no-base"]
                add(name, settings, [step, *evaluations(line["template"], folder, model)])
        # Fig. 4: the same noise a column, a method of the paper a row
        name = prefix(line, "grid")
        loras = [f"runs/first/{prefix(line, m)}-seed{SEEDS[0]}" for m in line["methods"][:4]]
        command = ["eval.py", "--lora", *loras, "--template", str(line["template"]), "--images",
                   "1", "--out", f"runs/first/{name}"]  # fmt: skip
        add(name, None, [(command, "scores.json")])
        if line is not MATRIX[0]:
            continue
        name += "-unseen"  # Fig. 9
        command = [*command[:-1], f"runs/first/{name}", "--split", "unseen"]
        add(name, None, [(command, "scores.json")])
        for study, settings in STUDIES.items():
            command = ["eval.py", *of_base(), "--study", study, *flags(settings)]
            done = f"{study}.json"
            add(study, None, [([*command, "--out", f"runs/first/{study}"], done)])
    for method in TUNE["methods"]:
        for lr in TUNE["lr"]:
            for seed in TUNE["seeds"]:
                name = f"{prefix(MATRIX[0], method)}-lr{lr:g}-seed{seed}"
                line = MATRIX[0] | {"settings": TUNE["settings"]}
                settings, step = training(line, method, seed, lr, f"runs/tune/{name}")
                tune[name] = settings, [step]
    return {"first": first, "tune": tune}


def other_settings(folder, settings):
    """The first setting in which the run in `folder` differs from the table above, or None."""
    path = folder / "config.json"
    if settings is None or not path.exists():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if config.get(name.replace("-", "_")) != value:
            return f"{name} is {config.get(name.replace('-', '_'))}, the table says {value}"
    return None


def is_done(folder, steps):
    return all((folder / output).exists() for _, output in steps)


def run_row(group, name, settings, steps, again=False):
    """Run the steps of a row that are not done, then copy its text and pictures to results/."""
    work, kept = ROOT / "runs" / group / name, ROOT / "results" / group / name
    if again:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(kept, ignore_errors=True)
    for folder in (work, kept):
        if problem := other_settings(folder, settings):
            raise SystemExit(f"error: {folder.relative_to(ROOT)}: {problem}. --again starts anew")
    if is_done(kept, steps):
        print(f"{name}: done")
        return
    for command, output in steps:
        if (work / output).exists():
            continue
        if command[0] == "train.py" and (work / "config.json").exists():
            command = ["train.py", "--resume", f"runs/{group}/{name}"]
        print(f"{name}: python {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code:
            raise SystemExit(f"error: {name} ended with code {code}; the same command goes on")
    for file in sorted(work.rglob("*")):
        of_grids = file.parent.name == "grids"  # the last evaluation's grid.png is enough
        if file.suffix in (".json", ".jsonl", ".png") and not of_grids:
            target = kept / file.relative_to(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


# ---------------------------------------------------------------- report


def read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def evaluated(name, split):
    """The scores of a row on one list, as eval.py wrote them; None if it is not done."""
    data = read(ROOT / "results/first" / name / f"eval-{split}/scores.json")
    return data and next(iter(data["results"].values()))


def metrics(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def mean_reward(name):
    """Mean of a row's curve (Fig. 5) over its rounds; None if there is none."""
    rewards = [line["reward_mean"] for line in metrics(ROOT / "results/first" / name)]
    return statistics.mean(rewards) if rewards else None


def over_seeds(values, digits=4):
    """Mean and spread (unbiased std) over seeds; no spread of a single one."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def gain(after, before):
    """Lists over seeds of scores (n,) against scores (n,), or against as many lists of them.

    The mean gain; its paired standard error over pictures (the gain of a picture is its mean over
    seeds); the spread over seeds of a list's mean gain.
    """
    from eval import paired_gain

    average = lambda lists: [statistics.mean(v) for v in zip(*lists)]  # noqa: E731
    mean, error = paired_gain(average(before), average(after))
    deviations = [statistics.stdev([statistics.mean(v) for v in lists]) if len(lists) > 1 else 0.0
                  for lists in (after, before)]  # fmt: skip
    return mean, error, deviations


def inception_gain(a, b):
    """Evaluations of each seed of two methods -> the mean gain in inception score on the training
    list, its standard error as in `gain` with the seeds' spread, and the paired part alone.
    """
    from eval import jackknife_error

    scores = [[seed["train"]["inception score"][0] for seed in seeds] for seeds in (a, b)]
    left_out = [[seed["train"]["inception score, left out"] for seed in seeds] for seeds in (a, b)]
    mine, other = ([statistics.mean(values) for values in zip(*lists)] for lists in left_out)
    error = jackknife_error([x - y for x, y in zip(mine, other, strict=True)])
    var = sum(statistics.variance(s) / len(s) for s in scores if len(s) > 1)
    mean = statistics.mean(scores[0]) - statistics.mean(scores[1])
    return mean, (error**2 + var) ** 0.5, error


def paper_gain(line, method, against):
    """The paper's own difference in CLIPScore (Table 3), inception score (Tables 1, 2), or None."""
    if line["reward"] != "clip":
        return None, None
    if line["algo"] == "ddpo" and method in PAPER and against in PAPER:
        at = line["template"] - 1
        return [PAPER[method][k][at] - PAPER[against][k][at] for k in ("unseen", "is")]
    if line["algo"] in PAPER_TABLE2 and line["template"] == 1 and against == "vanilla":
        without, with_ours = PAPER_TABLE2[line["algo"]]
        return None, with_ours - without
    return None, None


def comparison(line):
    """The tables of one line of MATRIX, Markdown lines; only the seeds that are done."""
    base = {s: evaluated(f"base-t{line['template']}", s) for s in ("train", "unseen")}
    if not all(base.values()):
        return ["The base model is not scored yet."]
    done, at = {"base": [base]}, line["template"] - 1
    for method in line["methods"]:
        names = [f"{prefix(line, method)}-seed{seed}" for seed in SEEDS]
        both = [{s: evaluated(name, s) for s in ("train", "unseen")} | {"rounds": mean_reward(name)}
                for name in names]  # fmt: skip
        done[method] = [b for b in both if all(b.values())]
    columns = {"CLIPScore": ("train", "unseen"), "recognised": ("train", "unseen"),
               "inception score": ("train",), "style entropy": ("train",)}  # fmt: skip
    cells = [(c, s) for c, splits in columns.items() for s in splits if c in base[s]]
    out = ["| method | seeds | " + " | ".join(f"{c}, {s}" for c, s in cells)
           + " | reward, mean of the rounds | paper: CLIPScore unseen | paper: inception score |",
           "|---" * (len(cells) + 5) + "|"]  # fmt: skip
    value = lambda v: v[0] if isinstance(v, list) else v  # noqa: E731
    for method, seeds in done.items():
        if not seeds:
            continue
        row = [over_seeds([value(b[s][c]) for b in seeds]) for c, s in cells]
        if method == "base":
            row = [cell.split(" ±")[0] for cell in row] + [""]
        else:
            row.append(over_seeds([b["rounds"] for b in seeds]))
        paper = PAPER.get(method) if line["reward"] == "clip" and line["algo"] == "ddpo" else None
        row += [f"{paper[k][at]:.4f}" if paper else "" for k in ("unseen", "is")]
        label = "base" if method == "base" else prefix(line, method)
        out.append(f"| {label} | {len(seeds)} | " + " | ".join(row) + " |")
    out += ["", "± is the spread (standard deviation) over seeds. Below: gains over the base model "
            "and of one method over another on the same noise, mean ± standard error, which adds "
            "the paired error over pictures and the spread over seeds / sqrt(seeds); in brackets "
            "the paired error alone (of the inception score by the jackknife, the same picture "
            "left out of both). A single seed has no spread to add.", "",
            "| gain | seeds | CLIPScore, train | CLIPScore, unseen | recognised, train | "
            "recognised, unseen | inception score, train | paper: CLIPScore, unseen | paper: "
            "inception score |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    pairs = [(m, "base") for m in line["methods"]]
    pairs += [(m, "vanilla") for m in line["methods"] if m != "vanilla"]
    for method, against in pairs:
        a, b = done.get(method), done.get(against)
        if not a or not b:
            continue
        row = []
        for what in ("clip", "recognised"):
            for split in ("train", "unseen"):
                lists = [[seed[split]["scores"].get(what) for seed in seeds] for seeds in (a, b)]
                if None in lists[0] + lists[1]:
                    row.append("")
                    continue
                mean, error, (da, db) = gain(*lists)
                total = (error**2 + da**2 / len(a) + db**2 / len(b)) ** 0.5
                row.append(f"{mean:+.4f} ± {total:.4f} ({error:.4f})")
        row.append("{:+.4f} ± {:.4f} ({:.4f})".format(*inception_gain(a, b)))
        row += [f"{v:+.4f}" if v else "" for v in paper_gain(line, method, against)]
        label = "base" if against == "base" else prefix(line, against)
        out.append(f"| {prefix(line, method)} over {label} | {len(a)} | " + " | ".join(row) + " |")
    out += ["", "Each seed over the base model, mean ± paired standard error over pictures:", "",
            "| run | CLIPScore, train | CLIPScore, unseen | recognised, train | recognised, unseen |",
            "|---|---|---|---|---|"]  # fmt: skip
    for method in line["methods"]:
        for seed in SEEDS:
            name = f"{prefix(line, method)}-seed{seed}"
            mine = {s: evaluated(name, s) for s in ("train", "unseen")}
            if not all(mine.values()):
                continue
            cells = [(s, k) for k in ("clip", "recognised") for s in mine]
            row = [gain([mine[s]["scores"][k]], [base[s]["scores"][k]])[:2] if
                   base[s]["scores"].get(k) else None for s, k in cells]  # fmt: skip
            out.append(f"| {name} | " + " | ".join(
                f"{v[0]:+.4f} ± {v[1]:.4f}" if v else "" for v in row) + " |")  # fmt: skip
    return out


def run_table(group):
    """A line a training run: what it cost and its scores before and after, from summary.json."""
    out = ["| run | lr | queries | updates | minutes | CLIPScore, train | gain | gain, unseen | "
           "recognised, gain | KL to base, last round |", "|---" * 10 + "|"]  # fmt: skip
    for name, (settings, _) in rows()[group].items():
        folder = ROOT / "results" / group / name
        summary = read(folder / "summary.json")
        if settings is None or summary is None:
            continue
        lines = metrics(folder)
        minutes = sum(sum(line["seconds"].values()) for line in lines) / 60
        parts = [summary.get(k) for k in ("train_score", "unseen_score", "train_recognised")]
        gains = [f"{v['gain']:+.4f} ± {v['error']:.4f}" if v else "" for v in parts]
        out.append(
            f"| {name} | {settings['lr']:g} | {lines[-1]['queries']} | "
            f"{sum(line['updates'] for line in lines)} | {minutes:.1f} | "
            f"{summary['train_score']['after']:.4f} | " + " | ".join(gains)
            + f" | {lines[-1]['kl_to_base']:.3f} |"
        )  # fmt: skip
    return out if len(out) > 2 else ["None yet."]


def study_table():
    """Table 5 beside the paper's figures."""
    sys.path.insert(0, str(ROOT))
    from eval import PAPER_TABLE5, wilson

    data = read(ROOT / "results/first/table5/table5.json")
    if data is None:
        return ["Not yet."]
    out = ["| branching at t | " + " | ".join(map(str, data["steps"])) + " |",
           "|---" * (len(data["steps"]) + 1) + "|"]  # fmt: skip
    for name, share in data["share"].items():
        cells = [f"{100 * p:.1f} ({100 * lo:.1f} to {100 * hi:.1f})" for p in share
                 for lo, hi in [wilson(p, data["roots"])]]  # fmt: skip
        out.append(f"| {name}, % | " + " | ".join(cells) + " |")
    out.append("| paper, % | " + " | ".join(f"{100 * p:.1f}" for p in PAPER_TABLE5) + " |")
    return [*out, "", "In brackets 95 % intervals (Wilson). "
            f"{data['roots']} paths, {data['branches']} branches; a score differs above "
            f"{data['differ']:g} standard deviations within the branches at t = T."]  # fmt: skip


def report():
    """Write results/tables.md, and curves.png from the runs that are there."""
    sys.path.insert(0, str(ROOT))
    import eval as evaluation

    out = ["Written by `python results/run_all.py --report`; do not edit.", ""]
    for line in MATRIX:
        out += [f"## {line['algo']}, reward {line['reward']}, template {line['template']}", ""]
        names = [f"{prefix(line, m)}-seed{s}" for m in line["methods"] for s in SEEDS]
        folders = [ROOT / "results/first" / name for name in names]
        folders = [str(f) for f in folders if (f / "metrics.jsonl").exists()]
        out += [*(comparison(line) if folders else ["Not run yet."]), ""]
        if folders:
            target = f"results/first/{prefix(line, 'curves')}"
            evaluation.main(["--study", "curves", "--runs", *folders, "--out", f"{ROOT}/{target}"])
            out += [f"![reward against queries]({target.removeprefix('results/')}/curves.png)", ""]
    out += ["## Table 5", "", *study_table(), "", "## Training runs", "", *run_table("first"), ""]
    out += ["## The learning-rate grid", "", *run_table("tune"), "", "## Commands", ""]
    for group in rows().values():
        out += [f"    python {' '.join(c)}" for _, steps in group.values() for c, _ in steps]
    (ROOT / "results/tables.md").write_text("\n".join(out) + "\n", encoding="utf-8")
    print(f"\nWritten: {Path('results/tables.md')}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--only", nargs="+", metavar="ROW", help="rows to run, by name or shell pattern")
    add("--tune", action="store_true", help="the rows of the learning-rate grid instead")
    add("--list", action="store_true", help="print the rows and commands, run nothing")
    add("--again", action="store_true", help="delete and rerun the rows named by --only")
    add("--report", action="store_true", help="write results/tables.md from what is done")
    args = parser.parse_args(argv)
    if args.report:
        return report()
    if args.again and not args.only:
        parser.error("--again deletes results: name the rows with --only")
    group = "tune" if args.tune else "first"
    chosen = {name: row for name, row in rows()[group].items()
              if not args.only or any(fnmatch.fnmatch(name, o) for o in args.only)}  # fmt: skip
    if not chosen:
        parser.error(f"no row is called {' '.join(args.only)}: see --list")
    for name, (settings, steps) in chosen.items():
        if args.list:
            done = is_done(ROOT / "results" / group / name, steps)
            print(f"{name}{': done' if done else ''}")
            print("".join(f"    python {' '.join(command)}\n" for command, _ in steps), end="")
        else:
            try:
                run_row(group, name, settings, steps, args.again)
            except KeyboardInterrupt:
                raise SystemExit(f"\nStopped in {name}; the same command goes on") from None


if __name__ == "__main__":
    main()
