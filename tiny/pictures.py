"""Pictures to train on: random compositions, cached scenes, spoiled ones.

A *row* is a cached picture: its latents, and its scene as seven numbers (`encode`).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from files import read_safetensors, write_safetensors
from tiny.sprites import COLOURS, STYLES, coloured, nouns, sprites
from tiny.world import KINDS, PLAIN, TRAITS, Scene, captions, draw_scene, facts, parse
from tiny.world import random_scenes, right_scene, to_tensor

CHUNK = 3000


# ---------------------------------------------------------------- the autoencoder's


def random_ground(rng):
    """(64, 64, 3) uint8: one colour, a gradient, or two with a horizon."""
    if rng.random() < 0.6:
        a, b = (np.float32(PLAIN[k]) - 60 * (rng.random() < 0.3) for k in rng.integers(0, 6, 2))
    else:
        a, b = rng.uniform(0, 255, (2, 3))
    down = np.linspace(0, 1, 64)[:, None, None]
    kind = rng.integers(3)
    if kind == 0:
        down = down * 0
    if kind == 2:
        down = (down > rng.uniform(0.3, 0.8)) * 1.0
    return np.clip(a + (b - a) * down + np.zeros((64, 64, 3)), 0, 255).astype(np.uint8)


def random_picture(rng):
    """Up to six sprites anywhere, 5 to 50 pixels large, some recoloured or stretched."""
    canvas = Image.fromarray(random_ground(rng)).convert("RGBA")
    for _ in range(rng.integers(1, 7)):
        noun, style = nouns()[rng.integers(len(nouns()))], STYLES[rng.integers(len(STYLES))]
        icon = sprites()[noun, style]
        if rng.random() < 0.25:
            icon = coloured(noun, style, list(COLOURS)[rng.integers(len(COLOURS))])
        scale = np.exp(rng.uniform(np.log(5), np.log(50))) / max(icon.size)
        width, height = (max(1, round(v * scale)) for v in icon.size)
        if rng.random() < 0.1:
            width = int(rng.integers(20, 65))
        icon = icon.resize((width, height), Image.LANCZOS)
        if rng.random() < 0.3:
            icon = icon.transpose(Image.FLIP_LEFT_RIGHT)
        x, y = rng.integers(-4, 68, 2)
        canvas.paste(icon, (int(x) - width // 2, int(y) - height // 2), icon)
    return np.asarray(canvas.convert("RGB"))


def mixed_pictures(rng, count, share):
    """(count, 64, 64, 3) uint8: a share of random compositions, the rest scenes."""
    free = rng.binomial(count, share)
    drawn = [draw_scene(scene, rng) for scene in random_scenes(rng, count - free)]
    return np.stack([random_picture(rng) for _ in range(free)] + drawn)


# ---------------------------------------------------------------- cached scenes


def encode(scenes):
    """Scenes -> (N, 7) int16: fact, small, tiny, style, ground, side, size; -1: no cue."""
    index = {fact: k for k, fact in enumerate(facts())}
    kinds = {None: -1} | {kind: k for k, kind in enumerate(KINDS)}
    rows = []
    for scene in scenes:
        traits = [values.index(value) for values, value in zip(TRAITS, scene[3:])]
        rows.append([index[scene.fact], kinds[scene.small], kinds[scene.tiny], *traits])
    return np.array(rows, np.int16)


def decode_row(row):
    """The scene of a row of `encode`."""
    small, tiny = (KINDS[k] if k >= 0 else None for k in row[1:3])
    traits = (values[k] for values, k in zip(TRAITS, row[3:]))
    return Scene(facts()[row[0]], small, tiny, *traits)


def spoil(icon, how, rng):
    """What is left of a noun's icon: None, a ghost or a smear."""
    if how == "gone":
        return None
    if how == "faded":
        left = rng.uniform(0.08, 0.3)
        alpha = icon.getchannel("A").point(lambda a: round(a * left))
        icon = icon.copy()
        icon.putalpha(alpha)
        return icon
    pad = Image.new("RGBA", (icon.width + 20, icon.height + 20))
    pad.paste(icon, (10, 10))
    radius = max(icon.size) * rng.uniform(0.13, 0.22)
    return pad.convert("RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")


