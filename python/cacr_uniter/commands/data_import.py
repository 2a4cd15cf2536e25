"""`cacr data import`: region features and captions of other programs into the published database formats."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cacr_uniter.arguments import Parser, positive
from cacr_uniter.commands.progress import bars
from cacr_uniter.errors import UserError

CAPTION_FORMATS = ("karpathy-json", "winoground")
BELONGS = {
    "labels": ("vinvl-tsv",),
    "ids": ("hdf5-fixed", "hdf5-adaptive"),
    "vocab": CAPTION_FORMATS,
    "splits": ("karpathy-json",),
}
"""Formats that an option is for."""


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    if args.format in CAPTION_FORMATS:
        return _captions(args)
    return _features(args)


def _check(args: argparse.Namespace) -> None:
    """Refuses options that the format does not read."""
    for name, formats in BELONGS.items():
        if getattr(args, name) is not None and args.format not in formats:
            raise UserError(f"--{name} belongs to {', '.join(formats)}, the format is {args.format}")


def _features(args: argparse.Namespace) -> int:
    from cacr_uniter.data.importers.features import import_features

    with bars() as progress:
        report = import_features(
            args.format,
            args.source,
            args.out,
            names=args.names or "keep",
            threshold=args.threshold,
            max_boxes=args.max_boxes,
            min_boxes=args.min_boxes,
            fixed=args.fixed,
            compressed=args.compressed,
            dtype=args.dtype,
            labels=args.labels,
            ids=args.ids,
            soft_labels=args.soft_labels,
            skip_bad=args.skip_bad,
            limit=args.limit,
            progress=progress,
        )
    print(report)
    return 0


def _captions(args: argparse.Namespace) -> int:
    from cacr_uniter.data.importers.captions import import_captions
    from cacr_uniter.evaluation.captions import import_examples

    if args.vocab is None:
        raise UserError("--vocab: captions need a vocab.txt; UNITER uses that of bert-base-cased")
    if args.format == "winoground":
        print(json.dumps(import_examples(args.source, args.out, args.vocab), indent=1))
        return 0
    with bars() as progress:
        made = import_captions(
            args.source, args.out, args.vocab, names=args.names or "auto", splits=args.splits, progress=progress
        )
    print(json.dumps(made, indent=1))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="cacr data import",
        description="Import region features, or the captions of a Karpathy JSON or of Winoground's examples, into the "
        "published database formats. "
        "An interrupted import goes on when the same command is run again.",
    )
    add = parser.add_argument
    formats = (
        *("butd-tsv", "lxmert-tsv", "vinvl-tsv", "milvlg-npz", "uniter-npz"),
        *("hdf5-fixed", "hdf5-adaptive", *CAPTION_FORMATS),
    )
    add("format", choices=formats, help="format of the source")
    add("source", type=Path, help="file, or folder of npz files")
    add("--out", type=Path, required=True, help="folder that will hold the database")
    add("--names", help="npz names: keep, flickr30k, coco, winoground, ... (default: keep; captions: as the JSON says)")
    add("--threshold", type=float, default=0.2, help="confidence above which regions are kept (default: 0.2)")
    add("--max-boxes", type=positive, default=100, help="most regions of an image (default: 100)")
    add("--min-boxes", type=int, default=10, help="least regions of an image, if it has them (default: 10)")
    add("--fixed", type=positive, help="keep exactly so many regions instead")
    add("--compressed", action="store_true", help="store npz archives")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored numbers (default: float16)")
    add("--labels", type=Path, help="vinvl-tsv: the predictions file with the confidences")
    add("--ids", type=Path, help="hdf5: table of image ids, if it is not beside the file")
    add("--soft-labels", action="store_true", help="keep class probabilities")
    add("--skip-bad", action="store_true", help="leave damaged images out and report them")
    add("--limit", type=positive, help="only the first so many rows")
    add("--vocab", type=Path, help="captions: vocab.txt")
    add("--splits", nargs="+", metavar="SPLIT", help="karpathy-json: splits to write (default: all)")
    return parser
