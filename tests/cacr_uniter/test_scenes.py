"""Scenes: what is said of a picture is true, contrasts differ only in meaning, combinations stay held out."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cacr_uniter.data.scenes.relations import RELATIONS, Box, is_true, size_word, verdict
from cacr_uniter.data.scenes.render import FEATURES, region_features, render
from cacr_uniter.data.scenes.sampling import Sampler
from cacr_uniter.data.scenes.shapes import NOUNS, Shapes
from cacr_uniter.data.scenes.sprites import Sprites, caption_noun
from cacr_uniter.data.scenes.statements import ATTRIBUTES, Item, Mention, Scene, Statement
from cacr_uniter.errors import UserError

SIZE = 100


def sampler(held_out: float = 0.2, catalogue=None) -> Sampler:
    catalogue = catalogue or Shapes()
    return Sampler(catalogue, tuple(RELATIONS), ATTRIBUTES, (2, 5), SIZE, held_out, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("phrase", "a", "b", "expected"),
    [
        ("left of", Box(0, 0, 10, 10), Box(50, 0, 60, 10), True),
        ("right of", Box(0, 0, 10, 10), Box(50, 0, 60, 10), False),
        ("left of", Box(0, 0, 10, 10), Box(5, 50, 15, 60), None),
        ("above", Box(0, 0, 10, 10), Box(0, 50, 10, 60), True),
        ("below", Box(0, 0, 10, 10), Box(0, 50, 10, 60), False),
        ("inside", Box(20, 20, 30, 30), Box(10, 10, 50, 50), True),
        ("around", Box(20, 20, 30, 30), Box(10, 10, 50, 50), False),
        ("inside", Box(20, 20, 60, 60), Box(10, 10, 50, 50), None),
        ("bigger than", Box(0, 0, 28, 10), Box(50, 50, 70, 70), True),
        ("bigger than", Box(0, 0, 27, 10), Box(50, 50, 70, 70), None),
        ("smaller than", Box(0, 0, 28, 10), Box(50, 50, 70, 70), False),
    ],
)
def test_relations_by_hand(phrase: str, a: Box, b: Box, expected: bool | None) -> None:
    assert verdict(phrase, a, b, SIZE) is expected


def test_a_relation_and_its_inverse_agree_and_exclude_each_other() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        corners, sides = rng.integers(0, 60, (2, 2)).tolist(), rng.integers(4, 40, (2, 2)).tolist()
        a, b = (Box(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, sides, strict=True))
        for phrase, relation in RELATIONS.items():
            assert is_true(phrase, a, b, SIZE) == is_true(relation.inverse, b, a, SIZE)
            assert not (is_true(phrase, a, b, SIZE) and is_true(relation.inverse, a, b, SIZE))


def test_size_words() -> None:
    sides = {20: "small", 28: None, 40: "big"}
    assert {side: size_word(Box(0, 0, side, 5), SIZE) for side in sides} == sides


def test_captions_and_swaps() -> None:
    star, oval = Mention("star", (("colour", "red"),)), Mention("oval")
    above = Statement(star, oval, "above")
    assert above.caption() == "a red star above an oval"
    assert above.swapped().caption() == "an oval above a red star"
    colours = Statement(star, Mention("heart", (("colour", "orange"),)), attribute="colour")
    assert colours.caption() == "a red star and an orange heart"
    assert colours.swapped().caption() == "an orange star and a red heart"
    assert colours.combinations() == {(frozenset({"star", "heart"}), "colour")}


def test_truth_of_statements_needs_some_fitting_pair() -> None:
    red, blue = {"colour": "red"}, {"colour": "blue"}
    stars = Item("star", Box(0, 0, 10, 10), red), Item("star", Box(80, 0, 90, 10), blue)
    scene = Scene(SIZE, (*stars, Item("oval", Box(40, 0, 70, 28))))

    def holds(colour: str, relation: str) -> bool | None:
        return Statement(Mention("star", (("colour", colour),)), Mention("oval"), relation).holds(scene)

    assert holds("red", "left of") is True
    assert holds("blue", "left of") is False
    assert holds("red", "above") is None
    assert holds("green", "left of") is False
    assert Statement(Mention("star"), Mention("oval"), "left of").holds(scene) is True
    middling = Mention("oval", (("size", "big"),))
    assert Statement(Mention("star", (("size", "small"),)), middling, attribute="size").holds(scene) is None


def test_contrasts_have_the_same_words_and_opposite_truth() -> None:
    world = sampler()
    tags = set()
    for i in range(300):
        contrast = world.contrast(np.random.default_rng(i), world.trains)
        one, two = contrast.statements
        assert Counter(one.caption().split()) == Counter(two.caption().split())
        assert one.caption() != two.caption()
        truth = [[statement.holds(scene) for scene in contrast.scenes] for statement in contrast.statements]
        assert truth == [[True, False], [False, True]]
        tags.add(one.tag)
        for scene in contrast.scenes:
            assert 2 <= len(scene.items) <= 5
            for item in scene.items:
                assert item.box.x1 >= 0
                assert item.box.y1 >= 0
                assert max(item.box.x2, item.box.y2) <= SIZE
            nested = {frozenset((a.noun, b.noun)) for a in scene.items for b in scene.items if a.box.contains(b.box)}
            for a in scene.items:
                for b in scene.items:
                    if a is not b and frozenset((a.noun, b.noun)) not in nested:
                        assert not a.box.overlaps(b.box)
    assert tags == {*RELATIONS, "size swap", "pattern swap", "colour swap"}


def test_held_out_combinations_are_never_trained() -> None:
    world = sampler(held_out=0.3)
    nouns = len(NOUNS)
    assert len(world.held_out) == round(0.3 * nouns * (nouns - 1) / 2 * 6)  # 4 axes, colour and pattern
    stated = set()
    for i in range(200):
        rng = np.random.default_rng(i)
        contrast = world.contrast(rng, world.trains)
        for scene, statement in zip(contrast.scenes, contrast.statements, strict=True):
            said = [statement, *world.further(scene, 4, rng, {statement.caption()})]
            assert len({s.caption() for s in said}) == len(said)
            for further in said:
                assert further.holds(scene) is True
                stated |= further.combinations()
    assert len(stated) > 150
    assert not stated & world.held_out


def test_further_captions_include_attributes_and_relations() -> None:
    world = sampler(held_out=0.0)
    rng = np.random.default_rng(5)
    found = [s for i in range(60) for s in world.further(world.contrast(rng, world.trains).scenes[0], 4, rng, set())]
    assert {s.axis for s in found} >= {"horizontal", "vertical", "size", "colour", "pattern"}


def test_region_features_by_hand() -> None:
    picture = Image.new("RGB", (40, 40), (255, 0, 0))
    picture.paste((0, 0, 255), (20, 0, 40, 40))
    features = region_features(picture, Box(0, 0, 40, 40)).astype(np.float64)
    assert features.shape == (FEATURES,) == (2048,)
    crop, edges, histogram = features[:1728].reshape(24, 24, 3), features[1728:1984].reshape(16, 16), features[1984:]
    np.testing.assert_array_equal(crop[:, :12], np.broadcast_to([1, -1, -1], (24, 12, 3)))
    np.testing.assert_array_equal(crop[:, 12:], np.broadcast_to([-1, -1, 1], (24, 12, 3)))
    assert set(np.flatnonzero(edges.max(axis=0))) <= {7, 8}
    assert edges.max() > 0.1
    expected = np.zeros(64)
    expected[[3 * 16, 3]] = np.sqrt(0.5)
    np.testing.assert_allclose(histogram, expected, atol=1e-3)


def test_painting_is_deterministic_and_sorted_by_confidence() -> None:
    world = sampler()
    scene = world.contrast(np.random.default_rng(3), world.trains).scenes[0]
    one, two = (render(scene, world.catalogue, np.random.default_rng(7)) for _ in range(2))
    assert one.png == two.png
    for name in ("norm_bb", "features", "conf"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    n = len(scene.items)
    assert one.norm_bb.shape == (n, 6)
    assert one.features.shape == (n, 2048)
    assert one.conf.shape == (n, 1)
    assert (np.diff(one.conf[:, 0].astype(np.float64)) <= 0).all()
    assert (one.conf > 0.1).all()
    x1, y1, x2, y2, w, h = one.norm_bb.astype(np.float64).T
    np.testing.assert_allclose(w, x2 - x1, atol=1e-3)
    np.testing.assert_allclose(h, y2 - y1, atol=1e-3)
    assert Image.open(io.BytesIO(one.png)).size == (SIZE, SIZE)


@pytest.mark.parametrize("noun", NOUNS)
def test_every_shape_looks_different_from_a_square_and_fills_its_box(noun: str) -> None:
    box = Box(0, 0, 40, 40)
    picture = Shapes().draw(Item(noun, box, {"colour": "red", "pattern": "plain"}), np.random.default_rng(0))
    solid = np.asarray(picture.getchannel("A")) > 127
    assert picture.size == (40, 40)
    assert solid.mean() > 0.2
    assert solid.any(axis=0).mean() > 0.6
    if noun != "square":
        assert solid.mean() < 0.9


def make_sprites(folder, captions: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    for i, (name, caption) in enumerate(captions.items()):
        path = folder / f"group{i % 2}" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((90, 70, 4), dtype=np.uint8)
        pixels[10:80, 10:60] = [*rng.integers(0, 255, 3), 255]
        pixels[10:30, 10:30, 3] = 0
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(caption + "\nfr.utf8=autre\n", encoding="utf-8")


CAPTIONS = {"a": "A red apple.", "b": "A zebra.", "c": "An owl.", "d": "The sun", "e": "A very long sentence about it.",
            "f": "A small owl.", "g": "A zebra."}  # fmt: skip


def test_sprites_are_found_by_their_captions(tmp_path) -> None:
    make_sprites(tmp_path, CAPTIONS)
    found = Sprites(tmp_path, None, np.random.default_rng(0))
    assert len(found.nouns) == 4, "one of 'owl' and 'small owl' is kept, the long sentence is not"
    assert {"red apple", "zebra", "sun"} < set(found.nouns)
    assert found.variants("zebra") == 2
    assert found.aspect("zebra", 0) == pytest.approx(50 / 70)
    world = sampler(held_out=0.0, catalogue=found)
    world.objects = (2, 3)
    contrast = world.contrast(np.random.default_rng(0), world.trains)
    assert render(contrast.scenes[0], found, np.random.default_rng(0)).features.shape[1] == 2048


@pytest.mark.parametrize(
    ("line", "noun"),
    [("A red apple.", "red apple"), ("An owl", "owl"), ("The Sun.", "sun"), ("Five.", None), ("", None)],
)
def test_caption_lines(tmp_path, line: str, noun: str | None) -> None:
    path = tmp_path / "x.txt"
    path.write_text(line, encoding="utf-8")
    assert caption_noun(path) == noun
    assert caption_noun(tmp_path / "absent.txt") is None


def test_too_few_sprites_and_no_folder_are_explained(tmp_path) -> None:
    with pytest.raises(UserError, match="no folder"):
        Sprites(tmp_path / "absent", None, np.random.default_rng(0))
    make_sprites(tmp_path, {"a": "A red apple."})
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.txt").write_text("A cow.")
    with pytest.raises(UserError, match="1 usable cut-outs, 4 are needed"):
        Sprites(tmp_path, None, np.random.default_rng(0))
