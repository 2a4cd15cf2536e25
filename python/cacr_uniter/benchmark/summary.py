"""Tables of results, from the CSV files alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cacr_uniter.benchmark.goals import GOALS_HEAD, goals
from cacr_uniter.benchmark.results import KERNEL_KEY, REPORT, SHAPE, TRAINING_KEY, Row, newest, read
from cacr_uniter.files import parse_json, write_text

KERNEL_HEAD = (
    *("shape", "dtype", "from", "kind", "contender", "forward ms", "backward ms", "both ms", "p20-p80"),
    *("x floor", "bound", "x eager", "extra MB", "loss error", "gradient error", "TFLOP/s", "forward TFLOP/s"),
)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    cells = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def number(text: str, form: str = ".3g") -> str:
    return f"{float(text):{form}}" if text else ""


def kernel_table(rows: Iterable[Row]) -> str:
    """One line per contender: times of the three directions; floor, speed-up and rate of forward + backward.

    "x floor" is how many times the floor, "x eager" how many times faster than the eager closed form of the same
    shape, dtype and kind. TFLOP/s counts the least work of the problem, and is of the forward alone in its own column.
    """
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in newest(rows, KERNEL_KEY):
        key = tuple(row.get(name, "") for name in (*SHAPE, "variant", "kind", "contender"))
        groups.setdefault(key, {})[row["direction"]] = row
    eager = {key[:-1]: found["both"] for key, found in groups.items() if key[-1] == "eager" and "both" in found}
    return markdown(KERNEL_HEAD, (_kernel_line(key, found, eager.get(key[:-1])) for key, found in groups.items()))


def _kernel_line(key: tuple[str, ...], found: dict[str, Row], eager: Row | None) -> tuple[str, ...]:
    shape, *_, dtype, variant, kind, contender = key
    times = [number(found[d].get("median_ms", "")) if d in found else "" for d in ("forward", "backward", "both")]
    row = found.get("both") or next(iter(found.values()))
    front = (shape, dtype, variant, kind, contender)
    if not row.get("median_ms"):
        errors = [number(row.get(name, ""), ".0e") for name in ("loss_error", "gradient_error")]
        return (
            *front,
            *times[:2],
            row["status"],
            "",
            "",
            row["bound"],
            "",
            "",
            *errors,
            "",
            _rate(found.get("forward")),
        )
    median = float(row["median_ms"])
    faster = ""
    if eager is not None and eager.get("median_ms") and row["direction"] == "both":
        faster = f"{float(eager['median_ms']) / median:.2f}"
    return (
        *front,
        *times,
        f"{number(row['p20_ms'])}-{number(row['p80_ms'])}",
        f"{median / float(row['floor_ms']):.1f}",
        row["bound"],
        faster,
        number(row.get("extra_mb", "")),
        number(row.get("loss_error", ""), ".0e"),
        number(row.get("gradient_error", ""), ".0e"),
        _rate(row),
        _rate(found.get("forward")),
    )


def _rate(row: Row | None) -> str:
    """TFLOP/s of a row, if it was timed."""
    return f"{float(row['gflop']) / float(row['median_ms']):.3g}" if row and row.get("median_ms") else ""


TRAINING_HEAD = (
    *("model", "auxiliary loss", "precision", "checkpointing", "frozen", "T", "R", "pairs", "matched", "step ms"),
    *("peak MB", "limit MB", "most pairs that fit"),
)


def training_table(rows: Iterable[Row]) -> str:
    """One line per setting of `cacr bench training`."""
    lines = []
    for row in newest(rows, TRAINING_KEY):
        names = ("model", "auxiliary", "precision", "checkpointing", "frozen_layers", "n_text", "n_vision")
        step = number(row.get("median_ms", ""), ".4g") or row["status"]
        sizes = [number(row.get(name, ""), ".0f") for name in ("peak_mb", "limit_mb", "largest_pairs")]
        lines.append((*(row[name] for name in (*names, "pairs", "matched")), step, *sizes))
    return markdown(TRAINING_HEAD, lines)


def ceilings_table(rows: Iterable[Row]) -> str:
    found = newest(rows, ("what",))
    return markdown(
        ("ceiling", "measured", "unit", "date"), [(r["what"], number(r["value"]), r["unit"], r["date"]) for r in found]
    )


def report_table(path: Path) -> str:
    """What became of the stages of `cacr bench gpu-report`; empty if there was none."""
    if not path.is_file():
        return ""
    stages = parse_json(path.read_text(encoding="utf-8"))
    lines = [
        [name, *(str(found.get(key, "")) for key in ("outcome", "seconds", "tests"))] for name, found in stages.items()
    ]
    return markdown(("stage", "outcome", "seconds", "tests"), lines)


def write_summary(folder: Path, pictures: Iterable[Path]) -> Path:
    """Writes ``folder/README.md`` from the CSV files of the folder and returns its path."""
    kernels, training, ceilings = (read(folder, name) for name in ("kernels", "training", "ceilings"))
    rows = kernels or training or ceilings
    parts = [f"# {rows[-1]['device']}" if rows else "# No results yet"]
    if rows:
        last = rows[-1]
        versions = ", ".join(f"{name} {last[name]}" for name in ("cacr", "torch", "triton", "cuda") if last[name])
        parts.append(
            f"Written by `cacr bench plot` from the CSV files beside it. Newest results: {last['date']}, "
            f"commit {last['commit'] or 'unknown'}, {versions}. A line is the newest measurement of its kind."
        )
    if ceilings:
        parts += ["## Ceilings", ceilings_table(ceilings)]
    met = goals(kernels)
    if met:
        parts += [
            "## Goals",
            "Those of docs/performance.md, as far as this folder can tell.",
            markdown(GOALS_HEAD, met),
        ]
    stages = report_table(folder / REPORT)
    if stages:
        parts += ["## Report", stages]
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    if kernels:
        loads = [float(row["load"]) for row in kernels if row["load"]]
        parts += ["## Kernels", _kernel_legend(loads), kernel_table(kernels)]
    if training:
        parts += ["## Training", training_table(training)]
    path = folder / "README.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _kernel_legend(loads: list[float]) -> str:
    busy = f" Load average of the machine during the runs: {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    return (
        "`x floor`, `x eager`, `extra MB` and `TFLOP/s` are of forward + backward. `forward` is without gradient; "
        "`both` is a training call; `backward` follows a kept forward. `extra MB` is the peak beyond the inputs, "
        "gradients included." + busy
    )
