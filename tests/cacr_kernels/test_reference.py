"""The specification against hand-computed numbers, against itself, and the paper's errata."""

import math

import pytest
import torch

from cacr_kernels.reference import block_softmax, cacr_closed_form, cacr_loop, iais_loss
from cacr_kernels.testing import make_input, make_scores

LL = [[1.0, 0.2], [-0.3, 0.8]]
LV = [[0.5, -0.1, 0.4], [0.0, 0.9, -0.6]]
VL = [[0.3, 0.1], [-0.2, 0.7], [0.6, -0.4]]
VV = [[0.9, 0.1, -0.2], [0.0, 1.1, 0.3], [0.2, -0.5, 0.7]]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def fixture():
    """[5, 5] scores of 2 text tokens and 3 regions."""
    return torch.cat([torch.cat([f64(LL), f64(LV)], 1), torch.cat([f64(VL), f64(VV)], 1)], 0)


@pytest.mark.parametrize("function", [cacr_loop, cacr_closed_form])
@pytest.mark.parametrize(
    ("kind", "row_reduction", "text", "vision"),
    [
        ("scores", "sum", 0.0303448287, 0.3157615016),
        ("scores", "mean", 0.0151724144, 0.1052538339),
        ("softmax", "sum", 0.3886166465, 0.6142126040),
    ],
)
def test_fixture(fixture, function, kind, row_reduction, text, vision):
    options = {"kind": kind, "row_reduction": row_reduction}
    assert function(fixture, 2, sides="text", **options).item() == pytest.approx(text, abs=1e-10)
    assert function(fixture, 2, sides="vision", **options).item() == pytest.approx(vision, abs=1e-10)
    assert function(fixture, 2, **options).item() == pytest.approx(text + vision, abs=1e-10)


@pytest.mark.parametrize("function", [cacr_loop, cacr_closed_form])
def test_probs_of_block_softmax_equals_softmax(fixture, function):
    probs = block_softmax(fixture, 2)
    assert function(probs, 2, kind="probs").item() == pytest.approx(0.3886166465 + 0.6142126040, abs=1e-9)


@pytest.mark.parametrize(
    ("mode", "text", "vision"),
    [("singular", 0.0850645348, 0.1237320081), ("distributed", 0.0994786670, 0.1748920671)],
)
def test_iais_fixture(fixture, mode, text, vision):
    attn = fixture[None, None]
    assert iais_loss(attn, 2, mode=mode, sides="text").item() == pytest.approx(text, abs=1e-9)
    assert iais_loss(attn, 2, mode=mode, sides="vision").item() == pytest.approx(vision, abs=1e-9)
    assert iais_loss(attn, 2, mode=mode).item() == pytest.approx(text + vision, abs=1e-9)


def test_hand_computed_two_by_two():
    """T = R = 2 with S_tv = I: X_t = S_vv, so L_text is the symmetric KL of softmax(S_vv) and softmax(S_tt)."""
    log3 = math.log(3.0)
    attn = f64([[log3, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, log3]])
    # rows of S_tt: (3/4, 1/4), (1/2, 1/2); rows of S_vv: (1/2, 1/2), (1/4, 3/4)
    expected = 2 * (1 / 4) * log3
    assert cacr_closed_form(attn, 2, sides="text").item() == pytest.approx(expected, abs=1e-12)
    assert cacr_loop(attn, 2, sides="text").item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["scores", "softmax", "probs"])
@pytest.mark.parametrize("pattern", ["normal", "shifted", "outlier", "one_hot", "uniform"])
@pytest.mark.parametrize(("n_text", "n_vision"), [(1, 1), (1, 4), (5, 2), (6, 9)])
def test_closed_form_equals_loop(kind, pattern, n_text, n_vision):
    attn = make_input(kind, n_text, n_vision, batch=2, heads=2, std=0.5, pattern=pattern, dtype=torch.float64)
    for options in ({}, {"projection_scale": "mean", "row_reduction": "mean"}, {"projection_scale": 0.3}):
        expected = cacr_loop(attn, n_text, kind=kind, reduction="none", **options)
        actual = cacr_closed_form(attn, n_text, kind=kind, reduction="none", **options)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def ragged_spans():
    return {
        "n_text": torch.tensor([3, 4, 0, 1]),
        "n_vision": torch.tensor([4, 2, 3, 5]),
        "text_start": torch.tensor([1, 5, 2, 8]),
        "vision_start": torch.tensor([5, 0, 6, 1]),
    }


