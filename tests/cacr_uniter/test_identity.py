"""Runs know the vocabulary and the pairs they were trained on: others are refused, wherever the data lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cacr_uniter import cli
from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.data.joined import check_vocabularies
from cacr_uniter.data.lmdb import ImageDB, ImageDBWriter, TextDB, TextDBWriter
from cacr_uniter.training.testing import SMALL, VOCABULARY, write_databases

SPECIAL = {"UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4}
STATE = "checkpoints/step-00000002/state.json"


def words(out: Path, data: Path, text: Path | None = None, images: Path | None = None, **fields: Any) -> list[str]:
    """A command of two steps on the databases of a scene set, or others in their place."""
    values = SMALL | {"run.out": out, "optim.steps": 2, "data.images": images or data / "img"}
    values |= {"data.text": text or data / "txt" / "train.db"}
    values |= {name.replace("__", "."): value for name, value in fields.items()}
    return ["train", "--progress", "false", *(f"--{name}={value}" for name, value in values.items())]


def texts(
    folder: Path,
    source: Path,
    special: dict[str, int] = SPECIAL,
    size: int = VOCABULARY,
    drop: int = 0,
    prefix: str = "",
) -> Path:
    """The captions of a database anew: another vocabulary, the first `drop` left out, a prefix before their ids."""
    old = TextDB(source)
    with TextDBWriter(folder, special, size, "vocab") as writer:
        for key in old.ids()[drop:]:
            caption = old.caption(key)
            writer.write(prefix + key, caption.input_ids, caption.image)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_databases(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with a validation."""
    out = tmp_path_factory.mktemp("run") / "run"
    fields = {"data__val_text": data / "txt" / "val.db", "run__validate_every": 2}
    assert cli.main(words(out, data, **fields)) == 0
    return out


OTHERS: list[tuple[dict[str, int], int]] = [(SPECIAL, 29), (SPECIAL, 31), (SPECIAL | {"CLS": 3, "SEP": 2}, 30)]


