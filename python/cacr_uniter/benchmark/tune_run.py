"""`cacr bench tune`: measures launches on this GPU and writes the launch table (cacr_kernels.triton.table)."""

from __future__ import annotations

import argparse
import faulthandler
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from cacr_kernels.testing import relative_error
from cacr_kernels.triton import table
from cacr_kernels.triton.configs import BUCKETS, SMALL, Key, Launch
from cacr_uniter.benchmark.contenders import make, make_inputs
from cacr_uniter.benchmark.machine import device_name, provenance
from cacr_uniter.benchmark.measure import TOLERANCE, Calls, picked
from cacr_uniter.benchmark.shapes import DTYPES, Shape, parse_shapes
from cacr_uniter.benchmark.timing import timer_for
from cacr_uniter.benchmark.tune import Call, Choice, Journal, Outcome, Search, confirmed
from cacr_uniter.errors import UserError

SHAPES = ("uniter-36-b32", "uniter-100-b128", "vilt-b32", "square-1024")
ROUNDING = {"float32": (1e-6, 5e-6), "bfloat16": (1e-5, 4e-3), "float16": (1e-5, 4e-3)}
"""Relative errors of (loss, gradient) that any order of additions may have; beyond, twice the built-in launch's."""

HANGS = 180.0
"""Seconds after which a candidate, compiled and timed on one call, ends the process; a later search leaves it out."""


@lru_cache(maxsize=2)
def prepared(call: Call, device: str) -> Calls:
    """The call on inputs of its shape; those of one candidate's problem are kept, not of all."""
    contender = make("triton", call.variant, call.kind, call.dtype, device)
    leaves = make_inputs(call.shape, call.dtype, device).leaves(call.variant, call.kind, "triton")
    return Calls(contender, leaves, call.shape.n_text)


@dataclass(frozen=True)
class Expected:
    """What some problems of a call give in float64: losses and, of a backward, the gradients in a row."""

    chosen: list[int]
    loss: Tensor
    gradients: Tensor | None

    @classmethod
    def of(cls, call: Call, device: str) -> Expected:
        function = make("triton", call.variant, call.kind, call.dtype, device).expected
        chosen, some = picked(prepared(call, device).leaves, call.shape)
        wide = [x.double().requires_grad_(call.direction == "backward") for x in some]
        loss = function(*wide, call.shape.n_text)
        gradients = None
        if call.direction == "backward":
            gradients = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), wide)])
        return cls(chosen, loss.detach().flatten(0, 1), gradients)

    def errors(self, calls: Calls) -> tuple[float, float]:
        """Relative errors of loss and gradient, 0 for a gradient that the call does not compute."""
        if self.gradients is None:
            return relative_error(calls.forward().flatten(0, 1)[self.chosen], self.loss), 0.0
        loss, found = calls.both()
        got = torch.cat([g.flatten(0, 1)[self.chosen].flatten() for g in found])
        return relative_error(loss.flatten(0, 1)[self.chosen], self.loss), relative_error(got, self.gradients)


