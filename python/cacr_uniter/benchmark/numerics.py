"""`cacr bench numerics`: errors of every backend against float64 beside the eager closed form, as Markdown tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cacr_kernels import backends, fused_cacr, fused_cacr_qk
from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.testing import Errors, device_of, errors, make_scores, score_errors
from cacr_uniter.benchmark.contenders import OURS, scores_of
from cacr_uniter.benchmark.machine import provenance
from cacr_uniter.benchmark.shapes import DTYPES
from cacr_uniter.benchmark.summary import markdown
from cacr_uniter.errors import UserError
from cacr_uniter.files import write_text

BEGIN, END = "<!-- numerics: begin -->", "<!-- numerics: end -->"
DEFAULT = Path("docs/numerics.md")
COUNT = 32
"""Seeded problems in a root mean square."""


@dataclass(frozen=True)
class Case:
    """Scores of ``n_text`` tokens and ``n_vision`` regions, normal with a deviation and a mean.

    Args:
        pattern: ``normal``, or ``near`` (rows that nearly agree, see ``near_congruent``).
        count: problems; fewer where one is large.
    """

    n_text: int
    n_vision: int
    std: float = 1.0
    mean: float = 0.0
    pattern: str = "normal"
    count: int = COUNT

    @property
    def budget(self) -> tuple[float, float] | None:
        """Promised (loss, gradient) error of float32; None where the promise is twice the eager closed form's."""
        if self.pattern == "near":
            return 1e-4, float("inf")
        return (1e-6, 5e-5) if self.std <= 2 and self.n_vision <= 128 else None

    @property
    def text(self) -> str:
        if self.pattern == "near":
            return "x = y + 100 + 1e-2 noise"
        return f"{self.std:g} / {self.mean:g}"


CASES = (
    *(Case(20, 36, std, mean) for std in (0.3, 1.0, 2.0) for mean in (0.0, 1.0, -3.0)),
    *(Case(60, 100, std, mean) for std in (0.3, 1.0, 2.0) for mean in (0.0, 1.0, -3.0)),
    Case(20, 36, 10.0),
    Case(60, 100, 10.0),
    Case(64, 1024, 0.3, count=4),
    Case(24, 24, pattern="near"),
)
QUICK = (Case(20, 36), Case(60, 100, 1.0, -3.0, count=8), Case(24, 24, pattern="near"))
LOW_BUDGET = (1e-5, 4e-3)
"""Promised errors of bfloat16 and float16 inputs, against float64 on the same rounded inputs."""


def near_congruent(n: int, seed: int) -> Tensor:
    """Scores [1, 1, 2 n, 2 n] whose rows nearly agree: S_tv = I and S_vv = S_tt + 100 + 1e-2 noise.

    The text side then compares x = y + 100 + 1e-2 noise with y.
    """
    scores = make_scores(n, n, seed=seed)
    noise = make_scores(n, n, seed=seed + 1000)
    scores[..., :n, n:] = torch.eye(n)
    scores[..., n:, n:] = scores[..., :n, :n] + 100 + 1e-2 * noise[..., n:, n:]
    return scores


def case_errors(function: Callable[..., Tensor], case: Case, dtype: str, kind: str, device: str) -> Errors:
    """Root mean square errors of a score function on a case."""
    if case.pattern == "near":
        problems = ((near_congruent(case.n_text, seed).to(DTYPES[dtype]).to(device),) for seed in range(case.count))
        options: dict[str, Any] = {"kind": kind, "sides": "text", "reduction": "sum"}
        return errors(
            lambda attn: function(attn, case.n_text, **options),
            lambda attn: cacr_closed_form(attn, case.n_text, **options),
            problems,
        )
    return score_errors(
        function,
        case.n_text,
        case.n_vision,
        count=case.count,
        kind=kind,
        std=case.std,
        mean=case.mean,
        dtype=DTYPES[dtype],
        device=device,
    )


