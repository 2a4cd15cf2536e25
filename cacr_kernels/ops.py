"""Dispatcher operators (schemas, fake kernels, implementations) and the autograd function over them.

Imports only torch: a backend is imported when an operator first runs on it. The operators are

    cacr_kernels::scores_forward   [attn] or [tt, tv, vt, vv]  -> loss [B, H], tensors saved for the backward
    cacr_kernels::scores_backward  grad_loss [B, H], ...       -> one gradient per input
    cacr_kernels::qk_forward, cacr_kernels::qk_backward        the same from [q, k]

Registered at import, before anything can be traced; define / impl / register_fake is the cheapest boundary torch has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .problem import ROW_NUMBERS, Options, Spans, saves_gradients

_PROBLEM = (
    "Tensor? table, SymInt text_start, SymInt n_text, SymInt vision_start, SymInt n_vision, str kind, str sides, "
    "float projection_scale, bool projection_mean, bool row_mean, str stop_gradient, float expected_grad, float scale, "
    "str backend"
)

_library = torch.library.Library("cacr_kernels", "DEF")
for _variant in ("scores", "qk"):
    _library.define(f"{_variant}_forward(Tensor[] inputs, {_PROBLEM}, bool needs_grad) -> (Tensor, Tensor[])")
    _library.define(f"{_variant}_backward(Tensor grad_loss, Tensor[] inputs, Tensor[] saved, {_PROBLEM}) -> Tensor[]")


@functools.cache
def _backend(name: str) -> Any:
    """The object with scores_forward, scores_backward, qk_forward and qk_backward."""
    if name == "triton":
        return importlib.import_module("cacr_kernels.triton")
    return getattr(importlib.import_module("cacr_kernels.native"), name)


def _unpack(problem: tuple[Any, ...]) -> tuple[Spans, Options, float, str]:
    table, text_start, n_text, vision_start, n_vision, *options, scale, backend = problem
    return Spans(text_start, n_text, vision_start, n_vision, table), Options(*options), scale, backend


def _device_of(x: Tensor) -> Any:
    """Kernels launch on the current device: make it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _forward(variant: str, inputs: list[Tensor], *problem: Any) -> tuple[Tensor, list[Tensor]]:
    *problem_args, needs_grad = problem
    spans, options, scale, backend = _unpack(tuple(problem_args))
    extra = (scale,) if variant == "qk" else ()
    with _device_of(inputs[0]):
        return getattr(_backend(backend), f"{variant}_forward")(inputs, spans, options, needs_grad, *extra)


def _backward(
    variant: str, grad_loss: Tensor, inputs: list[Tensor], saved: list[Tensor], *problem: Any
) -> list[Tensor]:
    spans, options, scale, backend = _unpack(problem)
    extra = (scale,) if variant == "qk" else ()
    with _device_of(inputs[0]):
        return getattr(_backend(backend), f"{variant}_backward")(grad_loss, inputs, saved, spans, options, *extra)


