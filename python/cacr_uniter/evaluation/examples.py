"""Winoground examples: captions, image names and tags, from a scene set or the published jsonl / parquet files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacr_uniter.data.names import WINOGROUND
from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.winoground import by_value
from cacr_uniter.files import parse_json

BREAKDOWNS = ("split", "collapsed_tag", "num_main_preds", "secondary_tag", "tag", "difficulty")
"""Names of the breakdowns, without the countings of secondary tags."""

_SECONDARY = ("Symbolic", "Pragmatics", "Series", "Morpheme-Level")
_COLUMNS = (
    *("id", "caption_0", "caption_1", "image_0", "image_1"),
    *("tag", "secondary_tag", "num_main_preds", "collapsed_tag"),
)


@dataclass(frozen=True)
class Example:
    """One example. Caption k belongs to image k; images are npz names; caption ids exist in scene sets only."""

    id: str
    captions: tuple[str, str]
    images: tuple[str, str]
    caption_ids: tuple[str, str] | None = None
    tags: dict[str, Any] = field(default_factory=dict)


def read_examples(path: Path) -> list[Example]:
    """Examples of `winoground.json` (scene set), `examples.jsonl` or a parquet file (published).

    Raises:
        UserError: missing or damaged file, a field that is absent, or an id twice.
    """
    rows = _read_rows(path)
    examples = [_example(path, number, row) for number, row in enumerate(rows)]
    if not examples:
        raise UserError(f"examples {path}: the file holds none")
    if len({e.id for e in examples}) != len(examples):
        raise UserError(f"examples {path}: an id occurs twice")
    return examples


def _read_rows(path: Path) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            return _parquet_rows(path)
        text = path.read_text(encoding="utf-8")
        rows = parse_json(text) if path.suffix == ".json" else [parse_json(x) for x in text.split("\n") if x.strip()]
    except OSError as error:
        raise UserError(f"examples {path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"examples {path}: damaged ({error}); give a .json, .jsonl or .parquet file") from error
    if not isinstance(rows, list):
        raise UserError(f"examples {path}: expected a list of examples, got {type(rows).__name__}")
    return rows


def _parquet_rows(path: Path) -> list[Any]:
    """Rows without the pictures, which are large and not read here."""
    import pyarrow.parquet as parquet

    present = parquet.read_schema(path).names
    columns = [name for name in _COLUMNS if name in present and not name.startswith("image_")]
    return parquet.read_table(path, columns=columns).to_pylist()


def _example(path: Path, number: int, row: Any) -> Example:
    try:
        key = str(row["id"])
        captions = (str(row["caption_0"]), str(row["caption_1"]))
        images = tuple(_image_name(key, k, row.get(f"image_{k}")) for k in (0, 1))
        ids = row.get("caption_ids")
        caption_ids = (str(ids[0]), str(ids[1])) if ids is not None else None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(
            f"examples {path}: entry {number} lacks or misnames a field ({error}); needed are id, caption_0, caption_1 "
            "and, unless ids are whole numbers, image_0 and image_1"
        ) from error
    rest = {name: row[name] for name in (*_COLUMNS[5:], "split") if row.get(name) is not None}
    return Example(key, captions, (images[0], images[1]), caption_ids, rest)


def _image_name(key: str, k: int, given: Any) -> str:
    """The npz name that is given, else that of image k of a published example."""
    return given if isinstance(given, str) and given.endswith(".npz") else WINOGROUND.format(int(key), k)


def read_difficulty(path: Path) -> dict[str, list[str]]:
    """Difficulty tags {"id": [tags]} (Diwan et al. 2022, new_tag_assignments.json).

    Raises:
        UserError: missing, damaged, or no map from ids to lists of words.
    """
    try:
        tags = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"difficulty tags {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"difficulty tags {path}: not valid JSON ({error})") from error
    if not isinstance(tags, dict) or not all(isinstance(v, list) and all(map(_is_text, v)) for v in tags.values()):
        raise UserError(f'difficulty tags {path}: expected {{"id": ["tag", ...]}}')
    return tags


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def breakdowns(
    examples: Sequence[Example], difficulty: dict[str, list[str]] | None = None
) -> dict[str, dict[str, list[int]]]:
    """Example numbers by split, tags, predicates, secondary tags (both countings) and difficulty, where given.

    The published table of secondary tags counts an example under a tag only if it has no other ("exact"), the published
    numbers of examples count every example that has it ("contains").
    """
    groups = {
        "split": by_value(_one(e, "split") for e in examples),
        "collapsed_tag": by_value(_one(e, "collapsed_tag") for e in examples),
        "num_main_preds": by_value(_one(e, "num_main_preds") for e in examples),
        "secondary_tag (exact)": by_value([t] if (t := _secondary(e)) in _SECONDARY else [] for e in examples),
        "secondary_tag (contains)": by_value([s for s in _SECONDARY if s in _secondary(e)] for e in examples),
        "tag": by_value(_one(e, "tag") for e in examples),
    }
    if difficulty is not None:
        groups["difficulty"] = by_value(difficulty.get(e.id) or ["none"] for e in examples)
    return {name: values for name, values in groups.items() if values}


def _one(example: Example, name: str) -> list[str]:
    value = example.tags.get(name)
    return [] if value in (None, "") else [str(value)]


def _secondary(example: Example) -> str:
    """The secondary tag with spaces evened out."""
    return re.sub(r"\s+", " ", str(example.tags.get("secondary_tag", ""))).strip()
