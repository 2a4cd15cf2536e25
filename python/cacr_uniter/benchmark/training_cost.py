"""Step time and peak memory of UNITER with and without the auxiliary loss, and the largest batch that fits."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cacr_uniter.benchmark.contenders import OURS, names
from cacr_uniter.benchmark.timing import PeakMemory, quantile
from cacr_uniter.errors import is_out_of_memory
from cacr_uniter.model import UniterConfig, UniterForRetrieval
from cacr_uniter.training.build import build_accelerator, build_model, limit_memory
from cacr_uniter.training.config import AuxConfig, BatchConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cacr_uniter.training.optim import build_optimizer, trained_parameters
from cacr_uniter.training.source import MemorySource
from cacr_uniter.training.step import Portion, Stepper

AUXILIARY: dict[str, dict[str, Any]] = {
    "none": {"loss": "none"},
    "eager": {"backend": "reference", "kind": "scores", "heads": "each"},
    "fused": {"kind": "scores", "heads": "each"},
    "qk": {"kind": "scores", "heads": "each", "source": "qk"},
    "recipe": {},
}
"""No auxiliary loss; CACR as printed (Eq. 6): eager closed form, fused kernels, fused from queries and keys; and what
`cacr train` runs unless told otherwise (probabilities averaged over heads)."""

TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
CUDA_CONTEXT = 700_000_000
"""Bytes of a card that its driver and libraries take: under a limit torch's allocator gets the rest."""

MOST_PAIRS = 4096


