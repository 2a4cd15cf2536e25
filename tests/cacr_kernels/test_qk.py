"""fused_cacr_qk on every backend: equal to the closed form on S = c q k^T in float64, whatever the layout."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from cacr_kernels import backends, fused_cacr_qk
from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.testing import device_of, errors, loss_and_gradients, relative_error

#: largest root mean square error relative to float64: loss, gradient
BUDGET = {
    torch.float32: (1e-6, 5e-5),
    torch.float16: (1e-6, 5e-4),
    torch.bfloat16: (1e-5, 4e-3),
}
KINDS = ("scores", "softmax")


@pytest.fixture
def device_of_triton():
    state = backends()["triton"]
    if not state.available:
        pytest.skip(f"triton: {state.reason}")
    return device_of("triton")


@pytest.fixture
def kernel(backend):
    if backend == "cuda":
        pytest.skip("the CUDA backend computes fused_cacr only")
    return backend


def make_qk(
    n, d, *, batch=1, heads=1, key_heads=None, std=1.0, mean=0.0, dtype=torch.float32, device="cpu", seed=0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, d, generator=generator) * std + mean
    k = torch.randn(batch, key_heads or heads, n, d, generator=generator) * std + mean
    return q.to(dtype).to(device), k.to(dtype).to(device)


def attention(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT


def closed_form(q: Tensor, k: Tensor, n_text, *, scale=None, **options) -> Tensor:
    return cacr_closed_form(attention(q, k, scale), n_text, **options)


def check(backend, q, k, n_text, *, loss_budget=2e-6, gradient_budget=1e-4, weights=None, **options) -> None:
    """Loss and both gradients against the closed form in float64 on the same values."""

    def weighted(loss):
        return loss if weights is None else (loss * weights.to(loss)).sum()

    options = {"reduction": "sum" if weights is None else "none", **options}
    loss, gradients = loss_and_gradients(
        lambda a, b: weighted(fused_cacr_qk(a, b, n_text, backend=backend, **options)), q, k
    )
    expected, expected_gradients = loss_and_gradients(
        lambda a, b: weighted(closed_form(a, b, n_text, **options)), q.double(), k.double()
    )
    assert relative_error(loss, expected) <= loss_budget
    for name, gradient, want in zip("qk", gradients, expected_gradients):
        assert gradient.shape == want.shape
        assert gradient.dtype == q.dtype
        if (want == 0).all():
            assert gradient.abs().max() <= 1e-6, f"gradient of {name}"
        else:
            assert relative_error(gradient, want) <= gradient_budget, f"gradient of {name}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_error_budget(kernel, device, dtype, kind):
    """Root mean square over 32 seeded problems (8 for interpreted "softmax" kernels); one side mirrors the other."""
    count = 8 if kind == "softmax" and kernel == "triton" and device == "cpu" else 32
    problems = (
        make_qk(24, 32, std=(0.5, 1.0)[i % 2], mean=(0.0, 0.3)[i // 2 % 2], dtype=dtype, device=device, seed=i)
        for i in range(count)
    )
    options = {"kind": kind, "sides": "text"}
    measured = errors(
        lambda q, k: fused_cacr_qk(q, k, 9, backend=kernel, **options),
        lambda q, k: closed_form(q, k, 9, **options),
        problems,
    )
    loss_budget, gradient_budget = BUDGET[dtype]
    assert measured.loss <= loss_budget
    assert measured.gradient <= gradient_budget


@pytest.mark.parametrize(
    ("kind", "d", "std", "mean"),
    [("scores", 64, 0.03, 0.0), ("softmax", 64, 0.03, 0.0), ("scores", 64, 0.5, 1.0), ("scores", 256, 0.5, 0.5)],
)
def test_at_most_twice_the_error_of_the_closed_form(device_of_triton, kind, d, std, mean):
    """Nearly uniform rows, and logits of 1e5 that share an offset: there one-hot rows turn any difference between the X
    of the forward and of the backward into a gradient."""
    options = {"kind": kind, "reduction": "sum"}
    problems = [make_qk(44, d, std=std, mean=mean, device=device_of_triton, seed=seed) for seed in range(2)]
    want = partial(closed_form, n_text=10, **options)
    kernel = errors(partial(fused_cacr_qk, n_text=10, backend="triton", **options), want, iter(problems))
    eager = errors(want, want, iter(problems))
    least = 2e-7 if device_of_triton == "cpu" else 1e-6  # tensor cores cut sums off where others round
    assert kernel.loss <= 2 * eager.loss + least
    assert kernel.gradient <= 2 * eager.gradient + least


@pytest.mark.parametrize("d", [5, 6, 20, 32, 64, 80, 96, 128, 256])
def test_head_sizes(kernel, device, d):
    check(kernel, *make_qk(31, d, device=device, std=0.7), 17)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [40, 72])
def test_head_sizes_whose_strides_are_no_multiples_of_16(kernel, device, d, kind):
    shape = {"batch": 2, "heads": 2, "key_heads": 1, "device": device, "std": 0.7}
    check(kernel, *make_qk(31, d, **shape), 17, kind=kind)


def test_strides_are_passed_with_what_divides_them():
    from cacr_kernels.triton.qk_problem import tokens

    def step(x):
        found = tokens(x)
        scale = found.step.value
        strides = [stride if scale == 1 else (stride - 3) // 2 * scale for stride in found[2:5]]
        assert (*strides, found.s_c) == x.stride()
        return scale

    halves = partial(torch.empty, dtype=torch.float16)
    assert step(halves(2, 3, 7, 64)) == 1  # multiples of 16, as Triton sees by itself
    assert [step(halves(2, 3, 7, d)) for d in (72, 40, 20, 6, 5)] == [8, 8, 4, 2, 1]
    assert [step(torch.empty(2, 3, 7, d)) for d in (72, 20, 6, 5)] == [4, 4, 2, 1]
    assert step(halves(2, 7, 3, 72).transpose(1, 2)) == 8
    assert step(halves(2, 1, 7, 72).expand(2, 3, 7, 72)) == 8
    assert step(halves(2, 3, 7, 144)[..., ::2]) == 1  # columns apart


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_text", "n_vision"), [(1, 1), (1, 7), (33, 2)])
def test_sizes_around_the_tiles(kernel, device, n_text, n_vision, kind):
    check(kernel, *make_qk(n_text + n_vision, 32, device=device, std=0.7), n_text, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"sides": "text", "row_reduction": "mean"},
        {"sides": "vision", "projection_scale": "mean"},
        {"stop_gradient": "target", "projection_scale": 0.25},
        {"stop_gradient": "projection", "sides": "vision"},
        {"scale": -0.3},
    ],
    ids=str,
)
def test_options(kernel, device, options, kind):
    check(kernel, *make_qk(26, 32, device=device, std=0.7), 11, kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries(kernel, device, key_heads, kind):
    q, k = make_qk(20, 32, heads=4, key_heads=key_heads, device=device, std=0.7)
    check(kernel, q, k, 9, kind=kind)


@pytest.mark.parametrize(("n_text", "n_vision"), [(65, 34), (31, 64)])
def test_several_tiles(kernel, device, n_text, n_vision):
    check(kernel, *make_qk(n_text + n_vision, 32, device=device, std=0.7), n_text)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.7), (0.0, 0.03), (1.0, 0.5)])
def test_masked_tiles_all_along_compute_the_same(device_of_triton, monkeypatch, mean, std):
    """The launches that do not peel: those of Ampere, Blackwell and float32. The interpreter's does."""
    from cacr_kernels.triton.qk_problem import QKProblem

    q, k = make_qk(99, 32, std=std, mean=mean, device=device_of_triton)
    options = {"backend": "triton", "reduction": "sum"}
    peeled, gradients = loss_and_gradients(lambda a, b: fused_cacr_qk(a, b, 65, **options), q, k)
    launch = QKProblem.launch
    monkeypatch.setattr(QKProblem, "launch", lambda self, kernel: launch(self, kernel)._replace(peel=False))
    masked, others = loss_and_gradients(lambda a, b: fused_cacr_qk(a, b, 65, **options), q, k)
    # plain PyTorch is 3e-6 from float64 where rows are nearly uniform, both of these about 1e-6
    assert relative_error(masked, peeled) <= (3e-6 if std < 0.1 else 1e-6)
    assert all(relative_error(a, b) <= 5e-6 for a, b in zip(others, gradients))


