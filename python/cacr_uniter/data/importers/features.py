"""`import_features`: any known region-feature format into the image database, as a stream that can be interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.image_writer import ImageDBWriter
from cacr_uniter.data.importers.hdf5 import AdaptiveHdf5, FixedHdf5
from cacr_uniter.data.importers.npz import MilvlgNpz, UniterNpz
from cacr_uniter.data.importers.records import (
    Findings,
    Item,
    Prepared,
    RegionRecord,
    Source,
    prepare,
    sizes_are_swapped,
)
from cacr_uniter.data.importers.tsv import ButdTsv, LxmertTsv, VinvlTsv
from cacr_uniter.data.lmdb_store import read_json
from cacr_uniter.data.names import image_namer
from cacr_uniter.errors import UserError
from cacr_uniter.files import write_json

FORMATS = ("butd-tsv", "lxmert-tsv", "vinvl-tsv", "milvlg-npz", "uniter-npz", "hdf5-fixed", "hdf5-adaptive")
PROBE = 64
FINGERPRINT_BYTES = 1 << 20
SOURCE_NOTE = "source.json"
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        folder: the database folder.
        images: images in the database.
        resumed: images that an interrupted run had written before.
        skipped: places and reasons of rows left out.
        boxes: smallest, mean and largest number of regions kept of an image.
        swapped_size: width and height of the images were exchanged.
        findings: remarks with the number of images of this run, feature widths.
        source: format, path, size and fingerprint of the source.
    """

    folder: str
    images: int
    resumed: int
    skipped: tuple[str, ...]
    boxes: tuple[int, float, int]
    swapped_size: bool
    findings: dict[str, Any]
    source: dict[str, Any]

    def __str__(self) -> str:
        low, mean, high = self.boxes
        lines = [f"{self.folder}: {self.images} images, {low} to {high} regions (mean {mean:.1f})"]
        if self.resumed:
            lines.append(f"{self.resumed} images were there from an interrupted run")
        if self.swapped_size:
            lines.append("width and height of the images were exchanged in the source; put right")
        lines += [f"{count} images: {remark}" for remark, count in self.findings["remarks"].items()]
        lines += [f"left out: {reason}" for reason in self.skipped]
        if self.skipped:
            lines.append("cacr train refuses captions whose image was left out; data.missing skip leaves them out too")
        return "\n".join(lines)


