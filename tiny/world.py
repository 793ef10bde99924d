"""The tiny model's world: what it can draw, in three styles, and which captions tell of it.

A *style* is an openly licensed icon set (sprites.png, ATTRIBUTION.md). A *fact* is what a
picture shows: ("alone", noun), ("dishes" | "bike" | "chess", animal), (colour, fruit), or
("on" | "left" | "behind", a, b). The prompts of the paper's six lists and of single nouns
("a cat") tell facts that can be drawn, 64x64; all else is a ValueError. Line drawings, as a
fourth style, do not survive an autoencoder that compresses 12 times.
"""

import functools
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HOME = Path(__file__).resolve().parent
PROMPTS = HOME.parent / "prompts.txt"
STYLES = ("noto", "twemoji", "fluent")
PACKAGES = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat"}
CELL, COLUMNS = 48, 24  # of the sheet of sprites: a sprite's side, sprites a row


def read_lists(path=PROMPTS):
    """A prompt file -> {section: [prompt, ...]}, in the file's order.

    One prompt a line, UTF-8, a byte-order mark is allowed. A line [name] opens a section;
    prompts before the first are in section "". Blank lines, lines that start with # and
    sections without prompts do not count. White space of any kind is one space.
    Raises OSError and UnicodeDecodeError.
    """
    lists, section = {}, ""
    for line in Path(path).read_text(encoding="utf-8-sig").splitlines():
        line = " ".join(line.split())
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif line and not line.startswith("#"):
            lists.setdefault(section, []).append(line)
    return lists


# What stands around icons that icons.json draws itself, so that they differ by style too
FRAMES = {
    "noto": '<g stroke="#000" stroke-opacity=".35" stroke-width=".9">%s</g>',
    "twemoji": "%s",
    "fluent": '<filter id="f"><feColorMatrix type="hueRotate" values="14"/>'
    '<feColorMatrix type="saturate" values="1.35"/></filter><g filter="url(#f)">%s</g>',
}
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" xmlns:xlink='
    '"http://www.w3.org/1999/xlink" viewBox="0 0 {side} {side}">{body}</svg>'
)


def sheet_corner(k):
    """Left and top of sprite k in the sheet; k = noun * number of styles + style."""
    return k % COLUMNS * CELL, k // COLUMNS * CELL


