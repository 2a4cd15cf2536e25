"""The search behind `cacr bench tune`: one kernel at a time, from its built-in launch to the best neighbour, and on.

Every candidate first computes its problems and an odd one, and is refused unless it is as exact as the built-in launch;
only then is it timed, with all other kernels as built in. What was found out is written down at once (``Journal``), so
that a search that was stopped goes on where it was, and does not repeat a candidate that ended the process.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from cacr_kernels.triton.configs import Key, Launch
from cacr_kernels.triton.space import builtin, neighbours, possible
from cacr_uniter.benchmark.shapes import Shape
from cacr_uniter.errors import UserError

GAIN = 0.97
"""A launch replaces another if it takes at most this share of its time."""


@dataclass(frozen=True)
class Call:
    """What is timed: one direction (forward, backward) of a variant and kind on one shape."""

    shape: Shape
    dtype: str
    variant: str
    kind: str
    direction: str

    def __str__(self) -> str:
        return f"{self.direction} of {self.variant} {self.kind} {self.shape.name} {self.dtype}"


class Machine(Protocol):
    """What the search needs of a GPU; ``launches`` replace built-in entries."""

    arch: int

    def uses(self, call: Call) -> set[Key]:
        """The kernels that a call starts.

        Raises:
            UserError: its result is wrong with the built-in table.
        """

    def measure(self, call: Call, launches: Mapping[Key, Launch]) -> float | str:
        """Milliseconds, or why the call's result is not acceptable."""


@dataclass
class Journal:
    """Outcomes by (kernel, launch, call), on disk as JSON lines; ``origin`` names GPU and versions.

    A candidate is noted before it runs: one that has no outcome ended its process and is not tried again.
    """

    file: Path | None
    origin: Mapping[str, str]
    found: dict[str, float | str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is None or not self.file.is_file():
            return
        for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                origin, name, outcome = json.loads(line)
            except (ValueError, TypeError):  # empty, or cut off while it was written
                continue
            if origin == self.origin and isinstance(name, str) and isinstance(outcome, float | str | None):
                self.found[name] = outcome

    def outcome(
        self, key: Key, launch: Launch, call: Call, run: Callable[[], float | str], warn: bool = True
    ) -> float | str:
        """Milliseconds, or why there are none: what is known already, else what ``run`` returns.

        Args:
            warn: note before the run that it ended its process, which holds until there is an outcome.
        """
        name = json.dumps([key, asdict(launch), str(call), asdict(call.shape)])
        if self.found.get(name) is None:
            if warn:
                self._note(name, "it ended its process")
            try:
                self._note(name, run())
            except KeyboardInterrupt:
                self._note(name, None)
                raise
        outcome = self.found[name]
        assert outcome is not None
        return outcome

    def _note(self, name: str, outcome: float | str | None) -> None:
        self.found[name] = outcome
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps([self.origin, name, outcome]) + "\n")  # the line before may be cut off


@dataclass(frozen=True)
class Choice:
    """The launch chosen for a kernel, and the geometric mean of its calls' times beside the built-in launch's."""

    key: Key
    launch: Launch
    ms: float
    builtin_ms: float
    calls: tuple[Call, ...]


@dataclass
class Outcome:
    """``choices`` that beat the built-in table, kernels ``tuned`` to the end, candidates ``refused`` and why."""

    choices: list[Choice] = field(default_factory=list)
    tuned: set[Key] = field(default_factory=set)
    refused: list[tuple[Key, Launch, str]] = field(default_factory=list)
    tried: int = 0
    complete: bool = True


class _Late(Exception):
    pass


