"""Places in a square picture: two for the things a caption is about, the rest for distractors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacr_uniter.data.scenes.relations import (
    APART,
    BIG,
    CONTAINMENT,
    HORIZONTAL,
    RELATIONS,
    SIZE,
    SIZE_RATIO,
    SMALL,
    VERTICAL,
    Box,
)

TRIES = 60
"""Positions tried for one place before the whole layout is drawn again."""


@dataclass(frozen=True)
class Place:
    """A square place: its centre and side as shares of the picture's side."""

    x: float
    y: float
    side: float

    def box(self, aspect: float, image_size: int) -> Box:
        """The largest box of this width-to-height ratio around the centre, in pixels, at least 4 on each side."""
        width, height = self.side * min(1.0, aspect), self.side * min(1.0, 1 / aspect)
        w, h = max(4, round(width * image_size)), max(4, round(height * image_size))
        x1 = min(max(0, round((self.x * image_size) - w / 2)), image_size - w)
        y1 = min(max(0, round((self.y * image_size) - h / 2)), image_size - h)
        return Box(x1, y1, x1 + w, y1 + h)


def draw_places(count: int, relation: str | None, attribute: str | None, rng: np.random.Generator) -> list[Place]:
    """`count` places that do not overlap, of which the first two stand in `relation` (one lies in the other for
    "inside" and "around") or, for the attribute "size", are one big and one small.
    """
    while True:
        places = _first_two(relation, attribute, rng)
        while len(places) < count:
            place = _free_place(places, rng)
            if place is None:
                break
            places.append(place)
        else:
            return places


def _first_two(relation: str | None, attribute: str | None, rng: np.random.Generator) -> list[Place]:
    axis = RELATIONS[relation].axis if relation else attribute
    if axis == CONTAINMENT:
        outer = _somewhere(rng.uniform(0.48, 0.62), rng)
        side = outer.side * rng.uniform(0.3, 0.42)
        slack = outer.side * 0.04
        inner = Place(outer.x + rng.uniform(-slack, slack), outer.y + rng.uniform(-slack, slack), side)
        pair = [inner, outer]
    elif axis == SIZE:
        large = rng.uniform(BIG + 0.01, 0.46)
        pair = _apart([large, rng.uniform(0.14, min(SMALL - 0.01, large / SIZE_RATIO - 0.01))], None, rng)
        if relation == "smaller than":
            pair.reverse()
        return pair
    else:
        pair = _apart([_side(rng), _side(rng)], axis, rng)
    if relation in ("right of", "below", "around"):
        pair.reverse()
    return pair


def _apart(sides: list[float], axis: str | None, rng: np.random.Generator) -> list[Place]:
    """Two places that do not overlap; for a direction, the first well before the second along it."""
    while True:
        a, b = (_somewhere(side, rng) for side in sides)
        distance = b.x - a.x if axis == HORIZONTAL else b.y - a.y
        if not _overlap(a, b) and (axis not in (HORIZONTAL, VERTICAL) or distance > APART + 0.02):
            return [a, b]


def _free_place(taken: list[Place], rng: np.random.Generator) -> Place | None:
    for _ in range(TRIES):
        place = _somewhere(_side(rng) * 0.85, rng)
        if not any(_overlap(place, other) for other in taken):
            return place
    return None


def _side(rng: np.random.Generator) -> float:
    """A small, middling or big side, so that the three size words are equally common."""
    low, high = ((0.15, SMALL), (SMALL, BIG), (BIG, 0.42))[rng.integers(3)]
    return float(rng.uniform(low, high))


def _somewhere(side: float, rng: np.random.Generator) -> Place:
    margin = side / 2 + 0.01
    return Place(float(rng.uniform(margin, 1 - margin)), float(rng.uniform(margin, 1 - margin)), float(side))


def _overlap(a: Place, b: Place, gap: float = 0.02) -> bool:
    reach = (a.side + b.side) / 2 + gap
    return abs(a.x - b.x) < reach and abs(a.y - b.y) < reach
