"""The retrieval data set: captions and images of two databases, made into batches of pairs. Samples nothing itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence

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
        max_positions: position embeddings of the model; a longer text cannot be embedded.

    Attributes:
        caption_ids: ids in the database's order.
        image_names: images of these captions, each once, in order of first mention.
        txt2img: caption id -> image name.
        img2txts: image name -> ids of its captions, only those in `caption_ids`.

    Raises:
        UserError: no caption is left, an image of a caption is not in the image database, or a caption is too long for
            the model.
    """

    def __init__(
        self, text_db: TextDB, image_db: ImageDB, max_text_length: int | None = None, max_positions: int = 512
    ) -> None:
        self.text_db = text_db
        self.image_db = image_db
        self._texts: dict[str, list[int]] = {}
        self._use(text_db.ids(max_text_length))
        if not self.caption_ids:
            raise UserError(f"text database {text_db.folder}: no caption of at most {max_text_length} word pieces")
        longest = max(text_db.lengths[caption_id] for caption_id in self.caption_ids)
        if longest + 2 > max_positions:
            raise UserError(
                f"text database {text_db.folder}: a caption has {longest} word pieces and the model takes "
                f"{max_positions - 2}; leave such captions out (cacr train: data.max_text)"
            )
        absent = [name for name in self.image_names if name not in image_db]
        if absent:
            raise UserError(
                f"image database {image_db.folder}: {len(absent)} of {len(self.image_names)} images of the captions "
                f"are missing, first {absent[0]!r}; do text and image database belong together?"
            )

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
