"""The documents against the program: every command line is accepted by its parser, every field exists, and the table of
defaults says what the presets do.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cacr_uniter import arguments, cli
from cacr_uniter.errors import UserError
from cacr_uniter.training import command
from cacr_uniter.training.checks import check
from cacr_uniter.training.config import AuxConfig
from cacr_uniter.training.plan import plan_run
from cacr_uniter.training.sizes import show_size

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = (ROOT / "docs" / "training.md").read_text()


def command_lines() -> list[tuple[str, bool]]:
    """Calls of `cacr`: whole ones in code blocks, and those inside a sentence, which may leave out what they need."""
    found = set()
    for page in PAGES:
        text = page.read_text()
        found |= {(line, True) for line in re.findall(r"^ {4}(cacr .*)$", text, flags=re.M)}
        found |= {(line, False) for line in re.findall(r"`(cacr [^`\n]+)`", text)}
    return sorted(found)


class Accepted(Exception):
    """The parser took the command line."""


@pytest.mark.parametrize(("line", "whole"), command_lines())
def test_every_command_is_accepted(line: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(re.sub(r"\[--[^]]*\]", "", line), comments=True)[1:]
    name, rest = cli._command(words)
    if name == "train" and "--help" not in rest:
        own = [i for i, word in enumerate(rest) if word == "--config"]
        config = command.load_config(None, [w for i, w in enumerate(rest) if i not in own and i - 1 not in own])
        if own or whole:
            check(config)
        return
    parse = arguments.Parser.parse_args

    def dry(self: arguments.Parser, *args: Any) -> None:
        try:
            parse(self, *args)
        except UserError as error:
            if whole or "arguments are required" not in str(error):
                raise
        raise Accepted

    monkeypatch.setattr(arguments.Parser, "parse_args", dry)
    with pytest.raises((Accepted, SystemExit)):
        cli.main(words)


def test_a_wrong_command_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("cacr eval winoground --breakdwon tag", "cacr train --optim.lrr 1", "cacr data importt"):
        with pytest.raises((UserError, pytest.fail.Exception)):
            test_every_command_is_accepted(line, True, monkeypatch)
        monkeypatch.undo()


def rows() -> list[list[str]]:
    """Cells of the table of defaults: point, default, field, paper, IAIS."""
    table = TRAINING.split("## 6.")[1]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named_fields(cell: str) -> list[str]:
    """`section.name` of each name in a cell; a name without section is of the same one as that before it."""
    found: list[str] = []
    for name in re.findall(r"`([\w.]+)`", cell):
        found.append(name if "." in name else f"{found[-1].split('.')[0]}.{name}")
    return found


def shown(value: Any) -> list[str]:
    """A value as the table may write it."""
    if isinstance(value, bool):
        return [f"`{str(value).lower()}`"]
    if isinstance(value, int | float):
        return [re.sub(r"e-0?", "e-", f"{value:g}")]
    if isinstance(value, list | tuple) and isinstance(value[0], float):
        return [", ".join(map(str, value))]
    return [f"`{value}`", f" {value}"]


@pytest.mark.parametrize("row", [row for row in rows() if row[2]], ids=lambda row: row[0])
def test_the_table_of_defaults_is_true(row: list[str]) -> None:
    preset = "flickr-large" if "large" in row[0] else "flickr-base"
    values = command.load_config(preset).as_dict()
    for field in named_fields(row[2]):
        section, name = field.split(".")
        assert any(text in f" {row[1]}" for text in shown(values[section][name])), (field, values[section][name])


def test_the_table_of_defaults_has_every_open_point() -> None:
    told = {field for row in rows() for field in named_fields(row[2])}
    assert {f"aux.{field.name}" for field in dataclasses.fields(AuxConfig)} <= told


def test_named_fields_exist() -> None:
    sections = "|".join(command.load_config(None).as_dict())
    named = re.findall(rf"(?<![\w/.])((?:{sections})\.[a-z_]+)\b(?!/)", TRAINING)
    assert len(named) > 30
    files = {"data.mdb", "model.safetensors"}
    assert not {name for name in named if name not in command.fields()} - files


def test_the_plan_in_the_text_is_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan, _ = plan_run(command.load_config("flickr-base", ["--preset", "aux-cacr"]))
    text = re.search(r"plan for 32 pairs a forward is ([\d.]+ GB) for base .* hold (\d+) and", TRAINING, flags=re.S)
    assert text is not None
    assert (show_size(plan.peak(32)), plan.largest(11 * 10**9)) == (text[1], int(text[2]))
