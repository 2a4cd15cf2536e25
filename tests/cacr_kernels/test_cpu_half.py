"""16-bit scores, NaN and infinity in the CPU kernels, on every instruction set this machine runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cacr_kernels import native
from cacr_kernels.problem import Options, Spans
from cacr_kernels.testing import make_input

from .cpu_backend import FIXTURES, KINDS, NEEDS_CPU, joint, run

instruction_set, threads = FIXTURES
pytestmark = NEEDS_CPU


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_computes_in_float32_and_rounds_once(kind: str, dtype: torch.dtype) -> None:
    attn = make_input(kind, 7, 33, batch=2, heads=2, dtype=dtype)
    options = Options(kind)  # type: ignore[arg-type]
    for factor in (1.0, 3e4, 1e-7):  # infinities and subnormals of float16 among the gradients
        grad_loss = torch.full((2, 2), factor)
        loss, (gradient,) = run([attn], joint(7, 33), options, grad_loss)
        same, _ = native.cpu.scores_forward([attn.float()], joint(7, 33), options, False)
        (exact,) = native.cpu.scores_backward(grad_loss, [attn.float()], [], joint(7, 33), options)
        assert torch.equal(loss, same)
        assert torch.equal(gradient, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_value_is_read_right(dtype: torch.dtype) -> None:
    value = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    value = value[value.abs().float() < 1e30].view(-1, 1, 1, 1)  # neither infinite nor NaN, and neither is X
    # Two text tokens, one region, S_tv = (1, 0): X = scale S_vv in one corner, and a large scale shows subnormals.
    tv = torch.tensor([[1.0], [0.0]], dtype=dtype).expand(*value.shape[:2], 2, 1)
    zeros = torch.zeros(*value.shape[:2], 2, 2, dtype=dtype)
    blocks = [zeros, tv, tv.mT, value]
    for scale in (1.0, 2.0**14):
        options = Options("scores", "text", scale)
        loss, _ = native.cpu.scores_forward(blocks, Spans(0, 2, 0, 1), options, False)
        exact, _ = native.cpu.scores_forward([x.float() for x in blocks], Spans(0, 2, 0, 1), options, False)
        assert torch.equal(loss, exact)
        x = value[..., 0, 0].double() * scale
        torch.testing.assert_close(loss.double(), (x.sigmoid() - 0.5) * x, rtol=1e-3, atol=1e-9)


def bits(value: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value).to(torch.int32 if dtype == torch.float32 else torch.int64).view(dtype)


#: NaN with an empty payload, with a full one and either sign (0x7fffffff is CUDA's), and infinities
SPECIAL = {
    "nan": lambda dtype: torch.tensor(float("nan"), dtype=dtype),
    "-nan, all ones": lambda dtype: bits(-1, dtype),
    "nan, all ones": lambda dtype: bits(torch.iinfo(torch.int32 if dtype == torch.float32 else torch.int64).max, dtype),
    "inf": lambda dtype: torch.tensor(float("inf"), dtype=dtype),
    "-inf": lambda dtype: torch.tensor(float("-inf"), dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [(2, 3), (2, 9), (9, 2), (10, 11)])
def test_nan_and_infinity_inside_a_span_reach_the_loss(
    value: str, kind: str, place: tuple[int, int], dtype: torch.dtype
) -> None:
    if kind != "scores" and value == "-inf":
        pytest.skip("a probability is not negative, and softmax of -inf is 0")
    attn = make_input(kind, 7, 6, heads=2, dtype=dtype)
    attn[0, 1, place[0], place[1]] = SPECIAL[value](dtype)
    loss, _ = native.cpu.scores_forward([attn], joint(7, 6), Options(kind), False)  # type: ignore[arg-type]
    assert loss[0, 0].isfinite()
    assert loss[0, 1].isnan()
