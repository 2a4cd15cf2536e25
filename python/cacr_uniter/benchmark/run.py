"""`cacr bench`: ceilings first, then every contender on every shape; rows are written as soon as they exist."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cacr_uniter.benchmark import results
from cacr_uniter.benchmark.ceilings import UNITS
from cacr_uniter.benchmark.contenders import names
from cacr_uniter.benchmark.machine import provenance
from cacr_uniter.benchmark.measure import Job
from cacr_uniter.benchmark.pool import MALLOC_RETURNS, Row, run_tasks
from cacr_uniter.benchmark.shapes import Shape
from cacr_uniter.benchmark.timing import quantile
from cacr_uniter.benchmark.work import DIRECTIONS, TILE, floor, matmul_rate, work
from cacr_uniter.errors import UserError

Progress = Callable[[str, int, int], None]

LOOP_LIMIT = 1e7
"""Most steps T^2 R^2 of the loop, summed over problems."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        shapes: in order of importance.
        dtypes, kinds: names.
        device: ``cpu`` or ``cuda``.
        seconds: of timing each direction.
        processes: fresh processes in which a CPU is timed; their samples are put together.
        longest: a contender whose least work takes longer than so many seconds is skipped.
        budget: seconds after which nothing new is started.
        compiled: whether torch.compile takes part (compiling costs more than measuring).
    """

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    kinds: tuple[str, ...]
    device: str
    seconds: float
    processes: int
    longest: float
    budget: float = float("inf")
    compiled: bool = True
    contenders: tuple[str, ...] = ()

    def jobs(self, shape: Shape, dtype: str) -> list[Job]:
        """All contenders of one shape and dtype, in the order in which they run."""
        found = []
        for variant in ("scores", "qk") if shape.scores else ("qk",):
            for kind in self.kinds:
                if (variant == "qk" and kind == "probs") or (not shape.scores and kind != "scores"):
                    continue
                for name in names(variant, kind, self.device, dtype):
                    if self._takes_part(name, shape):
                        found.append(
                            Job(shape.as_dict(), dtype, variant, kind, name, self.device, self.seconds)
                        )  # fmt: skip
        return found

    def _takes_part(self, name: str, shape: Shape) -> bool:
        if self.contenders:
            return name in self.contenders
        if name == "loop":
            return shape.problems * (shape.n_text * shape.n_vision) ** 2 <= LOOP_LIMIT
        return self.compiled or "compiled" not in name


def run_benchmark(plan: Plan, out: Path, progress: Progress) -> list[Row]:
    """Measures everything of a plan and appends it to ``out/ceilings.csv`` and ``out/kernels.csv``.

    Returns:
        The rows of ``kernels.csv`` that were written.
    """
    start = time.monotonic()
    ceilings = measured_ceilings(plan.device, out, 0.3 if plan.seconds < 0.5 else 1.0)
    pairs = [(shape, dtype) for shape in plan.shapes for dtype in plan.dtypes]
    total = sum(len(plan.jobs(*pair)) for pair in pairs)
    written: list[Row] = []
    done = 0
    for shape, dtype in pairs:
        jobs = plan.jobs(shape, dtype)
        if time.monotonic() - start > plan.budget:
            rows = [_skipped(job, "the time of this run was over") for job in jobs]
            written += _write(out, shape, plan, ceilings, rows)
            done += len(jobs)
            progress("measurements", done, total)
            continue
        for rows in _measure_pair(plan, shape, jobs, ceilings):
            written += _write(out, shape, plan, ceilings, rows)
            done += 1
            progress("measurements", done, total)
    return written


def measured_ceilings(device: str, out: Path, seconds: float) -> dict[str, float]:
    """Measures the ceilings and appends them to ``out/ceilings.csv``."""
    for _, rows in run_tasks([("ceilings", {"device": device, "seconds": seconds})], device):
        found = rows[-1]
        if "copy" not in found:
            raise UserError(f"the ceilings of this machine could not be measured: {found.get('note', found)}")
    origin = provenance(device)

    results.append(
        out,
        "ceilings",
        [{**origin, "what": what, "value": value, "unit": UNITS.get(what, "flop/s")} for what, value in found.items()],
    )
    return found


def _measure_pair(plan: Plan, shape: Shape, jobs: list[Job], ceilings: Mapping[str, float]) -> Iterator[list[Row]]:
    """Rows of each job. A CPU is timed in several processes and its memory measured in one of its own."""
    runnable = []
    for job in jobs:
        seconds = least_seconds(job, shape, ceilings)
        if seconds > plan.longest:
            yield [_skipped(job, f"its products alone take {seconds:.0f} s at the library's rate")]
        else:
            runnable.append(job)
    timeout = 120 + 40 * plan.longest
    if plan.device == "cuda":
        for index, rows in run_tasks([("kernel", asdict(job)) for job in runnable], "cuda", timeout=timeout):
            yield [_named(runnable[index], row, 1) for row in rows]
        return
    passes = [[replace(job, what="time") for job in runnable] for _ in range(plan.processes)]
    passes.append([replace(job, what="memory") for job in runnable])
    collected: list[list[Row]] = [[] for _ in runnable]
    for number, batch in enumerate(passes):
        tasks = [("kernel", asdict(job)) for job in batch]
        last = number == len(passes) - 1
        for index, rows in run_tasks(tasks, "cpu", timeout=timeout, environment=MALLOC_RETURNS if last else None):
            collected[index] += rows
            if last:
                yield [_named(runnable[index], row, plan.processes) for row in merge(collected[index])]


def least_seconds(job: Job, shape: Shape, ceilings: Mapping[str, float]) -> float:
    """Seconds of one forward and backward at the library's rate, for the algorithm this contender uses."""
    cubic = job.contender in ("eager", "compiled", "compiled-max", "bmm") or job.variant == "scores"
    name = "bmm" if cubic else job.contender
    needed = work(shape, "scores" if cubic else job.variant, job.kind, name, "both", job.dtype)
    return needed.flops / matmul_rate(ceilings, job.dtype)


