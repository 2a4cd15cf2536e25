"""Validation: from what a caller writes to :class:`Spans` and :class:`Options`. Errors name argument, want and got."""

from __future__ import annotations

import numbers
from typing import Any, get_args

import torch
from torch import SymInt, Tensor

from .problem import Kind, Options, Sides, Spans, StopGradient

KINDS, SIDES, STOP_GRADIENTS = get_args(Kind), get_args(Sides), get_args(StopGradient)

FLOAT64_MAX = torch.finfo(torch.float64).max
FAR = 1 << 29
"""Where positions of span tensors are cut off: beyond every limit, and two of them still fit in int32."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def parse_options(
    kind: str, sides: str, projection_scale: float | str, stop_gradient: str | None, row_reduction: str
) -> Options:
    check_choice("kind", kind, KINDS)
    check_choice("sides", sides, SIDES)
    check_choice("row_reduction", row_reduction, ("sum", "mean"))
    stop = "none" if stop_gradient is None else stop_gradient
    if stop not in STOP_GRADIENTS:
        raise ValueError(f"stop_gradient must be None, 'target' or 'projection'; got {stop_gradient!r}")
    mean = isinstance(projection_scale, str)
    if mean and projection_scale != "mean":
        raise ValueError(f"projection_scale must be a number or 'mean' (1 / n_b^2); got {projection_scale!r}")
    scale = 1.0 if mean else as_number("projection_scale", projection_scale, "a number or 'mean'")
    return Options(kind, sides, scale, mean, row_reduction == "mean", stop)  # type: ignore[arg-type]


def as_number(name: str, value: Any, expected: str) -> float:
    """A finite real number (Python's or NumPy's) as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float | numbers.Real):
        raise TypeError(f"{name} must be {expected}; got {type(value).__name__}")
    number = value if isinstance(value, int) else float(value)
    if not -FLOAT64_MAX <= number <= FLOAT64_MAX:
        raise ValueError(f"{name} must be finite; got {str(value)[:40]}")
    return float(number)


def check_float_tensor(name: str, value: Any, dims: tuple[int, ...], shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}; got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense torch.Tensor; got {kind}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {value.dtype}")
    if value.dim() not in dims:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")


def as_problems(name: str, value: Tensor, rows: str = "N", columns: str = "N") -> Tensor:
    """[.., R, C] with up to two leading dimensions as [B, H, R, C]; ``rows``, ``columns``: what errors call them."""
    shapes = [f"[{lead}{rows}, {columns}]" for lead in ("", "B, ", "B, H, ")]
    check_float_tensor(name, value, (2, 3, 4), f"{shapes[0]}, {shapes[1]} or {shapes[2]}")
    if value.dim() == 2:
        return value[None, None]
    return value[:, None] if value.dim() == 3 else value


def _whole_number(name: str, value: Any, expected: str) -> int:
    """A whole number of Python, NumPy or a graph that is being traced."""
    if isinstance(value, int | SymInt) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name} must be {expected}; got {type(value).__name__}")


def _span(name: str, value: Any, batch: int, device: torch.device) -> int | Tensor:
    """A span argument, an int or an integer tensor [B] on ``device``, as an int or a tensor of int32 or int64."""
    if isinstance(value, Tensor):
        if value.dtype not in (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8):
            raise TypeError(
                f"{name} must be an int or a tensor [B] of int64, int32, int16, int8 or uint8; got a tensor of "
                f"{value.dtype}"
            )
        if value.dim() != 1 or value.shape[0] != batch:
            raise ValueError(f"{name} must be an int or have shape [B] = [{batch}]; got {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name} must lie on the input's device {device}; got {value.device} (use {name}.to(...))")
        return value if value.dtype == torch.int64 else value.to(torch.int32)
    return _whole_number(name, value, "an int or an integer tensor [B]")


def _check_range(name: str, value: int, limit: int, after: tuple[str, int] | None = None) -> None:
    """``after``: the name and value of the start that the limit counts from."""
    if not 0 <= value <= limit:
        what = "the size of the sequence"
        if after is not None and after[1] > 0:
            what = f"what the sequence holds after {after[0]} = {after[1]}"
        raise ValueError(f"{name} must lie between 0 and {limit} ({what}); got {value}")


