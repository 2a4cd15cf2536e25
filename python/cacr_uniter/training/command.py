"""``cacr train``: the configuration from presets, YAML files and the command line."""

from __future__ import annotations

import dataclasses
import re
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from cacr_uniter.arguments import complaint
from cacr_uniter.errors import UserError
from cacr_uniter.training.config import TrainConfig

PRESETS = Path(__file__).parent.parent / "presets"
#: key of a configuration file that names the preset on which it builds
EXTENDS = "extends"

#: what jsonargparse says of a value: the field and the value
WRONG_VALUE = re.compile(r'Parser key "([\w.]+)".*(?:Got|Given) value: (.*)')
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def fields() -> dict[str, Any]:
    """Every field of a configuration, ``section.name``, and its type."""
    sections = get_type_hints(TrainConfig)
    return {f"{s}.{name}": hint for s, kind in sections.items() for name, hint in get_type_hints(kind).items()}


def in_words(hint: Any) -> str:
    """What a value of a type looks like."""
    if hint in KINDS:
        return KINDS[hint]
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(parts)}" if len(parts) > 1 else str(parts[0])
    if get_origin(hint) is list:
        return "a list of whole numbers such as [-1]" if parts == (int,) else "a list such as [a, b]"
    if get_origin(hint) is tuple:
        return f"{len(parts)} numbers such as [0.9, 0.98]"
    return " or ".join(map(in_words, parts))


def presets() -> list[str]:
    """Names of the configurations that come with the program."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """YAML file of a preset.

    Raises:
        UserError: no such preset.
    """
    if name not in presets():
        raise UserError(f"no preset {name!r}: there are {', '.join(presets())}")
    return PRESETS / f"{name}.yaml"


def build_parser() -> ArgumentParser:
    """Parser of ``cacr train``."""
    parser = ArgumentParser(
        prog="cacr train",
        description="Fine-tunes UNITER on caption-image pairs, with or without an auxiliary loss on its attention. "
        "Presets, YAML files and single fields may be mixed, later ones replace earlier ones.",
        exit_on_error=False,
    )
    # only for the help: _expand_presets has replaced it before this parser reads the words
    names = ", ".join(presets())
    parser.add_argument("--preset", metavar="NAME", default=SUPPRESS, help=f"a configuration of the program: {names}")
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file with any of the fields below; `{EXTENDS}: NAME` builds on a preset",
    )
    parser.add_argument("--plan", action="store_true", help="print the memory a step needs, and train nothing")
    parser.add_argument("--progress", type=bool, default=True, help="show a progress bar")
    parser.add_class_arguments(TrainConfig)
    return parser


def _expand_presets(argv: Sequence[str]) -> list[str]:
    """``--preset NAME`` and ``--preset=NAME`` as ``--config FILE``."""
    expanded: list[str] = []
    for argument in argv:
        if expanded and expanded[-1] == "--preset":
            expanded[-1:] = ["--config", str(preset_path(argument))]
        elif argument.startswith("--preset="):
            expanded += ["--config", str(preset_path(argument.removeprefix("--preset=")))]
        else:
            expanded.append(argument)
    if expanded and expanded[-1] == "--preset":
        raise UserError(f"--preset needs a name: there are {', '.join(presets())}")
    return expanded


def _expand_files(words: Sequence[str]) -> list[str]:
    """``--config FILE`` with those that the file extends before it, every one of them checked."""
    expanded: list[str] = []
    sections = {f"--{section}" for section in get_type_hints(TrainConfig)}
    for before, word in pairwise(["", *words]):
        if word.split("=")[0] in sections:  # jsonargparse would read a file, and import the classes that it names
            raise UserError(f"{word.split('=')[0]} is a section: name its fields one by one, or take --config FILE")
        if before == "--config":
            expanded[-1:] = _with_extended(word, ())
        elif word.startswith("--config="):
            expanded += _with_extended(word.removeprefix("--config="), ())
        else:
            expanded.append(word)
    return expanded


def _with_extended(name: str, within: tuple[str, ...]) -> list[str]:
    """Words for a configuration file: the preset that its key ``extends`` names comes first, the file's fields replace
    its own.

    Args:
        name: path of the file.
        within: files that extend it, from the outermost.
    """
    values = _read_file(name)
    if EXTENDS not in values:
        return ["--config", name]
    parent = values[EXTENDS]
    if not isinstance(parent, str):
        raise UserError(f"--config {name}: {EXTENDS} is {parent!r}: name one preset of {', '.join(presets())}")
    try:
        path = str(preset_path(parent))
    except UserError as error:
        raise UserError(f"--config {name}: {EXTENDS}: {error}") from error
    if path in (*within, name):
        raise UserError(f"--config {name}: {EXTENDS} {parent} leads back to itself: name another preset")
    return [*_with_extended(path, (*within, name)), *(["--config", _own_fields(name)] if len(values) > 1 else [])]


def _own_fields(name: str) -> str:
    """The file's YAML without the key ``extends``; jsonargparse takes the text in the place of a path."""
    node = yaml.compose(Path(name).read_text(encoding="utf-8"))
    assert isinstance(node, yaml.MappingNode)
    node.value = [(key, value) for key, value in node.value if key.value != EXTENDS]
    return yaml.serialize(node)


