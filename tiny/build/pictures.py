"""What the networks see: random compositions, scenes, spoiled nouns, latents.

Latents are (N, 4, 16, 16), not yet scaled.
"""

import numpy as np
import torch
from PIL import Image, ImageFilter

from support.run_folder import read_safetensors, write_safetensors
from tiny.build import scenes
from tiny.build.scenes import TOLD, draw_scene, draw_scenes, random_scenes, right_scene
from tiny.world import COLOURS, NOUNS, STYLES

CHUNK = 3000  # pictures that share a generator
# So many chunks are drawn: for the UNet, for CLIP and the judge, for CLIP and the judge
CHUNKS = {"random": 24, "right": 3, "spoiled": 3}
SHOWN = 12  # so many of the random ones are for CLIP and the judge, too


# ---------------------------------------------------------------- the autoencoder's


def random_ground(rng):
    """(64, 64, 3) uint8: one colour, a gradient, or two with a horizon."""
    if rng.random() < 0.6:
        top, bottom = (scenes.PLAIN[k] - 60 * (rng.random() < 0.3) for k in rng.integers(0, 6, 2))
    else:
        top, bottom = rng.uniform(0, 255, (2, 3))
    down = np.linspace(0, 1, 64)[:, None, None]
    kind = rng.integers(3)
    if kind == 0:
        down = down * 0
    if kind == 2:
        down = (down > rng.uniform(0.3, 0.8)) * 1.0
    return scenes.fade(top, bottom, down)


def random_picture(rng):
    """Up to six icons anywhere, 5 to 50 pixels large, some recoloured or stretched."""
    canvas = Image.fromarray(random_ground(rng)).convert("RGBA")
    for _ in range(rng.integers(1, 7)):
        noun = NOUNS[rng.integers(len(NOUNS))]
        style = STYLES[rng.integers(len(STYLES))]
        icon = scenes.icons()[noun, style]
        if rng.random() < 0.25:
            icon = scenes.coloured(noun, style, list(COLOURS)[rng.integers(len(COLOURS))])
        scale = np.exp(rng.uniform(np.log(5), np.log(50))) / max(icon.size)
        width, height = (max(1, round(side * scale)) for side in icon.size)
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


# ---------------------------------------------------------------- spoiled nouns


def spoil(icon, how, rng):
    """What is left of a noun's icon: None, a ghost or a smear."""
    if how == "gone":
        return None
    if how == "faded":
        left = rng.uniform(0.08, 0.3)
        ghost = icon.copy()
        ghost.putalpha(icon.getchannel("A").point(lambda alpha: round(alpha * left)))
        return ghost
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


# ---------------------------------------------------------------- through the autoencoder


def half(device):
    """Autocast to bfloat16 where that is quick: a CPU without AVX-512 takes eight times as long."""
    quick = device == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast(device, torch.bfloat16, enabled=quick)


def to_tensor(pictures):
    """(B, 64, 64, 3) uint8 array -> (B, 3, 64, 64) float tensor in [-1, 1], channels last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_pictures(vae, pictures):
    """(N, 64, 64, 3) uint8 array -> latents on the CPU."""
    parts = [to_tensor(pictures[k : k + 100]) for k in range(0, len(pictures), 100)]
    return torch.cat([vae.encode(part.to(vae.device)).latent_dist.mean.cpu() for part in parts])


@torch.no_grad()
def decode_latents(vae, latents, noise=0.0):
    """Latents -> pictures (N, 3, 64, 64) uint8, on the CPU; noise: its largest std."""
    pictures = []
    for z in latents.split(100):
        z = z.to(vae.device, torch.float32)
        z = z + noise * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)
        x = vae.decode(z).sample.float()
        pictures.append((x * 127.5 + 127.5).round().clamp(0, 255).byte().cpu())
    return torch.cat(pictures)


def draw_chunk(kind, number, rng):
    """CHUNK drawings, their scenes, and which of their two nouns are spoiled."""
    if kind == "spoiled":
        return zip(*(spoiled_scene(rng) for _ in range(CHUNK)))
    if kind == "random":
        drawn = random_scenes(rng, CHUNK)
    else:  # every caption in one style, then in the next
        turns = [divmod(number * CHUNK + k, len(TOLD)) for k in range(CHUNK)]
        drawn = [right_scene(TOLD[k], STYLES[turn % 3], rng) for turn, k in turns]
    return draw_scenes(drawn, rng), drawn, [[False, False]] * CHUNK


def make_pictures(vae):
    """What UNet, CLIP and judge are trained on: minutes of work, once.

    For the UNet `latents` (M, 4, 16, 16) and `latent_rows` (M, 7) of random scenes; for
    CLIP and the judge `decoded` (N, 3, 64, 64) uint8, pictures as the autoencoder shows
    them, or sharpness would be learnt; their `rows` (N, 7), and `flags` (N, 2): which
    noun is spoiled.
    """
    latents, rows, flags = [], [], []
    for seed, (kind, count) in enumerate(CHUNKS.items(), 2):
        for number in range(count):
            rng = np.random.default_rng((seed, number))
            drawings, drawn, spoiled = draw_chunk(kind, number, rng)
            with half(vae.device.type):
                latents.append(encode_pictures(vae, np.stack(drawings)).half())
            rows.append(scenes.encode(drawn))
            flags.append(torch.tensor(spoiled))
    latents, rows, flags = (torch.cat(parts) for parts in (latents, rows, flags))
    count = CHUNKS["random"] * CHUNK
    shown = torch.ones(len(rows), dtype=torch.bool)
    shown[SHOWN * CHUNK : count] = False
    torch.manual_seed(4)
    with half(vae.device.type):
        decoded = decode_latents(vae, latents[shown].contiguous(), 0.15)
    pictures = dict(latents=latents[:count], latent_rows=rows[:count])
    return pictures | dict(decoded=decoded, rows=rows[shown], flags=flags[shown])


def load_pictures(folder, vae):
    """The tensors of `make_pictures`, kept in a file of `folder`."""
    path = folder / "pictures.safetensors"
    if not path.exists():
        write_safetensors(path, make_pictures(vae))
    return read_safetensors(path)[0]
