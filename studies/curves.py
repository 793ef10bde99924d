"""Fig. 5, 6, 8: runs over reward queries and minutes, and how methods differ.

    python studies/curves.py --runs RUN1 RUN2 ...     # run folders, or folders of them

Runs whose folders differ in `seedN` alone are the seeds of one line, as `train.py` names them;
its band is the standard error over seeds. Compare runs of one model, reward and prompt file.
The spread within a prompt is divided by that of the first round. Do not compare it between
methods with and without BS: pictures of a root are alike, less so as tau grows.

The table has each method less the first one, by seed: equal seeds begin with the same LoRA and
draw from the same noise, before and after too. ± is the standard error over seeds.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from studies.common import markdown
from support.command import Parser, die
from support.report import pyplot, save_figure
from support.run_folder import read_config, read_json, read_metrics


def with_minutes(lines, seconds):
    """Metrics lines with the minutes to their end, if seconds are known, and a relative spread."""
    minutes = np.cumsum(seconds) / 60 if len(seconds) else [None] * len(lines)
    first = lines[0]["spread_within_prompt"] or 1.0
    spreads = [line["spread_within_prompt"] / first for line in lines]
    more = zip(lines, minutes, spreads)
    return [line | {"minutes": so_far, "relative_spread": spread} for line, so_far, spread in more]


def find_runs(paths):
    """{label: {seed: (folder, metrics lines)}} of the finished runs; a label has no seed."""
    groups = {}
    for folder in [f.parent for path in paths for f in sorted(Path(path).rglob("config.json"))]:
        config, lines = read_config(folder), read_metrics(folder)
        if len(lines) < config["rounds"]:
            print(f"passed over: {folder} has {len(lines)} of {config['rounds']} rounds")
            continue
        seconds = [sum(line["seconds"].values()) for line in lines]
        seeds = groups.setdefault(re.sub(r"-?seed\d+", "", str(folder)), {})
        seeds[config["seed"]] = folder, with_minutes(lines, seconds)
    return groups or die("no run is finished: there is nothing to draw")


def curve(runs, x_name, y_name):
    """Mean of x over S runs, (n,), and y, (S, n), at the n queries where all S have both.

    A run that has them nowhere is left out.
    """
    have = lambda line: line.get(x_name) is not None and line.get(y_name) is not None
    runs = [list(filter(have, lines)) for lines in runs if any(map(have, lines))] or [[]]
    tables = [{line["queries"]: (line[x_name], line[y_name]) for line in lines} for lines in runs]
    queries = sorted(set.intersection(*map(set, tables)))
    points = np.array([[table[q] for q in queries] for table in tables])
    x, y = points.reshape(len(tables), len(queries), 2).transpose(2, 0, 1)
    return x.mean(0), y


def panel(groups, x_name, y_name):
    """What `draw` draws in one panel, of groups {label: [metrics lines of a run]}."""
    curves = [(label, *curve(runs, x_name, y_name)) for label, runs in groups.items() if runs]
    labels = [name.replace("_", " ") for name in (x_name, y_name)]
    return *labels, [line for line in curves if line[2].size]


def over_seeds(values):
    """Mean and standard error over the S seeds of values (S, ...); one seed has no error."""
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0 * values[0]
    return values.mean(0), error


def texts(values, digits=4):
    """Values (S, F) -> F texts: means over seeds, with their errors where the seeds differ."""
    text = lambda mean, error: f"{mean:+.{digits}f}" + f" ± {error:.{digits}f}" * bool(error > 1e-9)
    return [text(mean, error) for mean, error in zip(*over_seeds(values))]


def at_equal_recognition(a, b):
    """[[entropy], [entropy]] at the largest recognition that both of two runs reach.

    a, b: of each run the lines that studies/styles.py writes. Entropy is a line between LoRAs
    that are recognised more than all before them.
    """
    points = [[(line["recognised_of_90"], line["style_entropy"]) for line in run] for run in (a, b)]
    level = min(max(points[0])[0], max(points[1])[0])
    records = lambda run: [p for i, p in enumerate(run) if all(p[0] > q[0] for q in run[:i])]
    return [[np.interp(level, *zip(*records(run)))] for run in points]


def at_equal_time(a, b):
    """[[mean], [mean]] of two runs' `recognised` in %, over the minutes that both curves have.

    a, b: metrics lines with minutes. A curve begins at the end of its first round.
    """
    curves = [curve([run], "minutes", "recognised") for run in (a, b)]
    minutes = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 1000)
    return [[100 * np.interp(minutes, x, y[0]).mean()] for x, y in curves]


AT_EQUAL = {"style entropy": at_equal_recognition, "equal time": at_equal_time}


def draw(panels, path):
    """A picture of panels side by side: (x label, y label, [(method, x (n,), y (S, n))])."""
    plt, colours, panels = pyplot(), {}, [panel for panel in panels if panel[2]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for ax, (x_label, y_label, lines) in zip(axes[0], panels):
        ax.set(xlabel=x_label, ylabel=y_label)
        for method, x, y in lines:
            mean, error = over_seeds(y)
            colour = colours.setdefault(method, f"C{len(colours)}")
            if len(x) > 1 and (np.diff(x) > 0).all():
                ax.plot(x, mean, color=colour, label=f"{method} ({len(y)})")
                ax.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2)
            else:  # a line would go back and forth
                ax.errorbar(x, mean, error, fmt=".", color=colour)
    figure.tight_layout()
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncol=3, title="method (seeds)")
    save_figure(figure, path)


def measures(folder, lines):
    """What a run is compared by: {what: number}, means over its rounds and gains at the end."""
    means = [what for what in ("reward_mean", "recognised") if what in lines[0]]
    found = {f"{what}, all rounds": np.mean([line[what] for line in lines]) for what in means}
    summary = read_json(folder / "summary.json") or {}
    return found | {f"gain, {name.replace('_', ' ')}": of["gain"] for name, of in summary.items()}


def difference_rows(groups):
    """Rows of a table: each method less the first, over the seeds that both have."""
    rows, (first, *others) = [], groups
    for label in others:
        seeds = sorted(groups[label].keys() & groups[first].keys())
        pairs = [(measures(*groups[label][s]), measures(*groups[first][s])) for s in seeds]
        for what in pairs[0][0] if pairs else ():
            values = np.array([[its[what], of_first[what]] for its, of_first in pairs])  # (S, 2)
            (difference,) = texts(values[:, :1] - values[:, 1:])
            means = [f"{mean:.4f}" for mean in values.mean(0)]
            rows.append([label, what, len(seeds), *means, difference])
    return rows


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", required=True, help="run folders, or folders of some")
    parser.add_argument("--out", default="runs/curves", help="folder: its curves.png is replaced")
    args = parser.parse_args(argv)
    groups = find_runs(args.runs)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    lines = {label: [run for _, run in seeds.values()] for label, seeds in groups.items()}
    over_queries = ("reward_mean", "recognised", "kl_to_base", "relative_spread")
    panels = [panel(lines, "queries", what) for what in over_queries]
    panels.append(panel(lines, "minutes", "reward_mean"))
    draw(panels, f"{args.out}/curves.png")
    head = ["method", "figure", "seeds", "its", f"{next(iter(groups))}'s", "difference"]
    print("\n".join(markdown(head, difference_rows(groups))))
    print(f"\nPicture: {args.out}/curves.png")


if __name__ == "__main__":
    main()
