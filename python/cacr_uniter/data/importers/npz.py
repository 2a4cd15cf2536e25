"""Region features as a folder of npz files, one an image: UNITER's own and those of the detectron2 port (MILVLG)."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from cacr_uniter.data.codec import unpack_npz
from cacr_uniter.data.importers.pickled import read_pickled_data
from cacr_uniter.data.importers.records import Item, RegionRecord
from cacr_uniter.errors import UserError


class _Folder:
    """The npz files below a folder, in the order of their names."""

    unit = "images"

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"features {path}: expected a folder of npz files")
        self._paths = sorted(path.rglob("*.npz"))
        self.total = len(self._paths)
        if not self._paths:
            raise UserError(f"features {path}: holds no npz file")

    def __iter__(self) -> Iterator[Item]:
        for done, path in enumerate(self._paths, 1):
            yield Item(path.name, str(path), done, partial(self._load, path))

    @staticmethod
    def _load(path: Path) -> RegionRecord:
        raise NotImplementedError


def _required(arrays: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; it has {', '.join(sorted(arrays)) or 'nothing'}")
    return [arrays[name] for name in names]


class UniterNpz(_Folder):
    """norm_bb [n, 6], features [n, d], conf [n] or [n, 1], soft_labels [n, classes], in float16."""

    @staticmethod
    def _load(path: Path) -> RegionRecord:
        arrays = unpack_npz(path)
        norm_bb, features = _required(arrays, "norm_bb", "features")
        return RegionRecord(
            features=features,
            norm_bb=norm_bb,
            conf=arrays.get("conf"),
            soft_labels=arrays.get("soft_labels"),
        )


def _pickled_info(path: Path) -> dict[str, Any]:
    """The table `info` of a MILVLG file, read as data; empty if there is none."""
    with zipfile.ZipFile(path) as archive:
        if "info.npy" not in archive.namelist():
            return {}
        with archive.open("info.npy") as stream:
            version = npy.read_magic(stream)
            if version != (1, 0) or not npy.read_array_header_1_0(stream)[2].hasobject:
                return {}
            table = read_pickled_data(stream.read())
    if isinstance(table, np.ndarray) and table.size == 1:
        table = table.reshape(-1)[0]
    return table if isinstance(table, dict) else {}


class MilvlgNpz(_Folder):
    """x [n, d] (or [d, n]), bbox [n, 4] in pixels, num_bbox, image_h, image_w, and info.

    `info` is a pickled table with the confidences `objects_conf`; it is read as data, never run.
    """

    @staticmethod
    def _load(path: Path) -> RegionRecord:
        arrays = unpack_npz(path, skip_objects=True)
        features, boxes, height, width = _required(arrays, "x", "bbox", "image_h", "image_w")
        if features.ndim == 2 and len(features) != len(boxes) and features.shape[1] == len(boxes):
            features = features.T
        count = int(arrays["num_bbox"]) if "num_bbox" in arrays else len(boxes)
        conf = _pickled_info(path).get("objects_conf")
        return RegionRecord(
            features=features[:count],
            boxes=boxes[:count],
            size=(float(width), float(height)),
            conf=None if conf is None else np.asarray(conf, dtype=np.float64).reshape(-1)[:count],
        )
