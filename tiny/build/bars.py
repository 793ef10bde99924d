"""The bars that the tiny model is held to: `python -m tiny.build --check`.

CLIP and the judge are asked about held-out pictures: seed 99, which no training draws
with. Base samples are those of the pipeline before any reinforcement learning, at the
paper's T, eta and guidance. Pictures are (B, 3, 64, 64) in [0, 1]. The number before a
bar groups them, see README.md.
"""

import itertools
import math

import numpy as np
import open_clip
import torch
from diffusers import StableDiffusionPipeline

from support.report import save_grid
from tiny.build import scenes
from tiny.build.pictures import encode_pictures, spoiled_scene, to_tensor
from tiny.build.scenes import LISTS, cue_kinds, draw_scene, right_scene
from tiny.judge import CONTENT, HEADS, load_judge, probabilities, recognise
from tiny.world import STYLES, parse

PAIRS = 300  # pictures with a cue wrong and beside it right; with a spoiled noun


# ---------------------------------------------------------------- pictures to ask about


@torch.no_grad()
def through(vae, drawings):
    """Drawings (B, 64, 64, 3) uint8 -> as the autoencoder shows them; errors (B,)."""
    drawings = np.stack(drawings)
    latents = encode_pictures(vae, drawings).to(vae.device)
    shown = torch.cat([vae.decode(z).sample.clamp(-1, 1).cpu() for z in latents.split(100)])
    return shown / 2 + 0.5, (shown - to_tensor(drawings)).square().mean((1, 2, 3)) / 4


def drawn(prompts, vae):
    """Held-out pictures of the prompts in every style, their prompts and errors."""
    rng = np.random.default_rng(99)
    pairs = list(itertools.product(prompts, STYLES))
    drawings = [draw_scene(right_scene(parse(p), style, rng), rng) for p, style in pairs]
    images, errors = through(vae, drawings)
    return images, [prompt for prompt, _ in pairs], errors


def cue_pairs(prompts, vae, cue, count):
    """Held-out pictures, the same ones with this cue wrong, and their prompts."""
    rng = np.random.default_rng(99)
    owner = [str(rng.choice(prompts)) for _ in range(count)]
    right, wrong = [], []
    for prompt in owner:
        fact = parse(prompt)
        scene = right_scene(fact, str(rng.choice(STYLES)), rng)
        others = [kind for kind in cue_kinds(fact) if kind != fact[0]]
        if cue == "fact":
            others = scenes.rivals(fact)
        other = scene._replace(**{cue: others[rng.integers(len(others))]})
        seed = rng.integers(2**31)  # the same colours of the ground in both
        right.append(draw_scene(scene, np.random.default_rng(seed)))
        wrong.append(draw_scene(other, np.random.default_rng(seed)))
    return through(vae, right)[0], through(vae, wrong)[0], owner


def spoiled(vae, count):
    """Held-out pictures whose noun is spoiled, and the prompts that they are not."""
    rng = np.random.default_rng(99)
    # Where captions mirror one another the first counts
    caption_of = dict(zip(scenes.TOLD[::-1], scenes.CAPTIONS[::-1]))
    drawings, owner = [], []
    while len(owner) < count:
        drawing, scene, flags = spoiled_scene(rng)
        if any(flags) and scene.fact in caption_of and scene.fact[0] == scene.small == scene.tiny:
            drawings.append(drawing)
            owner.append(caption_of[scene.fact])
    return through(vae, drawings)[0], owner


def sampled(pipe, prompts, count, seed=1000):
    """At least `count` base samples, equally many a prompt, and their prompts."""
    owner = list(prompts) * math.ceil(count / len(prompts))
    noise = [torch.Generator().manual_seed(seed + k) for k in range(len(owner))]
    settings = dict(num_inference_steps=20, eta=1.0, guidance_scale=5.0, output_type="pt")
    batches = [slice(k, k + 60) for k in range(0, len(owner), 60)]
    images = [pipe(owner[b], generator=noise[b], **settings).images.cpu() for b in batches]
    return torch.cat(images), owner


def base_rates(pipe, judge, count, seed):
    """By prompt list: the share of at least `count` base samples that the judge recognises."""
    rates = {}
    for name, prompts in LISTS.items():
        right = recognise(judge, *sampled(pipe, prompts, count, seed))
        rates[name] = round(right.float().mean().item(), 3)
    return rates


@torch.no_grad()
def clip_scores(model, tokenizer, images, prompts):
    """(B, P): cosines of pictures and prompts."""
    device = model.logit_scale.device
    image, text, _ = model(images.to(device) * 2 - 1, tokenizer(list(prompts)).to(device))
    return (image @ text.T).cpu()


