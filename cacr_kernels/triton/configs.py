"""Launch configurations by architecture, dtype and kernel: plain data, imports nothing.

A kernel's name stands for its size bucket too: forward_small, rows and cross serve spans of at most SMALL tokens, the
large_* kernels the others, own and numbers both. Every entry is compiled ahead of time by cacr_kernels.triton.aot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: longest span served by the small path
SMALL = 128


@dataclass(frozen=True)
class Launch:
    """Tile sizes, warps and pipeline stages of one kernel."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 1


def launch(i: int = 0, j: int = 0, c: int = 0, k: int = 0, warps: int = 4, stages: int = 1) -> Launch:
    sizes = {"BLOCK_I": i, "BLOCK_J": j, "BLOCK_C": c, "BLOCK_K": k}
    return Launch({name: size for name, size in sizes.items() if size}, warps, stages)


@dataclass(frozen=True)
class Plan:
    """What one architecture does with one dtype: the scheme of its dots (see common.dot) and a Launch per kernel."""

    dot: str
    kernels: dict[str, Launch] = field(default_factory=dict)


def kernels(k: int, large: int, warps: int) -> dict[str, Launch]:
    """Kernels that compare rows want 32 x 32 tiles (registers), plain products ``large`` ones; dots in chunks of k."""
    return {
        "forward_small": launch(i=32, j=32, c=32, k=k),
        "rows": launch(i=32, j=32, c=32, k=k),
        "cross": launch(i=32, j=32, c=32, k=k, warps=8),
        "own": launch(i=32, j=32, k=k),
        "numbers": launch(i=16, j=128),
        "project": launch(i=large, c=large, k=k, warps=warps),
        "forward_large": launch(i=32, j=32, c=32, k=k),
        "large_g": launch(i=large, j=large, k=k, warps=warps),
        "large_v": launch(i=large, c=large, k=k, warps=warps),
        "large_cross": launch(j=32, c=32, k=k),
    }


#: float32: multiply-adds where shared memory is scarce, three tf32 products elsewhere; 16-bit: bfloat16 products
IEEE = Plan("ieee", kernels(16, 64, 8))
TF32X3 = Plan("tf32x3", kernels(16, 64, 8))
SPLIT = Plan("split", kernels(32, 64, 8))

DTYPES = ("float32", "float16", "bfloat16")
ARCHITECTURES = (80, 86, 89, 90, 100)
TABLE: dict[int, dict[str, Plan]] = {
    80: {"float32": TF32X3, "float16": SPLIT, "bfloat16": SPLIT},
    86: {"float32": IEEE, "float16": SPLIT, "bfloat16": SPLIT},
    89: {"float32": IEEE, "float16": SPLIT, "bfloat16": SPLIT},
    90: {"float32": TF32X3, "float16": SPLIT, "bfloat16": SPLIT},
    100: {"float32": TF32X3, "float16": SPLIT, "bfloat16": SPLIT},
}

#: the interpreter: few large steps
INTERPRETER = Plan(
    "ieee", {name: Launch(dict.fromkeys(entry.blocks, 64)) for name, entry in kernels(64, 64, 4).items()}
)


def plan(arch: int, dtype: str) -> Plan:
    """The Plan of the compute capability ``arch`` (10 * major + minor): its own, or its family's.

    From 110 on, consumer cards have the 99 KB of shared memory of sm_89.
    """
    family = arch if arch in TABLE else 89 if arch >= 110 else max(known for known in TABLE if known <= arch)
    return TABLE[family][dtype]
