"""From scenes to scores by the commands alone: write, train a few steps, evaluate the checkpoint and its score file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cacr_uniter import cli
from cacr_uniter.data.batch import Pairs
from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.data.lmdb import ImageDB, ImageDBWriter
from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.examples import Example
from cacr_uniter.evaluation.scoring import load_model, open_examples, pick_device, score_examples, score_pairs
from cacr_uniter.evaluation.winoground import read_scores
from cacr_uniter.model import UniterForRetrieval
from cacr_uniter.model.checkpoint import export_safetensors

from .tiny_model import TINY_RUN, write_scenes_and_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `scenes` and a finished `run`."""
    return write_scenes_and_run(tmp_path_factory.mktemp("world"))


def evaluate(world: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    capsys.readouterr()
    checkpoint, data = str(world / "run"), str(world / "scenes")
    assert cli.main(["eval", *argv[:1], "--checkpoint", checkpoint, "--data", data, "--json", *argv[1:]]) == 0
    return json.loads(capsys.readouterr().out)


def model_and_data(world: Path) -> tuple[UniterForRetrieval, RetrievalDataset, list[Example]]:
    dataset, examples = open_examples(world / "scenes")
    vocab_size = int(dataset.text_db.meta["v_range"][1])
    return load_model(world / "run", None, vocab_size, 2048, torch.device("cpu")), dataset, examples


def test_a_checkpoint_and_its_score_file_give_the_same(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = world / "scores.jsonl"
    report = evaluate(world, capsys, "winoground", "--write-scores", str(scores))
    assert report["n"] == 12
    assert {v: part["n"] for v, part in report["breakdowns"]["split"].items()} == {"seen": 6, "held_out": 6}
    examples = str(world / "scenes" / "winoground.json")
    assert cli.main(["eval", "winoground", "--scores", str(scores), "--examples", examples, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


def test_scores_are_those_of_single_pairs_in_any_batch(world: Path) -> None:
    model, dataset, examples = model_and_data(world)
    found = score_examples(model, dataset, examples, batch_size=5)
    torch.testing.assert_close(found, score_examples(model, dataset, examples, batch_size=48), rtol=0, atol=1e-5)
    for n, example in enumerate(examples[:3]):
        assert example.caption_ids is not None
        for c in (0, 1):
            for i in (0, 1):
                with torch.inference_mode():
                    single = model(dataset.batch([(example.caption_ids[c], example.images[i])])).rank_scores.item()
                assert found[n, c, i] == pytest.approx(single, abs=1e-5)
    assert np.ptp(found) > 1e-4


def test_a_batch_travels_to_the_device_with_every_image_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dataset, examples = model_and_data(world)
    sent: list[Pairs] = []
    to = Pairs.to

    def record(self: Pairs, device: torch.device | str, non_blocking: bool = False) -> Pairs:
        sent.append(self)
        return to(self, device, non_blocking)

    assert examples[0].caption_ids is not None
    pairs = [(caption, image) for caption in examples[0].caption_ids for image in examples[0].images]
    with torch.inference_mode():
        dense = model(dataset.batch(pairs)).rank_scores.numpy()
    monkeypatch.setattr(Pairs, "to", record)
    np.testing.assert_allclose(score_pairs(model, dataset, pairs), dense, rtol=0, atol=1e-6)
    assert [(len(s), len(s.features), s.features.dtype) for s in sent] == [(4, 2, torch.float16)]


def test_the_two_heads_and_the_mode_of_the_model(world: Path) -> None:
    model, dataset, examples = model_and_data(world)
    rank, itm = (score_examples(model, dataset, examples, head) for head in ("rank", "itm"))
    assert not np.allclose(rank, itm)
    pair = (examples[0].caption_ids[0], examples[0].images[0])  # type: ignore[index]
    with torch.inference_mode():
        logits = model(dataset.batch([pair])).itm_logits[0]
    assert itm[0, 0, 0] == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
    model.train()
    score_pairs(model, dataset, [pair])
    assert model.training


def test_captions_of_published_examples_are_found_by_their_text(world: Path) -> None:
    model, dataset, examples = model_and_data(world)
    bare = [Example(e.id, e.captions, e.images) for e in examples]
    np.testing.assert_array_equal(score_examples(model, dataset, bare), score_examples(model, dataset, examples))
    with pytest.raises(UserError, match="reads 'no such caption'"):
        score_examples(model, dataset, [Example("0", ("no such caption", "x"), examples[0].images)])
    lost = Example("0", ("", ""), ("absent.npz", "absent.npz"), examples[0].caption_ids)
    with pytest.raises(UserError, match=r"image 'absent\.npz' is not in the database"):
        score_examples(model, dataset, [lost])


def test_published_examples_are_imported_and_scored(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quadruples = json.loads((world / "scenes" / "winoground.json").read_text())
    kept = ("id", "caption_0", "caption_1", "image_0", "image_1", "tag", "split")
    examples = tmp_path / "examples.jsonl"
    examples.write_text("\n".join(json.dumps({key: q[key] for key in kept}) for q in quadruples))
    words = ["winoground", str(examples), "--out", str(tmp_path), "--vocab", str(world / "scenes" / "vocab.txt")]
    assert cli.main(["data", "import", *words]) == 0
    assert json.loads(capsys.readouterr().out)["captions"] == 24
    paths = ["--text", str(tmp_path / "winoground.db"), "--images", str(world / "scenes" / "img")]
    checkpoint = ["--checkpoint", str(world / "run"), "--examples", str(examples)]
    assert cli.main(["eval", "winoground", *checkpoint, *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = evaluate(world, capsys, "winoground")
    assert {name: found[name] for name in ("text", "image", "group")} == {
        name: expected[name] for name in ("text", "image", "group")
    }


def test_diverged_weights_are_named(world: Path) -> None:
    model, dataset, examples = model_and_data(world)
    with torch.no_grad():
        model.rank_output.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        score_examples(model, dataset, examples)


def test_a_weights_file_needs_its_size(world: Path, tmp_path: Path) -> None:
    model, dataset, examples = model_and_data(world)
    export_safetensors(model, tmp_path / "weights.safetensors")
    sizes = {key: value for key, value in model.config.to_dict().items() if key != "img_dim"}
    (tmp_path / "size.json").write_text(json.dumps(sizes))
    vocab, cpu = model.config.vocab_size, torch.device("cpu")
    again = load_model(tmp_path / "weights.safetensors", str(tmp_path / "size.json"), vocab, 2048, cpu)
    np.testing.assert_array_equal(score_examples(again, dataset, examples), score_examples(model, dataset, examples))
    for path, size, width, message in (
        (world / "run", "base", 2048, "--model-size is for weights files"),
        (world / "scenes", None, 2048, "holds no checkpoint"),
        (world / "run", None, 1024, "must belong together"),
        (tmp_path / "absent.pt", str(tmp_path / "size.json"), 2048, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(path, size, vocab, width, cpu)


def without(folder: Path, model: UniterForRetrieval, *heads: str) -> list[str]:
    """A weights file that lacks these heads, and the options that name it."""
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(heads)}
    save_file(state, folder / "headless.safetensors")
    sizes = {key: value for key, value in model.config.to_dict().items() if key != "img_dim"}
    (folder / "size.json").write_text(json.dumps(sizes))
    return ["--checkpoint", str(folder / "headless.safetensors"), "--model-size", str(folder / "size.json")]


@pytest.mark.parametrize(
    ("lost", "head", "message"),
    [
        (
            ("rank_output.", "itm_output."),
            "rank",
            "lacks rank_output.weight, rank_output.bias and itm_output, of which",
        ),
        (("rank_output.bias", "itm_output."), "rank", "lacks rank_output.bias and itm_output"),
        (("itm_output.",), "itm", "lacks itm_output.weight, itm_output.bias: the itm head would score at random"),
        (("itm_output.bias",), "itm", "lacks itm_output.bias: the itm head would score at random"),
        (("uniter.encoder.layer.1.",), "rank", "does not fit the model (16 tensors missing"),
    ],
)
def test_random_scores_are_not_reported(
    lost: tuple[str, ...], head: str, message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*without(tmp_path, model_and_data(world)[0], *lost), "--data", str(world / "scenes"), "--head", head]
    for command in (["winoground"], ["retrieval", "--out", str(tmp_path / "out")]):
        assert cli.main(["eval", *command, *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
    assert not (tmp_path / "out").exists()


def refusal(world: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path, *words: str) -> str:
    """What `cacr eval winoground` has against a checkpoint."""
    capsys.readouterr()
    argv = ["eval", "winoground", "--checkpoint", str(checkpoint), "--data", str(world / "scenes"), *words]
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_head_that_nobody_trained_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the itm head of " in refusal(world, capsys, world / "run", "--head", "itm")
    start = [f"--model.{name}=null" for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
    start += ["--model.intermediate_size=null", "--run.validate_every=2", "--optim.steps=2"]
    own = tmp_path / "own"
    shutil.copytree(world / "run" / "checkpoints" / "step-00000003", own)
    for path in (own / "model.safetensors", own / "state.json"):  # as another program writes them
        path.unlink()
    export_safetensors(model_and_data(world)[0], own / "model.safetensors")
    for name, checkpoint in (("mine", world / "run"), ("both", own)):
        words = [
            f"--data.scenes={world / 'scenes'}",
            f"--run.out={tmp_path / name}",
            f"--model.checkpoint={checkpoint}",
        ]
        assert cli.main(["train", "--preset", "demo", *words, *TINY_RUN, *start]) == 0
    for folder in (tmp_path / "mine", tmp_path / "mine" / "best"):
        message = refusal(world, capsys, folder, "--head", "itm")
        assert (
            "was neither trained nor loaded from other weights: it would score at random; take --head rank" in message
        )
    for folder in (tmp_path / "both", tmp_path / "both" / "best", own):
        words = ["--checkpoint", str(folder), "--data", str(world / "scenes"), "--head", "itm"]
        assert cli.main(["eval", "winoground", *words]) == 0


def test_damaged_weights_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One flipped bit leaves a file that can be loaded."""
    shutil.copytree(world / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000003" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    assert f"checkpoint {path.parent} is damaged (model.saf" in refusal(world, capsys, tmp_path / "run")
    words = [f"--data.scenes={world / 'scenes'}", f"--run.out={tmp_path / 'next'}", *TINY_RUN]
    assert cli.main(["train", "--preset=demo", f"--model.checkpoint={tmp_path / 'run'}", *words]) == 2
    assert "model.safetensors is not what was written" in capsys.readouterr().err
    (path.parent / "state.json").unlink()
    words = ["--checkpoint", str(tmp_path / "run"), "--data", str(world / "scenes")]
    assert cli.main(["eval", "winoground", *words]) == 0, "weights without checksums are taken as they are"


def test_a_ranking_head_made_of_the_matching_head_is_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, dataset, examples = model_and_data(world)
    words = [*without(tmp_path, model, "rank_output."), "--data", str(world / "scenes"), "--json"]
    scores = tmp_path / "scores.jsonl"
    assert cli.main(["eval", "winoground", *words, "--write-scores", str(scores)]) == 0
    told = capsys.readouterr().err
    assert "headless.safetensors: " in told
    assert "ranking head initialised from the match row of the matching head" in told
    assert "feat_th0.2_max100_min10: confidence 0.2, max regions 100, min regions 10" in told
    with torch.no_grad():
        model.rank_output.weight.copy_(model.itm_output.weight[1:2])
        model.rank_output.bias.copy_(model.itm_output.bias[1:2])
    found = np.stack([read_scores(scores)[example.id] for example in examples])
    np.testing.assert_allclose(found, score_examples(model, dataset, examples), atol=1e-6)


def test_a_run_that_is_not_finished_is_told(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    last = run / "checkpoints" / "step-00000003"
    shutil.copytree(last, run / "best", ignore=shutil.ignore_patterns("state.json"))
    told: list[str] = []
    for steps in (3, 300):
        state = json.loads((last / "state.json").read_text())
        state["config"]["optim"]["steps"] = steps
        (last / "state.json").write_text(json.dumps(state))
        for folder in (run, run / "best"):
            for command in (["winoground"], ["retrieval", "--max-images", "1", "--out", str(tmp_path / "scores")]):
                words = ["--checkpoint", str(folder), "--data", str(world / "scenes")]
                assert cli.main(["eval", *command, *words]) == 0
                told.append(capsys.readouterr().err)
    notice = "step 3 of 300: training is not finished\n"
    assert [notice in err for err in told] == [False] * 4 + [True] * 4


def test_wrong_tags_are_told_before_the_model_scores(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacr_uniter.evaluation.scoring.score_pairs", lambda *_, **__: pytest.fail("scored"))
    (tmp_path / "other.json").write_text('{"9999": ["hard"]}')
    words = ["eval", "winoground", "--checkpoint", str(world / "run"), "--data", str(world / "scenes")]
    for options, message in (
        (["--breakdown", "difficulty"], "--breakdown difficulty: the examples say nothing about it"),
        (["--difficulty", str(tmp_path / "other.json")], "none of the examples has an entry there"),
        (["--difficulty", str(tmp_path / "absent.json")], "cannot be read"),
    ):
        assert cli.main([*words, *options]) == 2
        assert message in capsys.readouterr().err


def test_a_score_file_that_cannot_be_written_leaves_no_rest_and_the_tables(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    words = ["eval", "winoground", "--checkpoint", str(world / "run"), "--data", str(world / "scenes")]
    monkeypatch.setattr(Path, "replace", full)
    assert cli.main([*words, "--write-scores", str(tmp_path / "scores.jsonl")]) == 2
    captured = capsys.readouterr()
    assert "no space left on device" in captured.err
    assert "Winoground, 12 examples" in captured.out
    assert list(tmp_path.iterdir()) == []


def test_devices_that_are_not_there_are_refused() -> None:
    for name in ("warp", "meta", "cuda:", "cpu:x", "cuda:99", ""):
        with pytest.raises(UserError, match=f"--device.*{name}"):
            pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


def test_retrieval_command_and_its_resumption(world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = evaluate(world, capsys, "retrieval", "--out", str(tmp_path / "all"), "--block", "3")
    assert whole["images"] == 8
    assert whole["captions"] > 16
    assert 0 <= whole["ir_r1"] <= whole["ir_r5"] <= whole["ir_r10"] <= 100
    (tmp_path / "all" / "part-000001.npy").unlink()
    assert evaluate(world, capsys, "retrieval", "--out", str(tmp_path / "all"), "--block", "3") == whole
    part = evaluate(world, capsys, "retrieval", "--out", str(tmp_path / "some"), "--max-images", "3")
    assert part["images"] == 3
    again = ["retrieval", *without(tmp_path, model_and_data(world)[0]), "--data", str(world / "scenes"), "--head=itm"]
    assert cli.main(["eval", *again, "--out", str(tmp_path / "all"), "--block", "3"]) == 2
    assert "different head" in capsys.readouterr().err
    shutil.copytree(world / "scenes" / "img", tmp_path / "same")
    source = ImageDB(world / "scenes" / "img")
    with ImageDBWriter(tmp_path / "other") as writer:
        for name in source.names():
            record = source.record(name)
            writer.write(name, record["features"][::-1], record["norm_bb"])
    words = ["--text", str(world / "scenes" / "txt" / "val.db"), "--out", str(tmp_path / "all"), "--block", "3"]
    retrieval = ["eval", "retrieval", "--checkpoint", str(world / "run"), *words, "--images"]
    assert cli.main([*retrieval, str(tmp_path / "same")]) == 0, "a copy of the data set goes on"
    assert cli.main([*retrieval, str(tmp_path / "other")]) == 2
    assert "different images" in capsys.readouterr().err


def test_two_processes_share_the_matrix(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 0 is this one; it waits for the parts of process 1."""
    alone = evaluate(world, capsys, "retrieval", "--out", str(tmp_path / "alone"), "--block", "2")
    words = ["--checkpoint", str(world / "run"), "--data", str(world / "scenes"), "--block", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "cacr_uniter.cli", "eval", "retrieval", *words, "--out", str(tmp_path / "two")]
    other = subprocess.Popen(command, env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"}, stdout=subprocess.PIPE)
    monkeypatch.setenv("WORLD_SIZE", "2")
    together = evaluate(world, capsys, "retrieval", "--out", str(tmp_path / "two"), "--block", "2")
    assert other.communicate(timeout=120)[0] == b"", "only process 0 prints"
    assert other.returncode == 0
    assert together == alone
