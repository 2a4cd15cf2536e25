"""Times and memory of a call: CUDA events around graph replays with a flushed cache, or the clock on a CPU."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

LEAST, MOST = 3, 300
"""Fewest and most repeats."""

Prepare = Callable[[], Callable[[], object]]
"""Makes the call that is timed; on a GPU it runs on the stream of the measurement."""


@dataclass(frozen=True)
class Times:
    """Milliseconds over ``repeats`` calls; ``samples`` are all of them; ``timer`` is graph, events, wall or process."""

    samples: tuple[float, ...]
    timer: str

    def quantile(self, q: float) -> float:
        return quantile(self.samples, q)

    @property
    def p20_ms(self) -> float:
        return self.quantile(0.2)


def quantile(samples: tuple[float, ...], q: float) -> float:
    """Linear interpolation between the sorted samples."""
    return float(torch.tensor(samples, dtype=torch.float64).quantile(q))


class Timer(Protocol):
    def __call__(self, prepare: Prepare, seconds: float, graph: bool) -> Times: ...


def timer_for(device: str, clock: str = "wall") -> Timer:
    """The timer of a device; on a CPU ``clock`` is ``wall`` or ``process`` (see ``time_cpu``)."""
    return time_cuda if device == "cuda" else partial(time_cpu, clock=clock)


def time_cpu(prepare: Prepare, seconds: float, graph: bool, clock: str = "wall") -> Times:
    """Warm-up, then calls for ``seconds`` (at least ``LEAST``, or one if a single call takes twice as long).

    Args:
        clock: ``wall``, or ``process``: the processor time of this process, which is the time of a call where one
            thread computes and others of a busy machine interrupt it.
    """
    now = time.process_time if clock == "process" else time.perf_counter
    run = prepare()
    start = now()
    run()
    warm = now() - start
    if warm < seconds / 20:
        run()
    samples: list[float] = []
    least = 1 if warm > 2 * seconds else LEAST
    deadline = time.perf_counter() + seconds
    while len(samples) < least or (time.perf_counter() < deadline and len(samples) < MOST):
        start = now()
        run()
        samples.append(1e3 * (now() - start))
    return Times(tuple(samples), clock)


def time_cuda(prepare: Prepare, seconds: float, graph: bool) -> Times:
    """Times between CUDA events. Before every call the L2 cache is overwritten.

    Args:
        graph: capture the call once and replay it, so that the host's launches do not count. A call that cannot be
            captured raises.
    """
    flush = torch.empty(2 * max(l2_bytes(), 1 << 25), dtype=torch.int8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        run()
        end.record()
        end.synchronize()
        warm = start.elapsed_time(end) / 1e3
        if graph:
            captured = torch.cuda.CUDAGraph()
            call = run  # it holds what the graph reads
            with torch.cuda.graph(captured, stream=stream):
                kept = run()
            run = captured.replay
            run()
            stream.synchronize()
        count = int(min(max(seconds / max(warm, 1e-5), LEAST), MOST))
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for before, after in pairs:
            flush.zero_()
            before.record()
            run()
            after.record()
        stream.synchronize()
    if graph:
        del kept, call
    return Times(tuple(before.elapsed_time(after) for before, after in pairs), "graph" if graph else "events")


def l2_bytes() -> int:
    """Bytes of the current GPU's L2 cache; 0 if torch cannot tell."""
    return int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0))


class PeakMemory:
    """Peak bytes inside the block beyond those held at its start: torch's allocator on a GPU, the process on a CPU.

    ``extra`` is None where the system cannot tell (a CPU outside Linux).
    """

    extra: int | None = None

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            gc.collect()  # what is freed inside would hide what is allocated
            reset_process_peak()
            self._before = process_memory("VmRSS") or 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.extra = torch.cuda.max_memory_allocated() - self._before
        else:
            peak = process_memory("VmHWM")
            self.extra = None if peak is None else max(peak - self._before, 0)


def process_memory(field: str) -> int | None:
    """Bytes of a line such as VmRSS or VmHWM of /proc/self/status; None where there is none."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return None
    match = re.search(rf"^{field}:\s*(\d+) kB", path.read_text(), re.MULTILINE)
    return None if match is None else 1024 * int(match[1])


def reset_process_peak() -> None:
    """Sets the peak of this process's resident memory to what is resident now (Linux)."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")
