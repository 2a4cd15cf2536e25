"""Pairs by number: what the sampler draws from and the trainer reads, in memory or from disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch

from cacr_uniter.data.batch import Batch
from cacr_uniter.training.sampling import Indices
from cacr_uniter.training.shared import Contrast

Item = TypeVar("Item")
Result = TypeVar("Result")


class PairSource(Protocol):
    """Captions and images by number.

    Attributes:
        image_of: image number of every caption [captions].
        n_images: images.
        img_dim: width of a region feature.
        workers: threads worth reading with; 0 means that reading costs nothing.
    """

    image_of: Indices
    n_images: int
    img_dim: int
    workers: int

    def batch(self, captions: Indices, images: Indices) -> Batch:
        """The pairs (captions[i], images[i]), padded to the longest of them."""

    def contrasts(self) -> list[Contrast]:
        """Pairs of images with captions that are true of one and false of the other."""


class MemorySource:
    """Captions and images as padded tensors: a batch is seven ``index_select``.

    Args:
        texts: [CLS] pieces [SEP] of every caption, padded with 0 [captions, T] int64.
        n_text: their word pieces [captions].
        features: region features [images, R, img_dim] float32, 0 on padding.
        boxes: [images, R, 7] float32.
        n_regions: [images].
        image_of: image number of every caption.
        contrasts: where they are read from when they are asked for.
    """

    workers = 0

    def __init__(
        self,
        texts: torch.Tensor,
        n_text: Indices,
        features: torch.Tensor,
        boxes: torch.Tensor,
        n_regions: Indices,
        image_of: Indices,
        contrasts: Callable[[], list[Contrast]] = list,
    ) -> None:
        self.contrasts = contrasts
        self.texts, self.features, self.boxes = texts, features, boxes
        self.n_text, self.n_regions = n_text, n_regions
        self.image_of, self.n_images, self.img_dim = image_of, len(features), features.shape[-1]
        self._columns = torch.arange(max(texts.shape[1], features.shape[1]))

    def batch(self, captions: Indices, images: Indices) -> Batch:
        n_text, n_regions = self.n_text[captions], self.n_regions[images]
        width, regions = int(n_text.max()) + 2, int(n_regions.max())
        caption_index, image_index = torch.from_numpy(captions), torch.from_numpy(images)
        text_count = torch.from_numpy(n_text).to(torch.int32)
        region_count = torch.from_numpy(n_regions).to(torch.int32)
        return Batch(
            input_ids=self.texts[:, :width].index_select(0, caption_index),
            text_mask=self._columns[:width] < (text_count + 2)[:, None],
            features=self.features[:, :regions].index_select(0, image_index),
            boxes=self.boxes[:, :regions].index_select(0, image_index),
            region_mask=self._columns[:regions] < region_count[:, None],
            n_text=text_count,
            n_regions=region_count,
        )

    @classmethod
    def load(cls, source: PairSource, chunk: int = 256) -> MemorySource:
        """Reads everything of another source once."""
        n_captions = len(source.image_of)
        captions = np.arange(n_captions)
        first = np.zeros(source.n_images, dtype=np.int64)
        first[source.image_of[::-1]] = captions[::-1]
        texts, images = [], []
        for start in range(0, n_captions, chunk):
            part = captions[start : start + chunk]
            texts.append(source.batch(part, np.full(len(part), source.image_of[part[0]])))
        for start in range(0, source.n_images, chunk):
            part = np.arange(start, min(start + chunk, source.n_images))
            images.append(source.batch(first[part], part))
        return cls(
            texts=_stack([x.input_ids for x in texts]),
            n_text=np.concatenate([x.n_text.numpy() for x in texts]).astype(np.int64),
            features=_stack([x.features for x in images]),
            boxes=_stack([x.boxes for x in images]),
            n_regions=np.concatenate([x.n_regions.numpy() for x in images]).astype(np.int64),
            image_of=source.image_of,
            contrasts=source.contrasts,
        )


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates along 0 after padding dimension 1 with zeros to the widest."""
    width = max(part.shape[1] for part in parts)
    out = parts[0].new_zeros(sum(len(part) for part in parts), width, *parts[0].shape[2:])
    row = 0
    for part in parts:
        out[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    return out


def ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map``, computed by ``workers`` threads up to 2 ``workers`` items ahead, in order; 0: in place."""
    if workers == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
