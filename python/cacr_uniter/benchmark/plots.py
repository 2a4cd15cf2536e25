"""Pictures of a results folder, drawn from its CSV files alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cacr_uniter.benchmark.contenders import OURS
from cacr_uniter.benchmark.results import KERNEL_KEY, Row, newest, read
from cacr_uniter.files import replacing

CARD_MB = 11000.0
"""Memory of the paper's cards, in 10^6 bytes."""

COLOURS = {
    "triton": "#1b6ca8",
    "cuda": "#2a9d8f",
    "cpu": "#1b6ca8",
    "eager": "#d1495b",
    "compiled": "#edae49",
    "compiled-max": "#c98a1b",
    "factored": "#8d6a9f",
    "factored-compiled": "#b39bc8",
    "bmm": "#888888",
    "sdpa": "#444444",
    "loop": "#b0b0b0",
}


def draw(folder: Path) -> list[Path]:
    """Draws ``time.png``, ``memory.png``, ``speedup.png`` and ``roofline.png``; those without data are left out.

    Returns:
        The paths that were written.
    """
    rows = [row for row in newest(read(folder, "kernels"), KERNEL_KEY) if row["status"] == "ok"]
    rows = [row for row in rows if row["kind"] == "scores" and row["direction"] == "both"]
    ceilings = {row["what"]: float(row["value"]) for row in read(folder, "ceilings")}
    drawn = []
    for name, function in (("time", _time), ("memory", _memory), ("speedup", _speedup), ("roofline", _roofline)):
        figure = function(rows, ceilings)
        if figure is not None:
            path = folder / f"{name}.png"
            with replacing(path) as partial:
                figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})
            drawn.append(path)
    return drawn


def _axes(columns: int, title: str, rows: list[Row]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 4.2), layout="constrained")
    figure.suptitle(f"{title}\n{rows[-1]['device']}, forward + backward, kind scores", fontsize=10)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _panels(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (variant, dtype)."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["variant"], row["dtype"]), []).append(row)
    return dict(sorted(panels.items(), reverse=True))


def _tokens(row: Row) -> int:
    return int(row["n_text"]) + int(row["n_vision"])


def _series(rows: Iterable[Row], column: str) -> dict[str, list[tuple[int, float]]]:
    """Contender to (N, value) along the squares T = R, which share their number of problems."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["shape"].startswith("square-") and row[column]:
            value = float(row[column]) + (float(row["input_mb"]) if column == "extra_mb" else 0.0)
            found.setdefault(row["contender"], []).append((_tokens(row), value))
    return {name: sorted(points) for name, points in found.items()}


def _lines(rows: list[Row], column: str, title: str, label: str) -> Any:
    panels = {key: part for key, part in _panels(rows).items() if _series(part, column)}
    if not panels:
        return None
    figure, axes = _axes(len(panels), title, rows)
    for axis, ((variant, dtype), part) in zip(axes, panels.items()):
        for name, points in _series(part, column).items():
            style = "-o" if name in OURS else "--o"
            axis.plot(*zip(*points), style, color=COLOURS[name], label=name, markersize=4)
        axis.set(xscale="log", yscale="log", xlabel="N = T + R tokens (T = R)", ylabel=label)
        lengths = sorted({int(x) for line in axis.get_lines() for x in line.get_xdata() if x > 0})
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.set_xticks([], minor=True)
        problems = next(int(r["batch"]) * int(r["heads"]) for r in part if r["shape"].startswith("square-"))
        axis.set_title(f"from {'q and k' if variant == 'qk' else 'scores'}, {dtype}, B x H = {problems}", fontsize=9)
        axis.grid(True, which="both", alpha=0.25)
        if column == "extra_mb":
            axis.axhline(CARD_MB, color="black", linewidth=1)
            axis.text(0.02, CARD_MB * 1.1, "11 GB", transform=axis.get_yaxis_transform(), fontsize=8)
        axis.legend(fontsize=7)
    return figure


def _time(rows: list[Row], _: dict[str, float]) -> Any:
    return _lines(rows, "median_ms", "Time against sequence length", "ms")


def _memory(rows: list[Row], _: dict[str, float]) -> Any:
    return _lines(rows, "extra_mb", "Memory against sequence length (inputs, workspace and gradients)", "MB")


def _speedup(rows: list[Row], _: dict[str, float]) -> Any:
    """Bars: how many times faster than the eager closed form, a group a shape."""
    eager = {(r["shape"], r["dtype"], r["variant"]): float(r["median_ms"]) for r in rows if r["contender"] == "eager"}
    parts = []
    for row in rows:
        base = eager.get((row["shape"], row["dtype"], row["variant"]))
        if base is not None and row["contender"] not in ("eager", "sdpa", "bmm", "loop"):
            label = f"{row['shape']}\n{row['variant']}, {row['dtype']}"
            parts.append((label, row["contender"], base / float(row["median_ms"])))
    if not parts:
        return None
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for label, _, _ in parts))
    names = list(dict.fromkeys(name for _, name, _ in parts))
    figure = Figure(figsize=(7.5, 0.8 + 0.5 * len(labels)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(names)
    for offset, name in enumerate(names):
        points = [(labels.index(label) + height * offset, value) for label, other, value in parts if other == name]
        bars = axis.barh([p for p, _ in points], [v for _, v in points], height, color=COLOURS[name], label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=6, padding=2)
    axis.set_yticks([i + height * (len(names) - 1) / 2 for i in range(len(labels))], labels, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="times faster than the eager closed form")
    axis.set_title(f"{rows[-1]['device']}, forward + backward, kind scores", fontsize=9)
    axis.legend(fontsize=7)
    return figure


def _roofline(rows: list[Row], ceilings: dict[str, float]) -> Any:
    """Rate of the least work against flops a byte, under the measured roofs."""
    panels = {key: part for key, part in _panels(rows).items() if part}
    if not panels or "copy" not in ceilings:
        return None
    figure, axes = _axes(len(panels), "Roofline: least work of the problem over its time", rows)
    for axis, ((variant, dtype), part) in zip(axes, panels.items()):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in part:
            flop = 1e9 * float(row["gflop"])
            intensity, rate = flop / (1e6 * float(row["mbytes"])), flop / (1e-3 * float(row["median_ms"]))
            points.setdefault(row["contender"], []).append((intensity, rate / 1e12))
        reach = [x for found in points.values() for x, _ in found]
        span = [min(reach) / 4, max(reach) * 4]
        names = {f"matmul {dtype}", f"multiply-add {dtype}"} | ({"matmul tf32"} if dtype == "float32" else set())
        roofs = [name for name in ceilings if name in names]
        for name in roofs:
            roof = ceilings[name]
            knee = roof / ceilings["copy"]
            left = [min(span[0], knee / 4), knee, max(span[1], knee * 4)]
            axis.plot(left, [min(ceilings["copy"] * x, roof) / 1e12 for x in left], color="black", linewidth=1)
            axis.text(left[-1], roof / 1e12, name, fontsize=7, ha="right", va="bottom")
        for name, found in points.items():
            axis.scatter(*zip(*found), s=18, color=COLOURS[name], label=name, marker="o" if name in OURS else "x")
        axis.set(xscale="log", yscale="log", xlabel="flops a byte", ylabel="TFLOP/s")
        axis.set_title(f"from {'q and k' if variant == 'qk' else 'scores'}, {dtype}", fontsize=9)
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=7)
    return figure
