"""Region features in tab-separated files: bottom-up attention (BUTD), LXMERT and VOLTA, VinVL and Oscar.

Arrays are base64 of little-endian numbers, in some dumps compressed with zlib before. Files are read line by line.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cacr_uniter.data.importers.records import Item, RegionRecord
from cacr_uniter.errors import UserError
from cacr_uniter.files import parse_json

BUTD_COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LXMERT_COLUMNS = (
    "img_id",
    "img_h",
    "img_w",
    "objects_id",
    "objects_conf",
    "attrs_id",
    "attrs_conf",
    "num_boxes",
    "boxes",
    "features",
)
VOLTA_COLUMNS = (*LXMERT_COLUMNS, "cls_prob")
INFLATED_LIMIT = 1 << 28


def decode_array(text: str, rows: int, columns: int | None, name: str, dtype: str = "<f4") -> np.ndarray:
    """A base64 array of `rows` rows.

    Args:
        text: base64, of the numbers or of their zlib stream.
        rows: number of rows.
        columns: numbers in a row; None: whatever fits.
        name: for messages.
        dtype: stored type.

    Raises:
        ValueError: not base64, or not a whole number of rows.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: damaged base64 ({error})") from error
    size = np.dtype(dtype).itemsize
    whole = rows * (columns or 1) * size

    def right(data: bytes) -> bool:
        return len(data) == whole if columns is not None else len(data) > 0 and len(data) % whole == 0

    if rows > 0 and not right(data):
        with contextlib.suppress(zlib.error):
            data = zlib.decompressobj().decompress(data, INFLATED_LIMIT)
    if rows <= 0 or not right(data):
        raise ValueError(f"{name}: {len(data)} bytes are not {rows} rows of {columns or 'any'} numbers of {size} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(rows, -1)


class Lines:
    """The lines of a big text file with the byte position behind each; a last line without an end is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise UserError(f"features {path}: expected a TSV file, got a folder")
        try:
            self.total = path.stat().st_size
        except OSError as error:
            raise UserError(f"features {path}: cannot be read ({error.strerror})") from error

    def __iter__(self) -> Iterator[tuple[int, int, list[str]]]:
        done = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                done += len(line)
                if line.strip():
                    yield number, done, line.decode("utf-8", errors="replace").rstrip("\r\n").split("\t")


def _columns(fields: list[str], names: tuple[str, ...]) -> dict[str, str]:
    if len(fields) != len(names):
        raise ValueError(f"expected {len(names)} columns ({', '.join(names)}), got {len(fields)}")
    return dict(zip(names, fields, strict=True))


class ButdTsv:
    """image_id, image_w, image_h, num_boxes, boxes [n, 4] in pixels, features [n, d]; no header, no confidences."""

    unit = "bytes"

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self.total = self._lines.total

    def __iter__(self) -> Iterator[Item]:
        for number, done, fields in self._lines:
            yield Item(fields[0], f"line {number}", done, partial(self._load, fields))

    @staticmethod
    def _load(fields: list[str]) -> RegionRecord:
        row = _columns(fields, BUTD_COLUMNS)
        count = int(row["num_boxes"])
        return RegionRecord(
            features=decode_array(row["features"], count, None, "features"),
            boxes=decode_array(row["boxes"], count, 4, "boxes"),
            size=(float(row["image_w"]), float(row["image_h"])),
        )


class LxmertTsv:
    """As BUTD, with height before width, object and attribute classes and confidences; VOLTA adds class
    probabilities.
    """

    unit = "bytes"

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self.total = self._lines.total

    def __iter__(self) -> Iterator[Item]:
        for number, done, fields in self._lines:
            yield Item(fields[0], f"line {number}", done, partial(self._load, fields))

    @staticmethod
    def _load(fields: list[str]) -> RegionRecord:
        row = _columns(fields, VOLTA_COLUMNS if len(fields) == len(VOLTA_COLUMNS) else LXMERT_COLUMNS)
        count = int(row["num_boxes"])
        labels = decode_array(row["cls_prob"], count, None, "cls_prob") if "cls_prob" in row else None
        return RegionRecord(
            features=decode_array(row["features"], count, None, "features"),
            boxes=decode_array(row["boxes"], count, 4, "boxes"),
            size=(float(row["img_w"]), float(row["img_h"])),
            conf=decode_array(row["objects_conf"], count, 1, "objects_conf"),
            soft_labels=labels,
        )


class VinvlTsv:
    """image key, then num_boxes and base64 [n, 2054] in two columns or as JSON {num_boxes, features} in one.

    The last six numbers of a row are the normalised box. Confidences lie in a second file (predictions or labels) of
    image key and a JSON list of objects, or {"objects": list}, each with "conf".

    Args:
        path: the feature file.
        labels: the predictions file, or None.
    """

    unit = "bytes"

    def __init__(self, path: Path, labels: Path | None = None) -> None:
        self._lines = Lines(path)
        self.total = self._lines.total
        self._labels = labels
        self._offsets = self._index(labels) if labels is not None else None

    @staticmethod
    def _index(labels: Path) -> dict[str, tuple[int, int]]:
        """Image key -> start and length of its line."""
        offsets, start = {}, 0
        try:
            with labels.open("rb") as stream:
                for line in stream:
                    offsets[line.split(b"\t", 1)[0].decode("utf-8")] = (start, len(line))
                    start += len(line)
        except OSError as error:
            raise UserError(f"labels {labels}: cannot be read ({error.strerror})") from error
        return offsets

    def __iter__(self) -> Iterator[Item]:
        for number, done, fields in self._lines:
            yield Item(fields[0], f"line {number}", done, partial(self._load, fields))

    def _load(self, fields: list[str]) -> RegionRecord:
        if len(fields) == 2:
            values = parse_json(fields[1])
            count, text = int(values["num_boxes"]), str(values["features"])
        else:
            row = _columns(fields, ("image key", "num_boxes", "features"))
            count, text = int(row["num_boxes"]), row["features"]
        rows = decode_array(text, count, None, "features")
        if rows.shape[1] <= 6:
            raise ValueError(f"features: expected rows of features and six box numbers, got {rows.shape[1]} numbers")
        conf = None if self._offsets is None else self._confidences(fields[0], count)
        return RegionRecord(features=rows[:, :-6], norm_bb=rows[:, -6:], conf=conf)

    def _confidences(self, key: str, count: int) -> np.ndarray:
        assert self._labels is not None
        assert self._offsets is not None
        if key not in self._offsets:
            raise ValueError(f"{self._labels} has no line for it")
        start, length = self._offsets[key]
        with self._labels.open("rb") as stream:
            stream.seek(start)
            fields = stream.read(length).split(b"\t", 1)
        objects: Any = parse_json(fields[1]) if len(fields) == 2 else None
        if isinstance(objects, dict):
            objects = objects.get("objects")
        if not isinstance(objects, list) or len(objects) != count:
            raise ValueError(f"{self._labels} does not list {count} objects for it")
        return np.array([item["conf"] for item in objects], dtype=np.float64)
