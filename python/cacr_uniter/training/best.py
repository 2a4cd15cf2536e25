"""The weights that did best in a validation, kept in ``best`` beside the newest checkpoints.

``best/uniter.json`` holds the sizes, ``best/model.safetensors`` the weights and, in its header, step, metric, value,
what it was measured on and heads; the one file is written beside and renamed, so that a kill leaves the old weights or
the new ones.
``best/checksums.json`` is taken away before and written after it: a kill between leaves weights without checksums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cacr_uniter.files import flush, replacing, write_json
from cacr_uniter.model import UniterForRetrieval
from cacr_uniter.model.checkpoint import heads_record
from cacr_uniter.training.checkpoint import MODEL, SIZES, SUMS, checksum, plain_tensors, readable_errors

BEST = "best"
#: value of a validation record that is to be large
METRICS: dict[str, Callable[[dict[str, Any]], float]] = {
    "mean_r1": lambda record: (record["ir_r1"] + record["tr_r1"]) / 2,
    "ir_r1": lambda record: record["ir_r1"],
    "tr_r1": lambda record: record["tr_r1"],
    "mean_rank": lambda record: -(record["ir_rank"] + record["tr_rank"]) / 2,
}


class Best:
    """The best weights so far of one run; only its main process offers and writes.

    Args:
        out: folder of the run.
        metric: one of ``METRICS``, or ``none`` to keep no weights.
        start: steps already done by the run of this folder: at 0 no weights are its own. Weights of a later step, left
            by a run that was killed, give way to the next ones.
        heads: heads that the run trained or loaded, if that is known.
        measured: what the validations to come measure on (``validation.measure``), None if none comes. A value of
            another measure or metric is not compared.

    Attributes:
        remark: a sentence about weights whose value is not compared, or nothing.
    """

    def __init__(
        self,
        out: Path,
        metric: str,
        start: int = 0,
        heads: tuple[str, ...] | None = None,
        measured: str | None = None,
    ) -> None:
        self.folder, self.metric, self.heads, self.measured = out / BEST, metric, heads, measured
        self.step, self.value, self.remark = -1, -math.inf, ""
        found = _header(self.folder / MODEL)
        if not found or int(found["step"]) > start or start == 0 or metric == "none":
            return
        if found["metric"] == metric and measured in (None, found.get("measured")):
            self.step, self.value = int(found["step"]), float(found["value"])
        elif measured is not None:
            self.remark = (
                f"the best weights so far, of step {found['step']}, were chosen by {found['metric']} on "
                f"{found.get('measured') or 'unknown settings'}, now it is {metric} on {measured}: they are not "
                "compared, the next validation starts anew"
            )

    def offer(self, record: dict[str, Any], model: UniterForRetrieval) -> bool:
        """Keeps the model's weights if its validation is better than all before. Returns whether it did.

        Raises:
            UserError: the disk is full or refuses; the weights kept before are untouched.
        """
        if self.metric == "none":
            return False
        value = METRICS[self.metric](record)
        if not value > self.value:
            return False
        header = {"step": str(record["step"]), "metric": self.metric, "value": repr(value)}
        header |= {"measured": self.measured or "", **heads_record(self.heads)}
        with readable_errors(f"best weights {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SIZES, model.config.to_dict())
            with replacing(self.folder / MODEL) as partial:
                save_file(plain_tensors(model.state_dict()), partial, metadata=header)
                sums = {MODEL: checksum(partial), SIZES: checksum(self.folder / SIZES)}
                (self.folder / SUMS).unlink(missing_ok=True)
                flush(self.folder)
            write_json(self.folder / SUMS, {"crc32": sums})
            flush(self.folder)
        self.step, self.value = record["step"], value
        return True

    @property
    def path(self) -> Path | None:
        """The folder, if weights were kept."""
        return self.folder if self.step >= 0 else None

    def __str__(self) -> str:
        shown = -self.value if self.metric == "mean_rank" else self.value
        return f"step {self.step}, {self.metric} {shown:.2f}: {self.folder}"


def set_aside(out: Path) -> str:
    """Renames the best weights of an earlier run in ``out``. Returns a sentence about it, nothing if there are none.

    Raises:
        UserError: the disk refuses.
    """
    folder = out / BEST
    if not folder.exists():
        return ""
    aside = next(path for number in count(1) if not (path := out / f"{BEST}-{number}").exists())
    with readable_errors(f"best weights {aside}"):
        folder.rename(aside)
    return f"{folder} is of an earlier run, which this one does not continue: it is called {aside} now"


def _header(path: Path) -> dict[str, str]:
    """Step, metric, value and measure of weights kept before; nothing of a file that is missing, strange or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            found = dict(file.metadata() or {})
            int(found["step"]), float(found["value"]), found["metric"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}
    return found
