"""One contender on one shape: checked against float64, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cacr_kernels.testing import relative_error
from cacr_uniter.benchmark.contenders import Contender, Inputs, make, make_inputs
from cacr_uniter.benchmark.shapes import Shape
from cacr_uniter.benchmark.timing import PeakMemory, timer_for
from cacr_uniter.errors import is_out_of_memory

TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2), "float16": (1e-2, 5e-2)}
"""Largest relative error of (loss, gradient) that still is the right function; precision is a column of its own.

In 16 bits four and seven times the largest ones of any contender in benchmarks/results, in float32 hundreds of times.
"""

LARGE = 2048
"""From so many tokens on, one problem is checked instead of three."""


@dataclass(frozen=True)
class Job:
    """What one measurement is; plain values, sent to another process.

    Args:
        what: ``time``, ``memory`` or both, joined by ``+``.
        seconds: of timing a direction.
        clock: of a CPU, see ``timing``.
    """

    shape: dict[str, Any]
    dtype: str
    variant: str
    kind: str
    contender: str
    device: str
    seconds: float
    what: str = "time+memory"
    seed: int = 0
    clock: str = "wall"

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that name the measurement."""
        sizes = {name: self.shape[name] for name in ("batch", "heads", "n_text", "n_vision", "head_dim")}
        return {
            "shape": self.shape["name"],
            **sizes,
            **{name: getattr(self, name) for name in ("dtype", "variant", "kind", "contender")},
        }


def measure(job: Job) -> Iterator[dict[str, Any]]:
    """Rows of a job, one a direction: ``samples`` (ms), memory, errors, status."""
    yield from _prepared(job, _measure)


def first_calls(job: Job) -> Iterator[dict[str, Any]]:
    """Makes the calls of a job once, so that what they compile lies in the caches on disk; a row only of what failed.

    Triton's kernels are the same for one example of two heads, ``torch.compile``'s are those of the shape.
    """
    if job.contender == "triton":
        job = replace(job, shape={**job.shape, "batch": 1, "heads": 2})
    yield from _prepared(job, _call_once)


