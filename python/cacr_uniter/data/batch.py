"""A padded batch of caption-image pairs: what the model reads. Depends on torch only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass
class Batch:
    """B caption-image pairs, texts padded on the right to T columns, regions to R.

    The joint sequence is uncompacted: text at columns 0 .. T-1, regions at T .. T+R-1. [CLS], [SEP] and padding lie
    outside the two spans that the congruence losses read (`spans`).

    Attributes:
        input_ids: [B, T] int64, [CLS] pieces [SEP], then 0.
        text_mask: [B, T] bool, True on [CLS] .. [SEP].
        features: [B, R, img_dim] float32 region features, 0 on padding.
        boxes: [B, R, 7] float32: x1, y1, x2, y2, w, h as fractions of the image, and w h.
        region_mask: [B, R] bool, True on real regions.
        n_text: [B] int32, word pieces without [CLS] and [SEP].
        n_regions: [B] int32.
    """

    input_ids: Tensor
    text_mask: Tensor
    features: Tensor
    boxes: Tensor
    region_mask: Tensor
    n_text: Tensor
    n_regions: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{field.name: function(getattr(self, field.name)) for field in dataclasses.fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def select(self, indices: Tensor | Sequence[int]) -> Batch:
        """The pairs at `indices` (int64 tensor or sequence, any order, repeats allowed), padding unchanged."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.input_ids.device)
        return self._map(lambda tensor: tensor.index_select(0, index))

    def trim(self) -> Batch:
        """The batch without columns that are padding in every pair; reads the lengths, so it waits for the device."""
        if not len(self):
            return self
        width, regions = int(self.n_text.max()) + 2, int(self.n_regions.max())
        return Batch(
            input_ids=self.input_ids[:, :width],
            text_mask=self.text_mask[:, :width],
            features=self.features[:, :regions],
            boxes=self.boxes[:, :regions],
            region_mask=self.region_mask[:, :regions],
            n_text=self.n_text,
            n_regions=self.n_regions,
        )

    def spans(self) -> dict[str, int | Tensor]:
        """Keyword arguments that tell the congruence losses where text and regions lie in the joint sequence."""
        width, regions = self.input_ids.shape[1], self.features.shape[1]
        return {
            "text_start": 1,
            "n_text": self.n_text,
            "vision_start": width,
            "n_vision": self.n_regions,
            "max_n_text": width - 2,
            "max_n_vision": regions,
        }


def collate(
    texts: Sequence[Sequence[int]],
    images: Sequence[tuple[Tensor, Tensor]],
    cls: int,
    sep: int,
    img_dim: int | None = None,
) -> Batch:
    """Pads texts and regions into a `Batch`.

    Args:
        texts: word-piece ids of each pair, without [CLS] and [SEP].
        images: (features [n, img_dim], boxes [n, 7]) of each pair; the same tensors may occur many times.
        cls: id of [CLS].
        sep: id of [SEP].
        img_dim: width of the features, needed only when there is no pair.

    Raises:
        ValueError: different numbers of texts and images, no pair and no `img_dim`, or features of different widths.
    """
    if len(texts) != len(images):
        raise ValueError(f"texts and images: expected equally many, got {len(texts)} and {len(images)}")
    if img_dim is None:
        if not images:
            raise ValueError("img_dim: expected the feature width when there is no pair, got None")
        img_dim = int(images[0][0].shape[1])
    size = len(texts)
    width = max((len(text) for text in texts), default=0) + 2
    regions = max((len(boxes) for _, boxes in images), default=0)
    ids = [[cls, *text, sep, *(0,) * (width - 2 - len(text))] for text in texts]
    n_text = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    n_regions = torch.tensor([len(boxes) for _, boxes in images], dtype=torch.int32)
    padded_features = torch.zeros(size, regions, img_dim)
    padded_boxes = torch.zeros(size, regions, 7)
    for row, (features, boxes) in enumerate(images):
        if features.shape != (len(boxes), img_dim):
            raise ValueError(f"images[{row}]: expected features [{len(boxes)}, {img_dim}], got {list(features.shape)}")
        padded_features[row, : len(boxes)] = features
        padded_boxes[row, : len(boxes)] = boxes
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.int64).view(size, width),
        text_mask=torch.arange(width) < n_text[:, None] + 2,
        features=padded_features,
        boxes=padded_boxes,
        region_mask=torch.arange(regions) < n_regions[:, None],
        n_text=n_text,
        n_regions=n_regions,
    )
