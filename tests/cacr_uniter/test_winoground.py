"""Winoground scores: the published rules on scores made by hand, ties wrong; breakdowns; files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.examples import Example, breakdowns, read_difficulty, read_examples
from cacr_uniter.evaluation.winoground import (
    CHANCE,
    bootstrap,
    marks,
    pairwise,
    read_scores,
    summary,
    write_scores,
)

BY_HAND = [
    # s00, s01, s10, s11 -> text, image, group
    ((2.0, 1.0, 1.0, 2.0), (True, True, True)),
    ((3.0, 2.0, 1.0, 4.0), (True, True, True)),
    ((2.0, 3.0, 1.0, 4.0), (True, False, False)),
    ((2.0, 1.0, 3.0, 4.0), (False, True, False)),
    ((1.0, 2.0, 2.0, 1.0), (False, False, False)),
    ((2.0, 1.0, 2.0, 3.0), (False, True, False)),  # tie of the captions on image 0
    ((2.0, 2.0, 1.0, 3.0), (True, False, False)),  # tie of the images for caption 0
    ((1.0, 1.0, 1.0, 1.0), (False, False, False)),
    ((-1.0, -2.0, -2.0, -1.0), (True, True, True)),
]


def scores(rows: list[tuple[float, float, float, float]]) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(-1, 2, 2)


@pytest.mark.parametrize(("row", "expected"), BY_HAND)
def test_rules_by_hand(row: tuple[float, float, float, float], expected: tuple[bool, bool, bool]) -> None:
    found = marks(scores([row]))
    assert (found.text.item(), found.image.item(), found.group.item()) == expected


def test_rules_by_loops() -> None:
    rng = np.random.default_rng(0)
    s = rng.integers(0, 4, (500, 2, 2)).astype(np.float64)
    found = marks(s)
    for n in range(len(s)):
        text = s[n, 0, 0] > s[n, 1, 0] and s[n, 1, 1] > s[n, 0, 1]
        image = s[n, 0, 0] > s[n, 0, 1] and s[n, 1, 1] > s[n, 1, 0]
        assert (found.text[n], found.image[n], found.group[n]) == (text, image, text and image)
    assert 0 < found.group.sum() < found.text.sum()


def test_chance_is_what_random_scores_get() -> None:
    report = summary(np.random.default_rng(1).normal(size=(200_000, 2, 2)))
    for name, expected in CHANCE.items():
        assert report[name]["score"] == pytest.approx(expected, abs=0.4)
    assert report["pairwise_text"] == pytest.approx(50, abs=0.4)
    assert report["matching"] == pytest.approx(50, abs=0.4)


def test_pairwise_accuracy_gives_half_for_ties() -> None:
    found = pairwise(scores([(2, 2, 1, 3), (1, 2, 1, 0)]))
    assert found["pairwise_text"] == 100 * (1 + 1 + 0.5 + 0) / 4
    assert found["pairwise_image"] == 100 * (0.5 + 1 + 0 + 0) / 4
    assert found["matching"] == 50.0


def test_the_score_file_of_the_published_form(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    write_scores(path, [str(n) for n in range(len(BY_HAND))], scores([row for row, _ in BY_HAND]))
    first = json.loads(path.read_text().splitlines()[1])
    assert first == {"label": "0_c0_i1", "score": 1.0}
    read = read_scores(path)
    report = summary(np.stack([read[str(n)] for n in range(len(BY_HAND))]))
    for k, name in enumerate(("text", "image", "group")):
        assert report[name]["score"] == pytest.approx(100 * np.mean([right[k] for _, right in BY_HAND]))


def test_lines_may_come_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    lines = [f'{{"label": "x_y_c{c}_i{i}", "score": {10 * c + i}}}' for c in (1, 0) for i in (0, 1)]
    path.write_text("\n".join(["", *lines, ""]))
    np.testing.assert_array_equal(read_scores(path)["x_y"], [[0, 1], [10, 11]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no scores"),
        ('{"label": "0_c0_i0", "score": 1}', "lacks some of its four scores"),
        ("nonsense", "line 1: expected"),
        ('{"label": "0_c0_i0"}', "line 1: expected"),
        ("[1]", "line 1: expected"),
        ('{"label": "0_c2_i0", "score": 1}', "line 1: label '0_c2_i0'"),
        ('{"label": "0_c0_i0", "score": "high"}', "line 1: label must be text and score a number"),
        ('{"label": "0_c0_i0", "score": NaN}', "nan, not a finite number"),
        ('{"label": "0_c0_i0", "score": 1' + "0" * 400 + "}", "10000000000000000000, not a finite number"),
        ("[" * 100_000, "line 1: expected"),
        ('{"label": "0_c0_i0", "score": 1}\n{"label": "0_c0_i0", "score": 2}', "line 2: label '0_c0_i0' occurs twice"),
    ],
)
def test_wrong_score_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_scores(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_scores(tmp_path / "absent.jsonl")


def test_bootstrap_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(120):
        low, high = bootstrap(rng.random((400, 1)) < 0.3)
        covered += bool(low[0] <= 0.3 <= high[0])
    assert covered >= 106  # 95 % of 120 is 114; fewer than 106 has probability below 0.001
    low, high = bootstrap(rng.random((400, 1)) < 0.3)
    assert 0.07 < (high - low)[0] < 0.11  # 2 * 1.96 * sqrt(0.3 * 0.7 / 400) = 0.09


def published(n: int, **fields: object) -> dict[str, object]:
    row = {"id": n, "caption_0": "a b", "caption_1": "b a", "image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1"}
    return {**row, "tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object", **fields}


ROWS = [
    published(0),
    published(1, collapsed_tag="Relation", num_main_preds=2, secondary_tag="Symbolic"),
    published(2, collapsed_tag="Both", secondary_tag="Symbolic, Series"),
    published(3, collapsed_tag="Relation", secondary_tag="Morpheme-Level"),
]
EXPECTED = {
    "collapsed_tag": {"Object": [0], "Relation": [1, 3], "Both": [2]},
    "num_main_preds": {"1": [0, 2, 3], "2": [1]},
    "secondary_tag (exact)": {"Symbolic": [1], "Morpheme-Level": [3]},
    "secondary_tag (contains)": {"Symbolic": [1, 2], "Series": [2], "Morpheme-Level": [3]},
    "tag": {"Noun": [0, 1, 2, 3]},
}


def test_breakdowns_of_the_published_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    examples = read_examples(path)
    assert examples[1].images == ("winoground_0001_0.npz", "winoground_0001_1.npz")
    assert breakdowns(examples) == EXPECTED
    path.with_suffix(".txt").write_text(json.dumps({"0": ["Unusual Text", "Visually Difficult"], "2": []}))
    difficulty = read_difficulty(path.with_suffix(".txt"))
    assert breakdowns(examples, difficulty)["difficulty"] == {
        "Unusual Text": [0],
        "Visually Difficult": [0],
        "none": [1, 2, 3],
    }


def test_breakdowns_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow")
    rows = [{**row, "image_0": {"bytes": b"png"}, "image_1": {"bytes": b"png"}} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "examples.parquet")
    examples = read_examples(tmp_path / "examples.parquet")
    assert breakdowns(examples) == EXPECTED
    assert examples[3].images == ("winoground_0003_0.npz", "winoground_0003_1.npz")


def test_scores_of_a_breakdown_are_those_of_its_examples() -> None:
    s = scores([row for row, _ in BY_HAND])
    report = summary(s, {"half": {"first": [0, 1, 2], "rest": [3, 4], "empty": []}})
    assert report["breakdowns"]["half"]["first"]["text"]["score"] == 100.0
    assert report["breakdowns"]["half"]["first"]["group"]["score"] == pytest.approx(200 / 3)
    assert report["breakdowns"]["half"]["rest"]["n"] == 2
    assert set(report["breakdowns"]["half"]) == {"first", "rest"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "damaged"),
        ("a.json", "{}", "expected a list"),
        ("a.json", "[]", "holds none"),
        ("a.json", "[3]", "entry 0 lacks"),
        ("a.json", '[{"id": 1, "caption_0": "x"}]', "entry 0 lacks"),
        ("a.json", '[{"id": "x", "caption_0": "a", "caption_1": "b"}]', "entry 0 lacks"),
        ("a.json", json.dumps([published(1), published(1)]), "an id occurs twice"),
        ("a.parquet", "no parquet", "damaged"),
    ],
)
def test_wrong_example_files_are_explained(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_examples(tmp_path / "absent.jsonl")


def test_wrong_difficulty_files_are_explained(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"0": "hard"}', '{"0": [1]}'):
        (tmp_path / "tags.json").write_text(text)
        with pytest.raises(UserError, match="difficulty tags"):
            read_difficulty(tmp_path / "tags.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_difficulty(tmp_path / "absent.json")


def test_examples_without_tags_have_no_breakdowns() -> None:
    assert breakdowns([Example("0", ("a", "b"), ("x.npz", "y.npz"))]) == {}
