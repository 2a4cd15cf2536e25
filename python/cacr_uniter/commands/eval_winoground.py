"""`cacr eval winoground`: text, image and group scores of a model or of a score file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cacr_uniter.arguments import Parser, positive
from cacr_uniter.commands.box_options import BOX_OPTIONS, RUN_RULE, add_box_options, asked_rule
from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.examples import BREAKDOWNS, Example, breakdowns, read_difficulty, read_examples
from cacr_uniter.evaluation.winoground import METRICS, Scores, read_scores, summary, write_scores

Breakdowns = dict[str, dict[str, list[int]]]
Opened = tuple[list[str], list[Example], Callable[[], Scores]]
"""Ids, examples (none where nothing tells of them) and what gives the scores [n, 2, 2]."""


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    ids, examples, score = _from_file(args) if args.scores else _from_model(args)
    groups = _groups(args, ids, examples)
    scores = score()
    report = summary(scores, groups)
    try:
        if args.write_scores:
            write_scores(args.write_scores, ids, scores)
    finally:  # scoring took long: a full disk does not take its result too
        if args.json:
            print(json.dumps(report, indent=1))
        else:
            show(report, args.breakdown)
    return 0


def _groups(args: argparse.Namespace, ids: list[str], examples: list[Example]) -> Breakdowns:
    """Examples of each breakdown; what is wrong with the tags is said here, before anything is scored."""
    difficulty = _difficulty(args.difficulty, ids) if args.difficulty else None
    if difficulty is not None and not examples:
        examples = [Example(key, ("", ""), ("", "")) for key in ids]
    groups = breakdowns(examples, difficulty) if examples else {}
    absent = [name for name in args.breakdown if not any(name == key.split()[0] for key in groups)]
    if absent:
        raise UserError(f"--breakdown {absent[0]}: the examples say nothing about it; give --examples or --difficulty")
    return groups


def _difficulty(path: Path, ids: list[str]) -> dict[str, list[str]]:
    """Tags of the examples.

    Raises:
        UserError: the file is wrong, or of other examples.
    """
    tags = read_difficulty(path)
    if not tags.keys() & set(ids):
        raise UserError(
            f"difficulty tags {path}: none of the examples has an entry there; expected ids such as {ids[0]!r}, got "
            f"{next(iter(tags), 'none')!r}; give the tags of these examples"
        )
    return tags


def _check(args: argparse.Namespace) -> None:
    """Refuses options that do not go together, and a file that could not be written after the work is done."""
    if (args.scores is None) == (args.checkpoint is None):
        raise UserError("give either --scores FILE or --checkpoint with --data")
    model_only = ("text", "images", "model_size", "head", "device", "batch_size", *BOX_OPTIONS)
    idle = [name for name in model_only if getattr(args, name) is not None]
    if args.scores and idle:
        raise UserError(f"--{idle[0].replace('_', '-')} belongs to --checkpoint, --scores needs no model")
    if args.data and args.examples and (args.scores or (args.text and args.images)):
        raise UserError("--data is not read beside --examples" + ("" if args.scores else ", --text and --images"))
    if args.write_scores and not args.write_scores.parent.is_dir():
        raise UserError(f"--write-scores: there is no folder {args.write_scores.parent}")
    unknown = [name for name in args.breakdown if name not in BREAKDOWNS]
    if unknown:
        raise UserError(f"--breakdown: expected some of {', '.join(BREAKDOWNS)}, got {unknown[0]!r}")


def _from_file(args: argparse.Namespace) -> Opened:
    found = read_scores(args.scores)
    path = args.examples or (args.data / "winoground.json" if args.data else None)
    examples = read_examples(path) if path else []
    ids = [example.id for example in examples] or sorted(found, key=lambda key: (len(key), key))
    absent = [key for key in ids if key not in found]
    surplus = len(found) + len(absent) - len(ids)
    if absent or surplus:
        what = f"lacks example {absent[0]!r} of" if absent else f"has {surplus} examples more than"
        raise UserError(f"score file {args.scores} {what} {path}: the two must belong together")
    return ids, examples, lambda: np.stack([found[key] for key in ids])


def _from_model(args: argparse.Namespace) -> Opened:
    from cacr_uniter.commands.progress import bars, tell
    from cacr_uniter.evaluation.scoring import Head, load_model, open_examples, pick_device, run_rule, score_examples

    rule = asked_rule(args) or run_rule(args.checkpoint)
    dataset, examples = open_examples(args.data, args.examples, args.text, args.images, rule)
    sizes, vocabulary = (dataset.text_db.vocab_size, dataset.feature_dim), dataset.text_db.vocabulary
    head: Head = args.head or "rank"
    device = pick_device(args.device or "auto")
    model = load_model(args.checkpoint, args.model_size, *sizes, device, head, tell, vocabulary)
    tell(f"regions of {dataset.image_db.folder}: {dataset.image_db.rule}")

    def score() -> Scores:
        with bars() as progress:
            return score_examples(
                model,
                dataset,
                examples,
                head,
                args.batch_size or 256,
                lambda done, total: progress("pairs", done, total),
            )

    return [example.id for example in examples], examples, score


def show(report: dict[str, Any], wanted: Sequence[str] = ()) -> None:
    """Prints a report as tables: all examples beside chance, then the breakdowns (`wanted` ones only, if any)."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Winoground, {report['n']} examples, percent right", title_justify="left")
    for column in ("", *METRICS):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    table.add_row("model", *_cells(report))
    table.add_row("chance", *(f"{report['chance'][m]:.2f}" for m in METRICS))
    console.print(table)
    for name, values in report["breakdowns"].items():
        if wanted and name.split()[0] not in wanted:
            continue
        part = Table(title=f"by {name}", title_justify="left")
        for column in ("", "n", *METRICS):
            part.add_column(column, justify="left" if not column else "right", no_wrap=True)
        for value, numbers in values.items():
            part.add_row(value, str(numbers["n"]), *_cells(numbers, 0))
        console.print(part)
    console.print(
        f"single comparisons right (chance 50): text {report['pairwise_text']:.2f}, image "
        f"{report['pairwise_image']:.2f}; matching {report['matching']:.2f}"
    )
    console.print("In brackets: 95 % interval, bootstrap over examples. Ties are wrong.")


