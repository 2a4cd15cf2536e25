"""Mistakes at the command line and damage in data: one sentence that names it, exit status 2, nothing half written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacr_uniter import cli
from cacr_uniter.commands import doctor
from cacr_uniter.data.lmdb import ImageDB, ImageDBWriter, TextDB
from cacr_uniter.errors import ProcessError, UserError
from cacr_uniter.training.testing import SMALL, synthetic_source, write_databases

SCORES = "\n".join(f'{{"label": "0_c{c}_i{i}", "score": {int(c == i)}}}' for c in (0, 1) for i in (0, 1))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty captions and twenty images in the published formats."""
    root = write_databases(tmp_path_factory.mktemp("sound"))
    (root / "scores.jsonl").write_text(SCORES)
    return root


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "data")
    return tmp_path / "data"


def train_words(data: Path, out: Path, **fields: Any) -> list[str]:
    values = SMALL | {"run.out": out, "data.scenes": data, "optim.steps": 2}
    values |= {name.replace("__", "."): value for name, value in fields.items()}
    return ["train", "--progress", "false", *(word for k, v in values.items() for word in (f"--{k}", str(v)))]


def refused(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("cacr: ")
    assert captured.err.strip().count("\n") == 0, captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --optim.lrr 1", "cacr train has no option --optim.lrr: did you mean --optim.lr?"),
        ("train --optim.lrr=1", "did you mean --optim.lr?"),
        ("train --optim.lr fast", "optim.lr: expected a number, got fast"),
        ("train --optim.steps 1.5", "optim.steps: expected a whole number, got 1.5"),
        ("train --aux.loss cacrr", "aux.loss: expected one of none, cacr, iais-singular, iais-distributed, got cacrr"),
        ("train --aux.layers x", "aux.layers: expected a list of whole numbers such as [-1], got x"),
        ("train --optim.betas 1", "optim.betas: expected 2 numbers such as [0.9, 0.98], got 1"),
        ("train --data.fixed_regions a", "data.fixed_regions: expected a whole number or null, got a"),
        ("train --aux.projection_scale big", "aux.projection_scale: expected a number or mean, got big"),
        ("train --run.overwrite maybe", "run.overwrite: expected true or false, got maybe"),
        ("train extra", "cacr train has no place for extra: see cacr train --help"),
        ("train --config SOUND/img", "SOUND/img cannot be read"),
        ("train --config SOUND/scores.jsonl", "scores.jsonl is not YAML"),
        ("train --config=SOUND/txt/train.db/data.mdb", "data.mdb is not YAML"),
        ("train --config SOUND/list.yaml", "list.yaml: expected fields of cacr train, got list"),
        ("eval winoground --score SOUND/scores.jsonl", "no option --score: did you mean --scores?"),
        ("eval winoground --scores SOUND/scores.jsonl --batch-size 0", "--batch-size: expected a whole number from 1"),
        ("eval winoground --scores SOUND/scores.jsonl --batch-size -3", "--batch-size: expected a whole number from 1"),
        ("eval winoground --scores SOUND/scores.jsonl --breakdown tga", "--breakdown: expected some of split"),
        ("eval winoground --scores SOUND/scores.jsonl --breakdown tag", "--breakdown tag: the examples say nothing"),
        ("eval winoground --scores SOUND/scores.jsonl --images x", "--images belongs to --checkpoint"),
        ("eval winoground --scores SOUND/scores.jsonl --head itm", "--head belongs to --checkpoint"),
        ("eval winoground --scores SOUND/scores.jsonl --device cpu", "--device belongs to --checkpoint"),
        ("eval winoground --scores SOUND/scores.jsonl --batch-size 8", "--batch-size belongs to --checkpoint"),
        ("eval winoground --scores SOUND/scores.jsonl --max-regions 8", "--max-regions belongs to --checkpoint"),
        ("eval winoground --scores SOUND/scores.jsonl --data x --examples y", "--data is not read beside --examples"),
        (
            "eval winoground --checkpoint x --data x --examples y --text z --images z",
            "not read beside --examples, --text",
        ),
        ("eval winoground --scores SOUND/scores.jsonl --difficulty SOUND/tags.json", "such as '0', got 'x'"),
        ("eval winoground --scores SOUND/scores.jsonl --difficulty SOUND/none.json", "such as '0', got 'none'"),
        ("eval winoground --scores SOUND/scores.jsonl --write-scores no/x", "--write-scores: there is no folder no"),
        ("eval winoground --scores SOUND/scores.jsonl --data nowhere", "nowhere/winoground.json: cannot be read"),
        ("eval retrieval --checkpoint x --out y --data z --max-images -1", "--max-images: expected a whole number"),
        ("eval retrieval --checkpoint x --out y --data z --block 0", "--block: expected a whole number from 1"),
        ("eval retrieval --checkpoint x --out y --data z --text t", "give it or --text, not both"),
        ("eval retrieval --checkpoint x --out y --data z --images t", "give it or --images, not both"),
        ("eval retrieval --checkpoint x --out y --text z --images z --split test", "--split test belongs to --data"),
        ("eval retrieval --checkpoint x --out y --images z --split test", "give --data DIR of a scene set, or --text"),
        ("eval retrieval --out y --data z", "the following arguments are required: --checkpoint; see cacr eval"),
        ("data check nowhere", "image database nowhere: no such folder"),
        ("data check SOUND/txt", "SOUND/txt holds text databases: check one of SOUND/txt/train.db, SOUND/txt/val.db"),
        ("data import butd SOUND --out x", "argument format: invalid choice: 'butd'"),
        ("data import butd-tsv SOUND --out x", "SOUND: expected a TSV file, got a folder"),
        ("data import butd-tsv SOUND/scores.jsonl --out x", "line 1 ({"),
        ("data import butd-tsv SOUND/scores.jsonl --out x --limit 0", "--limit: expected a whole number from 1"),
        ("data import butd-tsv SOUND/scores.jsonl --out x --min-boxes 20 --max-boxes 10", "got 20 and 10"),
        ("data import butd-tsv SOUND/scores.jsonl --out x --threshold 20", "threshold from 0 to below 1, got 20"),
        ("data import butd-tsv SOUND/scores.jsonl --out x --vocab v", "--vocab belongs to karpathy-json, winoground"),
        ("data import karpathy-json SOUND/scores.jsonl --out x --labels v", "--labels belongs to vinvl-tsv"),
        ("data import butd-tsv SOUND/binary.tsv --out x", r"line 1 ('\x7fELF\x02\ufffd\x00\x00'): expected 6 columns"),
        ("data scenes --out x --workers 0", "--workers: expected a whole number from 1, got '0'"),
        ("data scenes --out x --n-trian 4", "did you mean --n-train?"),
        ("study --seeds 0", "--seeds: expected a whole number from 1, got '0'"),
    ],
)
def test_a_mistake_in_the_command(
    words: str,
    message: str,
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (sound / "list.yaml").write_text("- 1\n- 2\n")
    (sound / "tags.json").write_text('{"x": ["Unusual Text"]}')
    (sound / "binary.tsv").write_bytes(b"\x7fELF\x02\xff\x00\x00\n\x00\x01")
    (sound / "none.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    refused(capsys, words.replace("SOUND", str(sound)).split(), message.replace("SOUND", str(sound)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "something was left"


RULE = {
    "data.max_regions": "expected 0 <= least regions <= most regions, got 10 and 0",
    "data.min_regions": "expected 0 <= least regions <= most regions, got 101 and 100",
    "data.confidence": "expected a confidence threshold from 0 to below 1, got 1.5",
    "data.fixed_regions": "expected a fixed number of regions from 1, got 0",
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.workers", -1),
        ("data.max_regions", 0),
        ("data.min_regions", 101),
        ("data.confidence", 1.5),
        ("data.fixed_regions", 0),
        ("data.max_text", 0),
        ("model.freeze_layers", -1),
        ("batch.pool", 0),
        ("loss.margin", -1),
        ("aux.weight", ".nan"),
        ("aux.projection_scale", 0),
        ("aux.reference_batch", 0),
        ("aux.layers", [5]),
        ("optim.betas", [0.9, 1.0]),
        ("optim.eps", 0),
        ("optim.clip", -1),
        ("run.validate_every", -1),
        ("run.validation_anchors", 0),
        ("run.validation_candidates", 1),
        ("run.keep", 0),
    ],
)
def test_a_number_that_cannot_be_meant(
    field: str, value: Any, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"box rule: {RULE[field]}" if field in RULE else f"{field} is {str(value).lstrip('.')}"
    refused(capsys, train_words(sound, tmp_path / "run", **{field: value}), message)
    assert not (tmp_path / "run").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6000])


