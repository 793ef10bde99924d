"""The tiny model's world: what it can draw, and which pictures its captions come with.

A picture of "a cat washing dishes" shows the cat, and it tells the activity three
times: by a big thing (the plate), a small one (a cup) and a tiny mark (a drop). "Red
apple" has a big, a small and a tiny apple; "dog on boat" has the two nouns, a sign and
a tiny mark that show their relation. A picture is right when all three cues are. In the
pictures that the model learns from each cue is often wrong, a little less often in one
style, on one ground, on one side and at one size. The big cue is decided early in the
denoising, the small one in the middle, the tiny one late.

A *style* is an openly licensed icon set (sprites.png, ATTRIBUTION.md). A *fact* is what
a prompt tells: ("alone", noun), ("dishes" | "bike" | "chess", animal), (colour, fruit),
or (relation, a, b) with the relations on, left and behind. A *scene* is all that a
picture shows. Every prompt of the paper's six lists and every single noun ("a cat") can
be drawn, 64x64; all else is a ValueError.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from tiny.sprites import COLOURS, HOME, STYLES, SURFACES, nouns, resized

PROMPTS = HOME.parent / "prompts.txt"


# ---------------------------------------------------------------- prompt files


def read_lists(path=PROMPTS):
    """A prompt file -> {section: [prompt, ...]}, in the file's order.

    One prompt a line, UTF-8, a byte-order mark is allowed. A line [name] opens a
    section; prompts before the first are in section "". Blank lines, lines that start
    with # and sections without prompts do not count. White space of any kind is one
    space. Raises OSError and UnicodeDecodeError.
    """
    lists, section = {}, ""
    for line in Path(path).read_text(encoding="utf-8-sig").splitlines():
        line = " ".join(line.split())
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif line and not line.startswith("#"):
            lists.setdefault(section, []).append(line)
    return lists


# ---------------------------------------------------------------- prompt -> fact -> picture

ACTIVITIES = {"dishes": "washing dishes", "bike": "riding a bike", "chess": "playing chess"}
RELATIONS = {  # True: the two nouns swap
    " on the left of ": ("left", False),
    " on the right of ": ("left", True),
    " in the front of ": ("behind", True),
    " behind ": ("behind", False),
    " under ": ("on", True),
    " on ": ("on", False),
}
WORN = {"glasses": 27, "shirt": 48, "jacket": 48, "watch": 46, "cup": 36}  # height on a body
PLAIN = (
    (246, 196, 196), (190, 222, 248), (196, 232, 196),
    (250, 232, 170), (216, 200, 244), (196, 202, 210),
)  # fmt: skip
BIG_THINGS = {"dishes": "plate", "bike": "bicycle", "chess": "pawn"}
SMALL_THINGS = {"dishes": "cup", "bike": "cone", "chess": "watch"}
RELATION_KINDS = ("on", "left", "behind")
KINDS = (*ACTIVITIES, *COLOURS, *RELATION_KINDS)
GROUNDS = ("plain", "gradient", "scene")
SIDES = ("left", "right")  # where the small cue stands
SIZES = ("large", "small")  # of the nouns
TRAITS = STYLES, GROUNDS, SIDES, SIZES  # what the last four entries of a Scene may be


class Scene(NamedTuple):
    """What one picture shows; `small` and `tiny` are the kinds (KINDS) that those cues tell.

    A fact of a noun alone has no such cues: None.
    """

    fact: tuple
    small: str | None
    tiny: str | None
    style: str
    ground: str
    side: str
    size: str


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
            # Mirrored prompts are one fact
            return (relation, b, a) if swap else (relation, a, b)
    if bare in known:
        return "alone", bare
    colour, _, noun = text.partition(" ")
    if colour in COLOURS and noun in known:
        return colour, noun
    raise ValueError(f"the tiny world cannot draw {prompt!r}: see prompts.txt for what it knows")


def layout(fact):
    """The nouns and the big cue, back to front: [(noun, colour or None, x, y, width, height)]."""
    kind, first, last = fact[0], fact[1], fact[-1]
    if kind == "alone":
        return [(first, None, 32, 32, 44, 44)]
    if kind in COLOURS:
        return [(first, kind, 32, 32, 42, 42)]
    if kind in ACTIVITIES:  # the animal stays where it is, whatever it does
        return [(first, None, 32, 20, 36, 36), (BIG_THINGS[kind], None, 32, 46, 46, 35)]
    wide_a, wide_b = first in SURFACES, last in SURFACES
    if kind == "left":
        size = (32, 44) if wide_a else (30, 30)
        other = (32, 44) if wide_b else (30, 30)
        return [(first, None, 16, 34, *size), (last, None, 48, 34, *other)]
    if kind == "behind":
        if wide_b:
            return [(first, None, 32, 24, 40, 40), (last, None, 32, 52, 64, 24)]
        return [(first, None, 23, 21, 36, 36), (last, None, 41, 43, 36, 36)]
    if first in WORN and last in ("person", "face", "shirt"):
        return [(last, None, 32, 31, 50, 50), (first, None, 32, WORN[first], 26, 26)]
    below = (last, None, 32, 51, 64, 26) if wide_b else (last, None, 32, 47, 32, 32)
    above = (first, None, 32, 13, 64, 26) if wide_a else (first, None, 32, 19, 32, 32)
    return [below, above]


@functools.lru_cache(None)
def mark(kind, side, framed):
    """A sign of `side` pixels: an activity's mark, or two discs as a relation puts them."""
    big = Image.new("RGBA", (96, 96))
    pen = ImageDraw.Draw(big)
    if kind == "dishes":  # a drop
        pen.polygon([(48, 0), (88, 58), (8, 58)], (20, 110, 230))
        pen.ellipse((6, 14, 90, 96), (20, 110, 230))
    if kind == "bike":  # a flag
        pen.polygon([(6, 0), (96, 44), (6, 88)], (235, 50, 30))
        pen.rectangle((0, 0, 16, 96), (90, 40, 20))
    if kind == "chess":  # a square of the board
        pen.rectangle((0, 0, 95, 95), (20, 20, 20))
    if kind in RELATION_KINDS:
        low, high = (22, 74) if framed else (24, 72)
        discs = {"left": (low, 48, high, 48), "on": (48, low, 48, high)}
        x, y, x2, y2 = discs.get(kind, (34, 34, 62, 62))
        r = 19 if framed else 23
        if framed:
            pen.rounded_rectangle((1, 1, 94, 94), 16, (255, 255, 255), (60, 60, 70), 9)
        pen.ellipse((x - r, y - r, x + r, y + r), (225, 40, 40))
        pen.ellipse((x2 - r, y2 - r, x2 + r, y2 + r), (40, 80, 220))
    return big.resize((side, side), Image.LANCZOS)


