"""`cacr bench`: ceilings first, then every contender on every shape; rows are written as soon as they exist."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cacr_uniter.benchmark import results
from cacr_uniter.benchmark.ceilings import UNITS
from cacr_uniter.benchmark.contenders import OURS, names
from cacr_uniter.benchmark.machine import provenance
from cacr_uniter.benchmark.measure import Job
from cacr_uniter.benchmark.pool import LATE, MALLOC_RETURNS, Row, run_tasks, stream_tasks
from cacr_uniter.benchmark.shapes import Shape
from cacr_uniter.benchmark.timing import quantile
from cacr_uniter.benchmark.work import DIRECTIONS, TILE, floor, matmul_rate, work
from cacr_uniter.errors import UserError

Progress = Callable[[str, int, int], None]
Item = tuple[Shape, Job]

RECENT = timedelta(minutes=15)
"""For how long a GPU's ceilings hold."""

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
        budget: seconds, with those of the ceilings, after which nothing new is started.
        compiled: whether torch.compile takes part (compiling costs more than measuring).
        contenders: only these; none means all.
        threads: of a CPU; default torch's own choice.
        clock: of a CPU: ``wall``, or ``process`` for one thread on a busy machine.
        variants: ``scores``, ``qk``.
        missing: only what the results do not hold yet of the same commit and versions.
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
    threads: int | None = None
    clock: str = "wall"
    variants: tuple[str, ...] = ("scores", "qk")
    missing: bool = False

    def jobs(self, shape: Shape, dtype: str) -> list[Job]:
        """All contenders of one shape and dtype, in the order in which they run."""
        found = []
        for variant in self.variants if shape.scores else ("qk",):
            for kind in self.kinds:
                if (variant == "qk" and kind == "probs") or (not shape.scores and kind != "scores"):
                    continue
                for name in names(variant, kind, self.device, dtype):
                    if self._takes_part(name, shape):
                        named = (shape.as_dict(), dtype, variant, kind, name)
                        found.append(Job(*named, self.device, self.seconds, clock=self.clock))
        return found

    def batches(self) -> list[list[Item]]:
        """What processes are given: the contenders of a shape and dtype; on a GPU all of them at once.

        There a process serves every shape, so that its start and its kernels are paid once, and what compiles for long
        comes last: ours and what they are compared with, then the default ``torch.compile``, then the tuned one.
        """
        pairs = [[(shape, job) for job in self.jobs(shape, dtype)] for shape in self.shapes for dtype in self.dtypes]
        if self.device == "cpu":
            return pairs
        return [sorted((item for pair in pairs for item in pair), key=lambda item: _turn(item[1].contender))]

    def _takes_part(self, name: str, shape: Shape) -> bool:
        if name == "loop" and shape.problems * (shape.n_text * shape.n_vision) ** 2 > LOOP_LIMIT:
            return False
        if self.contenders:
            return name in self.contenders
        return self.compiled or "compiled" not in name


def _turn(contender: str) -> int:
    if contender in (*OURS, "eager", "sdpa"):
        return 0
    return {"compiled": 2, "factored-compiled": 3, "compiled-max": 4}.get(contender, 1)


def run_benchmark(plan: Plan, out: Path, progress: Progress) -> list[Row]:
    """Measures everything of a plan and appends it to ``out/ceilings.csv`` and ``out/kernels.csv``.

    Returns:
        The rows of ``kernels.csv`` that were written.
    """
    deadline = time.monotonic() + plan.budget
    ceilings = _recent_ceilings(plan.device, out)
    if ceilings is None:
        seconds = 0.3 if plan.seconds < 0.5 else 1.0
        ceilings = measured_ceilings(plan.device, out, seconds, plan.threads, plan.clock)
    known = settled(out, provenance(plan.device)) if plan.missing else set()
    batches = [[item for item in batch if _place(item[1].columns) not in known] for batch in plan.batches()]
    total = sum(len(batch) for batch in batches)
    written: list[Row] = []
    done = 0
    for batch in batches:
        for shape, rows, ended in _measure_batch(plan, batch, ceilings, deadline):
            origin = provenance(plan.device)
            full = [{**origin, **finished(row, shape, plan.device, ceilings)} for row in rows]
            results.append(out, "kernels", full)
            written += full
            done += ended
            progress("measurements", done, total)
    return written


def _place(columns: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(columns[name]) for name in results.KERNEL_KEY if name != "direction")


