"""The comparison of auxiliary losses over seeds: many runs of `cacr train` and `cacr eval winoground`, kept as files.

Every run has a folder of its own and is finished when its scores are there; an interrupted study goes on with the runs
that are not, and each of these from its last checkpoint.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cacr_uniter.errors import UserError
from cacr_uniter.files import parse_json, write_json
from cacr_uniter.training.command import load_config

VARIANTS: dict[str, tuple[str, ...]] = {
    "none": ("--aux.loss=none",),
    "iais-singular": ("--aux.loss=iais-singular", "--aux.kind=probs", "--aux.heads=mean"),
    "iais-distributed": ("--aux.loss=iais-distributed", "--aux.kind=probs", "--aux.heads=mean"),
    "cacr": ("--aux.loss=cacr", "--aux.kind=softmax", "--aux.heads=each"),
    "cacr-scores": ("--aux.loss=cacr", "--aux.kind=scores", "--aux.heads=each"),
    "cacr-probs": ("--aux.loss=cacr", "--aux.kind=probs", "--aux.heads=mean"),
}
"""Auxiliary losses as options of `cacr train`; the rest of a run is the same.

All take both sides, IAIS too, which as published takes one in turn (presets aux-iais-*): half of the loss here.
"""

DEFAULT_VARIANTS = ("none", "iais-singular", "iais-distributed", "cacr")
SCORES, REPORT, LOG = "scores.jsonl", "winoground.json", "study.log"
METRICS = (
    *("group held_out", "group seen", "text held_out", "text seen"),
    *("image held_out", "image seen", "group", "text", "image"),
)


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        scenes: scene set of all runs.
        preset: of `cacr train`.
        variants: names of `VARIANTS`.
        seeds: of the runs; every variant has a run of every seed.
        options: further options of `cacr train`, the same for all runs.
    """

    scenes: str
    preset: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuses an empty or misspelt comparison.

        Raises:
            UserError: names the option.
        """
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants:
            raise UserError(f"--variants: {unknown[:1] or 'none'} is not one of {', '.join(VARIANTS)}")
        if not self.seeds:
            raise UserError("--seeds is 0: give at least 1")

    def runs(self) -> list[tuple[str, int]]:
        """Every (variant, seed), seed by seed, so that an early look compares like with like."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]


Progress = Callable[[str, int, int], None]


