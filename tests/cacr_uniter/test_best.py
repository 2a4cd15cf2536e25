"""The weights that did best in a validation: which are kept, whole at any moment, and usable like a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.scoring import load_model
from cacr_uniter.model import UniterConfig, UniterForRetrieval
from cacr_uniter.training.best import METRICS, Best
from cacr_uniter.training.checkpoint import MODEL, SUMS, verify_weights
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.data import open_dataset, open_source, resolve
from cacr_uniter.training.source import MemorySource
from cacr_uniter.training.step import Stepper
from cacr_uniter.training.testing import VOCABULARY, small_config, small_run, synthetic_source, write_databases
from cacr_uniter.training.validation import measure, validate


def model(seed: int) -> UniterForRetrieval:
    torch.manual_seed(seed)
    return UniterForRetrieval(UniterConfig(50, 8, 1, 2, 16, img_dim=4))


def record(step: int, images: float, captions: float = 0.0, rank: float = 1.0) -> dict[str, Any]:
    return {"step": step, "ir_r1": images, "tr_r1": captions, "ir_rank": rank, "tr_rank": rank}


def kept(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "best" / MODEL)


def test_the_best_weights_are_kept_and_ties_stay_with_the_first(tmp_path: Path) -> None:
    models, best = [model(seed) for seed in range(4)], Best(tmp_path, "ir_r1")
    assert best.path is None
    offered = [best.offer(record(step, value), models[step]) for step, value in enumerate((10.0, 30.0, 30.0, 20.0))]
    assert offered == [True, True, False, False]
    assert str(best) == f"step 1, ir_r1 30.00: {tmp_path / 'best'}"
    for name, value in models[1].state_dict().items():
        assert torch.equal(kept(tmp_path)[name], value), name
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [SUMS, MODEL, "uniter.json"]


@pytest.mark.parametrize(
    ("metric", "winner"), [("mean_r1", 1), ("ir_r1", 0), ("tr_r1", 1), ("mean_rank", 2), ("none", None)]
)
def test_the_metric_decides(tmp_path: Path, metric: str, winner: int | None) -> None:
    best = Best(tmp_path, metric)
    for step, values in enumerate(((40.0, 10.0, 5.0), (30.0, 30.0, 4.0), (20.0, 20.0, 3.0))):
        best.offer(record(step, *values), model(0))
    assert best.step == (-1 if winner is None else winner)
    assert (tmp_path / "best").exists() == (winner is not None)


def test_a_score_that_is_no_number_is_never_best(tmp_path: Path) -> None:
    assert not Best(tmp_path, "ir_r1").offer(record(1, float("nan")), model(0))


def test_scores_that_are_no_numbers_are_the_worst_rank(tmp_path: Path) -> None:
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    stepper = SimpleNamespace(
        accelerator=accelerator, model=model(0), score=lambda batch: torch.full((len(batch),), float("nan"))
    )
    fields = {"run__validation_candidates": 5, "run__validation_anchors": 6}
    found = validate(stepper, synthetic_source(), small_config(tmp_path, **fields))  # type: ignore[arg-type]
    assert (found["ir_r1"], found["tr_r1"], found["ir_rank"], found["tr_rank"]) == (0.0, 0.0, 5.0, 5.0)


def test_a_later_part_of_the_run_remembers_it(tmp_path: Path) -> None:
    Best(tmp_path, "ir_r1").offer(record(4, 30.0), model(0))
    again = Best(tmp_path, "ir_r1", start=6)
    assert (again.step, again.value) == (4, 30.0)
    assert not again.offer(record(8, 25.0), model(1))
    assert Best(tmp_path, "ir_r1", start=2).offer(record(4, 25.0), model(1)), "weights of a lost step must give way"
    assert Best(tmp_path, "tr_r1", start=6).offer(record(8, 0.0, 1.0), model(1)), "another metric begins anew"


def test_values_of_another_measure_are_not_compared(tmp_path: Path) -> None:
    Best(tmp_path, "ir_r1", measured="2 candidates").offer(record(4, 70.0), model(0))
    same = Best(tmp_path, "ir_r1", 6, measured="2 candidates")
    assert (same.value, same.remark) == (70.0, "")
    assert Best(tmp_path, "ir_r1", 6).step == 4, "no validation comes: they stay the run's best"
    other = Best(tmp_path, "ir_r1", 6, measured="12 candidates")
    assert "of step 4, were chosen by ir_r1 on 2 candidates, now it is ir_r1 on 12 candidates" in other.remark
    assert other.path is None
    assert other.offer(record(8, 30.0), model(1))


def test_a_measure_is_that_of_settings_and_data(tmp_path: Path) -> None:
    data = replace(TrainConfig().data, scenes=str(write_databases(tmp_path)), cache="disk")
    dataset = open_dataset(resolve(data), "val")
    assert dataset is not None
    disk = open_source(dataset, data)
    assert not isinstance(disk, MemorySource)
    run = TrainConfig().run
    expected = measure(disk, run)
    assert measure(MemorySource.load(disk), replace(run, out="elsewhere", threads=1)) == expected
    others = [measure(synthetic_source(seed=1), run), measure(synthetic_source(n_images=10), run)]
    others += [measure(disk, replace(run, **{name: 7})) for name in ("validation_anchors", "validation_candidates")]
    assert len({expected, measure(disk, replace(run, seed=7)), *others}) == 6


def test_damaged_weights_count_as_none(tmp_path: Path) -> None:
    Best(tmp_path, "ir_r1").offer(record(4, 30.0), model(0))
    (tmp_path / "best" / MODEL).write_bytes(b"\x80" * 50)
    assert Best(tmp_path, "ir_r1", start=6).path is None


@pytest.mark.parametrize("name", [MODEL, "uniter.json", SUMS])
def test_one_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    Best(tmp_path, "ir_r1").offer(record(4, 30.0), model(0))
    verify_weights(tmp_path / "best" / MODEL)
    data = bytearray((tmp_path / "best" / name).read_bytes())
    data[-1] ^= 4
    (tmp_path / "best" / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"checkpoint {tmp_path}/best is damaged \({name}.*: copy it again, or take"):
        verify_weights(tmp_path / "best" / MODEL)


def test_killed_before_the_checksums_are_written_the_weights_are_still_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def killed(path: Path, value: Any) -> None:
        if path.name == SUMS:
            raise Killed

    best = Best(tmp_path, "ir_r1")
    best.offer(record(1, 10.0), model(0))
    monkeypatch.setattr("cacr_uniter.training.best.write_json", killed)
    with pytest.raises(Killed):
        best.offer(record(2, 20.0), model(1))
    assert torch.equal(kept(tmp_path)["rank_output.weight"], model(1).rank_output.weight)
    verify_weights(tmp_path / "best" / MODEL)


@pytest.mark.parametrize("function", ["cacr_uniter.training.best.save_file", "cacr_uniter.files.flush"])
def test_a_refused_write_leaves_the_weights_before(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Best(tmp_path, "ir_r1")
    best.offer(record(1, 10.0), model(0))
    before = (tmp_path / "best" / MODEL).read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(function, full)
    with pytest.raises(UserError, match=r"best weights .* could not be written \(no space left on the device\)"):
        best.offer(record(2, 20.0), model(1))
    assert (tmp_path / "best" / MODEL).read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [SUMS, MODEL, "uniter.json"]
    assert best.step == 1


def test_a_run_keeps_it_names_it_and_others_can_start_from_it(tmp_path: Path) -> None:
    fields = {"run__validate_every": 2, "run__report": True, "optim__lr": 3e-2, "run__checkpoint_every": 4}
    config = small_config(tmp_path / "run", **fields)
    result = small_run(config, validation=synthetic_source(seed=1))
    validated = {r["step"]: METRICS["mean_r1"](r) for r in result.history if r["event"] == "validation"}
    assert len(set(validated.values())) > 1, "the run must be able to tell steps apart"
    step = max(validated, key=lambda step: (validated[step], -step))
    assert result.best_path == tmp_path / "run" / "best"
    assert result.report_path is not None
    assert f"step {step}, mean_r1 {validated[step]:.2f}" in result.report_path.read_text()
    loaded = load_model(result.best_path, None, VOCABULARY, 12, torch.device("cpu"))
    for name, value in loaded.state_dict().items():
        assert torch.equal(kept(tmp_path / "run")[name], value), name
    sizes = {f"model__{name}": "null" for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {"model__intermediate_size": "null", "model__checkpoint": result.best_path, "optim__steps": 2}
    assert small_run(small_config(tmp_path / "next", **sizes)).finished


def test_killed_and_resumed_the_same_weights_are_best(tmp_path: Path) -> None:
    """The killed run had kept weights of a step after its last checkpoint."""
    fields = {"run__validate_every": 3, "run__checkpoint_every": 4, "optim__lr": 3e-2}
    validation = synthetic_source(seed=1)
    small_run(small_config(tmp_path / "whole", **fields), validation=validation)
    out = tmp_path / "killed"

    class Killed(Exception):
        pass

    def die(model: UniterForRetrieval, step: int) -> dict[str, float]:
        if step == 6:
            raise Killed
        return {}

    with pytest.raises(Killed):
        small_run(small_config(out, **fields), validation=validation, evaluate=die)
    small_run(small_config(out, **fields), validation=validation)
    for name, value in kept(tmp_path / "whole").items():
        assert torch.equal(kept(out)[name], value), name
    sizes = [json.loads((run / "best" / "uniter.json").read_text()) for run in (tmp_path / "whole", out)]
    assert sizes[0] == sizes[1]


@pytest.fixture
def killed_at_5(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a configuration that is killed in the step after its fifth."""

    def dying(self: Stepper, step: int, begin: Any = Stepper.begin) -> None:
        if step == 5:
            raise RuntimeError("killed")
        begin(self, step)

    def run(config: TrainConfig) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Stepper, "begin", dying)
            with pytest.raises(RuntimeError, match="killed"):
                small_run(config, validation=synthetic_source(seed=1))

    return run


