"""Refusing configurations that cannot run, and comparing those of the two parts of a resumed run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cacr_uniter.errors import UserError
from cacr_uniter.training.config import AuxConfig, TrainConfig

#: fields that may differ between the two parts of a resumed run: they change neither the pairs of a step nor its losses
#: (pairs_per_forward shifts dropout's draws)
FREE_FIELDS = {
    "run": {
        *("out", "memory_limit", "threads", "resume", "overwrite", "checkpoint_every", "keep", "log_every"),
        *("tensorboard", "report", "validate_every", "best", "validation_anchors", "validation_candidates", "device"),
    },
    "data": {"scenes", "text", "images", "val_text", "val_images", "cache", "cache_limit", "workers"},
    "model": {"checkpoint", "activation_checkpointing"},
    "batch": {"score_chunk", "pairs_per_forward"},
    "aux": {"backend"},
}

#: fields of the auxiliary loss that only CACR reads
CACR_ONLY = ("kind", "row_reduction", "stop_gradient", "projection_scale", "backend")

Bound = tuple[str, Callable[[float], bool], str]

POSITIVE = (lambda value: value > 0, "a positive number")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or a positive number")

#: fields of a section, what their numbers must fulfil, in words
BOUNDS: dict[str, tuple[Bound, ...]] = {
    "data": (("workers", *NOT_NEGATIVE),),
    "model": (
        ("freeze_layers initializer_range", *NOT_NEGATIVE),
        ("dropout", lambda value: 0 <= value < 1, "a probability from 0 to below 1"),
    ),
    "batch": (("anchors negatives pool score_chunk", *POSITIVE),),
    "loss": (("margin", *NOT_NEGATIVE),),
    "aux": (("weight", *NOT_NEGATIVE), ("projection_scale reference_batch", *POSITIVE)),
    "optim": (("lr steps eps", *POSITIVE), ("weight_decay clip", *NOT_NEGATIVE)),
    "run": (
        ("checkpoint_every keep log_every validation_anchors", *POSITIVE),
        ("validate_every", *NOT_NEGATIVE),
        ("validation_candidates", lambda value: value > 1, "2 or more"),
    ),
}


def differences(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """``section.field: saved -> now`` of the fields that decide numbers and differ.

    A field that is newer than the saved configuration had its default.
    """
    found, defaults = [], TrainConfig().as_dict()
    for section, values in config.as_dict().items():
        for name, value in values.items():
            before = saved.get(section, {}).get(name, defaults[section][name])
            if name not in FREE_FIELDS.get(section, set()) and before != value:
                found.append(f"{section}.{name}: {before} -> {value}")
    return found


def check_same_data(saved: dict[str, Any] | None, now: dict[str, Any] | None, checkpoint: Path) -> None:
    """Refuse to go on with other pairs than those of a checkpoint; both as ``RetrievalDataset.identity``.

    Nothing is compared where one is unknown: in checkpoints of earlier versions, or for pairs from no database.

    Raises:
        UserError: tells what changed.
    """
    if saved is None or now is None or saved == now:
        return
    sizes = [name for name in now if name != "sha256" and saved.get(name) != now[name]]
    changed = "; ".join(f"{name}: {saved.get(name)} -> {now[name]}" for name in sizes)
    raise UserError(
        f"checkpoint {checkpoint} belongs to a run on other training data "
        f"({changed or 'other ids, lengths, images or vocabulary of the captions'}): give the same captions and images "
        "in data.text and data.images, wherever they lie now, another run.out, or run.overwrite"
    )


def check(config: TrainConfig, processes: int = 1) -> None:
    """Refuse a configuration that cannot run.

    Raises:
        UserError: names the field, what came and what to do.
    """
    batch, optim, run = config.batch, config.optim, config.run
    sections = config.as_dict()
    for section, (names, holds, words) in ((s, bound) for s, bounds in BOUNDS.items() for bound in bounds):
        for name in names.split():
            value = sections[section][name]
            if isinstance(value, int | float) and not (math.isfinite(value) and holds(value)):
                raise UserError(f"{section}.{name} is {value}: give {words}")
    if batch.anchors % processes:
        raise UserError(
            f"batch.anchors is {batch.anchors} for {processes} processes: give a multiple of the number of processes"
        )
    if batch.mining == "hard" and batch.pool < batch.negatives:
        raise UserError(
            f"batch.pool is {batch.pool}, less than batch.negatives {batch.negatives}: give a larger pool, or "
            "batch.mining random"
        )
    if batch.contrasts and batch.mining != "shared":
        raise UserError(f"batch.contrasts with batch.mining {batch.mining}: they need batch.mining shared")
    if batch.pairs_per_forward < batch.negatives + 1:
        raise UserError(
            f"batch.pairs_per_forward is {batch.pairs_per_forward}, less than one group of {batch.negatives + 1} "
            "pairs: a group is compared inside one forward; raise it or lower batch.negatives"
        )
    if optim.warmup < 0 or optim.warmup > optim.steps:
        raise UserError(f"optim.warmup is {optim.warmup}: it must lie between 0 and optim.steps ({optim.steps})")
    if not 0 <= run.seed < 2**63:
        raise UserError(f"run.seed is {run.seed}: give a whole number from 0 to 2^63 - 1")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"optim.betas is {list(optim.betas)}: give two numbers from 0 to below 1")
    if config.data.max_text < 1 and config.data.max_text != -1:
        raise UserError(f"data.max_text is {config.data.max_text}: give a number of word pieces, or -1 for all")
    _check_aux(config.aux)


def _check_aux(aux: AuxConfig) -> None:
    if aux.loss == "none":
        return
    if not aux.layers or len(set(aux.layers)) != len(aux.layers):
        raise UserError(f"aux.layers is {aux.layers}: give different layer numbers, for example [-1]")
    if aux.loss == "cacr" and (aux.kind == "probs") != (aux.heads == "mean"):
        raise UserError(
            f"aux.kind {aux.kind} with aux.heads {aux.heads}: probabilities averaged over heads are kind probs and "
            "heads mean, both or neither"
        )
    if aux.source == "qk" and (aux.loss != "cacr" or aux.heads in ("mean", "mean-scores")):
        raise UserError(
            f"aux.source qk with aux.loss {aux.loss} and aux.heads {aux.heads}: the q/k kernel computes cacr with "
            "heads each or sum-scores; take aux.source scores"
        )
    if aux.loss != "cacr" and aux.heads not in ("each", "mean"):
        raise UserError(f"aux.heads is {aux.heads}: {aux.loss} works on probabilities, give mean (IAIS) or each")
    if aux.loss != "cacr":
        for name, default in ((name, getattr(AuxConfig(), name)) for name in CACR_ONLY):
            if getattr(aux, name) != default:
                raise UserError(
                    f"aux.{name} is {getattr(aux, name)}: it belongs to aux.loss cacr and {aux.loss} would ignore it; "
                    f"leave it out (or give {default})"
                )
