"""The goals of docs/performance.md for a GPU, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cacr_uniter.benchmark.results import KERNEL_KEY, Row, newest
from cacr_uniter.benchmark.shapes import UNITER

FASTER = {"compiled": 3.0, "eager": 10.0}
"""Times faster than a peer at UNITER's shapes, forward + backward, as graph replays."""
COMPILED = ("compiled", "compiled-max")
"""The faster of them is the peer ``compiled``."""

FLOORS = 3.0
"""Times the floor, likewise."""

LONG = "square-4096"
TFLOPS = 220.0
"""Of the forward from q and k at 4096 tokens in 16 bits; its forward + backward is no slower than ``sdpa``."""

GOALS_HEAD = ("goal", "where", "measured", "met")
Line = tuple[str, str, str, str]


class _Measured:
    """The newest good measurements of a folder."""

    def __init__(self, rows: Iterable[Row]) -> None:
        good = [row for row in newest(rows, KERNEL_KEY) if row["status"] == "ok" and row["kind"] == "scores"]
        self.rows = [row for row in good if row["timer"] == "graph"]

    def best(self, names: Sequence[str], shape: str, dtype: str, variant: str, direction: str = "both") -> Row | None:
        """The fastest of some contenders."""
        wanted = (shape, dtype, variant, direction)
        columns = ("shape", "dtype", "variant", "direction")
        found = [r for r in self.rows if r["contender"] in names and tuple(r[name] for name in columns) == wanted]
        return min(found, key=lambda row: float(row["median_ms"]), default=None)


def goals(rows: Iterable[Row]) -> list[Line]:
    """A line for every goal that can be judged or misses one measurement; none where no GPU kernel was timed.

    Ours is the faster of ``triton`` and ``cuda``.
    """
    measured = _Measured(rows)
    ours = ("triton", "cuda")
    lines: list[Line] = []
    problems = {(row["shape"], row["dtype"], row["variant"]): None for row in measured.rows if row["contender"] in ours}
    uniter = {shape.name for shape in UNITER}
    for problem in problems:
        shape, dtype, variant = problem
        both = measured.best(ours, *problem)
        if both is None or shape not in uniter:
            continue
        where = f"{shape}, {dtype}, {variant}, {both['contender']}"
        for name, least in FASTER.items():
            peer = measured.best(COMPILED if name == "compiled" else [name], *problem)
            times = None if peer is None else float(peer["median_ms"]) / float(both["median_ms"])
            against = name if peer is None else peer["contender"]
            lines.append(_line(f"{least:g} times faster than {against}", where, times, "x", least))
        floors = float(both["median_ms"]) / float(both["floor_ms"])
        lines.append(_line(f"within {FLOORS:g} times the floor", where, floors, f"x ({both['bound']})", FLOORS, "most"))
    for dtype in ("bfloat16", "float16"):
        problem = (LONG, dtype, "qk")
        if problem in problems:
            lines += _long(measured, ours, problem)
    return lines


def _long(measured: _Measured, ours: Sequence[str], problem: tuple[str, str, str]) -> list[Line]:
    where = ", ".join(problem)
    forward, both = (measured.best(ours, *problem, direction) for direction in ("forward", "both"))
    rate = None if forward is None else float(forward["gflop"]) / float(forward["median_ms"])
    sdpa = measured.best(["sdpa"], *problem)
    times = None if sdpa is None or both is None else float(sdpa["median_ms"]) / float(both["median_ms"])
    note = "" if sdpa is None else f" ({sdpa['note']})"
    return [
        _line(f"forward at {TFLOPS:g} TFLOP/s", where, rate, " TFLOP/s", TFLOPS),
        _line(f"forward + backward no slower than sdpa{note}", where, times, "x", 1.0),
    ]


def _line(goal: str, where: str, value: float | None, unit: str, limit: float, side: str = "least") -> Line:
    if value is None:
        return goal, where, "not measured", ""
    met = value >= limit if side == "least" else value <= limit
    return goal, where, f"{value:.3g}{unit}", "yes" if met else "NO"
