"""Scores and pictures of a model and of LoRA folders on the same fixed noise (Sec. 4.1, App. F).

    python eval.py --lora RUN --prompt "a cat washing dishes"     # base and LoRA side by side
    python eval.py --lora RUN1 RUN2 --template 1 --split unseen   # a table of scores, JSON, a grid

    metric             what it is                                             source
    CLIPScore          cosine of CLIP's picture and text embeddings           Sec. 4.1
    inception score    exp(E_x KL(p(y|x) || p(y))), `inception_score`         Eq. 9, App. F.2
    recognised         share that the tiny model's judge tells right          [ours], tiny only
    style entropy      of the icon styles that CLIP sees, nats                [ours], tiny only
"""

import argparse
import math
import sys
from pathlib import Path

import torch

import runs
from ddim_logprob import denoise, keyed_generator


@torch.no_grad()
def evaluate(model, reward, prompts, each, args, judge=None, rank=0, world=1):
    """Score `each` pictures of every prompt, drawn from noise keyed by (prompt, number) alone.

    The noise is the same for every model, method and training seed, so scores can be compared in
    pairs. Processes share the work. Returns {"score": list of n, "recognised": list of n or None}
    and the pictures (m, 3, H, W) that this process made, number by number of every prompt.
    """
    owners = [(prompt, k) for k in range(each) for prompt in prompts]
    scores, recognised, images = torch.zeros(len(owners)), torch.zeros(len(owners)), []
    for at in torch.arange(rank, len(owners), world).split(args.sample_batch):
        text = [owners[j][0] for j in at.tolist()]
        generators = [keyed_generator("evaluation", *owners[j]) for j in at.tolist()]
        x_T = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
        x_0 = denoise(model.unet, model.schedule, x_T.to(model.device), args.T, 0,
                      model.embed(text), model.embed([""]), args.guidance, generators)  # fmt: skip
        images.append(model.decode(x_0, args.decode_batch))
        scores[at] = reward(images[-1], text)
        if judge:
            recognised[at] = judge(images[-1], text).float()
    scores, recognised = (runs.all_sum(v, model.device).tolist() for v in (scores, recognised))
    images = torch.cat(images) if images else torch.zeros(0, 3, 8, 8)
    return {"score": scores, "recognised": recognised if judge else None}, images


def paired_gain(before, after):
    """Mean gain over the same (prompt, noise) pairs and its standard error."""
    gain = torch.tensor(after).double() - torch.tensor(before).double()
    error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else torch.zeros(())
    return gain.mean().item(), error.item()


def compare(before, after, score_name):
    """Scores before and after by prompt list -> a summary dict and the lines that print it."""
    rows, summary = [], {}
    for name in before:
        for what, label in (("score", score_name), ("recognised", "judge")):
            old, new = before[name][what], after[name][what]
            if old is None:
                continue
            gain, error = paired_gain(old, new)
            a, b = sum(old) / len(old), sum(new) / len(new)
            summary[f"{name}_{what}"] = dict(before=a, after=b, gain=gain, error=error, n=len(old))
            rows.append(f"  {name:7} {label:5}  {a:.4f} -> {b:.4f}   gain {gain:+.4f} +- "
                        f"{error:.4f} (standard error, {len(old)} pictures)")  # fmt: skip
    return summary, rows


def spread(thumbs, owners):
    """Mean std, over pictures of one prompt, of thumbnails (B, 3, 8, 8): falls on a collapse."""
    groups = [[j for j, o in enumerate(owners) if o == prompt] for prompt in set(owners)]
    stds = [thumbs[g].std(0).mean() for g in groups if len(g) > 1]
    return torch.stack(stds).mean().item() if stds else 0.0


def inception_score(features):
    """Eq. 9: exp(E_x KL(p(y|x) || p(y))), p(y|x) the softmax of CLIP's raw picture embedding.

    features: (n, d), not normalised; one split [official]. Returns a number from 1 (all alike) to
    min(n, d); it depends on the scale of the features, so compare within one CLIP only.
    """
    log_p = features.double().log_softmax(1)  # log p(y|x)
    log_q = log_p.logsumexp(0) - math.log(len(log_p))  # log p(y), the mean over pictures
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item()


def style_entropy(clip, images, prompts):
    """Entropy in nats of the tiny world's styles that CLIP sees in pictures (n, 3, H, W).

    A picture's style is the one whose caption "<prompt>, <style> style" CLIP scores highest.
    Returns the entropy (log 3 = 1.099 at most, 0 if all are of one style) and the shares.
    """
    from tiny import STYLES

    seen = clip.embed_images(images)
    scores = torch.stack(
        [(seen * clip.embed_text([f"{p}, {s} style" for p in prompts])).sum(1) for s in STYLES], 1
    )
    share = torch.bincount(scores.argmax(1), minlength=len(STYLES)) / len(images)
    entropy = -(share * share.clamp(min=1e-12).log()).sum().item()
    return entropy, dict(zip(STYLES, share.tolist()))


