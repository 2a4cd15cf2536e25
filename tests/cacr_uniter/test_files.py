"""Files are written whole or not at all; JSON of others has one kind of error."""

from __future__ import annotations

from pathlib import Path

import pytest

from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.examples import read_examples
from cacr_uniter.files import parse_json, replacing, write_json, write_text


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    with replacing(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "before")

    def fill_the_disk() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_several_writers_have_neighbours_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "part"
    with replacing(path, ".1") as one, replacing(path, ".2") as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the inner block ended first
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_written_readably(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    write_json(path, {"name": "Zürich"})
    assert path.read_text(encoding="utf-8") == '{"name": "Zürich"}'
    write_json(path, [1], indent=1)
    assert path.read_text(encoding="utf-8") == "[\n 1\n]\n"


@pytest.mark.parametrize("text", ["[" * 100_000, "{", b"\xff", ""])
def test_all_damage_is_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_deep_nesting_is_told_in_words(tmp_path: Path) -> None:
    path = tmp_path / "examples.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"damaged \(nested too deeply\)"):
        read_examples(path)