@dataclass(frozen=True)
class Setting:
    """One training configuration; plain values, sent to another process.

    Args:
        model: ``tiny``, ``base`` or ``large``.
        auxiliary: key of ``AUXILIARY``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        pairs: in one forward: ``pairs / group`` groups of a matched pair and its negatives.
        group: pairs of a group; only its matched pair has the auxiliary loss.
        memory_limit: bytes of the card that is imitated (GPU); a CPU process is limited by its ``pool``.
        search: look for the largest number of pairs that fits.
    """

    model: str
    auxiliary: str
    precision: str
    checkpointing: bool
    frozen_layers: int
    n_text: int
    n_vision: int
    pairs: int
    group: int
    device: str
    seconds: float
    memory_limit: int | None = None
    search: bool = False

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that name the setting."""
        names = ("model", "auxiliary", "precision", "checkpointing", "frozen_layers", "n_text", "n_vision", "pairs")
        limit = None if self.memory_limit is None else self.memory_limit / 1e6
        return {name: getattr(self, name) for name in names} | {"matched": self.pairs // self.group, "limit_mb": limit}

    def config(self) -> TrainConfig:
        """The training configuration: random negatives, one forward a step."""
        size: dict[str, Any] = {"size": self.model} if self.model != "tiny" else TINY
        return TrainConfig(
            model=ModelConfig(freeze_layers=self.frozen_layers, activation_checkpointing=self.checkpointing, **size),
            batch=BatchConfig(
                anchors=max(self.pairs // self.group, 1),
                halves="image",
                negatives=self.group - 1,
                mining="random",
                pairs_per_forward=self.pairs,
            ),
            aux=AuxConfig(**AUXILIARY[self.auxiliary]),
            optim=OptimConfig(steps=1_000_000, warmup=10),
            run=RunConfig(device="cuda" if self.device == "cuda" else "cpu", precision=self.precision),  # type: ignore[arg-type]
        )


def backend_of(setting: Setting) -> str:
    """The backend that computes the auxiliary loss of a setting; empty without one."""
    aux = setting.config().aux
    if aux.loss == "none":
        return ""
    if aux.backend != "auto":
        return aux.backend
    variant, dtype = ("qk" if aux.source == "qk" else "scores"), {"fp16": "float16", "bf16": "bfloat16"}
    first = names(variant, aux.kind, setting.device, dtype.get(setting.precision, "float32"))[0]
    return first if first in OURS else "reference"


def synthetic_source(n_text: int, n_vision: int, group: int, img_dim: int) -> MemorySource:
    """Random captions of ``n_text`` word pieces and images of ``n_vision`` regions, enough of them for one group."""
    generator = torch.Generator().manual_seed(0)
    count = group + 8
    texts = torch.randint(1000, 20000, (count, n_text + 2), generator=generator)
    features = torch.randn(count, n_vision, img_dim, generator=generator)
    boxes = torch.rand(count, n_vision, 7, generator=generator)
    sizes = [np.full(count, size, dtype=np.int64) for size in (n_text, n_vision)]
    return MemorySource(texts, sizes[0], features, boxes, sizes[1], np.arange(count))


class Trainer:
    """The steps of `cacr train` on a batch that is ready."""

    def __init__(self, setting: Setting) -> None:
        config = setting.config()
        accelerator = build_accelerator(config.run)
        self.device = accelerator.device
        if setting.memory_limit is not None and self.device.type == "cuda":
            limit_memory(self.device, setting.memory_limit - CUDA_CONTEXT)
        sizes = {"tiny": UniterConfig(**TINY), "base": UniterConfig.base(), "large": UniterConfig.large()}
        with self.device:  # a CPU takes seconds for the numbers of the large one
            model, _ = build_model(config.model, sizes[setting.model], seed=0)
        model.to(self.device)
        self.model: UniterForRetrieval = model
        self.source = synthetic_source(setting.n_text, setting.n_vision, setting.group, model.config.img_dim)
        parameters = trained_parameters(model)
        optimizer = accelerator.prepare_optimizer(build_optimizer(parameters, config.optim), device_placement=False)
        self.stepper = Stepper(model, list(parameters.values()), optimizer, config, self.source, accelerator)
        self.group = setting.group

    def portion(self, groups: int) -> Portion:
        """``groups`` groups of pairs on the host."""
        first = next(self.stepper.portions(0))
        rows = first.rows[: self.group].repeat(groups)
        repeated = {name: getattr(first.pairs, name)[rows] for name in ("caption", "image", "sizes")}
        pairs = replace(first.pairs, **repeated)
        return replace(first, groups=first.groups[:1] * groups, pairs=pairs, rows=torch.arange(len(rows)))

    def step(self, portion: Portion) -> None:
        """One optimizer step, finished on the device."""
        self.stepper.begin(0)
        self.stepper.backward(portion)
        self.stepper.gather()
        self.stepper.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def fits(self, groups: int) -> bool:
        """Whether a step of so many groups has enough memory."""
        try:
            self.step(self.portion(groups))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        else:
            fits = True
        self.stepper.attention.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fits


def measure_setting(setting: Setting) -> dict[str, Any]:
    """Row of one setting: time and peak memory of a step, and the most pairs that fit; out of memory is a result."""
    backend = backend_of(setting)
    row: dict[str, Any] = {"status": "ok", "note": f"backend {backend}" if backend else ""}
    try:
        with PeakMemory(setting.device) as peak:
            trainer = Trainer(setting)
            row |= _steps(trainer, setting)
        if peak.extra is not None:
            row["peak_mb"] = _peak(setting.device, peak.extra) / 1e6
        if setting.search:
            row["largest_pairs"] = setting.group * largest(trainer.fits, 1, MOST_PAIRS // setting.group)
    except Exception as error:
        if not is_out_of_memory(error):
            row |= {"status": "error"}
        else:
            row |= {"status": "oom"}
        row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    trainer = None  # type: ignore[assignment]
    gc.collect()
    if setting.device == "cuda":
        with suppress(RuntimeError):  # a dead context: the row says why
            torch.cuda.empty_cache()
    return row


def _steps(trainer: Trainer, setting: Setting) -> dict[str, Any]:
    portion = trainer.portion(setting.pairs // setting.group)
    if not trainer.fits(setting.pairs // setting.group):
        return {"status": "oom", "note": "a step of this many pairs does not fit"}
    trainer.step(portion)
    samples: list[float] = []
    deadline = time.perf_counter() + setting.seconds
    while len(samples) < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        trainer.step(portion)
        samples.append(1e3 * (time.perf_counter() - start))
    times = tuple(samples)
    quantiles = {f"{name}_ms": quantile(times, q) for name, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}
    return {**quantiles, "repeats": len(times)}


def _peak(device: str, extra: int) -> int:
    """On a GPU what the allocator reserved, which is what a smaller card would have to hold."""
    return torch.cuda.max_memory_reserved() if device == "cuda" else extra


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest number up to ``most`` that fits (within a sixteenth above 16); 0 if ``start`` does not.

    Doubles until one does not fit, then halves the gap.
    """
    if not fits(start):
        return 0
    low, high = start, most + 1
    while low < most:
        tried = min(2 * low, most)
        if not fits(tried):
            high = tried
            break
        low = tried
    while high - low > max(1, low // 16) and high <= most:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
