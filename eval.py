"""What is measured of models: scores and pictures (Sec. 4, App. F).

    python eval.py --lora RUN --prompt "a cat washing dishes"     # base and LoRA side by side
    python eval.py --lora RUN1 RUN2 --template 1 --split unseen   # a table of scores, JSON, a grid

    metric             what it is                                             source
    CLIPScore          cosine of CLIP's picture and text embeddings           Sec. 4.1
    BERTScore          recall of LLaVA's description, `--metrics clip,bert`   Sec. 4.1
    inception score    exp(E_x KL(p(y|x) || p(y))), `--metrics clip,is`       Eq. 9, App. F.2
    recognised         share that the tiny model's judge calls right          [ours], tiny only

A picture's noise is keyed by its prompt and number alone: the same for every model,
method and training seed, so models are compared in pairs. +- is a standard error over
pictures. The paper's studies (Table 5, Fig. 5, 6, 8, 11, 12) are scripts in `studies/`.
"""

import support  # noqa: F401  it sets what must be set before torch is imported

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lora import lora_off
from rewards import REWARDS, check_reward_name, load_reward
from support.command import Parser, Stop, die, first_line, positive, progress
from support.pipeline import DTYPES, ETA, GUIDANCE, T, add_model_flags, check_model_flags
from support.pipeline import load_pipeline, tiny_folder
from support.processes import all_sum
from support.prompts import load_prompts
from support.report import COLUMNS, GRID, save_grid
from support.run_folder import CHECKPOINT, LORA, read_config, read_json, read_safetensors
from support.run_folder import reading, write_json

LABELS = {"clip": "CLIPScore", "bert": "BERTScore"}


# ---------------------------------------------------------------- scores of a model


@torch.no_grad()
def evaluate(pipeline, rewards, prompts, each, judge=None, worker=0, workers=1, seed=()):
    """Score `each` pictures of every prompt, drawn from noise keyed by (prompt, number, *seed).

    rewards: by name. Processes share the work. Returns {name: list of n}, number by number
    of every prompt, with "recognised" (None without a judge); and this process's pictures
    (m, 3, H, W).
    """
    owners = [(prompt, number) for number in range(each) for prompt in prompts]
    own = list(range(len(owners)))[worker::workers]
    names = [owners[j][0] for j in own]
    keys = [("evaluation", *owners[j], *seed) for j in own]
    x_0 = pipeline.policy.denoise(None, pipeline.policy.schedule.T, 0, names, keys)
    scores = {name: torch.zeros(len(owners)) for name in (*rewards, "recognised")}
    pictures = []
    size = pipeline.decode_batch
    for start in progress(range(0, len(own), size), "scoring"):
        rows = own[start : start + size]
        some_names = names[start : start + size]
        pictures.append(pipeline.decode(x_0[start : start + size]))
        for name, reward in rewards.items():
            scores[name][rows] = reward(pictures[-1], some_names)
        if judge:
            scores["recognised"][rows] = judge(pictures[-1], some_names).float()
    scores = {name: all_sum(v, pipeline.device).tolist() for name, v in scores.items()}
    if not judge:
        scores["recognised"] = None
    return scores, torch.cat(pictures) if pictures else torch.zeros(0, 3, 8, 8)


def find_judge(pipeline, candidates):
    """The tiny model's judge, never a reward: (pictures, prompts) -> (B,) bool; None elsewhere.

    None, too, where one of the candidates is a user's own prompt, which it has never seen.
    """
    if pipeline.tiny is None:
        return None
    from tiny.judge import load_judge, recognise
    from tiny.world import parse

    try:
        [parse(prompt) for prompt in candidates]
    except ValueError:
        return None
    judge = load_judge(pipeline.tiny / "judge")
    return lambda images, prompts: recognise(judge, images, prompts)


def mean_error(values):
    """Mean and standard error of a list of numbers."""
    v = torch.tensor(values).double()
    return v.mean().item(), (v.std() / len(v) ** 0.5).item() if len(v) > 1 else 0.0


