"""What is measured of models: scores and pictures (Sec. 4, App. F).

    python eval.py --lora RUN --prompt "a cat washing dishes"     # base and LoRA side by side
    python eval.py --lora RUN1 RUN2 --template 1 --split unseen   # a table of scores, JSON, a grid

    metric             what it is                                             source
    CLIPScore          cosine of CLIP's picture and text embeddings           Sec. 4.1
    BERTScore          recall of LLaVA's description, `--metrics clip,bert`   Sec. 4.1
    inception score    exp(E_x KL(p(y|x) || p(y))), `inception_score`         Eq. 9, App. F.2
    recognised         share that the tiny model's judge calls right          [ours], tiny only
    style entropy      of the icon styles that CLIP sees, nats                [ours], tiny only

A picture's noise is keyed by its prompt and number alone: the same for every model,
method and training seed, so models are compared in pairs. +- is a standard error over
pictures. The paper's studies (Table 5, Fig. 5, 6, 8, 11, 12) are scripts in `studies/`.
"""

import math
import os
import sys
from pathlib import Path

import torch

from files import read_safetensors, write_json
from lora import inject_lora, load_lora
from model import DTYPES, ETA, GUIDANCE, T, add_model_flags, choose_device, default_precision
from model import load_model, progress, tiny_folder
from processes import Parser, Stop, all_sum, die
from prompts import load_prompts
from rewards import REWARDS, check_reward_name, load_reward
from report import save_grid
from run_folder import CHECKPOINT, LORA, parse_settings, read_config

MAY_BE_OPEN = ("image_size", "prediction_type")  # as the model's files say
LABELS = {"clip": "CLIPScore", "bert": "BERTScore", "recognised": "judge"}


# ---------------------------------------------------------------- scores of a model


@torch.no_grad()
def evaluate(
    model, reward, prompts, each, judge=None, worker=0, workers=1, keep=72, seed=(), offload=False
):
    """Score `each` pictures of every prompt, drawn from noise keyed by (prompt, number, *seed).

    Processes share the work. Returns {"score": list of n, "recognised": list of n or
    None}, number by number of every prompt, and this process's first `keep` pictures
    (m, 3, H, W).
    """
    owners = [(prompt, k) for k in range(each) for prompt in prompts]
    scores, recognised, images = torch.zeros(len(owners)), torch.zeros(len(owners)), []
    own = list(range(len(owners)))[worker::workers]
    batches = [own[lo : lo + model.sample_batch] for lo in range(0, len(own), model.sample_batch)]
    for batch in progress(batches, "evaluating"):
        names = [owners[j][0] for j in batch]
        keys = [("evaluation", *owners[j], *seed) for j in batch]
        if offload:
            model.embed([*names, ""])  # before the text encoder leaves the device
            model.move_others(reward, "cpu")
        x_0 = model.denoise(None, model.schedule.T, 0, names, keys)
        if offload:
            model.move_others(reward, model.device)
        pictures = model.decode(x_0)
        scores[batch] = reward(pictures, names)
        if judge:
            recognised[batch] = judge(pictures, names).float()
        images.append(pictures[: max(0, keep - sum(map(len, images)))])
    images = torch.cat(images) if images else torch.zeros(0, 3, 8, 8)
    scores, recognised = (all_sum(v, model.device).tolist() for v in (scores, recognised))
    return {"score": scores, "recognised": recognised if judge else None}, images


def load_judge(model, candidates):
    """The tiny model's judge, never a reward: (pictures, prompts) -> (B,) bool; None elsewhere."""
    if model.tiny is None:
        return None
    from tiny.recognise import load_judge, recognise
    from tiny.world import parse

    judge = load_judge(model.tiny / "judge")
    try:
        [parse(prompt) for prompt in candidates]
    except ValueError:  # a user's own prompts, which the judge has never seen
        return None
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
    rows, summary = [], {}
    for name in before:
        for what, label in (("score", score_name), ("recognised", "judge")):
            old, new = before[name][what], after[name][what]
            if old is None or new is None:
                continue
            gain, error = paired_gain(old, new)
            a, b, n = sum(old) / len(old), sum(new) / len(new), len(old)
            summary[f"{name}_{what}"] = dict(before=a, after=b, gain=gain, error=error, n=n)
            gain = f"gain {gain:+.4f} +- {error:.4f} (standard error, {n} pictures)"
            rows.append(f"  {name:7} {label:5}  {a:.4f} -> {b:.4f}   {gain}")
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