# Pixels of the small and the tiny cue by template: they set when a cue is decided
SMALL, TINY = {"1": 12, "2": 13, "3": 12}, {"1": 4, "2": 5, "3": 7}


def cue(fact, kind, style, tiny):
    """The RGBA picture of a small or tiny cue beside this fact."""
    template = template_of(fact)
    side = TINY[template] if tiny else SMALL[template]
    if template == "2":
        return resized(fact[1], style, kind, side, side)
    if template == "1" and not tiny:
        return resized(SMALL_THINGS[kind], style, None, side, side)
    return mark(kind, side, framed=not tiny)


def background(ground, rng):
    """(64, 64, 3) uint8: plain, gradient or scene."""
    first, second = (np.float32(PLAIN[k]) for k in rng.choice(len(PLAIN), 2, replace=False))
    blank = np.zeros((64, 64, 3), np.float32)
    down = np.linspace(0, 1, 64, dtype=np.float32)[:, None, None]
    if ground == "plain":
        out = blank + first
    elif ground == "gradient":  # darker than the plain ones, or nobody could tell them apart
        out = blank + first - 60 + (second - (first - 60)) * down
    else:
        sky = np.float32((150, 205, 245)) + np.float32((90, 45, 5)) * down
        grass = np.float32((150, 200, 120)) - 30 * down
        out = blank + np.where(down < 0.62, sky, grass)
    return np.clip(out, 0, 255).astype(np.uint8)


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
    if scene.small:
        places = (55, 9), (8, 56)  # the upper right and the lower left corner
        right, left = places if scene.side == "right" else places[::-1]
        put(canvas, cue(scene.fact, scene.small, scene.style, False), *right)
        put(canvas, cue(scene.fact, scene.tiny, scene.style, True), *left)
    return np.asarray(canvas.convert("RGB"))


