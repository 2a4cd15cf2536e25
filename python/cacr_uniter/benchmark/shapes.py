"""What is measured: shapes, presets and which contenders meet on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from cacr_uniter.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """B x H problems of T text tokens and R regions; D is the head width of q, k and v.

    Args:
        scores: whether the score variant runs (its work grows with N^3), or q and k only.
    """

    name: str
    batch: int
    heads: int
    n_text: int
    n_vision: int
    head_dim: int = 64
    scores: bool = True

    @property
    def problems(self) -> int:
        return self.batch * self.heads

    @property
    def n(self) -> int:
        return self.n_text + self.n_vision

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _square(n: int, heads: int, scores: bool = True) -> Shape:
    return Shape(f"square-{n}", 1, heads, n // 2, n // 2, scores=scores)


def _uniter(regions: int, batch: int) -> Shape:
    return Shape(f"uniter-{regions}-b{batch}", batch, 12, 20 if regions == 36 else 60, regions)


TINY = Shape("tiny", 1, 1, 20, 36)
VILT = Shape("vilt-b32", 32, 12, 40, 200)
UNITER = tuple(_uniter(regions, batch) for regions in (36, 100) for batch in (4, 32, 128))


def preset_shapes(preset: str, device: str) -> tuple[Shape, ...]:
    """Shapes of a preset, the most telling first.

    UNITER: 12 heads, T, R = 20, 36 and 60, 100, batches of 4, 32 and 128; ViLT: T, R = 40, 200; squares T = R at one
    number of problems (16 on a GPU, 4 on a CPU) up to 16384 tokens, the last from q and k only.
    """
    heads = 16 if device == "cuda" else 4
    squares = (*(_square(n, heads) for n in (256, 1024, 4096)), _square(16384, heads, scores=False))
    if preset == "full":
        order = (_uniter(100, 128), squares[2], *UNITER, TINY, VILT, *squares)
        return tuple(dict.fromkeys(order))
    if device == "cuda":
        return (_uniter(100, 32), squares[2])
    return (_uniter(36, 4), _uniter(100, 4))


def parse_shapes(words: list[str], preset: str, device: str) -> tuple[Shape, ...]:
    """Shapes by name (``uniter-100-b32``), or written ``BxHxTxR`` or ``BxHxTxRxD``.

    Raises:
        UserError: neither a known name nor such numbers.
    """
    known = {shape.name: shape for shape in (*preset_shapes("full", device), *preset_shapes(preset, device))}
    shapes = []
    for word in words:
        numbers = word.split("x")
        if word in known:
            shapes.append(known[word])
        elif len(numbers) in (4, 5) and all(x.isdecimal() and int(x) > 0 for x in numbers):
            batch, heads, n_text, n_vision, head_dim = (*(int(x) for x in numbers), 64)[:5]
            shapes.append(Shape(word, batch, heads, n_text, n_vision, head_dim))
        else:
            raise UserError(f"--shapes: {word!r} is neither BxHxTxR[xD] nor one of {', '.join(known)}")
    return tuple(shapes)
