"""Tile sizes, warps and dot precision of the query/key kernels, by kernel, architecture, dtype and head size.

Every entry compiles ahead of time within the limits of its architecture (cacr_kernels.triton.qk_aot): at most 64 bytes
spilled a thread, and the shared memory of the smallest chip of its column. The kernels of one column and head size form
X bit for bit alike, since rows near one-hot amplify a difference between forward and backward: on Hopper and Blackwell
all of them have 64 rows a dot (``n`` in "columns", whose tiles are transposed) or all have fewer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import configs

#: the Gram kernel sums tokens in chunks, at least so many at a time, until there are so many programs (two of an SM)
GRAM_CHUNK, GRAM_PROGRAMS = 256, 256


def gram_chunks(longest: int, step: int, programs: int) -> tuple[int, int]:
    """(chunks, tokens of a chunk, a multiple of ``step``) of spans of at most ``longest`` tokens.

    ``programs``: of one chunk of all spans.
    """
    chunks = max(1, min(longest // GRAM_CHUNK, -(-GRAM_PROGRAMS // max(programs, 1))))
    tokens = max(1, -(-longest // (chunks * step))) * step
    return max(1, -(-longest // tokens)), tokens


class Launch(NamedTuple):
    """``m`` rows x ``n`` columns a tile; ``precision`` of the dots of float32 operands.

    ``k``: chunk of a long contraction, ``o``: output columns of one program ("wide"). ``peel``: the tiles that need
    masks are code of their own ("forward", "rows", "columns").
    """

    m: int
    n: int
    warps: int
    stages: int
    precision: str = "tf32x3"
    k: int = 32
    o: int = 64
    peel: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told."""
        return configs.compiler_options(self.warps, self.stages)

    def replaced(self, entry: configs.Launch) -> Launch:
        """These dots with the tiles, warps and stages of an entry."""
        sizes = {name.removeprefix("BLOCK_").lower(): size for name, size in entry.blocks.items()}
        return self._replace(warps=entry.num_warps, stages=entry.num_stages)._replace(**sizes)  # type: ignore[arg-type]


def block_d(d: int) -> int:
    """Head size padded to a power of two, at least 16 (the smallest contraction of a tensor-core dot)."""
    return max(16, 1 << (d - 1).bit_length())


#: head sizes of the table, and tile sizes of each kernel
HEADS = (32, 64, 128, 256)
QK_BLOCKS = dict.fromkeys(("forward", "rows", "columns", "gram", "mix", "tokens"), ("BLOCK_M", "BLOCK_N")) | {
    "wide": ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_O")
}


def bucket(d: int) -> int:
    """The head size of the table that serves ``d``."""
    return max(block_d(d), HEADS[0])


