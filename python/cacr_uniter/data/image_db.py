"""The published image database: its reader (`image_writer` writes). Knows the format, not where features come from.

A folder `feat_th0.2_max100_min10` (or `feat_numbb36`, or `all`, each also with the suffix `_compressed`) with data.mdb:
npz name -> msgpack map (compressed: npz archive) of norm_bb [n, 6], features [n, img_dim], conf [n, 1], soft_labels;
the record `__keys__` is the JSON list of names. The box counts lie beside the folder in `nbb_th0.2_max100_min10.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cacr_uniter.data import codec
from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.lmdb_store import Reader, read_json
from cacr_uniter.errors import UserError
from cacr_uniter.files import parse_json

KEYS_RECORD = "__keys__"


class Regions(NamedTuple):
    """The regions of one image.

    Attributes:
        features: [n, img_dim] float16 where it is stored so, else float32.
        boxes: [n, 7] float32: x1, y1, x2, y2, w, h as fractions of the image, and the area w h.
    """

    features: Tensor
    boxes: Tensor


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own, float16 where the array is, else float32."""
    return torch.from_numpy(array.astype(np.float16 if array.dtype == np.float16 else np.float32))


class ImageDB:
    """Reader of an image database.

    Args:
        folder: the database folder itself, or the folder that holds `feat_...` or `all`; then `rule` chooses, first the
            plain folder, then the compressed one, then `all`, whose records hold every region and are cut on reading.
        rule: how many regions are used; it must be the one of the folder's name. None: what the name says; where a
            folder holds databases, the published rule, or else the only one there is.
        cache_bytes: decoded regions are kept in memory, first come, until they fill this many bytes; not pickled.

    Raises:
        UserError: no such database, one made by another rule, its files are damaged, or a box count is negative.
    """

    def __init__(self, folder: str | Path, rule: BoxRule | None = None, cache_bytes: int = 1 << 28) -> None:
        self.folder = self._find(Path(folder), rule)
        own = BoxRule.of_folder(self.folder.name)
        if rule is not None and own is not None and own.folder != rule.folder:
            raise UserError(
                f"image database {self.folder}: made by another box rule ({own}) than the one wanted by the options or "
                f"by the run ({rule}); ask for the rule it was made by, or give a database made by the other"
            )
        self.rule = rule or own or BoxRule()
        self._reader = Reader(self.folder)
        self._counts = self._read_counts()
        self._feature_dim: int | None = None
        self._cache: dict[str, Regions] = {}
        self._cache_bytes = self._cache_free = cache_bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_cache_free": self._cache_bytes}

    @staticmethod
    def _find(root: Path, rule: BoxRule | None) -> Path:
        if (root / "data.mdb").is_file():
            return root
        there = sorted(path.parent.name for path in root.glob("*/data.mdb"))
        names = [(rule or BoxRule()).folder, "all"]
        others = {own.folder for name in there if (own := BoxRule.of_folder(name)) is not None}
        if rule is None and len(others) == 1:
            names += others
        wanted = [name + suffix for name in names for suffix in ("", "_compressed")]
        for name in wanted:
            if (root / name / "data.mdb").is_file():
                return root / name
        if not root.is_dir():
            raise UserError(f"image database {root}: no such folder")
        other = f"; there is {', '.join(there)}, made by another rule: ask for that one" if there else ""
        raise UserError(f"image database {root}: found none of {', '.join(wanted)} with a data.mdb{other}")

    @property
    def _holds_all(self) -> bool:
        return self.folder.name.removesuffix("_compressed") == "all"

    @property
    def is_cut(self) -> bool:
        """Whether the folder's name tells a box rule: then its records hold the regions that are used and no others."""
        return BoxRule.of_folder(self.folder.name) is not None

    def _read_counts(self) -> dict[str, int] | None:
        name = self.folder.name.removesuffix("_compressed")
        beside = self.folder.parent / f"{name.replace('feat_', 'nbb_', 1)}.json"
        path = self.folder / "nbb.json" if self._holds_all else beside
        if not path.is_file():
            return None
        counts = read_json(path, "image database")
        if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
            raise UserError(f"image database {self.folder}: {path} is not a map of names to box counts")
        negative = next((name for name, count in counts.items() if count < 0), None)
        if negative is not None:
            raise UserError(
                f"image database {self.folder}: {path} says {counts[negative]} regions for {negative!r}, expected 0 or "
                "more; copy or create it again"
            )
        return counts

    @property
    def has_counts(self) -> bool:
        """Whether the JSON file of box counts is there."""
        return self._counts is not None

    def names(self) -> list[str]:
        """Names of all images."""
        if KEYS_RECORD not in self._reader:
            return [key for key in self._reader.all_keys() if key != KEYS_RECORD]
        try:
            names = parse_json(self._reader.get(KEYS_RECORD))
        except ValueError as error:
            raise UserError(f"image database {self.folder}: record {KEYS_RECORD!r} is damaged ({error})") from error
        return [str(name) for name in names]

    def __contains__(self, name: str) -> bool:
        return name in self._reader

    def record(self, name: str) -> dict[str, np.ndarray]:
        """The stored arrays of one image, uncut, checked for shape.

        Raises:
            UserError: no such image, a damaged record, or arrays of the wrong shape or type.
        """
        data = self._reader.get(name)
        try:
            arrays: dict[str, Any] = codec.unpack_npz(data) if data[:2] == b"PK" else codec.unpack_arrays(data)
            self._check(arrays)
        except ValueError as error:
            raise UserError(
                f"image database {self.folder}: record {name!r} is damaged ({error}); copy or create it again"
            ) from error
        return arrays

    @staticmethod
    def _check(arrays: dict[str, Any]) -> None:
        for key in ("norm_bb", "features"):
            value = arrays.get(key)
            if not isinstance(value, np.ndarray) or value.ndim != 2:
                raise ValueError(f"{key} is missing or not a matrix")
        boxes, features = arrays["norm_bb"], arrays["features"]
        if boxes.shape[1] != 6 or len(boxes) != len(features):
            raise ValueError(f"norm_bb {list(boxes.shape)} does not fit features {list(features.shape)}")
        if "conf" in arrays and np.size(arrays["conf"]) != len(boxes):
            raise ValueError(f"conf has {np.size(arrays['conf'])} values for {len(boxes)} regions")

    def _used(self, name: str, arrays: dict[str, np.ndarray]) -> int:
        size, confidence = len(arrays["norm_bb"]), arrays.get("conf")
        if self._counts is None or (self._holds_all and (confidence is not None or self.rule.fixed is not None)):
            return self.rule.count(confidence, size)
        if name not in self._counts:
            raise UserError(f"image database {self.folder}: the box counts have no entry for {name!r}; create it again")
        return min(self._counts[name], self.rule.count(None, size) if self._holds_all else size)

    def count(self, name: str) -> int:
        """Number of regions that `read` returns; reads the record only where no count is stored."""
        if self._counts is not None and not self._holds_all and name in self._counts:
            return self._counts[name]
        return self._used(name, self.record(name))

    def read(self, name: str) -> Regions:
        """Features and 7-number boxes of one image, most confident regions first; not to be changed by the caller.

        Raises:
            UserError: no such image, or its record is damaged.
        """
        if name in self._cache:
            return self._cache[name]
        arrays = self.record(name)
        used = self._used(name, arrays)
        features = _tensor(arrays["features"][:used])
        if features.shape[1] != self.feature_dim:
            raise UserError(
                f"image database {self.folder}: features of {name!r} have {features.shape[1]} numbers, those of the "
                f"first image {self.feature_dim}; create it again"
            )
        if not torch.isfinite(features.sum(dtype=torch.float32)):
            raise UserError(
                f"image database {self.folder}: features of {name!r} are not finite numbers; copy or create it again"
            )
        box = _tensor(arrays["norm_bb"][:used]).float()
        if not torch.isfinite(box).all():
            raise UserError(
                f"image database {self.folder}: boxes of {name!r} are not finite numbers; copy or create it again"
            )
        regions = Regions(features, torch.cat([box, box[:, 4:5] * box[:, 5:6]], dim=1))
        size = sum(tensor.numel() * tensor.element_size() for tensor in regions)
        if size <= self._cache_free:
            self._cache_free -= size
            self._cache[name] = regions
        return regions

    @property
    def feature_dim(self) -> int:
        """Width of the features, of the first image.

        Raises:
            UserError: the database is empty.
        """
        if self._feature_dim is None:
            names = self.names()
            if not names:
                raise UserError(f"image database {self.folder}: holds no image")
            self._feature_dim = int(self.record(names[0])["features"].shape[1])
        return self._feature_dim

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        self._reader.close()