def open_source(kind: str, path: Path, labels: Path | None = None, ids: Path | None = None) -> Source:
    """The reader of one format.

    Raises:
        UserError: an unknown format, or a source that cannot be opened.
    """
    if kind == "vinvl-tsv":
        return VinvlTsv(path, labels)
    if kind in ("hdf5-fixed", "hdf5-adaptive"):
        return FixedHdf5(path, ids) if kind == "hdf5-fixed" else AdaptiveHdf5(path, ids)
    simple: dict[str, Callable[[Path], Source]] = {
        "butd-tsv": ButdTsv,
        "lxmert-tsv": LxmertTsv,
        "milvlg-npz": MilvlgNpz,
        "uniter-npz": UniterNpz,
    }
    if kind not in simple:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {kind!r}")
    return simple[kind](path)


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size, and sha256 of the first and last MiB; of a folder the names and sizes of its files."""
    digest = hashlib.sha256()
    if path.is_dir():
        files = sorted(entry for entry in path.rglob("*.npz"))
        for entry in files:
            digest.update(f"{entry.relative_to(path)} {entry.stat().st_size}\n".encode())
        return {"files": len(files), "sha256_of_listing": digest.hexdigest()}
    size = path.stat().st_size
    with path.open("rb") as stream:
        digest.update(stream.read(FINGERPRINT_BYTES))
        stream.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(stream.read())
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()}


def _probe(source: Source) -> bool:
    """Whether the source exchanges width and height, judged by its first readable images."""
    records: list[RegionRecord] = []
    for item in itertools.islice(source, PROBE):
        try:
            records.append(item.load())
        except (ValueError, KeyError, TypeError):  # the import itself reports it
            continue
    return sizes_are_swapped(records)


def _open_writer(
    out: Path, rule: BoxRule, compressed: bool, dtype: str, source: dict[str, Any]
) -> tuple[ImageDBWriter, int]:
    """A writer that goes on where an interrupted import of the same source stopped."""
    folder = out / (rule.folder + ("_compressed" if compressed else ""))
    note = folder.with_name(folder.name + ".partial") / SOURCE_NOTE
    if note.parent.exists():
        if not note.is_file() or read_json(note, "interrupted import") != source:
            raise UserError(f"{note.parent} is left from an interrupted import of another source; remove it first")
        writer = ImageDBWriter(out, rule, compressed, dtype, resume=True)
    else:
        writer = ImageDBWriter(out, rule, compressed, dtype)
        write_json(note, source)
    return writer, len(writer.counts)


def _printable(name: str) -> str:
    """A name for a message; what is no text is escaped."""
    return name if name.isprintable() and "\ufffd" not in name else ascii(name)


class _Run:
    """One import while it runs: names, checks, rows left out."""

    def __init__(self, writer: ImageDBWriter, names: Callable[[str], str], swap: bool, skip_bad: bool) -> None:
        self.writer, self.names, self.swap, self.skip_bad = writer, names, swap, skip_bad
        self.findings = Findings()
        self.skipped: list[str] = []
        self._seen: set[str] = set()

    def take(self, item: Item) -> None:
        """Writes one row, unless it is there already.

        Raises:
            UserError: the row is damaged and rows may not be left out.
        """
        try:
            name = self.names(item.image)
            if name in self._seen:
                self.findings.counts["images that occur again, first kept"] += 1
                return
            self._seen.add(name)
            if name not in self.writer.counts:
                self._write(name, prepare(item.load(), self.swap, self.findings))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{item.where} ({_printable(item.image[:60])}): {error}"
            if not self.skip_bad:
                raise UserError(f"{reason}; mend the source, or leave such images out (--skip-bad)") from error
            self.skipped.append(reason)

    def _write(self, name: str, ready: Prepared) -> None:
        self.writer.write(name, ready.features, ready.norm_bb, ready.conf, ready.soft_labels)


def import_features(
    kind: str,
    source: str | Path,
    out: str | Path,
    *,
    names: str = "keep",
    threshold: float = 0.2,
    max_boxes: int = 100,
    min_boxes: int = 10,
    fixed: int | None = None,
    compressed: bool = False,
    dtype: str = "float16",
    labels: str | Path | None = None,
    ids: str | Path | None = None,
    soft_labels: bool = False,
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Imports region features into an image database.

    The source is read as a stream. Every image is checked (columns, exchanged width and height, numbers), its regions
    are sorted by falling confidence and cut by the box rule. The database appears under its name only when it is whole;
    an interrupted import of the same source goes on where it stopped when called again. A report lies beside the
    database as `<folder>_import.json`.

    Args:
        kind: one of `FORMATS`.
        source: the file, or the folder of npz files.
        out: folder that will hold the database folder and its counts file.
        names: how npz names are made of the source's image names; see `image_namer`.
        threshold, max_boxes, min_boxes, fixed: the box rule; see `BoxRule`.
        compressed: store npz archives.
        dtype: "float16" or "float32".
        labels: VinVL's predictions file, which holds the confidences.
        ids: table of image ids and rows of an HDF5 source, if not beside it.
        soft_labels: keep class probabilities, which only pre-training reads.
        skip_bad: leave damaged images out and report them, instead of stopping.
        limit: import only the first so many rows.
        progress: called with (unit, done, total) after every row; the unit is "bytes" or "images".

    Returns:
        The report.

    Raises:
        UserError: a wrong option, an unreadable source, a damaged image (unless `skip_bad`), or a full disk.
    """
    path, target = Path(source), Path(out)
    if not path.exists():
        raise UserError(f"features {path}: no such file or folder")
    reader = open_source(kind, path, None if labels is None else Path(labels), None if ids is None else Path(ids))
    namer = image_namer(names)
    rule = BoxRule(threshold, max_boxes, min_boxes, fixed)
    facts = {"format": kind, "path": str(path), "names": names, "dtype": dtype, "soft_labels": soft_labels}
    facts |= {"limit": limit, **_fingerprint(path)}
    writer, resumed = _open_writer(target, rule, compressed, dtype, facts)
    run = _Run(writer, namer, _probe(reader), skip_bad)
    with writer:
        for item in itertools.islice(reader, limit):
            run.take(item if soft_labels else _without_labels(item))
            if progress is not None:
                progress(reader.unit, item.done, reader.total)
        if not writer.counts:
            raise UserError(
                f"features {path}: no image could be imported; {'; '.join(run.skipped[:1]) or 'it is empty'}"
            )
        counts = np.array(list(writer.counts.values()))
        report = ImportReport(
            folder=str(writer.folder),
            images=len(counts),
            resumed=resumed,
            skipped=tuple(run.skipped),
            boxes=(int(counts.min()), float(counts.mean()), int(counts.max())),
            swapped_size=run.swap,
            findings=run.findings.to_dict(),
            source=facts,
        )
        write_json(target / f"{writer.folder.name}_import.json", dataclasses.asdict(report))
    (writer.folder / SOURCE_NOTE).unlink()  # until now an import that goes on needs it
    return report


def _without_labels(item: Item) -> Item:
    def load() -> RegionRecord:
        return dataclasses.replace(item.load(), soft_labels=None)

    return item._replace(load=load)
