"""What can be drawn, and how: facts, icons, scenes.

A *scene* is all that a 64x64 picture shows. "A cat washing dishes" shows the cat, and it
tells the activity three times: by a big thing (the plate), a small one (a cup) and a tiny
mark (a drop). "Red apple" has a big, a small and a tiny apple; "dog on boat" has the two
nouns, a sign and a tiny mark that show their relation. The big cue is decided early in
the denoising, the small one in the middle, the tiny one late.

Icons: every noun in three styles, openly licensed (ATTRIBUTION.md), in sprites.png. Line
drawings, as a fourth style, do not survive an autoencoder that compresses 12 times.
"""

import functools
from collections import namedtuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from support.prompts import read_lists
from tiny.world import ACTIVITIES, COLOURS, GROUNDS, HOME, KINDS, NOUNS, RELATION_KINDS
from tiny.world import SIDES, SIZES, STYLES, parse

LISTS = read_lists()  # "1 train", "1 unseen", "2 train", ... -> the paper's prompts
NOUN_PROMPTS = [f"a {noun}" for noun in NOUNS]  # "a ant", as the paper spells it
CAPTIONS = list(dict.fromkeys([*sum(LISTS.values(), []), *NOUN_PROMPTS]))
TOLD = [parse(caption) for caption in CAPTIONS]  # the captions' facts
# The template of the paper, "1" to "3", that tells facts of a kind; None for a noun alone
TEMPLATE = {"alone": None} | dict.fromkeys(ACTIVITIES, "1")
TEMPLATE |= dict.fromkeys(COLOURS, "2") | dict.fromkeys(RELATION_KINDS, "3")
# How often a noun alone is drawn, and a fact of each template
SHARES = {None: 0.25, "1": 0.36, "2": 0.18, "3": 0.21}

CELL = 48  # an icon's side in sprites.png
COLUMNS = 24  # icons a row; a noun's styles stand side by side
SURFACES = ("sky", "street", "road", "grass")  # stretched over the whole width
WORN = {"glasses": 27, "shirt": 48, "jacket": 48, "watch": 46, "cup": 36}  # height on a body
PLAIN = np.float32((
    (246, 196, 196), (190, 222, 248), (196, 232, 196),
    (250, 232, 170), (216, 200, 244), (196, 202, 210),
))  # fmt: skip
BIG_THINGS = {"dishes": "plate", "bike": "bicycle", "chess": "pawn"}
SMALL_THINGS = {"dishes": "cup", "bike": "cone", "chess": "watch"}
# Pixels of the small and the tiny cue by template: they set when a cue is decided
CUE_SIDES = {"1": (12, 4), "2": (13, 5), "3": (12, 7)}


# ---------------------------------------------------------------- facts


@functools.cache
def fruit_colours(noun):
    """The colours that a fruit is drawn in: those of its prompts, at least three."""
    named = {fact[0] for fact in TOLD if fact[0] in COLOURS and fact[1] == noun}
    more = [colour for colour in ("yellow", "purple", "red") if colour not in named]
    return sorted([*named, *more[: max(0, 3 - len(named))]])


def cue_kinds(fact):
    """The kinds that a small or tiny cue beside this fact may tell."""
    kinds = {"alone": ["alone"]} | dict.fromkeys(ACTIVITIES, [*ACTIVITIES])
    kinds |= dict.fromkeys(RELATION_KINDS, [*RELATION_KINDS])
    return fruit_colours(fact[1]) if fact[0] in COLOURS else kinds[fact[0]]


def rivals(fact):
    """What the big cue may show instead: another activity, colour or relation."""
    sides = {fact[1:], fact[:0:-1]}  # of a relation the nouns may swap, too
    others = {(kind, *side) for kind in cue_kinds(fact) for side in sides}
    return sorted(others - {fact})


# Every fact that may be drawn: those that captions tell, and their rivals
FACTS = sorted({*TOLD, *(rival for fact in TOLD for rival in rivals(fact))})


# ---------------------------------------------------------------- scenes


# small, tiny: the kinds that those cues tell; "alone" where a noun has none
Scene = namedtuple("Scene", "fact small tiny style ground side size")
TRAITS = (STYLES, GROUNDS, SIDES, SIZES)
FIELDS = (FACTS, ("alone", *KINDS), ("alone", *KINDS), *TRAITS)  # what a Scene's entries may be


def encode(scenes):
    """Scenes -> rows (N, 7) int16: where in FIELDS their entries stand."""
    rows = [[values.index(entry) for values, entry in zip(FIELDS, scene)] for scene in scenes]
    return torch.tensor(rows, dtype=torch.int16)


