"""The words of the tiny model's world, and what its prompts tell.

A prompt tells a *fact*: ("alone", noun), ("dishes" | "bike" | "chess", animal), (colour,
fruit), or (relation, a, b) with the relations on, left and behind. The first word is
the fact's kind; a picture shows it by a big, a small and a tiny cue (README.md). Every
prompt of the paper's six lists tells one, and every single noun ("a cat"); all else is a
ValueError. How a fact looks stands in `build/scenes.py`.
"""

import json
from pathlib import Path

HOME = Path(__file__).resolve().parent
NOUNS = json.loads((HOME / "sprites.json").read_text())["nouns"]  # sorted
STYLES = ("noto", "twemoji", "fluent")  # three sets of icons: ATTRIBUTION.md
COLOURS = {
    "red": (226, 40, 44), "green": (72, 165, 62), "yellow": (252, 208, 44),
    "brown": (134, 82, 44), "orange": (252, 138, 28), "purple": (132, 66, 178),
    "blue": (52, 100, 222), "pink": (252, 132, 172), "white": (244, 244, 244),
    "black": (44, 44, 50),
}  # fmt: skip
ACTIVITIES = {"dishes": "washing dishes", "bike": "riding a bike", "chess": "playing chess"}
RELATIONS = {  # True: the two nouns swap
    " on the left of ": ("left", False), " on the right of ": ("left", True),
    " in the front of ": ("behind", True), " behind ": ("behind", False),
    " under ": ("on", True), " on ": ("on", False),
}  # fmt: skip
RELATION_KINDS = ("on", "left", "behind")
KINDS = (*ACTIVITIES, *COLOURS, *RELATION_KINDS)
GROUNDS = ("plain", "gradient", "scene")
SIDES = ("left", "right")  # where the small cue stands
SIZES = ("large", "small")  # of the nouns


def parse(prompt):
    """The fact that a prompt tells; ValueError where the world has no such thing."""
    text = prompt.strip()
    bare = text.removeprefix("a ")
    for activity, ending in ACTIVITIES.items():
        noun = bare.removesuffix(" " + ending)
        if noun != bare and noun in NOUNS:
            return activity, noun
    for words, (relation, swap) in RELATIONS.items():
        a, _, b = text.partition(words)
        if a in NOUNS and b in NOUNS:
            # "person on sofa" and "sofa under person" are one fact
            return (relation, b, a) if swap else (relation, a, b)
    if bare in NOUNS:
        return "alone", bare
    colour, _, noun = text.partition(" ")
    if colour in COLOURS and noun in NOUNS:
        return colour, noun
    raise ValueError(f"the tiny world cannot draw {prompt!r}: see prompts.txt for what it knows")
