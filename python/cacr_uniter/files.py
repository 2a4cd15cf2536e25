"""Files that are written whole or not at all, and JSON that may be anybody's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """A neighbour of ``path`` to write to: it gets the name of ``path`` when the block ends well, else it is deleted.

    Args:
        mark: part of the neighbour's name, where several processes write the same file.
    """
    partial = path.with_name(f"{path.name}{mark}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + ("" if indent is None else "\n"))


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` of anybody's text.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python follows.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