def not_finite(path: Path, feature: float = np.nan, box: float = 0.0) -> None:
    """Writes the database anew with features or boxes that are no numbers, past the check of the writer."""
    root = path.parent.parent
    shutil.rmtree(path.parent)
    source = synthetic_source()
    with ImageDBWriter(root) as images:
        for image, size in enumerate(source.n_regions):
            images.write(f"{image}.npz", source.features[image, :size].numpy(), source.boxes[image, :size, :6].numpy())
            record = {"features": np.full((size, 12), feature, "f4"), "norm_bb": np.full((size, 6), box, "f4")}
            images._writer.put(f"{image}.npz", images._pack(record))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "images truncated": ("img/feat_th0.2_max100_min10/data.mdb", truncate, "data.mdb is truncated"),
    "images empty": ("img/feat_th0.2_max100_min10/data.mdb", lambda p: p.write_bytes(b""), "not a readable LMDB"),
    "images not finite": ("img/feat_th0.2_max100_min10/data.mdb", not_finite, "are not finite numbers"),
    "boxes not finite": (
        "img/feat_th0.2_max100_min10/data.mdb",
        partial(not_finite, feature=0.0, box=np.nan),
        "boxes of",
    ),
    "counts cut": ("img/nbb_th0.2_max100_min10.json", lambda p: p.write_text('{"a'), "is not valid JSON"),
    "counts negative": (
        "img/nbb_th0.2_max100_min10.json",
        lambda p: p.write_text(json.dumps({f"{image}.npz": 2 - 5 * (image == 3) for image in range(20)})),
        "says -3 regions for '3.npz', expected 0 or more",
    ),
    "texts truncated": ("txt/train.db/data.mdb", truncate, "data.mdb is truncated"),
    "lengths gone": ("txt/train.db/id2len.json", lambda p: p.unlink(), "id2len.json is missing"),
    "lengths are words": ("txt/train.db/id2len.json", lambda p: p.write_text('{"0": "z"}'), "of whole numbers"),
    "images are numbers": ("txt/train.db/txt2img.json", lambda p: p.write_text('{"0": 1}'), "object of names"),
    "groups are words": ("txt/train.db/img2txts.json", lambda p: p.write_text('{"0": "a"}'), "object of lists"),
    "no special ids": ("txt/train.db/meta.json", lambda p: p.write_text("{}"), "lacks the ids of CLS, SEP"),
    "strange range": (
        "txt/train.db/meta.json",
        lambda p: p.write_text('{"CLS": 2, "SEP": 3, "v_range": ["a", 30]}'),
        "v_range in meta.json is ['a', 30], expected [first, end]",
    ),
    "specials outside": (
        "txt/train.db/meta.json",
        lambda p: p.write_text('{"CLS": 2, "SEP": 3, "v_range": [0, 3]}'),
        "CLS and SEP lie outside the vocabulary of 3",
    ),
    "pieces outside": (
        "txt/train.db/meta.json",
        lambda p: p.write_text('{"CLS": 2, "SEP": 3, "v_range": [0, 10]}'),
        "is beyond the vocabulary of 10",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damaged_data(name: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, damage, message = DAMAGE[name]
    damage(copy / path)
    refused(capsys, train_words(copy, tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_damage_met_while_training_keeps_what_was_done(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read from disk, a bad record is met in the middle of a run."""
    not_finite(copy / "img/feat_th0.2_max100_min10/data.mdb")
    refused(capsys, train_words(copy, tmp_path / "run", data__cache="disk"), "no checkpoint was written yet")


def other_width(folder: Path, images: range) -> Path:
    """An image database whose features of these images have 5 numbers, the others 12."""
    source = synthetic_source()
    with ImageDBWriter(folder) as writer:
        for image, size in enumerate(source.n_regions):
            features = source.features[image, :size, : 5 if image in images else 12].numpy()
            writer.write(f"{image}.npz", features, source.boxes[image, :size, :6].numpy())
    return folder


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_features_of_two_widths(cache: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"data__text": sound / "txt" / "train.db", "data__scenes": "null", "data__cache": cache}
    mixed = other_width(tmp_path / "mixed", range(9, 20))
    refused(capsys, train_words(sound, tmp_path / "run", data__images=mixed, **fields), "npz' have 5 numbers, those of")
    narrow = other_width(tmp_path / "narrow", range(20))
    fields |= {"data__val_text": sound / "txt" / "train.db", "data__images": sound / "img", "run__validate_every": 2}
    words = train_words(sound, tmp_path / "other", data__val_images=narrow, **fields)
    refused(capsys, words, "of the validation have 5 numbers, those of the training 12")
    assert not (tmp_path / "other").exists()


def test_a_database_of_another_rule_is_named(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "there is feat_th0.2_max100_min10, made by another rule"
    refused(capsys, train_words(sound, tmp_path / "run", data__confidence=0.3), message)


def test_a_file_in_the_place_of_the_run_folder(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine")
    refused(capsys, train_words(sound, tmp_path / "run"), "could not be written (File exists): choose another run.out")
    assert (tmp_path / "run").read_text() == "mine"


def test_readers_tell_the_vocabulary_and_the_counts(copy: Path) -> None:
    assert TextDB(copy / "txt" / "train.db").vocab_size == 30
    assert ImageDB(copy / "img").has_counts
    (copy / "img" / "nbb_th0.2_max100_min10.json").unlink()
    assert not ImageDB(copy / "img").has_counts
    sizes = synthetic_source().n_regions
    assert [ImageDB(copy / "img").count(f"{image}.npz") for image in range(len(sizes))] == sizes.tolist()


def test_an_import_that_wrote_nothing_leaves_nothing_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.tsv").write_text("1\t2\n")
    words = ["data", "import", "butd-tsv", str(tmp_path / "bad.tsv"), "--out", str(tmp_path / "img")]
    refused(capsys, words, "expected 6 columns")
    assert not list((tmp_path / "img").rglob("*.partial"))


def test_captions_that_fail_leave_no_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    image = {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "a", "sentid": 0}]}
    content = {"dataset": "mine", "images": [image, {"filename": "2.jpg", "split": "test"}]}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    words = ["data", "import", "karpathy-json", str(tmp_path / "mine.json"), "--out", str(tmp_path / "txt")]
    assert cli.main([*words, "--vocab", str(tmp_path / "vocab.txt")]) == 2
    assert "image 2.jpg is not as expected (KeyError('sentences'))" in capsys.readouterr().err
    assert not list((tmp_path / "txt").iterdir())


@pytest.mark.parametrize(
    ("rank", "error", "printed"),
    [
        ("0", UserError("wrong"), "cacr: wrong\n"),
        ("1", UserError("wrong"), ""),
        ("0", ProcessError("full"), "cacr: full\n"),
        ("1", ProcessError("full"), "cacr: process 1: full\n"),
    ],
)
def test_of_many_processes_the_first_speaks(
    rank: str, error: UserError, printed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(argv: list[str]) -> int:
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(doctor, "main", wrong)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == printed


def test_a_file_the_system_refuses_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(argv: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "/root/secret")

    monkeypatch.setattr(doctor, "main", refusing)
    refused(capsys, ["doctor"], "/root/secret: permission denied")
