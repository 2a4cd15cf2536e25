"""Things in a scene, what a caption says of two of them, and whether it is true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cacr_uniter.data.scenes.relations import RELATIONS, Box, size_word, verdict

ATTRIBUTES = ("size", "pattern", "colour")
"""Attribute names, in the order in which English puts them before the noun."""

Combination = tuple[frozenset[str], str]
"""Two nouns (one if both are the same) and an axis or attribute name: what is trained, or held out, together."""


@dataclass(frozen=True)
class Item:
    """One thing in a scene. `look` holds the attributes of drawn shapes; `variant` tells apart pictures of a noun."""

    noun: str
    box: Box
    look: dict[str, str] = field(default_factory=dict)
    variant: int = 0


@dataclass(frozen=True)
class Scene:
    """A square picture: its side in pixels and its items, in painting order."""

    size: int
    items: tuple[Item, ...]

    def attribute(self, item: Item, name: str) -> str | None:
        return size_word(item.box, self.size) if name == "size" else item.look.get(name)


@dataclass(frozen=True)
class Mention:
    """How a caption names a thing: a noun and some attributes."""

    noun: str
    attributes: tuple[tuple[str, str], ...] = ()

    def phrase(self) -> str:
        given = dict(self.attributes)
        words = [given[name] for name in ATTRIBUTES if name in given] + [self.noun]
        article = "an" if words[0][0].lower() in "aeiou" else "a"
        return " ".join([article, *words])

    def fits(self, item: Item, scene: Scene) -> bool | None:
        """Whether `item` can be called so; None if only its size, neither small nor big, leaves it open."""
        if item.noun != self.noun:
            return False
        seen = [(scene.attribute(item, name), value) for name, value in self.attributes]
        if any(has is not None and has != value for has, value in seen):
            return False
        return None if any(has is None for has, _ in seen) else True

    def with_attribute(self, name: str, value: str) -> Mention:
        return Mention(self.noun, tuple((n, value if n == name else v) for n, v in self.attributes))


@dataclass(frozen=True)
class Statement:
    """A relation of two things ("a star above a circle") or one attribute of each ("a big star and a small circle").

    Exactly one of `relation` and `attribute` is given.
    """

    first: Mention
    second: Mention
    relation: str | None = None
    attribute: str | None = None

    @property
    def tag(self) -> str:
        return self.relation or f"{self.attribute} swap"

    @property
    def axis(self) -> str:
        return RELATIONS[self.relation].axis if self.relation else str(self.attribute)

    def caption(self) -> str:
        return f"{self.first.phrase()} {self.relation or 'and'} {self.second.phrase()}"

    def swapped(self) -> Statement:
        """The statement with the same words and the other meaning: the two things, or their attributes, exchanged."""
        if self.attribute is None:
            return Statement(self.second, self.first, self.relation)
        name = self.attribute
        one, two = dict(self.first.attributes)[name], dict(self.second.attributes)[name]
        return Statement(self.first.with_attribute(name, two), self.second.with_attribute(name, one), None, name)

    def combinations(self) -> set[Combination]:
        """Every (pair of nouns, axis) that the caption binds together; attributes bind when both things have one."""
        nouns = frozenset((self.first.noun, self.second.noun))
        both = dict(self.first.attributes).keys() & dict(self.second.attributes).keys()
        return {(nouns, name) for name in both} | {(nouns, self.axis)}

    def holds(self, scene: Scene) -> bool | None:
        """True if some two things fit, False if clearly none do, None if the picture leaves it open."""
        verdicts = set(self._verdicts(scene))
        return True if True in verdicts else None if None in verdicts else False

    def _verdicts(self, scene: Scene) -> Iterator[bool | None]:
        for a in scene.items:
            for b in scene.items:
                fits = (self.first.fits(a, scene), self.second.fits(b, scene))
                if a is b or False in fits:
                    continue
                related = True if self.relation is None else verdict(self.relation, a.box, b.box, scene.size)
                yield related if None not in fits or related is False else None
