"""Synthetic pairs and small runs for tests; ``python -m cacr_uniter.training.testing JSON`` runs one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.image_writer import ImageDBWriter
from cacr_uniter.data.text_db import TextDBWriter
from cacr_uniter.training.build import build_accelerator
from cacr_uniter.training.command import load_config
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.source import MemorySource
from cacr_uniter.training.trainer import TrainResult, train_on

VOCABULARY = 30
SMALL = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 32,
    "model.dropout": 0.1,
    "batch.anchors": 2,
    "batch.negatives": 3,
    "batch.pool": 6,
    "batch.pairs_per_forward": 8,
    "optim.steps": 8,
    "optim.warmup": 2,
    "optim.lr": 1e-3,
    "run.log_every": 1,
    "run.checkpoint_every": 2,
    "run.validate_every": 0,
    "run.tensorboard": False,
    "run.report": False,
    "run.device": "cpu",
    "run.threads": 1,
    "aux.kind": "softmax",
    "aux.heads": "each",
    "aux.backend": "reference",
}


def synthetic_source(seed: int = 0, n_images: int = 20, img_dim: int = 12) -> MemorySource:
    """Two captions an image; a caption names some of the things whose vectors are the image's region features."""
    rng = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(n_images), 2)
    n_text, n_regions = rng.integers(2, 7, len(image_of)), rng.integers(2, 6, n_images)
    things, table = rng.integers(0, 20, (n_images, 5)), rng.normal(size=(20, img_dim))
    texts = np.zeros((len(image_of), 8), dtype=np.int64)
    features, boxes = np.zeros((n_images, 5, img_dim)), np.zeros((n_images, 5, 7))
    for image, count in enumerate(n_regions.tolist()):
        features[image, :count], boxes[image, :count] = table[things[image, :count]], rng.random((count, 7))
    for caption, image in enumerate(image_of.tolist()):
        pieces = 5 + rng.choice(things[image, : n_regions[image]], n_text[caption])
        texts[caption, : n_text[caption] + 2] = [2, *pieces, 3]
    return MemorySource(
        torch.from_numpy(texts),
        n_text,
        torch.from_numpy(features).float(),
        torch.from_numpy(boxes).float(),
        n_regions,
        image_of,
    )


def write_databases(root: Path, rule: BoxRule | None = None) -> Path:
    """The synthetic pairs in the published formats, under the folder names of a scene set with a validation split."""
    source = synthetic_source()
    special = {"UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4}
    for split in ("train", "val"):
        with TextDBWriter(root / "txt" / f"{split}.db", special, VOCABULARY, "vocab") as texts:
            for caption, (row, size) in enumerate(zip(source.texts.tolist(), source.n_text, strict=True)):
                texts.write(str(caption), row[1 : size + 1], f"{source.image_of[caption]}.npz")
    with ImageDBWriter(root / "img", rule, dtype="float32") as images:
        for image, size in enumerate(source.n_regions):
            norm_bb = source.boxes[image, :size, :6].numpy()
            images.write(f"{image}.npz", source.features[image, :size].numpy(), norm_bb)
    return root


def small_config(out: Path | str, **fields: Any) -> TrainConfig:
    """A run of seconds; ``fields`` are written ``optim__lr=1e-3``."""
    values = SMALL | {"run.out": str(out)} | {name.replace("__", "."): value for name, value in fields.items()}
    return load_config(None, [word for name, value in values.items() for word in (f"--{name}", str(value))])


def small_run(config: TrainConfig, progress: bool = False, **options: Any) -> TrainResult:
    """Runs a configuration on the synthetic pairs."""
    accelerator, source = build_accelerator(config.run), synthetic_source()
    return train_on(config, accelerator, source, vocab_size=VOCABULARY, progress=progress, **options)


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what the clock and the machine decide."""
    return [{k: v for k, v in r.items() if k not in ("memory", "pairs_per_second", "seconds")} for r in history]


if __name__ == "__main__":
    small_run(small_config(**json.loads(sys.argv[1])))
