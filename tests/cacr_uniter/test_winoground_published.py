"""Winoground in the form in which it is published, from the files to the tables, by the commands alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacr_uniter import cli
from cacr_uniter.training.testing import small_config, small_run

WORDS = ("old", "young", "person", "kisses", "an", "a", "the", "dog", "sees", "cat")
ROWS = [
    # tag, secondary_tag, num_main_preds, collapsed_tag
    ("Adjective-Age", "", 1, "Object"),
    ("Noun", "Symbolic", 1, "Object"),
    ("Verb-Transitive", "Symbolic, Series", 2, "Relation"),
    ("Noun Phrase, Determiner-Numeral", "Pragmatics", 2, "Both"),
    ("Morpheme-Level", "Morpheme-Level", 1, "Relation"),
    ("Preposition", "Series", 1, "Relation"),
]
COUNTS = {
    "collapsed_tag": {"Object": 2, "Relation": 3, "Both": 1},
    "num_main_preds": {"1": 4, "2": 2},
    "secondary_tag (exact)": {"Symbolic": 1, "Pragmatics": 1, "Series": 1, "Morpheme-Level": 1},
    "secondary_tag (contains)": {"Symbolic": 2, "Pragmatics": 1, "Series": 2, "Morpheme-Level": 1},
    "tag": {row[0]: 1 for row in ROWS},
    "difficulty": {"Unusual Text": 2, "Complex Reasoning": 1, "none": 4},
}


def published_rows() -> list[dict[str, Any]]:
    """Rows of examples.jsonl, field for field."""
    generator, rows = np.random.default_rng(0), []
    for number, (tag, secondary, predicates, collapsed) in enumerate(ROWS):
        words = generator.permutation(WORDS).tolist()
        rows.append(
            {
                "id": number,
                "image_0": f"ex_{number}_img_0",
                "image_1": f"ex_{number}_img_1",
                "caption_0": " ".join(words[:6]),
                "caption_1": " ".join(words[5::-1]),
                "tag": tag,
                "secondary_tag": secondary,
                "num_main_preds": predicates,
                "collapsed_tag": collapsed,
            }
        )
    rows[1]["caption_0"] += " \u2028 caf\u00e9"  # a separator that is no end of a line in JSON
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples.jsonl, the difficulty tags, npz features of the twelve images, a vocabulary, and a finished run."""
    root, generator = tmp_path_factory.mktemp("published"), np.random.default_rng(1)
    lines = [json.dumps(row, ensure_ascii=False) for row in published_rows()]
    (root / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tags = {"0": ["Unusual Text"], "3": ["Unusual Text", "Complex Reasoning"], "4": []}
    (root / "new_tag_assignments.json").write_text(json.dumps(tags))
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (root / "npz").mkdir()
    for number in range(len(ROWS)):
        for k in (0, 1):
            low = generator.random((12, 2)) * 0.4
            boxes = np.concatenate([low, low + 0.5, np.full((12, 2), 0.5)], axis=1)
            np.savez_compressed(
                root / "npz" / f"ex_{number}_img_{k}.npz",
                norm_bb=boxes.astype(np.float16),
                features=generator.normal(size=(12, 12)).astype(np.float16),
                conf=np.linspace(0.9, 0.1, 12).astype(np.float16),
            )
    small_run(small_config(root / "run", optim__steps=2))
    return root


def parquet(path: Path) -> Path:
    """The same rows as the parquet file: columns in another order, pictures as bytes and path."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    writer = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow")
    rows = published_rows()
    for row in rows:
        for k in (0, 1):
            row[f"image_{k}"] = {"bytes": b"\x89PNG", "path": f"ex_{row['id']}_img_{k}.png"}
    order = ["id", "image_0", "image_1", "tag", "secondary_tag", "num_main_preds", "collapsed_tag"]
    rows = [{name: row[name] for name in (*order, "caption_0", "caption_1")} for row in rows]
    schema = pyarrow.Table.from_pylist(rows).schema
    types = [field.with_type(pyarrow.int32()) if field.name in ("id", "num_main_preds") else field for field in schema]
    writer.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(types)), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_published_files_become_tables(
    kind: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    examples = files / "examples.jsonl" if kind == "jsonl" else parquet(tmp_path / "test-00000-of-00001.parquet")
    images, scores = tmp_path / "img", tmp_path / "scores.jsonl"

    def cacr(*words: str | Path) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    cacr("data", "import", "winoground", examples, "--vocab", files / "vocab.txt", "--out", tmp_path)
    cacr("data", "import", "uniter-npz", files / "npz", "--names", "winoground", "--out", images)
    cacr("data", "check", tmp_path / "winoground.db", "--images", images)
    tagged = ("--examples", examples, "--difficulty", files / "new_tag_assignments.json")
    data = ("--text", tmp_path / "winoground.db", "--images", images)
    model = ("eval", "winoground", "--checkpoint", files / "run", *data, *tagged)
    report = json.loads(cacr(*model, "--write-scores", scores, "--json"))
    assert report["n"] == len(ROWS)
    assert {name: {v: p["n"] for v, p in part.items()} for name, part in report["breakdowns"].items()} == COUNTS
    labels = [json.loads(line)["label"] for line in scores.read_text().splitlines()]
    assert labels == [f"{n}_c{c}_i{i}" for n in range(len(ROWS)) for c in (0, 1) for i in (0, 1)]
    scored = ("eval", "winoground", "--scores", scores, *tagged)
    assert json.loads(cacr(*scored, "--json")) == report
    wanted = ("collapsed_tag", "num_main_preds", "secondary_tag", "difficulty")
    for command in (model, scored):
        table = cacr(*command, "--breakdown", *wanted)
        for name in COUNTS:
            assert (f"by {name}" in table) == (name != "tag")
        for value in ("Relation", "Morpheme-Level", "Unusual Text", "none"):
            assert value in table
        assert max(map(len, table.splitlines())) <= 80
