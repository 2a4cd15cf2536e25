"""The contract of the public functions: shapes, options, spans, errors, on every backend."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from cacr_kernels import CACRLoss, backends, block_softmax, fused_cacr, fused_cacr_blocks, fused_cacr_qk
from cacr_kernels.reference import cacr_closed_form, cacr_loop, iais_loss
from cacr_kernels.testing import loss_and_gradients, make_input, make_scores, relative_error

KINDS = ("scores", "softmax", "probs")


def expect(attn, n_text, **options):
    """Loss and gradient of the closed form in float64 (itself tested against the loop)."""
    loss, (gradient,) = loss_and_gradients(lambda x: cacr_closed_form(x, n_text, **options), attn.double())
    return loss, gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", ["both", "text", "vision"])
def test_loss_equals_the_loop_in_float64(backend, device, kind, sides):
    attn = make_input(kind, 5, 7, batch=2, heads=2, std=0.7, device=device)
    loss = fused_cacr(attn, 5, kind=kind, sides=sides, reduction="none", backend=backend)
    expected = cacr_loop(attn, 5, kind=kind, sides=sides, reduction="none")
    assert loss.shape == (2, 2)
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sides": "text"},
        {"sides": "vision", "row_reduction": "mean"},
        {"projection_scale": 0.25, "reduction": "sum"},
        {"projection_scale": "mean"},
        {"stop_gradient": "target"},
        {"stop_gradient": "projection", "reduction": "none"},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
@pytest.mark.parametrize("kind", KINDS)
def test_options_and_gradients(backend, device, kind, options):
    attn = make_input(kind, 6, 9, batch=2, std=0.5, seed=3, device=device)
    loss, (gradient,) = loss_and_gradients(lambda x: fused_cacr(x, 6, kind=kind, backend=backend, **options), attn)
    expected, expected_gradient = expect(attn, 6, kind=kind, **options)
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(gradient, expected_gradient) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch(backend, device, kind):
    spans = {
        "n_text": torch.tensor([3, 5, 0, 1], device=device),
        "n_vision": torch.tensor([6, 2, 3, 8], device=device, dtype=torch.int32),
        "text_start": torch.tensor([1, 6, 2, 11], device=device),
        "vision_start": torch.tensor([5, 0, 6, 2], device=device),
    }
    bounds = {"max_n_text": 5, "max_n_vision": 9}
    attn = make_scores(5, 8, batch=4, heads=2, std=0.5, device=device)
    if kind == "probs":
        attn = block_softmax(attn, **spans)
    inside = block_softmax(attn, **spans) > 0
    poisoned = attn.masked_fill(~inside, float("nan"))
    expected, expected_gradient = expect(attn, **spans, kind=kind, reduction="none")
    loss, (gradient,) = loss_and_gradients(
        lambda x: fused_cacr(x, **spans, **bounds, kind=kind, reduction="none", backend=backend), poisoned
    )
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(gradient, expected_gradient) < 1e-4
    assert (gradient[~inside] == 0).all()
    assert (loss[2] == 0).all()


@pytest.mark.parametrize("shape", [(9, 9), (3, 9, 9), (2, 3, 9, 9)])
def test_leading_dimensions(backend, device, shape):
    attn = make_scores(4, 5, batch=2, heads=3, device=device)[:, :, :9, :9].reshape(-1, 9, 9)
    attn = attn[0] if len(shape) == 2 else attn[:3] if len(shape) == 3 else attn.view(2, 3, 9, 9)
    loss = fused_cacr(attn, 4, reduction="none", backend=backend)
    assert loss.shape == shape[:-2]
    mean = fused_cacr(attn, 4, backend=backend)
    assert mean.shape == ()
    torch.testing.assert_close(mean, loss.mean())
    torch.testing.assert_close(fused_cacr(attn, 4, reduction="sum", backend=backend), loss.sum())


def test_empty_batch_and_empty_spans(backend, device):
    empty = torch.zeros(0, 2, 9, 9, device=device, requires_grad=True)
    loss = fused_cacr(empty, 4, backend=backend)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, empty)[0].shape == empty.shape
    for n_text, n_vision in ((0, 5), (4, 0)):
        attn = make_scores(4, 5, device=device).requires_grad_()
        loss = fused_cacr(attn, n_text, n_vision=n_vision, backend=backend)
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, attn)[0].abs().max() == 0.0


def test_strides(backend, device):
    base = make_scores(5, 7, batch=2, heads=2, device=device)
    wide = torch.full((2, 2, 24, 24), float("nan"), device=device)
    wide[..., ::2, ::2] = base
    layouts = {
        "transposed": base.mT.contiguous().mT,
        "permuted": base.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        "sliced": wide[..., ::2, ::2],
        "expanded": base[:1, :1].expand(2, 2, 12, 12),
    }
    for name, x in layouts.items():
        expected, expected_gradient = expect(x, 5)
        loss, (gradient,) = loss_and_gradients(lambda x: fused_cacr(x, 5, backend=backend), x)
        assert relative_error(loss, expected) < 1e-5, name
        assert relative_error(gradient, expected_gradient) < 1e-4, name


@pytest.mark.parametrize("ragged", [False, True])
def test_blocks_equal_the_joint_matrix(backend, device, ragged):
    attn = make_scores(4, 6, batch=2, heads=2, device=device)
    sizes = {"n_text": torch.tensor([3, 4], device=device), "n_vision": 5} if ragged else {"n_text": 4, "n_vision": 6}
    expected, gradient = expect(attn, **sizes, vision_start=4)
    loss, gradients = loss_and_gradients(lambda *x: fused_cacr_blocks(*x, **sizes, backend=backend), *_blocks(attn))
    assert relative_error(loss, expected) < 1e-5
    for actual, want in zip(gradients, _blocks(gradient)):
        assert relative_error(actual, want) < 1e-4


def _blocks(attn):
    return attn[..., :4, :4], attn[..., :4, 4:], attn[..., 4:, :4], attn[..., 4:, 4:]


def test_module_equals_function(backend, device):
    attn = make_scores(4, 6, batch=2, device=device)
    module = CACRLoss(kind="softmax", row_reduction="mean", backend=backend)
    expected = fused_cacr(attn, 3, n_vision=5, text_start=1, vision_start=4, kind="softmax", row_reduction="mean")
    assert module(attn, 3, n_vision=5, text_start=1, vision_start=4).item() == pytest.approx(expected.item(), rel=1e-5)
    assert "kind='softmax'" in repr(module)
    with pytest.raises(ValueError, match="kind must be one of"):
        CACRLoss(kind="logits")


def attn(*shape, **options):
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fused_cacr([1.0], 1), TypeError, "attn must be a torch.Tensor"),
        (lambda: fused_cacr(attn(4, 4, dtype=torch.int32), 1), TypeError, "attn must be float16.*int32"),
        (lambda: fused_cacr(attn(4), 1), ValueError, r"attn must have shape .*got \(4,\)"),
        (lambda: fused_cacr(attn(4, 5), 1), ValueError, "attn must be square"),
        (lambda: fused_cacr(attn(4, 4), 5), ValueError, "n_text must lie between 0 and 4.*got 5"),
        (lambda: fused_cacr(attn(4, 4), -1), ValueError, "n_text must lie between"),
        (lambda: fused_cacr(attn(4, 4), 2.0), TypeError, "n_text must be an int or an integer tensor"),
        (lambda: fused_cacr(attn(4, 4), True), TypeError, "n_text must be an int"),
        (lambda: fused_cacr(attn(4, 4), 2, n_vision=3), ValueError, "n_vision must lie between 0 and 2"),
        (lambda: fused_cacr(attn(4, 4), 2, vision_start=1), ValueError, "must not overlap"),
        (lambda: fused_cacr(attn(4, 4), 2, max_n_text=1), ValueError, "n_text must be at most max_n_text"),
        (lambda: fused_cacr(attn(4, 4), 2, kind="logits"), ValueError, "kind must be one of 'scores'"),
        (lambda: fused_cacr(attn(4, 4), 2, sides="left"), ValueError, "sides must be one of"),
        (lambda: fused_cacr(attn(4, 4), 2, stop_gradient="x"), ValueError, "stop_gradient must be"),
        (lambda: fused_cacr(attn(4, 4), 2, row_reduction="max"), ValueError, "row_reduction must be one of"),
        (lambda: fused_cacr(attn(4, 4), 2, reduction="max"), ValueError, "reduction must be one of"),
        (lambda: fused_cacr(attn(4, 4), 2, projection_scale="sum"), ValueError, "projection_scale must be"),
        (
            lambda: fused_cacr(attn(4, 4), 2, projection_scale=float("nan")),
            ValueError,
            "projection_scale must be finite",
        ),
        (lambda: fused_cacr(attn(4, 4), 2, backend="metal"), ValueError, "backend must be one of"),
        (lambda: fused_cacr(attn(2, 4, 4), torch.tensor([2, 2])), ValueError, "n_vision must be given"),
        (lambda: fused_cacr(attn(2, 4, 4), torch.tensor([2]), n_vision=1), ValueError, r"n_text must be .* \[2\]; got"),
        (lambda: fused_cacr(attn(2, 4, 4), torch.tensor([2.0, 1.0]), n_vision=1), TypeError, "n_text must be an int"),
        (
            lambda: fused_cacr(attn(2, 4, 4), torch.tensor([2, 4]), n_vision=1),
            ValueError,
            r"spans of example 1 are not valid: text \[0, 4\), vision \[4, 5\)",
        ),
        (
            lambda: fused_cacr(attn(2, 4, 4), torch.tensor([2, 2**32 + 2]), n_vision=1, vision_start=2),
            ValueError,
            r"spans of example 1 are not valid: text \[0, 536870912\)",
        ),
        (
            lambda: fused_cacr(attn(2, 4, 4), torch.tensor([2, 2]), n_vision=2**40, vision_start=2),
            ValueError,
            "n_vision must lie between 0 and 4",
        ),
        (lambda: fused_cacr(attn(4, 4).to_sparse(), 2), TypeError, "attn must be a dense torch.Tensor; got layout"),
        (
            lambda: fused_cacr(torch.nested.nested_tensor([attn(4, 4), attn(5, 5)]), 2),
            TypeError,
            "attn must be a dense torch.Tensor; got a nested tensor",
        ),
        (lambda: fused_cacr(attn(4, 4), 2, projection_scale=10**400), ValueError, "projection_scale must be finite"),
        (lambda: fused_cacr_qk(attn(1, 2, 4, 8), attn(1, 2, 4, 8), 2, scale=math.inf), ValueError, "scale must be fin"),
        (lambda: fused_cacr_qk(attn(1, 2, 4, 0), attn(1, 2, 4, 0), 2, scale=1), ValueError, "with D >= 1"),
        (lambda: fused_cacr_qk(attn(1, 2, 4, 8), attn(1, 3, 4, 8), 2), ValueError, "Hk dividing H = 2"),
        (lambda: fused_cacr_qk(attn(2, 4, 8), attn(2, 4, 8), 2), ValueError, "q must have shape"),
        (lambda: fused_cacr_qk(attn(1, 2, 4, 8), attn(1, 2, 4, 8).half(), 2), ValueError, "k must share dtype"),
        (lambda: fused_cacr_qk(attn(1, 2, 4, 8), attn(1, 2, 4, 8), 2, kind="probs"), ValueError, "block_softmax"),
        (lambda: fused_cacr_blocks(attn(2, 2), attn(2, 3), attn(3, 2), attn(4, 4)), ValueError, "tv must have shape"),
        (lambda: block_softmax(attn(4, 4), 2, heads="mean"), ValueError, "heads='mean' needs attn"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_numbers_of_numpy_are_numbers():
    x = attn(1, 2, 6, 6)
    expected = fused_cacr(x, 2, vision_start=3, projection_scale=0.5)
    found = fused_cacr(x, np.int32(2), vision_start=np.int64(3), projection_scale=np.float32(0.5))
    assert torch.equal(found, expected)
    ragged = fused_cacr(x, torch.tensor([2]), vision_start=3, n_vision=3, max_n_text=np.int32(4), projection_scale=0.5)
    assert torch.equal(ragged, expected)


def test_iais_takes_no_unknown_heads():
    with pytest.raises(ValueError, match="heads must be one of 'each', 'mean'; got 'all'"):
        iais_loss(attn(1, 2, 6, 6), 2, heads="all")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_spans_of_any_integer_dtype_add_up(dtype):
    x = attn(1, 1, 240, 240)
    start, length = (torch.tensor([value], dtype=dtype) for value in (100, 100))  # the sum is beyond int8
    found = fused_cacr(x, length, text_start=start, n_vision=20)
    assert torch.equal(found, fused_cacr(x, 100, text_start=100, n_vision=20))


def test_explicit_backend_never_falls_back():
    for name, state in backends().items():
        if not state.available:
            assert state.reason
            with pytest.raises(ValueError, match=f"backend='{name}' cannot run this input"):
                fused_cacr(attn(4, 4), 2, backend=name)
    if backends()["triton"].available:
        with pytest.raises(ValueError, match="float64"):
            fused_cacr(
                attn(4, 4, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu"),
                2,
                backend="triton",
            )


def test_auto_on_the_cpu_is_the_cpu_kernel():
    if not backends()["cpu"].available:
        pytest.skip(f"cpu backend: {backends()['cpu'].reason}")
    x = make_scores(5, 7)
    assert torch.equal(fused_cacr(x, 5), fused_cacr(x, 5, backend="cpu"))


@pytest.mark.parametrize("blocked", ["triton", "cacr_kernels._native"])
def test_import_needs_neither_triton_nor_the_native_module(blocked):
    program = f"""
import sys
sys.modules[{blocked!r}] = None
import torch, cacr_kernels, warnings
warnings.simplefilter("ignore")
states = cacr_kernels.backends()
assert states["reference"].available
print(cacr_kernels.fused_cacr(torch.zeros(4, 4), 2, backend="reference").item())
assert "cacr_kernels.triton" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0.0"


def test_import_does_not_load_the_compiler():
    """torch._dynamo takes as long to import as torch itself."""
    program = "import sys, torch; before = 'torch._dynamo' in sys.modules; import cacr_kernels; "
    program += "print('torch._dynamo' in sys.modules and not before)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "False", result.stderr
