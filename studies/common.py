"""What the studies share: flags, loading, scores of latents, tables and figures."""

from collections import defaultdict
from pathlib import Path

import torch

from eval import apply_lora, base_parser, fill_in, guarded, load, read_lora
from files import aside, write_json
from model import progress
from processes import die
from prompts import load_prompts


def study_parser(description, name, **own):
    """The parser of a study that draws pictures; own: {flag: (default, help)}."""
    parser = base_parser(description, f"runs/{name}")
    add = parser.add_argument
    add("--prompt", action="append", help="a prompt of your own; may be repeated")
    add("--seed", type=int, default=0, help="keys the noise of the study")
    for flag, (default, text) in own.items():
        add(f"--{flag}", type=type(default), default=default, help=f"{text} ({default})")
    return parser


def main(study, parser, argv=None):
    """Run `study(model, rewards, judge, prompts, args)` and write what it returns.

    Bad flags and a missing matplotlib end with one line, before anything is loaded.
    """
    args = parser.parse_args(argv)
    pyplot()
    if len(args.lora) > 1:
        die("a study takes one --lora at most")
    if args.offload:
        die("--offload is for train.py and eval.py")
    if getattr(args, "branches", 2) < 2:
        die("--branches must be 2 or more")
    if not getattr(args, "differ", 1) > 0:  # NaN is neither
        die("--differ must be above 0")
    if not all(p.strip() for p in args.prompt or ()):
        die("--prompt is empty")
    args = fill_in(args)
    if "is" in args.metrics:
        die("a single picture has no inception score: leave `is` out of --metrics")
    guarded(lambda args: run(study, args), args)


def run(study, args):
    train, unseen = load_prompts(args.template, args.prompts)
    prompts, known = args.prompt or train, [*train, *unseen, *(args.prompt or ())]
    folder, name = Path(args.out), Path(args.default_out).name
    state = read_lora(args.lora[0]) if args.lora else None
    folder.mkdir(parents=True, exist_ok=True)
    model, rewards, _, judge = load(args, list(dict.fromkeys(known)))
    if state is not None:
        apply_lora(model, args.lora[0], state)
    result = study(model, rewards, judge, prompts, args)
    write_json(folder / f"{name}.json", {"settings": vars(args), **result})
    print(f"\nNumbers and picture: {folder}/{name}.json, .png")


def rate(model, x_0, owners, rewards, judge=None):
    """Scores of latents x_0 (n, C, h, w): {metric: (n,)}, with those of the judge."""
    scores = defaultdict(list)
    for rows in progress(torch.arange(len(x_0)).split(model.decode_batch), "scoring"):
        images, prompts = model.decode(x_0[rows]), [owners[j] for j in rows.tolist()]
        for name, reward in rewards.items():
            scores[name].append(reward(images, prompts))
        if judge:
            scores["recognised"].append(judge(images, prompts).float())
    return {name: torch.cat(v) for name, v in scores.items()}


def wilson(p, n, z=1.96):
    """Wilson's 95 % interval of a share p of n; no point even where p is 0 or 1."""
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    return tuple(max(0.0, (middle + sign * half) / (1 + z**2 / n)) for sign in (-1, 1))


def markdown(head, rows):
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def pyplot():
    """matplotlib, only where a picture needs it."""
    try:
        import matplotlib
    except ImportError:
        die("the picture of a study needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path):
    with aside(path) as part:
        figure.savefig(part, format="png", dpi=120, bbox_inches="tight")
    pyplot().close(figure)