def inception_left_out(features):
    """`inception_score` without each of the n >= 3 pictures in turn: (n,).

    With H the entropy, Eq. 9 is exp(H(mean p) - mean H(p)): both means without picture
    i are one subtraction away.
    """
    n = len(features)
    p = features.double().softmax(1)
    h = -torch.special.xlogy(p, p).sum(1)  # (n,), the entropy of each p(y|x)
    q = ((p.sum(0) - p) / (n - 1)).clamp(min=0)  # (n, d), p(y) without picture i
    return (-torch.special.xlogy(q, q).sum(1) - (h.sum() - h) / (n - 1)).exp()


def jackknife_error(left_out):
    """Standard error of a statistic from its values without each of n pictures (n,).

    The difference of two models' values, picture by picture, gives that of their
    difference on the same prompts and noise. Prompts count as random as pictures, so it
    errs upwards.
    """
    v = torch.tensor(left_out, dtype=torch.float64)
    return ((len(v) - 1) / len(v) * (v - v.mean()).square().sum()).sqrt().item()


def style_entropy(clip, images, prompts):
    """Entropy in nats of the tiny world's styles that CLIP sees in pictures (n, 3, H, W).

    A picture's style is the one whose caption "<prompt>, <style> style" CLIP scores
    highest. Returns the entropy (log 3 = 1.099 at most, 0 if all are of one style) and
    the shares.
    """
    from tiny.sprites import STYLES
    from tiny.world import style_prompts

    text = clip.embed_text([caption for p in prompts for caption in style_prompts(p)])
    seen = clip.embed_images(images)  # (n, d)
    scores = (text.view(len(images), len(STYLES), -1) * seen[:, None]).sum(2)
    share = torch.bincount(scores.argmax(1), minlength=len(STYLES)) / len(images)
    entropy = -torch.special.xlogy(share, share).sum().item() + 0.0  # + 0.0: no -0.0
    return entropy, dict(zip(STYLES, share.tolist()))


def score_model(model, rewards, clip, judge, prompts, args):
    """Every metric of one model: a row {label: value or (value, error)}, and its pictures.

    rewards: {name: reward}; clip: the CLIP of inception score and style entropy, or
    None.
    """
    owners, (first, *others) = prompts * args.images, rewards
    keep = len(owners)
    scores, images = evaluate(
        model, rewards[first], prompts, args.images, judge, 0, 1, keep, args.seed, args.offload
    )
    scores[first] = scores.pop("score")
    size = model.decode_batch
    for name in others:
        pieces = [(images[lo : lo + size], owners[lo : lo + size]) for lo in range(0, keep, size)]
        scores[name] = torch.cat([rewards[name](x, c) for x, c in pieces]).tolist()
    row = {LABELS.get(name, name): mean_error(scores[name]) for name in rewards}
    if "is" in args.metrics:
        features = clip.embed_images(images, normalize=False)
        left_out = inception_left_out(features).tolist() if len(features) > 2 else [0.0]
        row["inception score"] = inception_score(features), jackknife_error(left_out)
        row["inception score, left out"] = left_out
    if judge:
        row["recognised"] = mean_error(scores["recognised"])
    if model.tiny and judge and clip:
        row["style entropy"], row["styles"] = style_entropy(clip, images, owners)
    return row | {"n": len(owners), "scores": scores}, images