@dataclass
class Search:
    """State of one search.

    Args:
        seconds: after which nothing new is timed; what was found out before is not measured again by a later search.
        say: gets a line for every kernel.
        progress: gets (what, candidates done, candidates known).
    """

    machine: Machine
    journal: Journal
    seconds: float
    say: Callable[[str], None]
    progress: Callable[[str, int, int], None] = lambda *_: None
    now: Callable[[], float] = time.monotonic

    def run(self, calls: Sequence[Call]) -> Outcome:
        """Chooses launches of all kernels that ``calls`` start; the kernels take turns, a step each."""
        deadline = self.now() + self.seconds
        outcome = Outcome()
        users: dict[Key, list[Call]] = {}
        try:
            for call in calls:
                self._be_in_time(deadline)
                for key in sorted(self.machine.uses(call)):
                    users.setdefault(key, []).append(call)
            best = {key: builtin(key, self.machine.arch) for key in users}
            first = {key: self._time(key, best[key], users[key], None, deadline) for key in users}
        except _Late:
            return Outcome(complete=False)
        times, seen = dict(first), {key: [best[key]] for key in users}
        queue, known = deque(users), 0
        try:
            while queue:
                key = queue.popleft()
                chosen = None
                fresh = [new for new in neighbours(best[key]) if new not in seen[key]]
                fresh = [new for new in fresh if possible(key, new, self.machine.arch)]
                seen[key] += fresh
                known += len(fresh)
                for launch in fresh:
                    ms = self._time(key, launch, users[key], outcome, deadline)
                    outcome.tried += 1
                    self.progress("candidates", outcome.tried, known)
                    if ms <= GAIN * times[key]:
                        chosen, times[key] = launch, ms
                if chosen is not None:
                    best[key] = chosen
                    queue.append(key)
                else:
                    outcome.tuned.add(key)
                    self.say(self._line(key, best[key], times[key] / first[key]))
        except _Late:
            outcome.complete = False
        kept = [key for key in users if times[key] < first[key]]
        outcome.choices = [Choice(key, best[key], times[key], first[key], tuple(users[key])) for key in kept]
        return outcome

    def _be_in_time(self, deadline: float) -> None:
        if self.now() > deadline:
            raise _Late

    def _line(self, key: Key, launch: Launch, ratio: float) -> str:
        name = f"{key.variant} {key.kernel} {key.dtype}" + f" D {key.head_size}" * bool(key.head_size)
        if ratio == 1:
            return f"{name}: built-in"
        return f"{name}: {launch.blocks}, {launch.num_warps} warps, {launch.num_stages} stages: {ratio:.3f} of built-in"

    def _time(self, key: Key, launch: Launch, calls: Sequence[Call], outcome: Outcome | None, deadline: float) -> float:
        """Geometric mean of the calls' times, infinite for a refused launch; no ``outcome``: the built-in launch."""
        logs = 0.0
        for call in calls:
            self._be_in_time(deadline)
            trial = {} if outcome is None else {key: launch}
            run = partial(self.machine.measure, call, trial)
            found = self.journal.outcome(key, launch, call, run, outcome is not None)
            if isinstance(found, str):
                if outcome is None:
                    raise UserError(f"the built-in launch of {key.kernel} cannot be timed ({call}): {found}")
                outcome.refused.append((key, launch, found))
                return math.inf
            logs += math.log(found)
        return math.exp(logs / len(calls))


def confirmed(machine: Machine, choices: Sequence[Choice], say: Callable[[str], None]) -> list[Choice]:
    """The choices, if together they are right and, over all calls, not slower than the built-in table; else none."""
    launches = {choice.key: choice.launch for choice in choices}
    calls = list(dict.fromkeys(call for choice in choices for call in choice.calls))
    total = 0.0
    for call in calls:
        before, after = (machine.measure(call, x) for x in ({}, launches))
        if isinstance(before, str) or isinstance(after, str):
            say(f"together they are refused ({call}): {after if isinstance(after, str) else before}")
            return []
        say(f"{call}: {after:.4g} ms, built-in {before:.4g} ms")
        total += math.log(after / before)
    if total > 0:
        say("together they are slower than the built-in table, which stays as it was")
        return []
    return list(choices)
