"""Cut-out pictures from a folder: `X.png` with a caption in the first line of `X.txt` ("A red apple.")."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from cacr_uniter.data.scenes.statements import Item
from cacr_uniter.errors import UserError

_CAPTION = re.compile(r"(?:an?|the)\s+([A-Za-z][a-z'-]*(?:\s[a-z'-]+){0,2})\.?", re.IGNORECASE)

MIN_PIXELS = 60
"""Pictures whose longer side is shorter than this are left out."""

MAX_ASPECT = 4
"""Longer pictures than this, in either direction, fit no place."""

MIN_CLEAR, MIN_SOLID = 0.03, 0.15
"""Least share of clear and of solid pixels: what is not cut out, or hardly there, cannot be composed."""


class Sprites:
    """Every usable cut-out under a folder, by noun; pictures with the same caption are variants of one noun.

    Of nouns that end in the same word ("a penguin", "a little penguin") one is kept: a picture of either fits both.

    Args:
        folder: searched with its sub-folders, in sorted order (so a data set depends only on the folder's content).
        count: keep this many nouns, chosen with `rng`.

    Raises:
        UserError: the folder does not exist, or holds fewer than four usable nouns.
    """

    def __init__(self, folder: Path, count: int | None, rng: np.random.Generator) -> None:
        if not folder.is_dir():
            raise UserError(f"--sprites: {folder} is no folder; give one with cut-out X.png and X.txt files.")
        found: dict[str, list[Path]] = defaultdict(list)
        for picture in sorted(folder.rglob("*.png")):
            noun = caption_noun(picture.with_suffix(".txt"))
            if noun is not None:
                found[noun].append(picture)
        usable: dict[str, list[Path]] = {}
        heads: set[str] = set()
        for noun in (str(n) for n in rng.permutation(sorted(found))):
            if len(usable) == count:
                break
            head = noun.split()[-1]
            if head in heads or len(head) < 3:
                continue
            if pictures := [p for p in found[noun] if _cut_out(p) is not None]:
                usable[noun] = pictures
                heads.add(head)
        if len(usable) < max(4, count or 0):
            raise UserError(
                f"--sprites: {folder} holds {len(usable)} usable cut-outs, {max(4, count or 0)} are needed: PNG files "
                f"with an alpha channel, at least {MIN_PIXELS} pixels long, and beside each X.txt with a line like "
                '"A red apple."'
            )
        self._pictures = dict(sorted(usable.items()))
        self.nouns: tuple[str, ...] = tuple(self._pictures)
        self.looks: dict[str, tuple[str, ...]] = {}

    def variants(self, noun: str) -> int:
        return len(self._pictures[noun])

    def aspect(self, noun: str, variant: int) -> float:
        width, height = self._picture(noun, variant).size
        return width / height

    def draw(self, item: Item, rng: np.random.Generator) -> Image.Image:
        size = (item.box.x2 - item.box.x1, item.box.y2 - item.box.y1)
        return self._picture(item.noun, item.variant).resize(size, Image.Resampling.LANCZOS)

    def _picture(self, noun: str, variant: int) -> Image.Image:
        picture = _cut_out(self._pictures[noun][variant])
        if picture is None:
            raise UserError(f"--sprites: {self._pictures[noun][variant]} changed while it was being used.")
        return picture


def caption_noun(path: Path) -> str | None:
    """The noun phrase of a caption file, lower case and without its article; None unless it is a short English one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    match = _CAPTION.fullmatch(lines[0].strip()) if lines else None
    return match.group(1).lower() if match else None


@lru_cache(maxsize=512)
def _cut_out(path: Path) -> Image.Image | None:
    """The picture cropped to its solid part, at most 256 pixels; None if it cannot be composed."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    box = picture.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    solid = float((np.asarray(picture.getchannel("A")) > 127).mean())
    if (
        max(picture.size) < MIN_PIXELS
        or not MIN_SOLID <= solid <= 1 - MIN_CLEAR
        or max(picture.size) > 4 * min(picture.size)
    ):
        return None
    picture.thumbnail((256, 256), Image.Resampling.LANCZOS)
    return picture
