"""`cacr eval retrieval`: recall of image and text retrieval over the full score matrix."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from cacr_uniter.arguments import Parser, positive
from cacr_uniter.commands.box_options import RUN_RULE, add_box_options, asked_rule
from cacr_uniter.errors import UserError


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    report = evaluate(args, rank, processes)
    if report is None:
        return 0
    from cacr_uniter.files import write_json

    write_json(args.out / "recall.json", report)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)
    return 0


def evaluate(args: argparse.Namespace, rank: int, processes: int) -> dict[str, Any] | None:
    """Scores this process's parts; on process 0 the recalls, on the others None."""
    from cacr_uniter.commands.progress import bars, tell
    from cacr_uniter.data.dataset import RetrievalDataset
    from cacr_uniter.data.image_db import ImageDB
    from cacr_uniter.data.text_db import TextDB
    from cacr_uniter.evaluation import matrix
    from cacr_uniter.evaluation.retrieval import recall, subset
    from cacr_uniter.evaluation.scoring import load_model, pick_device, run_rule
    from cacr_uniter.training.config import DataConfig
    from cacr_uniter.training.data import open_source

    text, images = _folders(args)
    text_db = TextDB(text)
    dataset = RetrievalDataset(text_db, ImageDB(images, asked_rule(args) or run_rule(args.checkpoint)))
    device = pick_device(_own_device(args.device, int(os.environ.get("LOCAL_RANK", "0"))))
    say = tell if rank == 0 else lambda text: None
    data_sizes = text_db.vocab_size, dataset.feature_dim
    model = load_model(args.checkpoint, args.model_size, *data_sizes, device, args.head, say, text_db.vocabulary)
    say(f"regions of {dataset.image_db.folder}: {dataset.image_db.rule}")
    limit = args.max_images or len(dataset.image_names)
    number = {name: i for i, name in enumerate(dataset.image_names)}
    chosen = subset([number[dataset.txt2img[key]] for key in dataset.caption_ids], limit)
    dataset = dataset.restricted(chosen)
    dataset.check_lengths(model.config.max_position_embeddings)
    sizes = [dataset.image_db.count(name) for name in dataset.image_names]
    order = np.argsort(sizes, kind="stable")
    identity = matrix.Identity(
        weights=matrix.weights_digest(model),
        head=args.head,
        captions=matrix.captions_digest(dataset),
        images=matrix.images_digest(dataset),
        block=args.block,
    )
    matrix.open_parts(args.out, identity)
    source = open_source(dataset, DataConfig())
    n_captions = len(dataset.caption_ids)
    with bars(rank == 0) as progress:
        matrix.score_blocks(
            args.out, model, source, order, n_captions, args.block, args.head, args.batch_size, rank, processes,
            lambda done, total: progress("pairs", done, total),
        )  # fmt: skip
    if rank:
        return None
    scores = matrix.join_parts(args.out, order, n_captions, args.block)
    numbers = recall(scores, source.image_of, args.ties)
    return {"captions": n_captions, "images": len(order), "head": args.head, "ties": args.ties, **numbers}


def _folders(args: argparse.Namespace) -> tuple[Path, Path]:
    given = [name for name in ("text", "images") if getattr(args, name) is not None]
    if args.data is not None:
        if given:
            raise UserError(f"--data stands for --text and --images: give it or --{given[0]}, not both")
        return args.data / "txt" / f"{args.split or 'val'}.db", args.data / "img"
    if len(given) < 2:
        raise UserError("give --data DIR of a scene set, or --text and --images")
    if args.split is not None:
        raise UserError(f"--split {args.split} belongs to --data; --text names the database itself")
    return args.text, args.images


def _own_device(name: str, local_rank: int) -> str:
    """A GPU of its own for every process that torchrun starts on a machine."""
    import torch

    if name not in ("auto", "cuda") or torch.cuda.device_count() < 2:
        return name
    return f"cuda:{local_rank % torch.cuda.device_count()}"


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"retrieval, {report['captions']} captions x {report['images']} images, percent"
    table = Table(title=title, title_justify="left")
    for column in ("", "R@1", "R@5", "R@10", "mean"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, words in (("ir", "image retrieval"), ("tr", "text retrieval")):
        table.add_row(words, *(f"{report[f'{name}_{cut}']:.2f}" for cut in ("r1", "r5", "r10", "mean")))
    console.print(table)
    console.print(f"sum of the six: {report['rsum']:.2f}; {report['head']} head; ties by rule '{report['ties']}'")


def _parser() -> Parser:
    parser = Parser(
        prog="cacr eval retrieval",
        description="Recall of image and text retrieval over the scores of all captions with all images. Scores are "
        "kept in --out; the same command goes on where it was stopped, and torchrun shares the work between processes.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder of a training run or checkpoint, or a weights file")
    add("--out", type=Path, required=True, help="folder of the score parts and recall.json")
    add("--data", type=Path, help="scene set")
    add("--split", help="split of the scene set: train, val, winoground (default: val)")
    add("--text", type=Path, help="text database (instead of --data)")
    add("--images", type=Path, help="image database (instead of --data)")
    add("--max-images", type=positive, help="only the first so many images, and their captions")
    add("--ties", choices=("index", "pessimistic"), default="index", help="rule for equal scores (default: index)")
    add("--head", choices=("rank", "itm"), default="rank", help="head that scores a pair (default: rank)")
    add("--model-size", help="for a weights file: base (default), large or a configuration JSON")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--batch-size", type=positive, default=400, help="pairs scored at once (default: 400)")
    add("--block", type=positive, default=32, help="images per part (default: 32)")
    add("--json", action="store_true", help="print everything as JSON")
    add_box_options(parser, RUN_RULE)
    return parser
