"""The bars that the tiny model is held to: `python tiny/build.py --check`.

CLIP and the judge are asked about held-out pictures: seed 99, which no training draws
with. Base samples are those of the pipeline before any reinforcement learning, at the
paper's T, eta and guidance. Pictures are (B, 3, 64, 64) in [0, 1]. The number before a
bar groups them, see tiny/README.md.
"""

import math

import numpy as np
import open_clip
import torch
from diffusers import StableDiffusionPipeline

from processes import die
from report import save_grid
from tiny.pictures import spoiled_scene
from tiny.recognise import HEADS, load_judge, probabilities, prompt_answers, recognise
from tiny.sprites import STYLES
from tiny.world import captions, cue_kinds, draw_scene, noun_prompts, parse, read_lists
from tiny.world import right_scene, rivals, to_tensor

PAIRS = 300  # pictures with a cue wrong and beside it right; with a spoiled noun


def through(vae, drawings):
    """Drawings (B, 64, 64, 3) uint8 -> as the autoencoder shows them; errors (B,)."""
    x, y = to_tensor(np.stack(drawings)), []
    with torch.no_grad():
        for part in x.split(64):
            z = vae.encode(part.to(vae.device)).latent_dist.mean
            y.append(vae.decode(z).sample.clamp(-1, 1).cpu())
    y = torch.cat(y)
    return y / 2 + 0.5, (y - x).square().mean((1, 2, 3)) / 4


def drawn(prompts, vae, seed=99):
    """Held-out pictures of the prompts in every style, their prompts and errors."""
    rng = np.random.default_rng(seed)
    owner = [prompt for prompt in prompts for _ in STYLES]
    pairs = zip(owner, STYLES * len(prompts))
    drawings = [draw_scene(right_scene(parse(p), style, rng), rng) for p, style in pairs]
    images, errors = through(vae, drawings)
    return images, owner, errors


def cue_pairs(prompts, vae, cue, count, seed=99):
    """Held-out pictures, the same ones with this cue wrong, and their prompts."""
    rng, right, wrong = np.random.default_rng(seed), [], []
    owner = [str(rng.choice(prompts)) for _ in range(count)]
    for prompt in owner:
        fact = parse(prompt)
        scene = right_scene(fact, str(rng.choice(STYLES)), rng)
        others = rivals(fact) if cue == "fact" else [k for k in cue_kinds(fact) if k != fact[0]]
        other = scene._replace(**{cue: others[rng.integers(len(others))]})
        seed = rng.integers(2**31)  # the same colours of the ground in both
        right.append(draw_scene(scene, np.random.default_rng(seed)))
        wrong.append(draw_scene(other, np.random.default_rng(seed)))
    return through(vae, right)[0], through(vae, wrong)[0], owner


def spoiled(vae, count, seed=99):
    """Held-out pictures whose noun is spoiled, and the prompts that they are not."""
    rng, drawings, owner = np.random.default_rng(seed), [], []
    told = {}
    for caption in captions():
        told.setdefault(parse(caption), caption)
    while len(owner) < count:
        drawing, scene, flags = spoiled_scene(rng)
        kinds = {scene.fact[0], scene.small, scene.tiny} - {None, "alone"}
        if any(flags) and scene.fact in told and len(kinds) <= 1:
            drawings.append(drawing)
            owner.append(told[scene.fact])
    return through(vae, drawings)[0], owner


def sampled(pipe, prompts, count, seed=1000):
    """At least `count` base samples, equally many a prompt, and their prompts."""
    owner, out = list(prompts) * math.ceil(count / len(prompts)), []
    for k in range(0, len(owner), 60):
        part = owner[k : k + 60]
        noise = [torch.Generator().manual_seed(seed + k + n) for n in range(len(part))]
        settings = dict(num_inference_steps=20, eta=1.0, guidance_scale=5.0, output_type="np")
        out.append(torch.from_numpy(pipe(part, generator=noise, **settings).images))
    return torch.cat(out).permute(0, 3, 1, 2), owner


def base_rates(pipe, judge, count, seed):
    """By prompt list: the share of at least `count` base samples that the judge recognises."""
    rates = {}
    for name, prompts in read_lists().items():
        right = recognise(judge, *sampled(pipe, prompts, count, seed))
        rates[name] = round(right.float().mean().item(), 3)
    return rates


def clip_scores(model, tokenizer, images, prompts):
    """(B, P): cosines of pictures and prompts."""
    device = model.logit_scale.device
    with torch.no_grad():
        text = model.encode_text(tokenizer(list(prompts)).to(device), normalize=True)
        parts = [part.to(device) * 2 - 1 for part in images.split(64)]
        seen = torch.cat([model.encode_image(part, normalize=True) for part in parts])
    return (seen @ text.T).cpu()


def clip_right(model, tokenizer, images, owner, candidates):
    """(B,) bool: is CLIP's nearest of the candidates the picture's prompt?"""
    nearest = clip_scores(model, tokenizer, images, candidates).argmax(1).tolist()
    return torch.tensor([parse(candidates[k]) == parse(p) for k, p in zip(nearest, owner)])


