"""The Triton scores kernels against the reference: sizes, options, spans, layouts, and what lies outside the spans."""

from __future__ import annotations

import pytest
import torch

from cacr_kernels.problem import ROW_NUMBERS, Options, Spans
from cacr_kernels.reference import cacr_loop
from cacr_kernels.testing import relative_error

from .triton_scores import DEVICE, FIXTURES, attention, check, expected, host, run, scores_forward

poisoned_memory, path, small_tiles, tensor_cores = FIXTURES


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
