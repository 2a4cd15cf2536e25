"""Captions of a Karpathy JSON into text databases, and the database check."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacr_uniter.data.check import check_database
from cacr_uniter.data.importers import import_captions
from cacr_uniter.data.lmdb import ImageDBWriter, TextDB, TextDBWriter
from cacr_uniter.data.testing import packed, published_folder, random_image
from cacr_uniter.data.tokenize import train_vocabulary, write_vocabulary
from cacr_uniter.errors import UserError

RAW = ["Two young guys with shaggy hair.", "A dog  runs.", "The dog jumps!", "A man; a dog."]


def karpathy(folder: Path, dataset: str = "flickr30k") -> Path:
    """The published layout: images with sentences, split by a field."""
    names = {
        "flickr30k": ["1000092795.jpg", "10002456.jpg"],
        "coco": ["COCO_train2014_000000000009.jpg", "COCO_val2014_000000000042.jpg"],
        "mine": ["first.png", "second.png"],
    }[dataset]
    images: list[dict[str, Any]] = []
    for index, filename in enumerate(names):
        sentences = [
            {"tokens": RAW[i].lower().split(), "raw": RAW[i], "imgid": index, "sentid": i}
            for i in (2 * index, 2 * index + 1)
        ]
        image = {"sentids": [2 * index, 2 * index + 1], "imgid": index, "sentences": sentences}
        images.append(image | {"split": ("train", "val")[index], "filename": filename})
    path = folder / f"dataset_{dataset}.json"
    path.write_text(json.dumps({"images": images, "dataset": dataset}))
    return path


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    write_vocabulary(train_vocabulary(RAW, size=120), path)
    return path


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("flickr30k", ["flickr30k_001000092795.npz", "flickr30k_000010002456.npz"]),
        ("coco", ["coco_train2014_000000000009.npz", "coco_val2014_000000000042.npz"]),
        ("mine", ["first.npz", "second.npz"]),
    ],
)
def test_captions(dataset: str, names: list[str], vocab: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    reports = import_captions(
        karpathy(tmp_path, dataset),
        tmp_path / "txt",
        vocab,
        progress=lambda what, done, total: steps.append((done, total)),
    )
    assert list(reports) == ["train", "val"]
    assert steps == [(1, 2), (2, 2)]
    assert (reports["val"]["images"], reports["val"]["captions"]) == (1, 2)
    assert ("29000" in reports["train"]["note"]) is (dataset == "flickr30k")
    for index, split in enumerate(("train", "val")):
        folder = tmp_path / "txt" / f"itm_{dataset}_{split}.db"
        database = TextDB(folder)
        assert database.ids() == [str(2 * index), str(2 * index + 1)]
        assert database.img2txts == {names[index]: database.ids()}
        assert check_database(folder).ok
    caption = TextDB(tmp_path / "txt" / f"itm_{dataset}_train.db").caption("1")
    assert caption.record["raw"] == RAW[1]
    assert caption.record["tokens"] == ["a", "dog", "runs."]
    assert "".join(caption.record["toked_caption"]).replace("##", "") == "Adogruns."
    assert caption.record["image_id"] == {"flickr30k": 1000092795, "coco": 9, "mine": -1}[dataset]


def test_splits_and_refusals(vocab: Path, tmp_path: Path) -> None:
    source = karpathy(tmp_path)
    assert list(import_captions(source, tmp_path / "txt", vocab, splits=["val"])) == ["val"]
    with pytest.raises(UserError, match="no split test; it has train, val"):
        import_captions(source, tmp_path / "txt", vocab, splits=["test"])
    with pytest.raises(UserError, match="exists already"):
        import_captions(source, tmp_path / "txt", vocab, splits=["val"])
    whole = source.read_text()
    for text, message in (
        (whole[:-20], "not valid JSON"),
        ("[]", "list `images`"),
        ('{"images": [3]}', "int instead of an object"),
        (whole.replace('"raw"', '"row"'), r"image 1000092795.jpg is not as expected \(KeyError\('raw'\)\)"),
        (whole.replace('"sentid": 1', '"sentid": 0'), "a second time"),
    ):
        source.write_text(text)
        with pytest.raises(UserError, match=message):
            import_captions(source, tmp_path / "other", vocab)
    assert not list((tmp_path / "other").glob("*.db"))
    with pytest.raises(UserError, match="cannot be read"):
        import_captions(tmp_path / "absent.json", tmp_path / "txt", vocab)


def test_check_finds_what_is_wrong_with_images(tmp_path: Path) -> None:
    boxes = np.array([[0.1, 0.2, 0.5, 0.9, 0.4, 0.7]])
    swapped = boxes[:, [0, 1, 2, 3, 5, 4]]
    with ImageDBWriter(tmp_path) as writer:
        writer.write("good.npz", np.ones((1, 4)), boxes)
        writer.write("swapped.npz", np.ones((1, 4)), swapped)
        writer.write("pixels.npz", np.ones((1, 4)), boxes * 300)
        writer.write("wide.npz", np.ones((1, 5)), boxes)
        writer.write("empty.npz", np.ones((0, 4)), boxes[:0])
    (tmp_path / "nbb_th0.2_max100_min10.json").write_text(
        json.dumps({"good.npz": 3, "swapped.npz": 1, "pixels.npz": 1, "wide.npz": 1, "empty.npz": 0})
    )
    report = check_database(tmp_path)
    assert not report.ok
    text = str(report)
    for problem in (
        "good.npz: 1 regions, the counts file says 3",
        "swapped.npz: columns 4 and 5 are height and width, in the wrong order",
        "pixels.npz: boxes reach 270",
        "different widths: [4, 5]",
        "empty.npz: has no region",
    ):
        assert problem in text
    assert len(report.problems) == 5


@pytest.mark.parametrize(("name", "cut"), [("feat_th0.2_max100_min10", True), ("feat_numbb12", True), ("all", False)])
@pytest.mark.parametrize("suffix", ["", "_compressed"])
def test_records_of_a_cut_folder_have_as_many_regions_as_are_counted(
    name: str, cut: bool, suffix: str, tmp_path: Path
) -> None:
    folder = published_folder(tmp_path / (name + suffix), {"a.npz": packed(random_image(0))})
    counts = folder / "nbb.json" if name == "all" else tmp_path / f"{name.replace('feat', 'nbb')}.json"
    for count, sound in ((12, True), (3, not cut)):
        counts.write_text(json.dumps({"a.npz": count}))
        report = check_database(folder)
        assert report.ok == sound
        assert report.problems == ([] if sound else ["a.npz: 12 regions, the counts file says 3"])


def test_check_finds_captions_that_no_published_model_takes(tmp_path: Path) -> None:
    with TextDBWriter(tmp_path / "t.db", {"UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4}, 20, "v") as writer:
        writer.write("1", [5] * 510, "a.npz")
        writer.write("2", [5] * 511, "a.npz")
    (problem,) = check_database(tmp_path / "t.db").problems
    assert problem.startswith(
        "2: 511 pieces, UNITER takes 510; shorten or remove it (training leaves it out by data.max_t"
    )


def test_check_finds_what_is_wrong_with_captions(tmp_path: Path) -> None:
    with TextDBWriter(tmp_path / "t.db", {"UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4}, 20, "v") as writer:
        writer.write("1", [5, 6], "a.npz")
        writer.write("2", [5, 25], "b.npz")
        writer.write("3", [5, 6], "b.npz")
    with ImageDBWriter(tmp_path / "img") as images:
        images.write("a.npz", np.ones((1, 4)), np.array([[0.1, 0.2, 0.5, 0.9, 0.4, 0.7]]))
    for name, value in (("id2len", {"1": 3, "2": 2, "3": 2, "9": 1}), ("img2txts", {"a.npz": ["1"], "b.npz": []})):
        (tmp_path / "t.db" / f"{name}.json").write_text(json.dumps(value))
    report = check_database(tmp_path / "t.db", images=tmp_path / "img")
    text = str(report)
    for problem in (
        "1: 2 pieces, id2len.json says 3",
        "3: not in img2txts.json under b.npz",
        "no record '9'",
        "piece 25 is beyond the vocabulary of 20",
        "1 images are not in the image database, first 'b.npz'",
    ):
        assert problem in text
    assert len(report.problems) == 5
    with pytest.raises(UserError, match=r"no data\.mdb"):
        check_database(tmp_path / "nowhere.db")
    with pytest.raises(UserError, match="no such folder"):
        check_database(tmp_path / "nowhere")