def paired_gain(before, after):
    """Mean gain over the same (prompt, noise) pairs and its standard error."""
    return mean_error([b - a for a, b in zip(before, after, strict=True)])


def compare(before, after, score_name):
    """Scores before and after by prompt list -> a summary dict and the lines that print it."""
    summary, rows = {}, []
    for name in before:
        for what, label in (("score", score_name), ("recognised", "judge")):
            old, new = before[name][what], after[name][what]
            if old is None or new is None:
                continue
            gain, error = paired_gain(old, new)
            found = dict(
                before=mean_error(old)[0], after=mean_error(new)[0], gain=gain, error=error
            )
            summary[f"{name}_{what}"] = found | {"n": len(old)}
            row = "{before:.4f} -> {after:.4f}   gain {gain:+.4f} +- {error:.4f}".format(**found)
            rows.append(f"  {name:7} {label:5}  {row} (standard error, {len(old)} pictures)")
    return summary, rows


def inception_score(features):
    """Eq. 9: exp(E_x KL(p(y|x) || p(y))), p(y|x) the softmax of CLIP's raw picture embedding.

    features: (n, d), not normalised; one split [official]. Returns a number from 1 (all
    alike) to min(n, d); it depends on the scale of the features, so compare within one
    CLIP only.
    """
    log_p = features.double().log_softmax(1)  # log p(y|x)
    log_q = log_p.logsumexp(0) - math.log(len(log_p))  # log p(y), the mean over pictures
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item()


def score_model(pipeline, rewards, clip, judge, prompts, args):
    """Every metric of one model: a row {label: value or (value, error)}, and its pictures.

    rewards: {name: reward}; clip: the CLIP of the inception score, or None.
    """
    scores, pictures = evaluate(pipeline, rewards, prompts, args.images, judge, seed=args.seed)
    row = {LABELS.get(name, name): mean_error(v) for name, v in scores.items() if v}
    if clip:
        row["inception score"] = inception_score(clip.embed_images(pictures, normalize=False))
    return row | {"n": len(pictures), "scores": scores}, pictures


