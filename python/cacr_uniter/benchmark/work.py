"""Operations and bytes of a problem, and the time no implementation can beat (its floor).

Counts per problem with T text tokens, R regions, head width D (n_a, n_b: sizes of a side and of the other):

    scores, forward   4 T R (T + R) flops, 2 (T^2 + R^2) exps, S read once
    scores, backward  8 T R (T + R) flops, S read and dS written (U, X and the exponentials may be kept)
    q/k, forward      4 n_a^2 D flops and 2 n_a^2 exps a side, q and k read
    q/k, backward     12 n_a^2 D flops and 2 n_a^2 exps a side (X and Y are recomputed), q, k read and dq, dk written
    both              the sum, but for the inputs, which are read once: the gradient can be formed in the forward

A 16-bit input keeps U as a high and a low part, so its second product counts twice in the forward. On a GPU sizes are
padded to 16, the edge of a tensor-core tile. Kind "softmax" adds 2 T R exps, and from q and k it must form P: scores
(2 N^2 D flops) and then the products of the score variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cacr_uniter.benchmark.shapes import Shape

DIRECTIONS = ("forward", "backward", "both")
TILE = 16


@dataclass(frozen=True)
class Work:
    """What one call does at least: bytes moved through memory, flops of matrix products, exponentials."""

    bytes: float
    flops: float
    exps: float


@dataclass(frozen=True)
class Floor:
    """Milliseconds, and what binds: ``bandwidth``, ``matmul`` or ``exp``."""

    ms: float
    bound: str


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def work(shape: Shape, variant: str, kind: str, contender: str, direction: str, dtype: str, tile: int = 1) -> Work:
    """Least work of all problems of ``shape``.

    Args:
        variant: ``scores`` or ``qk``.
        contender: ``bmm`` counts its products without exps, ``sdpa`` 4 N^2 D flops and N^2 exps forward (2.5 times the
            flops backward); every other contender solves the problem and is held to the same work.
        direction: ``forward``, ``backward`` or ``both``.
        tile: sizes are padded to a multiple of it.
    """
    if direction == "both":
        first, second = (work(shape, variant, kind, contender, one, dtype, tile) for one in ("forward", "backward"))
        return Work(second.bytes, first.flops + second.flops, first.exps + second.exps)
    forward = direction == "forward"
    t, r = (-(-size // tile) * tile for size in (shape.n_text, shape.n_vision))
    n, d, p = t + r, shape.head_dim, shape.problems
    square = t * t + r * r
    size = itemsize(dtype)
    twice = 2 if dtype != "float32" and forward and contender != "bmm" else 1
    chain = float(2 * t * r * n * (1 + twice) if forward else 8 * t * r * n)
    vectors = float(shape.n * d * size)
    matrix = float(shape.n**2 * size)
    passes = 1 if forward else 2
    if contender == "sdpa":
        flops = 4.0 * n * n * d * (1 if forward else 2.5)
        return Work(p * vectors * (4 if forward else 8), p * flops, float(p * n * n))
    if contender == "bmm":
        return Work(p * matrix * passes, p * chain, 0.0)
    exps = 2.0 * square + (2.0 * t * r if kind == "softmax" else 0.0)
    if variant == "scores":
        return Work(p * matrix * passes, p * chain, p * exps * forward)
    if kind == "softmax":
        flops = chain + 2.0 * n * n * d * (1 if forward else 3)
    else:
        flops = 2.0 * square * d * (1 + twice) if forward else 12.0 * square * d
    return Work(p * vectors * 2 * passes, p * flops, p * exps)


def floor(needed: Work, ceilings: Mapping[str, float], dtype: str) -> Floor:
    """The largest of the three times at the machine's measured ceilings (see ``ceilings``)."""
    times = {
        "bandwidth": needed.bytes / ceilings["copy"],
        "matmul": needed.flops / matmul_rate(ceilings, dtype),
        "exp": needed.exps / ceilings["exp"],
    }
    bound = max(times, key=lambda name: times[name])
    return Floor(1e3 * times[bound], bound)


def matmul_rate(ceilings: Mapping[str, float], dtype: str) -> float:
    """Flops a second at a precision that is good enough for ``dtype``: float32 may use three tf32 products for one.

    A CPU's float32 rate is that of its multiply-adds, where it is known and the library's products are slower.
    """
    rates = [ceilings["matmul float32"], ceilings.get("multiply-add float32", 0.0)]
    if dtype == "float32" and "matmul tf32" in ceilings:
        rates.append(ceilings["matmul tf32"] / 3)
    if dtype != "float32":
        rates.append(ceilings.get(f"matmul {dtype}", 0.0))
    return max(rates)
