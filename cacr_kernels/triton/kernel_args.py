"""What the kernels are passed: tuples of pointers and ints, which compile nothing anew whatever their values are.

Triton only, no torch.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

#: arguments that must not compile a kernel anew when they happen to be 1 or a multiple of 16 (in tuples: see odd)
UNSPECIALIZED = ["grad_loss", "s_g_b", "s_g_h", "stats", "n_heads"]


def odd(*values: int) -> tuple[int, ...]:
    """2 x + 3 of every x >= 0, for the ints of a NamedTuple below; the kernels' plain_* functions undo it.

    Triton compiles a kernel anew for ints in tuples that are 1 (Python ints in the kernel then) or multiples of 16,
    whatever ``do_not_specialize`` says. These are neither.
    """
    return tuple(2 * x + 3 for x in values)


class BlockArg(NamedTuple):
    """Kernel argument: one of the four blocks of attention [B, H, rows, columns], or queries or keys [B, H, N, D].

    Strides in elements. ``step``, a constexpr, divides all of them but the last, and they are passed divided by it:
    Triton knows of an int that it is a multiple of 16 or nothing, and loads numbers one by one then.
    """

    p: Any
    step: Any
    s_b: Any
    s_h: Any
    s_r: Any
    s_c: Any


class Block(NamedTuple):
    """In a kernel: a BlockArg with its strides."""

    p: Any
    s_b: Any
    s_h: Any
    s_r: Any
    s_c: Any


class SpanArgs(NamedTuple):
    """Kernel argument: the spans. ``table`` is int32 [B, 4] or None; with it the two lengths are upper bounds.

    ``limit_*`` are the sizes which spans must not leave, ``disjoint`` is 1 when the two may not overlap. ``step``, a
    constexpr, divides all positions and lengths, and they are passed divided by it.
    """

    table: Any
    step: Any
    text_start: Any
    n_text: Any
    vision_start: Any
    n_vision: Any
    limit_text: Any
    limit_vision: Any
    disjoint: Any


class Scaling(NamedTuple):
    """Kernel argument: what X and the rows' losses are multiplied by, and which sides count (0 or 1)."""

    projection_scale: Any
    projection_mean: Any
    row_mean: Any
    text: Any
    vision: Any


class Work(NamedTuple):
    """Kernel argument: the float32 workspace, its size per problem, its rows' lengths, and where its matrices begin.

    u_* and v_*: U and V [n_a, n_b] of a side; g_*: G [n_a, n_a]. All in quads, four numbers: rows along text take
    ``n_text`` quads, so that tiles are read and written 16 bytes at a time.
    """

    p: Any
    s_problem: Any
    n_text: Any
    n_vision: Any
    u_text: Any
    u_vision: Any
    v_text: Any
    v_vision: Any
    g_text: Any
    g_vision: Any


class Matrix(NamedTuple):
    """In a kernel: a matrix [n_r, n_c] of one problem. Its rows' maxima lie at p_n, their sums of exp at p_n + s_n."""

    p: Any
    s_r: Any
    s_c: Any
    n_r: Any
    n_c: Any
    p_n: Any
    s_n: Any


class Side(NamedTuple):
    """In a kernel: one side of one problem. own S_aa, cross S_ab, other S_bb; numbers: its rows' eight numbers."""

    own: Any
    cross: Any
    other: Any
    n_a: Any
    n_b: Any
    p_n: Any
    s_n: Any
    is_text: Any


@triton.jit
def plain(x):
    """x of odd(x)."""
    return (x - 3) >> 1


@triton.jit
def times(x, STEP: tl.constexpr):
    """x STEP, a multiple of STEP to the compiler; in int64, as strides may not fit in int32."""
    return x.to(tl.int64) * STEP if STEP > 1 else x


@triton.jit
def plain_block(block):
    """The Block of attention: all strides are odd numbers."""
    return Block(
        block.p,
        times(plain(block.s_b), block.step),
        times(plain(block.s_h), block.step),
        times(plain(block.s_r), block.step),
        plain(block.s_c),
    )


@triton.jit
def plain_tokens(block):
    """The Block of queries or keys: strides as they are, or odd numbers but for the last if they have a step."""
    if block.step == 1:
        return Block(block.p, block.s_b, block.s_h, block.s_r, block.s_c)
    else:
        return Block(
            block.p,
            times(plain(block.s_b), block.step),
            times(plain(block.s_h), block.step),
            times(plain(block.s_r), block.step),
            block.s_c,
        )


@triton.jit
def plain_spans(spans):
    """The ints of SpanArgs but for its step; its table may be None, which Triton 3.6 cannot return from a function."""
    return (
        plain(spans.text_start) * spans.step,
        plain(spans.n_text) * spans.step,
        plain(spans.vision_start) * spans.step,
        plain(spans.n_vision) * spans.step,
        plain(spans.limit_text) * spans.step,
        plain(spans.limit_vision) * spans.step,
        plain(spans.disjoint),
    )


@triton.jit
def plain_blocks(tt, tv, vt, vv):
    return plain_block(tt), plain_block(tv), plain_block(vt), plain_block(vv)


@triton.jit
def plain_scaling(scaling):
    return Scaling(
        scaling.projection_scale,
        plain(scaling.projection_mean),
        plain(scaling.row_mean),
        plain(scaling.text),
        plain(scaling.vision),
    )


@triton.jit
def plain_work(work):
    return Work(
        work.p,
        plain(work.s_problem),
        plain(work.n_text),
        plain(work.n_vision),
        plain(work.u_text),
        plain(work.u_vision),
        plain(work.v_text),
        plain(work.v_vision),
        plain(work.g_text),
        plain(work.g_vision),
    )