def _prepared(job: Job, function: Callable[..., Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What ``function`` yields of a job, its shape, contender and inputs; an error is a row."""
    shape = Shape(**job.shape)
    compiled = "compiled" in job.contender
    if compiled:
        from torch._functorch import config

        config.donated_buffer = False  # a compiled backward is run many times
    try:
        inputs = _inputs(shape, job.dtype, job.device, job.seed)
        contender = make(job.contender, job.variant, job.kind, job.dtype, job.device)
        yield from function(job, shape, contender, inputs)
    except Exception as error:
        status = "oom" if is_out_of_memory(error) else "error"
        yield {"direction": "both", "status": status, "note": f"{type(error).__name__}: {str(error)[:200]}"}
    finally:
        if compiled:
            torch.compiler.reset()
        if job.device == "cuda":
            with suppress(RuntimeError):  # a dead context: the row above says why
                torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def _inputs(shape: Shape, dtype: str, device: str, seed: int) -> Inputs:
    return make_inputs(shape, dtype, device, seed)


def _call_once(job: Job, shape: Shape, contender: Contender, inputs: Inputs) -> Iterator[dict[str, Any]]:
    calls = Calls(contender, inputs.leaves(job.variant, job.kind, job.contender), shape.n_text)
    if calls.differentiable:
        calls.both()
    calls.forward()
    yield from ()


def _measure(job: Job, shape: Shape, contender: Contender, inputs: Inputs) -> Iterator[dict[str, Any]]:
    leaves = inputs.leaves(job.variant, job.kind, job.contender)
    row: dict[str, Any] = {"input_mb": sum(x.nbytes for x in leaves) / 1e6, "note": contender.note}
    calls = Calls(contender, leaves, shape.n_text)
    if "time" in job.what:
        try:
            row["loss_error"], row["gradient_error"] = check(calls, contender, leaves, shape)
        except NoReference as error:
            yield {**row, "direction": "both", "status": "unchecked", "note": str(error)}
            return
        loss_limit, gradient_limit = TOLERANCE[job.dtype]
        wrong = not row["loss_error"] <= loss_limit
        if row["gradient_error"] is not None:
            wrong |= not row["gradient_error"] <= gradient_limit
        if wrong:
            yield {**row, "direction": "both", "status": "wrong"}
            return
    timer = timer_for(job.device, job.clock)
    for direction in contender.directions:
        result = dict(row, direction=direction, status="ok")
        try:
            if "memory" in job.what:
                result["extra_mb"] = _memory(calls.prepare(direction), job.device)
            if "time" in job.what:
                times = timer(lambda: calls.prepare(direction), job.seconds, contender.graph)  # noqa: B023
                result |= {"samples": list(times.samples), "timer": times.timer}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            result |= {"status": "oom", "note": str(error).splitlines()[0][:200]}
        yield result


def _memory(run: Callable[[], object], device: str) -> float | None:
    run()
    with PeakMemory(device) as peak:
        run()
    return None if peak.extra is None else peak.extra / 1e6


class Calls:
    """The three calls of a contender: ``forward`` without gradient, ``both``, and ``backward`` of a kept forward."""

    def __init__(self, contender: Contender, leaves: list[Tensor], n_text: int) -> None:
        self.function, self.n_text = contender.function, n_text
        self.leaves = leaves
        self.learning = [x.detach().requires_grad_() for x in leaves]
        self.differentiable = "both" in contender.directions

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(*self.leaves, self.n_text)

    def both(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = self.function(*self.learning, self.n_text)
        return out.detach(), torch.autograd.grad(out, self.learning, torch.ones_like(out))

    def prepare(self, direction: str) -> Callable[[], object]:
        if direction == "forward":
            return self.forward
        if direction == "both":
            return self.both
        out = self.function(*self.learning, self.n_text)
        ones = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, self.learning, ones, retain_graph=True)


def picked(leaves: list[Tensor], shape: Shape) -> tuple[list[int], list[Tensor]]:
    """Up to three of the problems: their numbers, and the leaves [problems, 1, ...] that hold them alone."""
    last = shape.problems - 1
    chosen = sorted({0, last // 2, last}) if shape.n < LARGE else [last]
    return chosen, [x.flatten(0, 1)[chosen].unsqueeze(1) for x in leaves]


class NoReference(Exception):
    """The float64 reference needs more memory than there is."""


def reference(
    contender: Contender, some: list[Tensor], n_text: int, gradients: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """What a contender must compute, in float64: the result, and the gradients of its sum if asked for.

    On the leaves' device, or on the CPU if a GPU has not enough memory for it.

    Raises:
        NoReference: neither has enough.
    """
    try:
        wide = [x.double().requires_grad_(gradients) for x in some]
        want = contender.expected(*wide, n_text)
        return want.detach(), torch.autograd.grad(want, wide, torch.ones_like(want)) if gradients else None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if some[0].device.type == "cpu":
            raise NoReference(f"its float64 reference does not fit in memory: {str(error)[:120]}") from error
    return reference(contender, [x.cpu() for x in some], n_text, gradients)


def check(calls: Calls, contender: Contender, leaves: list[Tensor], shape: Shape) -> tuple[float, float | None]:
    """Relative errors of the result and of the gradients against float64, on up to three of the problems."""
    chosen, some = picked(leaves, shape)
    want, want_gradients = reference(contender, some, shape.n_text, calls.differentiable)
    if want_gradients is None:
        out, error = calls.forward(), None
    else:
        out, gradients = calls.both()
        got = torch.cat([g.flatten(0, 1)[chosen].double().flatten() for g in gradients])
        error = relative_error(got.to(want.device), torch.cat([g.flatten() for g in want_gradients]))
    return relative_error(out.flatten(0, 1)[chosen].to(want.device), want.flatten(0, 1)), error
