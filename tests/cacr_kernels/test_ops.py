"""The operators and their autograd function: opcheck, gradcheck, torch.compile, refusals, no synchronisation."""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from cacr_kernels import fused_cacr, fused_cacr_blocks, fused_cacr_qk, native
from cacr_kernels.testing import loss_and_gradients, make_scores, relative_error

OPTIONS = (0, 4, 4, 5, "scores", "both", 1.0, False, False, "none", 1.0)


@pytest.fixture
def kernel(backend):
    if backend == "reference":
        pytest.skip("the reference is plain PyTorch, without operators")
    return backend


def layouts(device):
    base = make_scores(4, 5, batch=2, device=device)
    return {
        "contiguous": base,
        "transposed": base.mT,
        "sliced": make_scores(5, 6, batch=2, device=device)[..., 1:10, 1:10],
        "expanded": base[:1].expand(2, 1, 9, 9),
        "ragged": base,
    }


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded", "ragged"])
def test_opcheck(kernel, device, layout, monkeypatch):
    if kernel == "cuda":  # it leaves row numbers that nobody reads unwritten, and opcheck compares all that is saved
        monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    attn = layouts(device)[layout]
    table = torch.tensor([[0, 4, 4, 5], [1, 3, 5, 2]], dtype=torch.int32, device=device)
    problem = (table if layout == "ragged" else None, *OPTIONS, 1.0, kernel)
    torch.library.opcheck(torch.ops.cacr_kernels.scores_forward, ([attn], *problem, True))
    loss, saved = torch.ops.cacr_kernels.scores_forward([attn], *problem, True)
    grad_loss = torch.ones((), device=device).expand(loss.shape)
    torch.library.opcheck(torch.ops.cacr_kernels.scores_backward, (grad_loss, [attn], saved, *problem))


def test_without_gradient_nothing_is_saved(kernel, device):
    attn = make_scores(4, 5, device=device)
    assert torch.ops.cacr_kernels.scores_forward([attn], None, *OPTIONS, 1.0, kernel, False)[1] == []


