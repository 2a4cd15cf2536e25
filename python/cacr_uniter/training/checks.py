"""Refusing configurations that cannot run, and comparing those of the two parts of a resumed run."""

from __future__ import annotations

import math
from typing import Any

from cacr_uniter.errors import UserError
from cacr_uniter.training.config import AuxConfig, TrainConfig

#: fields that may differ between the two parts of a resumed run: they change no number
FREE_FIELDS = {
    "run": {
        *("out", "memory_limit", "threads", "resume", "overwrite", "checkpoint_every", "keep", "log_every"),
        *("tensorboard", "report", "validate_every", "validation_anchors", "validation_candidates", "device"),
    },
    "data": {"scenes", "text", "images", "val_text", "val_images", "cache", "cache_limit", "workers"},
    "model": {"checkpoint", "activation_checkpointing"},
    "batch": {"score_chunk"},
    "aux": {"backend"},
}


def differences(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """``section.field: saved -> now`` of the fields that decide numbers and differ."""
    found = []
    for section, values in config.as_dict().items():
        for name, value in values.items():
            before = saved.get(section, {}).get(name)
            if name not in FREE_FIELDS.get(section, set()) and before != value:
                found.append(f"{section}.{name}: {before} -> {value}")
    return found


def check(config: TrainConfig, processes: int = 1) -> None:
    """Refuse a configuration that cannot run.

    Raises:
        UserError: names the field, what came and what to do.
    """
    batch, aux, optim, model, run = config.batch, config.aux, config.optim, config.model, config.run
    positive = {
        "batch.anchors": batch.anchors,
        "batch.negatives": batch.negatives,
        "batch.score_chunk": batch.score_chunk,
        "optim.steps": optim.steps,
        "run.checkpoint_every": run.checkpoint_every,
        "run.keep": run.keep,
        "run.log_every": run.log_every,
        "optim.lr": optim.lr,
    }
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} is {value}: give a positive number")
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
    if not 0 <= model.dropout < 1:
        raise UserError(f"model.dropout is {model.dropout}: give a probability from 0 to below 1")
    if optim.warmup < 0 or optim.warmup > optim.steps:
        raise UserError(f"optim.warmup is {optim.warmup}: give 0 to optim.steps ({optim.steps})")
    if not 0 <= run.seed < 2**63:
        raise UserError(f"run.seed is {run.seed}: give a whole number from 0 to 2^63 - 1")
    _check_aux(aux)


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
    if aux.loss != "cacr" and (aux.stop_gradient != "none" or aux.projection_scale != 1.0):
        raise UserError(f"aux.stop_gradient and aux.projection_scale belong to cacr, aux.loss is {aux.loss}")
