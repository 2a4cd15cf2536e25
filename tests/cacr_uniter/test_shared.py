"""Matched pairs of a step as each other's negatives: what is drawn, what is shared, and that the loss is the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cacr_uniter.errors import UserError
from cacr_uniter.training.build import build_accelerator, build_model, model_config
from cacr_uniter.training.checks import check
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.losses import matching_loss
from cacr_uniter.training.optim import build_optimizer, trained_parameters
from cacr_uniter.training.shared import Contrast, SharedSampler, read_contrasts
from cacr_uniter.training.step import Stepper
from cacr_uniter.training.testing import VOCABULARY, small_config, small_run, synthetic_source

IMAGE_OF = np.repeat(np.arange(12), 3)
CONTRASTS = [
    Contrast((2 * n, 2 * n + 1), (np.array([6 * n, 6 * n + 2]), np.array([6 * n + 3]))) for n in range(6)
]  # image v has captions 3 v, 3 v + 1, 3 v + 2
HALVES = ("image", "text")


def sampler(anchors: int = 8, draws: int = 3, contrasts: bool = True, seed: int = 7) -> SharedSampler:
    return SharedSampler(IMAGE_OF, 12, seed, anchors, draws, CONTRASTS if contrasts else None)


@pytest.mark.parametrize("contrasts", [True, False])
@pytest.mark.parametrize(("anchors", "draws"), [(2, 1), (4, 2), (8, 3), (8, 7)])
def test_both_halves_share_their_pairs_and_every_side_is_wrong_equally_often(
    contrasts: bool, anchors: int, draws: int
) -> None:
    groups = sampler(anchors, draws, contrasts).step_groups(3, HALVES)
    pairs = {half: Counter() for half in HALVES}
    for group in groups:
        assert len(group.captions) == len(group.images) == draws + 1
        assert IMAGE_OF[group.captions[0]] == group.images[0]
        assert (IMAGE_OF[group.captions[1:]] != group.images[1:]).all()
        assert len(set(zip(group.captions.tolist(), group.images.tolist(), strict=True))) == draws + 1
        pairs[group.half].update(zip(group.captions[1:].tolist(), group.images[1:].tolist(), strict=True))
    assert pairs["image"] == pairs["text"]
    assert len(pairs["image"]) == anchors * draws
    assert set(Counter(c for c, _ in pairs["text"]).values()) == {draws}
    assert set(Counter(v for _, v in pairs["text"]).values()) == {draws}


def test_the_first_negative_is_the_other_side_of_the_contrast() -> None:
    for group in sampler().step_groups(0, HALVES):
        images = {int(IMAGE_OF[group.captions[0]]), int(IMAGE_OF[group.captions[1]])} | set(group.images[:2].tolist())
        assert len(images) == 2
        assert min(images) % 2 == 0
        assert max(images) == min(images) + 1
        assert not {1, 4, 5} & {int(c) % 6 for c in group.captions}, "only captions that tell the two apart"


def test_steps_and_seeds_differ_and_processes_agree() -> None:
    whole = sampler().step_groups(5, HALVES)
    parts = [sampler().step_groups(5, HALVES, rank, 2) for rank in (0, 1)]
    for rank, part in enumerate(parts):
        for group, same in zip(part, whole[rank:8:2] + whole[8 + rank :: 2], strict=True):
            np.testing.assert_array_equal(group.captions, same.captions)
            np.testing.assert_array_equal(group.images, same.images)
    drawn = {tuple(sampler(seed=s).anchor_pairs(t)[0].tolist()) for s in (1, 2) for t in (0, 1)}
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("anchors", "draws", "contrasts", "message"),
    [
        (4, 4, False, "batch.negatives is 4"),
        (5, 2, True, "even number"),
        (14, 2, True, "at most 12"),
        (13, 2, False, "12 images"),
    ],
)
def test_too_few_anchors_or_images_are_explained(anchors: int, draws: int, contrasts: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler(anchors, draws, contrasts)


def test_contrasts_are_read_by_name_and_cut_to_the_data_set(tmp_path: Path) -> None:
    entries = [
        {"images": ["a.npz", "b.npz"], "captions": [["10", "11"], ["12"]]},
        {"images": ["a.npz", "absent.npz"], "captions": [["10"], ["13"]]},
        {"images": ["b.npz", "c.npz"], "captions": [["12"], ["too long"]]},
    ]
    (tmp_path / "contrasts.json").write_text(json.dumps(entries))
    found = read_contrasts(tmp_path, ["10", "11", "12"], ["a.npz", "b.npz", "c.npz"])
    assert len(found) == 1
    assert found[0].images == (0, 1)
    assert [captions.tolist() for captions in found[0].captions] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), ("{", "damaged"), ('[{"images": 3}]', "damaged"), ("[]", "no contrast")],
)
def test_wrong_contrast_files_are_explained(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "contrasts.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_contrasts(tmp_path, ["10"], ["a.npz"])


def shared_config(out: Path, **fields: object) -> TrainConfig:
    shared = {"batch__mining": "shared", "batch__anchors": 4, "batch__negatives": 2, "batch__pairs_per_forward": 24}
    return small_config(out, **(shared | {"model__dropout": 0.0} | fields))


def test_loss_and_gradient_are_those_of_the_groups_one_by_one(tmp_path: Path) -> None:
    config = shared_config(tmp_path, aux__loss="none")
    source = synthetic_source()
    model, _ = build_model(config.model, model_config(config.model, VOCABULARY, source.img_dim), 0)
    parameters = trained_parameters(model)
    stepper = Stepper(
        model, list(parameters.values()), build_optimizer(parameters, config.optim), config, source,
        build_accelerator(config.run),
    )  # fmt: skip
    portion = next(stepper.portions(0))
    assert portion.last
    assert len(portion.pairs) == 4 * 3, "eight groups of three pairs read twelve pairs"
    stepper.begin(0)
    sums = stepper.backward(portion)
    found = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}

    model.zero_grad(set_to_none=True)
    losses = []
    for group in portion.groups:
        scores = torch.cat(
            [
                model(source.pairs(np.array([c]), np.array([v])).batch()).rank_scores
                for c, v in zip(group.captions, group.images)
            ]
        )
        losses.append(matching_loss(scores[None], config.loss))
    expected = torch.cat(losses).sum()
    (expected / config.batch.anchors).backward()
    assert sums[0].item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in parameters.items():
        if name in found and parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", ["cacr", "iais-singular"])
def test_a_run_with_an_auxiliary_loss_resumes_exactly(tmp_path: Path, loss: str) -> None:
    fields = {"aux__loss": loss, "aux__sides": "alternate", "aux__normalise": "accum"}
    whole = small_run(shared_config(tmp_path / "whole", **fields))
    part = small_run(shared_config(tmp_path / "part", **fields, run__checkpoint_every=3))
    for path in part.out.glob("checkpoints/step-*"):
        if path.name > "step-00000003":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    again = small_run(shared_config(tmp_path / "part", **fields, run__checkpoint_every=3))
    assert again.history[-1]["matching"] == whole.history[-1]["matching"]
    assert again.history[-1]["auxiliary"] == whole.history[-1]["auxiliary"] > 0


def test_contrasts_need_shared_mining(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch\.contrasts with batch\.mining random"):
        check(small_config(tmp_path, batch__mining="random", batch__contrasts=True))
