"""Progress bars and remarks on the error stream, so that standard output holds results only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def tell(remark: str) -> None:
    """Prints a remark."""
    print(remark, file=sys.stderr, flush=True)


@contextmanager
def bars(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that shows one bar per `what`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    progress = Progress(*columns, console=Console(stderr=True), disable=not shown)

    def update(what: str, done: int, total: int) -> None:
        if what not in tasks:
            progress.start()
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total)

    try:
        yield update
    finally:
        if tasks:
            progress.stop()
