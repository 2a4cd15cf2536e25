"""The error budgets with the launches and products that GPUs get, in emulated tensor cores."""

from __future__ import annotations

import pytest
import torch

from cacr_kernels import fused_cacr, fused_cacr_qk
from cacr_kernels.testing import errors, score_errors

pytest.importorskip("triton")
from cacr_kernels.triton import configs, host, qk_problem

from . import tensor_cores as emulation
from .tensor_cores import decoded, encoded, multiply_float32, tensor_cores, tf32  # noqa: F401
from .test_qk import closed_form, make_qk

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has tensor cores of its own")

#: largest root mean square error relative to float64: loss, gradient
BUDGET = {torch.float32: (1e-6, 5e-5), torch.float16: (1e-5, 4e-3), torch.bfloat16: (1e-5, 4e-3)}
FLOATS = pytest.mark.parametrize("dtype", BUDGET, ids=str)


@pytest.fixture(params=[80, 90])
def arch(request, monkeypatch, tensor_cores):  # noqa: F811
    """The launches and products of an architecture."""
    monkeypatch.setattr(qk_problem, "architecture", lambda device: request.param)
    monkeypatch.setattr(host, "scores_plan", lambda device, dtype, interpreter: configs.plan(request.param, dtype))
    return request.param


def scores(attn, n_text, **options):
    return fused_cacr(attn, n_text, backend="triton", **options)


def test_numbers():
    x = torch.cat(
        [torch.randn(1000) * 10.0**e for e in range(-30, 30, 5)] + [torch.tensor([0.0, torch.inf, -torch.inf])]
    )
    bits = torch.from_numpy(encoded(x.numpy()).view("int16")).view(torch.bfloat16)
    assert torch.equal(bits, x.bfloat16())
    assert torch.equal(torch.from_numpy(decoded(encoded(x.numpy()))), x.bfloat16().float())
    finite = x[:-2].double()
    for nearest, most in ((True, 2**-11), (False, 2**-10)):
        near = torch.from_numpy(tf32(x.numpy(), nearest))
        assert ((near[:-2].double() - finite).abs() <= most * finite.abs()).all()
        assert (near.view(torch.int32)[:-2] & 0x1FFF == 0).all()


def check(found, dtype):
    loss, gradient = BUDGET[dtype]
    assert found.loss <= loss
    assert found.gradient <= gradient


@FLOATS
@pytest.mark.parametrize(("std", "mean"), [(0.3, 0.0), (1.0, -3.0), (2.0, 1.0)])
def test_scores(arch, dtype, std, mean):
    check(score_errors(scores, 20, 36, count=3, std=std, mean=mean, dtype=dtype), dtype)


@FLOATS
@pytest.mark.parametrize("kind", ["softmax", "probs"])
def test_kinds(arch, dtype, kind):
    check(score_errors(scores, 20, 36, count=3, kind=kind, dtype=dtype), dtype)


@FLOATS
@pytest.mark.parametrize(("n_text", "n_vision"), [(60, 100), (10, 140)], ids=["longer bucket", "large"])
def test_longer_spans(arch, dtype, n_text, n_vision):
    check(score_errors(scores, n_text, n_vision, count=1, dtype=dtype), dtype)


@FLOATS
@pytest.mark.parametrize(("d", "kind"), [(64, "scores"), (80, "scores"), (32, "softmax")])
def test_queries_and_keys(arch, dtype, d, kind):
    """Rows of X are near one-hot: forward and backward must form it alike."""
    problems = (make_qk(136 if kind == "scores" else 56, d, dtype=dtype, seed=seed) for seed in range(2))
    found = errors(
        lambda q, k: fused_cacr_qk(q, k, 36, kind=kind, backend="triton"),
        lambda q, k: closed_form(q, k, 36, kind=kind),
        problems,
    )
    check(found, dtype)


def test_single_tf32_products_would_show(arch, monkeypatch):
    def single(a, b, acc, precision):
        return multiply_float32(a, b, acc, "TF32")

    monkeypatch.setattr(emulation, "multiply_float32", single)
    found = score_errors(scores, 20, 36, count=1)
    assert found.loss > 10 * BUDGET[torch.float32][0]
