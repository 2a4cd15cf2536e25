"""Sampling is a pure function of (seed, step, position) and draws what the recipe says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cacr_uniter.errors import UserError
from cacr_uniter.training.sampling import Sampler, counter_generator, dropout_seed

CAPTIONS_PER_IMAGE = (5, 1, 3, 2, 4, 5, 1, 3)
IMAGE_OF = np.repeat(np.arange(8), CAPTIONS_PER_IMAGE)


def sampler(seed: int = 7, anchors: int = 6, draws: int = 4) -> Sampler:
    return Sampler(IMAGE_OF, 8, seed, anchors, draws)


def test_a_group_does_not_depend_on_what_was_drawn_before() -> None:
    one, other = sampler(), sampler()
    for step in range(20):
        one.step_groups(step, ("image", "text"))
    for half in ("image", "text"):
        a, b = one.group(13, 2, half), other.group(13, 2, half)
        np.testing.assert_array_equal(a.captions, b.captions)
        np.testing.assert_array_equal(a.images, b.images)


def test_a_group_is_the_same_in_another_process() -> None:
    code = (
        "import numpy as np\nfrom cacr_uniter.training.sampling import Sampler, dropout_seed\n"
        f"s = Sampler(np.repeat(np.arange(8), {CAPTIONS_PER_IMAGE}), 8, 7, 6, 4)\n"
        "print(s.group(13, 2, 'image').captions.tolist(), dropout_seed(7, 13, 1))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == f"{sampler().group(13, 2, 'image').captions.tolist()} {dropout_seed(7, 13, 1)}"


def test_seed_step_position_and_half_all_matter() -> None:
    groups = [sampler(seed).group(step, index, "image") for seed in (1, 2) for step in (0, 1) for index in (0, 1)]
    assert len({tuple(group.captions) for group in groups}) == 8
    seeds = {dropout_seed(s, t, r) for s in (1, 2) for t in (0, 1) for r in (0, 1)}
    assert len(seeds) == 8
    assert not np.array_equal(counter_generator(1, 0, 5).random(4), counter_generator(1, 1, 5).random(4))


@pytest.mark.parametrize("half", ["image", "text"])
def test_every_caption_is_an_anchor_once_an_epoch(half: str) -> None:
    own = sampler(anchors=6)
    anchors = [own.group(step, index, half).captions[0] for step in range(8) for index in range(6)]
    assert sorted(anchors[:24]) == list(range(24))
    assert sorted(anchors[24:]) == list(range(24))
    assert anchors[:24] != anchors[24:]


def test_image_half_competes_with_captions_of_other_images() -> None:
    for step in range(10):
        for index in range(6):
            group = sampler(draws=19).group(step, index, "image")
            assert set(group.images) == {IMAGE_OF[group.captions[0]]}
            assert len(set(group.captions.tolist())) == 20
            assert (IMAGE_OF[group.captions[1:]] != group.images[0]).all()


def test_text_half_competes_with_other_images() -> None:
    for step in range(10):
        for index in range(6):
            group = sampler(draws=7).group(step, index, "text")
            assert set(group.captions) == {group.captions[0]}
            assert group.images[0] == IMAGE_OF[group.captions[0]]
            assert sorted(group.images.tolist()) == list(range(8))


def test_negatives_are_drawn_uniformly() -> None:
    own = sampler(draws=2)
    counts = np.zeros(24)
    for step in range(4000):
        np.add.at(counts, own.group(step, 0, "image").captions[1:], 1)
    free = 24 - np.array(CAPTIONS_PER_IMAGE)[IMAGE_OF]
    expected = np.array([4000 * np.mean((IMAGE_OF[caption] != IMAGE_OF) * 2 / free) for caption in range(24)])
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_processes_share_the_groups_of_one() -> None:
    whole = sampler().step_groups(3, ("image", "text"))
    parts = [sampler().step_groups(3, ("image", "text"), rank, 3) for rank in range(3)]
    key = lambda group: (group.half, *group.captions, *group.images)  # noqa: E731
    assert sorted(key(g) for part in parts for g in part) == sorted(key(g) for g in whole)


def test_too_few_competitors_are_an_error_that_names_the_option() -> None:
    with pytest.raises(UserError, match=r"8 negatives are wanted of 7 other images.*batch\.pool"):
        sampler(draws=8).check(("text",))
    with pytest.raises(UserError, match="captions of other images"):
        sampler(draws=24).check(("image",))
