"""Results as CSV: one file a subject, fixed columns, rows are only appended. Standard library only."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cacr_uniter.errors import UserError

Row = dict[str, str]

REPORT = "report.json"
"""What became of the stages of `cacr bench gpu-report`, in the folder of its results."""

PROVENANCE = ("date", "commit", "device", "cacr", "torch", "triton", "cuda", "load")
SHAPE = ("shape", "batch", "heads", "n_text", "n_vision", "head_dim", "dtype")

COLUMNS: dict[str, tuple[str, ...]] = {
    "ceilings": (*PROVENANCE, "what", "value", "unit"),
    "kernels": (
        *PROVENANCE,
        *SHAPE,
        *("variant", "kind", "contender", "direction", "status"),
        *("median_ms", "p20_ms", "p80_ms", "repeats", "processes", "timer"),
        *("input_mb", "extra_mb", "floor_ms", "bound", "gflop", "mbytes", "loss_error", "gradient_error", "note"),
    ),
    "training": (
        *PROVENANCE,
        *(
            "model",
            "auxiliary",
            "precision",
            "checkpointing",
            "frozen_layers",
            "n_text",
            "n_vision",
            "pairs",
            "matched",
        ),
        *("status", "median_ms", "p20_ms", "p80_ms", "repeats", "peak_mb", "limit_mb", "largest_pairs", "note"),
    ),
}
"""Columns of ``<name>.csv``. An ``mb`` is 10^6 bytes. ``status`` is one of ``STATUSES``."""

STATUSES = ("ok", "oom", "wrong", "unchecked", "skipped", "timeout", "error")
"""``unchecked``: not timed because its float64 reference needs too much memory."""


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def any_in(folder: Path) -> bool:
    """Whether a folder holds results."""
    return any((folder / name).is_file() for name in (REPORT, *(f"{name}.csv" for name in COLUMNS)))


def append(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows to ``folder/name.csv``; a missing column is empty.

    Raises:
        UserError: the file has other columns, a row has a column that the file has not, or the folder's results are of
            another device.
    """
    path = folder / f"{name}.csv"
    columns = COLUMNS[name]
    rows = list(rows)
    _check_device(folder, {str(row["device"]) for row in rows if row.get("device")})
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size:
        _check_header(path, name)
        _drop_torn_line(path)
    fresh = not path.is_file() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            unknown = sorted(set(row) - set(columns))
            if unknown:
                raise UserError(f"{path}: a row has unknown columns {', '.join(unknown)}")
            writer.writerow({column: _text(row.get(column)) for column in columns})


def _drop_torn_line(path: Path) -> None:
    """Cuts off the end of a file that an interrupted write left without a newline."""
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def read(folder: Path, name: str) -> list[Row]:
    """All rows of ``folder/name.csv`` in the order of their measurement; none if there is no file."""
    path = folder / f"{name}.csv"
    if not path.is_file():
        return []
    _check_header(path, name)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _check_header(path: Path, name: str) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != COLUMNS[name]:
        raise UserError(
            f"{path} has other columns than this version writes: move it aside, or give another folder with --out"
        )


def _check_device(folder: Path, devices: set[str]) -> None:
    for path in (folder / f"{name}.csv" for name in COLUMNS):
        if not path.is_file():
            continue
        with path.open(newline="", encoding="utf-8") as file:
            device = next(csv.DictReader(file), {}).get("device")
        other = devices - {device}
        if device and other:
            raise UserError(f"{path} holds results of {device}, not of {other.pop()}: give another folder with --out")


def newest(rows: Iterable[Row], key: Iterable[str]) -> list[Row]:
    """The last row of every combination of the ``key`` columns, in the order in which they first appeared.

    A row that was skipped, or late, says nothing about an earlier one that is good.
    """
    names = tuple(key)
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        place = tuple(row[name] for name in names)
        good = place in found and found[place].get("status", "ok") == "ok"
        if place not in found or not (row.get("status") == "skipped" or (good and row.get("status") == "timeout")):
            found[place] = row
    return list(found.values())


KERNEL_KEY = (*SHAPE, "variant", "kind", "contender", "direction")
TRAINING_KEY = (
    *("model", "auxiliary", "precision", "checkpointing", "frozen_layers", "n_text", "n_vision", "pairs", "matched"),
    "limit_mb",
)
