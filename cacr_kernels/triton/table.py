"""The user's launch table: entries that `cacr bench tune` measured on one GPU, in place of the built-in ones there.

A JSON file, named by the environment variable CACR_LAUNCH_TABLE (empty: none) or ``cacr/launch_table.json`` in the
user's cache folder. It is read once, at the first launch on a GPU, and checked whole: it can choose tiles, warps and
pipeline stages within bounds, and nothing else. An entry holds for GPUs of the name that it was measured on.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .configs import BLOCKS, DTYPES, INTERPRETER, SIZES, Key, Launch, Plan, plan
from .qk_launch import HEADS, QK_BLOCKS, bucket
from .qk_launch import Launch as QKLaunch
from .qk_launch import launch as qk_launch
from .space import fits_the_others

VARIABLE = "CACR_LAUNCH_TABLE"
FORMAT = {"format": "cacr launch table", "version": 1}
#: what an entry may choose, beside SIZES
WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5, 6)
REGISTERS = (None, 96, 128, 160, 192, 224)
LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Measured:
    """Why an entry is there: times in ms, the built-in entry's beside it, and what they were measured with."""

    ms: float
    builtin_ms: float
    calls: str
    date: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Entry:
    """One kernel's launch on GPUs called ``gpu``, of compute capability ``arch`` (10 * major + minor)."""

    gpu: str
    arch: int
    key: Key
    launch: Launch
    measured: Measured


def path() -> Path | None:
    """Where the user's table would be; None if CACR_LAUNCH_TABLE is set and empty, or the user has no home."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "cacr" / "launch_table.json" if os.path.isabs(folder) else None


def present() -> Path | None:
    """The user's table if there is one. One that CACR_LAUNCH_TABLE names must be there."""
    file = path()
    return file if file is not None and (VARIABLE in os.environ or os.path.exists(file)) else None


def read(file: Path) -> list[Entry]:
    """All entries of a file.

    Raises:
        ValueError: it cannot be read, or something in it is not what it should be; says where and what was expected.
    """
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
        value = json.loads(file.read_text(encoding="utf-8"))
        _expect(isinstance(value, dict), "the file", "one JSON object", type(value).__name__)
        _names("the file", value, (*FORMAT, "entries"))
        for name, wanted in FORMAT.items():
            _expect(value[name] == wanted, name, repr(wanted), value[name])
        _expect(isinstance(value["entries"], list), "entries", "a list", type(value["entries"]).__name__)
        entries = [_entry(f"entry {number}", entry) for number, entry in enumerate(value["entries"])]
        seen = [(entry.gpu, entry.key) for entry in entries]
        for number, one in enumerate(seen):
            _expect(one not in seen[:number], f"entry {number}", "every kernel once a GPU", f"{one[1]} again")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the launch table {file} cannot be used: {error}. Measure it again with `cacr bench tune`, remove it, or "
            f"set {VARIABLE} to another file (or to nothing, for the built-in table)"
        ) from error
    return entries


