"""Options of a scene data set. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cacr_uniter.data.scenes.relations import RELATIONS
from cacr_uniter.data.scenes.statements import ATTRIBUTES
from cacr_uniter.errors import UserError


@dataclass(frozen=True)
class SceneSettings:
    """What is drawn. A data set is a pure function of these (and of the sprites' and the vocabulary's files).

    Args:
        seed: of everything.
        n_train, n_val: pictures; made in pairs, so even numbers.
        n_winoground: quadruples, half of them of trained combinations ("seen"), half held out.
        captions: most captions of a picture.
        objects: least and most things in a picture.
        size: side of the pictures in pixels.
        relations: phrases of `RELATIONS`.
        attributes: names of `ATTRIBUTES` that captions name and exchange.
        things: nouns used; None takes all.
        held_out: share of the combinations (two nouns x axis or attribute) that no training caption states.
        sprites: folder of cut-outs instead of drawn shapes.
        vocab: vocab.txt; None trains one on the training captions.
    """

    seed: int = 0
    n_train: int = 6000
    n_val: int = 400
    n_winoground: int = 400
    captions: int = 5
    objects: tuple[int, int] = (2, 5)
    size: int = 160
    relations: tuple[str, ...] = tuple(RELATIONS)
    attributes: tuple[str, ...] = ATTRIBUTES
    things: int | None = None
    held_out: float = 0.2
    sprites: Path | None = None
    vocab: Path | None = None

    def check(self) -> None:
        """Refuses what cannot be drawn.

        Raises:
            UserError: names the option, what came and what to do.
        """
        for name, value in (("n-train", self.n_train), ("n-val", self.n_val), ("n-winoground", self.n_winoground)):
            if value < 2 or value % 2:
                raise UserError(f"--{name} is {value}: give an even number from 2, scenes come in pairs")
        if self.captions < 1:
            raise UserError(f"--captions is {self.captions}: give 1 or more")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}: give a whole number from 0 to 2^63 - 1")
        if not 48 <= self.size <= 2048:
            raise UserError(f"--size is {self.size}: give 48 to 2048 pixels")
        if not 2 <= self.objects[0] <= self.objects[1] <= 8:
            raise UserError(f"--objects is {self.objects[0]} {self.objects[1]}: give two numbers from 2 to 8 in order")
        if self.things is not None and self.things < max(4, self.objects[1]):
            raise UserError(
                f"--things is {self.things}: give at least {max(4, self.objects[1])}, a picture repeats no noun"
            )
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"--held-out is {self.held_out}: give a share from 0 to 0.5")
        for option, values, known in (
            ("relations", self.relations, tuple(RELATIONS)),
            ("attributes", self.attributes, ATTRIBUTES),
        ):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise UserError(f"--{option}: {unknown[0]!r} is not one of {', '.join(known)}")
        if not self.relations and not self.attributes:
            raise UserError("--relations and --attributes are both empty: captions need at least one of them")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
