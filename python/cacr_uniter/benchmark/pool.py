"""Jobs in processes of their own: a crash, a hang or an exhausted memory is a result of one job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Task = tuple[str, dict[str, Any]]
Row = dict[str, Any]

MALLOC_RETURNS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "CACR_CPU_KEEP_MB": "0"}
"""glibc and the CPU kernels give freed blocks back at once, so that the process's memory is what is in use."""

LATE = "the time of this run was over; a larger --budget measures it"
"""Why a task was not begun."""


def run_tasks(
    tasks: Sequence[Task],
    device: str,
    *,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
    memory_limit: int | None = None,
    threads: int | None = None,
) -> Iterator[tuple[int, list[Row]]]:
    """Runs tasks in order in one process, in a new one after a job that ended it. Yields (index, rows).

    A job that ends its process gets one row with status ``oom`` (killed, as Linux does when memory is exhausted),
    ``timeout`` (no answer for ``timeout`` seconds) or ``error``.

    Args:
        tasks: (task of ``worker``, its arguments).
        device: ``cpu`` limits the memory of the process.
        environment: added to that of the process.
        memory_limit: bytes of that limit; default nine tenths of what is free.
        threads: of torch and of the CPU kernels; default torch's own choice.
    """
    request = {"device": device, "memory_limit": memory_limit, "threads": threads}
    first = 0
    while first < len(tasks):
        done = yield from _one_process(tasks, first, request, timeout, environment or {})
        first += done


def _one_process(
    tasks: Sequence[Task],
    first: int,
    request: Mapping[str, Any],
    timeout: float,
    environment: Mapping[str, str],
) -> Any:
    """Runs tasks[first:] until the end or the process's; returns how many got their result."""
    request = {**request, "jobs": [(number, *task) for number, task in enumerate(tasks[first:])]}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "cacr_uniter.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()
        done, rows, stopped = 0, [], False
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            while True:
                watch = threading.Timer(timeout, _kill, (process, late))
                try:
                    watch.start()
                    line = process.stdout.readline()
                finally:
                    watch.cancel()
                if not line:
                    break
                answer = json.loads(line)
                if "row" in answer:
                    rows.append(answer["row"])
                elif "end" in answer:
                    yield first + done, rows
                    done, rows, stopped = done + 1, [], answer["last"]
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if done < len(tasks) - first and not stopped:
            yield first + done, [*rows, _failure(process.returncode, late.is_set(), timeout, errors)]
            done += 1
    return done


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
