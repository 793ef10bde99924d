"""The runs of results/PROTOCOL.md by name, and the verdict on those that are finished.

    python studies/verdict.py --list                  # the command of every run, done or not
    python studies/verdict.py --run b2-seed200        # make it in runs/verdict, or go on with it
    python studies/verdict.py --collect runs/verdict  # keep what is finished in results/main
    python studies/verdict.py                         # tables.md, verdict.json and verdict.png

results/ has protocol.json, the rows and claims; main/ROW.jsonl, a line a seed; ROW-seed200, a LoRA;
once measured, styles.json (studies/styles.py) and seconds.json, {row: {tau: seconds a round}}.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from studies.common import markdown
from studies.curves import at_equal_recognition, draw, over_seeds, panel, texts, with_minutes
from support.command import Parser, die
from support.run_folder import LORA, read_json, read_metrics, write_json, write_text

RESULTS, WORK = ROOT / "results", ROOT / "runs/verdict"
ENDS = ("train_recognised", "unseen_recognised", "train_score", "unseen_score")
CLAIMS = ("claim", "paper", "rows", "seeds", "verdict", "recognised, all rounds", *ENDS)
ROWS = ("row", "seeds", *CLAIMS[5:], "minutes to half of DDPO's gain", "to nine tenths")
DRAWN = ("b2", "ddpo", "ddpo-small", "group-two", "group-one")
PANELS = (("queries", "recognised"), ("minutes", "recognised"))
PANELS += (("recognised", "relative_spread"), ("recognised_of_90", "style_entropy"))


def all_runs(rows):
    """{run: its command after `python`}, in the protocol's order."""
    found = {}
    for row, about in rows.items():
        for seed in about["seeds"]:
            run = f"{row}-seed{seed}"
            found[run] = f"train.py {about['flags']} --seed {seed} --out runs/verdict/{run}"
    return found


def make(runs, name):
    """Make the run in runs/verdict, or go on with it, and keep it."""
    command = runs.get(name, "")
    if not command or "RATE" in command:
        die(f"{name} is no run of the protocol, or its rate is not chosen yet: see --list")
    if name.startswith("group"):
        die(f"flags can not: make README's change, run `python {command}`, then --collect")
    if (WORK / name / "config.json").exists():
        command = f"train.py --resume runs/verdict/{name}"
    done = (WORK / name / "summary.json").exists()
    if not done and subprocess.run([sys.executable, *command.split()], cwd=ROOT).returncode:
        die(f"{name} is not finished: the same command goes on")
    collect(runs, WORK)


def read_row(row):
    """{seed: run} of the finished runs of a row."""
    path = RESULTS / f"main/{row}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {run["seed"]: run for run in map(json.loads, lines)}


def collect(runs, folder):
    """Keep the finished ones of the runs in `folder`; a run that is kept is never replaced."""
    for name in runs:
        source, (row, seed) = Path(folder) / name, name.split("-seed")
        kept, rounds = read_row(row), read_metrics(source)
        if int(seed) in kept or not rounds:
            continue
        run = {"seed": int(seed), "config": read_json(source / "config.json")}
        run |= {"summary": read_json(source / "summary.json"), "rounds": rounds}
        if run["summary"] is None or len(rounds) != run["config"]["rounds"]:
            print(f"{name} is not finished: it has {len(rounds)} rounds")
            continue
        files = ["config.json", LORA] if seed == "200" else []
        files += ["before-after.png"] if name in ("b2-seed200", "ddpo-seed200") else []
        for file in files:
            (RESULTS / "main" / name).mkdir(parents=True, exist_ok=True)
            (RESULTS / "main" / name / file).write_bytes((source / file).read_bytes())
        lines = [json.dumps(run) + "\n" for _, run in sorted({**kept, int(seed): run}.items())]
        write_text(RESULTS / f"main/{row}.jsonl", "".join(lines))


def read_rows(names):
    """{row: {seed: run}} with what was measured afterwards: styles, and rounds' minutes."""
    rows = {row: read_row(row) for row in names}
    styles, seconds = (read_json(RESULTS / f"{name}.json") or {} for name in ("styles", "seconds"))
    for row, runs in rows.items():
        measured = sorted((int(tau), value) for tau, value in seconds.get(row, {}).items())
        for seed, run in runs.items():
            run["styles"] = styles.get(f"{row}-seed{seed}", [])
            taus = [line["tau"] for line in run["rounds"]]  # between those measured it is a line
            each = np.interp(taus, *zip(*measured)) if measured else ()
            run["rounds"] = with_minutes(run["rounds"], each)
            run["minutes"] = run["rounds"][-1]["minutes"]
            run["recognised"] = np.array([line["recognised"] for line in run["rounds"]])
    return rows


