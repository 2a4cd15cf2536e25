"""A training run from configuration to result: open, resume, run, report."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from accelerate import Accelerator

from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.data.joined import check_vocabularies
from cacr_uniter.errors import ProcessError, UserError
from cacr_uniter.evaluation.matrix import weights_digest
from cacr_uniter.files import write_text
from cacr_uniter.model import UniterForRetrieval
from cacr_uniter.model.checkpoint import HEADS
from cacr_uniter.training import checkpoint as checkpoints
from cacr_uniter.training.best import BEST, Best, set_aside
from cacr_uniter.training.build import build_accelerator, build_model, model_config, vocabulary_note
from cacr_uniter.training.checks import check, check_same_data, differences
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.data import open_dataset, open_source, resolve
from cacr_uniter.training.logs import Display, RunLog
from cacr_uniter.training.loop import Evaluation, Loop
from cacr_uniter.training.optim import build_optimizer, trained_parameters
from cacr_uniter.training.report import CURVES, write_report
from cacr_uniter.training.source import PairSource
from cacr_uniter.training.step import Stepper
from cacr_uniter.training.validation import measure

#: what a run writes into its folder
CHECKPOINTS, LOG, CONFIG, REPORT = "checkpoints", "log.jsonl", "config.yaml", "report.md"
CONTENTS = (CHECKPOINTS, LOG, CONFIG, REPORT, CURVES, BEST, "tensorboard")


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Args:
        out: folder of the run.
        checkpoint_path: newest checkpoint, a folder with ``model.safetensors`` and ``uniter.json``.
        step: optimizer steps done.
        finished: false if a signal stopped the run before its last step.
        start: optimizer steps done before this part of the run.
        best_path: folder of the weights that did best in a validation, if some were kept (main process only).
        history: records of the log (main process only); ``event`` is ``train``, ``validation``, ``evaluation``,
            ``weights``: what a checkpoint gave to the model, ``data``: a remark on the captions, or ``best``: what
            became of best weights found.
        seconds: wall time of this part of the run.
        report_path: final report, if one was wanted.
    """

    out: Path
    checkpoint_path: Path
    step: int
    finished: bool
    start: int
    history: list[dict[str, Any]]
    seconds: float
    best_path: Path | None = None
    report_path: Path | None = None


def train(config: TrainConfig, *, progress: bool = True, evaluate: Evaluation | None = None) -> TrainResult:
    """Trains a model, or resumes a run.

    Args:
        config: of the run.
        progress: show a progress bar (or lines) on the main process.
        evaluate: called on the main process at every validation and at the end with the model in evaluation mode and
            the finished steps; its numbers enter the log as event ``evaluation``.

    Raises:
        UserError: everything that the person who started it can solve; the last good checkpoint is intact.
    """
    accelerator = build_accelerator(config.run)
    check(config, accelerator.num_processes)
    data = resolve(config.data)
    dataset = open_dataset(data, "train")
    assert dataset is not None
    validation = open_dataset(data, "val") if config.run.validate_every else None
    vocab_size = dataset.text_db.vocab_size
    positions = model_config(config.model, vocab_size, dataset.feature_dim).max_position_embeddings
    dataset.check_lengths(positions)
    if validation is not None:
        check_vocabularies(dataset.text_db, validation.text_db)
        validation.check_lengths(positions)
    return train_on(
        config,
        accelerator,
        open_source(dataset, data),
        vocab_size=vocab_size,
        validation=open_source(validation, data) if validation is not None else None,
        dataset=dataset,
        progress=progress,
        evaluate=evaluate,
    )