def run_study(out: Path, study: Study, processes: int, progress: Progress) -> dict[str, Any]:
    """Runs what is not there yet and returns the table of results.

    Args:
        out: folder of the runs; `results.json` is written there.
        study: what is compared.
        processes: runs at a time, each with an equal share of the CPU's cores.
        progress: told of finished runs and of optimizer steps.

    Raises:
        UserError: a wrong option, a folder of another study, or a run that failed (its log says why).
    """
    study.check()
    if processes < 1:
        raise UserError(f"--processes is {processes}: give 1 or more")
    _own_folder(out, study)
    threads = max(1, (os.cpu_count() or 1) // processes)
    steps = load_config(study.preset, [f"--data.scenes={study.scenes}", *study.options]).optim.steps
    stop = threading.Event()
    runs = study.runs()
    with ThreadPoolExecutor(processes) as pool:
        try:
            waiting = [pool.submit(_run, out, study, variant, seed, threads, stop) for variant, seed in runs]
            while not all(future.done() for future in waiting):
                progress("runs", sum(future.done() for future in waiting), len(runs))
                progress("optimizer steps", sum(_steps_done(run_folder(out, *run)) for run in runs), steps * len(runs))
                time.sleep(0.5)
        except KeyboardInterrupt:
            stop.set()
            raise
        for future in waiting:
            future.result()
        progress("runs", len(runs), len(runs))
        progress("optimizer steps", steps * len(runs), steps * len(runs))
    results = collect(out, study)
    write_json(out / "results.json", results)
    return results


def _steps_done(folder: Path) -> int:
    """Optimizer steps in the log of a run, 0 before its first line."""
    try:
        with (folder / "log.jsonl").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
            found = re.findall(rb'"step": (\d+)', log.read())
    except OSError:
        return 0
    return int(found[-1]) if found else 0


def _own_folder(out: Path, study: Study) -> None:
    """Makes the folder, or finds one whose runs can stand beside these: same scenes, preset and options."""
    path = out / "study.json"
    identity = {"scenes": study.scenes, "preset": study.preset, "options": list(study.options)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = parse_json(path.read_text(encoding="utf-8")) if path.exists() else identity
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {out} cannot be used ({error})") from error
    if before != identity:
        changed = [name for name in identity if before.get(name) != identity[name]]
        raise UserError(f"--out: {out} holds a study with other {', '.join(changed)}; give another folder")
    write_json(path, identity)


def run_folder(out: Path, variant: str, seed: int) -> Path:
    """Folder of one run."""
    return out / f"{variant}-seed{seed}"


def commands(out: Path, study: Study, variant: str, seed: int, threads: int) -> list[list[str]]:
    """The two `cacr` commands of one run, without the program's name."""
    folder = run_folder(out, variant, seed)
    train = [
        *("train", "--preset", study.preset, f"--data.scenes={study.scenes}", f"--run.out={folder}"),
        *(f"--run.seed={seed}", f"--run.threads={threads}", *VARIANTS[variant], *study.options),
    ]
    score = ["eval", "winoground", "--checkpoint", str(folder), "--data", study.scenes, "--json"]
    return [train, [*score, "--write-scores", str(folder / SCORES)]]


def _run(out: Path, study: Study, variant: str, seed: int, threads: int, stop: threading.Event) -> None:
    from cacr_uniter.training.checkpoint import unfinished

    folder = run_folder(out, variant, seed)
    if stop.is_set() or ((folder / REPORT).exists() and unfinished(folder) is None):
        return
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    printed = ""
    for words in commands(out, study, variant, seed, threads):
        if stop.is_set():
            return
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"$ cacr {' '.join(words)}\n")
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "cacr_uniter.cli", *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
            printed = _wait(process, stop)
            log.write(printed)
        if stop.is_set():
            return
        if process.returncode:
            stop.set()
            raise UserError(f"run {variant} of seed {seed} failed ({_reason(folder, process)}); see {folder / LOG}")
        left = unfinished(folder)
        if left is not None:  # training that is asked to stop saves and ends well
            stop.set()
            raise UserError(f"run {variant} of seed {seed} stopped at {left}; the same command goes on")
    write_json(folder / REPORT, parse_json(printed))


def _reason(folder: Path, process: subprocess.Popen[str]) -> str:
    if process.returncode < 0:
        return f"stopped by signal {-process.returncode}; was the memory full? The same command goes on"
    return (folder / LOG).read_text(encoding="utf-8").strip().splitlines()[-1]


def _wait(process: subprocess.Popen[str], stop: threading.Event) -> str:
    """What the process prints; when the study stops, the process is asked to stop too (training saves first)."""
    while not stop.is_set():
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=0.5)[0]
    process.terminate()
    return process.communicate()[0]


def collect(out: Path, study: Study) -> dict[str, Any]:
    """Scores of all runs: {"study": ..., "scores": {variant: {metric: {seed: percent}}}, "summary": {...}}."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for variant in study.variants:
        reports = {
            seed: parse_json((run_folder(out, variant, seed) / REPORT).read_text(encoding="utf-8"))
            for seed in study.seeds
        }
        scores[variant] = {
            metric: {
                str(seed): value for seed, report in reports.items() if (value := _metric(report, metric)) is not None
            }
            for metric in METRICS
        }
    return {
        "study": asdict(study),
        "scores": scores,
        "summary": {
            variant: {metric: spread(list(values.values())) for metric, values in own.items() if values}
            for variant, own in scores.items()
        },
    }


def _metric(report: dict[str, Any], metric: str) -> float | None:
    name, _, split = metric.partition(" ")
    part = report["breakdowns"].get("split", {}).get(split) if split else report
    return None if part is None else float(part[name]["score"])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation (0 for one value), least and most."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "min": min(values), "max": max(values)}
