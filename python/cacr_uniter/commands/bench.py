"""`cacr bench`: measure the kernels beside their peers, the cost in training, the numerics; draw the results."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from cacr_uniter.arguments import DefaultsInHelp, Parser, positive
from cacr_uniter.commands.progress import bars
from cacr_uniter.commands.terminable import terminable
from cacr_uniter.errors import UserError

if TYPE_CHECKING:
    from cacr_uniter.benchmark.run import Plan

PARTS = {
    "plot": "draw the pictures and the summary of a results folder",
    "training": "step time and memory of UNITER with and without the loss",
    "numerics": "errors of every backend against float64, as the table of docs/numerics.md",
    "tune": "launches of the Triton kernels for this GPU, written to its launch table",
    "gpu-report": "everything about a GPU, in minutes",
}
DEFAULT_OUT = Path("benchmarks/results")


def main(argv: list[str]) -> int:
    words = list(argv)
    part = words.pop(0) if words and words[0] in PARTS else "kernels"
    command = {
        "kernels": _kernels,
        "plot": _plot,
        "training": _training,
        "numerics": _numerics,
        "tune": _tune,
        "gpu-report": _gpu_report,
    }[part]
    with terminable():
        return command(words)


def results_folder(out: Path | None, device: str) -> Path:
    """``out``, or the machine's folder below ``benchmarks/results``."""
    from cacr_uniter.benchmark.machine import device_name, slug

    return out if out is not None else DEFAULT_OUT / slug(device_name(device))


def pick_device(wanted: str) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU: take --device cpu, or see `cacr doctor`")
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser(
    name: str, description: str, out: str = "folder of the results (default: benchmarks/results/<machine>)"
) -> Parser:
    parser = Parser(
        prog=f"cacr bench {name}".strip(),
        description=description,
        formatter_class=DefaultsInHelp,
    )
    parser.add_argument("--out", type=Path, help=out)
    return parser