def _same(row: Mapping[str, str], origin: Mapping[str, str]) -> bool:
    """Whether a result is of the same commit, versions and device."""
    return all(row[name] == origin[name] for name in results.PROVENANCE if name not in ("date", "load"))


def settled(out: Path, origin: Mapping[str, str]) -> set[tuple[str, ...]]:
    """What ``out/kernels.csv`` holds a whole result of: its last direction, or why there is none."""
    rows = [row for row in results.read(out, "kernels") if row["status"] in ("ok", "wrong", "oom", "unchecked")]
    rows = [row for row in rows if row["direction"] == "both" or row["contender"] == "loop"]
    return {_place(row) for row in rows if _same(row, origin)}


def _recent_ceilings(device: str, out: Path) -> dict[str, float] | None:
    """Ceilings of a GPU that were measured in the last minutes, which it still has; a CPU's change with its load."""
    if device != "cuda":
        return None
    origin = provenance(device)
    now = datetime.fromisoformat(origin["date"])
    rows = [row for row in results.read(out, "ceilings") if _same(row, origin)]
    recent = [row for row in rows if now - datetime.fromisoformat(row["date"]) < RECENT]
    return {row["what"]: float(row["value"]) for row in recent} or None


def measured_ceilings(
    device: str, out: Path, seconds: float, threads: int | None = None, clock: str = "wall"
) -> dict[str, float]:
    """Measures the ceilings and appends them to ``out/ceilings.csv``."""
    for _, rows in run_tasks(
        [("ceilings", {"device": device, "seconds": seconds, "clock": clock})], device, threads=threads
    ):
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


def _measure_batch(
    plan: Plan, batch: list[Item], ceilings: Mapping[str, float], deadline: float
) -> Iterator[tuple[Shape, list[Row], bool]]:
    """Rows of each job as they come, and whether they are its last ones.

    Jobs that take too long, or come after the deadline, are skipped in words.
    """
    runnable = []
    for shape, job in batch:
        seconds = least_seconds(job, shape, ceilings)
        if seconds > plan.longest:
            yield shape, [_skipped(job, f"its products alone take {seconds:.0f} s at this machine's rate")], True
        else:
            runnable.append((shape, job))
    measured = 0
    if runnable and time.monotonic() < deadline:
        for index, rows, ended in (_on_gpu if plan.device == "cuda" else _on_cpu)(plan, [job for _, job in runnable]):
            yield runnable[index][0], rows, ended
            measured = index + ended
            if plan.device == "cuda" and ended and time.monotonic() > deadline:
                break
    for shape, job in runnable[measured:]:
        yield shape, [_skipped(job, LATE)], True


def _on_gpu(plan: Plan, jobs: list[Job]) -> Iterator[tuple[int, list[Row], bool]]:
    """Every row as soon as it is there: what comes after it may be interrupted."""
    answers = stream_tasks(
        [("kernel", asdict(job)) for job in jobs], "cuda", timeout=lambda index: _patience(plan, jobs[index])
    )
    for index, row in answers:
        yield index, [] if row is None else [_named(jobs[index], row, 1)], row is None


def _on_cpu(plan: Plan, jobs: list[Job]) -> Iterator[tuple[int, list[Row], bool]]:
    """Times in several processes, memory in one of its own."""
    passes = [[replace(job, what="time") for job in jobs] for _ in range(plan.processes)]
    passes.append([replace(job, what="memory") for job in jobs])
    collected: list[list[Row]] = [[] for _ in jobs]
    for number, batch in enumerate(passes):
        last = number == len(passes) - 1
        answers = run_tasks(
            [("kernel", asdict(job)) for job in batch],
            "cpu",
            timeout=_patience(plan, jobs[0]),
            environment=MALLOC_RETURNS if last else None,
            threads=plan.threads,
        )
        for index, rows in answers:
            collected[index] += rows
            if last:
                yield index, [_named(jobs[index], row, plan.processes) for row in merge(collected[index])], True


def _patience(plan: Plan, job: Job) -> float:
    """Seconds without an answer after which a process is given up: compiling, the float64 reference, the calls.

    A third of a budget at most, so that a call that hangs leaves time for the others; but what ``torch.compile`` takes
    before its first answer, with its float64 reference, on a GPU's host.
    """
    least = 30.0 if "compiled" not in job.contender else 150.0 if job.contender == "compiled-max" else 75.0
    return min(120 + 40 * plan.longest, max(least, plan.budget / 3))


def least_seconds(job: Job, shape: Shape, ceilings: Mapping[str, float]) -> float:
    """Seconds of one forward and backward at the machine's rate, for the algorithm this contender uses."""
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