def print_table(results):
    """A Markdown table, a row a model."""
    columns = [c for c in next(iter(results.values())) if c not in ("scores", "n")]
    print("| model | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in results.items():
        values = [row[c] if isinstance(row[c], tuple) else (row[c],) for c in columns]
        cells = [" +- ".join(f"{number:.4f}" for number in value) for value in values]
        print(f"| {name} | " + " | ".join(cells) + " |")


def load_lora(pipe, path):
    """Put a LoRA into the pipeline, diffusers converting its names and its alpha.

    path: a run folder, one of its files, a file of a web UI (kohya's names), or a peft
    folder. Ends with a clear line if there is no LoRA that can be read, or if it is of
    another model.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        names = (LORA, CHECKPOINT, "adapter_model.safetensors")
        file = next((file / name for name in names if (file / name).exists()), file / LORA)
    try:
        state, header = read_safetensors(file)
        if "rounds_done" in header:
            print(f"{path} is not finished: its LoRA after round {header['rounds_done']}")
            state = {name: value for name, value in state.items() if ":" not in name}
        pipe.unload_lora_weights()
        if file.name == "adapter_model.safetensors":  # peft's own folder
            config = json.loads((file.parent / "adapter_config.json").read_text())
            state = {name.removeprefix("base_model.model."): v for name, v in state.items()}
            pipe.unet.load_lora_adapter(state, prefix=None, metadata=config)
        else:
            pipe.load_lora_weights(state if "rounds_done" in header else str(file))
    except Exception as problem:  # of three libraries
        die(f"no LoRA of this model at {file} ({first_line(problem)}): is a round finished?")
    if not pipe.get_active_adapters():
        die(f"{file} holds no LoRA of a UNet")


# ---------------------------------------------------------------- before, during and after a run


class Run(NamedTuple):
    """Where a run lies and who tells of it. Only the first process writes and speaks."""

    folder: Path
    worker: int
    workers: int
    say: Callable  # a line for the screen
    track: Callable  # (metrics, queries), for --report-to


def draw(run, pipeline, reward, judge, prompts, each, name):
    """Score `each` pictures of the prompts; their grid goes to grids/<name>.png."""
    rewards = {"score": reward}
    scores, images = evaluate(pipeline, rewards, prompts, each, judge, run.worker, run.workers)
    if run.worker == 0:
        path = run.folder / f"grids/{name}.png"
        save_grid(path, images[:GRID], COLUMNS)
        run.say(f"Pictures: {path}")
    return scores


def draw_lists(run, pipeline, reward, judge, lists, each, when):
    """`draw` every list of prompts, before or after; scores by list, as in <when>.json."""
    results = {}
    for name, prompts in lists.items():
        run.say(f"Drawing {each * len(prompts)} pictures of the list {name}, {when} training ...")
        results[name] = draw(run, pipeline, reward, judge, prompts, each, f"{when}-{name}")
    if run.worker == 0:
        write_json(run.folder / f"{when}.json", results)
    return results


def scores_before(run, cfg, pipeline, reward, judge, lists):
    """What the base model gets: of a resumed run from its files, if all of them are there."""
    path = run.folder / "before.json"
    grids = [run.folder / f"grids/before-{name}.png" for name in lists]
    if cfg.resume and path.exists() and all(grid.exists() for grid in grids):
        with reading(path):
            before = read_json(path)
            for name, prompts in lists.items():
                assert len(before[name]["score"]) == cfg.eval_images * len(prompts), name
            compare(before, before, cfg.reward)  # it can be compared with, after all the training
            return before
    with lora_off(pipeline.policy.unet):
        return draw_lists(run, pipeline, reward, judge, lists, cfg.eval_images, "before")


# ---------------------------------------------------------------- the command


def base_parser(description, out):
    """A parser with the flags that this command and the studies share."""
    parser = Parser(description)
    add = parser.add_argument
    add("--lora", nargs="*", type=os.path.expanduser, default=[], help="run folders or LoRA files")
    add("--template", type=int, choices=(1, 2, 3), default=1, help="prompt template (App. H)")
    add("--prompts", help="a file of prompts, one a line")
    metrics = f"by commas: {', '.join(REWARDS)}, is, or your own file.py:function, which is run"
    add("--metrics", help=f"{metrics} (default: the run's reward)")
    add("--T", type=int, help="denoising steps (default: the run's, else 20)")
    add("--eta", type=float, help="weight of DDIM's noise (default: the run's, else 1)")
    add("--guidance", type=float, help="guidance scale (default: the run's, else 5)")
    add("--batch", type=positive, help="pictures at once (default 8, tiny 64)")
    add("--out", help=f"folder for the JSON and the pictures (default {out}-1, -2, ...)")
    add_model_flags(add)
    parser.set_defaults(default_out=out, model=None)
    return parser


def fill_in(args):
    """What the flags leave open is as in the runs of --lora; bad input ends with one line."""
    folders = [path if path.is_dir() else path.parent for path in map(Path, args.lora)]
    runs = [folder for folder in folders if (folder / "config.json").exists()]
    configs = [read_config(run) for run in runs]
    defaults = dict(model="tiny", T=T, eta=ETA, guidance=GUIDANCE, metrics="clip")
    defaults |= dict(image_size=None, prediction_type=None, model_config=None, base_lora=None)
    for name, default in defaults.items():
        if getattr(args, name) is None:
            key = "reward" if name == "metrics" else name
            values = {config.get(key) for config in configs}
            if len(values) > 1:
                both = " and ".join(sorted(map(str, values)))
                die(f"the runs differ in {name}, {both}: choose by --{name.replace('_', '-')}")
            value = values.pop() if values else None
            setattr(args, name, default if value is None else value)
    check_model_flags(args)
    args.metrics = [m.strip() for m in args.metrics.split(",") if m.strip()]
    if not args.metrics:
        die("--metrics is empty")
    for metric in args.metrics:
        if metric != "is" and (problem := check_reward_name(metric)):
            die(problem)
    args.sample_batch = args.decode_batch = args.batch or (64 if tiny_folder(args.model) else 8)
    args.checkpointing = args.compile = False
    number = 1
    while args.out is None and os.path.exists(f"{args.default_out}-{number}"):
        number += 1
    args.out = os.path.expanduser(args.out or f"{args.default_out}-{number}")
    if os.path.isdir(args.out) and os.listdir(args.out):
        die(f"{args.out} is not empty: take another --out")
    return args


def load(args, known):
    """Pipeline, rewards by name, the inception score's CLIP or None, and the judge over `known`."""
    device = torch.device(args.device)
    pipeline = load_pipeline(args, device)
    dtype = DTYPES[args.precision]
    names = [m for m in args.metrics if m != "is"] or ["clip"]
    rewards = {name: load_reward(name, pipeline.tiny, device, dtype) for name in names}
    needs_clip = "is" in args.metrics
    clip = load_reward("clip", pipeline.tiny, device, dtype).model if needs_clip else None
    return pipeline, rewards, clip, find_judge(pipeline, known)


def parse_args(argv):
    parser = base_parser(__doc__.split("\n")[0], "runs/eval")
    add = parser.add_argument
    add("--no-base", action="store_true", help="leave the base model out")
    add("--prompt", action="append", help="a prompt of your own; may be repeated")
    add("--split", choices=("train", "unseen"), default="train", help="which list of the template")
    add("--images", type=positive, help="pictures a prompt (default 8 with --prompt, else 2)")
    add("--seed", type=int, help="other noise than that of the training's own evaluation")
    args = parser.parse_args(argv)
    if args.no_base and not args.lora:
        die("--no-base leaves nothing to score without --lora")
    if args.prompt and not all(p.strip() for p in args.prompt):
        die("--prompt is empty")
    args.seed = () if args.seed is None else (args.seed,)
    if args.images is None:
        args.images = 8 if args.prompt else 2
    return fill_in(args)


def run(args):
    train, unseen = load_prompts(args.template, args.prompts)
    prompts = args.prompt or (unseen if args.split == "unseen" else train)
    if not prompts:
        die(f"{args.prompts} has no [{args.split}] list")
    models = args.lora if args.no_base else ["base", *args.lora]
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, rewards, clip, judge = load(args, prompts)
    results, rows = {}, []
    for name in models:
        if name in args.lora:
            load_lora(pipeline.pipe, name)
            pipeline.cache.clear()  # the LoRA may be of the text encoder, too
        results[name], pictures = score_model(pipeline, rewards, clip, judge, prompts, args)
        rows.append(pictures.unflatten(0, (args.images, len(prompts))))  # (number, prompt, ...)
    print_table(results)
    print(f"\n+- is the standard error over {args.images * len(prompts)} pictures a model.")
    write_json(folder / "scores.json", {"settings": vars(args), "results": results})
    if args.prompt:
        grid = [row[:, p] for p in range(len(prompts)) for row in rows]
        print("Pictures: for each prompt a row a model, a column a noise.")
    else:
        grid = [row[0, :: max(1, len(prompts) // COLUMNS)][:COLUMNS] for row in rows]
        print("Pictures: a row a model, a column a prompt with its noise, from all over the list.")
    save_grid(folder / "grid.png", torch.cat(grid), len(grid[0]))
    print(f"{folder}/grid.png")


def guarded(run, args):
    """`run(args)`; a bad reward, a full disk or Ctrl-C ends with one line."""
    try:
        run(args)
    except Stop as problem:
        die(problem)
    except OSError as problem:
        die(f"cannot write to {args.out}: {problem.strerror or problem}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def main(argv=None):
    """Print a Markdown table, write JSON and pictures; bad input ends with one line."""
    guarded(run, parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
