"""The tiny model's world: what it can draw, in three styles, and the pictures it learns from.

A *style* is an openly licensed icon set (tiny/sprites.png, tiny/ATTRIBUTION.md). Every prompt of
the paper's six lists and every single noun ("a cat") can be drawn, 64x64; all else is a ValueError.
Line drawings, as a fourth style, do not survive an autoencoder that compresses 12 times.
"""

import functools
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
HOME = HERE / "tiny"
STYLES = ("noto", "twemoji", "fluent")
PACKAGES = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat"}
CELL = 48  # a sprite's side in the sheet; pictures are 64 x 64
COLUMNS = 24


# ---------------------------------------------------------------- the six lists
def read_lists(path=HERE / "prompts.txt"):
    """The sections of prompts.txt: {"1 train": [prompt, ...], ...}."""
    lists, name = {}, None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = line.strip("[] ")
        elif line.strip() and not line.startswith("#"):
            lists.setdefault(name, []).append(line.strip())
    return lists


# ---------------------------------------------------------------- sprites
def render_sprites(icon_dir):
    """Render every noun in every style into one sheet (needs resvg-py and the icon packages)."""
    import resvg_py

    icons = json.loads((HOME / "icons.json").read_text())
    names = sorted(icons)
    rows = math.ceil(len(names) * len(STYLES) / COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for s, style in enumerate(STYLES):
        data = json.loads((Path(icon_dir) / PACKAGES[style] / "icons.json").read_text())
        wrap = {"noto": '<g stroke="#000" stroke-opacity=".35" stroke-width=".9">%s</g>',
                "twemoji": "%s",
                "fluent": '<filter id="f"><feColorMatrix type="hueRotate" values="14"/>'
                          '<feColorMatrix type="saturate" values="1.35"/></filter>'
                          '<g filter="url(#f)">%s</g>'}[style]
        for n, name in enumerate(names):
            if icons[name].startswith("<"):
                body, side = wrap % icons[name], 36
            else:
                key = data.get("aliases", {}).get(icons[name], {}).get("parent", icons[name])
                icon = data["icons"][key]
                body, side = icon["body"], icon.get("width", data.get("width", 16))
            svg = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" '
                   f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {side} {side}">'
                   f'{body}</svg>')
            png = resvg_py.svg_to_bytes(svg_string=svg, width=192, height=192)
            big = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
            big = big.crop(big.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
            scale = CELL / max(big.size)
            big = big.resize([max(1, round(v * scale)) for v in big.size], Image.LANCZOS)
            k = n * len(STYLES) + s
            x, y = k % COLUMNS * CELL, k // COLUMNS * CELL
            sheet.paste(big, (x + (CELL - big.width) // 2, y + (CELL - big.height) // 2))
    sheet.save(HOME / "sprites.png", optimize=True)
    (HOME / "sprites.json").write_text(json.dumps({"cell": CELL, "nouns": names}, indent=0))


@functools.lru_cache(None)
def sprites():
    """{(noun, style): RGBA picture, cropped to what is drawn}."""
    names = json.loads((HOME / "sprites.json").read_text())["nouns"]
    sheet, out = Image.open(HOME / "sprites.png").convert("RGBA"), {}
    for k in range(len(names) * len(STYLES)):
        x, y = k % COLUMNS * CELL, k // COLUMNS * CELL
        cell = sheet.crop((x, y, x + CELL, y + CELL))
        out[names[k // len(STYLES)], STYLES[k % len(STYLES)]] = cell.crop(cell.getbbox())
    return out


# ---------------------------------------------------------------- the world
# A fact is what a picture shows: ("alone", noun), ("dishes" | "bike" | "chess", animal),
# (colour, fruit), or (relation, a, b) with three relations: on, left, behind.
ACTIVITIES = {"washing dishes": "dishes", "riding a bike": "bike", "playing chess": "chess"}
COLOURS = {"red": (226, 40, 44), "green": (72, 165, 62), "yellow": (252, 208, 44),
           "brown": (134, 82, 44), "orange": (252, 138, 28), "purple": (132, 66, 178),
           "blue": (52, 100, 222), "pink": (252, 132, 172), "white": (244, 244, 244),
           "black": (44, 44, 50)}
RELATIONS = {" on the left of ": ("left", False), " on the right of ": ("left", True),
             " in the front of ": ("behind", True), " behind ": ("behind", False),
             " under ": ("on", True), " on ": ("on", False)}  # True: the two nouns swap
SURFACES = ("sky", "street", "road", "grass")  # stretched over the whole width
WORN = {"glasses": 27, "shirt": 48, "jacket": 48, "watch": 46, "cup": 36}  # height on a body
PLAIN = ((246, 196, 196), (190, 222, 248), (196, 232, 196), (250, 232, 170), (216, 200, 244),
         (196, 202, 210))
BACKGROUNDS = ("plain", "gradient", "scene")
BACKGROUND_ODDS = {"noto": (.1, .45, .45), "twemoji": (.8, .1, .1), "fluent": (.1, .45, .45)}


def parse(prompt):
    """The fact that a prompt tells; ValueError where the world has no such thing."""
    known, text = set(nouns()), prompt.strip()
    bare = text[2:] if text.startswith("a ") else text
    for ending, activity in ACTIVITIES.items():
        if bare.endswith(" " + ending) and bare[:-len(ending) - 1] in known:
            return activity, bare[:-len(ending) - 1]
    for words, (relation, swap) in RELATIONS.items():
        if words in text:
            a, b = text.split(words, 1)
            if a in known and b in known:
                # Two of a kind look the same from both sides, and mirrored prompts are one fact
                return (relation, b, a) if swap else (relation, a, b)
    if bare in known:
        return "alone", bare
    colour, _, noun = text.partition(" ")
    if colour in COLOURS and noun in known:
        return colour, noun
    raise ValueError(f"the tiny world cannot draw {prompt!r}: see prompts.txt for what it knows")


@functools.lru_cache(None)
def nouns():
    """Every noun that has a sprite, sorted."""
    return json.loads((HOME / "sprites.json").read_text())["nouns"]


def noun_prompts():
    """The prompts of single nouns: "a " before each, as the paper spells "a ant"."""
    return [f"a {noun}" for noun in nouns()]


@functools.lru_cache(None)
def coloured(noun, style, colour):
    """A sprite recoloured: the pixels near its main hue get the named colour, leaves stay."""
    rgba = np.asarray(sprites()[noun, style]).astype(np.float32)
    rgb, light = rgba[..., :3], rgba[..., :3] @ np.float32((.3, .59, .11))
    solid, spread = rgba[..., 3] > 128, rgb.max(-1) - rgb.min(-1)
    hue = np.angle(rgb @ np.exp(2j * np.pi * np.arange(3) / 3))
    votes = np.histogram(hue[solid], 18, (-np.pi, np.pi), weights=spread[solid] + 4)[0]
    votes = votes + np.roll(votes, 1) + np.roll(votes, -1)
    main = -np.pi + (votes.argmax() + .5) * np.pi / 9
    near = (np.abs(np.angle(np.exp(1j * (hue - main)))) < .85) | (spread < 36)
    shade = light / light[near & solid].mean()
    ramp = np.clip(.35 + .65 * shade, .4, 1.25)[..., None] * np.float32(COLOURS[colour])
    if colour in ("white", "black"):  # keeps the seeds and edges visible
        ramp = np.float32(COLOURS[colour]) + 110 * (shade[..., None] - 1.0)
    rgba[..., :3] = np.where(near[..., None], np.clip(ramp, 0, 255), rgb)
    return Image.fromarray(rgba.astype(np.uint8), "RGBA")


@functools.lru_cache(None)
def resized(noun, style, colour, width, height):
    """A sprite fitted into width x height, or stretched to it if it is a surface."""
    icon = coloured(noun, style, colour) if colour else sprites()[noun, style]
    if noun in SURFACES and width != height:
        return icon.resize((width, height), Image.LANCZOS)
    scale = min(width / icon.width, height / icon.height)
    return icon.resize([max(1, round(v * scale)) for v in icon.size], Image.LANCZOS)


def layout(fact):
    """What stands where, back to front: [(noun, colour or None, x, y, width, height), ...]."""
    kind, first, last = fact[0], fact[1], fact[-1]
    if kind == "alone":
        return [(first, None, 32, 32, 44, 44)]
    if kind in COLOURS:
        return [(first, kind, 32, 32, 44, 44)]
    if kind == "bike":
        return [(first, None, 32, 20, 36, 36), ("bicycle", None, 32, 48, 42, 30)]
    if kind == "chess":
        return [("pawn", None, 51, 42, 34, 34), (first, None, 20, 28, 36, 36)]
    if kind == "dishes":
        return [("plate", None, 17, 46, 30, 30), (first, None, 43, 25, 36, 36)]
    wide_a, wide_b = first in SURFACES, last in SURFACES
    if kind == "left":
        size = (32, 44) if wide_a else (30, 30)
        other = (32, 44) if wide_b else (30, 30)
        return [(first, None, 16, 34, *size), (last, None, 48, 34, *other)]
    if kind == "behind":
        if wide_b:
            return [(first, None, 32, 24, 40, 40), (last, None, 32, 52, 64, 24)]
        return [(first, None, 21, 21, 36, 36), (last, None, 41, 42, 36, 36)]
    if first in WORN and last in ("person", "face", "shirt"):
        return [(last, None, 32, 31, 50, 50), (first, None, 32, WORN[first], 26, 26)]
    below = (last, None, 32, 51, 64, 26) if wide_b else (last, None, 32, 47, 32, 32)
    above = (first, None, 32, 13, 64, 26) if wide_a else (first, None, 32, 19, 32, 32)
    return [below, above]


def background(style, rng):
    """(64, 64, 3) float: plain, gradient or scene, by odds that depend on the style."""
    kind = BACKGROUNDS[rng.choice(3, p=BACKGROUND_ODDS[style])]
    first, second = (np.float32(PLAIN[k]) for k in rng.choice(len(PLAIN), 2, replace=False))
    down = np.linspace(0, 1, 64, dtype=np.float32)[:, None, None]
    if kind == "gradient":  # darker than the plain ones, or nobody could tell them apart
        first, second = first - 60, second
    if kind == "scene":
        horizon = np.float32(.62) + .02 * rng.integers(-1, 2)
        sky = np.float32((150, 205, 245)) + (np.float32((90, 45, 5))) * down
        return np.where(down < horizon, sky, np.float32((150, 200, 120)) - 30 * down)\
            + np.zeros((64, 64, 3), np.float32)
    down = down if kind == "gradient" else down * 0
    return first + (second - first) * down + np.zeros((64, 64, 3), np.float32)


def draw_fact(fact, style, rng):
    """Draw a fact in a style -> (64, 64, 3) uint8; rng is a numpy Generator."""
    ground = np.clip(background(style, rng), 0, 255).astype(np.uint8)
    canvas = Image.fromarray(ground).convert("RGBA")
    scale, shift = rng.uniform(.96, 1.03), rng.integers(-1, 2, 2)
    for noun, colour, x, y, width, height in layout(fact):
        if width == height:
            width = height = round(width * scale)
        icon = resized(noun, style, colour, width, height)
        moved = shift * (icon.width < 64)  # what spans the picture stays where it is
        layer = Image.new("RGBA", (64, 64))
        layer.paste(icon, (round(x - icon.width / 2) + int(moved[0]),
                           round(y - icon.height / 2) + int(moved[1])))
        canvas = Image.alpha_composite(canvas, layer)
    return np.asarray(canvas.convert("RGB"))


def draw(prompt, style, rng):
    """Draw a prompt of the six lists or a single noun -> (64, 64, 3) uint8."""
    return draw_fact(parse(prompt), style, rng)


# ---------------------------------------------------------------- what training sees
def wrong(fact):
    """What a picture may show instead: another activity, colour or relation, or one noun alone."""
    kind, first, last = fact[0], fact[1], fact[-1]
    if kind == "alone":
        return []
    if kind in ACTIVITIES.values():
        others = [(other, first) for other in ACTIVITIES.values() if other != kind]
        return others + [("alone", first)]
    if kind in COLOURS:
        named = {parse(p)[0] for prompts in read_lists().values() for p in prompts
                 if parse(p)[0] in COLOURS and parse(p)[1] == first}
        named |= {"red", "yellow", "purple"} if len(named) < 3 else set()
        return [(other, first) for other in sorted(named - {kind})] + [("alone", first)]
    swaps = [(r, a, b) for r in ("on", "left", "behind") for a, b in {(first, last), (last, first)}]
    return sorted(f for f in swaps if f != fact) + [("alone", n) for n in sorted({first, last})]


@functools.lru_cache(None)
def facts():
    """Every fact that may be drawn, sorted, and how often each is drawn (sums to one)."""
    told = {parse(p) for prompts in read_lists().values() for p in prompts}
    every = told | {w for fact in told for w in wrong(fact)} | {("alone", n) for n in nouns()}
    every = sorted(every)
    share = {"alone": .34, "dishes": .12, "bike": .12, "chess": .12, **dict.fromkeys(COLOURS, .015)}
    kinds = [fact[0] for fact in every]
    odds = np.array([share.get(kind, .06) / kinds.count(kind) for kind in kinds])
    return every, odds / odds.sum()


def draw_batch(rng, count):
    """Random pictures -> (count, 64, 64, 3) uint8, with the index of fact and of style of each."""
    every, odds = facts()
    fact, style = rng.choice(len(every), count, p=odds), rng.integers(0, len(STYLES), count)
    pictures = [draw_fact(every[f], STYLES[s], rng) for f, s in zip(fact, style)]
    return np.stack(pictures), fact, style


@functools.lru_cache(None)
def captions():
    """Every caption that a part learns: the six lists and the single nouns, in a fixed order."""
    prompts = [p for group in read_lists().values() for p in group] + noun_prompts()
    return list(dict.fromkeys(prompts))


def style_prompts(prompt):
    """A prompt with the name of each style: what CLIP is asked to tell a picture's style."""
    return [f"{prompt}, {style} style" for style in STYLES]


@functools.lru_cache(None)
def tellings():
    """For every fact the captions that tell it; one made up where no list has any."""
    out = [[] for _ in facts()[0]]
    index = {fact: k for k, fact in enumerate(facts()[0])}
    for caption in captions():
        out[index[parse(caption)]].append(caption)
    middle = {"on": "on", "behind": "behind", "left": "on the left of"}
    activity = {v: k for k, v in ACTIVITIES.items()}
    for told, (kind, *rest) in zip(out, facts()[0]):
        if not told and kind in middle:
            told.append(f"{rest[0]} {middle[kind]} {rest[1]}")
        elif not told and kind in activity:
            told.append(f"a {rest[0]} {activity[kind]}")
        elif not told:
            told.append(f"{kind} {rest[0]}")
    return out