def right_scene(fact, style, rng):
    """A scene in which every cue tells the fact; the rest is drawn at random."""
    others = (str(rng.choice(values)) for values in TRAITS[1:])
    return Scene(fact, fact[0], fact[0], style, *others)


TEMPLATES = [TEMPLATE[fact[0]] for fact in FACTS]
FACT_SHARES = np.array([SHARES[t] / TEMPLATES.count(t) for t in TEMPLATES])


def random_scenes(rng, count):
    """Scenes whose cues are drawn evenly and apart from one another."""
    scenes = []
    for k in rng.choice(len(FACTS), count, p=FACT_SHARES / FACT_SHARES.sum()):
        kinds = cue_kinds(FACTS[k])
        entries = (values[rng.integers(len(values))] for values in (kinds, kinds, *TRAITS))
        scenes.append(Scene(FACTS[k], *entries))
    return scenes


# ---------------------------------------------------------------- icons


@functools.cache
def icons():
    """{(noun, style): RGBA picture, cropped to what is drawn}."""
    sheet = Image.open(HOME / "sprites.png").convert("RGBA")
    cropped = {}
    for k, key in enumerate((noun, style) for noun in NOUNS for style in STYLES):
        left, top = k % COLUMNS * CELL, k // COLUMNS * CELL
        cell = sheet.crop((left, top, left + CELL, top + CELL))
        cropped[key] = cell.crop(cell.getbbox())
    return cropped


@functools.cache
def coloured(noun, style, colour):
    """An icon recoloured: pixels near its main hue get the colour, leaves stay."""
    rgba = np.asarray(icons()[noun, style]).astype(np.float32)
    rgb = rgba[..., :3]
    light = rgb @ np.float32((0.3, 0.59, 0.11))
    solid = rgba[..., 3] > 128
    spread = rgb.max(-1) - rgb.min(-1)  # 0 where a pixel is grey
    hue = np.angle(rgb @ np.exp(2j * np.pi * np.arange(3) / 3))
    votes = np.histogram(hue[solid], 18, (-np.pi, np.pi), weights=spread[solid] + 4)[0]
    votes = votes + np.roll(votes, 1) + np.roll(votes, -1)
    main = -np.pi + (votes.argmax() + 0.5) * np.pi / 9
    near = (np.abs(np.angle(np.exp(1j * (hue - main)))) < 0.85) | (spread < 36)
    shade = (light / light[near & solid].mean())[..., None]
    target = np.float32(COLOURS[colour])
    ramp = np.clip(0.35 + 0.65 * shade, 0.4, 1.25) * target
    if colour in ("white", "black"):  # keeps the seeds and edges visible
        ramp = target + 110 * (shade - 1.0)
    rgba[..., :3] = np.where(near[..., None], np.clip(ramp, 0, 255), rgb)
    return Image.fromarray(rgba.astype(np.uint8))


@functools.cache
def resized(noun, style, colour, width, height):
    """An icon, in a colour or None, fitted into width x height; a surface is stretched to it."""
    icon = coloured(noun, style, colour) if colour else icons()[noun, style]
    if noun not in SURFACES or width == height:
        scale = min(width / icon.width, height / icon.height)
        width, height = (max(1, round(side * scale)) for side in icon.size)
    return icon.resize((width, height), Image.LANCZOS)


@functools.cache
def mark(kind, side, framed):
    """A sign of `side` pixels: an activity's mark, or two discs as a relation puts them."""
    big = Image.new("RGBA", (96, 96))
    pen = ImageDraw.Draw(big)
    if kind == "dishes":  # a drop
        pen.polygon([(48, 0), (88, 58), (8, 58)], (20, 110, 230))
        pen.ellipse((6, 14, 90, 96), (20, 110, 230))
    elif kind == "bike":  # a flag
        pen.polygon([(6, 0), (96, 44), (6, 88)], (235, 50, 30))
        pen.rectangle((0, 0, 16, 96), (90, 40, 20))
    elif kind == "chess":  # a square of the board
        pen.rectangle((0, 0, 95, 95), (20, 20, 20))
    else:
        low, radius = (22, 19) if framed else (24, 23)
        discs = {"left": [(low, 48), (96 - low, 48)], "on": [(48, low), (48, 96 - low)]}
        if framed:
            pen.rounded_rectangle((1, 1, 94, 94), 16, (255, 255, 255), (60, 60, 70), 9)
        places = discs.get(kind, [(34, 34), (62, 62)])
        for (x, y), colour in zip(places, ((225, 40, 40), (40, 80, 220))):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return big.resize((side, side), Image.LANCZOS)


