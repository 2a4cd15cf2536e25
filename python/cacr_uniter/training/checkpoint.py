"""Checkpoints: written whole or not at all, read without executing anything.

A checkpoint is the folder ``step-00000500`` with ``model.safetensors`` (published keys; its header tells which heads
were trained or loaded), ``optimizer.safetensors``,
``uniter.json`` (model sizes) and ``state.json`` (step, configuration, sizes and checksums of the other files). It is
written as ``.part-step-...``, flushed to the disk and renamed: under its final name it is complete.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cacr_uniter.errors import ProcessError, UserError
from cacr_uniter.files import flush, parse_json
from cacr_uniter.model.checkpoint import heads_record, recorded_heads

FORMAT = 1
MODEL, OPTIMIZER, SIZES, STATE = "model.safetensors", "optimizer.safetensors", "uniter.json", "state.json"
#: checksums of weights that are kept without the state of a run
SUMS = "checksums.json"
NAME = re.compile(r"step-(\d{8,})")
PART = ".part-"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Args:
        step: optimizer steps done.
        model: state dict with the published keys.
        optimizer: flat tensors, named ``<parameter>.<exp_avg | exp_avg_sq | step>``.
        model_config: model sizes.
        config: the run's configuration.
        extra: further plain values (loss scale).
        heads: heads that the run trained or loaded; None if an older checkpoint does not tell.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    model_config: dict[str, Any]
    config: dict[str, Any]
    extra: dict[str, Any]
    heads: tuple[str, ...] | None


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps in a run's ``checkpoints`` folder."""
    found = checkpoints(folder)
    return found[-1] if found else None


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, by step."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Steps of a checkpoint by its name; -1 for another name."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def unfinished(path: Path) -> str | None:
    """``step 86 of 300`` where the newest checkpoint of a run is not of its last step.

    None of a finished run, where there is no run, and of a damaged checkpoint, which whoever loads it complains of.

    Args:
        path: the run's folder, or ``best`` in it.
    """
    last = newest((path.parent if path.name == "best" else path) / "checkpoints")
    try:
        steps = 0 if last is None else int(_read_json(last, STATE)["config"]["optim"]["steps"])
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return f"step {step_of(last)} of {steps}" if last is not None and step_of(last) < steps else None


def kept(folder: Path) -> str:
    """What a run that ends early leaves in its ``checkpoints`` folder, in words."""
    last = newest(folder)
    return f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"