def print_table(results):
    """A Markdown table, a row a model."""
    hidden = ("scores", "styles", "n", "inception score, left out")
    columns = [c for c in next(iter(results.values())) if c not in hidden]
    print("| model | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in results.items():
        values = [row[c] for c in columns]
        cells = [
            f"{v[0]:.4f} +- {v[1]:.4f}" if isinstance(v, tuple) else f"{v:.4f}" for v in values
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


# ---------------------------------------------------------------- the command


def read_lora(path):
    """The LoRA tensors of a run folder or a .safetensors file; ends with a clear line if none."""
    path, run = Path(path), Path(path)
    if os.path.isdir(run):
        path = run / LORA
        if not path.exists() and (run / CHECKPOINT).exists():
            path = run / CHECKPOINT
        elif not path.exists() and (run / "config.json").exists():
            die(f"the run {run} has no finished round yet: python train.py --resume {run}")
    try:
        state, header = read_safetensors(path)
    except (OSError, ValueError) as problem:
        die(f"no LoRA at {path} ({problem}): give a run folder or a .safetensors file")
    if "rounds_done" in header:
        print(f"{run} is not finished: its LoRA after round {header['rounds_done']}")
        state = {name: value for name, value in state.items() if ":" not in name}
    if not any(name.endswith("lora_A.weight") for name in state):
        die(f"{path} holds no LoRA in the names that train.py writes (unet...lora_A.weight)")
    if header.get("unet.lora_alpha") != header.get("unet.r"):
        die(f"{path} is scaled by alpha / rank, which is always 1 here")
    for name, v in state.items():
        if v.dim() != 2 or 0 in v.shape or not v.float().isfinite().all():
            die(f"{path}: {name}, of shape {tuple(v.shape)}, is no weight of a LoRA, or not finite")
    return state


def apply_lora(model, name, state):
    """Put the LoRA `state` into the UNet; ends with one line if it is of another model."""
    try:
        rank = next(v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight"))
        inject_lora(model.unet, rank)
        load_lora(model.unet, state)
    except ValueError as problem:
        die(f"{name}: {problem}")


def base_parser(description, out):
    """A parser with the flags that this command and the studies share."""
    parser = Parser(description)
    add = parser.add_argument
    add("--lora", nargs="*", default=[], metavar="RUN", help="run folders or LoRA files")
    add("--template", type=int, choices=(1, 2, 3), default=1, help="prompt template (App. H)")
    add("--prompts", help="a file of prompts, one a line")
    metrics = f"by commas: {', '.join(REWARDS)} or your own file.py:function, which is run"
    add("--metrics", help=f"{metrics} (default: the run's reward)")
    add("--T", type=int, help="denoising steps (default: the run's, else 20)")
    add("--eta", type=float, help="weight of DDIM's noise (default: the run's, else 1)")
    add("--guidance", type=float, help="guidance scale (default: the run's, else 5)")
    add("--batch", type=int, help="pictures at once (default 8, tiny 64)")
    add("--out", help=f"folder for the JSON and the pictures (default {out}-1, -2, ...)")
    add_model_flags(add)
    parser.set_defaults(default_out=out)
    return parser


def settings_of(run):
    """What a run was trained with, under the names of the flags here, checked as flags are."""
    names, config = ("model", "T", "eta", "guidance", *MAY_BE_OPEN), read_config(run)
    settings = {name: config.get(name) for name in names} | {"metrics": config.get("reward")}
    return vars(parse_settings(base_parser("", ""), settings, f"{run}/config.json"))


def fill_in(args):
    """What the flags leave open is as in the runs of --lora; bad input ends with one line."""
    runs = [settings_of(r) for r in args.lora if os.path.exists(os.path.join(r, "config.json"))]
    defaults = dict(model="tiny", T=T, eta=ETA, guidance=GUIDANCE, metrics="clip")
    for name in (*defaults, *MAY_BE_OPEN):
        if getattr(args, name) is None:
            values = {run[name] for run in runs}
            if len(values) > 1:
                both = " and ".join(sorted(map(str, values)))
                die(f"the runs differ in {name}, {both}: choose by --{name.replace('_', '-')}")
            setattr(args, name, defaults.get(name) if values <= {None} else values.pop())
    for name in ("batch", "images", "roots", "T"):
        value = getattr(args, name, None)
        if value is not None and not 1 <= value < 10**6:
            die(f"--{name} must be 1 or more, and below a million")
    if args.T > 999:
        die("--T must be at most 999: the model knows 1000 timesteps, the first is 1")
    if not 0 < args.eta <= 1:
        die("--eta must be above 0 and at most 1")
    if not 0 <= args.guidance < math.inf:
        die("--guidance must be 0 or more")
    args.metrics = [m.strip() for m in args.metrics.split(",") if m.strip()]
    if not args.metrics:
        die("--metrics is empty")
    for metric in args.metrics:
        if metric != "is" and (problem := check_reward_name(metric)):
            die(problem)
    choose_device(args)
    args.precision = args.precision or default_precision(args)
    args.sample_batch = args.decode_batch = args.batch or (64 if tiny_folder(args.model) else 8)
    args.checkpointing = args.compile = args.channels_last = False
    number = 1
    while args.out is None and os.path.exists(f"{args.default_out}-{number}"):
        number += 1
    args.out = args.out or f"{args.default_out}-{number}"
    if os.path.isdir(args.out) and any(Path(args.out).glob("*.json")):
        die(f"{args.out} holds results: take another --out")
    return args


def load(args, known):
    """Model, rewards by name, the CLIP of the other metrics or None, and the judge over `known`."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, dtype = load_model(args, device), DTYPES[args.precision]
    names = [m for m in args.metrics if m != "is"] or ["clip"]
    rewards = {name: load_reward(name, model.tiny, device, dtype) for name in names}
    clip = rewards.get("clip")
    if clip is None and "is" in args.metrics:
        clip = load_reward("clip", model.tiny, device, dtype)
    return model, rewards, clip and clip.model, load_judge(model, known)


def parse_args(argv):
    parser = base_parser(__doc__.split("\n")[0], "runs/eval")
    add = parser.add_argument
    add("--no-base", action="store_true", help="leave the base model out")
    add("--prompt", action="append", help="a prompt of your own; may be repeated")
    add("--split", choices=("train", "unseen"), default="train", help="which list of the template")
    add("--images", type=int, help="pictures a prompt (default 8 with --prompt, else 2)")
    add("--seed", type=int, help="other noise than that of the training's own evaluation")
    args = parser.parse_args(argv)
    if args.no_base and not args.lora:
        die("--no-base leaves nothing to score without --lora")
    if args.prompt and not all(p.strip() for p in args.prompt):
        die("--prompt is empty")
    args.seed = () if args.seed is None else (args.seed,)
    args.images = args.images if args.images is not None else 8 if args.prompt else 2
    return fill_in(args)


def run(args):
    train, unseen = load_prompts(args.template, args.prompts)
    prompts = args.prompt or (unseen if args.split == "unseen" else train)
    if not prompts:
        die(f"{args.prompts} has no [{args.split}] list")
    loras = {} if args.no_base else {"base": None}
    loras |= {str(r): read_lora(r) for r in args.lora}
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    known = list(dict.fromkeys([*train, *unseen, *prompts]))
    model, rewards, clip, judge = load(args, known)
    results, rows = {}, []
    for name, state in loras.items():
        if state is not None:
            apply_lora(model, name, state)
        results[name], images = score_model(model, rewards, clip, judge, prompts, args)
        rows.append(images.unflatten(0, (args.images, len(prompts))))  # (number, prompt, ...)
    print_table(results)
    print(f"\n+- is the standard error over {args.images * len(prompts)} pictures a model.")
    write_json(folder / "scores.json", {"settings": vars(args), "results": results})
    if args.prompt:  # for each prompt a row a model, a column a noise
        grid = [row[:, p] for p in range(len(prompts)) for row in rows]
    else:  # a row a model, a column a prompt and its noise, from all over the list
        grid = [row[0, :: max(1, len(prompts) // 9)][:9] for row in rows]
    save_grid(folder / "grid.png", torch.cat(grid), len(grid[0]))
    order = "for each prompt " if len(prompts) > 1 and args.prompt else ""
    print(f"Pictures, {order}a row a model, the same noise a column: {folder}/grid.png")


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
