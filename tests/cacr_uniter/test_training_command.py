"""``cacr train`` from the outside: presets and fields, databases on disk, one sentence for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cacr_uniter.cli import main
from cacr_uniter.data.testing import Payload
from cacr_uniter.errors import UserError
from cacr_uniter.study import VARIANTS
from cacr_uniter.training import TrainConfig, train, trainer
from cacr_uniter.training.checks import check
from cacr_uniter.training.command import load_config, presets
from cacr_uniter.training.sizes import parse_size, show_size
from cacr_uniter.training.testing import (
    SMALL,
    numbers,
    small_config,
    small_run,
    write_databases,
)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # an option and its text on one line
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out.split("options:")[1]
    texts = {entry.split()[0]: " ".join(entry.split()) for entry in re.split(r"\n  (?=--)", printed)[1:]}
    assert texts["--preset"].split("program: ")[1].split(", ") == presets()
    for section, values in TrainConfig().as_dict().items():
        for name in values:
            text = texts[f"--{section}.{name}"].split("(type:")[0]
            assert len(re.sub(r"--[\w.+]+,?|\{.*?\}|\b[A-Z_]+\b|\[ITEM,...\]", "", text).split()) >= 2, text
    headings = [line for line in printed.splitlines() if line and not line.startswith(" ")]
    assert len(headings) == 7
    assert all(heading.endswith(":") and ". " not in heading for heading in headings)


def test_a_preset_is_no_field_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--preset", "demo", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert "preset" not in printed
    assert printed["optim"]["steps"] == load_config("demo").optim.steps


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {class_path: planted.Code}", "has no place for data.class_path"),
        ("data: part.yaml", "section data must hold fields, got 'part.yaml'"),
        ("optim: {lr: {class_path: planted.Code}}", "optim.lr must be one value or a list, got a mapping"),
        ("[" * 3000, "is not YAML"),
    ],
)
def test_a_configuration_file_imports_nothing(tmp_path, monkeypatch, content, message):
    (tmp_path / "planted.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Code: pass\n")
    (tmp_path / "part.yaml").write_text("class_path: planted.Code")
    (tmp_path / "config.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        load_config(arguments=["--config", "config.yaml"])
    with pytest.raises(UserError, match="--data is a section"):
        load_config(arguments=["--data", "part.yaml"])
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_databases(tmp_path_factory.mktemp("data"))


def arguments(root: Path, out: Path, **fields: Any) -> list[str]:
    """Command line of a small run."""
    values = SMALL | {"run.out": str(out), "data.scenes": str(root), "optim.steps": 3}
    values |= {name.replace("__", "."): value for name, value in fields.items()}
    return ["train", "--progress", "false", *(word for k, v in values.items() for word in (f"--{k}", str(v)))]


def records(out: Path) -> list[dict[str, Any]]:
    return numbers([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])


def test_the_command_trains_on_databases(databases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(databases, tmp_path / "run", run__validate_every=3)) == 0
    assert "finished after 3 steps" in capsys.readouterr().out
    assert [record["event"] for record in records(tmp_path / "run")] == ["train"] * 3 + ["validation"]
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["optim"]["lr"] == 1e-3
    assert main(["train", "--progress", "false", "--config", str(tmp_path / "run" / "config.yaml")]) == 0
    path = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert capsys.readouterr().out.splitlines()[0] == f"was finished after 3 steps; nothing to do: {path}"


def test_a_run_that_is_stopped_before_a_step_is_not_called_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = trainer.TrainResult(
        tmp_path, tmp_path / "step-00000003", step=3, finished=False, start=3, history=[], seconds=1.0
    )
    monkeypatch.setattr(trainer, "train", lambda *_, **__: stopped)
    assert main(["train", "--progress", "false"]) == 0
    assert capsys.readouterr().out.startswith("stopped; the same command continues after 3 steps")


def test_memory_and_disk_give_the_same_run(databases: Path, tmp_path: Path) -> None:
    for cache in ("memory", "disk"):
        assert main(arguments(databases, tmp_path / cache, data__cache=cache, data__workers=2)) == 0
    assert records(tmp_path / "memory") == records(tmp_path / "disk")


def test_training_goes_on_from_an_earlier_run(databases: Path, tmp_path: Path) -> None:
    assert main(arguments(databases, tmp_path / "one")) == 0
    second = arguments(databases, tmp_path / "two", model__checkpoint=str(tmp_path / "one"), optim__lr=1e-30)
    sizes = ("model.hidden_size", "model.num_hidden_layers", "model.num_attention_heads", "model.intermediate_size")
    for name in sizes:
        at = second.index(f"--{name}")
        del second[at : at + 2]
    assert main(second) == 0
    paths = [tmp_path / run / "checkpoints/step-00000003/model.safetensors" for run in ("one", "two")]
    from safetensors.torch import load_file

    one, two = (load_file(path) for path in paths)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-7)
    told = next(record for record in records(tmp_path / "two") if record["event"] == "weights")
    assert (told["step"], "tensors loaded, uniter names" in told["report"]) == (0, True)
    assert not [record for record in records(tmp_path / "one") if record["event"] == "weights"]


def test_the_report_tells_what_a_checkpoint_gave(databases: Path, tmp_path: Path) -> None:
    assert main(arguments(databases, tmp_path / "one", optim__steps=2)) == 0
    config = small_config(tmp_path / "two", model__checkpoint=str(tmp_path / "one"), run__report=True)
    small_run(config)
    assert "tensors loaded, uniter names" in (tmp_path / "two" / "report.md").read_text()


def test_a_run_is_repeated_without_deleting_it(databases: Path, tmp_path: Path) -> None:
    """run.overwrite holds for one start; in the saved configuration it deleted the run that was to be repeated."""
    assert main(arguments(databases, tmp_path / "run", run__overwrite="true")) == 0
    before = (tmp_path / "run" / "log.jsonl").read_text()
    assert main(["train", "--progress", "false", "--config", str(tmp_path / "run" / "config.yaml")]) == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def test_a_kill_while_the_configuration_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(small_config(tmp_path, optim__steps=2))
    before = (tmp_path / "config.yaml").read_text()
    monkeypatch.setattr("cacr_uniter.training.checkpoint.os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small_run(small_config(tmp_path, optim__steps=2, run__log_every=2))
    assert (tmp_path / "config.yaml").read_text() == before


@pytest.mark.parametrize("source", ["scores", "qk"])
def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(
    databases: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cuda takes no CPU tensors anywhere; triton does where other tests of the process interpret its kernels."""
    assert main(arguments(databases, tmp_path / "run", aux__backend="cuda", aux__source=source)) == 2
    assert "aux.backend is cuda: backend='cuda' cannot run this input: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lr", "fast"], "optim.lr"),
        (["--optim.speed", "1"], "optim.speed"),
        (["--aux.loss", "cacrr"], "aux.loss"),
        (["--preset", "flickr"], "no preset 'flickr': there are aux-cacr"),
        (["--preset"], "--preset needs a name"),
        (["--config", "/nowhere/x.yaml"], "/nowhere/x.yaml"),
        (["--data.scenes", "/nowhere"], "data.scenes /nowhere is no folder"),
        (["--data.text", "/nowhere/t.db", "--data.images", "/nowhere/i"], "/nowhere/t.db"),
        ([], "no training data: give data.scenes"),
        (["--optim.steps", "0"], "optim.steps is 0"),
        (["--optim.lr", ".nan"], "optim.lr is nan"),
        (["--optim.warmup", "9999"], "optim.warmup is 9999: it must lie between 0 and optim.steps (5000)"),
        (["--model.dropout", "1"], "model.dropout is 1"),
        (["--batch.pool", "3"], "batch.pool is 3"),
        (["--batch.pairs_per_forward", "31"], "batch.pairs_per_forward is 31"),
        (["--run.precision", "fp16", "--run.device", "cpu"], "run.precision fp16 needs a GPU"),
        (["--run.memory_limit", "lots", "--run.device", "cpu"], "run.memory_limit is 'lots'"),
        (["--run.threads", "0"], "run.threads is 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch__pool": 39}, "39 negatives are wanted of 38 captions of other images"),
        ({"model__vocab_size": 20}, "model.vocab_size is 20, the captions use a vocabulary of 30"),
        ({"model__img_dim": 2048}, "model.img_dim is 2048, the region features have 12 numbers"),
        ({"model__hidden_size": 15}, "model.hidden_size: expected a multiple of num_attention_heads=2, got 15"),
        ({"model__freeze_layers": 3}, "model.freeze_layers"),
        ({"model__checkpoint": "/nowhere.pt"}, "/nowhere.pt"),
        ({"data__max_text": 1}, "no caption of at most 1 word pieces"),
        ({"data__cache": "memory", "data__cache_limit": "1kB"}, "data.cache memory needs"),
        ({"run__resume": "/nowhere"}, "/nowhere is no checkpoint"),
    ],
)
def test_data_and_model_must_fit(
    databases: Path, tmp_path: Path, fields: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(databases, tmp_path / "run", **fields)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_pickled_checkpoint_is_not_run(databases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Payload(tmp_path / "ran")}, tmp_path / "bad.pt")
    assert main(arguments(databases, tmp_path / "run", model__checkpoint=tmp_path / "bad.pt", model__img_dim=12)) == 2
    assert "never run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_scene_set_and_paths_of_databases_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.scenes stands for"):
        train(load_config(None, ["--data.scenes", str(tmp_path), "--data.text", "x", "--run.device", "cpu"]))