def qk_errors(backend: str | None, case: Case, dtype: str, kind: str, device: str, head_dim: int = 64) -> Errors:
    """Errors from q and k whose scores deviate by ``case.std``; ``backend`` None is the eager closed form of q k^T."""

    def problems() -> Iterator[tuple[Tensor, ...]]:
        for seed in range(case.count):
            generator = torch.Generator().manual_seed(seed)
            size = (1, 1, case.n_text + case.n_vision, head_dim)
            q, k = (torch.randn(size, generator=generator) * case.std**0.5 for _ in range(2))
            yield q.to(DTYPES[dtype]).to(device), k.to(DTYPES[dtype]).to(device)

    def closed_form(q: Tensor, k: Tensor) -> Tensor:
        return cacr_closed_form(scores_of(q, k), case.n_text, kind=kind, reduction="sum")

    def fused(q: Tensor, k: Tensor) -> Tensor:
        return fused_cacr_qk(q, k, case.n_text, kind=kind, reduction="sum", backend=backend or "auto")

    return errors(closed_form if backend is None else fused, closed_form, problems())


HEAD = (
    *("backend", "input", "kind", "T x R", "deviation / mean", "loss", "eager loss", "gradient", "eager gradient"),
    *("budget (loss, gradient)", "kept"),
)


def _line(names: tuple[str, ...], ours: Errors, eager: Errors, budget: tuple[float, float] | None) -> tuple[str, ...]:
    if budget is None:
        kept = ours.loss <= 2 * eager.loss + 2.4e-7 and ours.gradient <= 2 * eager.gradient + 2.4e-7
        promise = "twice eager"
    else:
        kept = ours.loss <= budget[0] and ours.gradient <= budget[1]
        promise = ", ".join("-" if limit == float("inf") else f"{limit:.0e}" for limit in budget)
    numbers = (ours.loss, eager.loss, ours.gradient, eager.gradient)
    return (*names, *(f"{x:.1e}" for x in numbers), promise, "yes" if kept else "NO")


@dataclass(frozen=True)
class Part:
    """One of the tables: its title, and the dtypes, kinds and cases of each backend."""

    title: str
    dtypes: tuple[str, ...]
    kinds: tuple[str, ...]
    cases: Callable[[str, str], tuple[Case, ...]]
    qk: bool

    def line(self, name: str, dtype: str, kind: str, case: Case) -> tuple[str, ...]:
        """Measures a line of the table."""
        device = device_of(name)
        if self.qk:
            ours, eager = (qk_errors(which, case, dtype, kind, device) for which in (name, None))
            budget = None if dtype == "float32" else LOW_BUDGET
        else:
            ours = case_errors(partial(fused_cacr, backend=name), case, dtype, kind, device)
            eager = case_errors(cacr_closed_form, case, dtype, kind, device)
            budget = case.budget if dtype == "float32" else LOW_BUDGET
        label = (name, dtype, kind, f"{case.n_text} x {case.n_vision}", case.text)
        return _line(label, ours, eager, budget)

    def refusal(self, name: str, dtype: str) -> str:
        """Why a backend does not take this input; empty if it does."""
        x = torch.zeros(1, 1, 16, 16, dtype=DTYPES[dtype], device=device_of(name))
        try:
            fused_cacr_qk(x, x, 8, backend=name) if self.qk else fused_cacr(x, 8, backend=name)
        except (ValueError, NotImplementedError) as error:
            return str(error)
        return ""


def parts(cases: tuple[Case, ...]) -> tuple[Part, Part]:
    """What is measured of these cases: from scores, from q and k."""

    def from_scores(dtype: str, kind: str) -> tuple[Case, ...]:
        return cases if dtype == "float32" and kind == "scores" else _few(cases, kind)

    def from_qk(dtype: str, kind: str) -> tuple[Case, ...]:
        normal = (case for case in cases if case.pattern == "normal" and case.mean == 0)
        return tuple(case for case in normal if case.std <= 2 and case.n_vision <= 128)

    title = "From q and k (D = 64; eager forms q k^T in the dtype of the input):"
    return (
        Part("From scores:", ("float32", "bfloat16", "float16"), ("scores", "softmax", "probs"), from_scores, False),
        Part(title, ("float32", "bfloat16"), ("scores", "softmax"), from_qk, True),
    )


