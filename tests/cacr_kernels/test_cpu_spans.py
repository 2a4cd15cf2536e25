"""Span tables, strides and blocks of the CPU kernels, on every instruction set this machine runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cacr_kernels import native
from cacr_kernels.problem import Options, Spans
from cacr_kernels.testing import make_input, make_scores

from .cpu_backend import FIXTURES, KINDS, NEEDS_CPU, check, expected, joint, run

instruction_set, threads = FIXTURES
pytestmark = NEEDS_CPU


def ragged(batch: int, size: int, max_text: int, max_vision: int) -> Spans:
    """Text before and after vision, gaps, an empty span of each kind."""
    rows = [
        (1, 5, 9, 7),
        (12, 6, 2, 9),
        (0, max_text, max_text, max_vision),
        (3, 0, 4, 5),
        (2, 4, size, 0),
        (4, 1, 0, 1),
    ]
    table = torch.tensor([rows[i % len(rows)] for i in range(batch)], dtype=torch.int32)
    return Spans(0, max_text, 0, max_vision, table)


def outside(spans: Spans, size: int) -> Tensor:
    """Bool [B, 1, size, size]: positions that belong to no block of their example."""
    assert spans.table is not None
    inside = torch.zeros(len(spans.table), size, dtype=torch.bool)
    for row, (text_start, n_text, vision_start, n_vision) in zip(inside, spans.table.tolist()):
        if n_text and n_vision:
            row[text_start : text_start + n_text] = True
            row[vision_start : vision_start + n_vision] = True
    return ~(inside[:, None, :, None] & inside[:, None, None, :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_outside_the_spans_is_read_and_its_gradient_is_zero(kind: str, poison: float) -> None:
    spans = ragged(6, 22, 9, 13)
    clean = make_input(kind, 9, 13, batch=6, heads=2, dtype=torch.float64)
    mask = outside(spans, 22)
    attn = clean.masked_fill(mask, poison)
    options = Options(kind)  # type: ignore[arg-type]
    grad_loss = torch.rand(6, 2, dtype=torch.float64) + 0.5
    loss, (gradient,) = run([attn], spans, options, grad_loss)
    want, (want_gradient,) = expected([clean], spans, options, grad_loss)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-11, atol=1e-13)
    assert (gradient.masked_select(mask.expand_as(gradient)) == 0).all()
    assert (loss[3:5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "row",
    [(-1, 3, 4, 5), (0, -1, 4, 5), (0, 10, 10, 5), (0, 3, 18, 5), (0, 3, 2, 5), (2**31 - 1, 3, 4, 5), (4, 3, 0, 14)],
)
def test_an_invalid_example_is_nan_and_its_neighbours_are_not(dtype: torch.dtype, row: tuple[int, ...]) -> None:
    attn = make_scores(9, 13, batch=3, heads=2, dtype=dtype)
    good = (0, 9, 9, 13)
    spans = Spans(0, 9, 0, 13, torch.tensor([good, row, good], dtype=torch.int32))
    loss, (gradient,) = run([attn], spans, Options(), torch.ones(3, 2))
    assert loss[1].isnan().all()
    assert gradient[1].isnan().all()
    want, (want_gradient,) = run([attn[::2]], joint(9, 13), Options(), torch.ones(2, 2))
    assert torch.equal(loss[::2], want)
    assert torch.equal(gradient[::2], want_gradient)


def layouts(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(2, 3, 2 * size, 2 * size + 1, generator=generator, dtype=torch.float64)
    return {
        "transposed": wide[..., :size, :size].mT,
        "every second": wide[..., ::2, 1::2],
        "heads last": wide[..., :size, :size].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "expanded batch": wide[:1, :, :size, :size].expand(2, 3, size, size),
        "stride 0 rows": wide[..., :1, :size].expand(2, 3, size, size),
        "stride 0 columns": wide[..., :size, :1].expand(2, 3, size, size),
    }


@pytest.mark.parametrize("layout", layouts(2))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strides_do_not_matter(layout: str, dtype: torch.dtype) -> None:
    attn = layouts(38)[layout]
    attn = attn.to(dtype) if attn.to(dtype).stride() == attn.stride() else attn.to(torch.float64)
    spans = Spans(20, 17, 1, 19)
    grad_loss = torch.tensor(0.7).expand(2, 3)
    loss, (gradient,) = run([attn], spans, Options("softmax"), grad_loss)
    want, (want_gradient,) = run([attn.contiguous()], spans, Options("softmax"), grad_loss.contiguous())
    assert torch.equal(loss, want)
    assert torch.equal(gradient, want_gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_four_blocks_with_strides_of_their_own(kind: str) -> None:
    attn = make_input(kind, 9, 13, batch=2, heads=3, dtype=torch.float64)
    blocks = [
        attn[..., :9, :9].contiguous(),
        attn[..., :9, 9:],
        attn[..., 9:, :9].mT.contiguous().mT,
        attn[..., 9:, 9:],
    ]
    options = Options(kind)  # type: ignore[arg-type]
    check(blocks, Spans(0, 9, 0, 13), options, 1e-13, 1e-12)
    table = torch.tensor([[0, 4, 0, 13], [2, 7, 1, 5]], dtype=torch.int32)
    check(blocks, Spans(0, 9, 0, 13, table), options, 1e-13, 1e-12)
    loss, gradients = run(blocks, Spans(0, 9, 0, 13), options, torch.ones(2, 3))
    whole, (whole_gradient,) = run([attn], joint(9, 13), options, torch.ones(2, 3))
    assert torch.equal(loss, whole)
    assert torch.equal(torch.cat([torch.cat(gradients[:2], -1), torch.cat(gradients[2:], -1)], -2), whole_gradient)


def test_four_blocks_invalid_example() -> None:
    blocks = [torch.randn(2, 1, *shape) for shape in ((3, 3), (3, 5), (5, 3), (5, 5))]
    spans = Spans(0, 3, 0, 5, torch.tensor([[0, 3, 0, 5], [1, 3, 0, 5]], dtype=torch.int32))
    loss, gradients = run(blocks, spans, Options(), torch.ones(2, 1))
    assert loss.isnan().tolist() == [[False], [True]]
    for gradient in gradients:
        assert gradient[1].isnan().all()
        assert gradient[0].isfinite().all()


@pytest.mark.parametrize(("n_text", "n_vision"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_an_empty_modality_have_gradient_zero(
    n_text: int, n_vision: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients start as NaN: every element is written, also where the first block is empty and has no address."""
    monkeypatch.setattr(native, "_new_gradients", lambda inputs: [torch.full_like(x, float("nan")) for x in inputs])
    shapes = itertools.product((n_text, n_vision), repeat=2)
    blocks = [torch.randn(2, 3, *shape).to(dtype) for shape in shapes]
    loss, gradients = run(blocks, Spans(0, n_text, 0, n_vision), Options(), torch.ones(2, 3))
    assert torch.equal(loss, torch.zeros(2, 3))
    for block, gradient in zip(blocks, gradients):
        assert torch.equal(gradient, torch.zeros_like(block))


def test_empty_batch() -> None:
    loss, (gradient,) = run([torch.zeros(0, 3, 8, 8)], joint(3, 5), Options(), torch.ones(0, 3))
    assert loss.shape == (0, 3)
    assert gradient.shape == (0, 3, 8, 8)
