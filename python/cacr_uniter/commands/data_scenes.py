"""`cacr data scenes`: write a scene data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cacr_uniter.arguments import DefaultsInHelp, Parser, positive
from cacr_uniter.commands.progress import bars
from cacr_uniter.data.scenes.relations import RELATIONS
from cacr_uniter.data.scenes.settings import SceneSettings
from cacr_uniter.data.scenes.statements import ATTRIBUTES


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in vars(args).items()}
    out, workers = values.pop("out"), values.pop("workers")
    settings = SceneSettings(**values)
    settings.check()

    from cacr_uniter.data.scenes.write import write_scenes

    with bars() as progress:
        made = write_scenes(out, settings, progress, workers)
    for split, pictures in made["pictures"].items():
        print(f"{split:>12}: {pictures} pictures, {made['captions'][split]} captions")
    print(f"{len(made['held_out'])} combinations of two things and a relation or attribute are held out")
    print(f"written to {out}; train on it with: cacr train --data.scenes {out}")
    return 0


def _parser() -> Parser:
    default = SceneSettings()
    parser = Parser(
        prog="cacr data scenes",
        description="Draw pictures with known truth; write pictures, captions, region features and a Winoground-like "
        "test set in the published database formats. The same options give the same content.",
        formatter_class=DefaultsInHelp,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make; must not exist")
    add("--seed", type=int, default=default.seed, help="of everything")
    add("--n-train", type=int, default=default.n_train, help="training pictures")
    add("--n-val", type=int, default=default.n_val, help="validation pictures")
    add("--n-winoground", type=int, default=default.n_winoground, help="quadruples, half of them held out")
    add("--captions", type=int, default=default.captions, help="most captions of a picture")
    add("--objects", type=int, nargs=2, metavar=("LEAST", "MOST"), default=default.objects, help="things in a picture")
    add("--size", type=int, default=default.size, help="side of a picture in pixels")
    add("--relations", nargs="*", default=default.relations, metavar="PHRASE", help=f"of: {', '.join(RELATIONS)}")
    add("--attributes", nargs="*", default=default.attributes, metavar="NAME", help=f"of: {', '.join(ATTRIBUTES)}")
    add("--things", type=int, default=None, help="nouns used (default: all)")
    add("--held-out", type=float, default=default.held_out, help="share of combinations never trained")
    add("--sprites", type=Path, default=None, help="folder with cut-out X.png and X.txt files instead of drawn shapes")
    add("--vocab", type=Path, default=None, help="vocab.txt to use (default: one trained on the captions)")
    add("--workers", type=positive, default=min(8, os.cpu_count() or 1), help="processes that paint")
    return parser
