"""Draws contrasts: two scenes and two captions with the same words, each true of one scene and false of the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from cacr_uniter.data.scenes.catalogue import Catalogue
from cacr_uniter.data.scenes.layout import Place, draw_places
from cacr_uniter.data.scenes.relations import RELATIONS, Box
from cacr_uniter.data.scenes.statements import Combination, Item, Mention, Scene, Statement
from cacr_uniter.errors import UserError

DESCRIBE = 0.4
"""Chance that a caption about a relation also names an attribute of both things."""

SAME_NOUN = 0.25
"""Chance that a distractor repeats a named noun in another look, when the caption names looks."""

TRIES = 300

_NOWHERE = Box(0, 0, 1, 1)


@dataclass(frozen=True)
class Contrast:
    """`statements[k]` is true of `scenes[k]` and false of `scenes[1 - k]`; both have the same words."""

    scenes: tuple[Scene, Scene]
    statements: tuple[Statement, Statement]


class Sampler:
    """Draws contrasts and further captions over a catalogue.

    Args:
        relations: relation phrases used, a subset of `RELATIONS`.
        attributes: attribute names that captions name and exchange.
        objects: least and most things in a scene.
        size: side of the pictures in pixels.
        held_out: share of all combinations (two nouns x axis) that training captions never state.
        rng: chooses the held-out combinations.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        relations: tuple[str, ...],
        attributes: tuple[str, ...],
        objects: tuple[int, int],
        size: int,
        held_out: float,
        rng: np.random.Generator,
    ) -> None:
        self.catalogue = catalogue
        self.relations = relations
        self.attributes = tuple(a for a in attributes if a == "size" or a in catalogue.looks)
        self.objects = objects
        self.size = size
        axes = dict.fromkeys([RELATIONS[r].axis for r in relations] + list(self.attributes))
        every = [(frozenset(pair), axis) for pair in combinations(catalogue.nouns, 2) for axis in axes]
        chosen = rng.permutation(len(every))[: round(held_out * len(every))]
        self.held_out: set[Combination] = {every[i] for i in chosen}

    def contrast(self, rng: np.random.Generator, accept: Callable[[Statement], bool]) -> Contrast:
        """One contrast whose statements `accept` takes.

        Raises:
            UserError: none was found in many tries (no combination left that `accept` takes).
        """
        for _ in range(TRIES):
            relation, attribute = self._topic(rng)
            statement = self._statement(relation, attribute, rng)
            if not accept(statement):
                continue
            twin = statement.swapped()
            count = int(rng.integers(self.objects[0], self.objects[1] + 1))
            places = draw_places(count, relation, attribute, rng)
            scenes = self._scenes(statement, twin, places, rng)
            if scenes is not None:
                return Contrast(scenes, (statement, twin))
        raise UserError(
            "no scene could be drawn for the wanted combinations; use more things, more relations or another --held-out"
        )

    def further(self, scene: Scene, count: int, rng: np.random.Generator, taken: set[str]) -> list[Statement]:
        """Up to `count` more true statements of trained combinations, with captions not in `taken`."""
        found: list[Statement] = []
        for _ in range(8 * count):
            if len(found) == count:
                break
            one, two = (scene.items[i] for i in rng.permutation(len(scene.items))[:2])
            relation, attribute = self._topic(rng)
            names = (attribute,) if attribute else self._described(rng)
            values = [[scene.attribute(item, n) for n in names] for item in (one, two)]
            if None in values[0] + values[1] or (attribute and values[0] == values[1]):
                continue
            first, second = (
                Mention(item.noun, tuple((n, str(v)) for n, v in zip(names, given, strict=True)))
                for item, given in zip((one, two), values, strict=True)
            )
            if first == second:
                continue
            statement = Statement(first, second, relation, attribute)
            if statement.holds(scene) and self.trains(statement) and statement.caption() not in taken:
                found.append(statement)
                taken.add(statement.caption())
        return found

    def trains(self, statement: Statement) -> bool:
        """Whether a training caption may say it: nothing that it binds together is held out."""
        return not statement.combinations() & self.held_out

    def _topic(self, rng: np.random.Generator) -> tuple[str | None, str | None]:
        topics = len(self.relations) + len(self.attributes)
        i = int(rng.integers(topics))
        return (
            (self.relations[i], None) if i < len(self.relations) else (None, self.attributes[i - len(self.relations)])
        )

    def _described(self, rng: np.random.Generator) -> tuple[str, ...]:
        """The attribute that a caption about a relation also names, if any; sizes are left to their own captions."""
        looks = [a for a in self.attributes if a != "size"]
        return (str(rng.choice(looks)),) if looks and rng.random() < DESCRIBE else ()

    def _statement(self, relation: str | None, attribute: str | None, rng: np.random.Generator) -> Statement:
        nouns = [str(n) for n in rng.choice(self.catalogue.nouns, 2, replace=False)]
        names = (attribute,) if attribute else self._described(rng)
        mentions = [Mention(noun) for noun in nouns]
        for name in names:
            choices = ("big", "small") if name == "size" else self.catalogue.looks[name]
            values = rng.choice(choices, 2, replace=attribute is None)
            mentions = [Mention(m.noun, ((name, str(v)),)) for m, v in zip(mentions, values, strict=True)]
        return Statement(mentions[0], mentions[1], relation, attribute)

    def _scenes(
        self, statement: Statement, twin: Statement, places: list[Place], rng: np.random.Generator
    ) -> tuple[Scene, Scene] | None:
        """The two scenes on the same places, or None if chance made a caption true, or unclear, of the wrong one."""
        if statement.attribute == "size" and dict(statement.first.attributes)["size"] == "small":
            places = [places[1], places[0], *places[2:]]
        named = [self._item(m.noun, dict(m.attributes), rng) for m in (statement.first, statement.second)]
        others = self._distractors(statement, len(places) - 2, rng)
        order = rng.permutation(len(places))
        if statement.relation is not None or statement.attribute == "size":
            pairs = [named, named[::-1]]
        else:
            looks = [
                {**item.look, **dict(m.attributes)} for item, m in zip(named, (twin.first, twin.second), strict=True)
            ]
            pairs = [named, [replace(item, look=look) for item, look in zip(named, looks, strict=True)]]
        scenes = tuple(self._placed([*pair, *others], places, order) for pair in pairs)
        verdicts = [s.holds(scene) for s in (statement, twin) for scene in scenes]
        return (scenes[0], scenes[1]) if verdicts == [True, False, False, True] else None

    def _item(self, noun: str, look: dict[str, str], rng: np.random.Generator) -> Item:
        """A thing without its place: the looks that the caption leaves open are drawn."""
        drawn = {name: look.get(name) or str(rng.choice(values)) for name, values in self.catalogue.looks.items()}
        return Item(noun, _NOWHERE, drawn, int(rng.integers(self.catalogue.variants(noun))))

    def _distractors(self, statement: Statement, count: int, rng: np.random.Generator) -> list[Item]:
        """Other nouns; now and then a named noun in another look, if the caption names looks to tell the two apart."""
        named = (statement.first, statement.second)
        free = [n for n in self.catalogue.nouns if n not in (named[0].noun, named[1].noun)]
        items = [self._item(str(n), {}, rng) for n in rng.choice(free, count, replace=False)]
        looks = [n for n, _ in statement.first.attributes if n in self.catalogue.looks]
        if items and looks and rng.random() < SAME_NOUN:
            repeated = named[int(rng.integers(2))]
            given = {dict(m.attributes)[looks[0]] for m in named}
            others = [v for v in self.catalogue.looks[looks[0]] if v not in given]
            items[0] = self._item(repeated.noun, {looks[0]: str(rng.choice(others))}, rng)
        return items

    def _placed(self, items: list[Item], places: list[Place], order: np.ndarray) -> Scene:
        """Items on their places, painted large to small so that what lies inside stays visible, ties in `order`."""
        placed = [
            replace(i, box=p.box(self.catalogue.aspect(i.noun, i.variant), self.size))
            for i, p in zip(items, places, strict=True)
        ]
        ranked = sorted(range(len(placed)), key=lambda k: (-placed[k].box.side, order[k]))
        return Scene(self.size, tuple(placed[k] for k in ranked))
