"""The bars that the tiny model is held to: `python tiny/build.py --check`.

CLIP and the judge are asked about held-out pictures: no training draws with their seed.
Pictures are (B, 3, 64, 64) in [0, 1]. A picture is right by its fact, see `world.parse`.
"""

import math

import numpy as np
import open_clip
import torch
from diffusers import StableDiffusionPipeline

from processes import die
from report import save_grid
from tiny.recognise import load_judge, recognise
from tiny.world import STYLES, draw_pairs, fact_index, noun_prompts, parse, read_lists


def drawn(prompts, vae, seed=99):
    """Held-out pictures of the prompts in every style, as the autoencoder shows them.

    Returns the pictures, the prompt of each, and the mean squared error of each, (B,).
    """
    owner = [prompt for prompt in prompts for _ in STYLES]
    pairs = [(fact_index()[parse(p)], k % len(STYLES)) for k, p in enumerate(owner)]
    x, y = draw_pairs(pairs, np.random.default_rng(seed)), []
    with torch.no_grad():
        for part in x.split(64):
            z = vae.encode(part.to(vae.device)).latent_dist.mean
            y.append(vae.decode(z).sample.clamp(-1, 1).cpu())
    y = torch.cat(y)
    return y / 2 + 0.5, owner, (y - x).square().mean((1, 2, 3)) / 4


def sampled(pipe, prompts, each):
    """Samples of the pipeline, `each` of every prompt, and the prompt of each sample."""
    owner, out = [prompt for prompt in prompts for _ in range(each)], []
    settings = dict(num_inference_steps=20, eta=1.0, guidance_scale=5.0, output_type="np")
    for k in range(0, len(owner), 48):
        part = owner[k : k + 48]
        noise = [torch.Generator().manual_seed(1000 + k + n) for n in range(len(part))]
        out.append(torch.from_numpy(pipe(part, generator=noise, **settings).images))
    return torch.cat(out).permute(0, 3, 1, 2), owner


def clip_right(model, tokenizer, images, owner, candidates):
    """(B,) bool: is CLIP's nearest of the candidates the picture's prompt?"""
    device = model.logit_scale.device
    with torch.no_grad():
        text = model.encode_text(tokenizer(candidates).to(device), normalize=True)
        parts = [part.to(device) * 2 - 1 for part in images.split(64)]
        seen = torch.cat([model.encode_image(part, normalize=True) for part in parts])
    nearest = [candidates[k] for k in (seen @ text.T).argmax(1).tolist()]
    return torch.tensor([parse(a) == parse(b) for a, b in zip(nearest, owner)])


def check(folder, device, grid=None):
    """Print the table of bars, write samples to `grid`; True if every bar is met."""
    if not all((folder / part).exists() for part in ("unet", "clip", "judge")):
        die(f"{folder} lacks a part of the tiny model: build it, or name another --out")
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    name = f"local-dir:{folder / 'clip'}"
    clip = open_clip.create_model(name).eval().to(device)
    judge, lists = load_judge(folder / "judge").to(device), read_lists()
    met, errors, samples = [], [], []

    def row(what, value, count, low, high=math.inf):
        met.append(low <= value <= high)
        wanted = f">= {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        yes = "yes" if met[-1] else "NO"
        print(f"{what:<52} {value:7.2f}  {count:5}  {wanted:<10} {yes}", flush=True)

    def share(what, right, *bounds):
        row(what, 100 * right.float().mean().item(), len(right), *bounds)

    def base(what, prompts, each, candidates, *bounds):
        images, owner = sampled(pipe, prompts, each)
        samples.append(images[:: max(1, len(images) // 24)][:24])
        right = recognise(judge, images, owner, candidates)
        share(f"base, {what}, % of {len(candidates)}", right, *bounds)

    print(f"{'bar':<52} {'value':>7}  {'n':>5}  {'wanted':<10} met")
    known = {t: lists[f"{t} train"] + lists[f"{t} unseen"] for t in "123"}
    for (t, prompts), low in zip(known.items(), (95, 90, 85)):
        images, owner, error = drawn(prompts, pipe.vae)
        errors.append(error)
        right = clip_right(clip, open_clip.get_tokenizer(name), images, owner, prompts)
        share(f"CLIP, template {t}, % of {len(prompts)}", right, low)
        right = recognise(judge, images, owner, prompts)
        share(f"judge, template {t}, % of {len(prompts)}", right, low)
    error = torch.cat(errors)
    row("autoencoder, PSNR in dB", -10 * math.log10(error.mean()), len(error), 25)
    base("single nouns", noun_prompts(), 2, noun_prompts(), 85)
    for t, prompts in known.items():
        base(f"template {t} train", lists[f"{t} train"], 3, prompts, 30, 65)
        base(f"template {t} unseen", lists[f"{t} unseen"], 3, prompts, 0, 100)
    if grid:
        save_grid(grid, torch.cat(samples), 12)
    return all(met)
