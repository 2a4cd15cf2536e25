"""Command lines: a parser whose complaints are one sentence, and the types that its options share."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from cacr_uniter.errors import UserError

_UNKNOWN = "unrecognized arguments: "


class DefaultsInHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Appends an option's default to its help, unless there is none or the help says it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False or "default:" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """``argparse`` without guessing: options are written out, and a mistake is a ``UserError``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(complaint(self.prog, message, self._option_string_actions))


def complaint(command: str, message: str, known: Iterable[str]) -> str:
    """What ``argparse`` has against a command line, in one sentence; an unknown option with the nearest known one."""
    if not message.startswith(_UNKNOWN):
        return f"{message}; see {command} --help"
    word = message.removeprefix(_UNKNOWN).split()[0].split("=")[0]
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    cure = f"did you mean {near[0]}?" if near else f"see {command} --help"
    return f"{command} has no {'option' if word.startswith('-') else 'place for'} {word}: {cure}"


def positive(text: str) -> int:
    """A whole number from 1."""
    if not re.fullmatch(r"\+?0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)