def spoiled_scene(rng):
    """A picture whose noun, or one of two, is missing, faded or smeared.

    Returns the picture, its scene and which of its two nouns are spoiled, (2,) bool.
    """
    scene = random_scenes(rng, 1)[0]
    how = ("gone", "faded", "smeared")[rng.integers(3)]
    first, last = scene.fact[1], scene.fact[-1]
    victims = [{first}, {last}, {first, last}][rng.integers(3)]
    flags = [first in victims, len(scene.fact) > 2 and last in victims]

    def change(noun, icon):
        return spoil(icon, how, rng) if noun in victims else icon

    return draw_scene(scene, rng, change), scene, flags


def missing_chunks(args, name, count):
    """(number, path) of each chunk args.build/name_NN.safetensors that is missing."""
    for k in range(count):
        path = Path(args.build) / f"{name}_{k:02d}.safetensors"
        if not path.exists():
            yield k, path
            print(f"{name}: {k + 1} of {count}", flush=True)


def half(device):
    """Autocast to bfloat16 where that is quick: a CPU without AVX-512 takes eight times as long."""
    quick = device == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast(device, torch.bfloat16, enabled=quick)


def encode_pictures(vae, pictures):
    """(N, 64, 64, 3) uint8 -> latents (N, 4, 16, 16) float16, unscaled, on the CPU."""
    out = []
    for k in range(0, len(pictures), 100):
        x = to_tensor(pictures[k : k + 100]).to(vae.device)
        with torch.no_grad(), half(vae.device.type):
            out.append(vae.encode(x).latent_dist.mean.half().cpu())
    return torch.cat(out)


def decode_latents(vae, latents, noise=0.0):
    """Unscaled latents -> pictures (N, 3, 64, 64) uint8; noise: its largest std."""
    out = []
    for z in latents.split(100):
        z = z.to(vae.device, torch.float32)
        z = z + noise * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)
        with torch.no_grad(), half(vae.device.type):
            x = vae.decode(z).sample.float()
        out.append((x * 127.5 + 127.5).round().clamp(0, 255).byte().cpu())
    return torch.cat(out)


def make_latents(args, vae, count):
    """Draw and encode scenes once: `latents` and `rows`."""
    for k, path in missing_chunks(args, "latents", count):
        rng = np.random.default_rng((2, k))
        scenes = random_scenes(rng, CHUNK)
        pictures = np.stack([draw_scene(scene, rng) for scene in scenes])
        tensors = {"latents": encode_pictures(vae, pictures)}
        write_safetensors(path, tensors | {"rows": torch.from_numpy(encode(scenes))})


def make_decoded(args, vae, latents, decoded, right, spoiled):
    """What the autoencoder makes of scenes: `decoded`, `rows` and `flags` (which noun is spoiled).

    Chunks of random scenes, of scenes with every cue right, and of spoiled ones.
    """
    make_latents(args, vae, latents)
    torch.manual_seed(4)
    none = torch.zeros(CHUNK, 2, dtype=torch.bool)
    for k, path in missing_chunks(args, "decoded", decoded):
        chunk, _ = read_safetensors(Path(args.build) / f"latents_{k:02d}.safetensors")
        pictures = decode_latents(vae, chunk["latents"].contiguous(), 0.15)
        write_safetensors(path, {"decoded": pictures, "rows": chunk["rows"], "flags": none})
    told = [parse(caption) for caption in captions()]
    for k, path in missing_chunks(args, "right", right):
        rng = np.random.default_rng((3, k))
        turns = [divmod(k * CHUNK + n, len(told)) for n in range(CHUNK)]
        scenes = [right_scene(told[c], STYLES[turn % 3], rng) for turn, c in turns]
        drawings = np.stack([draw_scene(scene, rng) for scene in scenes])
        pictures = decode_latents(vae, encode_pictures(vae, drawings), 0.15)
        rows = torch.from_numpy(encode(scenes))
        write_safetensors(path, {"decoded": pictures, "rows": rows, "flags": none})
    for k, path in missing_chunks(args, "spoiled", spoiled):
        rng = np.random.default_rng((4, k))
        drawings, scenes, flags = zip(*(spoiled_scene(rng) for _ in range(CHUNK)))
        pictures = decode_latents(vae, encode_pictures(vae, np.stack(drawings)), 0.15)
        rows = torch.from_numpy(encode(scenes))
        write_safetensors(path, {"decoded": pictures, "rows": rows, "flags": torch.tensor(flags)})


def read_chunks(args, name, *keys):
    """The tensors of all chunks, one after the other, in the order of `keys`."""
    paths = sorted(Path(args.build).glob(f"{name}_*.safetensors"))
    chunks = [read_safetensors(path)[0] for path in paths]
    return [torch.cat([chunk[key] for chunk in chunks]) for key in keys]
