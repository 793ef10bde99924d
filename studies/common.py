"""What the studies that draw pictures share: flags, loading, scores of latents, tables."""

from collections import defaultdict
from pathlib import Path

import torch

from eval import base_parser, fill_in, guarded, load, load_lora
from support.command import die, positive, progress
from support.prompts import load_prompts
from support.report import pyplot, save_figure
from support.run_folder import write_json


def study_parser(description, name, **own):
    """The parser of a study; own: {flag: (default, help)}, a whole number or a float."""
    parser = base_parser(description, f"runs/{name}")
    add = parser.add_argument
    add("--prompt", action="append", help="a prompt of your own; may be repeated")
    add("--seed", type=int, default=0, help="keys the noise of the study")
    for flag, (default, text) in own.items():
        kind = float if isinstance(default, float) else positive
        add(f"--{flag}", type=kind, default=default, help=f"{text} ({default})")
    return parser


def main(study, parser, argv=None):
    """Run `study(pipeline, rewards, judge, prompts, args)` and keep the result and figure it returns.

    Bad flags end with one line, before anything is loaded.
    """
    args = parser.parse_args(argv)
    if len(args.lora) > 1:
        die("a study takes one --lora at most")
    if getattr(args, "branches", 2) < 2:
        die("--branches must be 2 or more")
    if not getattr(args, "differ", 1) > 0:  # NaN is neither
        die("--differ must be above 0")
    if not all(prompt.strip() for prompt in args.prompt or ()):
        die("--prompt is empty")
    args = fill_in(args)
    if "is" in args.metrics:
        die("a single picture has no inception score: leave `is` out of --metrics")
    guarded(lambda args: run(study, args), args)


def run(study, args):
    pyplot()  # where matplotlib is missing, the study stops here and not after the work
    train, _ = load_prompts(args.template, args.prompts)
    prompts = args.prompt or train
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, rewards, _, judge = load(args, prompts)
    if args.lora:
        load_lora(pipeline.pipe, args.lora[0])
    result, figure = study(pipeline, rewards, judge, prompts, args)
    file = folder / Path(args.default_out).name
    write_json(file.with_suffix(".json"), {"settings": vars(args), **result})
    save_figure(figure, file.with_suffix(".png"))
    print(f"\nNumbers and picture: {file}.json, .png")


def rate(pipeline, x_0, owners, rewards, judge=None):
    """Scores of latents x_0 (n, C, h, w) of n prompts: {metric: (n,)}, with those of the judge."""
    scores = defaultdict(list)
    for rows in progress(torch.arange(len(x_0)).split(pipeline.decode_batch), "scoring"):
        images = pipeline.decode(x_0[rows])
        prompts = [owners[j] for j in rows]
        for name, reward in rewards.items():
            scores[name].append(reward(images, prompts))
        if judge:
            scores["recognised"].append(judge(images, prompts).float())
    return {name: torch.cat(parts) for name, parts in scores.items()}


def wilson(p, n, z=1.96):
    """Wilson's 95 % interval of a share p of n; no point even where p is 0 or 1."""
    middle = p + z**2 / (2 * n)
    half = z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    low, high = (max(0.0, (middle + side * half) / (1 + z**2 / n)) for side in (-1, 1))
    return low, high


def markdown(head, rows):
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]