def _cells(numbers: dict[str, Any], decimals: int = 1) -> list[str]:
    """Scores with the ends of their intervals, a full hundred without decimals: tables fit 80 columns."""

    def end(percent: float) -> str:
        return f"{percent:.{decimals}f}".replace("100.0", "100")

    return [f"{numbers[m]['score']:.2f} [{', '.join(map(end, numbers[m]['ci95']))}]" for m in METRICS]


def _parser() -> Parser:
    parser = Parser(
        prog="cacr eval winoground",
        description="Which of two captions and two images with the same words belong together: text, image and group "
        "scores with strict inequalities, from a model or from a score file.",
    )
    add = parser.add_argument
    add("--scores", type=Path, help='file of lines {"label": "<id>_c<k>_i<j>", "score": x}')
    add("--checkpoint", type=Path, help="folder of a training run or checkpoint, or a local weights file")
    add("--data", type=Path, help="scene set with winoground.json, txt/winoground.db and img")
    add("--examples", type=Path, help="examples with tags: winoground.json, examples.jsonl or .parquet")
    add("--text", type=Path, help="text database of the captions (instead of --data)")
    add("--images", type=Path, help="image database of the region features (instead of --data)")
    add("--difficulty", type=Path, help='difficulty tags, {"id": ["tag", ...]}')
    add("--head", choices=("rank", "itm"), help="head that scores a pair (default: rank)")
    add("--model-size", help="for a weights file: base (default), large or a configuration JSON")
    add("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--batch-size", type=positive, help="pairs scored at once (default: 256)")
    add("--write-scores", type=Path, metavar="FILE", help="also write the scores as such a file")
    add("--breakdown", nargs="*", default=(), metavar="NAME", help=f"tables shown: {', '.join(BREAKDOWNS)}")
    add("--json", action="store_true", help="print everything as JSON")
    add_box_options(parser, RUN_RULE)
    return parser