# ---------------------------------------------------------------- the table


def share(bar, right, low, high):
    """A row of the table: of `right` (B,) bool the percentage."""
    return bar, 100 * right.float().mean().item(), len(right), low, high


def of_drawings(vae, clip, judge):
    """Bars 1 and 2: what the autoencoder, CLIP and the judge make of held-out drawings."""
    all_errors = []
    for template, low in (("1", 95), ("2", 90), ("3", 85)):
        prompts = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
        images, owner, errors = drawn(prompts, vae)
        all_errors.append(errors)
        nearest = [prompts[k] for k in clip_scores(*clip, images, prompts).argmax(1)]
        right = torch.tensor([parse(a) == parse(b) for a, b in zip(nearest, owner)])
        yield share(f"2 CLIP, template {template}", right, low, 100)
        yield share(f"2 judge, template {template}", recognise(judge, images, owner), low, 100)
        for cue, size in (("fact", "big"), ("small", "small"), ("tiny", "tiny")):
            name = f"{size} cue, template {template}"
            right, wrong, owner = cue_pairs(prompts, vae, cue, PAIRS)
            prefers = (clip_scores(*clip, right, owner) > clip_scores(*clip, wrong, owner)).diag()
            yield share(f"2 CLIP prefers the right {name}", prefers, 95, 100)
            yield share(f"2 judge takes a wrong {name}", recognise(judge, wrong, owner), 0, 5)
    images, owner = spoiled(vae, PAIRS)
    yield share("2 judge recognises spoiled nouns", recognise(judge, images, owner), 0, 5)
    errors = torch.cat(all_errors)
    yield "1 autoencoder, PSNR in dB", -10 * math.log10(errors.mean()), len(errors), 30, math.inf


def of_samples(pipe, judge, tiles):
    """Bars 3 to 5; the function `shortcuts` has bar 5. Adds 24 samples of each list to `tiles`."""
    for name, prompts in [("nouns", scenes.NOUN_PROMPTS), *LISTS.items()]:
        images, owner = sampled(pipe, prompts, 360 if name in LISTS else 260)
        tiles.append(images[:: len(images) // 24][:24])
        right = recognise(judge, images, owner)
        rate = 100 * right.float().mean().item()
        if name == "nouns":
            yield share("3 base, single nouns", right, 90, 100)
        elif name.endswith("train"):
            yield share(f"4 base, template {name}", right, 28, 50)
            yield from shortcuts(judge, images, right, name[0])
            low, high = rate - 10, rate + 10
        else:
            yield share(f"4 base, template {name}", right, low, high)


def shortcuts(judge, images, right, template):
    """What the base's recognition hangs on: the best style, ground, side and size over all."""
    for name, head in list(zip(HEADS, probabilities(judge, images)))[CONTENT:]:
        picked = head.argmax(1)
        groups = [right[picked == k].float() for k in range(len(HEADS[name]))]
        best = max((group.mean().item() for group in groups if len(group) > 10), default=0.0)
        lift = best / max(right.float().mean().item(), 1e-9)
        yield f"5 best {name} over all, template {template}", lift, len(right), 0, 2
        if name == "style":
            shares = torch.tensor([len(group) / len(right) for group in groups])
            entropy = torch.special.entr(shares).sum().item()  # nats
            yield f"5 entropy of styles, template {template}", entropy, len(right), 1, math.inf


def check(folder, device, grid):
    """Print the bars; write base samples to `grid`. True if every bar is met."""
    pipe = StableDiffusionPipeline.from_pretrained(str(folder)).to(device)
    pipe.set_progress_bar_config(disable=True)
    name = f"local-dir:{folder.resolve() / 'clip'}"
    model = open_clip.create_model(name).eval().to(device)
    clip = (model, open_clip.get_tokenizer(name))
    judge = load_judge(folder / "judge").to(device)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    tiles = []
    rows = [of_drawings(pipe.vae, clip, judge), of_samples(pipe, judge, tiles)]
    rows.append([("10 size of the folder, MiB", size, 1, 0, 30)])
    all_met = True
    print(f"{'bar':<52} {'value':>7}  {'n':>5}  {'wanted':<14} met")
    for bar, value, count, low, high in itertools.chain(*rows):
        met = "yes" if low <= value <= high else "NO"
        all_met = all_met and met == "yes"
        print(
            f"{bar:<52} {value:7.2f}  {count:5}  {f'{low:.4g} to {high:.4g}':<14} {met}", flush=True
        )
    save_grid(grid, torch.cat(tiles), 12)
    return all_met