def parse_spans(
    n_text: int | Tensor,
    n_vision: int | Tensor | None,
    text_start: int | Tensor,
    vision_start: int | Tensor | None,
    max_n_text: int | None,
    max_n_vision: int | None,
    *,
    batch: int,
    device: torch.device,
    limit_text: int,
    limit_vision: int,
    joint: bool,
) -> Spans:
    """``joint``: text and vision lie along one sequence of ``limit_text`` = ``limit_vision`` = N positions."""
    n_text, text_start = _span("n_text", n_text, batch, device), _span("text_start", text_start, batch, device)
    if vision_start is None:
        vision_start = text_start + n_text if joint else 0
    if n_vision is None:
        if any(isinstance(s, Tensor) for s in (n_text, text_start, vision_start)):
            raise ValueError(
                "n_vision must be given (an int or a tensor [B]) when n_text, text_start or vision_start is a tensor; "
                "n_vision=None means 'the rest of the sequence' and needs ints"
            )
        n_vision = limit_vision - vision_start
    vision_start = _span("vision_start", vision_start, batch, device)
    n_vision = _span("n_vision", n_vision, batch, device)
    max_n_text = _maximum("max_n_text", max_n_text, limit_text)
    max_n_vision = _maximum("max_n_vision", max_n_vision, limit_vision)
    spans = (text_start, n_text, vision_start, n_vision)
    if not any(isinstance(s, Tensor) for s in spans):
        return _int_spans(spans, max_n_text, max_n_vision, limit_text, limit_vision, joint)  # type: ignore[arg-type]
    limits = (limit_text, limit_text, limit_vision, limit_vision)
    for name, span, limit in zip(("text_start", "n_text", "vision_start", "n_vision"), spans, limits):
        if not isinstance(span, Tensor):
            _check_range(name, span, limit)
    table = torch.stack([_column(s, batch, device) for s in spans], dim=1)
    bounded = Spans(
        0,
        _bound(n_text, max_n_text, limit_text),
        0,
        _bound(n_vision, max_n_vision, limit_vision),
        table,
    )
    if type(table) is Tensor and table.device.type == "cpu" and not torch.compiler.is_compiling():  # no fake tensor
        _check_table(bounded, limit_text, limit_vision, joint)
    return bounded


def _maximum(name: str, value: Any, limit: int) -> int | None:
    if value is None:
        return None
    number = _whole_number(name, value, "an int or None")
    _check_range(name, number, limit)
    return number


def _column(value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((batch,), value, dtype=torch.int32, device=device)
    return value if value.dtype == torch.int32 else value.clamp(-1, FAR).to(torch.int32)


def _bound(value: int | Tensor, maximum: int | None, limit: int) -> int:
    if maximum is not None:
        return maximum
    return limit if isinstance(value, Tensor) else value


def _int_spans(
    spans: tuple[int, int, int, int],
    max_n_text: int | None,
    max_n_vision: int | None,
    limit_text: int,
    limit_vision: int,
    joint: bool,
) -> Spans:
    text_start, n_text, vision_start, n_vision = spans
    _check_range("text_start", text_start, limit_text)
    _check_range("n_text", n_text, limit_text - text_start, ("text_start", text_start))
    _check_range("vision_start", vision_start, limit_vision)
    _check_range("n_vision", n_vision, limit_vision - vision_start, ("vision_start", vision_start))
    for name, value, maximum in (("n_text", n_text, max_n_text), ("n_vision", n_vision, max_n_vision)):
        if maximum is not None and value > maximum:
            raise ValueError(f"{name} must be at most max_{name} = {maximum}; got {value}")
    overlap = text_start < vision_start + n_vision and vision_start < text_start + n_text
    if joint and overlap and n_text > 0 and n_vision > 0:
        raise ValueError(
            f"the text span [{text_start}, {text_start + n_text}) and the vision span "
            f"[{vision_start}, {vision_start + n_vision}) must not overlap"
        )
    return Spans(text_start, n_text, vision_start, n_vision)


def _check_table(spans: Spans, limit_text: int, limit_vision: int, joint: bool) -> None:
    bad = spans.invalid(limit_text, limit_vision, joint)
    if bool(bad.any()):
        assert spans.table is not None
        example = int(bad.nonzero()[0])
        text_start, n_text, vision_start, n_vision = spans.table[example].tolist()
        raise ValueError(
            f"the spans of example {example} are not valid: text [{text_start}, {text_start + n_text}), vision "
            f"[{vision_start}, {vision_start + n_vision}); expected starts and lengths >= 0, ends within {limit_text} "
            f"and {limit_vision}, n_text <= max_n_text = {spans.n_text}, n_vision <= max_n_vision = {spans.n_vision}"
            + (", and no overlap" if joint else "")
        )


def parse_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, ("mean", "sum", "none"))


def reduce_loss(loss: Tensor, reduction: str, dims: int) -> Tensor:
    """[B, H] losses to ``dims`` leading dimensions for "none", else to a scalar; the mean over no problem is 0."""
    if reduction == "none":
        return loss if dims == 2 else loss[:, 0] if dims == 1 else loss[0, 0]
    return loss.mean() if reduction == "mean" and loss.numel() else loss.sum()


def parse_attention(
    attn: Tensor,
    n_text: int | Tensor,
    n_vision: int | Tensor | None = None,
    text_start: int | Tensor = 0,
    vision_start: int | Tensor | None = None,
    max_n_text: int | None = None,
    max_n_vision: int | None = None,
) -> tuple[list[Tensor], Spans, int]:
    """attn as [[B, H, N, N]], the spans, and the number of leading dimensions the caller gave."""
    problems = as_problems("attn", attn)
    n = problems.shape[-1]
    if problems.shape[-2] != n:
        raise ValueError(f"attn must be square in its last two dimensions; got {tuple(attn.shape)}")
    spans = parse_spans(
        n_text,
        n_vision,
        text_start,
        vision_start,
        max_n_text,
        max_n_vision,
        batch=problems.shape[0],
        device=attn.device,
        limit_text=n,
        limit_vision=n,
        joint=True,
    )
    return [problems], spans, attn.dim() - 2