def write(file: Path, entries: Iterable[Entry]) -> None:
    """Writes entries whole or not at all: a neighbour first, then a rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump({**FORMAT, "entries": [_plain(entry) for entry in entries]}, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """``old`` with the kernels of ``new`` replaced."""
    found = {(entry.gpu, entry.key): entry for entry in (*old, *new)}
    return list(found.values())


def _plain(entry: Entry) -> dict[str, Any]:
    launch = asdict(entry.launch)
    return {"gpu": entry.gpu, "arch": entry.arch, **entry.key._asdict(), **launch, "measured": asdict(entry.measured)}


def _expect(good: bool, where: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"{where}: expected {expected}; got {str(got)[:80]!r}")


def _names(where: str, value: Mapping[str, Any], names: Iterable[str]) -> None:
    wanted = sorted(names)
    _expect(sorted(value) == wanted, where, f"the names {', '.join(wanted)}", ", ".join(sorted(value)))


def _member(where: str, value: Any, allowed: Iterable[Any]) -> Any:
    options = tuple(allowed)
    good = any(type(value) is type(option) and value == option for option in options)
    _expect(good, where, f"one of {', '.join(map(str, options))}", value)
    return value


def _entry(where: str, value: Any) -> Entry:
    _expect(isinstance(value, dict), where, "an object", type(value).__name__)
    _names(where, value, ("gpu", "arch", *Key._fields, "blocks", "num_warps", "num_stages", "registers", "measured"))
    _expect(isinstance(value["gpu"], str) and bool(value["gpu"]), f"{where}, gpu", "the name of a GPU", value["gpu"])
    good_arch = type(value["arch"]) is int and 80 <= value["arch"] < 1000
    _expect(good_arch, f"{where}, arch", "ten times a compute capability from 80 on", value["arch"])
    variant = _member(f"{where}, variant", value["variant"], ("scores", "qk"))
    known = BLOCKS if variant == "scores" else QK_BLOCKS
    kernel = _member(f"{where}, kernel", value["kernel"], known)
    dtype = _member(f"{where}, dtype", value["dtype"], DTYPES)
    head = _member(f"{where}, head_size", value["head_size"], (0,) if variant == "scores" else HEADS)
    _expect(isinstance(value["blocks"], dict), f"{where}, blocks", "an object", value["blocks"])
    _names(f"{where}, blocks", value["blocks"], known[kernel])
    blocks = {name: _member(f"{where}, {name}", value["blocks"][name], SIZES) for name in known[kernel]}
    warps = _member(f"{where}, num_warps", value["num_warps"], WARPS)
    stages = _member(f"{where}, num_stages", value["num_stages"], STAGES)
    caps = REGISTERS if variant == "scores" else (None,)
    registers = _member(f"{where}, registers", value["registers"], caps)
    measured = _measured(f"{where}, measured", value["measured"])
    launch = Launch(blocks, warps, stages, registers)
    return Entry(value["gpu"], value["arch"], Key(variant, kernel, dtype, head), launch, measured)


def _measured(where: str, value: Any) -> Measured:
    _expect(isinstance(value, dict), where, "an object", type(value).__name__)
    _names(where, value, Measured.__dataclass_fields__)
    for name in ("ms", "builtin_ms"):
        good = type(value[name]) in (int, float) and math.isfinite(value[name]) and value[name] > 0
        _expect(good, f"{where}, {name}", "a positive number", value[name])
    for name in ("calls", "date", "torch", "triton"):
        _expect(isinstance(value[name], str), f"{where}, {name}", "text", value[name])
    return Measured(**value)


@cache
def of_gpu(name: str) -> dict[Key, Launch]:
    """What replaces the built-in entries on GPUs called ``name``. The file is read once in a process.

    Entries that were measured beside other built-in ones, and do not fit those of today, are left out with a warning.
    """
    file = present()
    entries = [] if file is None else [entry for entry in read(file) if entry.gpu == name]
    found = {entry.key: entry.launch for entry in entries if usable(entry)}
    if len(found) < len(entries):
        warnings.warn(
            f"the launch table {file}: {len(entries) - len(found)} of {len(entries)} entries for {name} do not fit the "
            "kernels of this version and are left out; `cacr bench tune` measures them again",
            stacklevel=2,
        )
    return found


def usable(entry: Entry) -> bool:
    """Whether results stay right with this entry beside the built-in ones of today."""
    return fits_the_others(entry.key, entry.launch, entry.arch)


def in_use(gpus: Iterable[str]) -> str:
    """One line for people: which table the GPUs of these names use. Raises what ``read`` raises."""
    file = present()
    if file is None:
        return f"built-in (no {path() or 'other'}; `cacr bench tune` measures one)"
    entries = read(file)
    counts = [
        f"{sum(entry.gpu == gpu and usable(entry) for entry in entries)} entries for {gpu}"
        for gpu in dict.fromkeys(gpus)
    ]
    return f"built-in, and {file}: {', '.join(counts) or f'{len(entries)} entries, none for a GPU of this machine'}"


_trial: dict[Key, Launch] | None = None
_used: set[Key] = set()
#: grows with every trial, so that plans made for one are not found in another
_generation = 0


@contextmanager
def trying(launches: Mapping[Key, Launch]) -> Iterator[set[Key]]:
    """``launches`` in place of the user's table, on every device. Yields the keys that calls inside ask for."""
    global _trial, _used, _generation
    before = _trial, _used
    _trial, _used = dict(launches), set()
    _generation += 1
    try:
        yield _used
    finally:
        _trial, _used = before
        _generation += 1


class _Noted(dict[str, Launch]):
    """Kernels of a plan on trial: notes which are asked for."""

    def __init__(self, kernels: Mapping[str, Launch], dtype: str, used: set[Key]) -> None:
        super().__init__(kernels)
        self.dtype, self.used = dtype, used

    def __getitem__(self, name: str) -> Launch:
        self.used.add(Key("scores", name, self.dtype))
        return super().__getitem__(name)


def scores_plan(device: torch.device, dtype: str, interpreter: Plan = INTERPRETER) -> Plan:
    """The plan of the scores kernels for a device; other devices than GPUs belong to the interpreter."""
    if device.type == "cuda":
        assert device.index is not None
        return _scores_plan(device.index, dtype, _generation)
    return interpreter if _trial is None else _replaced(interpreter, dtype, _trial)


@cache
def _scores_plan(index: int, dtype: str, generation: int) -> Plan:
    return _replaced(plan(_arch(index), dtype), dtype, _launches(index))


def _replaced(base: Plan, dtype: str, launches: Mapping[Key, Launch]) -> Plan:
    kernels = {name: launches.get(Key("scores", name, dtype), entry) for name, entry in base.kernels.items()}
    return replace(base, kernels=kernels if _trial is None else _Noted(kernels, dtype, _used))


def qk_plan(kernel: str, device: torch.device, arch: int, dtype: torch.dtype, d: int) -> QKLaunch:
    """The launch of a query/key kernel for a device; ``arch`` 0 is the interpreter."""
    if _trial is not None:
        key = Key("qk", kernel, str(dtype).removeprefix("torch."), bucket(d))
        _used.add(key)
    return _qk_plan(kernel, device.index if device.type == "cuda" else None, arch, dtype, d, _generation)


@cache
def _qk_plan(kernel: str, index: int | None, arch: int, dtype: torch.dtype, d: int, generation: int) -> QKLaunch:
    base = qk_launch(kernel, arch, dtype, d)
    found = _launches(index).get(Key("qk", kernel, str(dtype).removeprefix("torch."), bucket(d)))
    return base if found is None else base.replaced(found)


def _launches(index: int | None) -> Mapping[Key, Launch]:
    if _trial is not None:
        return _trial
    return {} if index is None else of_gpu(torch.cuda.get_device_name(index))


def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
