"""Launch configurations by architecture, dtype and kernel: plain data, imports nothing.

A kernel's name stands for its size bucket too: forward_64 serves spans of at most 64 tokens, forward_128 those of at
most 128 (whole_* where Plan.takes_whole says so), the large_* kernels the others, numbers and fill all. Every entry is
compiled ahead of time by triton.aot. MEASURED holds the entries that a GPU chose, of the scores and of the query/key
kernels (qk_launch has their rules).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

#: tiles that a launch may have; beyond 128 they overflow the kernels' 32-bit offsets
SIZES = (16, 32, 64, 128)
#: longest spans of the small path's buckets, whose kernels hold rows of that length whole
BUCKETS = (64, 128)
SMALL = BUCKETS[-1]
#: row lengths of their tiles: text and vision take the smallest that holds them, each its own
WIDTHS = (32, 64, 128)


def compiler_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """What Triton is told of every kernel. Products and sums are fused, whatever Triton does unless told."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """Tile sizes, warps and pipeline stages of one kernel; ``registers``: at most so many a thread (None: no cap)."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 1
    registers: int | None = None

    def options(self, kind: str) -> dict[str, Any]:
        """What Triton is told beside the tile sizes. Kind "softmax" is not capped: its programs hold more."""
        options = compiler_options(self.num_warps, self.num_stages)
        return options if self.registers is None or kind == "softmax" else options | {"maxnreg": self.registers}


#: the kernels that compute tiles of X
FORMS_X = (
    *(f"{name}_{bucket}" for bucket in BUCKETS for name in ("forward", "rows", "own", "whole_rows")),
    *("large_forward", "large_g", "large_own"),
)


def launch(
    i: int = 0, j: int = 0, c: int = 0, k: int = 0, warps: int = 4, stages: int = 1, registers: int | None = None
) -> Launch:
    sizes = {"BLOCK_I": i, "BLOCK_J": j, "BLOCK_C": c, "BLOCK_K": k}
    return Launch({name: size for name, size in sizes.items() if size}, warps, stages, registers)


class Key(NamedTuple):
    """What an entry is for. ``variant``: "scores" or "qk"; ``head_size``: of "qk", padded (qk_launch.bucket)."""

    variant: str
    kernel: str
    dtype: str
    head_size: int = 0


@dataclass(frozen=True)
class Plan:
    """What one architecture does with one dtype: the scheme of its dots (see common.dot) and a Launch per kernel.

    ``whole``: what whole.py does where spans are short and tensor cores take factors from shared memory: "sides", the
    forward and all of the backward but the inner blocks; "logits", the forward and G, for factors of more registers.
    """

    dot: str
    kernels: dict[str, Launch] = field(default_factory=dict)
    whole: Literal["sides", "logits"] | None = None

    def takes_whole(self, kind: str, bucket: int | None, n_text: int, n_vision: int) -> bool:
        """Whether the kernels of whole.py serve a size bucket: what they hold fits in registers."""
        shorter = min(n_text, n_vision)
        fits = bucket == BUCKETS[0] or (bucket is not None and kind == "scores" and shorter <= 64)
        return self.whole is not None and fits