@pytest.mark.parametrize("kind", ["scores", "softmax", "probs"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend, kind):
    attn = make_scores(2, 3, batch=2, std=0.5, dtype=torch.float64)
    if kind == "probs":
        attn = attn.exp()
    attn.requires_grad_()
    ragged = {"n_text": torch.tensor([1, 2]), "n_vision": torch.tensor([3, 2]), "vision_start": 2}
    for spans in ({"n_text": 2}, ragged):
        for options in ({}, {"sides": "text", "row_reduction": "mean"}, {"projection_scale": "mean"}):
            assert torch.autograd.gradcheck(
                lambda x, s=spans, o=options: fused_cacr(x, **s, **o, kind=kind, backend=backend, reduction="none"),
                (attn,),
            )


@pytest.mark.parametrize("case", ["stride 0", "scaled", "per problem"])
def test_grad_output_of_any_scale_and_stride(backend, device, case):
    attn = make_scores(4, 5, batch=2, heads=3, device=device)
    weights = {"stride 0": 1.0, "scaled": -3.5, "per problem": torch.linspace(-1, 2, 6, device=device).view(3, 2).mT}

    def function(x, backend=backend):
        return (fused_cacr(x, 4, reduction="none", backend=backend) * weights[case]).sum()

    _, (gradient,) = loss_and_gradients(function, attn)
    _, (expected,) = loss_and_gradients(lambda x: function(x, "reference"), attn.double())
    assert relative_error(gradient, expected) < 1e-4


def test_second_derivative_is_refused_in_words(kernel, device):
    attn = make_scores(4, 5, device=device).requires_grad_()
    (gradient,) = torch.autograd.grad(fused_cacr(attn, 4, backend=kernel), attn, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        (attn.pow(2).sum() + gradient.pow(2).sum()).backward()


def test_backward_twice_and_same_tensor_twice(backend, device):
    q = torch.randn(1, 2, 9, 16, device=device, requires_grad=True)
    loss = fused_cacr_qk(q, q, 4, backend="reference" if backend == "cuda" else backend)
    first = torch.autograd.grad(loss, q, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, q)[0])
    _, (expected,) = loss_and_gradients(lambda x: fused_cacr_qk(x, x, 4, backend="reference"), q.double())
    assert relative_error(first, expected) < 1e-4


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", ["cpu"])
def test_writing_into_a_gradient_does_not_change_a_later_one(backend, reduction, weight):
    """The cpu forward saves the gradient, and the last backward of a graph hands it out."""

    def function(x, backend=backend):
        return fused_cacr(x, 4, reduction=reduction, backend=backend) * weight

    attn = make_scores(4, 5, batch=2, heads=3, dtype=torch.float64).requires_grad_()
    loss = function(attn)
    _, (expected,) = loss_and_gradients(lambda x: function(x, "reference"), attn)
    for keep in (True, True, False):
        (gradient,) = torch.autograd.grad(loss, attn, retain_graph=keep)
        assert relative_error(gradient, expected) < 1e-10
        gradient.fill_(7)


def test_the_expected_grad_output_costs_no_pass_over_the_gradient(monkeypatch):
    scaled = []
    scale_cpu = native._native.scale_cpu
    monkeypatch.setattr("cacr_kernels.native._native.scale_cpu", lambda *a: scaled.append(scale_cpu(*a)))
    for reduction in ("mean", "sum"):
        attn = make_scores(4, 5, batch=2, heads=3).requires_grad_()
        fused_cacr(attn, 4, reduction=reduction, backend="cpu").backward()
    assert scaled == [0, 0]
    (fused_cacr(attn, 4, backend="cpu") * 0.3).backward()
    loss = fused_cacr(attn, 4, reduction="none", backend="cpu")
    loss.backward(torch.tensor([[1.0, 1.0, 2.0], [1.0, 0.0, 1.0]]))
    assert scaled == [0, 0, 6, 2]


@pytest.mark.parametrize("spans", ["numbers", "tensors"])
def test_fake_tensors(backend, device, spans):
    """Shapes without numbers, as torch.compile and memory planners run it: nothing looks at the spans or the data."""
    if backend == "cuda":
        pytest.skip("from q and k there is no 'cuda'; its operators are those of the others")
    with FakeTensorMode():
        numbers = (4, 3) if spans == "numbers" else tuple(torch.tensor([x, x], device=device) for x in (4, 3))
        bounds = {"vision_start": numbers[0], "n_vision": numbers[1], "max_n_text": 4, "max_n_vision": 3}
        attn = torch.randn(2, 3, 9, 9, device=device, requires_grad=True)
        fused_cacr(attn, numbers[0], backend=backend, **bounds).backward()
        q, k = (torch.randn(2, 3, 9, 16, device=device, requires_grad=True) for _ in range(2))
        fused_cacr_qk(q, k, numbers[0], backend=backend, **bounds).backward()
        (fused_cacr(attn, numbers[0], backend=backend, **bounds) * 0.3).backward()
    for x in (attn, q, k):
        assert type(x.grad) is type(x)
        assert x.grad.shape == x.shape


def test_frozen_inputs_and_no_grad(backend, device):
    attn = make_scores(4, 5, device=device)
    assert not fused_cacr(attn, 4, backend=backend).requires_grad
    with torch.no_grad():
        assert not fused_cacr(attn.clone().requires_grad_(), 4, backend=backend).requires_grad
    if backend != "cuda":
        q = torch.randn(1, 2, 9, 16, device=device, requires_grad=True)
        k = torch.randn(1, 2, 9, 16, device=device)
        fused_cacr_qk(q, k, 4, backend=backend).backward()
        assert q.grad is not None
        assert k.grad is None


def test_activation_checkpointing(backend, device):
    attn = make_scores(4, 5, batch=2, device=device)
    _, (expected,) = loss_and_gradients(lambda x: fused_cacr(x * 2, 4, backend=backend), attn)
    _, (actual,) = loss_and_gradients(
        lambda x: checkpoint(lambda y: fused_cacr(y * 2, 4, backend=backend), x, use_reentrant=False), attn
    )
    assert torch.equal(actual, expected)


def test_deterministic(backend, device):
    attn = make_scores(17, 23, batch=2, device=device)
    results = [loss_and_gradients(lambda x: fused_cacr(x, 17, backend=backend), attn) for _ in range(3)]
    for loss, (gradient,) in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1][0])


