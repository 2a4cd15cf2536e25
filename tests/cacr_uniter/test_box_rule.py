"""The box rule is the same in training, evaluation and check: from the options, the run or the folder's name; never
another in silence.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cacr_uniter import cli
from cacr_uniter.data.check import check_database
from cacr_uniter.data.lmdb import BoxRule, ImageDB, ImageDBWriter
from cacr_uniter.data.testing import packed, published_folder
from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.scoring import run_rule
from cacr_uniter.training.testing import SMALL, write_databases


def image_database(root: Path, rule: BoxRule | None = None) -> Path:
    """One image of fifty regions, thirteen of them above 0.2."""
    conf = np.concatenate([np.linspace(0.9, 0.3, 13), np.linspace(0.19, 0.01, 37)])
    with ImageDBWriter(root, rule) as writer:
        writer.write("a.npz", np.ones((50, 4)), np.zeros((50, 6)), conf)
    return writer.folder


@pytest.mark.parametrize(
    "rule", [BoxRule(), BoxRule(fixed=36), BoxRule(0.35, 40, 5), BoxRule(0.00001), BoxRule(0.0, 7, 7)]
)
def test_the_folder_tells_the_rule(rule: BoxRule) -> None:
    assert BoxRule.of_folder(rule.folder) == BoxRule.of_folder(f"{rule.folder}_compressed") == rule
    for name in ("all", "all_compressed", "feat_numbb", "feat_mine", "feat_th0.2_max100", f"{rule.folder}.partial"):
        assert BoxRule.of_folder(name) is None


def test_a_database_is_read_by_its_own_rule(tmp_path: Path) -> None:
    folder = image_database(tmp_path, BoxRule(fixed=36))
    for path in (tmp_path, folder):
        assert len(ImageDB(path).read("a.npz").boxes) == ImageDB(path).count("a.npz") == 36
        assert check_database(path).facts["regions"] == "36 to 36"
    adaptive = image_database(tmp_path)
    assert ImageDB(tmp_path).folder == adaptive, "the published rule before others"
    assert ImageDB(folder).count("a.npz") == 36
    adaptive.rename(tmp_path / "feat_th0.3_max100_min10")
    with pytest.raises(UserError, match=r"there is feat_numbb36, feat_th0\.3_max100_min10, made by another rule"):
        ImageDB(tmp_path)


def test_a_rule_against_the_folder_is_refused(tmp_path: Path) -> None:
    adaptive, fixed = image_database(tmp_path), image_database(tmp_path, BoxRule(fixed=36))
    for folder, rule, words in (
        (
            adaptive,
            BoxRule(fixed=5),
            r"\(confidence 0\.2, max regions 100, min regions 10\) than .* \(fixed regions 5\)",
        ),
        (adaptive, BoxRule(max_boxes=20), "max regions 20"),
        (fixed, BoxRule(), r"\(fixed regions 36\) than .* \(confidence 0\.2"),
    ):
        with pytest.raises(UserError, match=words):
            ImageDB(folder, rule)
    assert ImageDB(fixed, BoxRule(0.5, fixed=36)).count("a.npz") == 36, "bounds mean nothing beside a fixed number"
    mine = adaptive.rename(tmp_path / "mine")
    assert ImageDB(mine, BoxRule(fixed=5)).count("a.npz") == 5, "a name of one's own tells nothing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fixed-regions", "36"], None),
        (["--fixed-regions", "35"], "found none of feat_numbb35"),
        (["--max-regions", "36"], "found none of feat_th0.2_max36_min10"),
        (["--fixed-regions", "36", "--min-regions", "3"], "--fixed-regions stands instead of --min-regions"),
        (["--min-regions", "30", "--max-regions", "3"], "got 30 and 3"),
        (["--images", "x"], "--images belongs to a text database"),
    ],
)
def test_check_has_the_options_of_training(
    words: list[str], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_database(tmp_path, BoxRule(fixed=36))
    status = cli.main(["data", "check", str(tmp_path), *words])
    captured = capsys.readouterr()
    assert status == (0 if message is None else 2)
    assert (message or "36 to 36") in captured.out + captured.err


def test_check_refuses_a_rule_for_texts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_databases(tmp_path)
    check = ["data", "check", str(tmp_path / "txt" / "val.db"), "--fixed-regions", "3"]
    assert cli.main(check) == 2
    assert "a box rule belongs to an image database" in capsys.readouterr().err
    assert cli.main([*check, "--images", str(tmp_path / "img")]) == 2
    assert "found none of feat_numbb3" in capsys.readouterr().err


def test_evaluation_takes_the_rule_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on three regions of every image, with a database of the published rule beside it."""
    data, rule = write_databases(tmp_path / "data", BoxRule(fixed=3)), BoxRule(fixed=3)
    write_databases(tmp_path / "other")
    (tmp_path / "other" / "img" / BoxRule().folder).rename(data / "img" / BoxRule().folder)
    values = SMALL | {"run.out": tmp_path / "run", "data.scenes": data, "data.fixed_regions": 3, "optim.steps": 2}
    values |= {"run.validate_every": 2, "run.validation_candidates": 10, "run.validation_anchors": 4}
    assert cli.main(["train", "--progress", "false", *(f"--{k}={v}" for k, v in values.items())]) == 0
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert [run_rule(tmp_path / "run" / name) for name in ("", "best", step)] == [rule] * 3
    assert run_rule(step / "model.safetensors") is None
    used: list[str] = []
    read = ImageDB.count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDB, "count", lambda self, name: (used.append(self.folder.name), read(self, name))[1])
        retrieval = ["eval", "retrieval", "--checkpoint", str(tmp_path / "run"), "--data", str(data), "--json"]
        assert cli.main([*retrieval, "--out", str(tmp_path / "own")]) == 0
        assert set(used) == {"feat_numbb3"}
        used.clear()
        told = ["--max-regions", "100", "--out", str(tmp_path / "told")]
        assert cli.main([*retrieval, *told]) == 0
        assert set(used) == {BoxRule().folder}
    capsys.readouterr()
    folder = data / "img" / BoxRule().folder
    words = ["--text", str(data / "txt" / "val.db"), "--images", str(folder), "--out", str(tmp_path / "contradiction")]
    assert cli.main(["eval", "retrieval", "--checkpoint", str(tmp_path / "run"), *words]) == 2
    assert "made by another box rule (confidence 0.2" in capsys.readouterr().err
    examples = tmp_path / "winoground.json"
    examples.write_text(json.dumps([{"id": 0, "caption_0": "a", "caption_1": "b"}]))
    assert (
        cli.main(["eval", "winoground", "--checkpoint", str(tmp_path / "run"), *words[:4], "--examples", str(examples)])
        == 2
    )
    assert "made by another box rule (confidence 0.2" in capsys.readouterr().err


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "uniter.json").write_text("{}")
    for text in ("data: [", "data: 3", "- 1", "optim: {}"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml: cannot be read as the configuration of a run"):
            run_rule(tmp_path / "best")


@pytest.mark.parametrize(
    ("rule", "expected"), [(BoxRule(fixed=36), 36), (BoxRule(max_boxes=20), 20), (BoxRule(), 30), (None, 30)]
)
def test_a_folder_of_all_regions_without_confidences_is_cut_too(
    rule: BoxRule | None, expected: int, tmp_path: Path
) -> None:
    record = {"norm_bb": np.zeros((50, 6), np.float16), "features": np.ones((50, 4), np.float16)}
    published_folder(tmp_path / "all", {"a.npz": packed(record)})
    (tmp_path / "all" / "nbb.json").write_text('{"a.npz": 30}')
    database = ImageDB(tmp_path, rule)
    assert len(database.read("a.npz").boxes) == database.count("a.npz") == expected