#: sm_80, sm_86, sm_89 share one column, within the 99 KB of shared memory of sm_86; rows: padded head size
_AMPERE_16 = {
    "forward": {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    "rows": {32: (64, 64, 4, 2), 64: (64, 32, 4, 2), 128: (64, 64, 8, 1), 256: (32, 32, 8, 2)},
    "columns": {32: (64, 64, 4, 2), 64: (32, 64, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
}
_AMPERE_32 = {
    "forward": {32: (64, 64, 8, 2), 64: (32, 64, 8, 1), 128: (32, 16, 8, 1)},
    "rows": {32: (64, 32, 4, 2), 64: (32, 64, 8, 1), 128: (16, 32, 8, 1)},
    "columns": {32: (32, 32, 4, 2), 64: (64, 32, 8, 2), 128: (32, 16, 8, 1)},
}
#: 64 rows a dot take four warps, 128 take eight: see configs.MEASURED
_HOPPER_16 = {
    "forward": {32: (64, 64, 4, 2), 64: (64, 128, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 8, 2)},
    "rows": {32: (64, 64, 4, 2), 64: (64, 64, 4, 3), 128: (64, 32, 4, 2), 256: (32, 32, 8, 2)},
    "columns": {32: (64, 64, 4, 2), 64: (64, 64, 4, 3), 128: (32, 64, 4, 2), 256: (32, 32, 8, 2)},
}
#: float16 takes its gradients through tf32, in twice the registers
_HOPPER_FLOAT16 = {
    "forward": _HOPPER_16["forward"],
    "rows": {32: (64, 64, 4, 2), 64: (128, 32, 8, 2), 128: (128, 16, 8, 2), 256: (32, 32, 8, 2)},
    "columns": {32: (64, 64, 4, 2), 64: (32, 128, 8, 2), 128: (16, 128, 8, 2), 256: (32, 32, 8, 2)},
}
_HOPPER_32 = {
    "forward": {32: (32, 64, 4, 2), 64: (32, 64, 8, 2), 128: (32, 16, 8, 1)},
    "rows": {32: (16, 32, 4, 2), 64: (32, 64, 8, 2), 128: (16, 32, 8, 1)},
    "columns": {32: (32, 32, 4, 2), 64: (64, 32, 8, 2), 128: (32, 16, 8, 1)},
}
#: fewer than 64 rows a dot on Blackwell: see configs.SPLIT_REGISTERS
_BLACKWELL_16 = {
    "forward": {32: (32, 64, 2, 2), 64: (32, 64, 2, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 2)},
    "rows": {32: (32, 64, 2, 2), 64: (32, 64, 2, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
    "columns": {32: (64, 32, 2, 2), 64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
}
#: largest head size for which peeled tiles leave enough registers, on Hopper
_PEELED = {
    torch.bfloat16: {"forward": 128, "rows": 128, "columns": 64},
    torch.float16: {"forward": 128, "rows": 128, "columns": 32},
    torch.float32: {"forward": 0, "rows": 0, "columns": 0},
}
_TILES = {
    (8, torch.float16): _AMPERE_16,
    (8, torch.bfloat16): _AMPERE_16,
    (8, torch.float32): _AMPERE_32,
    (9, torch.float16): _HOPPER_FLOAT16,
    (9, torch.bfloat16): _HOPPER_16,
    (9, torch.float32): _HOPPER_32,
    (10, torch.float16): _BLACKWELL_16 | {"rows": _BLACKWELL_16["rows"] | {64: (32, 32, 2, 2)}},
    (10, torch.bfloat16): _BLACKWELL_16,
    (10, torch.float32): _HOPPER_32,
}


def launch(kernel: str, arch: int, dtype: torch.dtype, d: int) -> Launch:
    """``kernel``: "forward", "rows", "columns"; "wide" (chunked contractions), "gram", "mix" (D x D), "tokens" (N x D).

    ``arch``: compute capability as 10 * major + minor; 0 is the interpreter.
    """
    if arch == 0:
        return Launch(32, 32, 4, 1, "ieee", k=128, o=256, peel=True)
    rule = _rule(kernel, arch, dtype, bucket(d))
    if kernel == "wide" and d % 16:
        rule = rule._replace(k=16)  # fewer registers for masks
    key = configs.Key("qk", kernel, str(dtype).removeprefix("torch."), bucket(d))
    measured = configs.MEASURED.get(configs.family(arch), {}).get(key)
    return rule if measured is None else rule.replaced(measured)


def _rule(kernel: str, arch: int, dtype: torch.dtype, d: int) -> Launch:
    if kernel == "wide":
        return Launch(32, 32, 4, 1)
    wide = dtype == torch.float32
    registers = configs.family(arch) == 100
    if kernel == "gram" and registers:
        return Launch(32, 16, 4, 2) if wide else Launch(32, 64, 4, 2)
    if kernel == "gram":
        return Launch(64, 16, 4, 2) if wide else Launch(64, 64, 4, 3) if d <= 128 else Launch(64, 32, 4, 2)
    if kernel == "mix":
        return Launch(32, 64 if d <= 64 else 32, 8, 1)
    if kernel == "tokens":
        if d > (64 if wide else 128):
            return Launch(32, 32, 8, 1)
        return Launch(32 if registers else 64, 32 if wide or d > 64 else 64, 4, 1)
    column = min(arch // 10, 10) if 90 <= arch < 120 else 8  # sm_120 has the shared memory of sm_86
    return Launch(*_TILES[column, dtype][kernel][d], peel=column == 9 and d <= _PEELED[dtype][kernel])
