"""Short spans in the CUDA kernels: from sm_80 on one kernel forward and one backward."""

import pytest
import torch

from cacr_kernels import fused_cacr_blocks, native
from cacr_kernels.problem import Options, Spans
from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.testing import loss_and_gradients, make_input, make_scores, relative_error

from .cuda_backend import FIXTURES, NAN, VARIANTS, cuda, forward_and_backward, problem_of

emulation, emulated, device, short_spans, products, emulated_order = FIXTURES

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
#: relative errors: U keeps 22 bits in two halves or tf32 numbers, 16 in two bfloat16; 16-bit gradients are rounded once
LOSS = {torch.float16: 1e-6, torch.bfloat16: 5e-6, torch.float32: 1e-6}
GRADIENT = {dtype: 0.35 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)} | {torch.float32: 5e-6}


@pytest.fixture(autouse=True)
def as_from_sm_80(request):
    """The emulated kernels; a card has its own."""
    if "emulated" in request.fixturenames or request.getfixturevalue("device") == "cpu":
        request.getfixturevalue("emulated").fused(True)


def agree(attn, n_text, **options):
    """Loss and gradient against float64 on the same values."""
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, n_text, **options), attn)
    expected, (expected_gradient,) = loss_and_gradients(lambda x: cacr_closed_form(x, n_text, **options), attn.double())
    assert relative_error(loss, expected) < LOSS[attn.dtype]
    assert relative_error(gradient, expected_gradient) < GRADIENT[attn.dtype]


@DTYPES
@pytest.mark.parametrize(
    ("n_text", "n_vision"),
    [(1, 1), (16, 16), (17, 32), (20, 36), (64, 2), (60, 100), (100, 80), (112, 112), (112, 1), (16, 112)],
)
def test_sizes(device, dtype, n_text, n_vision):
    agree(make_scores(n_text, n_vision, std=0.4, dtype=dtype, seed=n_text, device=device), n_text)


@pytest.mark.parametrize(
    ("n_text", "n_vision", "dtype", "kind", "launches"),
    [
        (20, 36, torch.bfloat16, "scores", 2),
        (20, 36, torch.float16, "probs", 2),
        (16, 112, torch.float16, "scores", 2),
        (20, 36, torch.float32, "scores", 2),
        (64, 112, torch.float32, "scores", 2),
        (80, 112, torch.float32, "scores", 4),  # more shared memory than any card has
        (20, 36, torch.bfloat16, "softmax", 7),
        (1, 113, torch.bfloat16, "scores", 4),
        (112, 112, torch.bfloat16, "scores", 4),  # more than twelve warps
    ],
)
def test_what_is_fused(emulated, n_text, n_vision, dtype, kind, launches):
    loss_and_gradients(lambda x: cuda(x, n_text, kind=kind), make_input(kind, n_text, n_vision, dtype=dtype))
    assert emulated.launches() == launches


def test_fused_kernels_need_no_workspace(emulated):
    def workspace():
        problem = native._problem([make_scores(20, 36)], Spans(0, 20, 20, 36), Options())
        return emulated.module.forward_workspace_cuda(problem), emulated.module.backward_workspace_cuda(problem)

    assert workspace() == (0, 0)
    emulated.fused(False)
    assert min(workspace()) >= 4 * 2 * 20 * 36


@DTYPES
def test_less_shared_memory_takes_other_kernels(emulated, dtype):
    attn = make_scores(20, 36, dtype=dtype)
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 20), attn)
    emulated.configure(0)
    emulated.controls.cacr_emulation_shared_limit(16 << 10)
    other, (other_gradient,) = loss_and_gradients(lambda x: cuda(x, 20), attn)
    assert emulated.launches() == 4
    assert relative_error(loss, other) < 1e-6
    assert relative_error(gradient, other_gradient) < GRADIENT[dtype]


@DTYPES
@pytest.mark.parametrize("kind", ["scores", "probs"])
@VARIANTS
def test_options(device, dtype, kind, options):
    agree(make_input(kind, 18, 35, heads=2, std=0.5, dtype=dtype, seed=3, device=device), 18, kind=kind, **options)


@DTYPES
@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("width", [80, 79, 74, 76])
def test_alignments(device, dtype, shift, width):
    """Rows that begin at 2 (16 bits), 4, 8 and 16 bytes, and lie so far apart."""
    storage = torch.full((57, width), NAN, dtype=dtype, device=device)
    view = storage[:50, shift : shift + 50]
    view.copy_(make_scores(16, 34, std=0.5, seed=shift, device=device)[0, 0])
    agree(view[None, None], 16)


@DTYPES
def test_layouts(device, dtype):
    attn = make_scores(19, 26, batch=2, heads=2, std=0.7, dtype=dtype, seed=6, device=device)
    for view in (attn.mT, attn[..., ::2, ::2], attn[:1, :1].expand(2, 2, 45, 45), attn.movedim(1, -1).movedim(-1, 1)):
        agree(view, 15)


@DTYPES
def test_four_blocks(device, dtype):
    attn = make_scores(6, 70, batch=2, std=0.4, seed=9, dtype=dtype, device=device)
    blocks = [attn[..., :6, :6], attn[..., :6, 6:], attn[..., 6:, :6], attn[..., 6:, 6:]]
    loss, gradients = loss_and_gradients(lambda *x: fused_cacr_blocks(*x, backend="cuda"), *blocks)
    whole, (gradient,) = loss_and_gradients(lambda x: cuda(x, 6), attn)
    assert torch.equal(loss, whole)
    assert torch.equal(torch.cat([torch.cat(gradients[:2], -1), torch.cat(gradients[2:], -1)], -2), gradient)


