"""Training and validation pairs of a configuration, read from the published databases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cacr_uniter.data.batch import Pairs
from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.data.joined import open_images, open_texts
from cacr_uniter.errors import UserError
from cacr_uniter.training.config import DataConfig
from cacr_uniter.training.sampling import Indices
from cacr_uniter.training.shared import Contrast, read_contrasts
from cacr_uniter.training.sizes import parse_size, show_size
from cacr_uniter.training.source import MemorySource, PairSource


class DatasetSource:
    """Pairs of a ``RetrievalDataset``, read from disk when they are asked for.

    Args:
        dataset: captions and images; numbers are positions in ``caption_ids`` and ``image_names``.
        workers: threads worth reading with.
    """

    def __init__(self, dataset: RetrievalDataset, workers: int) -> None:
        self.dataset, self.workers = dataset, workers
        number = {name: index for index, name in enumerate(dataset.image_names)}
        self.image_of: Indices = np.array([number[dataset.txt2img[key]] for key in dataset.caption_ids], dtype=np.int64)
        self.n_images = len(number)
        self.img_dim = dataset.feature_dim

    def pairs(self, captions: Indices, images: Indices) -> Pairs:
        ids, names = self.dataset.caption_ids, self.dataset.image_names
        return self.dataset.pairs([(ids[c], names[i]) for c, i in zip(captions.tolist(), images.tolist(), strict=True)])

    def contrasts(self) -> list[Contrast]:
        dataset = self.dataset
        return read_contrasts(dataset.text_db.folder, dataset.caption_ids, dataset.image_names)

    def memory_bytes(self) -> int:
        """Size of the padded tensors of ``MemorySource``."""
        dataset = self.dataset
        regions = max(dataset.image_db.count(name) for name in dataset.image_names)
        width = max(dataset.text_db.lengths[key] for key in dataset.caption_ids) + 2
        number = dataset.image_db.read(dataset.image_names[0]).features.element_size()
        return self.n_images * regions * (number * self.img_dim + 4 * 7) + 8 * len(self.image_of) * width


def resolve(config: DataConfig) -> DataConfig:
    """Paths of ``scenes`` filled in.

    Raises:
        UserError: no training data is named, or both ways are.
    """
    if config.scenes is None:
        if not config.text or not config.images:
            raise UserError("no training data: give data.scenes, or data.text and data.images")
        return config
    if config.text or config.images or config.val_text or config.val_images:
        raise UserError("data.scenes stands for data.text, images, val_text and val_images: give one or the other")
    root = Path(config.scenes)
    if not root.is_dir():
        raise UserError(f"data.scenes {root} is no folder: write it with `cacr data scenes --out {root}`")
    validation = root / "txt" / "val.db"
    return replace(
        config,
        text=str(root / "txt" / "train.db"),
        images=str(root / "img"),
        val_text=str(validation) if validation.is_dir() else None,
    )


def open_dataset(config: DataConfig, split: str) -> RetrievalDataset | None:
    """The ``train`` or ``val`` data set of a resolved configuration; none without validation data."""
    text = config.text if split == "train" else config.val_text
    images = config.images if split == "train" else config.val_images or config.images
    if text is None or images is None:
        return None
    rule = BoxRule(config.confidence, config.max_regions, config.min_regions, config.fixed_regions)
    texts, regions = open_texts(text), open_images(images, rule)
    if split == "val":  # whole, whatever is left out of the training: its numbers are to be compared
        return RetrievalDataset(texts, regions)
    longest = None if config.max_text < 0 else config.max_text
    return RetrievalDataset(texts, regions, longest, skip_missing=config.missing == "skip", training=True)


def open_source(dataset: RetrievalDataset, config: DataConfig) -> PairSource:
    """Pairs of a data set, in memory or on disk as ``cache`` says."""
    source = DatasetSource(dataset, config.workers)
    if config.cache == "disk":
        return source
    needed, limit = source.memory_bytes(), parse_size(config.cache_limit, "data.cache_limit")
    if needed > limit:
        if config.cache == "memory":
            raise UserError(
                f"data.cache memory needs {show_size(needed)}, more than data.cache_limit {config.cache_limit}: raise "
                "the limit, or take data.cache disk"
            )
        return source
    return MemorySource.load(source)