def put(canvas, icon, x, y):
    """Paste an icon with its middle at x, y."""
    layer = Image.new("RGBA", canvas.size)
    layer.paste(icon, (round(x - icon.width / 2), round(y - icon.height / 2)))
    canvas.alpha_composite(layer)


def right_scene(fact, style, rng):
    """A scene in which every cue tells the fact; the rest is drawn at random."""
    kind = None if fact[0] == "alone" else fact[0]
    return Scene(fact, kind, kind, style, *(str(rng.choice(values)) for values in TRAITS[1:]))


def draw(prompt, style, rng):
    """Draw a prompt of the six lists or a single noun -> (64, 64, 3) uint8."""
    return draw_scene(right_scene(parse(prompt), style, rng), rng)


# ---------------------------------------------------------------- what training sees


@functools.lru_cache(None)
def listed_facts():
    """The facts that the prompts of the six lists tell."""
    return {parse(p) for prompts in read_lists().values() for p in prompts}


@functools.lru_cache(None)
def fruit_colours(noun):
    """The colours that a fruit is drawn in: those of its prompts, at least three."""
    named = {f[0] for f in listed_facts() if f[0] in COLOURS and f[1] == noun}
    for more in ("yellow", "purple", "red"):
        if len(named) < 3:
            named.add(more)
    return sorted(named)


def cue_kinds(fact):
    """The kinds that a small or tiny cue beside this fact may tell."""
    if fact[0] in ACTIVITIES:
        return list(ACTIVITIES)
    if fact[0] in COLOURS:
        return fruit_colours(fact[1])
    return list(RELATION_KINDS) if fact[0] in RELATION_KINDS else [None]


@functools.lru_cache(None)
def rivals(fact):
    """What the big cue may show instead: another activity, colour or relation."""
    if fact[0] == "alone":
        return []
    sides = {fact[1:], fact[:0:-1]}  # of a relation the nouns may swap, too
    others = {(kind, *side) for kind in cue_kinds(fact) for side in sides}
    return sorted(others - {fact})


@functools.lru_cache(None)
def facts():
    """Every fact that may be drawn, sorted: the lists', their rivals, each noun alone."""
    every = listed_facts() | {("alone", n) for n in nouns()}
    return sorted(every | {r for fact in listed_facts() for r in rivals(fact)})


def template_of(fact):
    """The template of the paper, "1" to "3", that tells such a fact; None for a noun alone."""
    if fact[0] == "alone":
        return None
    if fact[0] in ACTIVITIES:
        return "1"
    return "2" if fact[0] in COLOURS else "3"


# How often the cache has a noun alone, and a fact of each template
SHARES = {None: 0.25, "1": 0.36, "2": 0.18, "3": 0.21}


def random_scenes(rng, count):
    """Scenes whose cues are drawn evenly and apart from one another."""
    templates = [template_of(fact) for fact in facts()]
    odds = np.array([SHARES[t] / templates.count(t) for t in templates])
    picked = rng.choice(len(odds), count, p=odds / odds.sum())
    return [scene_of(facts()[k], rng) for k in picked]


def scene_of(fact, rng):
    """A scene of this fact; all else is drawn evenly."""
    choices = cue_kinds(fact), cue_kinds(fact), *TRAITS
    return Scene(fact, *(values[rng.integers(len(values))] for values in choices))


def to_tensor(pictures):
    """(B, 64, 64, 3) uint8 array -> (B, 3, 64, 64) float tensor in [-1, 1], channels last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def noun_prompts():
    """The prompts of single nouns: "a " before each, as the paper spells "a ant"."""
    return [f"a {noun}" for noun in nouns()]


@functools.lru_cache(None)
def captions():
    """Every caption that is learnt: the six lists and the single nouns, in this order."""
    prompts = [p for group in read_lists().values() for p in group]
    return list(dict.fromkeys(prompts + noun_prompts()))


def style_prompts(prompt):
    """A prompt with the name of each style: what CLIP is asked to tell a picture's style."""
    return [f"{prompt}, {style} style" for style in STYLES]