@pytest.mark.parametrize("kind", KINDS)
def test_vision_before_text_and_gaps(kernel, device, kind):
    check(kernel, *make_qk(40, 32, device=device, std=0.7), 13, text_start=24, n_vision=19, vision_start=2, kind=kind)


def test_spans_of_whole_quads_compute_the_same(device_of_triton, monkeypatch):
    from cacr_kernels.triton import qk_problem

    q, k = make_qk(84, 24, heads=2, key_heads=1, device=device_of_triton, std=0.7)
    spans = {"n_text": 36, "text_start": 4, "n_vision": 40, "vision_start": 44, "kind": "softmax"}
    check("triton", q, k, **spans)
    quads = loss_and_gradients(partial(fused_cacr_qk, backend="triton", **spans), q, k)
    monkeypatch.setattr(qk_problem, "in_quads", lambda *numbers: False)
    loss, gradients = loss_and_gradients(partial(fused_cacr_qk, backend="triton", **spans), q, k)
    assert relative_error(loss, quads[0]) <= 1e-6
    assert all(relative_error(a, b) <= 5e-6 for a, b in zip(gradients, quads[1]))


def test_long_spans_are_summed_in_chunks(device_of_triton, monkeypatch):
    from cacr_kernels.triton import qk_launch

    monkeypatch.setattr(qk_launch, "GRAM_CHUNK", 8)
    for sides in ("both", "text", "vision"):
        check("triton", *make_qk(200, 32, device=device_of_triton, std=0.5), 165, sides=sides)


