"""Span tables in the CUDA kernels: empty, invalid and separate spans, and what lies outside of them."""

import pytest
import torch

from cacr_kernels.problem import Options, Spans
from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.reference.closed_form import scores_reference
from cacr_kernels.testing import loss_and_gradients, make_input, make_scores, relative_error

from .cuda_backend import FIXTURES, KINDS, NAN, cuda, forward_and_backward, problem_of

emulation, emulated, device, short_spans, products, emulated_order = FIXTURES

# text_start, n_text, vision_start, n_vision of examples with 32 tokens, at most 9 and 20 in a span
VALID = [[1, 5, 8, 20], [20, 7, 2, 11], [0, 0, 4, 9], [3, 9, 12, 20], [2, 4, 6, 1], [7, 3, 0, 0]]
INVALID = [[30, 4, 0, 5], [-1, 3, 9, 9], [0, 4, 3, 9], [0, 10, 10, 5], [0, 3, 2**31 - 1, 20], [-(2**31), 2, 5, -3]]


@pytest.mark.parametrize("kind", KINDS)
def test_span_tables_with_empty_and_invalid_examples(device, kind):
    """Nothing outside the spans is read (NaN there) or given a gradient; an invalid example is NaN throughout."""
    n_valid = len(VALID)
    attn = make_scores(12, 20, batch=n_valid + len(INVALID), heads=2, std=0.5, seed=4, device=device)
    attn = attn.softmax(-1) if kind == "probs" else attn
    inside = torch.zeros(len(attn), 32, dtype=torch.bool, device=device)
    for example, (text, n_text, vision, n_vision) in enumerate(VALID):
        inside[example, text : text + n_text] = inside[example, vision : vision + n_vision] = True
    inside = (inside[:, None, :, None] & inside[:, None, None, :]).expand_as(attn)
    problem = problem_of(VALID + INVALID, kind, (9, 20), device)
    loss, (gradient,) = forward_and_backward([attn.masked_fill(~inside, NAN)], problem)

    table = torch.tensor(VALID, device=device)
    spans = dict(zip(("text_start", "n_text", "vision_start", "n_vision"), table.T, strict=True))
    expected, (expected_gradient,) = loss_and_gradients(
        lambda x: cacr_closed_form(x, **spans, kind=kind, reduction="none"), attn[:n_valid].double()
    )
    assert relative_error(loss[:n_valid], expected) < 2e-5
    assert relative_error(gradient[:n_valid], expected_gradient) < 2e-5
    assert (gradient[:n_valid][~inside[:n_valid]] == 0).all()
    assert (loss[[2, 5]] == 0).all()
    assert (gradient[[2, 5]] == 0).all()
    assert loss[n_valid:].isnan().all()
    assert gradient[n_valid:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_four_blocks_with_a_span_table(device, kind):
    """Spans of separate blocks may overlap as numbers; a table that leaves a block is invalid."""
    table = [[2, 5, 0, 13], [0, 7, 3, 9], [1, 7, 0, 13]]
    shapes = [(7, 7), (7, 13), (13, 7), (13, 13)]
    blocks = [make_scores(r, c, batch=3, heads=2, std=0.5, device=device)[..., :r, -c:] for r, c in shapes]
    blocks = [b.softmax(-1) if kind == "probs" else b for b in blocks]
    loss, gradients = forward_and_backward(blocks, problem_of(table, kind, (7, 13), device))
    spans = Spans(0, 7, 0, 13, torch.tensor(table[:2], dtype=torch.int32, device=device))
    expected, expected_gradients = loss_and_gradients(
        lambda *x: scores_reference(list(x), spans, Options(kind=kind)), *(b[:2].double() for b in blocks)
    )
    assert relative_error(loss[:2], expected) < 2e-5
    assert loss[2].isnan().all()
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient[:2], expected_gradient) < 2e-5
        assert gradient[2].isnan().all()


def test_only_axis_x_grows_with_the_square_of_the_tokens(emulated):
    """Axis y ends at 65,535 blocks: 256 x 256 tiles are more. The bounds of the spans size the launches."""
    attn = make_scores(640, 20, seed=1)
    forward_and_backward([attn], problem_of([[0, 3, 640, 5]], "scores", (640, 20), "cpu"))
    assert emulated.largest_y() <= -(-660 // 16)


@pytest.mark.parametrize(("n_vision", "launches"), [(5, 4), (4, 5)])
def test_gradients_are_filled_first_only_if_spans_leave_something(emulated, n_vision, launches):
    loss_and_gradients(lambda x: cuda(x, 4, n_vision=n_vision), make_scores(4, 5))
    assert emulated.launches() == launches  # forward, loss, [fill], rows, blocks


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), NAN])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_inside_a_span_reach_the_loss(device, kind, value):
    """In the first and in later chunks and tiles of a row, of one side and of both; other problems stay as they are."""
    if kind != "scores" and value == -float("inf"):
        pytest.skip("a probability is not negative, and softmax of -inf is 0")
    clean = make_input(kind, 5, 70, heads=6, std=0.5, device=device)
    attn = clean.clone()
    for head, (row, col) in enumerate([(2, 3), (3, 40), (41, 1), (50, 74), (70, 6)], start=1):
        attn[0, head, row, col] = value
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 5, kind=kind, reduction="none"), attn)
    assert loss[0, 1:].isnan().all()
    assert gradient[0, 1:].isnan().flatten(1).any(1).all()
    same, (same_gradient,) = loss_and_gradients(lambda x: cuda(x, 5, kind=kind, reduction="none"), clean)
    assert torch.equal(loss[0, 0], same[0, 0])
    assert torch.equal(gradient[0, 0], same_gradient[0, 0])


def test_more_problems_than_a_grid_has_blocks_are_refused(emulated):
    module = emulated.module
    options = module.Options(0, 0, 0, 1.0, False, False)
    spans = module.SpanTable(0, 0, 1, 1, 1, 2, 2, True)
    problem = module.Problem(2, options, spans, 1 << 20, 1 << 11, True, [(0, (0, 0, 0, 0))] * 4)
    problem.set_workspace(0, 1 << 50)
    for launch in (module.scores_forward_cuda, module.scores_backward_cuda):
        with pytest.raises(RuntimeError, match="CUDA"):
            launch(problem)
    assert emulated.launches() == 0
