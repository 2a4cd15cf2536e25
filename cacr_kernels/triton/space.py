"""Which launches a tuner may try: the neighbours of one, without those that cannot run or are bound to be slow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .configs import BUCKETS, FORMS_X, SHARED_LIMIT, SIZES, Key, Launch, family, plan
from .qk_launch import QK_BLOCKS
from .qk_launch import launch as qk_launch

WARPS, STAGES = (2, 4, 8), (1, 2, 3, 4)
REGISTERS = (96, 128, 160, 192)
#: float32 numbers of one tile, of several, that a thread can hold
MOST_NUMBERS = 64
#: multiply-adds a thread unrolls without tensor cores; beyond it compiling takes minutes
MOST_UNROLLED = 1024


def builtin(key: Key, arch: int) -> Launch:
    """The built-in entry of ``key``."""
    if key.variant == "scores":
        return plan(arch, key.dtype).kernels[key.kernel]
    found = qk_launch(key.kernel, arch, getattr(torch, key.dtype), key.head_size)
    sizes = {name: getattr(found, name.removeprefix("BLOCK_").lower()) for name in QK_BLOCKS[key.kernel]}
    return Launch(sizes, found.warps, found.stages)


def neighbours(launch: Launch) -> Iterator[Launch]:
    """One step along each axis: a tile doubled or halved, more or fewer warps or stages, and a tile with its warps.

    Also the cap of registers beside, and none: fewer registers let more warps share a multiprocessor.
    """
    for name, size in launch.blocks.items():
        for new in _beside(size, SIZES):
            larger = replace(launch, blocks=launch.blocks | {name: new})
            yield larger
            for warps in _beside(launch.num_warps, WARPS):
                if (warps > launch.num_warps) == (new > size):
                    yield replace(larger, num_warps=warps)
    for warps in _beside(launch.num_warps, WARPS):
        yield replace(launch, num_warps=warps)
    for stages in _beside(launch.num_stages, STAGES):
        yield replace(launch, num_stages=stages)
    if launch.registers is None:
        yield replace(launch, registers=REGISTERS[-1])
    else:
        for registers in (*_beside(launch.registers, REGISTERS), None):
            yield replace(launch, registers=registers)


def _beside(value: int, options: tuple[int, ...]) -> list[int]:
    smaller = [option for option in options if option < value]
    larger = [option for option in options if option > value]
    return smaller[-1:] + larger[:1]


def forms_x_alike(key: Key, launch: Launch, arch: int) -> bool:
    """Whether X comes out bit for bit as with the built-in launch, and so as in the kernels of the other pass.

    Rows near one-hot amplify any difference: the chunks of K and C stay, on Hopper and Blackwell the instruction too,
    which is that of warp groups where a dot has 64 rows or more and the warps make whole groups of four.
    """
    if key.variant == "scores":
        axis = "BLOCK_I" if key.kernel in FORMS_X else None
    else:
        axis = {"forward": "BLOCK_M", "rows": "BLOCK_M", "columns": "BLOCK_N"}.get(key.kernel)
    if axis is None and not key.kernel.startswith("whole"):
        return True

    def in_groups(entry: Launch) -> bool:
        rows = entry.blocks[axis] if axis is not None else 64  # of whole sides at least
        return rows >= 64 and entry.num_warps % 4 == 0

    known = builtin(key, arch)
    same = family(arch) < 90 or in_groups(launch) == in_groups(known)
    return same and all(launch.blocks.get(chunk) == known.blocks.get(chunk) for chunk in ("BLOCK_K", "BLOCK_C"))


def stays_in_registers(key: Key, launch: Launch, arch: int) -> bool:
    """False where a dot has rows enough for Blackwell's tensor memory: see configs.SPLIT_REGISTERS."""
    rows = {
        "large_cross": ("BLOCK_J",),
        "columns": ("BLOCK_N",),
        "wide": ("BLOCK_M", "BLOCK_N"),
        "fill": (),
        "numbers": (),
    }
    axes = rows.get(key.kernel, ("BLOCK_I", "BLOCK_M"))
    return family(arch) != 100 or all(launch.blocks.get(axis, 0) < 64 for axis in axes)


def fits_the_others(key: Key, launch: Launch, arch: int) -> bool:
    """Whether results stay right with this launch beside the built-in ones of the other kernels."""
    rules = (forms_x_alike, stays_in_registers, rows_per_warp)
    return all(rule(key, launch, arch) for rule in rules)


def rows_per_warp(key: Key, launch: Launch, arch: int) -> bool:
    """False where dots that follow on each other have more warps than their rows fill, 16 rows a warp, on Hopper.

    See configs.MEASURED. The products of a float32 factor's parts follow on each other too. Kernels of whole sides are
    free: their longer side fills eight warps, and with those an H100 computed the shorter one rightly too.
    """
    if key.variant == "scores":
        parts = ("forward", "rows", "cross", "own", "project", "large_v")
        axis = "BLOCK_I" if key.kernel.startswith(parts) else None
    else:
        axis = "BLOCK_N" if key.kernel == "columns" else "BLOCK_M"
    if axis is None or family(arch) != 90 or launch.blocks[axis] < 64:
        return True
    return 16 * launch.num_warps <= launch.blocks[axis]


def row_length(key: Key) -> dict[str, int]:
    """The tile sides that a kernel of a size bucket has from its bucket."""
    ends = [bucket for bucket in BUCKETS if key.variant == "scores" and key.kernel.endswith(f"_{bucket}")]
    whole = {"BLOCK_T": ends[0]} if ends and key.kernel.startswith("whole") else {}
    return whole | {"BLOCK_R": ends[0]} if ends else {}


def possible(key: Key, launch: Launch, arch: int) -> bool:
    """False for launches that change X, surely need more shared memory or registers than there are, or idle threads.

    A dot of [M, K] with [K, N] keeps its factors in shared memory, once a pipeline stage, and [M, N] in registers.
    """
    sizes = dict(launch.blocks) | row_length(key)
    inner = sizes.pop("BLOCK_K", None) or key.head_size or min(sizes.values())
    smallest, *_, second, largest = sorted([min(sizes.values()), *sizes.values()])
    itemsize = 4 if key.dtype == "float32" else 2
    shared = max(launch.num_stages - 1, 1) * (smallest + largest) * inner * itemsize
    threads, numbers = 32 * launch.num_warps, second * largest
    unrolled = key.variant == "scores" and plan(arch, key.dtype).dot == "ieee"
    return (
        fits_the_others(key, launch, arch)
        and (launch.registers is None or key.variant == "scores")
        and shared <= SHARED_LIMIT[family(arch)]
        and threads <= numbers <= MOST_NUMBERS * threads
        and not (unrolled and numbers * inner > MOST_UNROLLED * threads)
    )
