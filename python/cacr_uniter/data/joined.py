"""Several databases read as one: COCO is published as two of captions (train, restval) and two of regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.image_db import ImageDB, Regions
from cacr_uniter.data.text_db import Caption, TextDB
from cacr_uniter.data.vocabulary import in_words, same_vocabulary
from cacr_uniter.errors import UserError


def open_texts(folders: str | Sequence[str]) -> TextDB:
    """The text database of one folder, or those of several as one."""
    return TextDB(folders) if isinstance(folders, str) else JoinedTexts(folders)


def open_images(folders: str | Sequence[str], rule: BoxRule) -> ImageDB:
    """The image database of one folder, or those of several as one."""
    return ImageDB(folders, rule) if isinstance(folders, str) else JoinedImages(folders, rule)


def check_vocabularies(first: TextDB, second: TextDB) -> None:
    """Refuses captions for one model that were split with different vocabularies.

    Raises:
        UserError: they differ in the number of pieces or in the ids of CLS, SEP or MASK.
    """
    if not same_vocabulary(first.vocabulary, second.vocabulary):
        raise UserError(
            f"text databases {first.folder} and {second.folder} have different vocabularies: "
            f"{in_words(first.vocabulary)} and {in_words(second.vocabulary)}; make one of them again with the "
            "vocabulary of the other (cacr data import)"
        )


class JoinedTexts(TextDB):
    """Text databases one after another; `folder` and `meta` are those of the first.

    Raises:
        UserError: no folder, other vocabularies, or a caption id that occurs in two.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        parts = [TextDB(folder) for folder in folders]
        if not parts:
            raise UserError("text databases: expected one folder or more, got an empty list")
        first = parts[0]
        self.folder, self.meta = first.folder, first.meta
        self.cls, self.sep, self.vocab_size = first.cls, first.sep, first.vocab_size
        self.lengths, self.txt2img, self.img2txts = {}, {}, {}
        self._part_of: dict[str, TextDB] = {}
        for part in parts:
            check_vocabularies(first, part)
            twice = next((key for key in part.lengths if key in self.lengths), None)
            if twice is not None:
                raise UserError(
                    f"text database {part.folder}: caption {twice!r} is in {self._part_of[twice].folder} too"
                )
            self.lengths |= part.lengths
            self.txt2img |= part.txt2img
            self._part_of |= dict.fromkeys(part.lengths, part)
            for image, captions in part.img2txts.items():
                self.img2txts[image] = self.img2txts.get(image, []) + captions
        self._parts = parts

    def caption(self, caption_id: str) -> Caption:
        return self._part_of.get(caption_id, self._parts[0]).caption(caption_id)

    def close(self) -> None:
        for part in self._parts:
            part.close()


class JoinedImages(ImageDB):
    """Image databases searched one after another; `folder` is that of the first.

    Raises:
        UserError: no folder, or features of different widths.
    """

    def __init__(self, folders: Sequence[str], rule: BoxRule) -> None:
        self._parts = [ImageDB(folder, rule) for folder in folders]
        if not self._parts:
            raise UserError("image databases: expected one folder or more, got an empty list")
        first = self._parts[0]
        self.folder, self.rule = first.folder, rule
        for part in self._parts:
            if part.feature_dim != first.feature_dim:
                raise UserError(
                    f"image databases {first.folder} and {part.folder}: features of {first.feature_dim} and "
                    f"{part.feature_dim} numbers; they must come from one detector"
                )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def _part(self, name: str) -> ImageDB:
        return next((part for part in self._parts if name in part), self._parts[0])

    @property
    def has_counts(self) -> bool:
        return all(part.has_counts for part in self._parts)

    @property
    def feature_dim(self) -> int:
        return self._parts[0].feature_dim

    def names(self) -> list[str]:
        return [name for part in self._parts for name in part.names()]

    def __contains__(self, name: str) -> bool:
        return any(name in part for part in self._parts)

    def record(self, name: str) -> dict[str, np.ndarray]:
        return self._part(name).record(name)

    def count(self, name: str) -> int:
        return self._part(name).count(name)

    def read(self, name: str) -> Regions:
        return self._part(name).read(name)

    def close(self) -> None:
        for part in self._parts:
            part.close()
