"""Scene data sets on disk: published formats, same content for the same options, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cacr_uniter import cli
from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.data.image_db import ImageDB
from cacr_uniter.data.scenes import write
from cacr_uniter.data.scenes.settings import SceneSettings
from cacr_uniter.data.scenes.write import write_scenes
from cacr_uniter.data.text_db import TextDB
from cacr_uniter.errors import UserError

SMALL = SceneSettings(n_train=92, n_val=4, n_winoground=16, size=64)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(out, SMALL)
    return out


def content(folder: Path) -> dict[str, object]:
    """Everything in a data set, records instead of LMDB pages."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("data.mdb", "lock.mdb"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    for split in ("train", "val", "winoground"):
        texts = TextDB(folder / "txt" / f"{split}.db")
        found[split] = [texts.caption(key).record for key in texts.ids()]
    images = ImageDB(folder / "img")
    for name in images.names():
        found[name] = {key: value.tobytes() for key, value in images.record(name).items()}
    return found


def test_same_options_same_content_by_any_number_of_processes(scenes: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "two", SMALL, workers=2)
    assert content(tmp_path / "two") == content(scenes)


def test_another_seed_another_content(scenes: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "other", dataclasses.replace(SMALL, seed=1))
    assert content(tmp_path / "other") != content(scenes)


def test_databases_are_read_by_the_training_data_set(scenes: Path) -> None:
    for split, pictures in (("train", 92), ("val", 4), ("winoground", 32)):
        dataset = RetrievalDataset(TextDB(scenes / "txt" / f"{split}.db"), ImageDB(scenes / "img"))
        assert len(dataset.image_names) == pictures
        batch = dataset.batch([(key, dataset.txt2img[key]) for key in dataset.caption_ids[:8]])
        assert batch.features.shape[2] == 2048
        assert int(batch.n_text.max()) <= 12
        for key in dataset.caption_ids[:8]:
            record = dataset.text_db.caption(key).record
            assert record["raw"].split() == record["tokens"]
            assert "[UNK]" not in record["toked_caption"]
    assert len(list((scenes / "images").glob("*.png"))) == 92 + 4 + 32


