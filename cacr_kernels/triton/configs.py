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


def _plan(dot: str, t: int, k: int, warps: int, stages: int = 1) -> Plan:
    return Plan(
        dot,
        {
            "forward_small": launch(i=t, j=t, c=t, k=k, warps=warps, stages=stages),
            "rows": launch(i=t, j=t, c=t, k=k, warps=warps, stages=stages),
            "cross": launch(i=t, j=t, c=t, k=k, warps=warps, stages=stages),
            "own": launch(i=t, j=t, k=k, warps=warps, stages=stages),
            "numbers": launch(i=16, j=128, warps=4),
            "project": launch(i=t, c=t, k=k, warps=warps, stages=stages),
            "forward_large": launch(i=t, j=t, c=t, k=k, warps=warps, stages=stages),
            "large_g": launch(i=t, j=t, k=k, warps=warps, stages=stages),
            "large_v": launch(i=t, c=t, k=k, warps=warps, stages=stages),
            "large_cross": launch(j=t, c=t, k=k, warps=warps, stages=stages),
        },
    )


#: the interpreter: few large steps
INTERPRETER = _plan("ieee", 32, 32, 4)


def plan(arch: int, dtype: str) -> Plan:
    return INTERPRETER