@DTYPES
@pytest.mark.parametrize("kind", ["scores", "probs"])
def test_span_tables_with_empty_and_invalid_examples(device, dtype, kind):
    """Nothing outside the spans is read (NaN there) or given a gradient; an invalid example is NaN throughout."""
    valid = [[1, 5, 8, 20], [20, 7, 2, 11], [0, 0, 4, 9], [3, 9, 12, 20], [2, 4, 6, 1], [7, 3, 0, 0]]
    invalid = [[30, 4, 0, 5], [-1, 3, 9, 9], [0, 4, 3, 9], [0, 10, 10, 5], [0, 3, 2**31 - 1, 20]]
    attn = make_scores(12, 20, batch=len(valid + invalid), heads=2, std=0.5, seed=4, device=device)
    attn = (attn.softmax(-1) if kind == "probs" else attn).to(dtype)
    inside = torch.zeros_like(attn, dtype=torch.bool)
    for example, (text, n_text, vision, n_vision) in enumerate(valid):
        where = torch.cat([torch.arange(text, text + n_text), torch.arange(vision, vision + n_vision)]).to(device)
        inside[example][:, where[:, None], where] = True
    loss, (gradient,) = forward_and_backward(
        [attn.masked_fill(~inside, NAN)], problem_of(valid + invalid, kind, (9, 20), device)
    )
    n = len(valid)
    table = torch.tensor(valid, device=device)
    spans = dict(zip(("text_start", "n_text", "vision_start", "n_vision"), table.T, strict=True))
    expected, (expected_gradient,) = loss_and_gradients(
        lambda x: cacr_closed_form(x, **spans, kind=kind, reduction="none"), attn[:n].double()
    )
    assert relative_error(loss[:n], expected) < 2e-6
    assert relative_error(gradient[:n], expected_gradient) < GRADIENT[dtype]
    assert (gradient[:n][~inside[:n]] == 0).all()
    assert (loss[[2, 5]] == 0).all()
    assert loss[n:].isnan().all()
    assert gradient[n:].isnan().all()


@DTYPES
def test_a_side_left_out_is_not_read(device, dtype):
    attn = make_scores(18, 21, std=0.5, dtype=dtype, device=device)
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 18, sides="text"), attn)
    poisoned = attn.clone()
    poisoned[..., 18:, :18] = NAN
    same, (same_gradient,) = loss_and_gradients(lambda x: cuda(x, 18, sides="text"), poisoned)
    assert torch.equal(loss, same)
    assert torch.equal(gradient, same_gradient)
    assert (gradient[..., 18:, :18] == 0).all()


@DTYPES
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), NAN])
def test_nan_and_infinity_inside_a_span_reach_the_loss(device, dtype, value):
    clean = make_scores(5, 70, heads=6, std=0.5, dtype=dtype, device=device)
    attn = clean.clone()
    for head, (row, col) in enumerate([(2, 3), (3, 40), (41, 1), (50, 74), (70, 6)], start=1):
        attn[0, head, row, col] = value
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 5, reduction="none"), attn)
    assert loss[0, 1:].isnan().all()
    assert gradient[0, 1:].isnan().flatten(1).any(1).all()
    same, (same_gradient,) = loss_and_gradients(lambda x: cuda(x, 5, reduction="none"), clean)
    assert torch.equal(loss[0, 0], same[0, 0])
    assert torch.equal(gradient[0, 0], same_gradient[0, 0])


@pytest.mark.parametrize("place", [(3, 2), (2, 30), (30, 2), (30, 41), (45, 6), (6, 45)])
@pytest.mark.parametrize("sides", ["text", "vision"])
def test_the_nan_of_a_card_is_not_lost(device, sides, place):
    """Its bits are all ones but the sign, and rounding to tf32 adds to them."""
    attn = make_scores(5, 70, std=0.5, device=device)
    attn.view(torch.int32)[0, 0, *place] = 0x7FFFFFFF
    expected = cacr_closed_form(attn, 5, sides=sides)
    assert cuda(attn, 5, sides=sides).isnan() == expected.isnan()


@DTYPES
def test_congruent_attention_has_zero_loss_and_gradient(device, dtype):
    attn = make_scores(33, 33, pattern="congruent", dtype=dtype, device=device)
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 33), attn)
    assert loss == 0
    assert (gradient == 0).all()


@DTYPES
@pytest.mark.parametrize(
    "options",
    [{"pattern": "uniform"}, {"std": 10.0}, {"std": 0.3, "mean": -3.0}, {"std": 0.3, "pattern": "outlier"}],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_inputs_that_bite(device, dtype, options):
    attn = make_scores(20, 36, heads=3, dtype=dtype, seed=8, device=device, **options)
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 20), attn)
    expected, (expected_gradient,) = loss_and_gradients(lambda x: cacr_closed_form(x, 20), attn.double())
    assert relative_error(loss, expected) < 5e-6
    # gradients of nearly uniform rows lie where float16 has less than 11 bits; eager's errors there in float32: 8e-5
    rounding = relative_error(expected_gradient.to(dtype), expected_gradient)
    exact = 8e-5 if options.get("pattern") == "uniform" else GRADIENT[torch.float32]
    assert relative_error(gradient, expected_gradient) < (exact if dtype == torch.float32 else 1.1 * rounding)