@dataclass
class Kernels:
    """The Triton kernels on ``device`` ("cuda"; "cpu" is the interpreter): a ``tune.Machine``."""

    device: str
    arch: int
    seconds: float
    limits: dict[Call, tuple[Expected, tuple[float, ...]]] = field(default_factory=dict)

    def uses(self, call: Call) -> set[Key]:
        for one in self.checked(call):
            self._limit(one)
        with table.trying({}) as used:
            run = prepared(call, self.device).prepare(call.direction)
            used.clear()
            run()
            return set(used)

    def checked(self, call: Call) -> tuple[Call, Call]:
        """The call with odd sizes that take the same path, and itself."""
        longest = max(call.shape.n_text, call.shape.n_vision)
        fewer = max(bucket for bucket in (0, *BUCKETS) if bucket < longest)
        odd = (7, fewer + 33) if longest <= SMALL else (SMALL + 3, 70)
        return replace(call, shape=Shape("odd", 1, 2, *odd, call.shape.head_dim)), call

    def _limit(self, call: Call) -> tuple[Expected, tuple[float, ...]]:
        """What is expected of a call, and the errors allowed."""
        if call not in self.limits:
            expected = Expected.of(call, self.device)
            with table.trying({}):
                errors = expected.errors(prepared(call, self.device))
            if not all(error <= limit for error, limit in zip(errors, TOLERANCE[call.dtype])):
                raise UserError(f"with the built-in launch table the {call} has relative errors {errors}: this is a "
                                "fault of the kernels or of the machine; nothing can be tuned")  # fmt: skip
            self.limits[call] = expected, tuple(max(2 * e, r) for e, r in zip(errors, ROUNDING[call.dtype]))
        return self.limits[call]

    def measure(self, call: Call, launches: Mapping[Key, Launch]) -> float | str:
        if self.device == "cuda":  # no signal reaches a process that waits for a kernel without end
            faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            return self._measured(call, launches)
        finally:
            if self.device == "cuda":
                faulthandler.cancel_dump_traceback_later()

    def _measured(self, call: Call, launches: Mapping[Key, Launch]) -> float | str:
        try:
            for one in self.checked(call):
                expected, limits = self._limit(one)
                calls = prepared(one, self.device)
                with table.trying(launches):
                    errors = expected.errors(calls)
                for name, off, limit in zip(("loss", "gradient"), errors, limits):
                    if not off <= limit:
                        return f"wrong: relative error {off:.1e} of the {name}, at most {limit:.1e} allowed"
            with table.trying(launches):
                return timer_for(self.device)(lambda: calls.prepare(call.direction), self.seconds, True).p20_ms
        except UserError:
            raise
        except Exception as error:  # too little shared memory, a compiler's failure: a candidate that cannot be
            self._still_there(error)
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"

    def _still_there(self, cause: Exception) -> None:
        """Raises if the candidate took the GPU's context with it: nothing more can run in this process."""
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # fails after a capture that failed
        except RuntimeError:
            raise UserError(
                f"a candidate ended in {cause!r:.200}; the next `cacr bench tune` leaves it out and goes on"
            ) from cause


def make_calls(
    shapes: Iterable[Shape], dtypes: Iterable[str], variants: Iterable[str], kinds: Iterable[str]
) -> list[Call]:
    """Every combination that exists, a shape's forward before its backward."""
    found = []
    for dtype, variant, kind, shape in product(dtypes, variants, kinds, shapes):
        if (variant == "qk" and kind == "probs") or (variant == "scores" and not shape.scores):
            continue
        found += [Call(shape, dtype, variant, kind, direction) for direction in ("forward", "backward")]
    return found


def updated(old: list[table.Entry], gpu: str, arch: int, choices: Iterable[Choice], tuned: set[Key],
            origin: Mapping[str, str]) -> list[table.Entry]:  # fmt: skip
    """``old`` with the choices for this GPU, without its other entries that were ``tuned`` now or are unusable."""
    kept = [entry for entry in old if not (entry.gpu == gpu and (entry.key in tuned or not table.usable(entry)))]
    new = []
    for choice in choices:
        calls = ", ".join(map(str, choice.calls))
        measured = table.Measured(
            choice.ms, choice.builtin_ms, calls, origin["date"], origin["torch"], origin["triton"]
        )
        new.append(table.Entry(gpu, arch, choice.key, choice.launch, measured))
    return table.merged(kept, new)