@pytest.mark.parametrize("kind", ["scores", "softmax", "probs"])
def test_ragged_equals_one_by_one(kind):
    spans = ragged_spans()
    attn = make_scores(4, 6, batch=4, heads=2, dtype=torch.float64)
    if kind == "probs":
        attn = block_softmax(attn, **spans)
    attn.requires_grad_()
    loss = cacr_closed_form(attn, **spans, kind=kind, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), attn)
    for b in range(4):
        one = {name: int(value[b]) for name, value in spans.items()}
        part = attn[b : b + 1].detach().requires_grad_()
        expected = cacr_closed_form(part, **one, kind=kind, reduction="none")
        torch.testing.assert_close(loss[b : b + 1], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient[b : b + 1], torch.autograd.grad(expected.sum(), part)[0])
    assert torch.equal(loss[2], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("function", [cacr_closed_form, iais_loss])
def test_poison_outside_the_spans(function):
    clean = make_scores(4, 6, batch=4, heads=2, dtype=torch.float64)
    for spans in (ragged_spans(), {"n_text": 3, "n_vision": 4, "text_start": 1, "vision_start": 5}):
        keep = block_softmax(clean, **spans) > 0
        results = []
        for poison in (0.0, float("nan"), float("inf")):
            attn = torch.where(keep, clean, torch.full((), poison, dtype=torch.float64)).requires_grad_()
            loss = function(attn, **spans)
            results.append((loss.detach(), torch.autograd.grad(loss, attn)[0]))
        for loss, gradient in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(gradient, results[0][1])
        assert torch.equal(results[0][1][~keep], torch.zeros_like(clean)[~keep])


def test_block_softmax_normalises_inside_each_block():
    attn = make_scores(4, 6, batch=2, heads=3)
    p = block_softmax(attn, 3, n_vision=5, text_start=1, vision_start=4)
    assert torch.allclose(p[..., 1:9, 1:4].sum(-1), torch.ones(2, 3, 8))
    assert torch.allclose(p[..., 1:9, 4:9].sum(-1), torch.ones(2, 3, 8))
    assert p[..., 0, :].eq(0).all()
    assert p[..., :, 9].eq(0).all()
    mean = block_softmax(attn, 3, n_vision=5, text_start=1, vision_start=4, heads="mean")
    torch.testing.assert_close(mean, p.mean(1))
    assert block_softmax(attn.bfloat16(), 4).dtype == torch.float32


# Errata of the paper (docs/paper.md)


def test_equation_7_as_printed_is_the_transpose():
    """Eq. 7 prints S_LL[p, k]; the triple product S_VL S_LL S_VL^T needs S_LL[k, p]."""
    vl, ll = f64(VL), f64(LL)
    printed = torch.einsum("ik,jp,pk->ij", vl, vl, ll)
    meant = torch.einsum("ik,jp,kp->ij", vl, vl, ll)
    torch.testing.assert_close(meant, vl @ ll @ vl.T)
    torch.testing.assert_close(printed, meant.T)
    assert not torch.allclose(printed, meant)


def test_weighted_mean_of_algorithm_1_is_a_plain_mean(fixture):
    """Read as a plain mean over the n_b^2 pairs, Algorithm 1 is the triple product times 1 / n_b^2."""
    scaled = fixture.clone()
    scaled[:2, 2:] /= 3.0
    expected = cacr_loop(scaled, 2, sides="text")
    assert cacr_closed_form(fixture, 2, sides="text", projection_scale="mean").item() == pytest.approx(expected.item())


def test_one_hot_cross_attention_is_iais_singular():
    """With S_ab one-hot at a_i, X[i, j] = S_bb[a_i, a_j]."""
    a = torch.tensor([2, 0, 1, 2])
    attn = make_scores(4, 3, dtype=torch.float64)[0, 0]
    attn[:4, 4:] = torch.nn.functional.one_hot(a, 3)
    gathered = attn[4:, 4:][a][:, a]
    p, q = gathered.softmax(-1), attn[:4, :4].softmax(-1)
    expected = ((p - q) * (p.log() - q.log())).sum()
    assert cacr_loop(attn, 4, sides="text").item() == pytest.approx(expected.item())
    assert cacr_closed_form(attn, 4, sides="text").item() == pytest.approx(expected.item())


# Invariants


@pytest.mark.parametrize("kind", ["scores"])
def test_equal_distributions_give_exactly_zero(kind):
    attn = make_scores(6, 6, batch=2, pattern="congruent").requires_grad_()
    loss = cacr_closed_form(attn, 6, kind=kind)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, attn)[0].abs().max() == 0.0


def test_symmetric_under_exchanging_the_modalities(fixture):
    swapped = torch.roll(fixture, (3, 3), (0, 1))
    assert cacr_closed_form(swapped, 3).item() == pytest.approx(cacr_closed_form(fixture, 2).item())
    assert cacr_closed_form(swapped, 2, text_start=3, vision_start=0, n_vision=3).item() == pytest.approx(
        cacr_closed_form(fixture, 2).item()
    )


@pytest.mark.parametrize("stop_gradient", ["target", "projection"])
def test_stop_gradient(fixture, stop_gradient):
    attn = fixture.requires_grad_()
    (gradient,) = torch.autograd.grad(cacr_closed_form(attn, 2, sides="text", stop_gradient=stop_gradient), attn)
    target, projection = gradient[:2, :2].abs().max(), gradient[:2, 2:].abs().max() + gradient[2:, 2:].abs().max()
    assert (target == 0) == (stop_gradient == "target")
    assert (projection == 0) == (stop_gradient == "projection")


def test_iais_ragged_equals_one_by_one():
    spans = ragged_spans()
    attn = make_scores(4, 6, batch=4, heads=2, dtype=torch.float64)
    for mode in ("singular", "distributed"):
        loss = iais_loss(attn, **spans, mode=mode, reduction="none")
        for b in range(4):
            one = {name: int(value[b]) for name, value in spans.items()}
            torch.testing.assert_close(loss[b], iais_loss(attn[b : b + 1], **one, mode=mode, reduction="none")[0])


def test_iais_survives_vanishing_probabilities():
    """float16 scores with rows saturated to one-hot: a log without a floor gave -inf in earlier code."""
    attn = make_scores(5, 7, heads=2, std=300.0, dtype=torch.float16).requires_grad_()
    for mode in ("singular", "distributed"):
        loss = iais_loss(attn, 5, mode=mode)
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, attn)[0]).all()


@pytest.mark.parametrize("place", [(2, 3), (6, 7)])
def test_minus_infinity_in_an_own_block_is_nan(place):
    """As in the kernels: E_p[d] is infinite and E_q[d] is 0 times infinity."""
    attn = make_scores(5, 4, dtype=torch.float64)
    attn[(..., *place)] = -math.inf
    for function in (cacr_loop, cacr_closed_form):
        assert function(attn, 5, kind="softmax").isnan()
