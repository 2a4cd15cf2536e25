"""Drawn shapes in colours and patterns: the catalogue that needs nothing but Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from cacr_uniter.data.scenes.statements import Item

OVERSAMPLING = 3
"""Shapes are drawn this many times larger and averaged down, for smooth edges."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 38, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 205),
    "yellow": (240, 208, 40),
    "purple": (128, 48, 160),
    "orange": (240, 132, 32),
    "black": (28, 28, 32),
    "white": (250, 250, 250),
}
PATTERNS = ("plain", "striped", "dotted", "checked")

Point = tuple[float, float]


def _around(count: int, radii: tuple[float, ...], start: float = -math.pi / 2) -> list[Point]:
    """`count` points around the centre of the unit square, at the radii in turn."""
    angles = [start + 2 * math.pi * i / count for i in range(count)]
    return [
        (0.5 + radii[i % len(radii)] * math.cos(a), 0.5 + radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


def _heart() -> list[Point]:
    ts = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    xs = 16 * np.sin(ts) ** 3
    ys = -(13 * np.cos(ts) - 5 * np.cos(2 * ts) - 2 * np.cos(3 * ts) - np.cos(4 * ts))
    return [((x + 16) / 32, (y + 12) / 29) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]


_POLYGONS: dict[str, Callable[[], list[Point]]] = {
    "square": lambda: [(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)],
    "triangle": lambda: [(0.5, 0.0), (1.0, 0.95), (0.0, 0.95)],
    "star": lambda: _around(10, (0.52, 0.22)),
    "heart": _heart,
    "cross": lambda: [
        (0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67),
        (0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33),
    ],
    "diamond": lambda: [(0.5, 0.0), (0.85, 0.5), (0.5, 1.0), (0.15, 0.5)],
    "arrow": lambda: [(0, 0.32), (0.55, 0.32), (0.55, 0.05), (1, 0.5), (0.55, 0.95), (0.55, 0.68), (0, 0.68)],
    "hexagon": lambda: _around(6, (0.5,), 0.0),
}  # fmt: skip
_ROUND: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "circle": ((0.0, 0.0, 1.0, 1.0),),
    "oval": ((0.0, 0.22, 1.0, 0.78),),
    "ring": ((0.0, 0.0, 1.0, 1.0), (0.27, 0.27, 0.73, 0.73)),
    "moon": ((0.0, 0.0, 1.0, 1.0), (0.38, 0.08, 1.22, 0.92)),
}

NOUNS = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "cross",
    "diamond",
    "moon",
    "arrow",
    "hexagon",
    "oval",
    "ring",
)


class Shapes:
    """The first `count` of twelve shapes, in eight colours and four patterns (or the attributes asked for)."""

    def __init__(self, count: int | None = None, attributes: tuple[str, ...] = ("colour", "pattern")) -> None:
        self.nouns: tuple[str, ...] = NOUNS[:count]
        known = {"colour": tuple(COLOURS), "pattern": PATTERNS}
        self.looks: dict[str, tuple[str, ...]] = {name: known[name] for name in attributes if name in known}

    def variants(self, noun: str) -> int:
        return 1

    def aspect(self, noun: str, variant: int) -> float:
        return 1.0

    def draw(self, item: Item, rng: np.random.Generator) -> Image.Image:
        width, height = item.box.x2 - item.box.x1, item.box.y2 - item.box.y1
        size = (width * OVERSAMPLING, height * OVERSAMPLING)
        base = np.array(COLOURS[item.look.get("colour") or str(rng.choice(list(COLOURS)))])
        colour = tuple(int(c) for c in np.clip(base + rng.integers(-14, 15, 3), 0, 255))
        picture = _patterned(size, colour, item.look.get("pattern", "plain"))
        picture.putalpha(_outline(item.noun, size))
        return picture.resize((width, height), Image.Resampling.BOX)


def _outline(noun: str, size: tuple[int, int]) -> Image.Image:
    """The mask of a shape: 255 inside, 0 outside."""
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    if noun in _ROUND:
        for fill, (x1, y1, x2, y2) in zip((255, 0), _ROUND[noun], strict=False):
            pen.ellipse((x1 * size[0], y1 * size[1], x2 * size[0] - 1, y2 * size[1] - 1), fill=fill)
    else:
        pen.polygon([(x * (size[0] - 1), y * (size[1] - 1)) for x, y in _POLYGONS[noun]()], fill=255)
    return mask


def _patterned(size: tuple[int, int], colour: tuple[int, ...], pattern: str) -> Image.Image:
    """A filled rectangle; the pattern is drawn in a lighter tone on dark colours and a darker one on light ones."""
    picture = Image.new("RGB", size, colour)
    if pattern == "plain":
        return picture
    light = sum(colour) > 480
    tone = tuple(int(c * 0.45) if light else int(255 - (255 - c) * 0.4) for c in colour)
    pen = ImageDraw.Draw(picture)
    step = max(size) / 5
    cells = range(6)
    if pattern == "striped":
        for i in cells:
            pen.rectangle((0, i * step, size[0], i * step + step / 2), fill=tone)
    elif pattern == "dotted":
        for i in cells:
            for j in cells:
                x, y = i * step, j * step
                pen.ellipse((x + step * 0.2, y + step * 0.2, x + step * 0.8, y + step * 0.8), fill=tone)
    else:
        for i in cells:
            for j in range(i % 2, 6, 2):
                pen.rectangle((i * step, j * step, (i + 1) * step, (j + 1) * step), fill=tone)
    return picture
