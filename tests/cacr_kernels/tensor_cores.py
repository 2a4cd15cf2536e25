"""Tensor-core arithmetic in Triton's interpreter: what a GPU would compute, compared with float64 without one.

The interpreter multiplies float32 factors exactly whatever their precision should be, takes bfloat16 numbers for
integers and knows no PTX. Here bfloat16 numbers are what they stand for and rounded to nearest even, products of tf32
factors see ten bits of their fractions, and "tf32x3" is what Triton makes of it. Sums are in float32.
"""

from __future__ import annotations

import numpy as np
import pytest


def decoded(data: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def encoded(x: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def tf32(x: np.ndarray, nearest: bool) -> np.ndarray:
    """float32 with the fraction of tf32: to nearest, ties away from zero (cvt.rna), or cut off, as products do."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    bits = (bits + (0x1000 if nearest else 0)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits.view(np.float32), x).reshape(np.shape(x))


def multiply(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + a b. Eight products are summed exactly and then added, one eight after the other: as in tensor cores, a sum
    does not depend on the tile it is part of, nor on which factor is transposed.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], 8):
        acc = (acc + a[..., k : k + 8] @ b[..., k : k + 8, :]).astype(np.float32)
    return acc


def multiply_float32(a: np.ndarray, b: np.ndarray, acc: np.ndarray, precision: str) -> np.ndarray:
    """acc + a b of float32 factors, in one of Triton's precisions."""
    if precision == "IEEE":
        return multiply(a, b, acc)
    if precision == "TF32":
        return multiply(tf32(a, False), tf32(b, False), acc)
    if precision != "TF32x3":
        raise NotImplementedError(precision)
    a_hi, b_hi = tf32(a, True), tf32(b, True)
    small = multiply_float32(a - a_hi, b_hi, np.zeros_like(acc), "TF32")
    small = multiply_float32(a_hi, b - b_hi, small, "TF32")
    return acc + multiply(a_hi, b_hi, np.where(np.isnan(small), np.float32(0), small))


@pytest.fixture
def tensor_cores(monkeypatch):
    """The interpreter with this arithmetic."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, handle, language = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.tl
    cast_before, binary_before = builder.cast_impl, builder.binary_op

    def bfloat16(x):
        return x.dtype.scalar == language.bfloat16

    def values(x):
        return decoded(x.data) if bfloat16(x) else x.data

    def cast(self, source, target):
        scalar = target.scalar
        if scalar == language.bfloat16:
            return handle(encoded(values(source).astype(np.float32)), scalar)
        return cast_before(self, handle(values(source), language.float32) if bfloat16(source) else source, target)

    def binary(self, left, right, operation):
        if not bfloat16(left):
            return binary_before(self, left, right, operation)
        found = operation(values(left), values(right))
        return handle(found, language.int1) if found.dtype == bool else handle(encoded(found), language.bfloat16)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == language.float32:
            return handle(multiply_float32(a.data, b.data, d.data, input_precision.name), d.dtype.scalar)
        return handle(multiply(values(a), values(b), d.data), d.dtype.scalar)

    def inline_asm(self, text, constraints, values, types, pure, pack):
        if not text.startswith("cvt.rna.tf32.f32"):
            raise NotImplementedError(text)
        found = handle(tf32(values[0].data, True), language.float32)
        return type("Result", (), {"get_result": lambda self, i: found})()

    monkeypatch.setattr(builder, "cast_impl", cast)
    monkeypatch.setattr(builder, "create_fp_to_fp", lambda self, source, target, mode: cast(self, source, target))
    monkeypatch.setattr(builder, "binary_op", binary)
    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "create_inline_asm", inline_asm)
