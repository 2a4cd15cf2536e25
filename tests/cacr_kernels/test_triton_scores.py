"""The Triton scores kernels, called as cacr_kernels.ops calls them.

Without a GPU they run under Triton's interpreter (conftest.py sets TRITON_INTERPRET before triton is imported), with
one, on it. All paths are exercised at small sizes: without buckets, all spans are large.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from cacr_kernels import fused_cacr
from cacr_kernels.problem import ROW_NUMBERS, Options, Spans
from cacr_kernels.reference import cacr_closed_form, cacr_loop
from cacr_kernels.reference.closed_form import scores_reference
from cacr_kernels.testing import make_input, relative_error, score_errors

pytest.importorskip("triton")
from cacr_kernels.triton import host, scores_backward, scores_forward
from cacr_kernels.triton.configs import INTERPRETER, Launch

from .tensor_cores import tensor_cores  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ("small", "whole sides", "whole logits", "large")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What is allocated without a value is NaN: nothing may count on it, and every element of a result is written."""

    def poisoned(allocate):
        def poison(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return poison

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "large":
        monkeypatch.setattr(host, "BUCKETS", ())
    if request.param.startswith("whole"):
        if DEVICE == "cuda":
            pytest.skip("a GPU's own plan says which sides are held whole: this is 'small' once more")
        monkeypatch.setattr(host, "INTERPRETER", replace(host.INTERPRETER, whole=request.param.removeprefix("whole ")))
    if request.param == "whole logits" and DEVICE == "cpu":
        # its passes form X in tiles of different sizes, whose products numpy would sum in different orders
        request.getfixturevalue("tensor_cores")
    return request.param


def run(inputs, spans, options=None, grad_loss=None):
    """(loss [B, H], gradients) of the kernels; grad_loss defaults to distinct weights."""
    options = options or Options()
    inputs = [x.to(DEVICE) for x in inputs]
    loss, saved = scores_forward(inputs, spans, options, True)
    if grad_loss is None:
        grad_loss = torch.linspace(0.5, 2.0, max(loss.numel(), 1), device=DEVICE)[: loss.numel()].view(loss.shape)
    return loss, scores_backward(grad_loss, inputs, saved, spans, options), grad_loss


def expected(inputs, spans, options, grad_loss):
    leaves = [x.detach().to(DEVICE, torch.float64).requires_grad_() for x in inputs]
    loss = scores_reference(leaves, spans, options)
    gradients = torch.autograd.grad((loss * grad_loss).sum(), leaves, allow_unused=True)
    return loss.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]


def check(inputs, spans, options=None, loss_budget=1e-6, gradient_budget=5e-6):
    options = options or Options()
    loss, gradients, grad_loss = run(inputs, spans, options)
    want_loss, want_gradients = expected(inputs, spans, options, grad_loss)
    assert loss.dtype == torch.float32
    assert relative_error(loss, want_loss) <= loss_budget
    for x, gradient, want in zip(inputs, gradients, want_gradients):
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
        assert gradient.is_contiguous()
        assert relative_error(gradient, want) <= gradient_budget
    return loss, gradients


