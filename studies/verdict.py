"""The runs of results/PROTOCOL.md by name, and the verdict on those that are finished.

    python studies/verdict.py --list                  # the command of every run
    python studies/verdict.py --run b2-seed200        # make it in runs/verdict, or go on with it
    python studies/verdict.py --collect runs/verdict  # keep what is finished in results/main
    python studies/verdict.py                         # tables.md, verdict.json and verdict.png

results/ has protocol.json, the rows and claims; main/ROW.jsonl, a line a seed; ROW-seed200, a LoRA;
once measured, styles.json (studies/styles.py) and seconds.json, {row: {tau: seconds a round}}.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from studies.common import markdown
from studies.curves import AT_EQUAL, draw, over_seeds, panel, texts, with_minutes
from support.command import Parser, die
from support.run_folder import LORA, ROOT, read_json, read_metrics, write_json, write_text

RESULTS = ROOT / "results"
ENDS = {"train_recognised": "end, training, %", "unseen_recognised": "end, unseen, %"}
ENDS |= {"train_score": "CLIPScore x 100, training", "unseen_score": "the same, unseen"}
CLAIMS = ("claim", "paper", "rows", "seeds", "verdict", "all rounds, %", *ENDS.values())
ROWS = ("row", "seeds", *CLAIMS[5:], "minutes to half of DDPO's gain", "to nine tenths")
DRAWN = ("b2", "ddpo", "ddpo-small", "bs", "group-two", "group-one")
PANELS = ["queries recognised", "minutes recognised", "recognised relative_spread"]
PANELS += ["recognised_of_90 style_entropy"]


def all_runs(rows):
    """{run: its command after `python`}, in the protocol's order."""
    runs = [(f"{row}-seed{n}", n, of["flags"]) for row, of in rows.items() for n in of["seeds"]]
    return {run: f"train.py {flags} --seed {n} --out runs/verdict/{run}" for run, n, flags in runs}


def make(runs, name):
    """Make the run in runs/verdict, or go on with it."""
    if name not in runs or name.startswith("group"):
        die(f"{name} is no run that flags can make: see --list; group-... need README's change")
    command = runs[name]
    if (ROOT / "runs/verdict" / name / "config.json").exists():
        command = f"train.py --resume runs/verdict/{name}"
    sys.exit(subprocess.run([sys.executable, *command.split()], cwd=ROOT).returncode)


def read_row(row):
    """{seed: run} of the finished runs of a row."""
    path = RESULTS / f"main/{row}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {run["seed"]: run for run in map(json.loads, lines)}


def collect(runs, folder):
    """Keep the finished ones of the runs in `folder`; a run that is kept is never replaced."""
    for name in runs:
        source, (row, seed) = Path(folder) / name, name.split("-seed")
        kept = read_row(row)
        if int(seed) in kept or not (source / "summary.json").exists():  # a run ends with it
            continue
        files = ("config", "summary", "before", "after")
        run = {"seed": int(seed)} | {name: read_json(source / f"{name}.json") for name in files}
        run["rounds"] = read_metrics(source)
        for file in ("config.json", LORA) if seed == "200" else ():
            (RESULTS / "main" / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, RESULTS / "main" / name / file)
        lines = [json.dumps(run) + "\n" for _, run in sorted({**kept, int(seed): run}.items())]
        write_text(RESULTS / f"main/{row}.jsonl", "".join(lines))


def read_rows(names):
    """{row: {seed: run}}; a run has what the kinds of claims compare, where it was measured."""
    rows = {row: read_row(row) for row in names}
    styles, seconds = (read_json(RESULTS / f"{name}.json") or {} for name in ("styles", "seconds"))
    for row, runs in rows.items():
        measured = sorted((int(tau), value) for tau, value in seconds.get(row, {}).items())
        for seed, run in runs.items():
            taus = [line["tau"] for line in run["rounds"]]  # between those measured it is a line
            each = np.interp(taus, *zip(*measured)) if measured else ()
            lines = with_minutes(run["rounds"], each)
            run["equal time"] = lines if measured else []
            run["minutes"] = [lines[-1]["minutes"]] if measured else []
            run["shares"] = 100 * np.array([line["recognised"] for line in run["rounds"]])
            gains = [100 * run["summary"][name]["gain"] for name in ENDS if name in run["summary"]]
            run["recognition"] = [run["shares"].mean(), *gains]  # tuning has no gains at the end
            run["style entropy"] = styles.get(f"{row}-seed{seed}", [])
            run["lines"] = lines + run["style entropy"]
    return rows


