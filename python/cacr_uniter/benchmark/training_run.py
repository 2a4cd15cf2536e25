"""`cacr bench training`: the settings, one after another, into ``training.csv``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from cacr_uniter.benchmark import results
from cacr_uniter.benchmark.machine import half_dtype, provenance
from cacr_uniter.benchmark.pool import LATE, MALLOC_RETURNS, Row, run_tasks
from cacr_uniter.benchmark.training_cost import AUXILIARY, Setting
from cacr_uniter.errors import UserError
from cacr_uniter.training.sizes import parse_size

Progress = Callable[[str, int, int], None]

VARIANTS = ("plain", "mixed", "checkpointing", "mixed+checkpointing", "frozen", "mixed+frozen")
LAYERS = {"tiny": 2, "base": 12, "large": 24}

QUICK = (
    *(("mixed", 2, auxiliary) for auxiliary in ("none", "fused", "qk", "eager")),
    *(
        ("mixed", 32, "recipe"),
        ("mixed+checkpointing", 2, "fused"),
        ("plain", 2, "fused"),
        ("mixed+frozen", 2, "fused"),
    ),
)
"""The most telling of (variant, group, auxiliary), in this order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is the GPU if there is one")
    add("--models", nargs="+", choices=tuple(LAYERS), help="default: base and large on a GPU, tiny on a CPU")
    add("--auxiliary", nargs="+", choices=tuple(AUXILIARY), default=list(AUXILIARY), help="auxiliary losses")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="precision, memory savings")
    add("--quick", action="store_true", help="the most telling of these settings, each for every model in turn")
    add("--mixed", choices=("bf16", "fp16"), help="what mixed precision is (default: bf16, on a GPU before 8.0 fp16)")
    add("--pairs", type=int, default=32, help="pairs in one forward")
    add("--groups", type=int, nargs="+", default=[32, 2], help="pairs to a matched pair, which alone has the loss")
    add("--text", type=int, help="word pieces of a caption (default: 60, tiny: 20)")
    add("--regions", type=int, help="regions of an image (default: 100, tiny: 36)")
    add("--memory-limit", metavar="SIZE", help="imitate a card of this size, such as 11GB; a CPU process is limited")
    add("--no-search", action="store_true", help="do not look for the largest batch (on a CPU: only under a limit)")
    add("--seconds", type=float, default=1.0, help="of timing each setting")
    add("--budget", type=float, default=float("inf"), help="seconds after which nothing new is started")


def make_settings(args: argparse.Namespace, device: str) -> list[Setting]:
    """Every combination, the plainest first; with ``--quick`` the most telling first, the models in turn.

    Raises:
        UserError: sizes that do not fit together.
    """
    limit = None if args.memory_limit is None else parse_size(args.memory_limit, "--memory-limit")
    models = args.models or (["base", "large"] if device == "cuda" else ["tiny"])
    for group in args.groups:
        if group < 2 or args.pairs < group or args.pairs % group:
            raise UserError(f"--groups: {group} is not 2 to --pairs ({args.pairs}) and a divisor of it")
    mixed = args.mixed or {"bfloat16": "bf16", "float16": "fp16"}[half_dtype(device)]
    chosen = list(product(models, args.variants, args.groups, args.auxiliary))
    if args.quick:
        told = [(model, *rest) for rest in QUICK for model in models]
        chosen = [setting for setting in told if setting in chosen]
    settings = []
    for model, variant, group, auxiliary in chosen:
        settings.append(
            Setting(
                model=model,
                auxiliary=auxiliary,
                precision=mixed if "mixed" in variant else "fp32",
                checkpointing="checkpointing" in variant,
                frozen_layers=LAYERS[model] // 2 if "frozen" in variant else 0,
                n_text=args.text or (20 if model == "tiny" else 60),
                n_vision=args.regions or (36 if model == "tiny" else 100),
                pairs=args.pairs,
                group=group,
                device=device,
                seconds=args.seconds,
                memory_limit=limit,
                search=not args.no_search and (device == "cuda" or limit is not None),
            )
        )
    return settings


def run_settings(settings: list[Setting], out: Path, progress: Progress, budget: float = float("inf")) -> list[Row]:
    """Measures settings and appends each to ``out/training.csv`` as soon as it is there. Returns the rows.

    On a CPU every setting has a process of its own, so that its memory is its own.
    """
    start = time.monotonic()
    written: list[Row] = []

    def write(setting: Setting, row: Row) -> None:
        written.append({**provenance(setting.device), **setting.columns, **row})
        results.append(out, "training", written[-1:])
        progress("settings", len(written), len(settings))

    batches = [settings] if settings and settings[0].device == "cuda" else [[setting] for setting in settings]
    for batch in batches:
        tasks: list[tuple[str, dict[str, Any]]] = [("training", asdict(setting)) for setting in batch]
        finished = 0
        device = batch[0].device
        limit = batch[0].memory_limit if device == "cpu" else None
        if time.monotonic() - start < budget:
            answers = run_tasks(
                tasks,
                device,
                timeout=min(300, max(60, budget / 3)),
                environment=MALLOC_RETURNS if device == "cpu" else None,
                memory_limit=limit,
            )
            for index, rows in answers:
                write(batch[index], rows[-1])
                finished = index + 1
                if time.monotonic() - start > budget:
                    break
        for setting in batch[finished:]:
            write(setting, {"status": "skipped", "note": LATE})
    return written


def main(argv: list[str], parser: argparse.ArgumentParser) -> int:
    """The command; ``parser`` has ``--out``."""
    add_arguments(parser)
    args = parser.parse_args(argv)

    from cacr_uniter.benchmark.summary import training_table
    from cacr_uniter.commands.bench import pick_device, results_folder
    from cacr_uniter.commands.progress import bars

    device = pick_device(args.device)
    out = results_folder(args.out, device)
    with bars() as progress:
        rows = run_settings(make_settings(args, device), out, progress, args.budget)
    print(training_table([{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]))
    print(f"appended to {out / 'training.csv'}")
    return 0
