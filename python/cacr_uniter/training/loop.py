"""The loop over optimizer steps: check, log, validate, save, stop."""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cacr_uniter.errors import ProcessError, UserError, is_out_of_memory
from cacr_uniter.model import UniterForRetrieval
from cacr_uniter.training import checkpoint as checkpoints
from cacr_uniter.training.best import Best
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.logs import Display, RunLog
from cacr_uniter.training.source import PairSource
from cacr_uniter.training.step import Portion, Stepper
from cacr_uniter.training.validation import validate

#: fp16 overflows in a row that no loss scale will mend: it has halved each time
OVERFLOWS = 20

Evaluation = Callable[[UniterForRetrieval, int], dict[str, float]]


class StopRequest:
    """Inside the block SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Loop:
    """Steps of one run on one process.

    Args:
        config: of the run.
        stepper: runs a step.
        optimizer: the bare one, for checkpoints.
        log, display: of the main process.
        best: keeps the best validated weights.
        validation: validation pairs, or none.
        evaluate: further evaluation of the main process, or none.
        extra: plain values of the checkpoint that the run resumes.
        heads: heads that the run trains or loaded, for checkpoints; None if an older part of the run does not tell.
    """

    def __init__(
        self,
        config: TrainConfig,
        stepper: Stepper,
        optimizer: torch.optim.Optimizer,
        log: RunLog,
        display: Display,
        best: Best,
        validation: PairSource | None,
        evaluate: Evaluation | None,
        extra: dict[str, Any],
        heads: tuple[str, ...] | None,
    ) -> None:
        self.config, self.stepper, self.optimizer = config, stepper, optimizer
        self.log, self.display, self.best = log, display, best
        self.validation, self.evaluate, self.heads = validation, evaluate, heads
        self.folder = Path(config.run.out) / "checkpoints"
        self.accelerator = stepper.accelerator
        #: matching, auxiliary, first, groups, norm, skipped (which older checkpoints lack)
        self._sums: list[float] = [*extra.get("window", []), *[0.0] * 6][:6]
        self._overflows = 0
        self._seconds: float = extra.get("seconds", 0.0)
        self._data = extra.get("data")
        self._mark = time.monotonic()

    def run(self, start: int) -> int:
        """Runs steps ``start`` .. T - 1. Returns the steps done: fewer than T if a signal asked for a stop."""
        done = start
        with StopRequest() as stop, self._errors_of_one_process():
            for done in self._steps(start):
                run = self.config.run
                last = done == self.config.optim.steps
                stopped = self._any(stop.wanted)
                if run.validate_every and (last or done % run.validate_every == 0):
                    with checkpoints.naming_kept(self.folder):
                        self._validate(done)
                if last or stopped or done % run.checkpoint_every == 0:
                    self._save(done)
                if stopped:
                    break
        return done

    def _steps(self, start: int) -> Any:
        """Yields the number of finished steps after each."""
        sums: Tensor | None = None
        for portion in self._read(start):
            if sums is None:
                self.stepper.begin(portion.step)
            part = self.stepper.backward(portion)
            sums = part if sums is None else sums + part
            if portion.last:
                self._finish(portion.step, sums)
                sums = None
                yield portion.step + 1

    def _read(self, start: int) -> Iterator[Portion]:
        """The step's portions; a record that cannot be read is a matter of this process."""
        with checkpoints.naming_kept(self.folder):
            yield from self.stepper.portions(start)

    @contextlib.contextmanager
    def _errors_of_one_process(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise self._out_of_memory() from error
            raise

    def _finish(self, step: int, sums: Tensor) -> None:
        """The update of a step (from 0) whose gradients are complete, and its record."""
        if self.accelerator.num_processes > 1:
            dist.all_reduce(sums)
        matching, auxiliary, first, groups = sums.tolist()
        if not (math.isfinite(matching) and math.isfinite(auxiliary)):
            raise self._diverged(
                step + 1, f"matching loss {matching / groups:.4g}, auxiliary loss {auxiliary / groups:.4g}"
            )
        done, norm = step + 1, self.stepper.gather()
        skipped = not math.isfinite(norm)
        if skipped and self.accelerator.scaler is None:
            raise self._diverged(done, f"gradient norm {norm:.4g}")
        self.stepper.update()
        self._overflows = self._overflows + 1 if skipped else 0
        if self._overflows >= min(OVERFLOWS, self.config.optim.steps):
            scale = self.accelerator.scaler.get_scale()
            raise self._diverged(done, f"{self._overflows} updates in a row overflowed, loss scale {scale:.3g}")
        found = (matching, auxiliary, first, groups, 0.0 if skipped else norm, float(skipped))
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)]
        logged = done % self.config.run.log_every == 0 or done == self.config.optim.steps
        self.display.update(done, self._record(done) if logged else None)

    def _record(self, done: int) -> dict[str, Any]:
        """Writes the training record of the steps since the last one."""
        config = self.config
        matching, auxiliary, first, groups, norm, skipped = self._sums
        per_step = config.batch.anchors * len(self.stepper.halves)
        steps = max(1, round(groups / per_step))
        elapsed = self._lap()
        weight = self.stepper.auxiliary_factor(done - 1) if self.stepper.auxiliary is not None else 0.0
        record = {
            "event": "train",
            "step": done,
            "loss": (matching + weight * auxiliary) / (config.batch.anchors * steps),
            "matching": matching / groups,
            "auxiliary": auxiliary / groups,
            "auxiliary_weight": weight,
            "first": first / groups,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm / (steps - skipped) if steps > skipped else None,
            "memory": self._memory(),
            "pairs_per_second": groups * self.stepper.size / elapsed if elapsed > 0 else 0.0,
            "seconds": self._seconds,
        }
        if self.accelerator.scaler is not None:
            record |= {"skipped": int(skipped), "loss_scale": self.accelerator.scaler.get_scale()}
        self._sums = [0.0] * 6
        with checkpoints.naming_kept(self.folder):
            self.log.write(record)
        return record

    def _validate(self, done: int) -> None:
        record: dict[str, Any] = {"event": "validation", "step": done}
        if self.validation is not None:
            record |= validate(self.stepper, self.validation, self.config)
            self.log.write(record)
            self.display.say(
                f"step {done}: recall at 1 of {record['candidates']} candidates: images {record['ir_r1']:.1f} %, "
                f"captions {record['tr_r1']:.1f} %"
            )
            if self.accelerator.is_main_process and self.best.offer(record, self.stepper.model):
                self.display.say(f"the best so far, kept in {self.best.folder}")
        if self.evaluate is not None and self.accelerator.is_main_process:
            self.stepper.model.eval()
            scores = self.evaluate(self.stepper.model, done)
            self.log.write({"event": "evaluation", "step": done, **scores})
            self.display.say(f"step {done}: " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))
        self._lap()

    def _save(self, done: int) -> None:
        self._lap()
        if self.accelerator.is_main_process:
            extra: dict[str, Any] = {"window": self._sums, "seconds": self._seconds, "data": self._data}
            if self.accelerator.scaler is not None:
                extra["scaler"] = self.accelerator.scaler.state_dict()
            checkpoints.save(
                self.folder,
                checkpoints.Checkpoint(
                    step=done,
                    model=self.stepper.model.state_dict(),
                    optimizer=checkpoints.optimizer_tensors(self.optimizer),
                    model_config=self.stepper.model.config.to_dict(),
                    config=self.config.as_dict(),
                    extra=extra,
                    heads=self.heads,
                ),
                self.config.run.keep,
            )
        self._lap()

    def _lap(self) -> float:
        """Seconds since the last lap, added to the run's time."""
        now = time.monotonic()
        elapsed, self._mark = now - self._mark, now
        self._seconds += elapsed
        return elapsed

    def _any(self, wanted: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return wanted
        flag = torch.tensor(float(wanted), device=self.accelerator.device)
        dist.all_reduce(flag)
        return bool(flag.item() > 0)

    def _memory(self) -> int:
        """Peak bytes: of torch's allocator on a GPU, else of the process."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.accelerator.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak

    def _diverged(self, step: int, numbers: str) -> UserError:
        return UserError(
            f"training diverged at step {step} ({numbers}): {checkpoints.kept(self.folder)}; try a lower optim.lr, a "
            "lower aux.weight, or run.precision bf16 or fp32 in place of fp16"
        )

    def _out_of_memory(self) -> ProcessError:
        return ProcessError(
            f"out of memory on {self.accelerator.device}: {checkpoints.kept(self.folder)}; go on from it with a lower "
            "batch.pairs_per_forward or batch.score_chunk, or model.activation_checkpointing true; a larger "
            "model.freeze_layers or another run.precision need a new run"
        )
