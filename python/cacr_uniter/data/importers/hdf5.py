"""Region features in HDF5 files: 36 regions an image (hengyuan-hu), or a table of spans (ban-vqa).

Row numbers are found in `<stem>_imgid2idx.pkl` beside the file, a pickled table that is read as data, or in a JSON
file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cacr_uniter.data.importers.pickled import read_pickled_data
from cacr_uniter.data.importers.records import Item, RegionRecord
from cacr_uniter.errors import UserError
from cacr_uniter.files import parse_json


def _open(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"features {path}: missing, truncated or not an HDF5 file; copy it again") from error


def _read_ids(path: Path, ids: Path | None) -> dict[str, int]:
    """Image id -> row."""
    ids = ids or path.with_name(f"{path.stem}_imgid2idx.pkl")
    try:
        data = ids.read_bytes()
    except OSError as error:
        raise UserError(f"image ids {ids}: cannot be read; give the imgid2idx file of {path.name}") from error
    try:
        table = parse_json(data) if ids.suffix == ".json" else read_pickled_data(data)
        return {str(image): int(row) for image, row in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"image ids {ids}: expected a table of image ids and rows ({error})") from error


class _Hdf5:
    """Common part: datasets, ids, iteration in the order of rows."""

    unit = "images"
    names: tuple[str, ...] = ("image_features", "spatial_features")

    def __init__(self, path: Path, ids: Path | None = None) -> None:
        self._file = _open(path)
        missing = [name for name in self.names if name not in self._file]
        if missing:
            raise UserError(f"features {path}: lacks the datasets {', '.join(missing)}; is it the right format?")
        self._rows = sorted((row, image) for image, row in _read_ids(path, ids).items())
        self.total = len(self._rows)

    def __iter__(self) -> Iterator[Item]:
        for done, (row, image) in enumerate(self._rows, 1):
            yield Item(image, f"row {row}", done, partial(self._load, row))

    def _load(self, row: int) -> RegionRecord:
        raise NotImplementedError

    def _regions(self, index: Any) -> RegionRecord:
        """spatial_features are x1, y1, x2, y2, w, h as fractions of the image."""
        features = np.asarray(self._file["image_features"][index], dtype=np.float32)
        return RegionRecord(features=features, norm_bb=np.asarray(self._file["spatial_features"][index]))


class FixedHdf5(_Hdf5):
    """image_features [N, 36, d], spatial_features [N, 36, 6]."""

    def _load(self, row: int) -> RegionRecord:
        if not 0 <= row < len(self._file["image_features"]):
            raise ValueError(f"row {row} is beyond the {len(self._file['image_features'])} rows of the file")
        return self._regions(row)


class AdaptiveHdf5(_Hdf5):
    """image_features [sum n, d], spatial_features [sum n, 6], pos_boxes [N, 2] (start, end) of each image."""

    names = ("image_features", "spatial_features", "pos_boxes")

    def _load(self, row: int) -> RegionRecord:
        spans, size = self._file["pos_boxes"], len(self._file["image_features"])
        if not 0 <= row < len(spans):
            raise ValueError(f"row {row} is beyond the {len(spans)} images of the file")
        start, end = (int(value) for value in spans[row])
        if not 0 <= start < end <= size:
            raise ValueError(f"span {start} to {end} does not lie in {size} regions")
        return self._regions(slice(start, end))