def _kernels(argv: list[str]) -> int:
    from cacr_uniter.benchmark.contenders import PEERS
    from cacr_uniter.benchmark.shapes import DTYPES

    others = "\n".join(f"  cacr bench {name:<12}{summary}" for name, summary in PARTS.items())
    parser = _parser("", "Measure the kernels beside their peers on this machine; results are appended as CSV.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"further parts:\n{others}"
    add = parser.add_argument
    add("--preset", choices=("quick", "full"), default="quick", help="quick: under a minute (default); full: all")
    add("--shapes", nargs="+", metavar="SHAPE", help="names (uniter-100-b32) or BxHxTxR[xD] in place of the preset's")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), help="default: float32 (quick on a CPU), float32 and bfloat16 "
        "(float16 on a GPU before 8.0)")  # fmt: skip
    add("--variants", nargs="+", choices=tuple(PEERS), default=list(PEERS), help="from scores, from queries and keys")
    add("--kinds", nargs="+", choices=("scores", "softmax", "probs"), help="default: scores, softmax (full: and probs)")
    add("--contenders", nargs="+", metavar="NAME", help="only these: triton, cuda, cpu, eager, compiled, bmm, ...")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    add("--seconds", type=float, help="of timing each direction (default: 0.2 quick, 1 full)")
    add("--processes", type=positive, help="fresh processes in which a CPU is timed (default: 1 quick, 3 full)")
    add("--threads", type=positive, help="of a CPU (default: torch's own choice)")
    add("--clock", choices=("wall", "process"), default="wall", help="process: processor time, for --threads 1 on a "
        "CPU that others use too")  # fmt: skip
    add("--budget", type=float, help="seconds after which no new shape is started (default: 40 quick, none full)")
    add("--missing", action="store_true", help="only what the results do not hold yet of this commit and its versions")
    add("--compile-only", action="store_true", help="measure nothing: fill the caches of Triton and torch.compile, in "
        "several processes")  # fmt: skip
    args = parser.parse_args(argv)

    from cacr_uniter.benchmark.run import run_benchmark
    from cacr_uniter.benchmark.summary import kernel_table

    device = pick_device(args.device)
    plan = make_plan(args, device)
    if args.compile_only:
        return _compile(plan)
    if plan.threads is not None:
        import torch

        torch.set_num_threads(plan.threads)
    out = results_folder(args.out, device)
    with bars() as progress:
        rows = run_benchmark(plan, out, progress)
    print(kernel_table([{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]))
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            name = " ".join(row[column] for column in ("shape", "dtype", "variant", "kind", "contender"))
            reasons.setdefault(f"{row['status']}: {row.get('note') or 'see its errors above'}", []).append(name)
    for reason, which in reasons.items():
        print(f"{reason} ({', '.join(which[:3])}{f' and {len(which) - 3} more' if len(which) > 3 else ''})")
    print(f"appended to {out / 'kernels.csv'}; pictures: cacr bench plot --out {out}")
    return 0


def _compile(plan: Plan) -> int:
    """Fills the caches; 1 if something could not be called."""
    from cacr_uniter.benchmark.ahead import compile_ahead

    rows = compile_ahead(plan)
    for row in rows:
        name = " ".join(str(row[column]) for column in ("shape", "dtype", "variant", "kind", "contender"))
        print(f"{name}: {row['status']} {row.get('note', '')}".rstrip())
    return int(any(row["status"] not in ("ok", "skipped") for row in rows))


def make_plan(args: argparse.Namespace, device: str) -> Plan:
    """The plan of the arguments, defaults filled by preset and device."""
    from cacr_uniter.benchmark.contenders import OURS, PEERS
    from cacr_uniter.benchmark.machine import half_dtype
    from cacr_uniter.benchmark.run import Plan as _Plan
    from cacr_uniter.benchmark.shapes import parse_shapes, preset_shapes

    quick = args.preset == "quick"
    known = (*OURS, *dict.fromkeys(name for peers in PEERS.values() for name in peers))
    unknown = [name for name in args.contenders or () if name not in known]
    if unknown:
        raise UserError(f"--contenders: there is no {unknown[0]!r}; there are {', '.join(known)}")
    for name in ("seconds", "processes", "budget", "threads"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}: give a positive number")
    if args.clock == "process" and (device != "cpu" or args.threads != 1):
        raise UserError("--clock process counts the time of one thread of a CPU: give --device cpu --threads 1 too")
    shapes = preset_shapes(args.preset, device)
    cpu_quick = quick and device == "cpu"
    return _Plan(
        shapes=parse_shapes(args.shapes, args.preset, device) if args.shapes else shapes,
        dtypes=tuple(args.dtypes or (("float32",) if cpu_quick else ("float32", half_dtype(device)))),
        kinds=tuple(args.kinds or (("scores", "softmax") if quick else ("scores", "softmax", "probs"))),
        device=device,
        seconds=args.seconds or (0.2 if quick else 1.0),
        processes=args.processes or (1 if quick else 3),
        longest=(2.0 if quick else 20.0) if device == "cpu" else 5.0,
        budget=args.budget or (40.0 if quick else float("inf")),
        threads=args.threads,
        clock=args.clock,
        compiled=not cpu_quick,
        contenders=tuple(args.contenders or ()),
        variants=tuple(args.variants),
        missing=args.missing,
    )


def _plot(argv: list[str]) -> int:
    words = "Draw pictures and a summary from the CSV files of a results folder."
    args = _parser("plot", words, f"folder of the results (default: all below {DEFAULT_OUT})").parse_args(argv)

    from cacr_uniter.benchmark.plots import draw
    from cacr_uniter.benchmark.results import any_in
    from cacr_uniter.benchmark.summary import write_summary

    if args.out and not any_in(args.out):
        raise UserError(f"no results in {args.out}: run `cacr bench --out {args.out}`, or give another --out")
    folders = [args.out] if args.out else sorted(path for path in DEFAULT_OUT.glob("*") if any_in(path))
    if not folders:
        raise UserError(f"no results below {DEFAULT_OUT}: run `cacr bench`, or give --out")
    for folder in folders:
        pictures = draw(folder)
        write_summary(folder, pictures)
        print("\n".join(str(path) for path in (*pictures, folder / "README.md")))
    return 0


def _training(argv: list[str]) -> int:
    from cacr_uniter.benchmark.training_run import main as training

    return training(argv, _parser("training", PARTS["training"]))


def _numerics(argv: list[str]) -> int:
    from cacr_uniter.benchmark.numerics import main as numerics

    return numerics(argv, _parser("numerics", PARTS["numerics"], "the Markdown file whose tables are replaced"))


def _tune(argv: list[str]) -> int:
    if importlib.util.find_spec("triton") is None:
        raise UserError("tuning needs the package triton: pip install triton")

    from cacr_uniter.benchmark.tune_run import main as tune

    return tune(argv, _parser("tune", PARTS["tune"], "the launch table, a JSON file"))


def _gpu_report(argv: list[str]) -> int:
    from cacr_uniter.benchmark.gpu_report import main as report

    return report(argv, _parser("gpu-report", PARTS["gpu-report"]))
