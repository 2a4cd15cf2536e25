"""float16 and bfloat16 scores in the CUDA kernels, float16 on tensor cores and in multiply-adds."""

import pytest
import torch

from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.testing import loss_and_gradients, make_input, make_scores, relative_error

from .cuda_backend import FIXTURES, KINDS, NAN, VARIANTS, cuda

emulation, emulated, device, short_spans, products, emulated_order = FIXTURES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(device, products, dtype, kind):
    attn = make_input(kind, 20, 37, std=0.5, dtype=dtype, seed=1, device=device)
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 20, kind=kind), attn)
    expected, (expected_gradient,) = loss_and_gradients(lambda x: cacr_closed_form(x, 20, kind=kind), attn.double())
    assert relative_error(loss, expected) < 1e-5
    # two contributions of S_tt and S_vv, one rounding: half a unit in the last place, root mean square below a third
    assert relative_error(gradient, expected_gradient) < 0.35 * torch.finfo(dtype).eps


def test_half_precision_gradient_overflows_to_infinity(device, products):
    attn = make_scores(8, 8, std=150.0, dtype=torch.float16, seed=2, device=device)
    _, (gradient,) = loss_and_gradients(lambda x: cuda(x, 8), attn)
    _, (expected,) = loss_and_gradients(lambda x: cacr_closed_form(x, 8), attn.double())
    assert torch.isinf(expected.half()).any()
    assert torch.equal(gradient.isinf(), expected.half().isinf())


def half_precision_agrees(attn, n_text, weight=1.0, **options):
    """float16 against float64 on the same values: the loss, and the gradient, rounded once, also row by row."""
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, n_text, **options) * weight, attn)
    expected, (expected_gradient,) = loss_and_gradients(
        lambda x: cacr_closed_form(x, n_text, **options) * weight, attn.double()
    )
    eps = torch.finfo(torch.float16).eps
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 0.35 * eps
    # a row may lie where float16 has less than 11 bits: its rounding is half of 2^-24 an element
    rounding = 0.5 * eps * expected_gradient.norm(dim=-1) + 2.0**-25 * attn.shape[-1] ** 0.5
    assert ((gradient.double() - expected_gradient).norm(dim=-1) < 1.05 * rounding).all()


@pytest.mark.parametrize(("n_text", "n_vision"), [(1, 1), (2, 7), (33, 1), (7, 63), (63, 33), (129, 2), (65, 100)])
def test_half_precision_sizes(device, n_text, n_vision):
    attn = make_scores(n_text, n_vision, std=0.5, dtype=torch.float16, seed=n_text, device=device)
    half_precision_agrees(attn, n_text)


@pytest.mark.parametrize("kind", ["scores", "probs"])
@VARIANTS
def test_half_precision_options(device, kind, options):
    attn = make_input(kind, 6, 19, batch=2, heads=2, std=0.5, dtype=torch.float16, seed=3, device=device)
    half_precision_agrees(attn, 6, kind=kind, **options)


def test_half_precision_ragged(device):
    """Spans of several sizes in one launch, what lies outside is NaN and gets a gradient of 0."""
    spans = {"text_start": [2, 30, 0], "n_text": [5, 70, 0], "vision_start": [8, 1, 4], "n_vision": [81, 17, 9]}
    attn = torch.full((3, 2, 100, 100), NAN, dtype=torch.float16, device=device)
    inside = torch.zeros_like(attn, dtype=torch.bool)
    for example, (text, n_text, vision, n_vision) in enumerate(zip(*spans.values(), strict=True)):
        where = torch.cat([torch.arange(text, text + n_text), torch.arange(vision, vision + n_vision)]).to(device)
        scores = make_scores(n_text, n_vision, heads=2, std=0.5, seed=example, dtype=torch.float16, device=device)
        attn[example][:, where[:, None], where] = scores[0]
        inside[example][:, where[:, None], where] = True
    table = {name: torch.tensor(values, device=device) for name, values in spans.items()}
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, **table, max_n_text=70, max_n_vision=81), attn)
    expected, (expected_gradient,) = loss_and_gradients(
        lambda x: cacr_closed_form(x, **table), attn.double().masked_fill(~inside, 0)
    )
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 0.35 * torch.finfo(torch.float16).eps
    assert (gradient[~inside] == 0).all()


def test_half_precision_layouts(device):
    attn = make_scores(19, 26, batch=2, heads=2, std=0.7, dtype=torch.float16, seed=6, device=device)
    for view in (attn.mT, attn[..., 1:40, 2:41], attn[:1, :1].expand(2, 2, 45, 45)):
        half_precision_agrees(view, 15)


@pytest.mark.parametrize(
    ("std", "weight", "options"),
    [
        # U is up to 1e6 and G down to 1e-9, then the other way round; float16 ends at 6e4 and 6e-8
        (100.0, 1.0, {"projection_scale": 1e-6}),
        (100.0, 2.0**10, {"projection_scale": 1e-6}),
        (1e-2, 1.0, {"projection_scale": 1e6}),
        (1e-3, 2.0**-20, {"projection_scale": 1e8}),
        # X is 1e15
        (1e4, 2.0**-40, {}),
        (1.0, 2.0**6, {"row_reduction": "mean"}),
    ],
)
def test_half_precision_of_any_magnitude(device, products, std, weight, options):
    attn = make_scores(20, 37, dtype=torch.float64, seed=5, device=device)
    half_precision_agrees((attn * std).half(), 20, weight, **options)


def test_half_precision_rows_of_any_magnitude(device, products):
    """Rows of S from 1e-4 to 1e3: their U lie nine decades apart, and each row's X has a softmax of its own."""
    order = torch.randperm(57, generator=torch.Generator().manual_seed(0))
    rows = torch.logspace(-4, 3, 57, dtype=torch.float64)[order]
    attn = make_scores(20, 37, dtype=torch.float64, seed=5) * rows[:, None]
    half_precision_agrees(attn.half().to(device), 20, projection_scale=1e-3)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), NAN])
def test_half_precision_is_nan_where_a_score_is_not_finite(device, products, value):
    attn = make_scores(5, 9, dtype=torch.float16, device=device)
    attn[..., 2, 8] = value
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 5), attn)
    assert loss.isnan()
    assert gradient.isnan().any()