def as_code(entries: Iterable[table.Entry]) -> str:
    """Entries as they would stand in cacr_kernels/triton/configs.py, each under what was measured."""
    lines = ["MEASURED: dict[int, dict[Key, Launch]] = {"]
    found = sorted(entries, key=lambda entry: (entry.arch, entry.key))
    for arch in dict.fromkeys(entry.arch for entry in found):
        lines.append(f"    {arch}: {{")
        for entry in found:
            if entry.arch == arch:
                m, key, launch = entry.measured, entry.key, entry.launch
                why = (
                    f"{entry.gpu}, {m.date[:10]}, torch {m.torch}, Triton {m.triton}: {m.ms:.4g} ms, "
                    f"rule {m.builtin_ms:.4g} ms (geometric mean: {m.calls})"
                )
                lines += textwrap.wrap(why, 118, initial_indent=" " * 8 + "# ", subsequent_indent=" " * 8 + "# ")
                sizes = ", ".join(f'"{name}": {size}' for name, size in launch.blocks.items())
                name = ", ".join([f'"{key.variant}"', f'"{key.kernel}"', f'"{key.dtype}"', str(key.head_size)])
                lines.append(f"        Key({name}): Launch(")
                cap = "" if launch.registers is None else f", {launch.registers}"
                lines.append(f"            {{{sizes}}}, {launch.num_warps}, {launch.num_stages}{cap}")
                lines.append("        ),")
        lines.append("    },")
    return "\n".join([*lines, "}"])


def main(argv: list[str], parser: argparse.ArgumentParser) -> int:
    """The command; ``parser`` has ``--out``, here the table."""
    parser.set_defaults(out=table.path())
    add = parser.add_argument
    add("--shapes", nargs="+", metavar="SHAPE", default=list(SHAPES), help="names (uniter-100-b32) or BxHxTxR[xD]")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=["float32", "bfloat16"])
    add("--variants", nargs="+", choices=("scores", "qk"), default=["scores", "qk"], help="fused_cacr, fused_cacr_qk")
    add("--kinds", nargs="+", choices=("scores", "softmax", "probs"), default=["scores", "softmax"])
    add("--seconds", type=float, default=600.0, help="of the search; started again, it goes on where it was")
    add("--sample", type=float, default=0.05, help="seconds of timing a candidate on one call")
    add("--fresh", action="store_true", help="forget what earlier searches measured")
    add("--as-code", action="store_true", help="print the table's entries as cacr_kernels/triton/configs.py has them")
    args = parser.parse_args(argv)
    if args.out is None:
        raise UserError(f"{table.VARIABLE} is empty, so no launch table is in use: give a file with --out")
    if args.out.is_dir():
        raise UserError(f"--out: {args.out} is a folder; give a file, such as {args.out / 'launch_table.json'}")
    old = table.read(args.out) if args.out.exists() else []
    if args.as_code:
        print(as_code(old))
        return 0
    for name in ("seconds", "sample"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} is {getattr(args, name)}: give a positive number")
    calls = make_calls(parse_shapes(args.shapes, "full", "cuda"), args.dtypes, args.variants, args.kinds)
    if not calls:
        raise UserError("nothing to tune: queries and keys (--variants qk) have no kind probs")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise UserError("tuning needs an NVIDIA GPU of compute capability 8.0 or newer; see `cacr doctor`")

    from cacr_uniter.commands.progress import bars

    major, minor = torch.cuda.get_device_capability()
    machine = Kernels("cuda", 10 * major + minor, args.sample)
    origin = provenance("cuda")
    journal = args.out.with_name(args.out.name + ".measured.jsonl")
    if args.fresh:
        journal.unlink(missing_ok=True)
    known = {name: origin[name] for name in ("device", "commit", "cacr", "torch", "triton")}
    with bars() as progress:
        search = Search(machine, Journal(journal, known), args.seconds, print, progress)
        outcome = search.run(calls)
    entries = finish(machine, outcome, old, origin)
    table.write(args.out, entries)
    print(f"{outcome.tried} candidates tried, {len(outcome.refused)} refused; {args.out} has {len(entries)} entries")
    if not outcome.complete:
        print("the time was over before the search: run the same command again to go on")
    return 0


def finish(machine: Kernels, outcome: Outcome, old: list[table.Entry], origin: Mapping[str, str]) -> list[table.Entry]:
    """The entries of the new table: ``old`` where the choices together turn out wrong or slower."""
    choices = confirmed(machine, outcome.choices, print)
    if outcome.choices and not choices:
        return old
    return updated(old, device_name(machine.device), machine.arch, choices, outcome.tuned, origin)