def figures(run):
    """[F]: mean recognition of all rounds, and the gains at the end, which tuning does not draw."""
    gains = [run["summary"][name]["gain"] for name in ENDS if name in run["summary"]]
    return [run["recognised"].mean(), *gains]


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
        pairs = []
        for run, other in [(rows[a][seed], rows[b][seed]) for seed in rows[a] if seed in rows[b]]:
            if kind == "recognition":
                pairs.append([figures(run), figures(other)])
            elif kind == "style entropy" and run["styles"] and other["styles"]:
                pairs.append(at_equal_recognition(run["styles"], other["styles"]))
            elif kind == "minutes" and run["minutes"] and other["minutes"]:
                pairs.append([[run["minutes"]], [other["minutes"]]])
        found = ["not run yet"]
        if pairs:
            differences = np.array(pairs)[:, 0] - np.array(pairs)[:, 1]  # (S, F)
            found = [verdict(differences[:, 0]), *texts(differences)]
        table.append([claim, paper, f"{a} less {b}", len(pairs), *found])
    return table


def describe(planned, rows):
    """The table of rows: gains over the base, and minutes until DDPO's final gain is reached."""
    table, firsts = [], {}  # the first rounds draw before any update: they show the base
    for run in (run for runs in rows.values() for run in runs.values()):
        firsts.setdefault(run["config"]["template"], []).append(run["recognised"][0])
    for row, runs in rows.items():
        found = [row, f"{len(runs)} of {len(planned[row]['seeds'])}"]
        if runs:
            _, run = min(runs.items())
            base = np.mean(firsts[run["config"]["template"]])
            gains = np.array([figures(run) for run in runs.values()])  # (S, F)
            gains[:, 0] -= base
            found += texts(gains)
        if runs and run["minutes"] and rows["ddpo"]:
            final = np.mean([run["recognised"][-4:] for run in rows["ddpo"].values()])
            mean = np.mean([run["recognised"] for run in runs.values()], 0)
            for share in (0.5, 0.9):
                there = np.flatnonzero(mean >= base + share * (final - base))
                found += [f"{run['rounds'][there[0]]['minutes']:.1f}" if len(there) else "never"]
        table.append(found)
    return table


def report(protocol):
    """Write tables.md, verdict.json and verdict.png from the files of results/ alone."""
    rows = read_rows(protocol["rows"])
    claims, kept = judge(protocol["claims"], rows), describe(protocol["rows"], rows)
    text = "Written by `python studies/verdict.py`. Shares; ± is the standard error over seeds.\n"
    text += (
        f"{sum(len(line) > 5 for line in claims)} verdicts, each by the first figure after it.\n"
    )
    for title, head, table in (("Claims", CLAIMS, claims), ("Rows", ROWS, kept)):
        text += "\n".join([f"\n## {title}\n", *markdown(head, table), ""])
    write_text(RESULTS / "tables.md", text)
    write_json(RESULTS / "verdict.json", {"claims": claims, "rows": kept})
    lines = {row: [run["rounds"] + run["styles"] for run in rows[row].values()] for row in DRAWN}
    draw([panel(lines, *names) for names in PANELS], RESULTS / "verdict.png")


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="every run's command, done or open")
    parser.add_argument("--run", metavar="RUN", help="make one run, or go on with it")
    parser.add_argument("--collect", metavar="FOLDER", help="keep a folder's finished runs")
    args = parser.parse_args(argv)
    protocol = read_json(RESULTS / "protocol.json")
    runs = all_runs(protocol["rows"])
    if args.list:
        for run, command in runs.items():
            row, seed = run.split("-seed")
            print(f"{'done' if int(seed) in read_row(row) else 'open'}  {run}: python {command}")
    elif args.run:
        make(runs, args.run)
    elif args.collect:
        collect(runs, args.collect)
    else:
        report(protocol)


if __name__ == "__main__":
    main()
