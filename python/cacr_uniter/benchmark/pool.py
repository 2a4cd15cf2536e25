"""Jobs in processes of their own: a crash, a hang or an exhausted memory is a result of one job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

Task = tuple[str, dict[str, Any]]
Row = dict[str, Any]

MALLOC_RETURNS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "CACR_CPU_KEEP_MB": "0"}
"""glibc and the CPU kernels give freed blocks back at once, so that the process's memory is what is in use."""

LATE = "the time of this run was over; a larger --budget measures it"
"""Why a task was not begun."""


def run_tasks(tasks: Sequence[Task], device: str, **options: Any) -> Iterator[tuple[int, list[Row]]]:
    """Runs tasks in order (see ``stream_tasks``). Yields (index, rows) of each."""
    rows: list[Row] = []
    for index, row in stream_tasks(tasks, device, **options):
        if row is None:
            yield index, rows
            rows = []
        else:
            rows.append(row)


def stream_tasks(
    tasks: Sequence[Task],
    device: str,
    *,
    timeout: float | Callable[[int], float] = 120.0,
    environment: Mapping[str, str] | None = None,
    memory_limit: int | None = None,
    threads: int | None = None,
) -> Iterator[tuple[int, Row | None]]:
    """Runs tasks in order in one process, in a new one after a task that ended it.

    Yields (index, row) of a task, and (index, None) at its end. A task that ends its process gets one more row with
    status ``oom`` (killed, as Linux does when memory is exhausted), ``timeout`` (no answer for ``timeout`` seconds) or
    ``error``.

    Args:
        tasks: (task of ``worker``, its arguments).
        device: ``cpu`` limits the memory of the process.
        timeout: of every task, or of the task with an index.
        environment: added to that of the process.
        memory_limit: bytes of that limit; default nine tenths of what is free.
        threads: of torch and of the CPU kernels; default torch's own choice.
    """
    request = {"device": device, "memory_limit": memory_limit, "threads": threads}

    def patience(index: int) -> float:
        return timeout(index) if callable(timeout) else timeout

    first = 0
    while first < len(tasks):
        first = yield from _one_process(tasks, first, request, patience, environment or {})


def _one_process(
    tasks: Sequence[Task],
    first: int,
    request: Mapping[str, Any],
    patience: Callable[[int], float],
    environment: Mapping[str, str],
) -> Any:
    """Runs tasks[first:] until the end or the process's; returns the first that has no result."""
    request = {**request, "jobs": [(number, *task) for number, task in enumerate(tasks[first:])]}
    with tempfile.TemporaryFile("w+") as errors:
        process = _start(subprocess.PIPE, errors, environment)
        assert process.stdout is not None
        late = threading.Event()
        now, stopped = first, False
        try:
            _ask(process, request)
            while True:
                watch = threading.Timer(patience(min(now, len(tasks) - 1)), _kill, (process, late))
                try:
                    watch.start()
                    line = process.stdout.readline()
                finally:
                    watch.cancel()
                if not line:
                    break
                answer = json.loads(line)
                if "row" in answer:
                    yield now, answer["row"]
                elif "end" in answer:
                    yield now, None
                    now, stopped = now + 1, answer["last"]
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if now < len(tasks) and not stopped:
            yield now, _failure(process.returncode, late.is_set(), patience(now), errors)
            yield now, None
            now += 1
    return now


def run_side_by_side(tasks: Sequence[Task], device: str, processes: int, seconds: float) -> list[list[Row]]:
    """Runs tasks in several processes, the first ones first, for at most so many seconds. Returns the rows of each.

    A task that ends its process, or has no time to end, gets one more row, which says so.
    """
    rows: list[list[Row]] = [[] for _ in tasks]
    deadline = time.monotonic() + seconds
    left = list(range(len(tasks)))
    while left and time.monotonic() < deadline:
        left = _round(tasks, left, device, processes, deadline, rows)
    for index in left:
        rows[index].append({"status": "skipped", "note": LATE})
    return rows


def _round(
    tasks: Sequence[Task], chosen: list[int], device: str, processes: int, deadline: float, rows: list[list[Row]]
) -> list[int]:
    """Runs chosen tasks until every process has ended; returns those that their processes did not come to."""
    shares = [chosen[first::processes] for first in range(min(processes, len(chosen)))]
    left: list[int] = []
    with ExitStack() as opened:
        started: list[tuple[subprocess.Popen[str], Any, Any]] = []
        try:
            for share in shares:
                answers, errors = (opened.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
                started.append((_start(answers, errors, {}), answers, errors))
                jobs = [(index, *tasks[index]) for index in share]
                _ask(started[-1][0], {"device": device, "memory_limit": None, "threads": None, "jobs": jobs})
            for process, _, _ in started:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0))
        finally:
            late = [process.poll() is None for process, _, _ in started]
            for process, _, _ in started:
                process.kill()
                process.wait()
        for share, is_late, (process, answers, errors) in zip(shares, late, started):
            answers.seek(0)
            found = [json.loads(line) for line in answers.read().splitlines(keepends=True) if line.endswith("\n")]
            ended = 0
            for answer in found:
                if "row" in answer:
                    rows[share[ended]].append(answer["row"])
                elif "end" in answer:
                    ended += 1
            if not is_late and process.returncode and ended < len(share):
                rows[share[ended]].append(_failure(process.returncode, False, 0.0, errors))
                ended += 1
            left += share[ended:]
    return sorted(left)


def _start(answers: Any, errors: Any, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cacr_uniter.benchmark.worker"],
        stdin=subprocess.PIPE,
        stdout=answers,
        stderr=errors,
        text=True,
        env=os.environ | environment,
    )


def _ask(process: subprocess.Popen[str], request: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(request))
    process.stdin.close()


def _kill(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    process.kill()


def _failure(code: int, late: bool, timeout: float, errors: Any) -> Row:
    if late:
        return {"status": "timeout", "note": f"no answer for {timeout:.0f} s"}
    if code == -signal.SIGKILL:
        return {"status": "oom", "note": "the system ended the process: memory exhausted"}
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return {"status": "error", "note": f"process ended with {code}: {lines[-1][:200] if lines else 'no message'}"}
