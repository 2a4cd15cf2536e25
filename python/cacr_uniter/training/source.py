"""Pairs by number: what the sampler draws from and the trainer reads, in memory or from disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from typing import Protocol, TypeVar

import numpy as np
import torch

from cacr_uniter.data.batch import Pairs
from cacr_uniter.training.sampling import Indices
from cacr_uniter.training.shared import Contrast

#: of results that wait to be used
READ_AHEAD_BYTES = 1 << 30

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

    def pairs(self, captions: Indices, images: Indices) -> Pairs:
        """The pairs (captions[i], images[i]); every text and image is kept once."""

    def contrasts(self) -> list[Contrast]:
        """Pairs of images with captions that are true of one and false of the other."""


def read_pairs(source: PairSource, captions: Indices, images: Indices, device: torch.device) -> Pairs:
    """Pairs of a source; page-locked if they go to a GPU, which then fetches them while the CPU goes on."""
    pairs = source.pairs(captions, images)
    return pairs.pin_memory() if device.type == "cuda" else pairs


class MemorySource:
    """Captions and images as padded tensors.

    Args:
        texts: [CLS] pieces [SEP] of every caption, padded with 0 [captions, T] int64.
        n_text: their word pieces [captions].
        features: region features [images, R, img_dim] float16 or float32, 0 on padding.
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

    def pairs(self, captions: Indices, images: Indices) -> Pairs:
        texts, caption = map(torch.from_numpy, np.unique(captions, return_inverse=True))
        pictures, image = map(torch.from_numpy, np.unique(images, return_inverse=True))
        n_text = torch.from_numpy(self.n_text)[texts].to(torch.int32)
        n_regions = torch.from_numpy(self.n_regions)[pictures].to(torch.int32)
        width, regions = int(n_text.max()) + 2, int(n_regions.max())
        return Pairs(
            input_ids=self.texts[:, :width].index_select(0, texts),
            n_text=n_text,
            features=self.features[:, :regions].index_select(0, pictures),
            boxes=self.boxes[:, :regions].index_select(0, pictures),
            n_regions=n_regions,
            caption=caption,
            image=image,
            sizes=torch.stack([n_text[caption], n_regions[image]], dim=1),
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
            texts.append(source.pairs(part, np.full(len(part), source.image_of[part[0]])))
        for start in range(0, source.n_images, chunk):
            part = np.arange(start, min(start + chunk, source.n_images))
            images.append(source.pairs(first[part], part))
        return cls(
            texts=_stack([x.input_ids[x.caption] for x in texts]),
            n_text=np.concatenate([x.sizes[:, 0].numpy() for x in texts]).astype(np.int64),
            features=_stack([x.features[x.image] for x in images]),
            boxes=_stack([x.boxes[x.image] for x in images]),
            n_regions=np.concatenate([x.sizes[:, 1].numpy() for x in images]).astype(np.int64),
            image_of=source.image_of,
            contrasts=source.contrasts,
        )


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates along 0 after padding dimension 1 with zeros to the widest."""
    width = max(part.shape[1] for part in parts)
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    out = torch.zeros(sum(len(part) for part in parts), width, *parts[0].shape[2:], dtype=dtype)
    row = 0
    for part in parts:
        out[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    return out


def ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    size: Callable[[Result], int] = lambda result: 0,
) -> Iterator[Result]:
    """``map``, computed by ``workers`` threads up to 2 ``workers`` items ahead, in order; 0: in place.

    ``size`` says the bytes of a result: no more are read ahead than fill ``READ_AHEAD_BYTES``, at the largest result so
    far, but always one.
    """
    if workers == 0:
        yield from map(function, items)
        return
    largest, depth = 0, 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                while len(waiting) > depth:
                    result = waiting.popleft().result()
                    largest = max(largest, size(result), 1)
                    depth = max(1, min(2 * workers, READ_AHEAD_BYTES // largest))
                    yield result
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
