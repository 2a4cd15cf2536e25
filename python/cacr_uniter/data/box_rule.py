"""How many regions of an image are used, and the folder names that say so."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from cacr_uniter.errors import UserError

_FOLDER = re.compile(r"feat_(?:numbb(\d+)|th(\d+(?:\.\d+)?(?:e-\d+)?)_max(\d+)_min(\d+))(?:_compressed)?")


@dataclasses.dataclass(frozen=True)
class BoxRule:
    """How many of an image's regions, sorted by falling confidence, are used.

    min(max_boxes, max(min_boxes, number of regions with confidence > threshold)), or `fixed` regions of every image.

    Raises:
        UserError: bounds that no image can meet.
    """

    threshold: float = 0.2
    max_boxes: int = 100
    min_boxes: int = 10
    fixed: int | None = None

    def __post_init__(self) -> None:
        if self.fixed is not None and self.fixed < 1:
            raise UserError(f"box rule: expected a fixed number of regions from 1, got {self.fixed}")
        if not 0 <= self.min_boxes <= self.max_boxes or self.max_boxes < 1:
            raise UserError(
                f"box rule: expected 0 <= least regions <= most regions, got {self.min_boxes} and {self.max_boxes}"
            )
        if not 0 <= self.threshold < 1:
            raise UserError(f"box rule: expected a confidence threshold from 0 to below 1, got {self.threshold}")

    @classmethod
    def of_folder(cls, name: str) -> BoxRule | None:
        """The rule that the name of a database folder tells; None for `all` and for names of one's own."""
        found = _FOLDER.fullmatch(name)
        if found is None:
            return None
        return cls(fixed=int(found[1])) if found[1] else cls(float(found[2]), int(found[3]), int(found[4]))

    def __str__(self) -> str:
        if self.fixed is not None:
            return f"fixed regions {self.fixed}"
        return f"confidence {self.threshold}, max regions {self.max_boxes}, min regions {self.min_boxes}"

    @property
    def folder(self) -> str:
        """Name of the database folder made by this rule."""
        return f"feat_numbb{self.fixed}" if self.fixed is not None else f"feat_{self._name}"

    @property
    def counts_file(self) -> str | None:
        """Name of the JSON file of box counts beside the folder; none for a fixed number."""
        return None if self.fixed is not None else f"nbb_{self._name}.json"

    @property
    def _name(self) -> str:
        return f"th{self.threshold}_max{self.max_boxes}_min{self.min_boxes}"

    def count(self, confidence: np.ndarray | None, size: int) -> int:
        """Number of regions used of `size`; without confidences only `fixed` or `max_boxes` limits it."""
        if self.fixed is not None:
            return min(self.fixed, size)
        if confidence is None:
            return min(self.max_boxes, size)
        confident = int((np.asarray(confidence).reshape(-1) > self.threshold).sum())
        return min(self.max_boxes, max(self.min_boxes, confident), size)