def check(folder, device, grid=None):
    """Print the bars; write base samples to `grid`. True if every bar is met."""
    if not all((folder / part).exists() for part in ("unet", "clip", "judge")):
        die(f"{folder} lacks a part of the tiny model: build it, or name another --out")
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    name = f"local-dir:{folder.resolve() / 'clip'}"
    clip = open_clip.create_model(name).eval().to(device)
    clip = clip, open_clip.get_tokenizer(name)
    judge, lists = load_judge(folder / "judge").to(device), read_lists()
    met, errors, tiles = [], [], []

    def row(what, value, count, low=-math.inf, high=math.inf):
        met.append(low <= value <= high)
        wanted = f"{low:.4g} to {high:.4g}"
        if math.inf in (-low, high):
            wanted = f">= {low:g}" if high == math.inf else f"<= {high:g}"
        yes = "yes" if met[-1] else "NO"
        print(f"{what:<52} {value:7.2f}  {count:5}  {wanted:<14} {yes}", flush=True)

    def percent(what, right, *bounds):
        row(what, 100 * right.float().mean().item(), len(right), *bounds)

    print(f"{'bar':<52} {'value':>7}  {'n':>5}  {'wanted':<14} met")
    known = {t: lists[f"{t} train"] + lists[f"{t} unseen"] for t in "123"}
    for (t, prompts), low in zip(known.items(), (95, 90, 85)):
        images, owner, error = drawn(prompts, pipe.vae)
        errors.append(error)
        percent(f"2 CLIP, template {t}", clip_right(*clip, images, owner, prompts), low)
        percent(f"2 judge, template {t}", recognise(judge, images, owner), low)
        for cue, size in (("fact", "big"), ("small", "small"), ("tiny", "tiny")):
            right, wrong, owner = cue_pairs(prompts, pipe.vae, cue, PAIRS)
            places = range(len(owner))
            high, less = (clip_scores(*clip, x, owner)[places, places] for x in (right, wrong))
            percent(f"2 CLIP prefers the right {size} cue, template {t}", high > less, 95)
            right = recognise(judge, wrong, owner)
            percent(f"2 judge takes a wrong {size} cue, template {t}", right, 0, 5)
    images, owner = spoiled(pipe.vae, PAIRS)
    percent("2 judge recognises spoiled nouns", recognise(judge, images, owner), 0, 5)
    errors = torch.cat(errors)
    row("1 autoencoder, PSNR in dB", -10 * math.log10(errors.mean()), len(errors), 30)

    images, owner = sampled(pipe, noun_prompts(), 260)
    percent("3 base, single nouns", recognise(judge, images, owner), 90)
    tiles.append(images[:: max(1, len(images) // 24)][:24])
    rates = {}
    for t in "123":
        for part in ("train", "unseen"):
            images, owner = sampled(pipe, lists[f"{t} {part}"], 360)
            right = recognise(judge, images, owner)
            rates[t, part] = 100 * right.float().mean().item()
            if part == "train":
                percent(f"4 base, template {t} train", right, 28, 50)
                cue_rates(judge, images, owner)
                shortcuts(row, judge, images, right, t)
            else:
                train = rates[t, "train"]
                percent(f"4 base, template {t} unseen", right, train - 10, train + 10)
            tiles.append(images[:: max(1, len(images) // 24)][:24])
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20
    row("10 size of the folder, MiB", size, 1, 0, 30)
    if grid:
        save_grid(grid, torch.cat(tiles), 12)
    return all(met)


def cue_rates(judge, images, owner):
    """Print how often each head of CONTENT gives the prompt's answer."""
    heads, wanted = probabilities(judge, images), prompt_answers(owner)
    rates = [(h.argmax(1) == w).float().mean().item() for h, w in zip(heads, wanted.T)]
    print("    right, %: " + ", ".join(f"{n} {100 * r:.0f}" for n, r in zip(HEADS, rates)))


def shortcuts(row, judge, images, right, template):
    """Bar 5: what the base's recognition hangs on; its style entropy in nats."""
    heads = dict(zip(HEADS, probabilities(judge, images)))
    base = right.float().mean().item()
    for name in ("style", "ground", "side", "size"):
        picked = heads[name].argmax(1)
        counts = torch.bincount(picked, minlength=len(HEADS[name])).float()
        rates = [right[picked == k].float().mean().item() for k in range(len(counts))]
        found = zip(HEADS[name], rates, counts)
        shown = ", ".join(f"{value} {100 * rate:.0f} of {n:.0f}" for value, rate, n in found)
        print(f"    recognised, %: {shown}", flush=True)
        best = max((rate for rate, n in zip(rates, counts) if n > 10), default=0.0)
        lift = best / max(base, 1e-9)
        row(f"5 best {name} over all, template {template}", lift, len(right), 0, 2)
        if name == "style":
            share = counts / counts.sum()
            entropy = -(share * share.clamp(min=1e-9).log()).sum().item()
            row(f"5 entropy of styles, template {template}", entropy, len(right), 1.0)