def test_resumed_with_other_candidates_the_best_is_chosen_anew(
    tmp_path: Path, killed_at_5: Callable[..., None]
) -> None:
    """Of 2 candidates the match is the first more often than of 12."""
    fields = {"run__validate_every": 3, "run__checkpoint_every": 4}
    killed_at_5(small_config(tmp_path, run__validation_candidates=2, **fields))
    result = small_run(
        small_config(tmp_path, run__validation_candidates=12, **fields), validation=synthetic_source(seed=1)
    )
    values = {r["step"]: METRICS["mean_r1"](r) for r in result.history if r["event"] == "validation"}
    assert values[3] > max(values[6], values[8]), "of 2 candidates"
    with safe_open(tmp_path / "best" / MODEL, framework="numpy") as file:
        assert int(file.metadata()["step"]) == max((6, 8), key=lambda step: (values[step], -step))
    (remark,) = [r for r in result.history if r["event"] == "best"]
    assert (remark["step"], "the next validation starts anew" in remark["report"]) == (4, True)


def test_the_best_of_a_run_that_is_not_continued_is_set_aside(
    tmp_path: Path, killed_at_5: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        killed_at_5(small_config(tmp_path, run__validate_every=3, run__checkpoint_every=100))
        before = kept(tmp_path)
        result = small_run(small_config(tmp_path, optim__lr=1e-4, run__report=True), progress=True)
        assert result.best_path is None
        assert result.report_path is not None
        assert "best on validation" not in result.report_path.read_text()
        assert not (tmp_path / "best").exists()
        assert f"{tmp_path}/best is of an earlier run" in capsys.readouterr().err
        (remark,) = [r["report"] for r in result.history if r["event"] == "best"]
        assert remark.endswith(f"best-{number} now")
        aside = load_file(tmp_path / f"best-{number}" / MODEL)
        assert all(torch.equal(value, before[name]) for name, value in aside.items())
        shutil.rmtree(tmp_path / "checkpoints")