def verdict(differences):
    """Of n seeds' (n,): beyond two errors it holds or does not, else how many seeds would tell."""
    n, (mean, error) = len(differences), over_seeds(differences)
    if n > 1 and abs(mean) > 2 * error:
        return "holds" if mean > 0 else "does not hold"
    more = f", {max(n, int(n * (2 * error / mean) ** 2)) + 1} would" if n > 1 and mean else ""
    return f"not resolved at {n} seed{'s' if n > 1 else ''}{more}"


def judge(claims, rows):
    """The table of claims, each of two rows; differences are paired by seed."""
    table = []
    for claim, paper, kind, a, b in claims:
        pairs = [(rows[a][seed][kind], rows[b][seed][kind]) for seed in rows[a] if seed in rows[b]]
        at_equal = AT_EQUAL.get(kind, lambda *pair: pair)
        pairs = [at_equal(*pair) for pair in pairs if all(pair)]
        found = ["not run yet"]
        if pairs:
            differences = -np.diff(pairs, axis=1)[:, 0]  # (S, F)
            found = [verdict(differences[:, 0]), *texts(differences, 2)]
        table.append([claim, paper, f"{a} less {b}", len(pairs), *found])
    return table


def describe(planned, rows):
    """The table of rows: gains over the base, and minutes until DDPO's final gain is reached."""
    table, firsts = [], {}  # the first rounds draw before any update: they show the base
    for run in (run for runs in rows.values() for run in runs.values()):
        firsts.setdefault(run["config"]["template"], []).append(run["shares"][0])
    for row, seeds in rows.items():
        runs = list(seeds.values())
        found = [row, f"{len(runs)} of {len(planned[row]['seeds'])}"]
        if runs:
            base = np.mean(firsts[runs[0]["config"]["template"]])
            gains = np.array([run["recognition"] for run in runs])  # (S, F)
            gains[:, 0] -= base
            found += texts(gains, 2)
        if runs and runs[0]["minutes"] and rows["ddpo"]:
            final = np.mean([run["shares"][-4:] for run in rows["ddpo"].values()])
            mean = np.mean([run["shares"] for run in runs], 0)
            for share in (0.5, 0.9):
                there = np.flatnonzero(mean >= base + share * (final - base))
                found += [f"{runs[0]['lines'][there[0]]['minutes']:.1f}" if len(there) else "never"]
        table.append(found)
    return table


def report(protocol):
    """Write tables.md, verdict.json and verdict.png from the files of results/ alone."""
    rows = read_rows(protocol["rows"])
    claims, kept = judge(protocol["claims"], rows), describe(protocol["rows"], rows)
    judged = sum(len(line) > 5 for line in claims)
    text = ["Written by `python studies/verdict.py`. ± is the standard error over seeds."]
    text += [f"{judged} verdicts, each by the first figure after it.", "", "## Claims", ""]
    text += [*markdown(CLAIMS, claims), "", "## Rows", "", *markdown(ROWS, kept), ""]
    write_text(RESULTS / "tables.md", "\n".join(text))
    write_json(RESULTS / "verdict.json", {"claims": claims, "rows": kept})
    lines = {row: [run["lines"] for run in rows[row].values()] for row in DRAWN}
    draw([panel(lines, *names.split()) for names in PANELS], RESULTS / "verdict.png")


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="the command of every run")
    parser.add_argument("--run", metavar="RUN", help="make one run, or go on with it")
    parser.add_argument("--collect", metavar="FOLDER", help="keep a folder's finished runs")
    args = parser.parse_args(argv)
    protocol = read_json(RESULTS / "protocol.json")
    runs = all_runs(protocol["rows"])
    if args.list:
        print(*(f"{run}: python {command}" for run, command in runs.items()), sep="\n")
    elif args.run:
        make(runs, args.run)
    elif args.collect:
        collect(runs, args.collect)
    else:
        report(protocol)


if __name__ == "__main__":
    main()