def mean_error(values):
    """Mean and standard error of a list of numbers."""
    v = torch.tensor(values).double()
    return v.mean().item(), (v.std() / len(v) ** 0.5).item() if len(v) > 1 else 0.0


def read_lora(folder):
    """The LoRA tensors of a run folder or a .safetensors file; ends with a clear line if none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder)
    path = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    try:
        return load_file(path)
    except (OSError, SafetensorError) as problem:
        runs.die(f"no LoRA at {path} ({problem}): give a run folder or a .safetensors file")


def print_table(results):
    """A Markdown table, a row a model; +- is the standard error over pictures."""
    columns = [c for c in next(iter(results.values())) if c not in ("scores", "styles")]
    print("| model | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in results.items():
        cells = [f"{v[0]:.4f} +- {v[1]:.4f}" if isinstance(v, tuple) else f"{v:.4f}"
                 for v in (row[c] for c in columns)]  # fmt: skip
        print(f"| {name} | " + " | ".join(cells) + " |")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: runs.die(f"{message} (see --help)")
    add = parser.add_argument
    add("--lora", nargs="*", default=[], metavar="RUN", help="run folders or LoRA files")
    add("--model", help="base model (default: that of the first run, else tiny)")
    add("--prompt", action="append", help="a prompt of your own; may be repeated")
    add("--prompts", help="a file of prompts, one a line")
    add("--template", type=int, choices=(1, 2, 3), default=1, help="prompt template (App. H)")
    add("--split", choices=("train", "unseen"), default="train", help="which list of the template")
    add("--images", type=int, help="pictures a prompt (default 8 with --prompt, else 2)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--precision", choices=tuple(runs.DTYPES), help="(default fp16 on CUDA, else fp32)")
    add("--batch", type=int, help="pictures at once (default 8, tiny 64)")
    add("--out", default="runs/eval", help="folder for scores.json and grid.png")
    args = parser.parse_args(argv)
    for name in ("images", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            runs.die(f"--{name} must be 1 or more")
    if args.prompt and not all(p.strip() for p in args.prompt):
        runs.die("--prompt is empty")
    configs = [runs.read_config(r) for r in args.lora if Path(r).is_dir()]
    first = configs[0] if configs else {}
    for config in configs:
        if args.model is None and config["model"] != first["model"]:
            runs.die(f"the runs are of different models, {first['model']} and {config['model']}")
    runs.choose_device(args)
    args.model = args.model or first.get("model", "tiny")
    args.T, args.eta = first.get("T", 20), first.get("eta", 1.0)
    args.guidance = first.get("guidance", 5.0)
    is_tiny = runs.tiny_folder(args.model) is not None
    args.precision = args.precision or runs.default_precision(args.device, is_tiny)
    args.sample_batch = args.decode_batch = args.batch or (64 if is_tiny else 8)
    args.images = args.images or (8 if args.prompt else 2)
    return args


def main(argv=None):
    """Print a Markdown table, write scores.json and a grid; a row of the grid is a model."""
    args = parse_args(argv)
    if args.prompt:
        prompts, known = args.prompt, args.prompt
    else:
        train, unseen = runs.load_prompts(args.template, args.prompts)
        prompts = unseen if args.split == "unseen" else train
        known = train + unseen
        if not prompts:
            runs.die(f"{args.prompts} has no [{args.split}] list")
    loras = {"base": None, **{str(r): read_lora(r) for r in args.lora}}

    from lora import inject_lora, load_lora
    from rewards import load_reward

    device = torch.device(args.device)
    model = runs.load_model(args, device)
    reward = load_reward("clip", model.tiny, device, runs.DTYPES[args.precision])
    judge = runs.load_judge(model, known)
    results, grid = {}, []
    for name, state in loras.items():
        if state is not None:
            rank = next(v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight"))
            inject_lora(model.unet, rank)
            try:
                load_lora(model.unet, state)
            except ValueError as problem:
                runs.die(f"{name}: {problem}")
        scores, images = evaluate(model, reward, prompts, args.images, args, judge)
        owners = prompts * args.images
        results[name] = {
            "CLIPScore": mean_error(scores["score"]),
            "inception score": inception_score(reward.model.embed_images(images, normalize=False)),
        }
        if judge:
            results[name]["recognised"] = mean_error(scores["recognised"])
        if model.tiny and judge:
            entropy, shares = style_entropy(reward.model, images, owners)
            results[name] |= {"style entropy": entropy, "styles": shares}
        results[name]["scores"] = scores
        grid.append(images[:: max(1, len(prompts))] if args.prompt else images[:9])
    print_table(results)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "scores.json", {"settings": vars(args), "results": results})
    runs.save_grid(folder / "grid.png", torch.cat(grid), len(grid[0]))
    print(f"\nPictures, a row a model in this order, the same noise a column: {folder}/grid.png")


if __name__ == "__main__":
    main(sys.argv[1:])