@pytest.mark.parametrize(("special", "size"), [*OTHERS, (SPECIAL | {"MASK": 0}, 30)])
def test_databases_of_different_vocabularies_do_not_go_together(
    special: dict[str, int], size: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = texts(tmp_path / "other.db", data / "txt" / "val.db", special, size)
    fields = {"data__val_text": other, "run__validate_every": 2}
    assert cli.main(words(tmp_path / "run", data, **fields)) == 2
    message = capsys.readouterr().err
    assert "have different vocabularies: 30 pieces (CLS 2, SEP 3, MASK 4) and" in message
    assert f"{size} pieces (CLS {special['CLS']}, SEP {special['SEP']}, MASK {special['MASK']})" in message
    assert not (tmp_path / "run").exists()


def test_what_a_database_does_not_tell_is_no_difference(data: Path, tmp_path: Path) -> None:
    """Published databases begin v_range after unused pieces, ours after the special ones; old ones lack MASK."""
    source = data / "txt" / "train.db"
    folder = texts(tmp_path / "old.db", source)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["MASK"]
    (folder / "meta.json").write_text(json.dumps(meta | {"v_range": [9, VOCABULARY]}))
    check_vocabularies(TextDB(source), TextDB(folder))


@pytest.mark.parametrize(("special", "size"), [OTHERS[0], OTHERS[2]])
@pytest.mark.parametrize("part", ["", "best"])
def test_a_run_is_evaluated_with_its_own_vocabulary(
    special: dict[str, int], size: int, part: str, run: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = texts(tmp_path / "other.db", data / "txt" / "val.db", special, size)
    options = ["eval", "retrieval", "--checkpoint", str(run / part), "--images", str(data / "img"), "--device", "cpu"]
    assert cli.main([*options, "--text", str(other), "--out", str(tmp_path / "scores")]) == 2
    message = capsys.readouterr().err
    assert "was trained on captions of another vocabulary: 30 pieces (CLS 2, SEP 3, MASK 4)" in message
    assert not (tmp_path / "scores").exists()
    assert cli.main([*options, "--text", str(data / "txt" / "val.db"), "--out", str(tmp_path / "scores")]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_run_that_does_not_know_its_vocabulary_is_evaluated_as_before(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "best", tmp_path / "best")
    sizes = json.loads((tmp_path / "best" / "uniter.json").read_text())
    assert sizes.pop("vocabulary") == {"size": 30, "CLS": 2, "SEP": 3, "MASK": 4}
    (tmp_path / "best" / "uniter.json").write_text(json.dumps(sizes))
    (tmp_path / "best" / "checksums.json").unlink()
    other = texts(tmp_path / "other.db", data / "txt" / "val.db", SPECIAL, 29)
    options = ["--text", str(other), "--images", str(data / "img"), "--out", str(tmp_path / "scores")]
    assert cli.main(["eval", "retrieval", "--checkpoint", str(tmp_path / "best"), "--device", "cpu", *options]) == 0
    assert "has a vocabulary of 30 word pieces, the data one of 29" in capsys.readouterr().err


def test_weights_of_another_vocabulary(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file tells only its size: a smaller one of the captions is warned of. A run tells all: it is refused."""
    other = texts(tmp_path / "other.db", data / "txt" / "train.db", SPECIAL, 29)
    sizes = json.loads((run / "best" / "uniter.json").read_text())
    del sizes["vocabulary"]
    (tmp_path / "size.json").write_text(json.dumps(sizes))
    save_file(load_file(run / "best" / "model.safetensors"), tmp_path / "published.safetensors")
    fields = {"model__size": tmp_path / "size.json", "model__checkpoint": tmp_path / "published.safetensors"}
    command = words(tmp_path / "run", data, other, **fields)
    assert cli.main(command) == 0
    warning = "has a vocabulary of 30 word pieces, the text database one of 29"
    assert warning in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [warning in record["report"] for record in log if record["event"] == "data"] == [True]
    assert cli.main(words(tmp_path / "two", data, other, **fields | {"model__checkpoint": run})) == 2
    assert "another vocabulary: 30 pieces (CLS 2, SEP 3, MASK 4), those of the" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def images(folder: Path, source: Path, width: int) -> Path:
    """The images of a database with narrower features."""
    old = ImageDB(source)
    with ImageDBWriter(folder, dtype="float32") as writer:
        for name in old.names():
            record = old.record(name)
            writer.write(name, record["features"][:, :width], record["norm_bb"])
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": 2}, "captions: 40 -> 38; images: 20 -> 19"),
        ({"prefix": "x"}, "other ids, lengths, images or vocabulary of the captions"),
        ({"size": 31}, "other ids, lengths, images or vocabulary of the captions"),
        ({"width": 11}, "feature_dim: 12 -> 11"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    change: dict[str, Any], message: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if "width" in change:
        command = words(out, data, images=images(tmp_path / "img", data / "img", **change))
    else:
        command = words(out, data, texts(tmp_path / "other.db", data / "txt" / "train.db", **change))
    assert cli.main(command) == 2
    assert f"belongs to a run on other training data ({message}): give the same captions" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_data_may_move_between_the_parts_of_a_run(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "moved")
    shutil.copytree(run, tmp_path / "run")
    assert cli.main(words(tmp_path / "run", tmp_path / "moved")) == 0
    assert "was finished after 2 steps" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_know_its_data_goes_on_as_before(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    state = json.loads((tmp_path / "run" / STATE).read_text())
    assert state["extra"].pop("data")["captions"] == 40
    (tmp_path / "run" / STATE).write_text(json.dumps(state))
    other = texts(tmp_path / "other.db", data / "txt" / "train.db", prefix="x")
    assert cli.main(words(tmp_path / "run", data, other)) == 0


def test_captions_without_an_image_may_be_left_out_of_the_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ImageDB(data / "img")
    with ImageDBWriter(tmp_path / "img", dtype="float32") as writer:
        for name in old.names()[1:]:
            record = old.record(name)
            writer.write(name, record["features"], record["norm_bb"])
    assert cli.main(words(tmp_path / "no", data, images=tmp_path / "img")) == 2
    message = capsys.readouterr().err
    assert "1 of 20 images of the captions are missing, first '0.npz'" in message
    assert "leave their captions out (data.missing skip)" in message
    skip = words(tmp_path / "run", data, images=tmp_path / "img", data__missing="skip")
    assert cli.main(skip) == 0
    told = "1 of 20 images of the captions are missing, first '0.npz': 2 captions left out (data.missing skip)"
    assert told in capsys.readouterr().err
    assert told in (tmp_path / "run" / "log.jsonl").read_text()
    state = json.loads((tmp_path / "run" / STATE).read_text())
    assert (state["extra"]["data"]["captions"], state["extra"]["data"]["images"]) == (38, 19)
    validation = {"data__val_text": data / "txt" / "val.db", "run__validate_every": 2}
    assert cli.main(words(tmp_path / "val", data, images=tmp_path / "img", data__missing="skip", **validation)) == 2
    assert "validation and evaluation leave no caption out" in capsys.readouterr().err
    options = ["--text", str(data / "txt" / "val.db"), "--images", str(tmp_path / "img"), "--device", "cpu"]
    assert cli.main(["eval", "retrieval", "--checkpoint", str(tmp_path / "run"), "--out", "x", *options]) == 2
    assert "validation and evaluation leave no caption out" in capsys.readouterr().err


def test_captions_beyond_the_positions_of_the_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest captions have six pieces; the model takes five."""
    train, val = data / "txt" / "train.db", data / "txt" / "val.db"
    (tmp_path / "size.json").write_text(json.dumps({"max_position_embeddings": 7}))
    fields = {"model__size": tmp_path / "size.json"}
    for more in ([], ["--plan"]):
        assert cli.main([*words(tmp_path / "run", data, train, **fields), *more]) == 2
        message = capsys.readouterr().err
        assert "has 6 word pieces and the model takes 5; leave such captions out of the training with" in message
        assert "data.max_text 5 or less" in message
    fields |= {"data__max_text": 5}
    assert cli.main(words(tmp_path / "run", data, train, data__val_text=val, run__validate_every=2, **fields)) == 2
    message = capsys.readouterr().err
    assert f"{val}: caption" in message
    assert "shorten or remove it" in message
    assert "max_text" not in message
    assert cli.main(words(tmp_path / "run", data, train, **fields)) == 0
    options = ["--text", str(val), "--images", str(data / "img"), "--out", str(tmp_path / "x"), "--device", "cpu"]
    assert cli.main(["eval", "retrieval", "--checkpoint", str(tmp_path / "run"), *options]) == 2
    assert "the model takes 5; shorten or remove it" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_identity_of_the_data_reads_no_records(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = RetrievalDataset(TextDB(data / "txt" / "train.db"), ImageDB(data / "img"))
    assert dataset.feature_dim == 12
    monkeypatch.setattr(ImageDB, "record", lambda *_: 1 / 0)
    monkeypatch.setattr(TextDB, "caption", lambda *_: 1 / 0)
    assert dataset.identity()["captions"] == 40
