"""Records made by hand exactly as the published programs write them, for tests."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import numpy as np

SPECIAL_IDS = {"UNK": 100, "CLS": 101, "SEP": 102, "MASK": 103}
RULE_FOLDER = "feat_th0.2_max100_min10"


class Payload:
    """Runs code when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.target,)


def published_array(array: np.ndarray) -> dict[bytes, Any]:
    """An array as the published writer stores it inside msgpack."""
    return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}


def random_image(seed: int, size: int = 12, dim: int = 8) -> dict[str, np.ndarray]:
    """Arrays of one image, most confident regions first."""
    generator = np.random.default_rng(seed)
    low, high = generator.random((size, 2)) / 2, 0.5 + generator.random((size, 2)) / 2
    boxes = np.concatenate([low, high, high - low], axis=1).astype(np.float16)
    conf = np.sort(generator.random((size, 1)), axis=0)[::-1].astype(np.float16)
    return {"norm_bb": boxes, "features": generator.normal(size=(size, dim)).astype(np.float16), "conf": conf}


def published_folder(folder: Path, records: dict[str, bytes]) -> Path:
    """An LMDB of these records."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key.encode(), value)
    return folder


def packed(record: dict[str, np.ndarray]) -> bytes:
    """A record of a plain image database."""
    data = msgpack.packb({key: published_array(value) for key, value in record.items()}, use_bin_type=True)
    assert isinstance(data, bytes)
    return data


def compressed(record: dict[str, np.ndarray]) -> bytes:
    """A record of a compressed image database."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **record)  # type: ignore[arg-type]
    return buffer.getvalue()


def published_texts(folder: Path) -> Path:
    """A text database of three captions, written field by field in the published layout."""
    records, lengths, txt2img, img2txts = {}, {}, {}, dict[str, list[str]]()
    for index, ids in enumerate(([1138, 4842], [1130, 1103, 1299], [])):
        key, name = str(40 + index), f"flickr30k_{index // 2:012d}.npz"
        record = {"tokens": ["a"], "raw": "A.", "imgid": 1, "sentid": 40 + index, "image_id": 7, "input_ids": ids}
        record |= {"toked_caption": ["A"], "img_fname": name}
        records[key] = lz4.frame.compress(msgpack.dumps(record, use_bin_type=True))
        lengths[key], txt2img[key] = len(ids), name
        img2txts.setdefault(name, []).append(key)
    published_folder(folder, records)
    meta = {**SPECIAL_IDS, "v_range": [106, 28996], "bert": "bert-base-cased"}
    for name, value in (("meta", meta), ("id2len", lengths), ("txt2img", txt2img), ("img2txts", img2txts)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
