"""Caption-image pairs as they are read (`Pairs`) and as the model sees them (`Batch`). Depends on torch only."""

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

    def select(self, indices: Tensor | Sequence[int]) -> Batch:
        """The pairs at `indices` (int64 tensor or sequence, any order, repeats allowed), padding unchanged."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.input_ids.device)
        return self._map(lambda tensor: tensor.index_select(0, index))

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


@dataclasses.dataclass
class Pairs:
    """B caption-image pairs that share N texts and M images, each of which is stored once.

    Attributes:
        input_ids: [N, T] int64, padded as in `Batch`.
        n_text: [N] int32.
        features: [M, R, img_dim] in the dtype of the database, 0 on padding.
        boxes: [M, R, 7] float32.
        n_regions: [M] int32.
        caption, image: [B] int64, the text and the image of each pair.
        sizes: [B, 2] int32, word pieces and regions of each pair; stays on the CPU, so that no length is read back.
    """

    input_ids: Tensor
    n_text: Tensor
    features: Tensor
    boxes: Tensor
    n_regions: Tensor
    caption: Tensor
    image: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in vars(self).values())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Pairs:
        moved = {name: function(tensor) for name, tensor in vars(self).items() if name != "sizes"}
        return Pairs(**moved, sizes=self.sizes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pairs:
        """The pairs on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Pairs:
        """The pairs in page-locked memory, from which `to` need not wait for the device."""
        return self._map(Tensor.pin_memory)

    def longest(self, rows: slice | Tensor) -> tuple[int, int]:
        """Most word pieces and most regions of the pairs at `rows`."""
        sizes = self.sizes[rows if isinstance(rows, slice) else rows.cpu()]
        pieces, regions = sizes.amax(dim=0).tolist() if len(sizes) else (0, 0)
        return pieces, regions

    def batch(self, rows: slice | Tensor = slice(None)) -> Batch:
        """The pairs at `rows` on their device, padded to the longest of them, with float32 features.

        Args:
            rows: a slice, or int64 positions [b] (any order, repeats allowed); positions on a GPU are read back once.
        """
        pieces, regions = self.longest(rows)
        width = pieces + 2
        caption, image = self.caption[rows], self.image[rows]
        n_text, n_regions = self.n_text[caption], self.n_regions[image]
        columns = torch.arange(max(width, regions), device=caption.device)
        return Batch(
            input_ids=self.input_ids[:, :width].index_select(0, caption),
            text_mask=columns[:width] < n_text[:, None] + 2,
            features=self.features[:, :regions].index_select(0, image).float(),
            boxes=self.boxes[:, :regions].index_select(0, image),
            region_mask=columns[:regions] < n_regions[:, None],
            n_text=n_text,
            n_regions=n_regions,
        )


def collate(
    texts: Sequence[Sequence[int]],
    images: Sequence[tuple[Tensor, Tensor]],
    cls: int,
    sep: int,
    img_dim: int | None = None,
    which: Sequence[tuple[int, int]] | None = None,
) -> Pairs:
    """Pads texts and regions into `Pairs`.

    Args:
        texts: word-piece ids of each text, without [CLS] and [SEP].
        images: (features [n, img_dim] float16 or float32, boxes [n, 7]) of each image.
        cls: id of [CLS].
        sep: id of [SEP].
        img_dim: width of the features, needed only when there is no image.
        which: (text, image) of each pair; by default text i with image i.

    Raises:
        ValueError: different numbers of texts and images without `which`, no image and no `img_dim`, or features of
            different widths.
    """
    if which is None:
        if len(texts) != len(images):
            raise ValueError(f"texts and images: expected equally many, got {len(texts)} and {len(images)}")
        which = [(i, i) for i in range(len(texts))]
    if img_dim is None:
        if not images:
            raise ValueError("img_dim: expected the feature width when there is no pair, got None")
        img_dim = int(images[0][0].shape[1])
    width = max((len(text) for text in texts), default=0) + 2
    regions = max((len(boxes) for _, boxes in images), default=0)
    half = all(features.dtype == torch.float16 for features, _ in images)
    padded_features = torch.zeros(len(images), regions, img_dim, dtype=torch.float16 if half else torch.float32)
    padded_boxes = torch.zeros(len(images), regions, 7)
    for row, (features, boxes) in enumerate(images):
        if features.shape != (len(boxes), img_dim):
            raise ValueError(f"images[{row}]: expected features [{len(boxes)}, {img_dim}], got {list(features.shape)}")
        padded_features[row, : len(boxes)] = features
        padded_boxes[row, : len(boxes)] = boxes
    ids = [[cls, *text, sep, *(0,) * (width - 2 - len(text))] for text in texts]
    n_text = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    n_regions = torch.tensor([len(boxes) for _, boxes in images], dtype=torch.int32)
    caption, image = torch.tensor(which, dtype=torch.int64).view(-1, 2).unbind(dim=1)
    return Pairs(
        input_ids=torch.tensor(ids, dtype=torch.int64).view(len(texts), width),
        n_text=n_text,
        features=padded_features,
        boxes=padded_boxes,
        n_regions=n_regions,
        caption=caption.contiguous(),
        image=image.contiguous(),
        sizes=torch.stack([n_text[caption], n_regions[image]], dim=1),
    )
