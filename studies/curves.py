"""Fig. 5, 6, 8: runs over reward queries and minutes, and how methods differ.

    python studies/curves.py --runs RUN1 RUN2 ...     # run folders, or folders that hold some

Runs of one method and equal settings are the seeds of one line; its band is the standard error
over seeds. The spread within a prompt is divided by that of the first round. Do not compare it
between methods with and without BS: pictures of a root are alike, less so as tau grows.

The table has each method less the first one, by seed: equal seeds begin with the same LoRA and
draw from the same noise, before and after too. ± is the standard error over seeds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from studies.common import markdown
from support.command import Parser, die
from support.report import pyplot, save_figure
from support.run_folder import WITH_RESUME, method_slug, read_config, read_json, read_metrics

# What may differ between the seeds of one line: it changes no expectation. tau needs `rounds`
SAME_LINE = {*WITH_RESUME, "seed", "precision", "eval_images", "eval_prompts", "made_with"}
SAME_LINE = SAME_LINE - {"rounds"} | {"validation_prompt"}
# What must agree if rewards are to be compared, and pictures to be of the same noise
ALIKE = ("model", "reward", "template", "prompts", "image_size", "T", "eta", "guidance")


def with_minutes(lines, seconds):
    """Metrics lines with the minutes to their end, if seconds are known, and a relative spread."""
    minutes = np.cumsum(seconds) / 60 if len(seconds) else [None] * len(lines)
    first = lines[0]["spread_within_prompt"] or 1.0
    out = []
    for line, so_far in zip(lines, minutes):
        spread = line["spread_within_prompt"] / first
        out.append(line | {"minutes": so_far, "relative_spread": spread})
    return out


def find_runs(paths):
    """[(folder, config, metrics lines)] of the finished runs; says which are passed over."""
    runs = []
    for path in map(Path, paths):
        inside = [] if (path / "config.json").exists() else sorted(path.glob("*/config.json"))
        for folder in [file.parent for file in inside] or [path]:
            config, lines = read_config(folder), read_metrics(folder)
            if len(lines) < config["rounds"]:
                print(f"passed over: {folder} has {len(lines)} of {config['rounds']} rounds")
                continue
            seconds = [sum(line["seconds"].values()) for line in lines]
            runs.append((folder, config, with_minutes(lines, seconds)))
    for name in ALIKE:
        if len({str(config.get(name)) for _, config, _ in runs}) > 1:
            die(f"the runs differ in {name}: they can not be compared")
    return runs or die("no run is finished: there is nothing to draw")


def group_runs(runs):
    """{label: {seed: (folder, lines)}}; a label is the method, and the settings that tell apart."""
    groups = {}
    for folder, config, lines in runs:
        words = [method_slug(config)]
        same_method = [other for _, other, _ in runs if method_slug(other) == words[0]]
        for key in sorted(config.keys() - SAME_LINE):
            if len({str(other.get(key)) for other in same_method}) > 1:
                words.append(f"{key} {config[key]}")
        seeds = groups.setdefault(", ".join(words), {})
        if config["seed"] in seeds:
            die(f"{seeds[config['seed']][0]} and {folder} are one run: {', '.join(words)}")
        seeds[config["seed"]] = folder, lines
    return groups


def curve(runs, x_name, y_name):
    """Mean of x over S runs, (n,), and y, (S, n), at the n queries where all runs have both."""
    tables = [{} for _ in runs]
    for table, lines in zip(tables, runs):
        for line in lines:
            if line.get(x_name) is not None and line.get(y_name) is not None:
                table[line["queries"]] = line[x_name], line[y_name]
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


def texts(values):
    """Values (S, F) -> F texts: means over seeds, with their errors where there are several."""
    text = "{:+.4f} ± {:.4f}" if len(values) > 1 else "{:+.4f}"
    return [text.format(mean, error) for mean, error in zip(*over_seeds(values))]


def at_equal_recognition(a, b):
    """[[entropy], [entropy]] at the largest recognition that both of two runs reach.

    a, b: of each run the lines that studies/styles.py writes. Entropy is a line between LoRAs
    that are recognised more than all before them.
    """
    level = min(max(line["recognised_of_90"] for line in run) for run in (a, b))
    found = []
    for first, *others in (a, b):
        records = [first]
        for line in others:
            if line["recognised_of_90"] > records[-1]["recognised_of_90"]:
                records.append(line)
        shares = [line["recognised_of_90"] for line in records]
        found.append([np.interp(level, shares, [line["style_entropy"] for line in records])])
    return found


def draw(panels, path):
    """A picture of panels side by side: (x label, y label, [(method, x (n,), y (S, n))])."""
    plt, colours, panels = pyplot(), {}, [panel for panel in panels if panel[2]]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for ax, (x_label, y_label, lines) in zip(axes[0], panels):
        ax.set(xlabel=x_label, ylabel=y_label)
        for method, x, y in lines:
            mean, error = over_seeds(y)
            colour = colours.setdefault(method, f"C{len(colours)}")
            ax.plot(x, mean, color=colour, label=f"{method} ({len(y)})", marker="." * (len(x) < 6))
            ax.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2)
    figure.tight_layout()
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncol=3, title="method (seeds)")
    save_figure(figure, path)


def measures(folder, lines):
    """What a run is compared by: {what: number}, means over its rounds and gains at the end."""
    found = {}
    for what in ("reward_mean", "recognised"):
        if all(what in line for line in lines):
            found[f"{what}, all rounds"] = np.mean([line[what] for line in lines])
    for name, gained in (read_json(folder / "summary.json") or {}).items():
        found[f"gain, {name.replace('_', ' ')}"] = gained["gain"]
    return found


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
    add = parser.add_argument
    add("--runs", nargs="+", required=True, metavar="RUN", help="run folders, or folders of some")
    add("--out", default="runs/curves", help="folder for curves.png, which is written anew")
    args = parser.parse_args(argv)
    groups = group_runs(find_runs(args.runs))
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