def _read_file(name: str) -> dict[str, Any]:
    """A configuration file; refuses one that is no YAML mapping of sections, by its name.

    jsonargparse would import what a key ``class_path`` names and read a file in the place of a section.
    """
    try:
        value = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {name} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {name} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(value, dict):
        raise UserError(f"--config {name}: expected fields of cacr train, got {type(value).__name__}")
    sections = get_type_hints(TrainConfig)
    for section, content in value.items():
        if section not in sections:
            continue
        if not isinstance(content, dict):
            raise UserError(f"--config {name}: section {section} must hold fields, got {str(content)[:60]!r}")
        unknown = [key for key in content if f"{section}.{key}" not in fields()]
        if unknown:
            raise UserError(complaint("cacr train", f"unrecognized arguments: {section}.{unknown[0]}", fields()))
        nested = [key for key, inner in content.items() if isinstance(inner, dict)]
        if nested:
            raise UserError(f"--config {name}: {section}.{nested[0]} must be one value or a list, got a mapping")
    return value


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    parser = build_parser()
    words = _expand_files(_expand_presets(argv))
    try:
        values = parser.parse_args(words)
        return dict(parser.instantiate(values))
    except ArgumentError as error:
        message = " ".join(str(error).split())
        wrong = WRONG_VALUE.match(message)
        if wrong is not None and wrong[1] in fields():
            raise UserError(f"{wrong[1]}: expected {in_words(fields()[wrong[1]])}, got {wrong[2]}") from error
        raise UserError(complaint("cacr train", message, parser._option_string_actions)) from error


def _config(values: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})


def load_config(preset: str | None = None, arguments: Sequence[str] = ()) -> TrainConfig:
    """A configuration from a preset and command-line arguments.

    Raises:
        UserError: an unknown preset, field or value.
    """
    return _config(_parse([*(["--preset", preset] if preset else []), *arguments]))


def main(argv: Sequence[str] | None = None) -> int:
    """``cacr train ...``. Returns 0 when the run is finished, or was stopped by a signal with its checkpoint written.

    Raises:
        UserError: an expected problem, in one or two sentences.
    """
    values = _parse(sys.argv[1:] if argv is None else argv)
    if values["plan"]:
        from cacr_uniter.training.plan import show_plan

        show_plan(_config(values))
        return 0
    from accelerate import PartialState

    from cacr_uniter.training.trainer import train

    result = train(_config(values), progress=values["progress"])
    if not PartialState().is_main_process:
        return 0
    after = f"after {result.step} steps, {result.seconds:.0f} s"
    if result.finished and result.start == result.step:
        state = f"was finished after {result.step} steps; nothing to do"
    else:
        state = f"finished {after}" if result.finished else f"stopped; the same command continues {after}"
    print(f"{state}: {result.checkpoint_path}")
    if result.best_path is not None:
        print(f"best on validation: {result.best_path}")
    return 0
