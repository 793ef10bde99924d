"""What the studies that draw pictures share: flags, loading, scores of latents, tables."""

from collections import defaultdict
from pathlib import Path

import torch

from eval import base_parser, fill_in, guarded, load, load_lora
from support.command import die, positive, progress
from support.prompts import load_prompts
from support.report import save_figure
from support.run_folder import write_json


def study_parser(description, name, roots):
    """The parser of a study of so many `roots`."""
    parser = base_parser(description, f"runs/{name}")
    parser.add_argument("--seed", type=int, default=0, help="keys the noise of the study")
    parser.add_argument("--roots", type=positive, default=roots, help=f"paths ({roots} [paper])")
    return parser


def main(study, parser, argv=None):
    """Keep the numbers and the figure of `study(pipeline, rewards, judge, prompts, args)`."""
    args = fill_in(parser.parse_args(argv))
    if len(args.lora) > 1:
        die("a study takes one --lora at most")
    if getattr(args, "branches", 2) < 2:
        die("--branches must be 2 or more")
    if "is" in args.metrics:
        die("a single picture has no inception score: leave `is` out of --metrics")
    guarded(lambda args: run(study, args), args)


def run(study, args):
    prompts, _ = load_prompts(args.template, args.prompts)
    file = Path(args.out) / Path(args.default_out).name
    file.parent.mkdir(parents=True, exist_ok=True)
    pipeline, rewards, _, judge = load(args, prompts)
    if args.lora:
        load_lora(pipeline.pipe, args.lora[0])
    result, figure = study(pipeline, rewards, judge, prompts, args)
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


def markdown(head, rows):
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]
