"""The LMDB formats when files are damaged or hostile: one sentence, nothing run."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import numpy as np
import pytest

from cacr_uniter.data import codec
from cacr_uniter.data.lmdb import ImageDB, TextDB
from cacr_uniter.data.lmdb_store import Writer
from cacr_uniter.data.testing import (
    RULE_FOLDER,
    Payload,
    compressed,
    packed,
    published_array,
    published_folder,
    published_texts,
    random_image,
)
from cacr_uniter.errors import UserError


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    return published_texts(tmp_path / "itm_flickr30k_val.db")


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path / "db")
    writer.put("a", b"1")

    class Full:
        def begin(self, write: bool) -> None:
            raise lmdb.DiskError("No space left on device")

    monkeypatch.setattr(writer, "_environment", Full())
    with pytest.raises(UserError, match="is the disk full"):
        writer.commit()


def hostile_array(proof: Path, kind: bytes) -> dict[bytes, Any]:
    return {b"nd": True, b"type": "|O", b"kind": kind, b"shape": (1,), b"data": pickle.dumps([Payload(proof)])}


@pytest.mark.parametrize("kind", [b"O", b"", b"V"])
def test_object_arrays_in_msgpack_are_refused_and_not_run(kind: bytes, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    data = msgpack.packb({"features": hostile_array(proof, kind)}, use_bin_type=True)
    assert isinstance(data, bytes)
    published_folder(tmp_path / RULE_FOLDER, {"a.npz": data})
    with pytest.raises(UserError, match=r"record 'a.npz' is damaged \(array .* refused"):
        ImageDB(tmp_path).read("a.npz")
    with pytest.raises(ValueError, match="refused"):
        codec.unpack_text(lz4.frame.compress(data))
    assert not proof.exists()


def test_object_arrays_in_npz_are_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    good, hostile = random_image(0), np.array([Payload(proof)], dtype=object)
    data = compressed(good | {"info": hostile})
    published_folder(tmp_path / RULE_FOLDER, {"a.npz": data})
    with pytest.raises(UserError, match="Python objects: refused"):
        ImageDB(tmp_path).read("a.npz")
    assert set(codec.unpack_npz(data, skip_objects=True)) == set(good)
    assert not proof.exists()


def damaged_image(data: bytes) -> list[bytes]:
    shifted = {**published_array(np.zeros((3, 6))), b"shape": (4, 6)}
    return [
        data[: len(data) // 2],
        b"",
        b"\xff" * 40,
        msgpack.packb([1, 2]),
        msgpack.packb({"norm_bb": 3, "features": 4}),
        msgpack.packb({"norm_bb": shifted, "features": published_array(np.zeros((3, 4)))}, use_bin_type=True),
        packed({"norm_bb": np.zeros((3, 6)), "features": np.zeros((4, 4))}),
        packed({"norm_bb": np.zeros((3, 4)), "features": np.zeros((3, 4))}),
        packed({"features": np.zeros((3, 4))}),
        compressed({"norm_bb": np.zeros((3, 6))})[:-30],
    ]


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """The bytes with a few of them changed, lost or added."""
    damaged = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        at = int(generator.integers(len(damaged)))
        change = generator.integers(3)
        if change == 0:
            damaged[at] ^= 1 << int(generator.integers(8))
        elif change == 1:
            del damaged[at : at + int(generator.integers(1, 6))]
        else:
            damaged[at:at] = generator.bytes(3)
    return bytes(damaged)


def test_any_damage_is_a_value_error() -> None:
    generator = np.random.default_rng(0)
    text = lz4.frame.compress(msgpack.dumps({"input_ids": [1, 2], "img_fname": "a", "raw": "hello hello"}))
    readers: list[tuple[Callable[[bytes], object], bytes]] = [
        (codec.unpack_arrays, packed(random_image(0, size=2, dim=2))),
        (codec.unpack_npz, compressed(random_image(0, size=2, dim=2))),
        (codec.unpack_text, text),
    ]
    refused = 0
    for read, data in readers:
        read(data)
        for _ in range(300):
            try:
                read(mutated(data, generator))
            except ValueError:
                refused += 1
    assert refused > 300


@pytest.mark.parametrize("header", ["(2, ", f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**70}, 0)}}"])
def test_a_strange_npy_header_is_a_value_error(header: str) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        member = header.encode() + b"\n"
        archive.writestr("features.npy", b"\x93NUMPY\x01\x00" + len(member).to_bytes(2, "little") + member)
    with pytest.raises(ValueError, match=r"."):
        codec.unpack_npz(data.getvalue())


@pytest.mark.parametrize("array", [np.array(["a"]), np.zeros(2, dtype="f4,i4"), np.zeros(2, dtype="c8")])
def test_only_plain_numbers_are_read_from_npz(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="only plain numbers are read"):
        codec.unpack_npz(compressed({"features": array}))


def test_a_compressed_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "TEXT_LIMIT", 1 << 16)
    with pytest.raises(ValueError, match="does not end"):
        codec.unpack_text(lz4.frame.compress(b"\x00" * (1 << 20)))


def test_damaged_records_are_one_sentence(text_folder: Path, tmp_path: Path) -> None:
    bad = {f"{index}.npz": data for index, data in enumerate(damaged_image(packed(random_image(0))))}
    published_folder(tmp_path / RULE_FOLDER, bad)
    database = ImageDB(tmp_path)
    for name in bad:
        with pytest.raises(UserError, match=f"record '{name}' is damaged"):
            database.read(name)
    with pytest.raises(UserError, match=r"no record 'absent.npz'"):
        database.read("absent.npz")

    whole = lz4.frame.compress(msgpack.dumps({"input_ids": [1], "img_fname": "a"}))
    texts = [
        whole[:-5],
        b"",
        b"junk",
        lz4.frame.compress(b"\xc1"),
        lz4.frame.compress(msgpack.dumps({"input_ids": [1]})),
    ]
    texts.append(lz4.frame.compress(msgpack.dumps({"input_ids": ["a"], "img_fname": "a"})))
    TextDB(text_folder).close()
    with lmdb.open(str(text_folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for index, value in enumerate(texts):
            transaction.put(f"bad{index}".encode(), value)
    captions = TextDB(text_folder)
    for index in range(len(texts)):
        with pytest.raises(UserError, match=f"record 'bad{index}' is damaged"):
            captions.caption(f"bad{index}")


def test_damaged_files_are_one_sentence(text_folder: Path, tmp_path: Path) -> None:
    records = {f"{index}.npz": packed(random_image(index, size=40)) for index in range(40)}
    folder = published_folder(tmp_path / RULE_FOLDER, records)
    data = (folder / "data.mdb").read_bytes()
    (folder / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"data.mdb is truncated"):
        ImageDB(tmp_path).read("0.npz")
    (folder / "data.mdb").write_bytes(b"x" * len(data))
    with pytest.raises(UserError, match="not a readable LMDB file"):
        ImageDB(tmp_path).read("0.npz")
    with pytest.raises(UserError, match=r"no data.mdb"):
        TextDB(tmp_path / "nowhere")
    (text_folder / "id2len.json").write_text('{"40": 2')
    with pytest.raises(UserError, match=r"id2len.json is not valid JSON"):
        TextDB(text_folder)
    (text_folder / "id2len.json").unlink()
    with pytest.raises(UserError, match=r"id2len.json is missing"):
        TextDB(text_folder)
    (text_folder / "id2len.json").write_text("{}")
    (text_folder / "meta.json").write_text('{"UNK": 100}')
    with pytest.raises(UserError, match="lacks the ids of CLS, SEP"):
        TextDB(text_folder)