def test_chunks_cover_the_span():
    from cacr_kernels.triton.qk_launch import GRAM_PROGRAMS, gram_chunks

    for longest in (0, 1, 255, 256, 511, 512, 2048, 8191, 100_000):
        for programs in (0, 1, 32, 24, 1000):
            chunks, tokens = gram_chunks(longest, 64, programs)
            assert tokens % 64 == 0
            assert (chunks - 1) * tokens < max(longest, 1) <= chunks * tokens
            assert chunks == 1 or (chunks - 1) * programs < GRAM_PROGRAMS


def layouts(device):
    base = make_qk(24, 32, heads=2, device=device, std=0.7)
    fused = make_qk(24, 64, heads=2, device=device, std=0.7)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in base]
    return {
        "token major": by_token,
        "sliced qkv": [fused[0][..., :32], fused[1][..., 32:]],
        "strided channels": [x[..., ::2] for x in fused],
        "expanded": [base[0][:, :1].expand(-1, 2, -1, -1), base[1][:, :1].expand(-1, 2, -1, -1)],
        "one tensor twice": [base[0], base[0]],
    }


@pytest.mark.parametrize("layout", ["token major", "sliced qkv", "strided channels", "expanded", "one tensor twice"])
def test_layouts(kernel, device, layout):
    check(kernel, *layouts(device)[layout], 10)


def test_grad_output_of_any_scale(kernel, device):
    weights = torch.tensor([[1.0, -2.5], [0.0, 1e-3]], device=device)
    check(kernel, *make_qk(24, 32, batch=2, heads=2, device=device, std=0.7), 10, weights=weights)


