"""What a scene can be made of: nouns, how each may look, and its picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from cacr_uniter.data.scenes.statements import Item


class Catalogue(Protocol):
    """A source of things. Drawing is a pure function of the item and the random generator handed in."""

    @property
    def nouns(self) -> tuple[str, ...]:
        """The nouns, each of which a scene holds at most once unless looks tell two of them apart."""
        ...

    @property
    def looks(self) -> dict[str, tuple[str, ...]]:
        """Attribute name to its values, for attributes that the catalogue can choose ("colour", "pattern")."""
        ...

    def variants(self, noun: str) -> int:
        """How many pictures the noun has."""
        ...

    def aspect(self, noun: str, variant: int) -> float:
        """Width over height of the picture."""
        ...

    def draw(self, item: Item, rng: np.random.Generator) -> Image:
        """RGBA picture of exactly the item's box, transparent outside the thing."""
        ...
