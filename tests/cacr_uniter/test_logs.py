"""What a run shows: a bar that moves every step, plain lines at least once a minute, and the time that is left."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from cacr_uniter.training import logs
from cacr_uniter.training.logs import Display
from cacr_uniter.training.testing import small_config, small_run

NAMES = "matching auxiliary auxiliary_weight first lr grad_norm memory pairs_per_second"
RECORD = dict(zip(NAMES.split(), (0.2, 0.1, 0.5, 0.5, 1e-4, 1.0, 1e9, 40.0), strict=True))


class Clock:
    """Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def test_a_plain_line_a_minute_with_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """36 s a step: the twentieth of the run comes after 2.5 hours, rich forgets its samples after 30 s."""
    with Display(5000, 1000, True) as display:
        for done in range(1001, 1011):
            clock.now += 36
            display.update(done, RECORD if done == 1010 else None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{done}/5000" for done in (1002, 1004, 1006, 1008, 1010)]
    assert all(line.split("  ")[1] == "40.0 h left" for line in lines[:1]), lines
    assert "match 0.2000" in lines[-1]
    assert "39.9 h left" in lines[-1]


def test_plain_lines_of_a_fast_run_come_with_shares_of_it(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Display(100, 0, True) as display:
        for done in range(1, 101):
            clock.now += 0.1
            display.update(done, RECORD if done % 2 == 0 else None)
    steps = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert steps == [6, 10, 16, 20, 26, 30, 36, 40, 46, 50, 56, 60, 66, 70, 76, 80, 86, 90, 96, 100]


def test_the_bar_moves_every_step_and_shows_the_time_left(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, width=200, quiet=True)
    monkeypatch.setattr(logs, "Console", lambda **options: console)
    with Display(5000, 0, True) as display:
        for done in (1, 2, 3):
            clock.now += 60
            display.update(done)
            assert display._progress.tasks[0].completed == done
        console.quiet = False
        with console.capture() as capture:
            console.print(display._progress.get_renderable())
        assert "83.3 h left" in capture.get()


@pytest.mark.parametrize(
    ("width", "last"), [(60, "40 pairs/s"), (80, "match 0.2000"), (100, "aux 0.1000 x 0.5"), (140, "1.0 GB")]
)
def test_a_narrow_terminal_leaves_out_the_last_numbers(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, width: int, last: str
) -> None:
    monkeypatch.setattr(logs, "Console", lambda **options: Console(force_terminal=True, quiet=True))
    with Display(5000, 1000, True) as display:
        clock.now += 36
        display.update(1001, RECORD)
    plain = Console(width=width)
    with plain.capture() as capture:
        plain.print(display._progress.get_renderable())
    line = capture.get().strip()
    assert "\n" not in line
    assert line.startswith("━")
    assert "1001/5000" in line
    assert "40.0 h left" in line
    assert "40 pairs/s" in line
    assert line.endswith(last)


def test_the_loop_tells_the_display_of_every_step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(Display, "update", lambda self, done, record=None: seen.append((done, record is not None)))
    small_run(small_config(tmp_path, run__log_every=3, optim__steps=4))
    assert seen == [(1, False), (2, False), (3, True), (4, True)]
