"""The retrieval data set: captions and images of two databases, made into batches of pairs. Samples nothing itself."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from cacr_uniter.data.batch import Batch, Pairs, collate
from cacr_uniter.data.image_db import ImageDB
from cacr_uniter.data.text_db import TextDB
from cacr_uniter.errors import UserError


class RetrievalDataset:
    """Captions with their images. It can be pickled and used from any number of worker processes.

    Args:
        text_db: captions.
        image_db: region features of at least the captions' images.
        max_text_length: captions of more word pieces are left out (60 in the published training); None keeps all.
        skip_missing: leave out captions whose image is not in the image database, instead of refusing them.
        training: the pairs train a model, so that errors may advise fields of `cacr train` that leave captions out.

    Attributes:
        caption_ids: ids in the database's order.
        image_names: images of these captions, each once, in order of first mention.
        txt2img: caption id -> image name.
        img2txts: image name -> ids of its captions, only those in `caption_ids`.
        skipped: what was left out for want of images, in words; None if nothing was.

    Raises:
        UserError: no caption is left, or an image of a caption is not in the image database.
    """

    def __init__(
        self,
        text_db: TextDB,
        image_db: ImageDB,
        max_text_length: int | None = None,
        *,
        skip_missing: bool = False,
        training: bool = False,
    ) -> None:
        self.text_db = text_db
        self.image_db = image_db
        self.training = training
        self.skipped: str | None = None
        self._texts: dict[str, list[int]] = {}
        self._use(text_db.ids(max_text_length))
        if not self.caption_ids:
            raise UserError(f"text database {text_db.folder}: no caption of at most {max_text_length} word pieces")
        absent = {name for name in self.image_names if name not in image_db}
        if absent:
            self._leave_out(absent, skip_missing)

    def _leave_out(self, absent: set[str], allowed: bool) -> None:
        first = next(name for name in self.image_names if name in absent)
        problem = (
            f"image database {self.image_db.folder}: {len(absent)} of {len(self.image_names)} images of the captions "
            f"are missing, first {first!r}"
        )
        if not allowed or len(absent) == len(self.image_names):
            cure = "import these images too; validation and evaluation leave no caption out"
            if self.training:
                cure = "import these images too, or leave their captions out (data.missing skip)"
            raise UserError(f"{problem}; do text and image database belong together? If they do, {cure}")
        kept = [caption_id for caption_id in self.caption_ids if self.txt2img[caption_id] not in absent]
        self.skipped = f"{problem}: {len(self.caption_ids) - len(kept)} captions left out (data.missing skip)"
        self._use(kept)

    def check_lengths(self, max_positions: int) -> None:
        """Refuses captions that a model has no positions for.

        Args:
            max_positions: position embeddings of the model, [CLS] and [SEP] included.

        Raises:
            UserError: a caption is longer.
        """
        longest = max(self.caption_ids, key=self.text_db.lengths.__getitem__)
        if self.text_db.lengths[longest] + 2 > max_positions:
            cure = "shorten or remove it in the database: validation and evaluation leave no caption out"
            if self.training:
                cure = f"leave such captions out of the training with data.max_text {max_positions - 2} or less"
            raise UserError(
                f"text database {self.text_db.folder}: caption {longest!r} has {self.text_db.lengths[longest]} word "
                f"pieces and the model takes {max_positions - 2}; {cure}"
            )

    def identity(self) -> dict[str, Any]:
        """What tells these pairs from others, wherever the databases lie; reads no record but the first image's.

        Returns:
            captions, images, feature_dim, and the SHA-256 of the vocabulary and of every caption's id, length and
            image, in order. Features and pieces of the same sizes under the same names are not told apart.
        """
        vocabulary = sorted(self.text_db.vocabulary.items())
        found = hashlib.sha256(json.dumps([vocabulary, self.feature_dim]).encode("utf-8"))
        for caption_id in self.caption_ids:
            line = [caption_id, self.text_db.lengths[caption_id], self.txt2img[caption_id]]
            found.update(json.dumps(line).encode("utf-8"))
        sizes = {"captions": len(self), "images": len(self.image_names), "feature_dim": self.feature_dim}
        return {**sizes, "sha256": found.hexdigest()}

    def _use(self, caption_ids: list[str]) -> None:
        self.caption_ids = caption_ids
        self.txt2img: dict[str, str] = {}
        self.img2txts: dict[str, list[str]] = {}
        for caption_id in caption_ids:
            if caption_id not in self.text_db.txt2img:
                folder = self.text_db.folder
                raise UserError(f"text database {folder}: txt2img.json has no image for caption {caption_id!r}")
            image = self.text_db.txt2img[caption_id]
            self.txt2img[caption_id] = image
            self.img2txts.setdefault(image, []).append(caption_id)
        self.image_names = list(self.img2txts)

    def restricted(self, captions: Sequence[int]) -> RetrievalDataset:
        """The captions at these positions of `caption_ids`, and their images, on the same databases."""
        part = copy.copy(self)
        part._use([self.caption_ids[position] for position in captions])
        return part

    def __len__(self) -> int:
        return len(self.caption_ids)

    @property
    def feature_dim(self) -> int:
        """Width of the region features: `img_dim` of the model configuration."""
        return self.image_db.feature_dim

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> Pairs:
        """Loads and pads pairs; a text or image that occurs many times is read and kept once.

        Args:
            pairs: (caption id, image name), any of the databases, matching or not.

        Returns:
            `Pairs` on the CPU in the order of `pairs`.

        Raises:
            UserError: an unknown id or name, or a damaged record.
        """
        texts, images = dict[str, int](), dict[str, int]()
        which = [(texts.setdefault(c, len(texts)), images.setdefault(i, len(images))) for c, i in pairs]
        for caption_id in texts.keys() - self._texts.keys():
            self._texts[caption_id] = self.text_db.caption(caption_id).input_ids
        return collate(
            [self._texts[caption_id] for caption_id in texts],
            [self.image_db.read(image) for image in images],
            self.text_db.cls,
            self.text_db.sep,
            img_dim=None if pairs else self.feature_dim,
            which=which,
        )

    def batch(self, pairs: Sequence[tuple[str, str]]) -> Batch:
        """The same as the model reads it, a `Batch` on the CPU."""
        return self.pairs(pairs).batch()