def attention(kind, n, *, batch=1, heads=1, std=0.5, seed=0, dtype=torch.float32):
    """[batch, heads, n, n]: scores, or probabilities for kind "probs"."""
    half = n // 2
    return make_input(kind, half, n - half, batch=batch, heads=heads, std=std, seed=seed, dtype=dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles along every axis at sizes that the interpreter can afford."""
    kernels = {
        name: Launch(dict.fromkeys(entry.blocks, 32), entry.num_warps) for name, entry in INTERPRETER.kernels.items()
    }
    monkeypatch.setattr(host, "INTERPRETER", replace(host.INTERPRETER, kernels=kernels))


@pytest.mark.parametrize("kind", ["scores", "softmax"])
def test_several_tiles(path, small_tiles, kind):
    check([attention(kind, 78)], Spans(1, 33, 35, 40), Options(kind=kind))


@pytest.mark.parametrize(
    ("kind", "n_text", "n_vision"),
    [("scores", 7, 33), ("scores", 65, 2), ("scores", 1, 1), ("softmax", 1, 66), ("probs", 33, 7)],
)
def test_matches_the_closed_form(path, kind, n_text, n_vision):
    attn = attention(kind, n_text + n_vision)
    check([attn], Spans(0, n_text, n_text, n_vision), Options(kind=kind))


@pytest.mark.slow
@pytest.mark.parametrize("n_vision", [127, 33])
def test_long_spans(path, n_vision):
    check([attention("scores", 65 + n_vision, std=0.3)], Spans(0, 65, 65, n_vision))


@pytest.mark.parametrize(
    ("kind", "sides"),
    [("scores", "both"), ("softmax", "both"), ("probs", "both"), ("scores", "text"), ("softmax", "vision")],
)
def test_loss_is_that_of_the_loops(path, kind, sides):
    attn = attention(kind, 16, batch=2)
    loss, _, _ = run([attn], Spans(1, 6, 8, 7), Options(kind=kind, sides=sides))
    want = cacr_loop(attn, 6, n_vision=7, text_start=1, vision_start=8, kind=kind, sides=sides, reduction="none")
    assert relative_error(loss, want) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "sides", "stop_gradient"),
    [
        ("scores", "text", "none"),
        ("scores", "vision", "none"),
        ("scores", "text", "target"),
        ("scores", "vision", "projection"),
        ("softmax", "text", "target"),
        ("softmax", "vision", "none"),
    ],
)
def test_sides_and_stopped_gradients(path, kind, sides, stop_gradient):
    options = Options(kind, sides, 0.7, True, True, stop_gradient)
    check([attention(kind, 44)], Spans(3, 5, 9, 35), options)


@pytest.mark.parametrize("stop_gradient", ["target", "projection"])
def test_stopped_gradients_of_both_sides(path, stop_gradient):
    check([attention("scores", 44)], Spans(9, 35, 3, 5), Options(stop_gradient=stop_gradient))


@pytest.mark.parametrize("kind", ["scores", "softmax"])
def test_four_blocks(path, kind):
    n_text, n_vision = 6, 35
    shapes = [(n_text, n_text), (n_text, n_vision), (n_vision, n_text), (n_vision, n_vision)]
    generator = torch.Generator().manual_seed(1)
    blocks = [torch.randn(1, 2, *shape, generator=generator) * 0.4 for shape in shapes]
    check(blocks, Spans(0, n_text, 0, n_vision), Options(kind=kind))
    check([blocks[0].transpose(-1, -2), *blocks[1:]], Spans(0, n_text, 0, n_vision), Options(kind=kind))


def ragged(*rows):
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("kind", ["scores", "softmax"])
def test_ragged_spans(path, kind):
    table = ragged((1, 5, 7, 33), (34, 6, 0, 34), (0, 0, 8, 12), (3, 9, 12, 1))
    check([attention(kind, 40, batch=4)], Spans(0, 9, 0, 34, table), Options(kind=kind, row_mean=True))


def test_ragged_blocks(path):
    n_text, n_vision = 9, 35
    shapes = [(n_text, n_text), (n_text, n_vision), (n_vision, n_text), (n_vision, n_vision)]
    blocks = [torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(2)) * 0.4 for shape in shapes]
    check(blocks, Spans(0, 9, 0, 35, ragged((2, 7, 1, 33), (0, 9, 0, 20))))


def test_invalid_examples_are_nan_and_alone(path):
    # too early, too long for the bound, overlapping, past the end, of negative length, overflowing int32
    invalid = [(-1, 3, 4, 5), (0, 9, 9, 2), (0, 3, 2, 5), (8, 4, 0, 5), (0, 3, 7, -2), (2**31 - 1, 3, 4, 5)]
    attn = attention("scores", 11, batch=8)
    spans = Spans(0, 5, 0, 6, ragged((0, 4, 5, 6), *invalid, (6, 5, 0, 5)))
    loss, gradients, grad_loss = run([attn], spans)
    assert loss[1:-1].isnan().all()
    assert gradients[0][1:-1].isnan().all()
    good = Spans(0, 5, 0, 6, ragged((0, 4, 5, 6), (6, 5, 0, 5)))
    want_loss, want = expected([attn[[0, -1]]], good, Options(), grad_loss[[0, -1]])
    assert relative_error(loss[[0, -1]], want_loss) <= 1e-6
    assert relative_error(gradients[0][[0, -1]], want[0]) <= 5e-6


@pytest.mark.parametrize(
    ("kind", "poison"), [("scores", float("nan")), ("softmax", float("inf")), ("probs", float("-inf"))]
)
def test_nothing_outside_the_spans_counts(path, kind, poison):
    clean = attention(kind, 20)
    inside = torch.zeros(20, dtype=torch.bool)
    inside[2:8] = inside[9:18] = True
    inside = inside[:, None] & inside[None, :]
    spans, options = Spans(2, 6, 9, 9), Options(kind=kind)
    loss, gradients, _ = run([clean], spans, options)
    dirty_loss, dirty_gradients, _ = run([torch.where(inside, clean, poison)], spans, options)
    assert torch.equal(loss, dirty_loss)
    assert torch.equal(gradients[0], dirty_gradients[0])
    assert (gradients[0].cpu()[0, 0][~inside] == 0).all()
    assert gradients[0].cpu()[0, 0][inside].abs().max() > 0


@pytest.mark.parametrize(
    ("bad", "where"), [("nan", (3, 4)), ("inf", (3, 4)), ("-inf", (3, 12)), ("inf", (12, 3)), ("nan", (12, 13))]
)
def test_bad_numbers_inside_the_spans_show(path, bad, where):
    attn = attention("scores", 16)
    attn[0, 0, where[0], where[1]] = float(bad)
    loss, _ = scores_forward([attn.to(DEVICE)], Spans(0, 7, 7, 9), Options(), False)
    assert loss.isnan().all()


def test_memory_layouts_agree(path):
    spans = Spans(2, 6, 9, 9)
    attn = attention("scores", 20, batch=2).to(DEVICE)
    loss, gradients, _ = run([attn], spans)
    wide = torch.zeros(2, 1, 25, 31, device=DEVICE)
    wide[..., 3:23, 5:25] = attn
    layouts = [
        attn.transpose(-1, -2).contiguous().transpose(-1, -2),
        attn.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        wide[..., 3:23, 5:25],
    ]
    for layout in layouts:
        again, again_gradients, _ = run([layout], spans)
        assert torch.equal(loss, again)
        assert torch.equal(gradients[0], again_gradients[0])
        assert again_gradients[0].is_contiguous()


@pytest.mark.parametrize(("kind", "dtype"), [("scores", torch.float32), ("softmax", torch.bfloat16)])
def test_spans_of_whole_quads_compute_the_same(path, kind, dtype, monkeypatch):
    attn, spans, options = attention(kind, 84, batch=2, dtype=dtype), Spans(4, 40, 48, 36), Options(kind=kind)
    loose = {} if dtype == torch.float32 else {"loss_budget": 1e-5, "gradient_budget": 4e-3}
    loss, gradients = check([attn], spans, options, **loose)
    monkeypatch.setattr(host, "in_quads", lambda *numbers: False)
    again, again_gradients = check([attn], spans, options, **loose)
    if DEVICE == "cpu":  # a GPU's compiler may add the numbers of a row in another order
        assert torch.equal(loss, again)
        assert torch.equal(gradients[0], again_gradients[0])


def test_what_reads_in_quads():
    def step(x, *bounds, table=None):
        problem = host.Problem(x if isinstance(x, list) else [x], Spans(*bounds, table), Options())
        assert {block.step.value for block in problem.blocks} == {problem.spans.step.value}
        return problem.spans.step.value

    def blocks(n_text, n_vision):
        return [torch.empty(2, 3, r, c) for r in (n_text, n_vision) for c in (n_text, n_vision)]

    attn = torch.empty(2, 3, 32, 32)
    assert step(attn, 4, 8, 16, 12) == 4
    others = ((4, 7, 16, 12), (2, 8, 16, 12), (4, 8, 15, 12), (4, 8, 16, 13))
    assert [step(attn, *bounds) for bounds in others] == [1] * 4
    assert step(attn, 4, 8, 16, 12, table=torch.zeros(2, 4, dtype=torch.int32)) == 1
    assert step(attn.mT, 4, 8, 16, 12) == 1
    assert step(torch.empty(2, 3, 33, 33), 4, 8, 16, 12) == 1
    assert step(torch.empty(2, 3, 32, 33)[..., :32], 4, 8, 16, 12) == 1
    assert step(torch.empty(2, 3, 32, 36)[..., :32], 4, 8, 16, 12) == 4
    assert step(blocks(8, 12), 0, 8, 0, 12) == 4
    assert step(blocks(8, 11), 0, 8, 0, 11) == 1


def test_expanded_input(path):
    attn = attention("scores", 20).expand(2, 2, 20, 20)
    check([attn], Spans(2, 6, 9, 9))
    check([torch.full((1, 1, 1, 1), 0.25).expand(1, 1, 8, 8)], Spans(0, 4, 4, 4), gradient_budget=0.0)


def test_strided_grad_loss(path):
    attn = attention("scores", 14, batch=2)
    spans = Spans(0, 6, 6, 8)
    _, ones, _ = run([attn], spans, grad_loss=torch.full((), 3.0, device=DEVICE).expand(2, 1))
    _, dense, _ = run([attn], spans, grad_loss=torch.full((2, 1), 3.0, device=DEVICE))
    assert torch.equal(ones[0], dense[0])


@pytest.mark.parametrize("kind", ["scores", "softmax"])
def test_repeated_runs_agree_bit_for_bit(path, kind):
    attn = attention(kind, 50, heads=2)
    spans, options = Spans(1, 9, 11, 38), Options(kind=kind)
    first = run([attn], spans, options)
    second = run([attn], spans, options)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


def test_equal_distributions_give_exactly_zero(path):
    attn = make_input("scores", 20, 20, pattern="congruent")
    loss, gradients, _ = run([attn], Spans(0, 20, 20, 20))
    assert (loss == 0).all()
    assert (gradients[0] == 0).all()


def test_extreme_logits(path):
    attn = attention("scores", 20, std=1.0)
    attn[..., :8, :8] *= 1e4
    check([attn], Spans(0, 8, 8, 12), gradient_budget=1e-5)


def measured(function, n_text, n_vision, **options):
    """Root mean square errors over four problems."""
    return score_errors(function, n_text, n_vision, count=4, device=DEVICE, **options)


def test_a_common_offset_costs_no_precision(path):
    """Without centring 2.3e-07 and 1.6e-05, as the eager closed form: X is then near -2.7e5."""
    errors = measured(partial(fused_cacr, backend="triton"), 60, 100, std=0.3, mean=-3.0)
    assert errors.loss <= (1e-7 if DEVICE == "cpu" else 1e-6)
    assert errors.gradient <= (1e-6 if DEVICE == "cpu" else 2e-5)


@pytest.mark.parametrize(
    ("n_text", "n_vision", "options"),
    [
        # E_p[d] and E_q[d] are nearly equal: with a reference far from both, the loss is 40 times worse
        (20, 36, {"pattern": "uniform"}),
        # rows nearly one-hot, maxima that move by 1e4 from tile to tile: E_p[d] must not be rounded at that size
        (8, 40, {"std": 10.0}),
    ],
    ids=["nearly uniform rows", "nearly one-hot rows"],
)
def test_at_most_twice_the_error_of_the_closed_form(path, small_tiles, n_text, n_vision, options):
    errors = measured(partial(fused_cacr, backend="triton"), n_text, n_vision, **options)
    eager = measured(cacr_closed_form, n_text, n_vision, **options)
    least = 2e-7 if DEVICE == "cpu" else 1e-6  # tensor cores truncate their sums
    assert errors.loss <= 2 * eager.loss + least
    assert errors.gradient <= 2 * eager.gradient + least


def test_near_congruent_rows(path):
    n = 16
    generator = torch.Generator().manual_seed(3)
    attn = torch.zeros(1, 1, 2 * n, 2 * n)
    attn[..., :n, n:] = torch.eye(n)
    attn[..., n:, n:] = torch.randn(n, n, generator=generator)
    attn[..., :n, :n] = attn[..., n:, n:] + 100 + 1e-2 * torch.randn(n, n, generator=generator)
    loss, _, _ = run([attn], Spans(0, n, n, n), Options(sides="text"))
    want, _ = expected([attn], Spans(0, n, n, n), Options(sides="text"), torch.ones(1, 1, device=DEVICE))
    assert (loss >= 0).all()
    assert relative_error(loss, want) <= 1e-4


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float16, "scores"),
        (torch.bfloat16, "scores"),
        (torch.bfloat16, "softmax"),
        (torch.float16, "probs"),
    ],
)
def test_half_precision_inputs(path, dtype, kind):
    attn = attention(kind, 40, dtype=dtype)
    check([attn], Spans(1, 6, 7, 33), Options(kind=kind), loss_budget=1e-5, gradient_budget=4e-3)


def test_large_float16_scores_do_not_overflow(path):
    attn = attention("scores", 24, std=40.0, dtype=torch.float16)
    loss, _, _ = run([attn], Spans(0, 8, 8, 16))
    want, _ = expected([attn], Spans(0, 8, 8, 16), Options(), torch.ones(1, 1, device=DEVICE))
    assert relative_error(loss, want) <= 1e-5


@pytest.mark.parametrize(("batch", "n_text", "n_vision"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_compare(path, batch, n_text, n_vision):
    loss, gradients, _ = run([torch.randn(batch, 2, 7, 7)], Spans(0, n_text, 3, n_vision))
    assert loss.shape == (batch, 2)
    assert (loss == 0).all()
    assert (gradients[0] == 0).all()


def test_saved_numbers_are_what_the_fake_kernel_promises(path):
    attn = attention("scores", 14, batch=2).to(DEVICE)
    loss, saved = scores_forward([attn], Spans(0, 6, 6, 8), Options(), True)
    assert [tuple(x.shape) for x in saved] == [(2, 1, ROW_NUMBERS, 14)]
    bare, nothing = scores_forward([attn], Spans(0, 6, 6, 8), Options(), False)
    assert nothing == []
    assert torch.equal(loss, bare)


@pytest.mark.parametrize("n_text", [4, 5, 30])
def test_workspace_is_at_most_one_float32_copy_of_the_scores(path, n_text, monkeypatch):
    """But for the padding of its rows to 16 bytes: at most three numbers, in at most three matrices of 36 rows."""
    quads = []
    workspace = host.Problem.workspace
    monkeypatch.setattr(
        host.Problem, "workspace", lambda self, size, **places: quads.append(size) or workspace(self, size, **places)
    )
    run([attention("scores", 36)], Spans(0, n_text, n_text, 36 - n_text))
    assert quads
    assert 4 * max(quads) <= 36 * 36 + (0 if n_text % 4 == 0 else 3 * 3 * 36)
