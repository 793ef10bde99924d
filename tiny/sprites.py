"""The icons: every noun in three styles, openly licensed (ATTRIBUTION.md), on one sheet.

`python tiny/build.py --sprites` renders sprites.png and sprites.json from the icon sets
and from icons.json. Line drawings, as a fourth style, do not survive an autoencoder
that compresses 12 times.
"""

import functools
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

HOME = Path(__file__).resolve().parent
STYLES = ("noto", "twemoji", "fluent")
PACKAGES = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat"}
CELL, COLUMNS = 48, 24  # of the sheet of sprites: a sprite's side, sprites a row

COLOURS = {
    "red": (226, 40, 44), "green": (72, 165, 62), "yellow": (252, 208, 44),
    "brown": (134, 82, 44), "orange": (252, 138, 28), "purple": (132, 66, 178),
    "blue": (52, 100, 222), "pink": (252, 132, 172), "white": (244, 244, 244),
    "black": (44, 44, 50),
}  # fmt: skip
SURFACES = ("sky", "street", "road", "grass")  # stretched over the whole width

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
