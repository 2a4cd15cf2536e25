"""The CPU kernels, on every instruction set this machine runs, against the reference in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import native
from cacr_kernels.problem import Options, Spans
from cacr_kernels.reference import cacr_loop
from cacr_kernels.reference.closed_form import scores_reference
from cacr_kernels.testing import PATTERNS, make_input, make_scores, relative_error

STATUS = native.status()["cpu"]
pytestmark = pytest.mark.skipif(not STATUS[0], reason=STATUS[1])

INSTRUCTION_SETS = native.build_info().get("instruction_sets", [""])
SIZES = (1, 2, 7, 33, 63, 129)
KINDS = ("scores", "softmax", "probs")


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native.cpu, "instruction_set", request.param)
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def run(inputs: list[Tensor], spans: Spans, options: Options, grad_loss: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss, saved = native.cpu.scores_forward(inputs, spans, options, True)
    return loss, native.cpu.scores_backward(grad_loss, inputs, saved, spans, options)


def expected(inputs: list[Tensor], spans: Spans, options: Options, grad_loss: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    loss = scores_reference(leaves, spans, options)
    # an option may leave an input (or all) without influence on the loss
    total = (loss * grad_loss.double()).sum() + sum((x * 0).nan_to_num().sum() for x in leaves)
    return loss.detach(), list(torch.autograd.grad(total, leaves))


def check(inputs: list[Tensor], spans: Spans, options: Options, loss_error: float, gradient_error: float) -> None:
    generator = torch.Generator().manual_seed(1)
    grad_loss = torch.rand(inputs[0].shape[:2], generator=generator, dtype=torch.float64) + 0.5
    loss, gradients = run(inputs, spans, options, grad_loss)
    want, want_gradients = expected(inputs, spans, options, grad_loss)
    assert loss.dtype == (torch.float64 if inputs[0].dtype == torch.float64 else torch.float32)
    assert (loss.double() - want).abs().max() <= loss_error * (want.abs().max() + 1), (loss, want)
    for x, gradient, want_gradient in zip(inputs, gradients, want_gradients):
        assert gradient.shape == x.shape
        assert gradient.dtype == x.dtype
        assert gradient.is_contiguous()
        assert (
            relative_error(gradient, want_gradient) <= gradient_error or (gradient - want_gradient).abs().max() <= 1e-13
        )


def joint(n_text: int, n_vision: int) -> Spans:
    return Spans(0, n_text, n_text, n_vision)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", ["both", "text", "vision"])
def test_loss_is_that_of_the_loop(kind: str, sides: str) -> None:
    for n_text, n_vision in ((1, 3), (4, 2), (5, 7)):
        attn = make_input(kind, n_text, n_vision, batch=2, heads=1, dtype=torch.float64)
        options = Options(kind, sides, 0.5, row_mean=True)  # type: ignore[arg-type]
        loss, _ = native.cpu.scores_forward([attn], joint(n_text, n_vision), options, False)
        loop = cacr_loop(
            attn, n_text, kind=kind, sides=sides, projection_scale=0.5, row_reduction="mean", reduction="none"
        )
        torch.testing.assert_close(loss, loop, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_text", SIZES)
def test_sizes_in_float64(kind: str, n_text: int) -> None:
    for n_vision in SIZES:
        attn = make_input(kind, n_text, n_vision, heads=2, std=0.5, dtype=torch.float64)
        check([attn], joint(n_text, n_vision), Options(kind, projection_mean=True), 1e-13, 1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_gradient", ["none", "target", "projection"])
def test_options(kind: str, stop_gradient: str) -> None:
    attn = make_input(kind, 9, 21, batch=2, heads=2, dtype=torch.float64)
    for sides, scale, mean, row_mean in itertools.product(("both", "text", "vision"), (-0.3, 1.0), (0, 1), (0, 1)):
        options = Options(kind, sides, scale, bool(mean), bool(row_mean), stop_gradient)  # type: ignore[arg-type]
        check([attn], joint(9, 21), options, 1e-13, 1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_at_most_twice_as_far_from_float64_as_plain_pytorch(kind: str, pattern: str) -> None:
    spans, options = joint(36, 36), Options(kind)  # type: ignore[arg-type]
    ours, plain = torch.zeros(2), torch.zeros(2)
    for seed in range(32):
        attn = make_input(kind, 36, 36, pattern=pattern, seed=seed)
        grad_loss = torch.ones(1, 1)
        want, (want_gradient,) = expected([attn], spans, options, grad_loss)
        loss, (gradient,) = run([attn], spans, options, grad_loss)
        leaf = attn.clone().requires_grad_()
        eager = scores_reference([leaf], spans, options)
        (eager_gradient,) = torch.autograd.grad(eager.sum(), leaf)
        ours += torch.tensor([relative_error(loss, want), relative_error(gradient, want_gradient)]) ** 2
        plain += torch.tensor([relative_error(eager, want), relative_error(eager_gradient, want_gradient)]) ** 2
    ours, plain = (ours / 32).sqrt(), (plain / 32).sqrt()
    assert (ours <= 2 * plain + 2 * torch.finfo(torch.float32).eps).all(), (ours, plain)


def test_a_common_offset_of_the_scores_keeps_its_digits() -> None:
    spans, options, grad_loss = joint(60, 100), Options(), torch.ones(1, 8)
    attn = make_scores(60, 100, heads=8, mean=-3.0)  # X: 1e5 without the constant that every row has
    want, (want_gradient,) = expected([attn], spans, options, grad_loss)
    loss, (gradient,) = run([attn], spans, options, grad_loss)
    errors = [relative_error(gradient[0, h], want_gradient[0, h]) for h in range(8)]
    assert torch.tensor(errors).square().mean().sqrt() <= 2.5e-5, errors
    assert ((loss / want - 1) ** 2).mean().sqrt() <= 7e-8


def test_equal_distributions_give_exactly_zero() -> None:
    attn = make_scores(33, 33, heads=2, pattern="congruent")
    loss, (gradient,) = run([attn], joint(33, 33), Options(), torch.ones(1, 2))
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient, torch.zeros_like(gradient))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_bits_every_time_and_for_every_number_of_threads(dtype: torch.dtype) -> None:
    attn = make_scores(33, 29, batch=3, heads=3, dtype=dtype)
    grad_loss = torch.rand(3, 3)
    torch.set_num_threads(1)
    loss, (gradient,) = run([attn], joint(33, 29), Options(), grad_loss)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        again, (gradient_again,) = run([attn], joint(33, 29), Options(), grad_loss)
        assert torch.equal(loss, again)
        assert torch.equal(gradient, gradient_again)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    spans, options = Spans(1, 4, 6, 3), Options(kind, "both", 0.7, False, True)  # type: ignore[arg-type]

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, attn: Tensor) -> Tensor:
            ctx.save_for_backward(attn)
            return native.cpu.scores_forward([attn], spans, options, True)[0]

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> Tensor:
            return native.cpu.scores_backward(grad_loss, [ctx.saved_tensors[0]], [], spans, options)[0]

    attn = make_input(kind, 5, 5, batch=2, heads=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(Loss.apply, (attn,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saved_gradients_and_recomputed_ones_agree(dtype: torch.dtype) -> None:
    attn = make_scores(7, 33, batch=2, heads=3, dtype=dtype)
    grad_loss = torch.tensor([[0.5], [-2.0]]).expand(2, 3)  # powers of two: scaling rounds nothing
    loss, saved = native.cpu.scores_forward([attn], joint(7, 33), Options(), True)
    assert len(saved) == (1 if dtype in (torch.float32, torch.float64) else 0)
    assert torch.equal(loss, native.cpu.scores_forward([attn], joint(7, 33), Options(), False)[0])
    (scaled,) = native.cpu.scores_backward(grad_loss, [attn], saved, joint(7, 33), Options())
    (recomputed,) = native.cpu.scores_backward(grad_loss, [attn], [], joint(7, 33), Options())
    assert torch.equal(scaled, recomputed)


PEAK = """
import sys, torch
from cacr_kernels import fused_cacr, native
from cacr_uniter.benchmark.timing import PeakMemory
native.cpu.instruction_set = sys.argv[1]
torch.set_num_threads(2)
attn = torch.full((32, 12, 160, 160), 0.1).requires_grad_()
fused_cacr(attn[:1, :2], 60, backend="cpu").backward()
attn.grad = None
with PeakMemory("cpu") as peak:
    fused_cacr(attn, 60, backend="cpu").backward()
print(peak.extra, attn.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
def test_a_training_step_holds_the_gradient_and_a_tile_a_thread(instruction_set: str) -> None:
    command = [sys.executable, "-c", PEAK, instruction_set]
    peak, gradient = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert gradient - (4 << 20) < peak < gradient + (4 << 20), f"{peak} bytes at the peak, gradient {gradient}"


def test_empty_batch() -> None:
    loss, (gradient,) = run([torch.zeros(0, 3, 8, 8)], joint(3, 5), Options(), torch.ones(0, 3))
    assert loss.shape == (0, 3)
    assert gradient.shape == (0, 3, 8, 8)


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


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.cpu, "instruction_set", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        native.cpu.scores_forward([torch.zeros(1, 1, 4, 4)], joint(2, 2), Options(), False)
