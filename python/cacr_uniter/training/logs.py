"""What a run shows while it runs: JSON lines, TensorBoard events, a progress display."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cacr_uniter.training.checkpoint import readable_errors
from cacr_uniter.training.sizes import show_size

#: shares of the run after which a plain line is printed where no terminal can show a bar
PLAIN_LINES = 20


def read_log(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Records of at most ``last_step``; a line torn by a kill is left out."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= last_step:
            records.append(record)
    return records


class RunLog:
    """``log.jsonl`` and TensorBoard events of the main process; nothing on the others.

    Args:
        out: folder of the run.
        start: steps already done: later records of an earlier part are dropped.
        tensorboard: whether to write events.
        main: whether this process writes.
    """

    def __init__(self, out: Path, start: int, tensorboard: bool, main: bool) -> None:
        self.history: list[dict[str, Any]] = []
        self._file = self._events = None
        if not main:
            return
        path = out / "log.jsonl"
        with readable_errors(f"log {path}"):
            self.history = read_log(path, start)
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(record) + "\n" for record in self.history), encoding="utf-8")
            os.replace(part, path)
            self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Adds one record; its ``step`` counts finished steps."""
        if self._file is None:
            return
        self.history.append(record)
        with readable_errors(f"log {self._file.name}"):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in record.items():
                if name not in ("step", "event") and isinstance(value, int | float):
                    self._events.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def close(self) -> None:
        """Closes both. Records are flushed one by one, so a file that refuses to close loses nothing more."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._events is not None:
            self._events.close()


class Display:
    """A progress bar with the run's numbers on a terminal, a line now and then elsewhere.

    Args:
        steps: of the whole run.
        done: at the start.
        enabled: shows nothing otherwise.
    """

    def __init__(self, steps: int, done: int, enabled: bool) -> None:
        self.steps, self.enabled = steps, enabled
        self.console = Console(stderr=True)
        self._bar = enabled and self.console.is_terminal
        self._interval = max(1, steps // PLAIN_LINES)
        self._next = (done // self._interval + 1) * self._interval
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            refresh_per_second=2,
            disable=not self._bar,
        )
        self._task = self._progress.add_task("training", total=steps, completed=done, numbers="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Shows a training record."""
        numbers = describe(record)
        if self._bar:
            self._progress.update(self._task, completed=record["step"], numbers=numbers)
        elif self.enabled and record["step"] >= self._next:
            self._next += self._interval
            self.console.print(f"step {record['step']}/{self.steps}  {numbers}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.enabled:
            self._progress.console.print(text, highlight=False, soft_wrap=True)


def describe(record: dict[str, Any]) -> str:
    """One line of a training record."""
    return (
        f"match {record['matching']:.4f}  aux {record['auxiliary']:.4f} x {record['auxiliary_weight']:.3g}  "
        f"first {100 * record['first']:.0f}%  lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}  "
        f"{show_size(record['memory'])}  {record['pairs_per_second']:.0f} pairs/s"
    )
