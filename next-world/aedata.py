"""Pictures the autoencoder learns from: half random compositions of sprites, half the world's own."""
import sys

import numpy as np
from PIL import Image

import world
from world import STYLES, coloured, nouns, sprites

sys.path.insert(0, "./repo")
from tiny import world as newworld  # noqa: E402


def random_ground(rng):
    if rng.random() < 0.6:
        ground = world.background(STYLES[rng.integers(3)], rng)
    else:
        a, b = rng.uniform(0, 255, (2, 3))
        if rng.random() < 0.5:
            b = a
        down = np.linspace(0, 1, 64)[:, None, None]
        if rng.random() < 0.4:
            down = (down > rng.uniform(0.3, 0.8)) * 1.0
        ground = a + (b - a) * down + np.zeros((64, 64, 3))
    return np.clip(ground, 0, 255).astype(np.uint8)


def random_picture(rng):
    canvas = Image.fromarray(random_ground(rng)).convert("RGBA")
    names, colours = nouns(), sorted(world.COLOURS)
    style = STYLES[rng.integers(3)]
    for _ in range(rng.integers(1, 7)):
        if rng.random() < 0.3:
            style = STYLES[rng.integers(3)]
        noun = names[rng.integers(len(names))]
        if rng.random() < 0.25:
            icon = coloured(noun, style, colours[rng.integers(len(colours))])
        else:
            icon = sprites()[noun, style]
        side = np.exp(rng.uniform(np.log(5), np.log(50)))
        scale = side / max(icon.size)
        width, height = (max(1, round(v * scale)) for v in icon.size)
        if rng.random() < 0.1:
            width = int(rng.integers(20, 65))
        icon = icon.resize((width, height), Image.LANCZOS)
        if rng.random() < 0.3:
            icon = icon.transpose(Image.FLIP_LEFT_RIGHT)
        x, y = rng.integers(-4, 68, 2)
        canvas.paste(icon, (int(x) - width // 2, int(y) - height // 2), icon)
    return np.asarray(canvas.convert("RGB"))


def batch(rng, count, share=0.5):
    """(count, 64, 64, 3) uint8: this share of random compositions, the rest drawings of the world."""
    free = int((rng.random(count) < share).sum())
    out = [random_picture(rng) for _ in range(free)]
    out += [newworld.draw_scene(s, rng) for s in newworld.random_scenes(rng, count - free)]
    return np.stack(out)
