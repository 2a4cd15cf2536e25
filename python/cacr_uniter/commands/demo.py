"""`cacr demo`: write scenes, train the preset `demo` on them, and score the result beside chance."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from cacr_uniter.arguments import Parser
from cacr_uniter.commands import data_scenes, eval_winoground

SCENES = (
    *("--n-train", "3000", "--n-val", "100", "--n-winoground", "400"),
    *("--things", "8", "--objects", "2", "4", "--attributes", "colour"),
    *("--relations", "left of", "right of", "above", "below", "inside", "around"),
)
"""Options of the demo's scenes: eight shapes in eight colours, six relations, two to four things in a picture."""


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    started = time.monotonic()
    scenes, run = args.out / "scenes", args.out / "run"
    if not scenes.exists():
        _say("data scenes", ["--out", str(scenes), *SCENES])
        data_scenes.main(["--out", str(scenes), *SCENES])

    from cacr_uniter.training.command import load_config
    from cacr_uniter.training.trainer import train

    options = [f"--data.scenes={scenes}", f"--run.out={run}", *args.train]
    _say("train", ["--preset", "demo", *options])
    result = train(load_config("demo", options))
    if not result.finished:
        print(f"stopped after {result.step} steps; the same command goes on from there")
        return 130
    wanted = ["--checkpoint", str(run), "--data", str(scenes)]
    _say("eval winoground", wanted)
    eval_winoground.main([*wanted, "--breakdown", "split", "tag"])
    print(f"done in {time.monotonic() - started:.0f} s; pictures: {scenes / 'images'}, training report: {run}")
    return 0


def _say(command: str, words: list[str]) -> None:
    print(f"$ cacr {command} {shlex.join(words)}", flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="cacr demo",
        description="Write a scene set, fine-tune a small UNITER on it with CACR, print text, image and group scores "
        "beside chance. What is done already is not done again.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of it all (default: runs/demo)")
    parser.add_argument("train", nargs="*", help="after --: options of cacr train, such as --aux.loss=none")
    return parser