def render_sprites(icon_dir):
    """Render every noun in every style into one sheet; needs resvg-py, @iconify-json."""
    import resvg_py

    icons = json.loads((HOME / "icons.json").read_text())
    names = sorted(icons)
    rows = math.ceil(len(names) * len(STYLES) / COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for s, style in enumerate(STYLES):
        data = json.loads((Path(icon_dir) / PACKAGES[style] / "icons.json").read_text())
        for n, name in enumerate(names):
            if icons[name].startswith("<"):
                body, side = FRAMES[style] % icons[name], 36
            else:
                alias = data.get("aliases", {}).get(icons[name], {})
                icon = data["icons"][alias.get("parent", icons[name])]
                body, side = icon["body"], icon.get("width", data.get("width", 16))
            svg = SVG.format(side=side, body=body)
            png = resvg_py.svg_to_bytes(svg_string=svg, width=192, height=192)
            big = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
            solid = big.getchannel("A").point(lambda a: 255 * (a > 8))
            icon = fit(big.crop(solid.getbbox()), CELL, CELL)
            x, y = sheet_corner(n * len(STYLES) + s)
            sheet.paste(icon, (x + (CELL - icon.width) // 2, y + (CELL - icon.height) // 2))
    sheet.save(HOME / "sprites.png", optimize=True)
    (HOME / "sprites.json").write_text(json.dumps({"cell": CELL, "nouns": names}, indent=0))


def fit(icon, width, height):
    """The icon at the largest size that fits into width x height pixels."""
    scale = min(width / icon.width, height / icon.height)
    return icon.resize([max(1, round(v * scale)) for v in icon.size], Image.LANCZOS)


@functools.lru_cache(None)
def nouns():
    """Every noun that has a sprite, sorted."""
    return json.loads((HOME / "sprites.json").read_text())["nouns"]


@functools.lru_cache(None)
def sprites():
    """{(noun, style): RGBA picture, cropped to what is drawn}."""
    sheet, out = Image.open(HOME / "sprites.png").convert("RGBA"), {}
    for k in range(len(nouns()) * len(STYLES)):
        x, y = sheet_corner(k)
        cell = sheet.crop((x, y, x + CELL, y + CELL))
        noun, style = divmod(k, len(STYLES))
        out[nouns()[noun], STYLES[style]] = cell.crop(cell.getbbox())
    return out


ACTIVITIES = dict(dishes="washing dishes", bike="riding a bike", chess="playing chess")
COLOURS = {
    "red": (226, 40, 44), "green": (72, 165, 62), "yellow": (252, 208, 44),
    "brown": (134, 82, 44), "orange": (252, 138, 28), "purple": (132, 66, 178),
    "blue": (52, 100, 222), "pink": (252, 132, 172), "white": (244, 244, 244),
    "black": (44, 44, 50),
}  # fmt: skip
RELATIONS = {  # True: the two nouns swap
    " on the left of ": ("left", False),
    " on the right of ": ("left", True),
    " in the front of ": ("behind", True),
    " behind ": ("behind", False),
    " under ": ("on", True),
    " on ": ("on", False),
}
SURFACES = ("sky", "street", "road", "grass")  # stretched over the whole width
WORN = dict(glasses=27, shirt=48, jacket=48, watch=46, cup=36)  # height on a body
# Colours of plain backgrounds and gradients; odds of a plain one, a gradient and a scene
PLAIN = np.float32([*bytes.fromhex("f6c4c4 bedef8 c4e8c4 fae8aa d8c8f4 c4cad2")]).reshape(6, 3)
BACKGROUND_ODDS = dict.fromkeys(STYLES, (0.1, 0.45, 0.45)) | {"twemoji": (0.8, 0.1, 0.1)}


def parse(prompt):
    """The fact that a prompt tells; ValueError where the world has no such thing."""
    known, text = set(nouns()), prompt.strip()
    bare = text.removeprefix("a ")
    for activity, ending in ACTIVITIES.items():
        noun = bare.removesuffix(" " + ending)
        if noun != bare and noun in known:
            return activity, noun
    for words, (relation, swap) in RELATIONS.items():
        a, _, b = text.partition(words)
        if a in known and b in known:
            # Mirrored prompts are one fact; so two of a kind are one from both sides
            return (relation, b, a) if swap else (relation, a, b)
    if bare in known:
        return "alone", bare
    colour, _, noun = text.partition(" ")
    if colour in COLOURS and noun in known:
        return colour, noun
    raise ValueError(f"the tiny world cannot draw {prompt!r}, only what prompts.txt has")


@functools.lru_cache(None)
def coloured(noun, style, colour):
    """A sprite recoloured: pixels near its main hue get the colour, leaves stay."""
    rgba = np.asarray(sprites()[noun, style]).astype(np.float32)
    rgb, light = rgba[..., :3], rgba[..., :3] @ np.float32((0.3, 0.59, 0.11))
    solid, spread = rgba[..., 3] > 128, rgb.max(-1) - rgb.min(-1)
    hue = np.angle(rgb @ np.exp(2j * np.pi * np.arange(3) / 3))
    votes = np.histogram(hue[solid], 18, (-np.pi, np.pi), weights=spread[solid] + 4)[0]
    votes = votes + np.roll(votes, 1) + np.roll(votes, -1)
    main = -np.pi + (votes.argmax() + 0.5) * np.pi / 9
    near = (np.abs(np.angle(np.exp(1j * (hue - main)))) < 0.85) | (spread < 36)
    shade, target = light / light[near & solid].mean(), np.float32(COLOURS[colour])
    ramp = np.clip(0.35 + 0.65 * shade, 0.4, 1.25)[..., None] * target
    if colour in ("white", "black"):  # keeps the seeds and edges visible
        ramp = target + 110 * (shade[..., None] - 1.0)
    rgba[..., :3] = np.where(near[..., None], np.clip(ramp, 0, 255), rgb)
    return Image.fromarray(rgba.astype(np.uint8))


@functools.lru_cache(None)
def resized(noun, style, colour, width, height):
    """A sprite fitted into width x height, or stretched to it if it is a surface."""
    icon = coloured(noun, style, colour) if colour else sprites()[noun, style]
    if noun in SURFACES and width != height:
        return icon.resize((width, height), Image.LANCZOS)
    return fit(icon, width, height)


def layout(fact):
    """What stands where, back to front: (noun, colour or None, x, y, width, height)."""
    kind, first, last = fact[0], fact[1], fact[-1]
    if kind == "alone" or kind in COLOURS:
        return [(first, kind if kind in COLOURS else None, 32, 32, 44, 44)]
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
    kind = rng.choice(3, p=BACKGROUND_ODDS[style])
    first, second = PLAIN[rng.choice(len(PLAIN), 2, replace=False)]
    blank = np.zeros((64, 64, 3), np.float32)
    down = np.linspace(0, 1, 64, dtype=np.float32)[:, None, None]
    if kind == 0:
        return blank + first
    if kind == 1:  # darker than the plain ones, or nobody could tell them apart
        first = first - 60
        return blank + first + (second - first) * down
    horizon = np.float32(0.62) + 0.02 * rng.integers(-1, 2)
    sky = np.float32((150, 205, 245)) + np.float32((90, 45, 5)) * down
    ground = np.float32((150, 200, 120)) - 30 * down
    return blank + np.where(down < horizon, sky, ground)


def draw_fact(fact, style, rng):
    """Draw a fact in a style -> (64, 64, 3) uint8; rng is a numpy Generator."""
    ground = np.clip(background(style, rng), 0, 255).astype(np.uint8)
    canvas = Image.fromarray(ground).convert("RGBA")
    scale, shift = rng.uniform(0.96, 1.03), rng.integers(-1, 2, 2)
    for noun, colour, x, y, width, height in layout(fact):
        if width == height:
            width = height = round(width * scale)
        icon = resized(noun, style, colour, width, height)
        moved = shift * (icon.width < 64)  # what spans the picture stays where it is
        left = round(x - icon.width / 2) + int(moved[0])
        top = round(y - icon.height / 2) + int(moved[1])
        layer = Image.new("RGBA", (64, 64))
        layer.paste(icon, (left, top))
        canvas = Image.alpha_composite(canvas, layer)
    return np.asarray(canvas.convert("RGB"))


@functools.lru_cache(None)
def listed_facts():
    """The facts that the prompts of the six lists tell."""
    return {parse(p) for prompts in read_lists().values() for p in prompts}


def wrong(fact):
    """What may be drawn instead: another activity, colour, relation, or a noun alone."""
    kind, first, last = fact[0], fact[1], fact[-1]
    if kind == "alone":
        return []
    if kind in ACTIVITIES:
        return [(k, first) for k in ACTIVITIES if k != kind] + [("alone", first)]
    if kind in COLOURS:
        named = {f[0] for f in listed_facts() if f[0] in COLOURS and f[1] == first}
        named |= {"red", "yellow", "purple"} if len(named) < 3 else set()
        return [(other, first) for other in sorted(named - {kind})] + [("alone", first)]
    sides = ((first, last), (last, first))
    others = {(k, *side) for k in ("on", "left", "behind") for side in sides}
    return sorted(others - {fact}) + [("alone", n) for n in sorted({first, last})]


@functools.lru_cache(None)
def facts():
    """Every fact that may be drawn, sorted, and how often each is drawn (sums to one).

    The order is that of the judge's labels: it must not change while tiny/judge/ stays.
    """
    every = listed_facts() | {("alone", n) for n in nouns()}
    every = sorted(every | {w for fact in listed_facts() for w in wrong(fact)})
    share = {"alone": 0.34} | dict.fromkeys(ACTIVITIES, 0.12) | dict.fromkeys(COLOURS, 0.015)
    kinds = [fact[0] for fact in every]
    odds = np.array([share.get(kind, 0.06) / kinds.count(kind) for kind in kinds])
    return every, odds / odds.sum()


@functools.lru_cache(None)
def fact_index():
    """{fact: its place in facts(), which is its label}."""
    return {fact: k for k, fact in enumerate(facts()[0])}


def draw_pairs(pairs, rng):
    """Draw N pairs (fact, style), as indices -> float (N, 3, 64, 64) in [-1, 1]."""
    pictures = [draw_fact(facts()[0][f], STYLES[s], rng) for f, s in pairs]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(rng, count):
    """Random pictures -> float (count, 3, 64, 64) in [-1, 1]."""
    every, odds = facts()
    chosen = rng.choice(len(every), count, p=odds)
    return draw_pairs(zip(chosen, rng.integers(0, len(STYLES), count)), rng)


def noun_prompts():
    """The prompts of single nouns: "a " before each, as the paper spells "a ant"."""
    return [f"a {noun}" for noun in nouns()]


@functools.lru_cache(None)
def captions():
    """Every caption that is learnt: the six lists and the single nouns, in this order."""
    prompts = [p for group in read_lists().values() for p in group]
    return list(dict.fromkeys(prompts + noun_prompts()))


def style_prompts(prompt):
    """A prompt with the name of each style: so CLIP is asked for a picture's style."""
    return [f"{prompt}, {style} style" for style in STYLES]


@functools.lru_cache(None)
def tellings():
    """For every fact the captions that tell it; one made up where no list has any."""
    out = [[] for _ in facts()[0]]
    for caption in captions():
        out[fact_index()[parse(caption)]].append(caption)
    middle = {kind: words for words, (kind, swap) in RELATIONS.items() if not swap}
    for texts, (kind, noun, *rest) in zip(out, facts()[0]):
        made_up = f"{kind} {noun}"
        if kind in ACTIVITIES:
            made_up = f"a {noun} {ACTIVITIES[kind]}"
        elif kind in middle:
            made_up = f"{noun}{middle[kind]}{rest[0]}"
        texts += [] if texts else [made_up]
    return out