def tables(
    cases: tuple[Case, ...],
    names: list[str],
    progress: Callable[[str, int, int], None],
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """The tables of ``docs/numerics.md`` for the given backends, measured here and now.

    Args:
        say: gets each line of them as soon as it is measured.
    """
    made = []
    for part in parts(cases):
        refused = {(name, dtype): part.refusal(name, dtype) for name in names for dtype in part.dtypes}
        plan = [
            (name, dtype, kind, case)
            for (name, dtype), reason in refused.items()
            if not reason
            for kind in part.kinds
            for case in part.cases(dtype, kind)
        ]
        if not plan:
            continue
        lines = []
        left_out = {
            reason: f"Left out: {name}, {dtype}: {reason}" for (name, dtype), reason in refused.items() if reason
        }
        notes = [part.title, *left_out.values()]
        say("\n" + "\n\n".join([*notes, markdown(HEAD, [])]))
        for done, item in enumerate(plan):
            lines.append(part.line(*item))
            say(f"| {' | '.join(lines[-1])} |")
            progress(part.title, done + 1, len(plan))
        made += [*notes, markdown(HEAD, lines)]
    return "\n\n".join(made)


def _few(cases: tuple[Case, ...], kind: str) -> tuple[Case, ...]:
    usual = tuple(
        case for case in cases if case.pattern == "normal" and case.std in (1.0, 10.0) and case.n_vision <= 128
    )
    return tuple(case for case in usual if case.mean in (0.0, -3.0) and not (kind == "probs" and case.mean))


def replace_between(text: str, made: str, path: Path) -> str:
    """``text`` with what stands between the two markers replaced.

    Raises:
        UserError: the markers are missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path}: expected the line {BEGIN} and later {END}, once each")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return f"{head}{BEGIN}\n\n{made}\n\n{END}{tail}"


def main(argv: list[str], parser: argparse.ArgumentParser) -> int:
    """The command; ``parser`` has ``--out``, here the Markdown file."""
    parser.set_defaults(out=DEFAULT)
    parser.add_argument("--print", action="store_true", help="print the tables, write nothing")
    parser.add_argument("--quick", action="store_true", help="three cases a backend")
    parser.add_argument("--backends", nargs="+", choices=OURS, help="only these (default: all that can run here)")
    args = parser.parse_args(argv)

    from cacr_uniter.commands.progress import bars

    before = None
    if not args.print:
        if not args.out.is_file():
            raise UserError(f"--out {args.out} is no file: run this in the repository, give a file, or use --print")
        before = args.out.read_text(encoding="utf-8")
        replace_between(before, "", args.out)
    states = backends()
    for name in args.backends or ():
        if not states[name].available:
            raise UserError(f"--backends: {name} cannot run here: {states[name].reason}")
    names = [name for name in args.backends or OURS if states[name].available]
    if not names:
        raise UserError("no backend but the reference can run here: see `cacr doctor`")
    origin: dict[str, Any] = provenance(device_of(names[0]))
    cases = QUICK if args.quick else CASES
    counts = sorted({case.count for case in cases})
    intro = (
        f"Measured {origin['date'][:10]} on {origin['device']}, torch {origin['torch']}, "
        f"commit {origin['commit'] or 'unknown'}; root mean square over {' or '.join(map(str, counts))} seeded "
        f"problems a line{' (quick selection)' if args.quick else ''}."
    )
    with bars() as progress:
        if before is None:
            print(intro)
            tables(cases, names, progress, lambda line: print(line, flush=True))
        else:
            made = f"{intro}\n\n{tables(cases, names, progress)}"
            write_text(args.out, replace_between(before, made, args.out))
            print(f"written to {args.out}")
    return 0
