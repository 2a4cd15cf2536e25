"""Region features of three images in every known format, written exactly as its makers write it, for tests."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

DIM = 8
NAMES = ("1000092795", "36979", "65567")


class Image:
    """Twelve regions of a 640 x 480 picture."""

    def __init__(self, seed: int, size: int = 12) -> None:
        generator = np.random.default_rng(seed)
        self.width, self.height, self.size = 640, 480, size
        low = generator.random((size, 2)) * 0.5
        high = low + 0.1 + generator.random((size, 2)) * 0.4
        high[0] = 1.0
        self.boxes = (np.concatenate([low, high], axis=1) * [640, 480, 640, 480]).astype(np.float32)
        self.features = generator.normal(size=(size, DIM)).astype(np.float32)
        self.conf = generator.permutation(np.linspace(0.1, 0.95, size)).astype(np.float32)

    @property
    def norm_bb(self) -> np.ndarray:
        corners = self.boxes / np.array([640, 480, 640, 480], dtype=np.float32)
        return np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)


def images() -> dict[str, Image]:
    return {name: Image(index) for index, name in enumerate(NAMES)}


def b64(array: np.ndarray, compress: bool = False) -> str:
    data = np.ascontiguousarray(array).tobytes()
    return base64.b64encode(zlib.compress(data) if compress else data).decode()


def butd_tsv(folder: Path, compress: bool = False) -> Path:
    lines = []
    for name, image in images().items():
        fields = [
            name,
            image.width,
            image.height,
            image.size,
            b64(image.boxes, compress),
            b64(image.features, compress),
        ]
        lines.append("\t".join(map(str, fields)))
    path = folder / "butd.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def lxmert_tsv(folder: Path, volta: bool = False, exchanged: bool = False) -> Path:
    lines = []
    for name, image in images().items():
        sides = (image.width, image.height) if exchanged else (image.height, image.width)
        classes, attributes = np.zeros(image.size, np.int64), np.zeros(image.size, np.float32)
        fields = [name, *sides, b64(classes), b64(image.conf), b64(classes), b64(attributes), image.size]
        fields += [b64(image.boxes), b64(image.features)]
        if volta:
            fields.append(b64(np.repeat(image.conf[:, None], 5, axis=1)))
        lines.append("\t".join(map(str, fields)))
    path = folder / "lxmert.tsv"
    path.write_text("\n".join(lines))
    return path


def vinvl_tsv(folder: Path, as_json: bool = False) -> Path:
    lines, labels = [], []
    for name, image in images().items():
        rows = b64(np.concatenate([image.features, image.norm_bb], axis=1).astype(np.float32))
        if as_json:
            lines.append(f"{name}\t" + json.dumps({"num_boxes": image.size, "features": rows}))
        else:
            lines.append(f"{name}\t{image.size}\t{rows}")
        objects = [
            {"class": "dog", "rect": box.tolist(), "conf": float(conf)}
            for box, conf in zip(image.boxes, image.conf, strict=True)
        ]
        labels.append(f"{name}\t" + json.dumps({"objects": objects} if as_json else objects))
    path = folder / "feature.tsv"
    path.write_text("\n".join(lines) + "\n")
    (folder / "predictions.tsv").write_text("\n".join(reversed(labels)) + "\n")
    return path


def milvlg_npz(folder: Path, transposed: bool = False) -> Path:
    target = folder / "milvlg"
    target.mkdir()
    for name, image in images().items():
        info = {
            "image_id": name,
            "image_h": np.int64(image.height),
            "image_w": image.width,
            "num_boxes": image.size,
            "objects_id": np.arange(image.size),
            "objects_conf": image.conf,
        }
        np.savez_compressed(
            target / f"{name}.jpg.npz",
            x=image.features.T if transposed else image.features,
            bbox=image.boxes,
            num_bbox=image.size,
            image_h=image.height,
            image_w=image.width,
            info=info,  # type: ignore[arg-type]
        )
    return target


def uniter_npz(folder: Path, exchanged: bool = False) -> Path:
    target = folder / "uniter"
    target.mkdir()
    for name, image in images().items():
        order = np.argsort(-image.conf)
        boxes = image.norm_bb[order][:, [0, 1, 2, 3, 5, 4] if exchanged else slice(None)]
        np.savez_compressed(
            target / f"flickr30k_{int(name):012d}.npz",
            norm_bb=boxes.astype(np.float16),
            features=image.features[order].astype(np.float16),
            conf=image.conf[order].astype(np.float16),
            soft_labels=np.ones((image.size, 3), np.float16),
        )
    return target


def hdf5(folder: Path, adaptive: bool, protocol: int = 2) -> Path:
    import pytest

    h5py = pytest.importorskip("h5py", reason="HDF5 features need h5py")
    path = folder / "train36.hdf5"
    table = {int(name): row for row, name in enumerate(NAMES)}
    (folder / "train36_imgid2idx.pkl").write_bytes(pickle.dumps(table, protocol))
    every = list(images().values())
    join: Callable[[list[np.ndarray]], np.ndarray] = np.concatenate if adaptive else np.stack
    with h5py.File(path, "w") as stream:
        stream["image_features"] = join([image.features for image in every])
        stream["image_bb"] = join([image.boxes for image in every])
        stream["spatial_features"] = join([image.norm_bb for image in every])
        if adaptive:
            ends = np.cumsum([image.size for image in every])
            stream["pos_boxes"] = np.stack([ends - [image.size for image in every], ends], axis=1)
    return path