def cue(fact, kind, style, tiny):
    """The RGBA picture of a small or tiny cue beside this fact."""
    template = TEMPLATE[fact[0]]
    side = CUE_SIDES[template][tiny]
    if template == "2":
        return resized(fact[1], style, kind, side, side)
    if template == "1" and not tiny:
        return resized(SMALL_THINGS[kind], style, None, side, side)
    return mark(kind, side, framed=not tiny)


# ---------------------------------------------------------------- pictures


def layout(fact):
    """The nouns and the big cue, back to front: [(noun, colour or None, x, y, width, height)]."""
    kind, first, last = fact[0], fact[1], fact[-1]
    if kind == "alone":
        return [(first, None, 32, 32, 44, 44)]
    if kind in COLOURS:
        return [(first, kind, 32, 32, 42, 42)]
    if kind in ACTIVITIES:  # the animal stays where it is, whatever it does
        return [(first, None, 32, 20, 36, 36), (BIG_THINGS[kind], None, 32, 46, 46, 35)]
    if kind == "left":
        sizes = [(32, 44) if noun in SURFACES else (30, 30) for noun in (first, last)]
        return [(first, None, 16, 34, *sizes[0]), (last, None, 48, 34, *sizes[1])]
    if kind == "behind" and last in SURFACES:
        return [(first, None, 32, 24, 40, 40), (last, None, 32, 52, 64, 24)]
    if kind == "behind":
        return [(first, None, 23, 21, 36, 36), (last, None, 41, 43, 36, 36)]
    if first in WORN and last in ("person", "face", "shirt"):
        return [(last, None, 32, 31, 50, 50), (first, None, 32, WORN[first], 26, 26)]
    below = (32, 51, 64, 26) if last in SURFACES else (32, 47, 32, 32)
    above = (32, 13, 64, 26) if first in SURFACES else (32, 19, 32, 32)
    return [(last, None, *below), (first, None, *above)]


def fade(top, bottom, down):
    """(64, 64, 3) uint8: from one colour to another; down (64, 1, 1): the share of `bottom`."""
    rows = top + (bottom - top) * down
    return np.clip(rows + np.zeros((64, 64, 3), np.float32), 0, 255).astype(np.uint8)


def background(ground, rng):
    """(64, 64, 3) uint8: plain, gradient or scene."""
    first, second = PLAIN[rng.choice(len(PLAIN), 2, replace=False)]
    down = np.linspace(0, 1, 64, dtype=np.float32)[:, None, None]
    if ground == "plain":
        return fade(first, first, down)
    if ground == "gradient":  # darker than the plain ones, or nobody could tell them apart
        return fade(first - 60, second, down)
    sky = fade(np.float32((150, 205, 245)), np.float32((240, 250, 250)), down)
    grass = fade(np.float32((150, 200, 120)), np.float32((120, 170, 90)), down)
    return np.where(down < 0.62, sky, grass)


def put(canvas, icon, x, y):
    """Paste an icon with its middle at x, y."""
    corner = (round(x - icon.width / 2), round(y - icon.height / 2))
    canvas.alpha_composite(icon, corner)


def draw_scene(scene, rng, change=None):
    """Draw a scene -> (64, 64, 3) uint8; rng, a numpy Generator, draws the ground's colours.

    change: noun, icon -> what is drawn in the icon's place, or None.
    """
    canvas = Image.fromarray(background(scene.ground, rng)).convert("RGBA")
    for noun, colour, x, y, width, height in layout(scene.fact):
        if scene.size == "small" and noun not in SURFACES and noun not in BIG_THINGS.values():
            width, height = round(width * 0.84), round(height * 0.84)
        icon = resized(noun, scene.style, colour, width, height)
        icon = change(noun, icon) if change else icon
        if icon:
            put(canvas, icon, x, y)
    if scene.small != "alone":
        corners = [(55, 9), (8, 56)]  # upper right, lower left
        if scene.side == "left":
            corners.reverse()
        put(canvas, cue(scene.fact, scene.small, scene.style, tiny=False), *corners[0])
        put(canvas, cue(scene.fact, scene.tiny, scene.style, tiny=True), *corners[1])
    return np.asarray(canvas.convert("RGB"))


def draw_scenes(scenes, rng):
    """(N, 64, 64, 3) uint8."""
    return np.stack([draw_scene(scene, rng) for scene in scenes])