def train_on(
    config: TrainConfig,
    accelerator: Accelerator,
    source: PairSource,
    *,
    vocab_size: int,
    validation: PairSource | None = None,
    dataset: RetrievalDataset | None = None,
    progress: bool = True,
    evaluate: Evaluation | None = None,
) -> TrainResult:
    """``train`` on pairs that are open already; ``vocab_size`` is that of the captions.

    ``dataset``, if there is one, is what ``source`` reads: checkpoints tell its vocabulary and its identity.
    """
    started = time.monotonic()
    out = Path(config.run.out)
    identity = None if dataset is None else dataset.identity()
    resumed = _resumed(config, out, identity)
    vocabulary = None if dataset is None else dataset.text_db.vocabulary
    sizes = model_config(config.model, vocab_size, source.img_dim, vocabulary)
    notes = [vocabulary_note(config.model, sizes, vocab_size), None if dataset is None else dataset.skipped]
    if validation is not None and validation.img_dim != source.img_dim:
        raise UserError(
            f"the region features of the validation have {validation.img_dim} numbers, those of the training "
            f"{source.img_dim}: data.val_images must be of the same kind as data.images"
        )
    model, loaded = build_model(config.model, sizes, config.run.seed)
    model.to(accelerator.device)
    parameters = trained_parameters(model)
    optimizer = build_optimizer(parameters, config.optim)
    start, since, extra = 0, 0, {}  # since: steps done in run.out itself, whose log and best weights go on
    known = ("rank",) if loaded is None else ("rank", *loaded.heads)
    heads: tuple[str, ...] | None = tuple(head for head in HEADS if head in known)
    if resumed is not None:
        origin, found = resumed
        start, extra, heads = found.step, found.extra, found.heads
        since = start if origin.resolve().parent == (out / CHECKPOINTS).resolve() else 0
        model.load_state_dict(found.model)
        checkpoints.restore_optimizer(optimizer, found.optimizer)
        if accelerator.scaler is not None and "scaler" in extra:
            accelerator.scaler.load_state_dict(extra["scaler"])
    if identity is not None:
        extra = extra | {"data": identity}
    _agree(config, start, model, accelerator)
    prepared = accelerator.prepare_optimizer(optimizer, device_placement=False)
    stepper = Stepper(model, list(parameters.values()), prepared, config, source, accelerator)
    main = accelerator.is_main_process
    with _folder(config, out, accelerator):
        validates = validation is not None and config.run.validate_every and start < config.optim.steps
        with checkpoints.naming_kept(out / CHECKPOINTS):
            measured = measure(validation, config.run) if validation is not None and validates else None
            log = RunLog(out, since, config.run.tensorboard, main)
        try:
            aside = set_aside(out) if main and since == 0 else ""
            best = Best(out, config.run.best, since, heads, measured)
            with Display(config.optim.steps, start, progress and main) as display:
                if resumed is not None and start < config.optim.steps:
                    display.say(f"continues from {origin}")
                if loaded is not None and resumed is None:
                    display.say(str(loaded))
                    log.write({"event": "weights", "step": start, "report": str(loaded)})
                for note in filter(None, notes if resumed is None else ()):
                    if main:  # also where no progress is shown
                        display.console.print(note, highlight=False, soft_wrap=True)
                    log.write({"event": "data", "step": start, "report": note})
                for remark in filter(None, (aside, best.remark)):
                    display.say(remark)
                    log.write({"event": "best", "step": start, "report": remark})
                loop = Loop(config, stepper, optimizer, log, display, best, validation, evaluate, extra, heads)
                done = loop.run(start)
        finally:
            log.close()
        accelerator.wait_for_everyone()
        path = checkpoints.newest(out / CHECKPOINTS)
        if path is None:
            raise ProcessError(f"run.out {out} holds no checkpoint here: it must be one folder that all nodes share")
        seconds = time.monotonic() - started
        result = TrainResult(out, path, done, done == config.optim.steps, start, log.history, seconds, best.path)
        if not (config.run.report and main and result.finished):
            return result
        with checkpoints.readable_errors(f"the run is finished, {path}, but its report {out / REPORT}"):
            write_report(out / REPORT, config, log.history, path, best, accelerator)
        return replace(result, report_path=out / REPORT)


def _resumed(
    config: TrainConfig, out: Path, identity: dict[str, Any] | None
) -> tuple[Path, checkpoints.Checkpoint] | None:
    """Folder and content of the checkpoint that the run goes on from, if any; ``identity`` is that of its pairs.

    Writes nothing.
    """
    if config.run.overwrite:
        return None
    last, resume = checkpoints.newest(out / CHECKPOINTS), config.run.resume
    path = last if resume in ("auto", "no") else Path(resume)
    if path is None:
        return None
    if resume == "no":
        raise UserError(
            f"run.out {out} holds a run already ({path.name}): resume it, set run.overwrite, or choose another"
        )
    if last is not None and path.resolve().parent == last.parent.resolve() and path.name != last.name:
        raise UserError(f"run.resume {path}: {last} is newer and in the same folder; choose another run.out")
    if last is not None and path.is_dir() and 0 <= checkpoints.step_of(path) <= checkpoints.step_of(last):
        path = last  # the same command once more: the run that began at the named checkpoint goes on
    found = checkpoints.load(path)
    changed = differences(found.config, config)
    if changed:
        raise UserError(
            f"checkpoint {path} belongs to a run with other settings ({'; '.join(changed)}): use the same ones, "
            "another run.out, or run.overwrite"
        )
    check_same_data(found.extra.get("data"), identity, path)
    if last is None and found.step >= config.optim.steps:
        raise UserError(
            f"run.resume {path} has done all {config.optim.steps} steps: nothing is left to do in {out}; a new run "
            "starts from its weights with model.checkpoint"
        )
    return path, found


def _agree(config: TrainConfig, start: int, model: UniterForRetrieval, accelerator: Accelerator) -> None:
    """Refuses processes that start from different steps or weights, as on nodes that do not share ``run.out``."""
    if accelerator.num_processes == 1:
        return
    found: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(found, (start, weights_digest(model)))
    other = next((rank for rank, state in enumerate(found) if state != found[0]), None)
    if other is None:
        return
    if found[other][0] != found[0][0]:
        raise UserError(
            f"process 0 starts at step {found[0][0]} and process {other} at step {found[other][0]}: run.out "
            f"{config.run.out} must be one folder that all nodes share"
        )
    raise UserError(
        f"processes 0 and {other} start from different weights: model.checkpoint and run.out must be the same on all "
        "nodes"
    )


@contextlib.contextmanager
def _folder(config: TrainConfig, out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Makes the folder of the run, without what an overwritten or killed run left, and writes the configuration.

    Inside the block the folder is this run's alone.

    Raises:
        UserError: it cannot be written, or another run that is not over holds it.
    """
    with contextlib.ExitStack() as held:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with checkpoints.readable_errors(f"run folder {out}"):
                out.mkdir(parents=True, exist_ok=True)
                held.enter_context(_lock(out))
                if config.run.overwrite:
                    _clear(out)
            with checkpoints.naming_kept(out / CHECKPOINTS), checkpoints.readable_errors(f"run folder {out}"):
                checkpoints.prune(out / CHECKPOINTS, config.run.keep)
                write_text(out / CONFIG, yaml.safe_dump(config.to_repeat(), sort_keys=False))
        accelerator.wait_for_everyone()
        yield


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Holds the folder itself; the system lets go when the process ends, in whatever way."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"run.out {out} is in use by a run that is not over: wait for it, stop it, or choose another run.out"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _clear(out: Path) -> None:
    for name in CONTENTS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
