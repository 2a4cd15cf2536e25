"""The training loop: it learns, mines what it says, trains what it says, and says what went wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cacr_uniter import files
from cacr_uniter.errors import UserError
from cacr_uniter.training import checkpoint as checkpoints
from cacr_uniter.training.build import build_accelerator, build_model, model_config
from cacr_uniter.training.logs import RunLog
from cacr_uniter.training.optim import FlatGradients, build_optimizer, decayed, trained_parameters
from cacr_uniter.training.step import Stepper
from cacr_uniter.training.testing import VOCABULARY, numbers, small_config, small_run, synthetic_source


def make_stepper(out: Path, **fields: Any) -> Stepper:
    config = small_config(out, **fields)
    source = synthetic_source()
    model, _ = build_model(config.model, model_config(config.model, VOCABULARY, source.img_dim), config.run.seed)
    accelerator = build_accelerator(config.run)
    model.to(accelerator.device)
    parameters = trained_parameters(model)
    optimizer = accelerator.prepare_optimizer(build_optimizer(parameters, config.optim), device_placement=False)
    return Stepper(model, list(parameters.values()), optimizer, config, source, accelerator)


def gradient(stepper: Stepper, step: int = 0) -> torch.Tensor:
    """The whole gradient of one step, before clipping."""
    stepper.begin(step)
    for portion in stepper.portions(step):
        stepper.backward(portion)
        if portion.last:
            break
    return stepper.gradients.buffer.clone()


@pytest.mark.parametrize("loss", ["margin", "softmax"])
def test_it_learns_to_match(tmp_path: Path, loss: str) -> None:
    result = small_run(
        small_config(
            tmp_path,
            loss__kind=loss,
            aux__normalise="accum",
            model__dropout=0.0,
            model__hidden_size=32,
            batch__mining="random",
            batch__anchors=8,
            batch__pairs_per_forward=64,
            optim__lr=3e-3,
            optim__steps=150,
            optim__warmup=20,
            run__log_every=25,
            run__checkpoint_every=150,
        )
    )
    first = [record["first"] for record in result.history]
    assert first[0] < 0.32, "chance is 0.25"
    assert first[-1] > 0.35


def test_hard_negatives_are_the_highest_scored_of_the_pool(tmp_path: Path) -> None:
    stepper = make_stepper(tmp_path, batch__score_chunk=5)
    stepper.begin(0)
    portion = next(stepper.portions(0))
    mined = stepper._mine(portion.pairs, len(portion.groups))
    assert stepper.model.training
    stepper.model.eval()
    with torch.no_grad():
        scores = stepper.model(portion.pairs.batch()).rank_scores.view(len(portion.groups), -1)
        chosen = stepper.model(mined).rank_scores.view(len(portion.groups), -1)
    torch.testing.assert_close(chosen[:, 0], scores[:, 0])
    hardest = scores[:, 1:].sort(dim=1, descending=True).values[:, :3]
    torch.testing.assert_close(chosen[:, 1:].sort(dim=1, descending=True).values, hardest)


@pytest.mark.parametrize(
    ("fields", "portions"),
    [
        ({"batch__pairs_per_forward": 4}, 8),
        ({"batch__pairs_per_forward": 12}, 3),
        ({"batch__pairs_per_forward": 64}, 1),
    ],
)
@pytest.mark.parametrize("loss", ["none", "cacr"])
def test_portions_only_cut_the_work(tmp_path: Path, fields: dict[str, Any], portions: int, loss: str) -> None:
    common = {"model__dropout": 0.0, "batch__anchors": 4, "aux__loss": loss, "aux__sides": "alternate"}
    whole = make_stepper(tmp_path, batch__pairs_per_forward=32, **common)
    cut = make_stepper(tmp_path, **common | fields)
    assert sum(portion.step == 0 for portion in cut.portions(7)) == 0
    assert sum(portion.step == 7 for portion in cut.portions(7)) == portions
    torch.testing.assert_close(gradient(cut), gradient(whole), rtol=1e-4, atol=1e-7)


def test_activation_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    plain = make_stepper(tmp_path, aux__layers="[-1,0]")
    checkpointed = make_stepper(tmp_path, aux__layers="[-1,0]", model__activation_checkpointing=True)
    torch.testing.assert_close(gradient(checkpointed), gradient(plain), rtol=1e-5, atol=1e-8)


def test_the_auxiliary_loss_has_the_weight_it_says(tmp_path: Path) -> None:
    common = {"model__dropout": 0.0, "batch__mining": "random"}
    without = gradient(make_stepper(tmp_path, aux__loss="none", **common), 3)
    accum = gradient(make_stepper(tmp_path, aux__normalise="accum", **common), 3) - without
    doubled = gradient(make_stepper(tmp_path, aux__normalise="accum", aux__weight=2.0, **common), 3) - without
    reference = gradient(make_stepper(tmp_path, aux__reference_batch=4, **common), 3) - without
    assert accum.norm() > 1e-6
    torch.testing.assert_close(doubled, 2 * accum, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(reference, 4 * accum, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("mining", ["random", "shared"])
def test_the_auxiliary_loss_takes_the_pairs_it_says(tmp_path: Path, mining: str) -> None:
    """All pairs of a group, averaged: what one by one they give."""
    common = {"model__dropout": 0.0, "batch__mining": mining, "aux__sides": "alternate"}
    common |= {"batch__anchors": 4} if mining == "shared" else {}
    stepper = make_stepper(tmp_path, aux__pairs="all", **common)
    positives = make_stepper(tmp_path, **common)
    portion = next(stepper.portions(0))
    stepper.begin(0)
    assert stepper.auxiliary is not None
    rows = portion.rows.view(len(portion.groups), -1)
    batch = portion.pairs.batch()
    with torch.no_grad():
        last_input = stepper.model(batch).last_input
        losses = torch.zeros(rows.shape)
        for g, group in enumerate(portion.groups):
            for pair, row in enumerate(rows[g].split(1)):
                q, k = next(stepper.attention.queries_and_keys(last_input, row))
                losses[g, pair] = stepper.auxiliary(q, k, batch.select(row), group.half)
    assert stepper.backward(portion)[1].item() == pytest.approx(losses.mean(dim=1).sum().item(), rel=1e-4)
    assert positives.backward(portion)[1].item() == pytest.approx(losses[:, 0].sum().item(), rel=1e-4)


def test_losses_of_several_layers_are_averaged(tmp_path: Path) -> None:
    common = {"model__dropout": 0.0, "batch__mining": "random", "aux__normalise": "accum"}
    without = gradient(make_stepper(tmp_path, aux__loss="none", **common))
    parts = [gradient(make_stepper(tmp_path, aux__layers=f"[{i}]", **common)) - without for i in (0, 1)]
    both = gradient(make_stepper(tmp_path, aux__layers="[0,-1]", **common)) - without
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2, rtol=1e-3, atol=1e-7)
    with pytest.raises(UserError, match=r"aux\.layers is \[2\]"):
        make_stepper(tmp_path, aux__layers="[2]")
    with pytest.raises(UserError, match=r"aux\.layers is \[-1, 1\]"):
        make_stepper(tmp_path, aux__layers="[-1,1]")


def test_frozen_layers_do_not_move(tmp_path: Path) -> None:
    result = small_run(small_config(tmp_path / "run", model__freeze_layers=1, optim__steps=2))
    config = small_config(tmp_path)
    start, _ = build_model(config.model, model_config(config.model, VOCABULARY, 12), config.run.seed)
    trained = load_file(result.checkpoint_path / checkpoints.MODEL)
    moved = {name for name, value in start.state_dict().items() if not torch.equal(value, trained[name])}
    assert not [name for name in moved if "embeddings" in name or ".layer.0." in name or name.startswith("itm_")]
    assert "uniter.encoder.layer.1.attention.self.query.weight" in moved
    assert "rank_output.weight" in moved


def test_decay_rules() -> None:
    config = small_config("unused")
    model, _ = build_model(config.model, model_config(config.model, VOCABULARY, 12), 0)
    parameters = trained_parameters(model)
    rules = {rule: {n for n, p in parameters.items() if decayed(n, p, rule)} for rule in ("reference", "norms-exempt")}
    norms = {f"uniter.img_embeddings.{name}_layer_norm.weight" for name in ("img", "pos")}
    assert rules["reference"] - rules["norms-exempt"] == norms
    assert rules["norms-exempt"] == {name for name, value in parameters.items() if value.dim() == 2}
    groups = build_optimizer(parameters, config.optim).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(parameters)


def test_one_update_is_adam_on_the_clipped_gradient(tmp_path: Path) -> None:
    stepper = make_stepper(tmp_path, optim__clip=1e-3, optim__weight_decay=0.0, optim__warmup=0)
    before = torch.cat([p.detach().flatten() for p in trained_parameters(stepper.model).values()])
    full = gradient(stepper)
    norm = stepper.gather()
    assert norm == pytest.approx(full.norm().item(), rel=1e-5)
    assert stepper.gradients.buffer.norm().item() == pytest.approx(1e-3, rel=1e-4)
    stepper.update()
    after = torch.cat([p.detach().flatten() for p in trained_parameters(stepper.model).values()])
    clipped = full * (1e-3 / norm)
    lr = 1e-3 * 7 / 8
    torch.testing.assert_close(after - before, -lr * clipped / (clipped.abs() + 1e-6), rtol=1e-2, atol=2e-7)


def test_no_clipping_below_the_limit() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    gradients = FlatGradients([parameter])
    (parameter * torch.tensor([3.0, 0.0, 4.0])).sum().backward()
    assert gradients.clip(5.0) == 5.0
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [3.0, 0.0, 4.0]
    assert gradients.clip(0.0) == 5.0
    assert gradients.clip(2.5) == 5.0
    assert parameter.grad.tolist() == [1.5, 0.0, 2.0]
    gradients.clear()
    assert parameter.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_pool_keeps_its_one_image_once(tmp_path: Path) -> None:
    stepper = make_stepper(tmp_path)
    for portion in stepper.portions(7):
        images = {int(image) for group in portion.groups for image in group.images}
        captions = {int(caption) for group in portion.groups for caption in group.captions}
        assert (len(portion.pairs.features), len(portion.pairs.input_ids)) == (len(images), len(captions))


def test_validation_ranks_the_match_and_repeats_itself(tmp_path: Path) -> None:
    config = small_config(tmp_path, run__validate_every=4, run__validation_candidates=6, run__validation_anchors=9)
    records = []
    for out in ("a", "b"):
        changed = small_config(
            tmp_path / out, run__validate_every=4, run__validation_candidates=6, run__validation_anchors=9
        )
        result = small_run(changed, validation=synthetic_source(seed=1))
        records.append([r for r in numbers(result.history) if r["event"] == "validation"])
    assert records[0] == records[1]
    assert [record["step"] for record in records[0]] == [4, 8]
    assert config.run.validation_candidates == records[0][0]["candidates"]
    assert all(1 <= record[name] <= 6 for record in records[0] for name in ("ir_rank", "tr_rank"))


def test_a_tie_is_no_hit(tmp_path: Path) -> None:
    from cacr_uniter.training.validation import validate

    stepper = make_stepper(tmp_path)
    torch.nn.init.zeros_(stepper.model.rank_output.weight)
    found = validate(stepper, synthetic_source(), small_config(tmp_path, run__validation_candidates=5))
    assert found["ir_r1"] == found["tr_r1"] == 0
    assert found["ir_rank"] == found["tr_rank"] == 5


def test_an_evaluation_of_the_caller_enters_the_log(tmp_path: Path) -> None:
    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        assert not model.training
        return {"group": float(step)}

    result = small_run(small_config(tmp_path, run__validate_every=5), evaluate=evaluate)
    found = [record for record in result.history if record["event"] == "evaluation"]
    assert found == [{"event": "evaluation", "step": s, "group": float(s)} for s in (5, 8)]


def test_tensorboard_and_report(tmp_path: Path) -> None:
    result = small_run(
        small_config(tmp_path, run__tensorboard=True, run__report=True, run__validate_every=4),
        validation=synthetic_source(seed=1),
    )
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert result.report_path == tmp_path / "report.md"
    text = result.report_path.read_text()
    assert "## Validation" in text
    assert "lr: 0.001" in text
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert len([json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]) == 10


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Stepper.begin

    def poison(self: Stepper, step: int) -> None:
        begin(self, step)
        if step == 5:
            with torch.no_grad():
                self.model.rank_output.weight.fill_(torch.nan)

    monkeypatch.setattr(Stepper, "begin", poison)
    with pytest.raises(UserError, match=r"diverged at step 6 .*last good checkpoint is .*step-00000004"):
        small_run(small_config(tmp_path))
    kept = checkpoints.load(tmp_path / "checkpoints" / "step-00000004")
    assert all(torch.isfinite(value).all() for value in kept.model.values())


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Stepper, portion: Any) -> torch.Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Stepper, "backward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        small_run(small_config(tmp_path))


def test_a_full_disk_under_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl.partial").symlink_to("/dev/full")
    monkeypatch.setattr(files, "flush", lambda path: None)  # which a device refuses
    with pytest.raises(UserError, match=r"log .* could not be written \(no space left on the device\)"):
        small_run(small_config(tmp_path / "run"))


@pytest.mark.parametrize(
    "refused",
    [
        "log",
        "cacr_uniter.training.best.save_file",
        "torch.utils.tensorboard.SummaryWriter.add_scalar",
        "cacr_uniter.training.logs.write_text",
        "cacr_uniter.training.trainer.write_text",
    ],
)
def test_a_full_disk_names_the_last_checkpoint(tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"optim__steps": 3, "run__tensorboard": True, "run__validate_every": 1}
    small_run(small_config(tmp_path, **fields))
    checkpoints._remove(tmp_path / "checkpoints" / "step-00000003")
    last = tmp_path / "checkpoints" / "step-00000002"

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def opened(self: RunLog, *args: Any, begin: Any = RunLog.__init__) -> None:
        begin(self, *args)
        self._file = SimpleNamespace(name="log", write=full, close=str)

    if refused == "log":
        monkeypatch.setattr(RunLog, "__init__", opened)
    else:
        monkeypatch.setattr(refused, full)
    with pytest.raises(UserError, match=rf"no space left on the device\): .*; the last good checkpoint is {last}"):
        small_run(small_config(tmp_path, **fields), validation=synthetic_source(seed=1))


def test_the_environment_does_not_scale_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradient(make_stepper(tmp_path))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert torch.equal(gradient(make_stepper(tmp_path)), expected)
    assert expected.abs().max() > 0


def test_bfloat16_trains_with_float32_weights_and_losses(tmp_path: Path) -> None:
    common = {"model__initializer_range": 0.3, "batch__mining": "random", "optim__steps": 3}
    result = small_run(small_config(tmp_path, run__precision="bf16", **common))
    exact = small_run(small_config(tmp_path / "exact", **common))
    assert {value.dtype for value in load_file(result.checkpoint_path / checkpoints.MODEL).values()} == {torch.float32}
    for mixed, full in zip(result.history, exact.history, strict=True):
        assert mixed["loss"] != full["loss"]
        assert mixed["loss"] == pytest.approx(full["loss"], rel=0.05)
        assert mixed["auxiliary"] == pytest.approx(full["auxiliary"], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_trains_and_resumes(tmp_path: Path, precision: str, checkpointing: bool) -> None:
    fields = {
        "run__device": "cuda",
        "run__precision": precision,
        "model__activation_checkpointing": checkpointing,
        "aux__backend": "auto",
        "optim__steps": 12,
    }
    whole = small_run(small_config(tmp_path / "whole", **fields))
    small_run(small_config(tmp_path / "parts", **fields))
    for path in checkpoints.checkpoints(tmp_path / "parts" / "checkpoints")[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed = small_run(small_config(tmp_path / "parts", **fields))
    assert resumed.finished
    assert resumed.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=1e-3)
