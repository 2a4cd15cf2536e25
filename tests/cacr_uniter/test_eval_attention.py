"""`cacr eval attention`: the loss of every layer and head, matched and mismatched, and the picture of a pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cacr_uniter import cli
from cacr_uniter.commands.eval_attention import summary
from cacr_uniter.evaluation.congruence import congruence, maps, words_of
from cacr_uniter.evaluation.scoring import caption_ids, load_model, open_examples

from .tiny_model import write_scenes_and_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `scenes` and a finished `run`."""
    return write_scenes_and_run(tmp_path_factory.mktemp("world"))


def opened(world: Path):
    dataset, examples = open_examples(world / "scenes")
    model = load_model(world / "run", None, dataset.text_db.vocab_size, 2048, torch.device("cpu"))
    return model, dataset, [(ids[0], e.images[0]) for ids, e in zip(caption_ids(examples, dataset), examples)]


@pytest.mark.parametrize(("kind", "scale"), [("softmax", 1.0), ("softmax", 20.0), ("scores", 1.0)])
def test_the_numbers_are_the_divergences_of_the_pictured_attentions(world: Path, kind: str, scale: float) -> None:
    model, dataset, pairs = opened(world)
    found = congruence(model, dataset, pairs[:3], kind, scale, batch_size=2)
    assert found.shape == (3, 2, 2, 2)
    for n in range(3):
        for layer in (0, 1):
            for head in (0, 1):
                of_one = maps(model, dataset, pairs[n], layer, head, kind, scale)
                for number, side in enumerate(("text", "vision")):
                    own, projected = (x.astype(np.float64) for x in of_one[side])
                    np.testing.assert_allclose(own.sum(1), 1, rtol=1e-5)
                    divergence = ((projected - own) * (np.log(projected) - np.log(own))).sum(1).mean()
                    assert found[n, layer, head, number] == pytest.approx(divergence, rel=1e-3, abs=1e-7)
    words = words_of(dataset, pairs[0][0])
    assert len(words) == len(maps(model, dataset, pairs[0])["text"].own)
    assert all(word.isascii() and not word.isdigit() for word in words)


def test_the_mean_over_heads_is_one_of_distributions(world: Path) -> None:
    model, dataset, pairs = opened(world)
    mean = maps(model, dataset, pairs[0])["vision"]
    heads = [maps(model, dataset, pairs[0], head=head)["vision"] for head in (0, 1)]
    np.testing.assert_allclose(mean.projected, np.mean([x.projected for x in heads], axis=0), rtol=1e-6)


def test_the_command_prints_layers_and_draws_a_pair(world: Path, tmp_path: Path, capsys) -> None:
    words = ["eval", "attention", "--checkpoint", str(world / "run"), "--data", str(world / "scenes")]
    picture = tmp_path / "pair.png"
    assert cli.main([*words, "--picture", str(picture), "--image", "1", "--layer", "0", "--head", "1"]) == 0
    printed = capsys.readouterr().out
    assert "mismatched" in printed
    assert "12 examples, kind softmax" in printed
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*words, "--max-examples", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n"], len(report["layers"])) == (3, 2)
    text = report["layers"][1]["text"]
    assert text["difference"] == pytest.approx(text["mismatched"] - text["matched"])
    assert text["matched"] == pytest.approx(sum(text["heads"]) / 2)


def test_matched_pairs_are_told_from_mismatched_ones() -> None:
    found = np.zeros((8, 1, 2, 2))  # two examples: caption 0 matched, mismatched, caption 1 matched, mismatched
    found[1::2, 0, :, 0] = [[1, 1], [3, 3], [5, 5], [7, 7]]
    report = summary(found, "softmax")["layers"][0]
    assert report["text"]["mismatched"] == 4
    assert report["text"]["matched"] == 0
    assert report["text"]["half_ci95"] == pytest.approx(1.96 * np.std([2, 6], ddof=1) / 2**0.5)
    assert report["vision"]["difference"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--picture", "nowhere/pair.png"], "--picture: there is no folder nowhere"),
        (["--picture", "pair.png", "--layer", "2"], "--layer is 2: give 0 to 1, or -1 to -2"),
        (["--picture", "pair.png", "--head", "2"], "--head is 2: give 0 to 1"),
        (["--picture", "pair.png", "--example", "x"], "--example: there is no example 'x'"),
    ],
)
def test_what_is_not_there_is_said(world: Path, capsys, options: list[str], message: str) -> None:
    words = ["eval", "attention", "--checkpoint", str(world / "run"), "--data", str(world / "scenes")]
    assert cli.main([*words, *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("pair.png").exists()