SPANS = [[1, 10, 13, 27], [22, 18, 2, 20], [0, 0, 5, 5], [3, 8, 11, 1]]


def spans(device, rows):
    text_start, n_text, vision_start, n_vision = torch.tensor(rows, dtype=torch.int32, device=device).unbind(1)
    return n_text, {"text_start": text_start, "vision_start": vision_start, "n_vision": n_vision}


def outside_spans(n, rows):
    position = torch.arange(n)
    inside = [((position >= t) & (position < t + a)) | ((position >= v) & (position < v + b)) for t, a, v, b in rows]
    return ~torch.stack(inside)


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_spans_ignore_what_lies_outside(kernel, device, kind):
    rows = SPANS if kind == "scores" else SPANS[1:3]
    q, k = make_qk(40, 32, batch=len(rows), device=device, std=0.7)
    n_text, others = spans(device, rows)
    others |= {"max_n_text": 20, "max_n_vision": 30, "kind": kind}
    outside = outside_spans(40, rows).to(device)[:, None, :, None]
    loss, gradients = loss_and_gradients(
        lambda a, b: fused_cacr_qk(a, b, n_text, **others, backend=kernel),
        *[x.masked_fill(outside, math.nan) for x in (q, k)],
    )
    expected, expected_gradients = loss_and_gradients(
        lambda a, b: closed_form(a, b, n_text, **others), q.double(), k.double()
    )
    assert relative_error(loss, expected) < 1e-6
    for gradient, want in zip(gradients, expected_gradients):
        assert relative_error(gradient, want) < 1e-4
        assert (gradient.masked_select(outside) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_numbers_inside_the_spans_stay_inside(kernel, device, kind):
    q, k = make_qk(20, 32, device=device)
    q[..., 4, 0] = math.nan
    options = {"text_start": 2, "vision_start": 11, "n_vision": 6, "kind": kind, "backend": kernel}
    loss, gradients = loss_and_gradients(lambda a, b: fused_cacr_qk(a, b, 7, **options), q, k)
    outside = outside_spans(20, [(2, 7, 11, 6)]).to(device)[:, None, :, None]
    assert loss.isnan()
    for gradient in gradients:
        assert gradient.isnan().any()
        assert (gradient.masked_select(outside) == 0).all()


def test_ragged_spans_without_bounds(kernel, device):
    n_text, others = spans(device, SPANS[:2])
    check(kernel, *make_qk(40, 32, batch=2, device=device, std=0.7), n_text, **others)


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_spans_poison_their_example_only(kernel, device, kind):
    """Below the public function, which refuses such spans where it can read them without a synchronisation."""
    if kernel == "reference":
        pytest.skip("the reference is plain PyTorch, without operators")
    rows = [SPANS[0], [0, 10, 35, 6], [-1, 4, 20, 4], [0, 30, 12, 9], [2, 21, 30, 4]][: 5 if kind == "scores" else 2]
    q, k = make_qk(40, 32, batch=len(rows), device=device, std=0.7)
    table = torch.tensor(rows, dtype=torch.int32, device=device)
    forward, backward = torch.ops.cacr_kernels.qk_forward, torch.ops.cacr_kernels.qk_backward
    results = []
    for inputs, spans in (([q, k], (table, 0, 20, 0, 40)), ([q[:1], k[:1]], (None, *SPANS[0]))):
        problem = (*spans, kind, "both", 1.0, False, False, "none", 1.0, 0.2, kernel)
        loss, saved = forward(inputs, *problem, True)
        results.append((loss, *backward(torch.ones_like(loss), inputs, saved, *problem)))
    for actual, valid in zip(*results):
        assert relative_error(actual[:1], valid) < 1e-6
        assert torch.isnan(actual[1:]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 2, 8, 32), (2, 2, 8, 32)], ids=["batch 0", "empty span"])
