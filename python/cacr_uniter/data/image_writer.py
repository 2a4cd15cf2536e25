"""Writer of the published image database, whose format `image_db` describes."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

import numpy as np

from cacr_uniter.data import codec
from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.image_db import KEYS_RECORD
from cacr_uniter.data.lmdb_store import Writer
from cacr_uniter.files import parse_json, write_json

COUNTS_LOG = "counts.jsonl"


class ImageDBWriter:
    """Writes an image database; use it as a context manager.

    The folder appears only when the block ends without error. After an error, or a kill, the committed records stay in
    `<folder>.partial`, and a writer with `resume=True` goes on from them.

    Args:
        root: folder that will hold the database folder and the counts file.
        rule: how many regions are kept; it also names the folder.
        compressed: store npz archives instead of plain msgpack.
        dtype: "float16" (published) or "float32".
        resume: keep what an interrupted writer left.
    """

    def __init__(
        self,
        root: str | Path,
        rule: BoxRule | None = None,
        compressed: bool = False,
        dtype: str = "float16",
        resume: bool = False,
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise ValueError(f'dtype: expected "float16" or "float32", got {dtype!r}')
        self.rule = rule or BoxRule()
        self.root = Path(root)
        self.folder = self.root / (self.rule.folder + ("_compressed" if compressed else ""))
        self._pack = codec.pack_npz if compressed else codec.pack_arrays
        self._dtype = np.dtype(dtype)
        self._writer = Writer(self.folder, resume)
        self._log_path = self.partial / COUNTS_LOG
        self.counts = self._read_log()
        self._log = self._log_path.open("w", encoding="utf-8")
        for name, count in self.counts.items():
            self._note(name, count)

    @property
    def partial(self) -> Path:
        """Folder of the unfinished database."""
        return self._writer.partial

    def _read_log(self) -> dict[str, int]:
        """Counts of the committed records; lines of records that were lost in a kill are dropped."""
        counts: dict[str, int] = {}
        if not self._log_path.exists():
            return counts
        for line in self._log_path.read_text(encoding="utf-8").splitlines():
            try:
                name, count = parse_json(line)
            except ValueError:
                break
            if self._writer.get(name) is not None:
                counts[name] = count
        return counts

    def _note(self, name: str, count: int) -> None:
        self._log.write(json.dumps([name, count]) + "\n")
        self._log.flush()

    def write(
        self,
        name: str,
        features: np.ndarray,
        norm_bb: np.ndarray,
        conf: np.ndarray | None = None,
        soft_labels: np.ndarray | None = None,
    ) -> int:
        """Adds one image and returns the number of regions kept.

        Args:
            name: npz name, the key.
            features: [n, img_dim].
            norm_bb: [n, 6] x1, y1, x2, y2, w, h as fractions of the image.
            conf: [n] or [n, 1] confidences, falling; all 1 if absent.
            soft_labels: [n, classes], optional.

        Raises:
            ValueError: shapes that do not fit, rising confidences, a repeated name, or numbers that are not finite in
                the stored type.
        """
        if name in self.counts or name == KEYS_RECORD:
            raise ValueError(f"name: expected a new image name, got {name!r}")
        size = len(features)
        confidence = np.ones(size) if conf is None else np.asarray(conf, dtype=np.float64).reshape(-1)
        if np.shape(norm_bb) != (size, 6) or np.ndim(features) != 2 or len(confidence) != size:
            raise ValueError(
                f"{name}: expected features [n, d], norm_bb [n, 6] and conf [n], got {np.shape(features)}, "
                f"{np.shape(norm_bb)} and {confidence.shape}"
            )
        if (np.diff(confidence) > 0).any():
            raise ValueError(f"{name}: expected regions sorted by falling confidence; sort them first")
        kept = self.rule.count(None if conf is None else confidence, size)
        arrays = {"norm_bb": norm_bb, "features": features, "conf": confidence[:, None]}
        if soft_labels is not None:
            arrays["soft_labels"] = soft_labels
        with np.errstate(over="ignore"):
            record = {key: np.asarray(value)[:kept].astype(self._dtype) for key, value in arrays.items()}
        for key, value in record.items():
            if not np.isfinite(value).all():
                raise ValueError(f"{name}: {key} has numbers that are not finite in {self._dtype}")
        self._note(name, kept)
        self._writer.put(name, self._pack(record))
        self.counts[name] = kept
        return kept

    def close(self) -> None:
        """Writes the names and the counts, and gives the folder its name."""
        self._log.close()
        self._writer.put(KEYS_RECORD, json.dumps(list(self.counts)).encode("utf-8"))
        if self.rule.counts_file is not None:
            write_json(self.root / self.rule.counts_file, self.counts)
        self._writer.finish()
        (self.folder / COUNTS_LOG).unlink()  # until now a resumed writer needs it

    def __enter__(self) -> ImageDBWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._log.close()
            self._writer.abandon()
