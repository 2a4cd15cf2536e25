"""Backends "cpu" and "cuda": tensors become pointers and strides for the C++ module ``cacr_kernels._native``.

The module is optional and knows nothing of torch. ``cpu`` and ``cuda`` offer the four functions of every backend
(scores_forward, scores_backward, qk_forward, qk_backward); :func:`cpu_status` and :func:`cuda_status` say whether they
can run, and why not.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from torch import Tensor

from .problem import ROW_NUMBERS, Options, Spans, block_limits, saves_gradients

#: of the native module's functions; bindings.cpp has the same number
INTERFACE = 1

_native: Any = None
_import_error = ""
try:
    from . import _native  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _import_error = str(error).splitlines()[0]
if _native is not None and getattr(_native, "interface", 0) != INTERFACE:
    _native, _import_error = None, "it was built from other sources than these"


def keep_memory(megabytes: str) -> None:
    """Bounds what is kept of freed gradients: the value of ``CACR_CPU_KEEP_MB``, whole megabytes; "" is 256."""
    if megabytes and not (megabytes.isascii() and megabytes.isdigit()):
        raise ValueError(f"CACR_CPU_KEEP_MB must be a whole number of megabytes (0 keeps nothing); got {megabytes!r}")
    if _native is not None:
        _native.memory_limit(min(int(megabytes or 256), 1 << 40) << 20)


_setting_error = ""
try:
    keep_memory(os.environ.get("CACR_CPU_KEEP_MB", ""))
except ValueError as error:
    _setting_error = str(error)

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_KINDS = {"scores": 0, "softmax": 1, "probs": 2}
_SIDES = {"both": 0, "text": 1, "vision": 2}
_STOP_GRADIENTS = {"none": 0, "target": 1, "projection": 2}

#: device memory for intermediate matrices; a batch that needs more runs in several launches
_CUDA_WORKSPACE_BYTES = 128 << 20

#: a smaller gradient comes from PyTorch, whose allocator keeps such blocks anyway
_SMALLEST_KEPT_BYTES = 1 << 20

_REBUILD = "reinstall the package (pip install -e .) with a C++17 compiler"


def build_info() -> dict[str, Any]:
    """What the native module was built with (compiler, instruction sets, CUDA architectures); empty without module."""
    return {} if _native is None else dict(_native.build_info())


Status = tuple[bool, str, str]
"""(can run, one-line reason why not, details)."""


def cpu_status() -> Status:
    """State of backend "cpu". Never raises."""
    if _native is None:
        return _missing()
    if _setting_error:
        return False, _setting_error, ""
    info = build_info()
    threads = "OpenMP" if info["openmp"] else "one thread: built without OpenMP"
    return True, "", f"{info['instruction_set']}, {threads}, {info['compiler']}"


def cuda_status() -> Status:
    """State of backend "cuda": asks the driver for devices. Never raises."""
    if _native is None:
        return _missing()
    info = build_info()
    if not info["cuda"]:
        return False, f"built without CUDA: {info['cuda_reason']}", ""
    count, reason = _native.cuda_devices()
    return count > 0, reason, f"{info['cuda_compiler']} for {info['cuda_architectures']}"


def _missing() -> Status:
    return False, f"the native module cannot be used ({_import_error}): {_REBUILD}", ""


def cpu_rates(seconds: float = 0.4) -> tuple[float, float] | None:
    """float32 multiply-adds and exponentials per second of the CPU kernels' own code, operands in the L1 cache, by
    ``torch.get_num_threads()`` threads: the best tenth of ``seconds``. None without the native module."""
    if _native is None:
        return None
    threads = torch.get_num_threads()
    products, exps = zip(*(_native.cpu_rates(threads, seconds / 10) for _ in range(10)))
    return max(products), max(exps)


def _tensor(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()


def _tensors(inputs: list[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    """The four blocks tt, tv, vt, vv; one attention tensor stands for all of them."""
    tensors = [_tensor(x) for x in inputs]
    return tensors if len(tensors) == 4 else tensors * 4


def _options(options: Options) -> Any:
    return _native.Options(
        _KINDS[options.kind],
        _SIDES[options.sides],
        _STOP_GRADIENTS[options.stop_gradient],
        options.projection_scale,
        options.projection_mean,
        options.row_mean,
    )


def _spans(spans: Spans, limit_text: int, limit_vision: int, disjoint: bool) -> Any:
    table = 0 if spans.table is None else spans.table.data_ptr()
    return _native.SpanTable(
        table,
        spans.text_start,
        spans.vision_start,
        spans.n_text,
        spans.n_vision,
        limit_text,
        limit_vision,
        disjoint,
    )


def _problem(inputs: list[Tensor], spans: Spans, options: Options) -> Any:
    x = inputs[0]
    return _native.Problem(
        _DTYPES[x.dtype],
        _options(options),
        _spans(spans, *block_limits(inputs)),
        x.shape[0],
        x.shape[1],
        len(inputs) == 1,
        _tensors(inputs),
    )


def _qk_problem(inputs: list[Tensor], spans: Spans, options: Options, scale: float) -> Any:
    if options.kind == "probs":
        raise ValueError("kind='probs' needs an attention tensor; from q and k the kinds are 'scores' and 'softmax'")
    q, k = inputs
    batch, heads, n, dim = q.shape
    return _native.QkProblem(
        _DTYPES[q.dtype],
        _options(options),
        _spans(spans, n, n, True),
        batch,
        heads,
        k.shape[1],
        n,
        dim,
        scale,
        _tensor(q),
        _tensor(k),
    )


def _loss_dtype(inputs: list[Tensor]) -> torch.dtype:
    return torch.float64 if inputs[0].dtype == torch.float64 else torch.float32


def _new_gradients(inputs: list[Tensor]) -> list[Tensor]:
    """Contiguous and uninitialised: the kernels write every element. Large ones on a CPU lie in memory that is kept and
    used again once they are gone, up to ``CACR_CPU_KEEP_MB``."""
    return [_new_gradient(x) for x in inputs]


def _new_gradient(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.numel() * x.element_size() < _SMALLEST_KEPT_BYTES:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    memory = _native.Memory(x.numel() * x.element_size())
    storage = torch.frombuffer(memory, dtype=x.dtype).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape)  # type: ignore[call-overload]  # no view of one


def _scale(source: Tensor, target: Tensor, grad_loss: Tensor, expected_grad: float) -> Tensor:
    """target = source times grad_loss [B, H] / expected_grad, contiguous [B, H, ...] of its dtype; they may be
    the same tensor, of which the problems that got what was expected are not touched."""
    batch, heads = grad_loss.shape
    _native.scale_cpu(
        _DTYPES[source.dtype],
        batch,
        heads,
        source.numel() // max(batch * heads, 1),
        source.data_ptr(),
        target.data_ptr(),
        grad_loss.data_ptr(),
        grad_loss.stride(),
        expected_grad,
        torch.get_num_threads(),
    )
    return target


class _Cpu:
    """C++ kernels: a thread works on one problem (b, h) at a time, so results do not depend on the thread count.

    A forward that needs gradients computes them for the expected grad_loss in the same pass and saves them, and the
    backward multiplies by what it got over what was expected; where :func:`saves_gradients` says no, the backward
    computes everything again.
    """

    #: "" is the widest instruction set of this machine; tests set narrower ones
    instruction_set = ""

    def scores_forward(
        self, inputs: list[Tensor], spans: Spans, options: Options, needs_grad: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss [B, H] of [attn] or [tt, tv, vt, vv], and the gradients if they are to be saved."""
        loss = inputs[0].new_empty(inputs[0].shape[:2], dtype=_loss_dtype(inputs))
        problem = _problem(inputs, spans, options)
        problem.set_loss(loss.data_ptr())
        saved = _new_gradients(inputs) if needs_grad and saves_gradients(inputs) else []
        if saved:
            expected = loss.new_full((1, 1), options.expected_grad)
            problem.set_grad_loss(expected.data_ptr(), (0, 0))
            problem.set_grads(_tensors(saved))
        self._run(problem)
        return loss, saved

    def scores_backward(
        self, grad_loss: Tensor, inputs: list[Tensor], saved: list[Tensor], spans: Spans, options: Options
    ) -> list[Tensor]:
        """d sum(grad_loss * loss) / d input for each input; grad_loss [B, H] with any strides."""
        grad_loss = grad_loss.to(_loss_dtype(inputs))
        if saved:
            return [_scale(g, _new_gradient(g), grad_loss, options.expected_grad) for g in saved]
        gradients = _new_gradients(inputs)
        problem = _problem(inputs, spans, options)
        problem.set_grad_loss(grad_loss.data_ptr(), grad_loss.stride())
        problem.set_grads(_tensors(gradients))
        self._run(problem)
        return gradients

    def qk_forward(
        self, inputs: list[Tensor], spans: Spans, options: Options, needs_grad: bool, scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss [B, H] of S = scale q k^T, q [B, H, N, D], k [B, Hk, N, D]; memory O(N D), kind softmax O(N D + T R)."""
        loss = inputs[0].new_empty(inputs[0].shape[:2], dtype=_loss_dtype(inputs))
        problem = _qk_problem(inputs, spans, options, scale)
        problem.set_loss(loss.data_ptr())
        saved = _new_gradients(inputs) if needs_grad and saves_gradients(inputs) else []
        if saved:
            expected = loss.new_full((1, 1), options.expected_grad)
            problem.set_grad_loss(expected.data_ptr(), (0, 0))
            problem.set_grads(*map(_tensor, saved))
        self._run_qk(problem)
        return loss, saved

    def qk_backward(
        self,
        grad_loss: Tensor,
        inputs: list[Tensor],
        saved: list[Tensor],
        spans: Spans,
        options: Options,
        scale: float,
    ) -> list[Tensor]:
        """d sum(grad_loss * loss) / d q and / d k; grad_loss [B, H] with any strides."""
        grad_loss = grad_loss.to(_loss_dtype(inputs))
        if saved:
            return [_scale(g, _new_gradient(g), grad_loss, options.expected_grad) for g in saved]
        gradients = _new_gradients(inputs)
        problem = _qk_problem(inputs, spans, options, scale)
        problem.set_grad_loss(grad_loss.data_ptr(), grad_loss.stride())
        problem.set_grads(*map(_tensor, gradients))
        self._run_qk(problem)
        return gradients

    def rescale_(self, saved: list[Tensor], grad_loss: Tensor, expected_grad: float) -> list[Tensor]:
        """The saved gradients themselves, now for this grad_loss: untouched if it is what was expected."""
        grad_loss = grad_loss.to(saved[0].dtype)
        return [_scale(gradient, gradient, grad_loss, expected_grad) for gradient in saved]

    def _run(self, problem: Any) -> None:
        problem.set_threads(torch.get_num_threads())
        _native.scores_cpu(problem, self.instruction_set)

    def _run_qk(self, problem: Any) -> None:
        problem.set_threads(torch.get_num_threads())
        _native.qk_cpu(problem, self.instruction_set)


class _Cuda:
    """CUDA C++ kernels on the current stream. Deterministic, no allocation inside, no synchronisation."""

    def scores_forward(
        self, inputs: list[Tensor], spans: Spans, options: Options, needs_grad: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss [B, H] of [attn] or [tt, tv, vt, vv], and the row numbers [B, H, 8, n_text + n_vision] float32."""
        x = inputs[0]
        loss = x.new_empty(x.shape[:2], dtype=torch.float32)
        stats = x.new_empty((*x.shape[:2], ROW_NUMBERS, spans.n_text + spans.n_vision), dtype=torch.float32)
        problem = _problem(inputs, spans, options)
        problem.set_loss(loss.data_ptr())
        problem.set_stats(stats.data_ptr())
        self._run(problem, x, _native.forward_workspace_cuda, _native.scores_forward_cuda)
        return loss, [stats] if needs_grad else []

    def scores_backward(
        self, grad_loss: Tensor, inputs: list[Tensor], saved: list[Tensor], spans: Spans, options: Options
    ) -> list[Tensor]:
        """d sum(grad_loss * loss) / d input for each input; grad_loss [B, H] with any strides."""
        grad_loss = grad_loss.to(torch.float32)
        gradients = _new_gradients(inputs)
        problem = _problem(inputs, spans, options)
        problem.set_grad_loss(grad_loss.data_ptr(), grad_loss.stride())
        problem.set_grads(_tensors(gradients))
        problem.set_stats(saved[0].data_ptr())
        self._run(problem, inputs[0], _native.backward_workspace_cuda, _native.scores_backward_cuda)
        return gradients

    def qk_forward(self, *_: Any) -> NoReturn:
        raise ValueError(
            "backend 'cuda' computes fused_cacr only; for fused_cacr_qk use 'triton', 'cpu' or 'reference'"
        )

    def qk_backward(self, *_: Any) -> NoReturn:
        self.qk_forward()

    def _run(self, problem: Any, x: Tensor, workspace_bytes: Any, launch: Any) -> None:
        problem.set_stream(torch.cuda.current_stream(x.device).cuda_stream, x.device.index)
        each = workspace_bytes(problem)  # none for short spans on a device that has fused kernels for them
        count = max(1, min(x.shape[0] * x.shape[1], _CUDA_WORKSPACE_BYTES // max(each, 1)))
        workspace = torch.empty(each * count, dtype=torch.uint8, device=x.device)
        problem.set_workspace(workspace.data_ptr(), workspace.numel())
        launch(problem)


cpu = _Cpu()
cuda = _Cuda()