def test_nothing_to_compare_is_zero(kernel, device, shape, kind):
    q = torch.randn(shape, device=device)
    loss, gradients = loss_and_gradients(
        lambda a, b: fused_cacr_qk(a, b, 0, kind=kind, backend=kernel, reduction="sum"), q, q
    )
    assert loss == 0
    assert all(g.shape == q.shape and (g == 0).all() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic(kernel, device, kind):
    q, k = make_qk(60, 32, heads=2, key_heads=1, device=device, dtype=torch.float16)
    runs = [loss_and_gradients(lambda a, b: fused_cacr_qk(a, b, 40, kind=kind, backend=kernel), q, k) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


def test_float16_where_its_range_ends(kernel, device):
    """X reaches 1e6 and U 1e5: both beyond float16; the loss and the gradient are still those of float64."""
    q, k = make_qk(40, 32, std=5.0, dtype=torch.float16, device=device)
    projected = attention(q.double(), k.double())
    assert (projected[..., :16, 16:] @ projected[..., 16:, 16:] @ projected[..., :16, 16:].mT).abs().max() > 65504
    weights = torch.tensor([[1e-3]], device=device)
    check(kernel, q, k, 16, weights=weights, gradient_budget=5e-4)


@pytest.mark.parametrize(("kind", "spans_kind"), [("scores", "ints"), ("scores", "table"), ("softmax", "table")])
def test_opcheck(kernel, device, kind, spans_kind):
    if kernel == "reference":
        pytest.skip("the reference is plain PyTorch, without operators")
    q, k = make_qk(12, 32, batch=2, device=device)
    table = torch.tensor([[0, 4, 4, 5], [1, 3, 5, 2]], dtype=torch.int32, device=device)
    options = (0, 4, 4, 5, kind, "both", 1.0, False, False, "none", 1.0)
    problem = (table if spans_kind == "table" else None, *options, 0.2, kernel)
    torch.library.opcheck(torch.ops.cacr_kernels.qk_forward, ([q, k], *problem, True))
    loss, saved = torch.ops.cacr_kernels.qk_forward([q, k], *problem, True)
    grad_loss = torch.ones((), device=device).expand(loss.shape)
    torch.library.opcheck(torch.ops.cacr_kernels.qk_backward, (grad_loss, [q, k], saved, *problem))
    assert torch.ops.cacr_kernels.qk_forward([q, k], *problem, False)[1] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend, kind):
    state = backends()[backend]
    if not state.available:
        pytest.skip(f"{backend}: {state.reason}")
    q, k = (x.double().requires_grad_() for x in make_qk(6, 3, heads=2, key_heads=1, std=0.7))
    assert torch.autograd.gradcheck(lambda a, b: fused_cacr_qk(a, b, 2, kind=kind, backend=backend), (q, k))


def test_compile_without_graph_breaks(kernel, device):
    compiler = "aot_eager" if kernel == "reference" else "inductor"  # generating plain PyTorch's code is torch's affair
    compiled = torch.compile(
        lambda a, b: fused_cacr_qk(a, b, 5, backend=kernel), fullgraph=True, dynamic=True, backend=compiler
    )
    for n in (12, 17):
        q, k = make_qk(n, 32, device=device)
        loss, gradients = loss_and_gradients(compiled, q, k)
        want, want_gradients = loss_and_gradients(lambda a, b: fused_cacr_qk(a, b, 5, backend=kernel), q, k)
        assert relative_error(loss, want) < 1e-6
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(gradients, want_gradients))


def test_head_sizes_beyond_the_table_are_refused(device_of_triton):
    q = torch.randn(1, 1, 4, 320, device=device_of_triton)
    with pytest.raises(ValueError, match="backend='triton' cannot run this input: q's head size must be at most 256"):
        fused_cacr_qk(q, q, 2, backend="triton")
    assert fused_cacr_qk(q, q, 2) > 0  # another backend serves them
