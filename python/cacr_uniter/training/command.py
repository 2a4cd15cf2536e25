"""``cacr train``: the configuration from presets, YAML files and the command line."""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from cacr_uniter.errors import UserError
from cacr_uniter.training.config import TrainConfig

PRESETS = Path(__file__).parent.parent / "presets"


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
        f"--preset NAME takes a configuration of the program ({', '.join(presets())}); presets, YAML files and single "
        "fields may be mixed, later ones replace earlier ones.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
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


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    parser = build_parser()
    try:
        values = parser.parse_args(_expand_presets(argv))
        return dict(parser.instantiate(values))
    except ArgumentError as error:
        raise UserError(f"{' '.join(str(error).split())}") from error
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"a configuration file cannot be read: {' '.join(str(error).split())}") from error


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
    state = "finished" if result.finished else "stopped; the same command continues"
    print(f"{state} after {result.step} steps, {result.seconds:.0f} s: {result.checkpoint_path}")
    return 0
