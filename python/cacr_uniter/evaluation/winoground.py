"""Winoground: which of two captions and two images with the same words belong together. NumPy only.

With s(c, i) the score of caption c and image i, and caption k belonging to image k (Thrush et al. 2022):

    text   s(c0,i0) > s(c1,i0)  and  s(c1,i1) > s(c0,i1)
    image  s(c0,i0) > s(c0,i1)  and  s(c1,i1) > s(c1,i0)
    group  text and image

All inequalities are strict: a tie is wrong. A score is the mean over the examples.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacr_uniter.errors import UserError
from cacr_uniter.files import parse_json, write_text

CHANCE = {"text": 25.0, "image": 25.0, "group": 100 / 6}
"""Percent right with independent continuous scores: 1/4, 1/4, 1/6."""

METRICS = ("text", "image", "group")
RESAMPLES = 10_000
_LABEL = re.compile(r"(.+)_c([01])_i([01])")

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Marks:
    """Right or wrong per example: `text`, `image`, `group` bool [n]."""

    text: NDArray[np.bool_]
    image: NDArray[np.bool_]
    group: NDArray[np.bool_]


def marks(scores: Scores) -> Marks:
    """Marks of scores [n, 2, 2], indexed [example, caption, image]."""
    s00, s01, s10, s11 = (scores[:, c, i] for c in (0, 1) for i in (0, 1))
    text = (s00 > s10) & (s11 > s01)
    image = (s00 > s01) & (s11 > s10)
    return Marks(text, image, text & image)


def pairwise(scores: Scores) -> dict[str, float]:
    """Secondary measures in percent.

    pairwise_text, pairwise_image: share of the 2 n single comparisons that are right, a tie counting one half.
    matching: share of examples with s00 + s11 > s01 + s10, ties wrong.
    """
    s00, s01, s10, s11 = (scores[:, c, i] for c in (0, 1) for i in (0, 1))

    def share(right: Scores, wrong: Scores) -> float:
        return 100 * float(np.mean((right > wrong) + 0.5 * (right == wrong)))

    return {
        "pairwise_text": share(np.stack([s00, s11]), np.stack([s10, s01])),
        "pairwise_image": share(np.stack([s00, s11]), np.stack([s01, s10])),
        "matching": 100 * float(np.mean(s00 + s11 > s01 + s10)),
    }


def read_scores(path: Path) -> dict[str, Scores]:
    """Scores [2, 2] by example id from a file of lines {"label": "<id>_c<k>_i<j>", "score": x}.

    Raises:
        UserError: missing file, a line that is no such object, a label twice, a score that is no finite number, or an
            example without all four scores.
    """
    found: dict[str, dict[tuple[int, int], float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"score file {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"score file {path}: not UTF-8 text; give lines of JSON") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        label, score = _score_line(path, number, line)
        match = _LABEL.fullmatch(label)
        if match is None:
            raise UserError(f"score file {path}, line {number}: label {label!r} is not <id>_c<0|1>_i<0|1>")
        pair = (int(match[2]), int(match[3]))
        if pair in found.setdefault(match[1], {}):
            raise UserError(f"score file {path}, line {number}: label {label!r} occurs twice")
        found[match[1]][pair] = score
    incomplete = [key for key, pairs in found.items() if len(pairs) != 4]
    if incomplete or not found:
        what = f"example {incomplete[0]!r} lacks some of its four scores" if incomplete else "no scores in it"
        raise UserError(f"score file {path}: {what}; every example needs c0_i0, c0_i1, c1_i0 and c1_i1")
    return {
        key: np.array([[pairs[c, i] for i in (0, 1)] for c in (0, 1)], dtype=np.float64) for key, pairs in found.items()
    }


def _score_line(path: Path, number: int, line: str) -> tuple[str, float]:
    try:
        entry = parse_json(line)
        label, score = entry["label"], entry["score"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'score file {path}, line {number}: expected {{"label": "<id>_c<k>_i<j>", "score": x}}, got {line[:60]!r}'
        ) from error
    if not isinstance(label, str) or isinstance(score, bool) or not isinstance(score, int | float):
        raise UserError(f"score file {path}, line {number}: label must be text and score a number, got {line[:60]!r}")
    if not -sys.float_info.max <= score <= sys.float_info.max:
        raise UserError(
            f"score file {path}, line {number}: score of {label!r} is {str(score)[:20]}, not a finite number"
        )
    return label, float(score)


def write_scores(path: Path, ids: Sequence[str], scores: Scores) -> None:
    """Writes scores [n, 2, 2] as the lines that `read_scores` reads."""
    lines = (
        json.dumps({"label": f"{example}_c{c}_i{i}", "score": float(scores[n, c, i])})
        for n, example in enumerate(ids)
        for c in (0, 1)
        for i in (0, 1)
    )
    write_text(path, "\n".join(lines) + "\n")


def summary(scores: Scores, groups: Mapping[str, Mapping[str, Sequence[int]]] | None = None) -> dict[str, Any]:
    """Everything that is reported, JSON-ready, in percent.

    Args:
        scores: [n, 2, 2], indexed [example, caption, image].
        groups: breakdown -> value -> example numbers; an example may be in several values or none.

    Returns:
        n, text, image, group (each score and ci95, a percentile bootstrap over examples), chance, pairwise_text,
        pairwise_image, matching, and `breakdowns` of the same for each group.
    """
    breakdowns = {
        name: {value: _numbers(scores[list(rows)]) for value, rows in values.items() if len(rows)}
        for name, values in (groups or {}).items()
    }
    return {**_numbers(scores), "chance": CHANCE, "breakdowns": breakdowns}


def _numbers(scores: Scores) -> dict[str, Any]:
    right = marks(scores)
    stacked = np.stack([getattr(right, name) for name in METRICS], axis=1)
    low, high = bootstrap(stacked)
    rated = {
        name: {"score": 100 * float(stacked[:, k].mean()), "ci95": [100 * float(low[k]), 100 * float(high[k])]}
        for k, name in enumerate(METRICS)
    }
    return {"n": len(scores), **rated, **pairwise(scores)}


def bootstrap(values: NDArray[np.bool_], seed: int = 0) -> tuple[Scores, Scores]:
    """95 % percentile interval of the column means of `values` [n, k], resampling rows 10,000 times.

    Returns:
        Lower and upper ends [k]. Deterministic for a seed.
    """
    rng = np.random.default_rng(seed)
    patterns, counts = np.unique(values, axis=0, return_counts=True)
    draws = rng.multinomial(len(values), counts / len(values), size=RESAMPLES)
    means = draws @ patterns.astype(np.float64) / len(values)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def by_value(values: Iterable[Sequence[str]]) -> dict[str, list[int]]:
    """Example numbers by value, from the values (none, one or several) of each example, in order of first use."""
    rows: dict[str, list[int]] = {}
    for number, own in enumerate(values):
        for value in own:
            rows.setdefault(value, []).append(number)
    return rows