@contextmanager
def naming_kept(folder: Path) -> Iterator[None]:
    """Adds to a problem, which may be this process's alone, what is ``kept``."""
    try:
        yield
    except UserError as error:
        raise ProcessError(f"{error}; {kept(folder)}") from error


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes ``checkpoint`` into ``folder`` and then removes all but the ``keep`` newest.

    Raises:
        UserError: the disk is full or refuses; what was there before is untouched.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    part = folder / (PART + final.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_file(plain_tensors(checkpoint.model), part / MODEL, metadata=heads_record(checkpoint.heads))
        save_file(plain_tensors(checkpoint.optimizer), part / OPTIMIZER)
        (part / SIZES).write_text(json.dumps(checkpoint.model_config, indent=2), encoding="utf-8")
        state = {
            "format": FORMAT,
            "step": checkpoint.step,
            "config": checkpoint.config,
            "extra": checkpoint.extra,
            "bytes": {name: (part / name).stat().st_size for name in (MODEL, OPTIMIZER, SIZES)},
            "crc32": {name: checksum(part / name) for name in (MODEL, OPTIMIZER, SIZES)},
        }
        (part / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        for path in (*part.iterdir(), part):
            flush(path)
        if final.exists():
            _remove(final)
        os.rename(part, final)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be written ({_reason(error)}): {kept(folder)}; free some space and run the "
            "same command again"
        ) from error
    prune(folder, keep)
    return final


def prune(folder: Path, keep: int) -> None:
    """Removes what a killed run left half done, and all but the ``keep`` newest checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        _remove(path)
    for path in folder.glob(f"{PART}*"):
        shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint written by ``save``.

    Raises:
        UserError: it is missing, incomplete or damaged.
    """
    state = _read_json(path, STATE)
    if state.get("format") != FORMAT:
        raise UserError(f"checkpoint {path}: format {state.get('format')!r}, this program reads {FORMAT}")
    try:
        reason = _difference(path, state["bytes"], state.get("crc32", {}))
        if reason is not None:
            raise _damaged(path, reason)
        return Checkpoint(
            step=int(state["step"]),
            model=load_file(path / MODEL),
            optimizer=load_file(path / OPTIMIZER),
            model_config=_read_json(path, SIZES),
            config=dict(state["config"]),
            extra=dict(state["extra"]),
            heads=recorded_heads(path / MODEL),
        )
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{STATE} is not as it was written: {type(error).__name__} {error}") from error


def verify_weights(path: Path) -> None:
    """Compares a run's weights, and the sizes beside them, with the checksums in their folder.

    Weights without checksums, of other programs or older runs, are taken as they are.

    Raises:
        UserError: a file is not what was written.
    """
    for record in (path.with_name(STATE), path.with_name(SUMS)):
        if path.name != MODEL or not record.is_file():
            continue
        try:
            sums = parse_json(record.read_text(encoding="utf-8"))["crc32"]
            reason = _difference(path.parent, {}, {name: sums[name] for name in (MODEL, SIZES)})
        except (KeyError, TypeError):  # none in it
            continue
        except (OSError, ValueError) as error:
            reason = f"{record.name}: {error}"
        if reason is not None:
            raise UserError(f"checkpoint {path.parent} is damaged ({reason}): copy it again, or take another one")


def _difference(path: Path, sizes: dict[str, int], sums: dict[str, int]) -> str | None:
    """How the files differ from what was written, if they do; older checkpoints have no sums."""
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            came = "it is missing" if actual is None else f"it has {actual}"
            return f"{name} should have {size} bytes, {came}"
    changed = [name for name, expected in sums.items() if checksum(path / name) != expected]
    return f"{changed[0]} is not what was written" if changed else None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            found = zlib.crc32(piece, found)
    return found


def plain_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them."""
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimizer whose groups list their parameters' ``names``, as flat tensors."""
    return {
        f"{name}.{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``; moments go to the parameter's device."""
    split: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, key = full.rsplit(".", 1)
        split.setdefault(name, {})[key] = value
    known = {name for group in optimizer.param_groups for name in group["names"]}
    if set(split) - known:
        raise UserError(
            f"the checkpoint trains {sorted(set(split) - known)[0]}, which this run does not: resume with the same "
            "model.freeze_layers"
        )
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in split:
                optimizer.state[parameter] = {key: x.to(parameter.device) for key, x in split[name].items()}


@contextmanager
def readable_errors(what: str) -> Iterator[None]:
    """Turns a refused write (full disk, no permission) into a ``UserError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "free some space or choose another run.out" if full else "choose another run.out"
        raise UserError(f"{what} could not be written ({_reason(error)}): {cure}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the device"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _remove(path: Path) -> None:
    """Renames before deleting, so that a half deleted folder never looks complete."""
    doomed = path.with_name(f"{PART}old-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _damaged(path: Path, reason: str) -> UserError:
    others = [other for other in checkpoints(path.parent) if other != path]
    advice = (
        f"delete it to continue from {others[-1]}"
        if others
        else "there is no other one in its folder: start again with run.overwrite true"
    )
    return UserError(f"checkpoint {path} is damaged ({reason}): {advice}")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = parse_json((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is no checkpoint of this program: {name} is missing") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{name}: {error}") from error
    if not isinstance(value, dict):
        raise _damaged(path, f"{name} holds no object")
    return value