def _forward_fake(variant: str, inputs: list[Tensor], *problem: Any) -> tuple[Tensor, list[Tensor]]:
    *problem_args, needs_grad = problem
    spans, options, _, backend = _unpack(tuple(problem_args))
    x = inputs[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = x.new_empty(x.shape[:2], dtype=dtype)
    return loss, _saved_fake(variant, inputs, spans, options, backend) if needs_grad else []


def _saved_fake(variant: str, inputs: list[Tensor], spans: Spans, options: Options, backend: str) -> list[Tensor]:
    if backend == "cpu":
        return _gradients_fake(inputs) if saves_gradients(inputs) else []
    shapes: list[tuple[Any, ...]] = [(*inputs[0].shape[:2], ROW_NUMBERS, spans.n_text + spans.n_vision)]
    if variant == "qk" and options.kind == "scores":  # the D x D products C, W and M of both blocks
        d = inputs[0].shape[-1]
        shapes.append((*inputs[0].shape[:2], 2, 3, d, d))
    return [inputs[0].new_empty(shape, dtype=torch.float32) for shape in shapes]


def _gradients_fake(inputs: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


def _backward_fake(variant: str, grad_loss: Tensor, inputs: list[Tensor], saved: list[Tensor], *_: Any) -> list[Tensor]:
    return _gradients_fake(inputs)


def _bind(function: Any, variant: str) -> Any:
    def bound(*args: Any) -> Any:
        return function(variant, *args)

    return bound


for _variant in ("scores", "qk"):
    for _name, _real, _fake in (("forward", _forward, _forward_fake), ("backward", _backward, _backward_fake)):
        _library.impl(f"{_variant}_{_name}", _bind(_real, _variant), "CompositeExplicitAutograd")
        torch.library.register_fake(f"cacr_kernels::{_variant}_{_name}", _bind(_fake, _variant), lib=_library)


_REFERENCE = "; use backend='reference', which is ordinary differentiable PyTorch"


class _Congruence(torch.autograd.Function):
    """Loss [B, H]; ``problem`` is the schema's problem without its table."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        # with as many parameters as arguments, Dynamo takes a forward without gradients for one without ctx
        variant, problem, needs_grad, table, *inputs = arguments
        forward, _ = _operators(variant)
        loss, saved = forward(inputs, table, *problem, needs_grad)
        ctx.variant = variant
        ctx.problem = problem
        ctx.n_inputs = len(inputs)
        ctx.save_for_backward(table, *inputs, *saved)
        ctx.addresses = _addresses(saved) if problem[-1] == "cpu" and _have_numbers(saved) else []
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        if not torch.compiler.is_compiling():
            _refuse_transforms(grad_loss)
        table, *tensors = ctx.saved_tensors
        inputs = tensors[: ctx.n_inputs]
        saved = [x.contiguous() for x in tensors[ctx.n_inputs :]]  # hooks may hand out others
        if torch.compiler.is_compiling():  # compiled graphs refuse a second derivative by themselves
            _, backward = _operators(ctx.variant)
            gradients = backward(grad_loss, inputs, saved, table, *ctx.problem)
        elif _owns_gradients(ctx, grad_loss, saved) and not torch.is_grad_enabled() and not _graph_is_kept():
            # nobody will ask for the saved gradients again: they become the result, without a copy
            *_, expected_grad, _, backend = ctx.problem
            ctx.addresses = None
            gradients = _backend(backend).rescale_(saved, grad_loss, expected_grad)
        else:
            gradients = _Gradient.apply(ctx.variant, ctx.problem, ctx.n_inputs, table, grad_loss, *inputs, *saved)
        return None, None, None, None, *(g if w else None for g, w in zip(gradients, ctx.needs_input_grad[4:]))


def _owns_gradients(ctx: Any, grad_loss: Tensor, saved: list[Tensor]) -> bool:
    """Whether the saved tensors are the gradients that the forward wrote, and grad_loss lies in memory as it is.

    Saved-tensor hooks hand out others, whose memory may be anybody's; a lazy negation is the dispatcher's affair.

    Raises:
        RuntimeError: the gradients were handed out already, in a backward that then failed.
    """
    if ctx.addresses is None:
        raise RuntimeError(
            "fused_cacr: this backward has run, and gave its saved gradients away; run the forward again"
        )
    if not ctx.addresses or not _have_numbers([grad_loss, *saved]) or grad_loss.is_neg() or grad_loss._is_zerotensor():
        return False
    return _addresses(saved) == ctx.addresses


def _have_numbers(tensors: list[Tensor]) -> bool:
    """Whether all are tensors with numbers (not fake ones, which only the operators know)."""
    return not torch.compiler.is_compiling() and all(type(x) is Tensor for x in tensors)


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _graph_is_kept() -> bool:
    """Whether the running backward pass leaves the graph for another one (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


class _Gradient(torch.autograd.Function):
    """The backward as a function of its own, so that a second derivative is refused in words and never dropped."""

    @staticmethod
    def forward(
        ctx: Any,
        variant: str,
        problem: tuple[Any, ...],
        n_inputs: int,
        table: Tensor | None,
        grad_loss: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        _, backward = _operators(variant)
        return tuple(backward(grad_loss, list(tensors[:n_inputs]), list(tensors[n_inputs:]), table, *problem))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"fused_cacr has no second derivative (its backward is a hand-written kernel){_REFERENCE}")


def _operators(variant: str) -> tuple[Any, Any]:
    if variant == "qk":
        return torch.ops.cacr_kernels.qk_forward, torch.ops.cacr_kernels.qk_backward
    return torch.ops.cacr_kernels.scores_forward, torch.ops.cacr_kernels.scores_backward


def _refuse_transforms(grad_loss: Tensor | None = None) -> None:
    """Raises inside torch.func transforms, also those that Dynamo traces: their gradient would be 0."""
    traced = isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)
    if traced or (grad_loss is not None and torch._C._functorch.is_legacy_batchedtensor(grad_loss)):
        raise RuntimeError(
            f"fused_cacr has no torch.func transforms (grad, vmap, jvp) and no batched gradients{_REFERENCE}"
        )


def congruence(
    variant: str, inputs: list[Tensor], spans: Spans, options: Options, backend: str, scale: float = 1.0
) -> Tensor:
    """Loss [B, H] on a kernel backend, differentiable once in every input."""
    _refuse_transforms()
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    problem = (
        spans.text_start,
        spans.n_text,
        spans.vision_start,
        spans.n_vision,
        options.kind,
        options.sides,
        options.projection_scale,
        options.projection_mean,
        options.row_mean,
        options.stop_gradient,
        options.expected_grad,
        scale,
        backend,
    )
    # Dynamo cannot trace a Function that is handed one tensor twice: give each repetition a view of its own
    distinct = [x.view_as(x) if any(x is y for y in inputs[:i]) else x for i, x in enumerate(inputs)]
    return _Congruence.apply(variant, problem, needs_grad, spans.table, *distinct)
