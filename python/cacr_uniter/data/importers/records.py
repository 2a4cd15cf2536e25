"""One image's regions as a source gives them, the checks on them, and what an import found.

Box columns of the databases: x1/W, y1/H, x2/W, y2/H, w/W, h/H.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

PIXEL_TOLERANCE = 1.5
COLUMN_TOLERANCE = 4e-3
UNIT_TOLERANCE = 1e-3


@dataclasses.dataclass
class RegionRecord:
    """The regions of one image as the source has them: pixel boxes with the image size, or normalised boxes.

    Attributes:
        features: [n, d].
        boxes: [n, 4] x1, y1, x2, y2 in pixels, or None.
        size: (width, height) in pixels, or None.
        norm_bb: [n, 6] normalised boxes, or None.
        conf: [n] confidences, or None.
        soft_labels: [n, classes], or None.
    """

    features: np.ndarray
    boxes: np.ndarray | None = None
    size: tuple[float, float] | None = None
    norm_bb: np.ndarray | None = None
    conf: np.ndarray | None = None
    soft_labels: np.ndarray | None = None


class Item(NamedTuple):
    """One row of a source, not decoded yet.

    Attributes:
        image: the source's name of the image.
        where: place for messages, such as "line 7".
        done: how far in the source this row ends, in the unit of `Source.total`.
        load: decodes the row; raises ValueError if it is damaged.
    """

    image: str
    where: str
    done: int
    load: Callable[[], RegionRecord]


class Source(Protocol):
    """A file or folder of region features, read as a stream; `total` counts in `unit`, "bytes" or "images"."""

    unit: str
    total: int

    def __iter__(self) -> Iterator[Item]: ...


@dataclasses.dataclass
class Findings:
    """What the checks found.

    Attributes:
        counts: number of images for each remark.
        widths: feature widths seen.
    """

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    widths: Counter[int] = dataclasses.field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"remarks": dict(sorted(self.counts.items())), "feature_dims": sorted(self.widths)}


class Prepared(NamedTuple):
    """Arrays ready for `ImageDBWriter.write`."""

    features: np.ndarray
    norm_bb: np.ndarray
    conf: np.ndarray | None
    soft_labels: np.ndarray | None


def fits(boxes: np.ndarray, width: float, height: float) -> bool:
    """Whether all pixel boxes lie in an image of this size, to a pixel or so."""
    return bool(
        (boxes[:, 0::2].max() <= width + PIXEL_TOLERANCE) and (boxes[:, 1::2].max() <= height + PIXEL_TOLERANCE)
    )


def sizes_are_swapped(records: list[RegionRecord]) -> bool:
    """Whether more images fit only with width and height exchanged than fit only as given."""
    given = swapped = 0
    for record in records:
        if record.boxes is None or record.size is None or not len(record.boxes):
            continue
        width, height = record.size
        as_given, exchanged = fits(record.boxes, width, height), fits(record.boxes, height, width)
        given += as_given and not exchanged
        swapped += exchanged and not as_given
    return swapped > given


def _normalised_pixels(record: RegionRecord, swap: bool, findings: Findings) -> np.ndarray:
    assert record.boxes is not None
    boxes = np.asarray(record.boxes, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected [n, 4], got {list(boxes.shape)}")
    if record.size is None:
        raise ValueError("pixel boxes need the image's width and height")
    width, height = (float(side) for side in (reversed(record.size) if swap else record.size))
    if not (width > 0 and height > 0):
        raise ValueError(f"image size {width:g} x {height:g} is not positive")
    if not np.isfinite(boxes).all():
        raise ValueError("boxes hold numbers that are not finite")
    if (boxes[:, 2:] <= boxes[:, :2]).any(axis=1).mean() > 0.5:
        raise ValueError("most boxes end before they begin: the columns are not x1, y1, x2, y2 (x, y, width, height?)")
    if not fits(boxes, width, height):
        findings.counts["boxes outside the image, clipped"] += 1
    corners = boxes / np.array([width, height, width, height])
    return np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)


def _checked_columns(norm_bb: np.ndarray, findings: Findings) -> np.ndarray:
    norm_bb = np.asarray(norm_bb, dtype=np.float64)
    if norm_bb.ndim != 2 or norm_bb.shape[1] not in (6, 7):
        raise ValueError(f"normalised boxes: expected [n, 6], got {list(norm_bb.shape)}")
    norm_bb = norm_bb[:, :6]
    if not np.isfinite(norm_bb).all():
        raise ValueError("normalised boxes hold numbers that are not finite")
    if norm_bb.max() > 2:
        raise ValueError(f"normalised boxes reach {norm_bb.max():g}: these are pixels, not fractions of the image")
    extent = norm_bb[:, 2:4] - norm_bb[:, :2]
    if np.abs(extent - norm_bb[:, 4:]).max() <= COLUMN_TOLERANCE:
        return norm_bb
    if np.abs(extent[:, ::-1] - norm_bb[:, 4:]).max() <= COLUMN_TOLERANCE:
        findings.counts["columns width and height exchanged, put right"] += 1
        return norm_bb[:, [0, 1, 2, 3, 5, 4]]
    raise ValueError("columns 4 and 5 of the normalised boxes are not their width and height")


def prepare(record: RegionRecord, swap_size: bool, findings: Findings) -> Prepared:
    """Checks one record and brings it into the databases' form.

    Normalises and checks boxes, clips them to the image, sorts the regions by falling confidence (stable), counts
    remarks in `findings`.

    Args:
        record: regions as the source has them.
        swap_size: exchange width and height of the image.
        findings: takes the remarks.

    Raises:
        ValueError: shapes, columns or numbers that make no sense.
    """
    features = np.asarray(record.features)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features: expected [n, d] with n > 0, got {list(features.shape)}")
    if record.norm_bb is not None:
        norm_bb = _checked_columns(record.norm_bb, findings)
    elif record.boxes is not None and len(record.boxes):
        norm_bb = _normalised_pixels(record, swap_size, findings)
    else:
        raise ValueError("no boxes")
    if len(norm_bb) != len(features):
        raise ValueError(f"{len(features)} features for {len(norm_bb)} boxes")
    if not np.isfinite(features).all():
        raise ValueError("features hold numbers that are not finite")
    if norm_bb.min() < -UNIT_TOLERANCE or norm_bb[:, :4].max() > 1 + UNIT_TOLERANCE:
        findings.counts["normalised boxes beyond 0 to 1, clipped"] += 1
    corners = norm_bb[:, :4].clip(0, 1)
    norm_bb = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)
    if (norm_bb[:, 4:] <= 0).any():
        findings.counts["boxes without area"] += 1
    findings.widths[features.shape[1]] += 1
    if len(findings.widths) > 1:
        raise ValueError(f"features of width {features.shape[1]}, others before had {min(findings.widths)}")
    conf = None if record.conf is None else np.asarray(record.conf, dtype=np.float64).reshape(-1)
    if conf is None:
        findings.counts["no confidences, file order kept"] += 1
        return Prepared(features, norm_bb, None, record.soft_labels)
    if len(conf) != len(features) or not np.isfinite(conf).all():
        raise ValueError(f"confidences: expected {len(features)} finite numbers, got {len(conf)}")
    order = np.argsort(-conf, kind="stable")
    if (order[1:] < order[:-1]).any():
        findings.counts["regions sorted by confidence"] += 1
    labels = None if record.soft_labels is None else np.asarray(record.soft_labels)[order]
    return Prepared(features[order], norm_bb[order], conf[order], labels)