def merge(rows: list[Row]) -> list[Row]:
    """Rows of several processes to one a direction: samples joined, the last memory, the worst status."""
    found: dict[str, Row] = {}
    for row in rows:
        direction = row.get("direction", "both")
        into = found.setdefault(direction, {"direction": direction, "samples": [], "status": "ok"})
        into["samples"] = into["samples"] + row.get("samples", [])
        into |= {k: v for k, v in row.items() if k not in ("samples", "status") and v is not None}
        if row["status"] != "ok":
            into["status"] = row["status"]
    failed = [row for row in found.values() if row["status"] != "ok"]
    timed = [row for row in found.values() if row["status"] == "ok" and row["samples"]]
    return [*timed, *failed]


def _named(job: Job, row: Row, processes: int) -> Row:
    return {**job.columns, "direction": "both", "processes": processes, **row}


def _skipped(job: Job, why: str) -> Row:
    return {**job.columns, "direction": "both", "status": "skipped", "note": why}


def _write(out: Path, shape: Shape, plan: Plan, ceilings: Mapping[str, float], rows: list[Row]) -> list[Row]:
    origin = provenance(plan.device)
    full = [{**origin, **finished(row, shape, plan.device, ceilings)} for row in rows]
    results.append(out, "kernels", full)
    return full


def finished(row: Row, shape: Shape, device: str, ceilings: Mapping[str, float]) -> Row:
    """A row with quantiles in place of samples and with the floor of its direction."""
    row = dict(row)
    samples = tuple(row.pop("samples", ()))
    if samples:
        row |= {f"{name}_ms": quantile(samples, q) for name, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}
        row["repeats"] = len(samples)
    assert row["direction"] in DIRECTIONS
    tile = TILE if device == "cuda" else 1
    problem = (shape, row["variant"], row["kind"], row["contender"], row["direction"])
    lowest = floor(work(*problem, row["dtype"], tile), ceilings, row["dtype"])
    plain = work(*problem, "float32")
    moved = work(*problem, row["dtype"]).bytes
    return row | {
        "floor_ms": lowest.ms,
        "bound": lowest.bound,
        "gflop": plain.flops / 1e9,
        "mbytes": moved / 1e6,
    }
