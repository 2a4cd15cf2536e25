"""What a run shows while it runs: JSON lines, TensorBoard events, a progress display."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from cacr_uniter.files import parse_json, write_text
from cacr_uniter.training.checkpoint import readable_errors
from cacr_uniter.training.sizes import show_size, show_time

#: where no terminal can show a bar: shares of the run after which a plain line is printed, and the most seconds between
PLAIN_LINES, PLAIN_SECONDS = 20, 60.0
#: between the numbers of a line
GAP = "  "


def read_log(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Records of at most ``last_step``; a line torn by a kill is left out."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            break
        if record["step"] <= last_step:
            records.append(record)
    return records


class RunLog:
    """``log.jsonl`` and TensorBoard events of the main process; nothing on the others.

    Args:
        out: folder of the run.
        start: steps already done: later records of an earlier part are dropped; at 0 all, of whatever run they are.
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
            self.history = read_log(path, start) if start else []
            write_text(path, "".join(json.dumps(record) + "\n" for record in self.history))
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
            with readable_errors(f"TensorBoard events {self._events.log_dir}"):
                for name, value in record.items():
                    if name not in ("step", "event") and isinstance(value, int | float):
                        self._events.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def close(self) -> None:
        """Closes both. Records are flushed one by one, so a file that refuses to close loses nothing more."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._events is not None:
            with suppress(OSError):
                self._events.close()


class Numbers:
    """The numbers of a line, those at its end left out where it is too narrow for them."""

    def __init__(self, line: str) -> None:
        self.line = line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self.line
        while len(shown) > options.max_width:
            shown = shown.rpartition(GAP)[0]
        yield Text(shown, no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, len(self.line))


class NumbersColumn(ProgressColumn):
    """The column that a narrow terminal makes narrower: the others keep their width."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=False))

    def render(self, task: Task) -> Numbers:
        return Numbers(task.fields["numbers"])


class Display:
    """A progress bar with the run's numbers on a terminal, a line at least once a minute elsewhere.

    The time left is that of the remaining steps at the rate since the start, validations and checkpoints included.

    Args:
        steps: of the whole run.
        done: at the start.
        enabled: shows nothing otherwise.
    """

    def __init__(self, steps: int, done: int, enabled: bool) -> None:
        self.steps, self.enabled, self._start, self._numbers = steps, enabled, done, ""
        self._began = self._printed = time.monotonic()
        self.console = Console(stderr=True)
        self._bar = enabled and self.console.is_terminal
        self._interval = max(1, steps // PLAIN_LINES)
        self._next = (done // self._interval + 1) * self._interval
        self._progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            NumbersColumn(),
            console=self.console,
            refresh_per_second=2,
            disable=not self._bar,
        )
        self._task = self._progress.add_task("training", total=steps, completed=done, left="", numbers="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, record: dict[str, Any] | None = None) -> None:
        """Shows that ``done`` steps are done, and the training record of the last one, if it has one."""
        if not self.enabled:
            return
        if record is not None:
            self._numbers = describe(record)
        now = time.monotonic()
        left = f"{show_time((self.steps - done) * (now - self._began) / max(1, done - self._start))} left"
        if self._bar:
            self._progress.update(self._task, completed=done, left=left, numbers=self._numbers)
        elif (record is not None and done >= self._next) or now - self._printed >= PLAIN_SECONDS:
            self._next, self._printed = (done // self._interval + 1) * self._interval, now
            self.say(f"step {done}/{self.steps}  {left}  {self._numbers}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.enabled:
            self._progress.console.print(text, highlight=False, soft_wrap=True)


def describe(record: dict[str, Any]) -> str:
    """One line of a training record, the numbers that matter most first."""
    norm, skipped = record["grad_norm"], record.get("skipped", 0)
    numbers = [
        f"{record['pairs_per_second']:.0f} pairs/s",
        f"match {record['matching']:.4f}",
        f"aux {record['auxiliary']:.4f} x {record['auxiliary_weight']:.3g}",
        f"first {100 * record['first']:.0f}%",
        *([f"{skipped} skipped, loss scale {record['loss_scale']:.3g}"] if skipped else []),
        f"lr {record['lr']:.2e}",
        f"grad {'-' if norm is None else f'{norm:.2f}'}",
        show_size(record["memory"]),
    ]
    return GAP.join(numbers)