def test_the_set_is_checked_whole(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(scenes)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["img/feat_th0.2_max100_min10", "txt/train.db", "txt/val.db", "txt/winoground.db"]
    assert [line.split(":")[0] for line in lines[::2]] == [f"{scenes}/{name}" for name in names]
    assert lines[1::2] == ["sound"] * 4
    shutil.copytree(scenes, tmp_path / "set")
    (tmp_path / "set" / "txt" / "val.db" / "txt2img.json").write_text("{}")
    assert cli.main(["data", "check", str(tmp_path / "set")]) == 1
    assert "txt2img.json says otherwise" in capsys.readouterr().out


def test_quadruples_name_records_and_pictures_that_exist(scenes: Path) -> None:
    quadruples = json.loads((scenes / "winoground.json").read_text())
    texts = TextDB(scenes / "txt" / "winoground.db")
    assert [q["split"] for q in quadruples] == ["seen", "held_out"] * 8
    for q in quadruples:
        for k in (0, 1):
            record = texts.caption(q["caption_ids"][k]).record
            assert record["raw"] == q[f"caption_{k}"]
            assert record["img_fname"] == q[f"image_{k}"]
            assert (scenes / "images" / q[f"image_{k}"].replace(".npz", ".png")).is_file()


def test_held_out_combinations_by_the_words_of_the_captions(scenes: Path) -> None:
    """Read back from the files alone: no training caption says a held-out thing, every held-out quadruple does."""
    info = json.loads((scenes / "scenes.json").read_text())
    held_out = {(frozenset(entry[:2]), entry[2]) for entry in info["held_out"]}
    assert held_out
    words_of = {
        "horizontal": ("left", "right"),
        "vertical": ("above", "below"),
        "containment": ("inside", "around"),
        "size": ("bigger", "smaller", "big", "small"),
    }
    axes = {word: axis for axis, words in words_of.items() for word in words}

    def combinations(caption: str) -> set[tuple[frozenset[str], str]]:
        words = caption.split()
        nouns = frozenset(w for w in words if w in info["nouns"])
        return {(nouns, axes[w]) for w in words if w in axes}

    texts = TextDB(scenes / "txt" / "train.db")
    trained = [combinations(texts.caption(key).record["raw"]) for key in texts.ids()]
    assert sum(map(bool, trained)) > 100
    assert not set().union(*trained) & held_out
    for q in json.loads((scenes / "winoground.json").read_text()):
        said = combinations(q["caption_0"])
        if said and q["split"] == "held_out":
            assert said & held_out
        if said and q["split"] == "seen":
            assert said <= set().union(*trained)


def test_contrasts_are_other_pictures_captions(scenes: Path) -> None:
    folder = scenes / "txt" / "train.db"
    contrasts = json.loads((folder / "contrasts.json").read_text())
    texts = TextDB(folder)
    assert len({image for contrast in contrasts for image in contrast["images"]}) == 92
    for contrast in contrasts:
        for image, captions in zip(contrast["images"], contrast["captions"], strict=True):
            assert texts.img2txts[image][0] in captions, "a picture's own caption is false of its contrast"
            assert set(captions) <= set(texts.img2txts[image])


def test_existing_folder_is_left_alone(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_scenes(tmp_path / "mine", SMALL)
    assert (tmp_path / "mine").read_text() == "mine"


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_write_quadruples", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write_scenes(tmp_path / "set", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_own_vocabulary(scenes: Path, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    pieces = (scenes / "vocab.txt").read_text().splitlines()
    vocab.write_text("\n".join([*pieces[:5], "unused", *pieces[5:]]) + "\n")
    write_scenes(tmp_path / "set", dataclasses.replace(SMALL, vocab=vocab))
    assert (tmp_path / "set" / "vocab.txt").read_bytes() == vocab.read_bytes()
    one, two = (TextDB(folder / "txt" / "train.db").caption("0") for folder in (scenes, tmp_path / "set"))
    assert [i + 1 for i in one.input_ids] == two.input_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_train": 3}, "--n-train is 3"),
        ({"n_winoground": 0}, "--n-winoground is 0"),
        ({"captions": 0}, "--captions is 0"),
        ({"objects": (1, 3)}, "--objects is 1 3"),
        ({"objects": (2, 5), "things": 4}, "--things is 4"),
        ({"things": 99}, "--things is 99"),
        ({"size": 10}, "--size is 10"),
        ({"held_out": 0.9}, "--held-out is 0.9"),
        ({"relations": ("on",)}, "--relations: 'on'"),
        ({"attributes": ("taste",)}, "--attributes: 'taste'"),
        ({"relations": (), "attributes": ()}, "both empty"),
        ({"seed": -1}, "--seed is -1"),
        ({"sprites": Path("nowhere")}, "nowhere is no folder"),
        ({"vocab": Path("nowhere.txt")}, "nowhere.txt"),
    ],
)
def test_wrong_options_are_named_and_write_nothing(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_scenes(tmp_path / "set", dataclasses.replace(SMALL, **change))
    assert list(tmp_path.iterdir()) == []


def test_features_come_from_the_written_picture(scenes: Path) -> None:
    from PIL import Image

    from cacr_uniter.data.scenes.relations import Box
    from cacr_uniter.data.scenes.render import region_features

    images = ImageDB(scenes / "img")
    name = images.names()[0]
    record = images.record(name)
    with Image.open(scenes / "images" / name.replace(".npz", ".png")) as picture:
        corners = np.rint(record["norm_bb"][:, :4].astype(np.float64) * picture.width).astype(int)
        for row, (x1, y1, x2, y2) in enumerate(corners.tolist()):
            again = region_features(picture.convert("RGB"), Box(x1, y1, x2, y2))
            np.testing.assert_array_equal(again, record["features"][row])
