"""`cacr bench --compile-only`: what a plan's contenders compile, by several processes, into the caches on disk."""

from __future__ import annotations

import os
from dataclasses import asdict

from cacr_uniter.benchmark.measure import Job
from cacr_uniter.benchmark.pool import Row, run_side_by_side
from cacr_uniter.benchmark.run import Plan

MOST_PROCESSES = 8
"""That share a GPU; each has a CUDA context of its own."""

SECONDS = 600.0
"""For all of it, without a budget."""


def workers() -> int:
    return min(MOST_PROCESSES, os.cpu_count() or 1)


def compiling(plan: Plan) -> list[Job]:
    """A job for everything that is compiled, in the plan's order; Triton's kernels do not depend on the batch."""
    found: dict[tuple[object, ...], Job] = {}
    for _, job in (item for batch in plan.batches() for item in batch):
        if job.contender == "triton" or "compiled" in job.contender:
            sizes = ("n_text", "n_vision", "head_dim") if job.contender == "triton" else tuple(job.shape)
            place = tuple(job.shape[name] for name in sizes)
            found.setdefault((place, job.dtype, job.variant, job.kind, job.contender), job)
    return list(found.values())


def compile_ahead(plan: Plan) -> list[Row]:
    """Makes the first calls of a plan. Returns a row of each: its status, and a note where it is not ``ok``."""
    jobs = compiling(plan)
    rows = run_side_by_side([("first", asdict(job)) for job in jobs], plan.device, workers(), min(plan.budget, SECONDS))
    return [{**job.columns, **(found[-1] if found else {"status": "ok"})} for job, found in zip(jobs, rows)]
