"""What can be true between two things in a picture, and when it is clearly true.

Every relation has an inverse (`a left of b` is `b right of a`) and belongs to an axis. A relation is *true*, *false*
or *unclear* of two boxes; an unclear one is never written into a caption and never tested.
"""

from __future__ import annotations

from dataclasses import dataclass

HORIZONTAL, VERTICAL, CONTAINMENT, SIZE = "horizontal", "vertical", "containment", "size"

APART = 0.12
"""Least distance of two centres along an axis, as a share of the image's side, for "left of" and its like."""

SIZE_RATIO = 1.4
"""Least ratio of the longer sides for "bigger than"."""

SMALL, BIG = 0.22, 0.34
"""A thing is "small" up to, and "big" from this share of the image's side (its longer side); otherwise unnamed."""


@dataclass(frozen=True)
class Box:
    """A box in pixels: left, top, right, bottom (right and bottom exclusive)."""

    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2

    @property
    def side(self) -> int:
        return max(self.x2 - self.x1, self.y2 - self.y1)

    def contains(self, other: Box) -> bool:
        return self.x1 < other.x1 and self.y1 < other.y1 and other.x2 < self.x2 and other.y2 < self.y2

    def overlaps(self, other: Box, gap: int = 0) -> bool:
        return not (
            self.x2 + gap <= other.x1
            or other.x2 + gap <= self.x1
            or self.y2 + gap <= other.y1
            or other.y2 + gap <= self.y1
        )


@dataclass(frozen=True)
class Relation:
    """`first PHRASE second`, with the axis it belongs to and the phrase of its inverse."""

    phrase: str
    axis: str
    inverse: str


RELATIONS: dict[str, Relation] = {
    r.phrase: r
    for r in (
        Relation("left of", HORIZONTAL, "right of"),
        Relation("right of", HORIZONTAL, "left of"),
        Relation("above", VERTICAL, "below"),
        Relation("below", VERTICAL, "above"),
        Relation("inside", CONTAINMENT, "around"),
        Relation("around", CONTAINMENT, "inside"),
        Relation("bigger than", SIZE, "smaller than"),
        Relation("smaller than", SIZE, "bigger than"),
    )
}


def is_true(phrase: str, a: Box, b: Box, image_size: int) -> bool:
    """Whether `a PHRASE b` is clearly true of two boxes in a square image of `image_size` pixels."""
    if phrase in ("right of", "below", "around", "smaller than"):
        return is_true(RELATIONS[phrase].inverse, b, a, image_size)
    if phrase == "inside":
        return b.contains(a)
    if phrase == "bigger than":
        return a.side >= SIZE_RATIO * b.side
    along = 0 if phrase == "left of" else 1
    return b.centre[along] - a.centre[along] >= APART * image_size


def verdict(phrase: str, a: Box, b: Box, image_size: int) -> bool | None:
    """True or False when `a PHRASE b` or its inverse is clearly true; None when neither is."""
    if is_true(phrase, a, b, image_size):
        return True
    return False if is_true(RELATIONS[phrase].inverse, a, b, image_size) else None


def size_word(box: Box, image_size: int) -> str | None:
    """ "small", "big", or None for a thing between the two."""
    share = box.side / image_size
    return "small" if share <= SMALL else "big" if share >= BIG else None