def kernels(
    small: int, k: int, large: int, warps: int, rows: int = 64, threads: tuple[int, int] = (4, 8)
) -> dict[str, Launch]:
    """The small path takes ``rows`` a tile, with as many warps as ``threads`` says for rows of up to 64 tokens and
    beyond. Large spans take 32 x 32 tiles where rows are compared (registers), ``large`` tiles for plain products.

    Dots in chunks of ``small`` numbers where rows are held whole, shorter ones for four warps; elsewhere of ``k``. All
    kernels that form X form it bit for bit alike, since rows near one-hot amplify a difference between forward and
    backward: with the same chunks, and all with 64 rows a tile or all with fewer, which decides the instruction on
    Hopper and Blackwell.
    """
    found = {}
    for bucket, many in zip(BUCKETS, threads):
        shorter = min(small, bucket // 4)
        for name in ("forward", "rows", "cross", "own"):
            found[f"{name}_{bucket}"] = launch(i=rows, c=shorter, k=small, warps=many)
        for name in ("whole_forward", "whole_backward"):
            found[f"{name}_{bucket}"] = launch(warps=many)
        found[f"whole_rows_{bucket}"] = launch(i=rows, warps=many)
    return found | {
        "numbers": launch(i=16, j=128),
        "fill": launch(i=16, j=128),
        "project": launch(i=large, c=large, k=k, warps=warps),
        "large_forward": launch(i=32, j=32, k=k),
        "large_g": launch(i=32, j=large, k=k, warps=warps),
        "large_v": launch(i=large, c=large, k=k, warps=warps),
        "large_cross": launch(j=32, c=32, k=k),
        "large_own": launch(i=32, j=32, k=k),
    }


#: float32: multiply-adds where shared memory is scarce, three tf32 products elsewhere; 16-bit: bfloat16 products
IEEE = Plan("ieee", kernels(16, 16, 64, 8))
TF32X3 = Plan("tf32x3", kernels(16, 16, 64, 8))
SPLIT = Plan("split", kernels(32, 32, 64, 8))
#: Hopper: 64 rows of long spans take four warps too, see MEASURED
TF32X3_WHOLE = Plan("tf32x3", kernels(16, 16, 64, 4), whole="logits")
SPLIT_WHOLE = Plan("split", kernels(32, 32, 64, 4), whole="sides")
#: Blackwell: dots of fewer than 64 rows, which stay out of tensor memory. Triton 3.6 to 3.8 compute wrong results
#: where two dots of a loop add to one accumulator there (triton-lang/triton issue 10821), as parts of a factor do.
TF32X3_REGISTERS = Plan("tf32x3", kernels(16, 16, 32, 4, rows=32, threads=(4, 4)))
SPLIT_REGISTERS = replace(TF32X3_REGISTERS, dot="split")

DTYPES = ("float32", "float16", "bfloat16")
ARCHITECTURES = (80, 86, 89, 90, 100)
TABLE: dict[int, dict[str, Plan]] = {
    80: {"float32": TF32X3, "float16": SPLIT, "bfloat16": SPLIT},
    86: {"float32": IEEE, "float16": SPLIT, "bfloat16": SPLIT},
    89: {"float32": IEEE, "float16": SPLIT, "bfloat16": SPLIT},
    90: {"float32": TF32X3_WHOLE, "float16": SPLIT_WHOLE, "bfloat16": SPLIT_WHOLE},
    100: {"float32": TF32X3_REGISTERS, "float16": SPLIT_REGISTERS, "bfloat16": SPLIT_REGISTERS},
}

#: tile sizes of each kernel
BLOCKS = {name: tuple(entry.blocks) for name, entry in kernels(16, 16, 64, 8).items()}

#: entries in place of the rules, by architecture; `cacr bench tune --as-code` prints them with their measurements
MEASURED: dict[int, dict[Key, Launch]] = {
    # NVIDIA H100 80GB HBM3, 2026-11-27, torch 2.11.0, Triton 3.6.0.
    # A dot of a dot gets all of its warps along its rows, 16 rows a warp. On Hopper eight warps for 64 rows do the work
    # twice, and results were wrong. With four (B H = 1536, T, R = 60, 100): own bfloat16 133 us, 269 before; cross
    # float32 796, 1885 before; own float32 298, 557 before. The forward and the rows form X alike and go with them.
    90: {
        Key("scores", f"{name}_128", dtype): launch(i=64, c=32, k=32)
        for dtype in DTYPES
        for name in ("forward", "rows", "cross", "own")
    }
    | {
        # B H = 8, T = R = 2048: 207 and 263 us; 64 rows with four warps 231 and 285
        Key("qk", "rows", "bfloat16", 128): Launch({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),
        Key("qk", "columns", "bfloat16", 128): Launch({"BLOCK_M": 64, "BLOCK_N": 128}, 8, 2),
        # B H = 16, T = R = 2048: 949, 1749 and 1933 us; with eight warps 1754, 2239 and 2390
        Key("qk", "forward", "float32", 64): Launch({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 2),
        Key("qk", "rows", "float32", 64): Launch({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 2),
        Key("qk", "columns", "float32", 64): Launch({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2),
    },
}

#: shared memory of one block in bytes, by architecture
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}

#: the interpreter: few large steps
INTERPRETER = Plan(
    "ieee", {name: Launch(dict.fromkeys(entry.blocks, 64)) for name, entry in kernels(64, 64, 64, 4).items()}
)


def family(arch: int) -> int:
    """The architecture of the table that serves the compute capability ``arch`` (10 * major + minor).

    From 120 on, consumer cards have the 99 KB of shared memory of sm_89, and no tensor memory.
    """
    return arch if arch in TABLE else 89 if arch >= 120 else max(known for known in TABLE if known <= arch)


def plan(arch: int, dtype: str) -> Plan:
    """The Plan of the compute capability ``arch`` (10 * major + minor): its own, or its family's."""
    rules = TABLE[family(arch)][dtype]
    measured = MEASURED.get(family(arch), {})
    found = {key.kernel: entry for key, entry in measured.items() if key.variant == "scores" and key.dtype == dtype}
    return replace(rules, kernels={**rules.kernels, **found}) if found else rules
