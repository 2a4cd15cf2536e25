"""The LMDB formats: published layout, safe decoding, box counts, processes."""

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path

import lmdb
import lz4.frame
import msgpack
import numpy as np
import pytest

from cacr_uniter.data import codec
from cacr_uniter.data.lmdb import BoxRule, ImageDB, ImageDBWriter, TextDB, TextDBWriter
from cacr_uniter.data.lmdb_store import COMMIT_EVERY, Writer
from cacr_uniter.data.testing import (
    RULE_FOLDER,
    SPECIAL_IDS,
    compressed,
    packed,
    published_folder,
    published_texts,
    random_image,
)
from cacr_uniter.errors import UserError


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    return published_texts(tmp_path / "itm_flickr30k_val.db")


def test_published_text_database(text_folder: Path) -> None:
    database = TextDB(text_folder)
    assert (database.cls, database.sep, len(database)) == (101, 102, 3)
    assert database.ids() == ["40", "41", "42"]
    assert database.ids(max_length=2) == ["40", "42"]
    caption = database.caption("41")
    assert caption.input_ids == [1130, 1103, 1299]
    assert caption.image == "flickr30k_000000000000.npz"
    assert caption.record["sentid"] == 41
    assert database.img2txts["flickr30k_000000000000.npz"] == ["40", "41"]


