"""`cacr eval attention`: how congruent the attention of matched and of mismatched pairs is, and a picture of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacr_uniter.arguments import Parser, positive
from cacr_uniter.commands.box_options import RUN_RULE, add_box_options, asked_rule
from cacr_uniter.errors import UserError


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.picture and not args.picture.parent.is_dir():
        raise UserError(f"--picture: there is no folder {args.picture.parent}")

    from cacr_uniter.commands.progress import bars, tell
    from cacr_uniter.evaluation.attention_plot import draw
    from cacr_uniter.evaluation.congruence import congruence, maps, words_of
    from cacr_uniter.evaluation.scoring import caption_ids, load_model, open_examples, pick_device, run_rule

    rule = asked_rule(args) or run_rule(args.checkpoint)
    dataset, examples = open_examples(args.data, args.examples, args.text, args.images, rule)
    sizes, vocabulary = (dataset.text_db.vocab_size, dataset.feature_dim), dataset.text_db.vocabulary
    model = load_model(args.checkpoint, args.model_size, *sizes, pick_device(args.device), "rank", tell, vocabulary)
    dataset.check_lengths(model.config.max_position_embeddings)
    captions = caption_ids(examples, dataset)
    chosen = range(min(len(examples), args.max_examples or len(examples)))
    pictured = _pictured([example.id for example in examples], args.example)
    if args.picture:
        pair = captions[pictured][args.caption], examples[pictured].images[args.image]
        of_one = maps(model, dataset, pair, args.layer, args.head, args.kind, args.projection_scale)
        heads = "mean over heads" if args.head is None else f"head {args.head}"
        kind = "matched" if args.caption == args.image else "mismatched"
        labels = {"text": words_of(dataset, pair[0]), "vision": [str(i) for i in range(len(of_one["vision"].own))]}
        title = f"{pair[0]} with {pair[1]} ({kind}), layer {args.layer}, {heads}, kind {args.kind}"
        draw(args.picture, of_one, labels, title)
        tell(f"drawn: {args.picture}")
    pairs = [(captions[n][c], examples[n].images[i]) for n in chosen for c in (0, 1) for i in (c, 1 - c)]
    with bars() as progress:
        found = congruence(
            model,
            dataset,
            pairs,
            args.kind,
            args.projection_scale,
            args.batch_size,
            lambda done, total: progress("pairs", done, total),
        )
    report = summary(found, args.kind)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return 0


def _pictured(ids: Sequence[str], wanted: str | None) -> int:
    if wanted is None:
        return 0
    if wanted not in ids:
        raise UserError(f"--example: there is no example {wanted!r}; expected ids such as {ids[0]!r}")
    return ids.index(wanted)


def summary(found: NDArray[np.float64], kind: str) -> dict[str, Any]:
    """Means of each layer and side, matched and mismatched, and of their difference with its 95 % interval.

    Args:
        found: of `congruence`, [4 examples, layers, heads, 2]: each caption with its own image, then with the other.
    """
    paired = found.reshape(-1, 2, 2, *found.shape[1:]).mean(1)  # [examples, matched or not, layers, heads, sides]
    by_layer = paired.mean(3)
    change = by_layer[:, 1] - by_layer[:, 0]
    spread = 1.96 * change.std(0, ddof=1) / len(change) ** 0.5 if len(change) > 1 else np.full(change.shape[1:], np.nan)
    layers = []
    for layer in range(found.shape[1]):
        sides = {}
        for number, side in enumerate(("text", "vision")):
            matched, other = (float(by_layer[:, which, layer, number].mean()) for which in (0, 1))
            half = float(spread[layer, number])
            sides[side] = {
                "matched": matched,
                "mismatched": other,
                "difference": other - matched,
                "half_ci95": None if np.isnan(half) else half,
                "heads": [float(x) for x in paired[:, 0, layer, :, number].mean(0)],
            }
        layers.append(sides)
    return {"n": len(change), "kind": kind, "layers": layers}


def show(report: dict[str, Any]) -> None:
    """Prints a report as a table of the layers."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"Incongruence of attention in nats a row, {report['n']} examples, kind {report['kind']}",
        title_justify="left",
    )
    for column in ("layer", "side", "matched", "mismatched", "difference", "heads, matched"):
        table.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
    for layer, sides in enumerate(report["layers"]):
        for side, numbers in sides.items():
            half = numbers["half_ci95"]
            change = f"{numbers['difference']:+.4f}" + ("" if half is None else f" ± {half:.4f}")
            heads = f"{min(numbers['heads']):.3f} to {max(numbers['heads']):.3f}"
            values = (f"{numbers['matched']:.4f}", f"{numbers['mismatched']:.4f}", change, heads)
            table.add_row(str(layer) if side == "text" else "", side, *values)
    console.print(table)
    console.print("KL(p||q) + KL(q||p) of own attention and that through the other side; ±: 95 %, over examples.")


def _parser() -> Parser:
    parser = Parser(
        prog="cacr eval attention",
        description="How far the attention among words is from that among the image regions seen through the cross "
        "attention, and the other way round: by layer, for captions with their own image and with the other one.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder of a training run or checkpoint, or a weights file")
    add("--data", type=Path, help="scene set with winoground.json, txt/winoground.db and img")
    add("--examples", type=Path, help="winoground.json, examples.jsonl or .parquet (instead of --data)")
    add("--text", type=Path, help="text database of the captions (instead of --data)")
    add("--images", type=Path, help="image database of the region features (instead of --data)")
    add("--kind", choices=("softmax", "scores"), default="softmax", help="projected: probabilities (default) or scores")
    add("--projection-scale", type=float, default=1.0, metavar="X", help="as aux.projection_scale (default: 1)")
    add("--max-examples", type=positive, help="only so many (default: all)")
    add("--picture", type=Path, metavar="FILE", help="also draw one pair as PNG")
    add("--example", metavar="ID", help="of the picture (default: the first)")
    add("--caption", type=int, choices=(0, 1), default=0, help="of that example (default: 0)")
    add("--image", type=int, choices=(0, 1), default=0, help="of that example (default: 0)")
    add("--layer", type=int, default=-1, help="of the picture, negative ones from the end (default: -1)")
    add("--head", type=int, help="of the picture (default: the mean over heads)")
    add("--model-size", help="for a weights file: base (default), large or a configuration JSON")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--batch-size", type=positive, default=64, help="pairs at once (default: 64)")
    add("--json", action="store_true", help="print everything as JSON")
    add_box_options(parser, RUN_RULE)
    return parser