@pytest.mark.parametrize("name", [name for name in presets() if not name.startswith("aux-")])
@pytest.mark.parametrize("aux", [name for name in presets() if name.startswith("aux-")])
def test_presets_combine_and_are_valid(name: str, aux: str) -> None:
    config = load_config(name, ["--preset", aux])
    check(config)
    assert config.aux.loss == aux.removeprefix("aux-")
    if name.startswith("flickr"):
        assert (config.batch.pool, config.batch.negatives, config.batch.mining) == (399, 31, "hard")
        assert (config.optim.lr, config.optim.steps, config.optim.warmup, config.optim.clip) == (5e-5, 5000, 500, 2.0)
        assert config.model.freeze_layers == (12 if name == "flickr-large" else 0)


def test_the_large_preset_is_the_base_one_but_for_its_size(tmp_path: Path) -> None:
    base, large = (load_config(name).as_dict() for name in ("flickr-base", "flickr-large"))
    changed = {"size": "large", "checkpoint": "data/pretrained/uniter-large.pt", "freeze_layers": 12}
    assert large == base | {
        "model": base["model"] | changed,
        "run": base["run"] | {"out": "runs/flickr-large"},
    }


def test_a_file_builds_on_a_preset(
    databases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text('optim: {lr: 3e-5, steps: 7}\n"extends": flickr-base\nrun: {resume: "no", log_every: 3}\n')
    config = load_config(None, ["--optim.clip", "9", f"--config={mine}", "--optim.warmup", "1"])
    assert (config.optim.lr, config.optim.steps, config.optim.warmup, config.optim.clip) == (3e-5, 7, 1, 2.0)
    assert (config.run.resume, config.run.log_every, config.batch.pool) == ("no", 3, 399)
    mine.write_text("extends: aux-none\n")
    assert load_config("demo", ["--config", str(mine)]).aux.loss == "none"
    presets = tmp_path / "presets"
    presets.mkdir()
    monkeypatch.setattr("cacr_uniter.training.command.PRESETS", presets)
    (presets / "one.yaml").write_text("extends: two\noptim: {steps: 3}\n")
    (presets / "two.yaml").write_text("optim: {steps: 9, warmup: 0}\n")
    assert main([*arguments(databases, tmp_path / "run"), "--preset", "one"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "extends" not in saved
    assert (saved["optim"]["steps"], saved["optim"]["warmup"]) == (3, 0)
    (presets / "two.yaml").write_text("extends: one\n")
    for text, message in (
        ("extends: one", "two.yaml: extends one leads back to itself"),
        ("extends: three", "no preset 'three': there are one, two"),
        ("extends: [one]", "extends is ['one']: name one preset of one, two"),
        ("extends: one.yaml", "no preset 'one.yaml'"),
    ):
        mine.write_text(text)
        capsys.readouterr()
        assert main(["train", "--config", str(mine)]) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1
    (presets / "two.yaml").write_text("optim: {lr: fast}")
    mine.write_text("extends: two\nrun: {seed: 1}")
    assert main(["train", "--config", str(mine)]) == 2
    assert "optim.lr: expected a number, got fast" in capsys.readouterr().err
    (presets / "two.yaml").write_text("optim: {lr: 1}")
    mine.write_text("extends: two\noptim: {lr: fast}")
    assert main(["train", "--config", str(mine)]) == 2
    assert "optim.lr: expected a number, got fast" in capsys.readouterr().err


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_of_the_study_are_valid(variant: str) -> None:
    check(load_config("demo", list(VARIANTS[variant])))


def test_defaults_are_the_published_recipe() -> None:
    config = TrainConfig()
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.98), 1e-6, 0.01)
    assert (config.loss.margin, config.batch.negatives, config.batch.pool, config.data.max_text) == (0.2, 31, 399, 60)
    assert (config.aux.kind, config.aux.heads, config.aux.sides, config.aux.schedule) == (
        "probs",
        "mean",
        "both",
        "exp",
    )
    check(config)


def test_sizes() -> None:
    assert [parse_size(text, "x") for text in ("11GB", "11GiB", "1.5 kB", "7")] == [11 * 10**9, 11 * 2**30, 1500, 7]
    assert [show_size(size) for size in (12, 11_000, 2.5e9, 3e12)] == ["12 B", "11.0 kB", "2.5 GB", "3000.0 GB"]
    for text in ("", "GB", "-1GB", "0", "1.2.3GB", "11 gigs"):
        with pytest.raises(UserError, match="x is"):
            parse_size(text, "x")