def test_text_writer_makes_the_published_layout(tmp_path: Path) -> None:
    with TextDBWriter(tmp_path / "t.db", SPECIAL_IDS, 28996, "bert-base-cased") as writer:
        writer.write("7", [200, 300], "a.npz", raw="A dog", tokens=["a", "dog"])
        writer.write("8", [], "a.npz")
    assert {entry.name for entry in (tmp_path / "t.db").iterdir()} == {
        "data.mdb",
        "lock.mdb",
        "meta.json",
        "id2len.json",
        "txt2img.json",
        "img2txts.json",
    }
    meta = json.loads((tmp_path / "t.db" / "meta.json").read_text())
    assert meta == {**SPECIAL_IDS, "v_range": [104, 28996], "tokenizer": "bert-base-cased"}
    with (
        lmdb.open(str(tmp_path / "t.db"), readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        record = msgpack.loads(lz4.frame.decompress(transaction.get(b"7")), raw=False)
    assert record == {"raw": "A dog", "tokens": ["a", "dog"], "input_ids": [200, 300], "img_fname": "a.npz"}
    database = TextDB(tmp_path / "t.db")
    assert database.lengths == {"7": 2, "8": 0}
    assert database.img2txts == {"a.npz": ["7", "8"]}


@pytest.mark.parametrize("pack", [packed, compressed])
def test_published_image_database(pack: Callable[[dict[str, np.ndarray]], bytes], tmp_path: Path) -> None:
    records = {f"im_{index}.npz": random_image(index) for index in range(3)}
    stored = {name: pack(record) for name, record in records.items()}
    suffix = "_compressed" if pack is compressed else ""
    published_folder(tmp_path / (RULE_FOLDER + suffix), stored | {"__keys__": json.dumps(list(records)).encode()})
    (tmp_path / "nbb_th0.2_max100_min10.json").write_text(json.dumps(dict.fromkeys(records, 11)))
    for database in (ImageDB(tmp_path), ImageDB(tmp_path / (RULE_FOLDER + suffix))):
        assert database.names() == list(records)
        assert database.feature_dim == 8
        features, boxes = database.read("im_1.npz")
        assert database.count("im_1.npz") == 11
        np.testing.assert_array_equal(features.numpy(), records["im_1.npz"]["features"][:11].astype(np.float32))
        corners = records["im_1.npz"]["norm_bb"][:11].astype(np.float32)
        np.testing.assert_array_equal(boxes[:, :6].numpy(), corners)
        np.testing.assert_array_equal(boxes[:, 6].numpy(), corners[:, 4] * corners[:, 5])
        database.close()


def test_old_msgpack_keys_are_read(tmp_path: Path) -> None:
    """Some writers stored the map keys of an array as text."""
    record = random_image(0)
    data = msgpack.packb(
        {
            key: {"nd": True, "type": value.dtype.str, "kind": "", "shape": value.shape, "data": value.tobytes()}
            for key, value in record.items()
        }
    )
    assert isinstance(data, bytes)
    np.testing.assert_array_equal(codec.unpack_arrays(data)["features"], record["features"])


@pytest.mark.parametrize("counts", [True, False], ids=["nbb.json", "no nbb.json"])
def test_all_folder_is_cut_by_the_rule(counts: bool, tmp_path: Path) -> None:
    record = random_image(0, size=50)
    record["conf"] = np.linspace(0.9, 0.0, 50, dtype=np.float16)[:, None]
    published_folder(tmp_path / "all", {"a.npz": packed(record)})
    if counts:
        (tmp_path / "all" / "nbb.json").write_text('{"a.npz": 50}')
    confident = int((record["conf"] > 0.2).sum())
    assert 10 < confident < 50
    assert len(ImageDB(tmp_path).read("a.npz").boxes) == confident
    assert ImageDB(tmp_path, BoxRule(threshold=0.89)).count("a.npz") == 10
    assert ImageDB(tmp_path, BoxRule(max_boxes=20)).count("a.npz") == 20
    assert ImageDB(tmp_path, BoxRule(fixed=36)).count("a.npz") == 36


def test_box_rule() -> None:
    rule = BoxRule()
    assert rule.count(np.full(100, 0.1), 100) == 10
    assert rule.count(np.full(100, 0.9), 100) == 100
    assert rule.count(np.full(150, 0.9), 150) == 100
    assert rule.count(np.array([0.2] * 20 + [0.21] * 15), 35) == 15
    assert rule.count(np.full(4, 0.9), 4) == 4
    assert rule.count(None, 40) == 40
    assert BoxRule(fixed=36).count(np.full(100, 0.1), 100) == 36
    assert (rule.folder, rule.counts_file) == (RULE_FOLDER, "nbb_th0.2_max100_min10.json")
    assert (BoxRule(fixed=36).folder, BoxRule(fixed=36).counts_file) == ("feat_numbb36", None)


@pytest.mark.parametrize("store_compressed", [False, True])
@pytest.mark.parametrize("rule", [BoxRule(), BoxRule(fixed=5)])
def test_image_writer_round_trip(rule: BoxRule, store_compressed: bool, tmp_path: Path) -> None:
    records = {f"im_{index}.npz": random_image(index) for index in range(3)}
    with ImageDBWriter(tmp_path, rule, store_compressed) as writer:
        for name, record in records.items():
            writer.write(name, record["features"], record["norm_bb"], record["conf"])
    database = ImageDB(tmp_path, rule)
    assert database.names() == list(records)
    for name, record in records.items():
        kept = rule.count(record["conf"], 12)
        stored = database.record(name)
        assert database.count(name) == kept
        assert {key: value.dtype for key, value in stored.items()} == dict.fromkeys(record, np.float16)
        for key, value in record.items():
            np.testing.assert_array_equal(stored[key], value[:kept])


def test_image_writer_refuses_bad_records(tmp_path: Path) -> None:
    good = random_image(0)
    writer = ImageDBWriter(tmp_path)
    writer.write("a.npz", good["features"], good["norm_bb"], good["conf"])
    cases: list[tuple[dict[str, np.ndarray], str]] = [
        ({"conf": good["conf"][::-1]}, "sorted by falling confidence"),
        ({"norm_bb": good["norm_bb"][:, :4]}, r"norm_bb \[n, 6\]"),
        ({"conf": good["conf"][:3]}, r"conf \[n\]"),
        ({"features": np.full((12, 8), 1e6)}, "not finite in float16"),
        ({"features": np.full((12, 8), np.nan)}, "not finite"),
    ]
    for change, message in cases:
        record = good | change
        with pytest.raises(ValueError, match=message):
            writer.write("b.npz", record["features"], record["norm_bb"], record["conf"])
    with pytest.raises(ValueError, match="new image name"):
        writer.write("a.npz", good["features"], good["norm_bb"], good["conf"])
    writer.close()
    assert ImageDB(tmp_path).names() == ["a.npz"]


def test_interrupted_writers_leave_no_database_and_resume(tmp_path: Path) -> None:
    def interrupted(resume: bool) -> None:
        with ImageDBWriter(tmp_path, resume=resume) as writer:
            for index in range(COMMIT_EVERY + 5):
                if f"{index}.npz" not in writer.counts:
                    record = random_image(index, size=2, dim=1)
                    writer.write(f"{index}.npz", record["features"], record["norm_bb"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(resume=False)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{RULE_FOLDER}.partial"]
    with pytest.raises(UserError, match="found none"):
        ImageDB(tmp_path)
    with ImageDBWriter(tmp_path, resume=True) as writer:
        assert len(writer.counts) == COMMIT_EVERY
        record = random_image(1, size=3, dim=1)
        writer.write("last.npz", record["features"], record["norm_bb"])
    database = ImageDB(tmp_path)
    assert len(database.names()) == COMMIT_EVERY + 1
    assert sorted(os.listdir(database.folder)) == ["data.mdb", "lock.mdb"]
    with pytest.raises(UserError, match="exists already"):
        ImageDBWriter(tmp_path)
    with pytest.raises(RuntimeError), TextDBWriter(tmp_path / "t.db", SPECIAL_IDS, 200, "v"):
        raise RuntimeError
    assert not (tmp_path / "t.db").exists()


def test_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacr_uniter.data.lmdb_store.FIRST_MAP_SIZE", 1 << 16)
    writer = Writer(tmp_path / "db")
    for index in range(64):
        writer.put(str(index), os.urandom(1 << 14))
    writer.finish()
    assert (tmp_path / "db" / "data.mdb").stat().st_size > 1 << 20


def read_in_child(database: ImageDB, queue: "multiprocessing.Queue[float]") -> None:
    queue.put(float(database.read("im_1.npz").features.sum()))


@pytest.mark.parametrize("start", [multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")])
def test_readers_open_anew_in_every_process(start: ForkContext | SpawnContext, tmp_path: Path) -> None:
    published_folder(tmp_path / RULE_FOLDER, {f"im_{index}.npz": packed(random_image(index)) for index in range(2)})
    database = ImageDB(tmp_path)
    expected = float(database.read("im_1.npz").features.sum())
    assert b"lmdb.Environment" not in pickle.dumps(database)
    queue = start.Queue()
    process = start.Process(target=read_in_child, args=(database, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join(timeout=60)
    assert float(database.read("im_1.npz").features.sum()) == expected


def test_the_cache_keeps_to_its_budget(tmp_path: Path) -> None:
    published_folder(tmp_path / RULE_FOLDER, {f"{index}.npz": packed(random_image(index)) for index in range(5)})
    one = 10 * (8 + 7) * 4
    database = ImageDB(tmp_path, cache_bytes=2 * one + 1)
    first = [database.read(f"{index}.npz").features for index in range(5)]
    again = [database.read(f"{index}.npz").features for index in range(5)]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False, False, False]
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert len(pickle.dumps(database)) < one


def test_two_readers_of_one_folder(tmp_path: Path) -> None:
    published_folder(tmp_path / RULE_FOLDER, {"a.npz": packed(random_image(0))})
    first, second = ImageDB(tmp_path), ImageDB(tmp_path)
    assert first.read("a.npz").boxes.equal(second.read("a.npz").boxes)
    first.close()
    assert second.read("a.npz").boxes.shape == (10, 7)
