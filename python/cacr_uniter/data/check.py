"""`check_database`: reads every record of a text or image database and reports what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.image_db import ImageDB
from cacr_uniter.data.text_db import TextDB
from cacr_uniter.errors import UserError

Progress = Callable[[str, int, int], None]
SHOWN = 10
PUBLISHED_POSITIONS = 512
"""Position embeddings of base and large, [CLS] and [SEP] included."""

BOX_TOLERANCE = 4e-3


@dataclasses.dataclass
class CheckReport:
    """What a check found.

    Attributes:
        folder: the database.
        kind: "text" or "image".
        records: records read.
        facts: sizes and ranges.
        problems: one sentence each; none if the database is sound.
    """

    folder: str
    kind: str
    records: int = 0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        lines = [f"{self.folder}: {self.kind} database, {self.records} records; {facts}"]
        lines += [f"problem: {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"and {len(self.problems) - SHOWN} more problems")
        return "\n".join([*lines, "sound" if self.ok else f"{len(self.problems)} problems"])


def _box_problems(name: str, arrays: dict[str, np.ndarray]) -> list[str]:
    boxes = arrays["norm_bb"].astype(np.float64)
    problems = [
        f"{name}: {key} holds numbers that are not finite"
        for key, value in arrays.items()
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all()
    ]
    if not len(boxes):
        return [*problems, f"{name}: has no region"]
    extent = boxes[:, 2:4] - boxes[:, :2]
    if np.abs(extent - boxes[:, 4:]).max() > BOX_TOLERANCE:
        swapped = np.abs(extent[:, ::-1] - boxes[:, 4:]).max() <= BOX_TOLERANCE
        columns = "height and width, in the wrong order" if swapped else "not the boxes' width and height"
        problems.append(f"{name}: columns 4 and 5 are {columns}")
    if boxes[:, :4].min() < -BOX_TOLERANCE or boxes[:, :4].max() > 1 + BOX_TOLERANCE:
        problems.append(f"{name}: boxes reach {boxes[:, :4].max():.3g}, they should be fractions of the image")
    if "conf" in arrays and (np.diff(arrays["conf"].astype(np.float64).reshape(-1)) > 0).any():
        problems.append(f"{name}: regions are not sorted by falling confidence")
    return problems


def _check_images(folder: Path, rule: BoxRule | None, progress: Progress | None) -> CheckReport:
    database = ImageDB(folder, rule)
    report = CheckReport(str(database.folder), "image")
    names, counts, widths = database.names(), list[int](), set[int]()
    for done, name in enumerate(names, 1):
        try:
            arrays = database.record(name)
            counts.append(database.count(name))
            widths.add(int(arrays["features"].shape[1]))
            report.problems += _box_problems(name, arrays)
            size = len(arrays["norm_bb"])
            if counts[-1] > size or (database.is_cut and database.has_counts and counts[-1] != size):
                report.problems.append(f"{name}: {size} regions, the counts file says {counts[-1]}")
        except UserError as error:
            report.problems.append(str(error))
        if progress is not None:
            progress("images", done, len(names))
    if len(widths) > 1:
        report.problems.append(f"features of different widths: {sorted(widths)}")
    if not names:
        report.problems.append("holds no image")
    report.records = len(names)
    if counts:
        report.facts = {"regions": f"{min(counts)} to {max(counts)}", "feature width": max(widths, default=0)}
    if not database.has_counts and "feat_th" in database.folder.name:
        report.facts["box counts"] = "no file beside the folder, counted by confidence"
    return report


def _check_texts(folder: Path, images: ImageDB | None, progress: Progress | None) -> CheckReport:
    database, report = TextDB(folder), CheckReport(str(folder), "text")
    highest = 0
    for done, (caption_id, length) in enumerate(database.lengths.items(), 1):
        try:
            caption = database.caption(caption_id)
            highest = max([highest, *caption.input_ids])
            if len(caption.input_ids) != length:
                report.problems.append(f"{caption_id}: {len(caption.input_ids)} pieces, id2len.json says {length}")
            if database.txt2img.get(caption_id) != caption.image:
                report.problems.append(f"{caption_id}: image {caption.image}, txt2img.json says otherwise")
            if caption_id not in database.img2txts.get(caption.image, []):
                report.problems.append(f"{caption_id}: not in img2txts.json under {caption.image}")
            if len(caption.input_ids) + 2 > PUBLISHED_POSITIONS:
                report.problems.append(
                    f"{caption_id}: {len(caption.input_ids)} pieces, UNITER takes {PUBLISHED_POSITIONS - 2}; shorten "
                    "or remove it (training leaves it out by data.max_text, validation and evaluation refuse it)"
                )
        except UserError as error:
            report.problems.append(str(error))
        if progress is not None:
            progress("captions", done, len(database))
    absent = [name for name in database.img2txts if images is not None and name not in images]
    if absent:
        report.problems.append(
            f"{len(absent)} images are not in the image database, first {absent[0]!r} (cacr train: data.missing skip "
            "leaves their captions out)"
        )
    if not len(database):
        report.problems.append("holds no caption")
    report.records = len(database)
    longest = max(database.lengths.values(), default=0)
    report.facts = {"images": len(database.img2txts), "longest caption": longest, "largest piece": highest}
    return report


def is_scene_set(folder: Path) -> bool:
    """Whether a folder is laid out as `cacr data scenes` writes it: text databases in `txt`, the image database in
    `img`."""
    return (folder / "txt").is_dir() and (folder / "img").is_dir()


def check_scene_set(
    folder: Path, *, rule: BoxRule | None = None, progress: Progress | None = None
) -> list[CheckReport]:
    """`check_database` of the image database of a scene set and of each of its text databases, with the images."""
    images = folder / "img"
    texts = sorted((folder / "txt").glob("*.db"))
    return [
        check_database(images, rule=rule, progress=progress),
        *(check_database(text, images=images, rule=rule, progress=progress) for text in texts),
    ]


def check_database(
    folder: str | Path,
    *,
    images: str | Path | None = None,
    rule: BoxRule | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Reads every record of a database and checks it against its JSON files and against sense.

    Args:
        folder: a text database (it has meta.json), or an image database or the folder that holds it.
        images: for a text database: the image database that should hold its images.
        rule: the box rule of the image database; None: what its folder's name says.
        progress: called with (what, done, total) after every record.

    Returns:
        The report; `report.ok` says whether the database is sound.

    Raises:
        UserError: no database there, or its files cannot be read at all.
    """
    path = Path(folder)
    inside = sorted(path.glob("*.db")) if not (path / "meta.json").is_file() else []
    if inside:
        raise UserError(f"{path} holds text databases: check one of {', '.join(map(str, inside))}")
    if (path / "meta.json").is_file() or path.suffix == ".db":
        if rule is not None and images is None:
            raise UserError(
                f"a box rule belongs to an image database, {path} is a text database; give its --images too"
            )
        return _check_texts(path, None if images is None else ImageDB(images, rule), progress)
    if images is not None:
        raise UserError(f"--images belongs to a text database, {path} is an image database; check it alone")
    return _check_images(path, rule, progress)