def test_autocast_changes_nothing(backend, device):
    attn = make_scores(5, 7, device=device)
    expected, (expected_gradient,) = loss_and_gradients(lambda x: fused_cacr(x, 5, backend=backend), attn)

    def function(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return fused_cacr(x, 5, backend=backend)

    loss, (gradient,) = loss_and_gradients(function, attn)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_compile_equals_eager(backend, device, dynamic, ragged):
    if backend == "reference" and (dynamic or ragged):
        pytest.skip("compiling plain PyTorch is torch's affair: one case shows that nothing breaks the graph")
    torch._dynamo.reset()
    spans = {"n_text": 4}
    if ragged:
        n_text, n_vision = (torch.tensor(v, device=device) for v in ([3, 4], [5, 2]))
        spans = {"n_text": n_text, "n_vision": n_vision, "vision_start": 4}

    def function(x):
        return fused_cacr(x * 1.5, **spans, backend=backend) * 2

    attn = make_scores(4, 5, batch=2, device=device)
    expected, (expected_gradient,) = loss_and_gradients(function, attn)
    # code is generated once a kernel; the other cases are about the graphs of forward and backward
    compiler = "aot_eager" if dynamic or ragged or backend == "reference" else "inductor"
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    loss, (gradient,) = loss_and_gradients(compiled, attn)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inputs", [1, 2, 4])
def test_compiles_without_a_gradient(kernel, device, inputs):
    """In one graph whatever the number of tensors: Dynamo counts the arguments of a Function."""
    torch._dynamo.reset()
    if inputs == 2:
        tensors = [torch.randn(1, 2, 9, 4, device=device) for _ in range(2)]
        function = partial(fused_cacr_qk, n_text=4, backend="auto" if kernel == "cuda" else kernel)
    elif inputs == 1:
        tensors, function = [torch.randn(1, 2, 9, 9, device=device)], partial(fused_cacr, n_text=4, backend=kernel)
    else:
        tensors = [torch.randn(1, 2, r, c, device=device) for r in (4, 5) for c in (4, 5)]
        function = partial(fused_cacr_blocks, backend=kernel)
    with torch.no_grad():
        compiled = torch.compile(lambda *x: function(*x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*tensors), function(*tensors))


def test_torch_func_is_refused_in_words(kernel, device):
    attn = torch.randn(2, 2, 9, 9, device=device)
    function = partial(fused_cacr, n_text=4, backend=kernel)
    with pytest.raises(RuntimeError, match=r"torch.func transforms.*backend='reference'"):
        torch.func.grad(function)(attn)
    with pytest.raises(RuntimeError, match=r"torch.func transforms.*backend='reference'"):
        torch.func.vmap(function)(attn)
    with pytest.raises(Exception, match=r"torch.func transforms"):  # traced, its gradient would be zeros
        torch.compile(lambda x: torch.func.grad(function)(x), backend="aot_eager")(attn)
    leaf = attn.clone().requires_grad_()
    loss = function(leaf, reduction="none")
    with pytest.raises(RuntimeError, match=r"batched gradients.*backend='reference'"):
        torch.autograd.grad(loss, leaf, torch.ones(3, *loss.shape, device=device), is_grads_batched=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(attn, attn)
        with pytest.raises(NotImplementedError, match="forward mode AD"):  # of torch: Dynamo wants no jvp of ours
            function(dual)


def test_dynamic_shapes_do_not_recompile(kernel, device):
    torch._dynamo.reset()
    counter = CompileCounter()
    function = torch.compile(
        lambda x, n: fused_cacr(x, n, backend=kernel), fullgraph=True, dynamic=True, backend=counter
    )
    for batch, heads, n, n_text in ((2, 3, 9, 4), (5, 3, 11, 6), (4, 3, 23, 7)):
        attn = torch.randn(batch, heads, n, n, device=device, requires_grad=True)
        function(attn, n_text).backward()
    assert counter.frame_count == 1


def test_nothing_is_read_back_from_the_device(backend, device, monkeypatch):
    """No .item(), bool() or comparison of device values on the ragged path: those operations are made to fail."""
    if device == "cpu" and backend != "triton":
        pytest.skip("spans on the CPU are validated on the host")
    attn = make_scores(4, 5, batch=2, device=device).requires_grad_()
    spans = {"n_text": torch.tensor([3, 4], device=device), "n_vision": torch.tensor([5, 2], device=device)}
    if device == "cpu":  # interpreted: the host check of CPU spans is the one allowed read
        monkeypatch.setattr("cacr_kernels.arguments._check_table", lambda *_: None)

    def refuse(*_, **__):
        raise AssertionError("a device value was read back")

    for method in ("item", "__bool__", "__int__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    monkeypatch.setattr(torch, "equal", refuse)
    loss = fused_cacr(attn, **spans, vision_start=4, backend=backend)
    loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_capture(backend, device):
    if device == "cpu":
        pytest.skip(f"{backend}: computes on the CPU, which no CUDA graph holds")
    attn = make_scores(20, 36, batch=2, heads=2, device=device).requires_grad_()

    def step():
        return torch.autograd.grad(fused_cacr(attn, 20, backend=backend), attn)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step()
    gradient.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(gradient, expected)


def test_kernels_are_launched_on_the_device_of_their_input(monkeypatch):
    """A tensor on cuda:1 while cuda:0 is current: Triton launches on the current device."""
    from cacr_kernels import ops

    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    elsewhere = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    backend = SimpleNamespace(scores_forward=lambda *_: "loss", scores_backward=lambda *_: "gradients")
    monkeypatch.setattr(ops, "_backend", lambda name: backend)
    problem = (None, 0, 4, 4, 5, "scores", "both", 1.0, False, False, "none", 1.0, 1.0, "triton")
    assert ops._forward("scores", [elsewhere], *problem, True) == "loss"
    assert ops._backward("scores", None, [elsewhere], [], *problem) == "gradients"
    assert entered == [torch.device("cuda", 1)] * 2


def test_a_lazily_negated_gradient_is_negated(kernel, device):
    attn = torch.randn(2, 2, 9, 9, device=device).requires_grad_()

    def gradient(function):
        loss = function(fused_cacr(attn, 4, reduction="none", backend=kernel))
        return torch.autograd.grad(loss, attn)[0]

    weights = torch.complex(torch.ones(2, 2, device=device), torch.full((2, 2), 2.0, device=device))
    lazy = gradient(lambda loss: (torch.complex(torch.zeros_like(loss), loss).conj() * weights).real.sum())
    torch.testing.assert_close(lazy, gradient(lambda loss: 2 * loss.sum()))


@pytest.mark.parametrize("kept", [False, True])
def test_saved_tensors_from_hooks_may_lie_in_any_memory(kernel, device, kept):
    attn = torch.randn(2, 2, 9, 9, device=device)
    weights = torch.arange(1.0, 5.0, device=device).view(2, 2)
    seen = []

    def unpack(x):
        seen.append(x.clone())
        return x.mT.contiguous().mT if x.dim() == 4 else x

    results = []
    for hooks in (torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack), contextlib.nullcontext()):
        leaf = attn.clone().requires_grad_()
        with hooks:
            loss = fused_cacr(leaf, 4, reduction="none", backend=kernel)
        results += torch.autograd.grad(loss, leaf, weights, retain_graph=kept)
    torch.testing.assert_close(*results)
    assert seen


def test_nothing_but_zeros_outside_the_spans_whatever_the_gradient_of_the_loss(kernel, device):
    attn = torch.randn(1, 2, 9, 9, device=device).requires_grad_()
    loss = fused_cacr(attn, 3, n_vision=4, vision_start=4, backend=kernel, reduction="none")
    (gradient,) = torch.autograd.grad(loss, attn, torch.tensor([[float("inf"), float("nan")]], device=device))
    outside = torch.ones(9, 9, dtype=torch.bool, device=device)
    spans = torch.tensor([0, 1, 2, 4, 5, 6, 7], device=device)
    outside[spans[:, None], spans] = False
    assert (gradient[..., outside] == 0).all()
    assert not gradient[..., ~outside].isfinite().any()


def test_gradients_that_were_given_away_are_not_given_again(device):
    if not native.cpu_status()[0]:
        pytest.skip(f"cpu: {native.cpu_status()[1]}")
    attn = torch.randn(2, 2, 9, 9).requires_grad_()
    loss = fused_cacr(attn, 4, reduction="none", backend="cpu")

    def interrupt(*_):
        raise InterruptedError

    handle = loss.grad_fn.register_hook(interrupt)
    with pytest.raises(InterruptedError):
        loss.backward(torch.full((2, 2), 3.0))
    handle.remove()
    with pytest.raises(RuntimeError, match="gave its saved gradients away"):
        loss.backward(torch.full((2, 2), 3.0))
