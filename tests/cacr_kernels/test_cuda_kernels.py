"""The CUDA kernels against the reference: sizes, options, layouts."""

import pytest
import torch

from cacr_kernels import fused_cacr, fused_cacr_blocks
from cacr_kernels.reference import cacr_loop
from cacr_kernels.testing import loss_and_gradients, make_input, make_scores, relative_error

from .cuda_backend import FIXTURES, KINDS, OPTIONS, agree, cuda, forward_and_backward

emulation, emulated, device, short_spans, products, emulated_order = FIXTURES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_text", "n_vision"), [(1, 1), (2, 7), (33, 1), (7, 63), (63, 33), (129, 2), (65, 129)])
def test_sizes(device, kind, n_text, n_vision):
    attn = make_input(kind, n_text, n_vision, std=0.5, seed=n_text, device=device)
    agree(attn, n_text, 2e-5, kind=kind)


@pytest.mark.parametrize(
    "options",
    [
        {"sides": "text"},
        {"sides": "vision", "row_reduction": "mean"},
        {"projection_scale": 0.25, "reduction": "sum"},
        {"projection_scale": "mean"},
        {"stop_gradient": "target"},
        {"stop_gradient": "projection", "reduction": "none"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
@pytest.mark.parametrize("kind", KINDS)
def test_options(device, kind, options):
    agree(make_input(kind, 6, 9, batch=2, heads=3, std=0.5, seed=3, device=device), 6, 2e-5, kind=kind, **options)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "heads last"])
def test_layouts(device, layout):
    attn = {
        "transposed": lambda: make_scores(9, 12, batch=2, heads=2, device=device).mT,
        "sliced": lambda: make_scores(11, 13, batch=2, heads=2, device=device)[..., 1:22, 2:23],
        "expanded": lambda: make_scores(9, 12, heads=1, device=device).expand(3, 2, 21, 21),
        "heads last": lambda: make_scores(9, 12, batch=2, heads=21, device=device).movedim(1, -1)[:, 0:2],
    }[layout]()
    agree(attn[..., :21, :21], 9, 2e-5)


def test_four_blocks_without_spans(device):
    attn = make_scores(6, 70, batch=2, std=0.4, seed=9, device=device)
    blocks = [attn[..., :6, :6], attn[..., :6, 6:], attn[..., 6:, :6], attn[..., 6:, 6:]]
    loss, gradients = loss_and_gradients(lambda *x: fused_cacr_blocks(*x, backend="cuda"), *blocks)
    whole, (gradient,) = loss_and_gradients(lambda x: cuda(x, 6), attn)
    assert torch.equal(loss, whole)
    assert torch.equal(torch.cat([torch.cat(gradients[:2], -1), torch.cat(gradients[2:], -1)], -2), gradient)


def test_loss_of_the_loop(device):
    attn = make_scores(5, 7, batch=2, heads=2, std=0.7, device=device)
    assert relative_error(cuda(attn, 5, reduction="none"), cacr_loop(attn, 5, reduction="none")) < 1e-5


def test_grad_loss_of_any_stride_and_empty_batch(device):
    attn = make_scores(4, 5, batch=2, heads=3, device=device)
    weights = torch.linspace(-1, 2, 6, device=device).view(3, 2).mT
    gradients = [
        loss_and_gradients(lambda x, b=b: fused_cacr(x, 4, reduction="none", backend=b) * weights, attn)[1][0]
        for b in ("cuda", "reference")
    ]
    assert relative_error(*gradients) < 2e-5
    assert cuda(attn[:0], 4) == 0


def test_offsets_beyond_32_bits(device):
    """Rows 2^29 elements apart: the last one starts at 2^31. On the CPU, untouched memory costs nothing."""
    storage = torch.empty((1 << 31) + 64, dtype=torch.float16, device=device)
    attn = storage.as_strided((1, 1, 5, 5), (0, 0, 1 << 29, 7))
    attn.copy_(make_scores(2, 3, seed=3))
    loss, (gradient,) = forward_and_backward([attn], (None, 0, 2, 2, 3, "scores", *OPTIONS))
    expected, (expected_gradient,) = forward_and_backward([attn.clone()], (None, 0, 2, 2, 3, "scores", *OPTIONS))
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)
