"""SIGTERM for commands that start processes of their own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block the first SIGTERM interrupts as Ctrl-C does, so that what was started is stopped too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, lambda *_: None)  # `timeout` sends it twice
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
