"""From a scene to its picture, and from the pixels of each region to the numbers that UNITER reads."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from cacr_uniter.data.scenes.catalogue import Catalogue
from cacr_uniter.data.scenes.relations import Box
from cacr_uniter.data.scenes.statements import Scene

CROP = 24
EDGES = 16
COLOUR_BINS = 4
FEATURES = CROP * CROP * 3 + EDGES * EDGES + COLOUR_BINS**3
"""2048: a resampled crop, an edge map and a colour histogram."""


CHANGED = 4
"""Grey levels by which a pixel must differ from the empty background to count as part of a thing."""


@dataclass(frozen=True)
class Rendered:
    """A picture as PNG bytes, and its regions by descending confidence.

    norm_bb [n, 6] float16: x1/W, y1/H, x2/W, y2/H, w/W, h/H. features [n, 2048] float16. conf [n, 1] float16.
    """

    png: bytes
    norm_bb: NDArray[np.float16]
    features: NDArray[np.float16]
    conf: NDArray[np.float16]


def render(scene: Scene, catalogue: Catalogue, rng: np.random.Generator) -> Rendered:
    """Paints the scene and measures every item's region from the finished picture."""
    picture = _background(scene.size, rng)
    empty = picture.copy()
    for item in scene.items:
        cut_out = catalogue.draw(item, rng)
        picture.paste(cut_out, (item.box.x1, item.box.y1), cut_out)
    boxes = [item.box for item in scene.items]
    changed = np.asarray(ImageChops.difference(picture, empty).convert("L")) > CHANGED
    conf = np.array([changed[b.y1 : b.y2, b.x1 : b.x2].mean() for b in boxes], dtype=np.float16)
    order = np.argsort(-conf, kind="stable")
    features = np.stack([region_features(picture, boxes[i]) for i in order])
    norm_bb = np.array([_normalised(boxes[i], scene.size) for i in order], dtype=np.float16)
    return Rendered(_png(picture), norm_bb, features, conf[order, None])


def region_features(picture: Image.Image, box: Box) -> NDArray[np.float16]:
    """2048 numbers of a region's pixels, each about in [-1, 1].

    1728: the crop resampled to 24 x 24, RGB, 0..255 mapped to -1..1. 256: the gradient's magnitude on a 16 x 16 grid,
    which shows the outline whatever the colour. 64: square roots of the shares of 4 x 4 x 4 colour cells.
    """
    crop = picture.crop((box.x1, box.y1, box.x2, box.y2))
    pixels = np.asarray(crop.resize((CROP, CROP), Image.Resampling.BOX), dtype=np.float32) / 127.5 - 1
    grey = np.asarray(crop.convert("L").resize((EDGES + 1, EDGES + 1), Image.Resampling.BOX), dtype=np.float32) / 255
    across, down = np.diff(grey, axis=1)[:EDGES], np.diff(grey, axis=0)[:, :EDGES]
    edges = np.minimum(2 * np.hypot(across, down), 1)
    cells = np.asarray(crop, dtype=np.int64) * COLOUR_BINS // 256
    index = (cells[..., 0] * COLOUR_BINS + cells[..., 1]) * COLOUR_BINS + cells[..., 2]
    histogram = np.sqrt(np.bincount(index.ravel(), minlength=COLOUR_BINS**3) / index.size)
    return np.concatenate([pixels.ravel(), edges.ravel(), histogram]).astype(np.float16)


def _background(size: int, rng: np.random.Generator) -> Image.Image:
    """A pale vertical gradient."""
    top, bottom = rng.integers(190, 236, 3), rng.integers(190, 236, 3)
    t = np.linspace(0, 1, size)[:, None, None]
    column = (top * (1 - t) + bottom * t).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(column, (size, size, 3))))


def _normalised(box: Box, size: int) -> list[float]:
    return [v / size for v in (box.x1, box.y1, box.x2, box.y2, box.x2 - box.x1, box.y2 - box.y1)]


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
