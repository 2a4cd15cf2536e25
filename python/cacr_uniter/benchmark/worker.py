"""Runs jobs from standard input, in this process, and writes their rows as JSON lines. Started by ``pool``."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = Iterator[dict[str, Any]]


def _kernel(job: dict[str, Any]) -> Rows:
    from cacr_uniter.benchmark.measure import Job, measure

    return measure(Job(**job))


def _first(job: dict[str, Any]) -> Rows:
    from cacr_uniter.benchmark.measure import Job, first_calls

    return first_calls(Job(**job))


def _ceilings(job: dict[str, Any]) -> Rows:
    from cacr_uniter.benchmark.ceilings import measure_ceilings

    yield measure_ceilings(**job)


def _training(job: dict[str, Any]) -> Rows:
    from cacr_uniter.benchmark.training_cost import Setting, measure_setting

    yield measure_setting(Setting(**job))


def _watched(case: dict[str, Any]) -> Rows:
    from cacr_uniter.benchmark.calls import Case, row_of

    yield row_of(Case(**case))


TASKS: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "kernel": _kernel,
    "first": _first,
    "ceilings": _ceilings,
    "training": _training,
    "call": _watched,
}


def limit_process(limit: int | None) -> None:
    """Allocations beyond ``limit`` bytes (default: nine tenths of what is free) fail and do not end the process."""
    if limit is None:
        free = [line for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
        if not free:
            return
        limit = int(0.9 * 1024 * int(free[0].split()[1]))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def _usable_gpu() -> bool:
    """Whether the context survived: after an illegal access every later call of the process fails.

    After a capture that failed, torch 2.11's allocator fails too whenever it gives memory back.
    """
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> None:
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print does not disturb the answers
    if request["device"] == "cpu":
        limit_process(request["memory_limit"])
    if request["threads"] is not None:
        import torch

        torch.set_num_threads(request["threads"])
    for number, task, job in request["jobs"]:
        for row in TASKS[task](job):
            print(json.dumps({"row": row}), file=answers)
        usable = request["device"] == "cpu" or _usable_gpu()
        print(json.dumps({"end": number, "last": not usable}), file=answers)
        if not usable:
            return


if __name__ == "__main__":
    main()
