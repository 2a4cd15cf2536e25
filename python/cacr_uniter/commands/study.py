"""`cacr study`: the comparison of auxiliary losses over seeds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cacr_uniter.arguments import Parser, positive
from cacr_uniter.commands import data_scenes
from cacr_uniter.commands.demo import SCENES
from cacr_uniter.commands.progress import bars
from cacr_uniter.commands.terminable import terminable
from cacr_uniter.errors import UserError
from cacr_uniter.study import DEFAULT_VARIANTS, METRICS, VARIANTS, Study, run_study


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    scenes = args.scenes or args.out / "scenes"
    study = Study(str(scenes), args.preset, tuple(args.variants), tuple(range(args.seeds)), tuple(args.train))
    study.check()
    if not scenes.exists():
        if args.scenes is not None:
            raise UserError(f"--scenes: {scenes} does not exist; write it with: cacr data scenes --out {scenes}")
        data_scenes.main(["--out", str(scenes), *SCENES])
    with terminable(), bars() as progress:
        results = run_study(args.out, study, args.processes, progress)
    show(results)
    print(f"every number: {args.out / 'results.json'}")
    return 0


def show(results: dict[str, Any]) -> None:
    """Prints mean, spread and every seed's value of the group scores, then the means of all metrics."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 110)
    for metric in ("group held_out", "group seen"):
        table = Table(title=f"{metric.replace('_', ' ')}, percent (chance 16.67)", title_justify="left")
        for column in ("loss", "mean", "sd", "min", "max", "every seed"):
            table.add_column(column, justify="left" if column in ("loss", "every seed") else "right", no_wrap=True)
        for variant, own in results["scores"].items():
            if own[metric]:
                s = results["summary"][variant][metric]
                numbers = (f"{s[name]:.1f}" for name in ("mean", "sd", "min", "max"))
                table.add_row(variant, *numbers, " ".join(f"{value:.1f}" for value in own[metric].values()))
        console.print(table)
    table = Table(title="mean ± sd over seeds, percent", title_justify="left")
    for column in ("loss", *METRICS[2:]):
        table.add_column(column.replace("_", " "), justify="left" if column == "loss" else "right")
    for variant, own in results["summary"].items():
        cells = (f"{own[m]['mean']:.1f} ± {own[m]['sd']:.1f}" if m in own else "" for m in METRICS[2:])
        table.add_row(variant, *cells)
    console.print(table)
    console.print("Seeds differ in weights and sampling. A difference of means below the spread shows nothing.")


def _parser() -> Parser:
    parser = Parser(
        prog="cacr study",
        description="Train the same small UNITER without and with each auxiliary loss, over several seeds, and compare "
        "the scores. An interrupted study goes on when the same command is run again.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/study"), help="folder of the runs (default: runs/study)")
    add("--scenes", type=Path, help="scene set (default: the demo's, written into --out)")
    add("--preset", default="demo", help="preset of cacr train (default: demo)")
    add("--variants", nargs="+", metavar="LOSS", default=list(DEFAULT_VARIANTS), help=f"of: {', '.join(VARIANTS)}")
    add("--seeds", type=positive, default=5, help="seeds 0 .. N - 1 (default: 5)")
    add("--processes", type=positive, default=min(2, os.cpu_count() or 1), help="runs at a time (default: 2)")
    add("train", nargs="*", help="after --: further options of cacr train, such as --optim.steps=1500")
    return parser
