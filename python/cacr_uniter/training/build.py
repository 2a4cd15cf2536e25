"""What a run is made of: devices and processes, the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from cacr_uniter.data.vocabulary import Vocabulary, in_words, same_vocabulary
from cacr_uniter.errors import UserError
from cacr_uniter.model import UniterConfig, UniterForRetrieval
from cacr_uniter.model.checkpoint import LoadReport, load_checkpoint
from cacr_uniter.training.checkpoint import MODEL, SIZES, newest, verify_weights
from cacr_uniter.training.config import ModelConfig, RunConfig
from cacr_uniter.training.sizes import parse_size, show_size

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
SIZE_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "img_dim", "initializer_range"),
)


def build_accelerator(config: RunConfig) -> Accelerator:
    """Device, precision and processes of the run; caps the GPU memory of the process.

    Raises:
        UserError: the device, the precision or the limit is not to be had.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch finds no GPU: take run.device cpu, or see `cacr doctor`")
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    if cpu and config.precision == "fp16":
        raise UserError("run.precision fp16 needs a GPU: take fp32 or bf16")
    if config.threads is not None:
        if config.threads < 1:
            raise UserError(f"run.threads is {config.threads}: give a positive number")
        torch.set_num_threads(config.threads)
    # Accelerate keeps precision and device of a process's first run; several runs in one process may differ in them.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # Without it Accelerate divides losses by ACCELERATE_GRADIENT_ACCUMULATION_STEPS of the environment.
    whole_steps = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[config.precision], cpu=cpu, gradient_accumulation_plugin=whole_steps
    )
    if (accelerator.device.type == "cpu") != cpu:
        raise UserError(f"an earlier run of this process chose {accelerator.device}: start a new process")
    if config.memory_limit is not None:
        limit_memory(accelerator.device, parse_size(config.memory_limit, "run.memory_limit"))
    return accelerator


def limit_memory(device: torch.device, limit: int) -> None:
    """Caps torch's allocator on a GPU at ``limit`` bytes: beyond it torch raises OutOfMemoryError.

    Raises:
        UserError: the device has no such cap, or less memory than the limit.
    """
    if device.type != "cuda":
        raise UserError(
            f"run.memory_limit caps a GPU, the run uses {device}: leave it out, or limit the process (ulimit -v)"
        )
    total = torch.cuda.get_device_properties(device).total_memory
    if limit > total:
        raise UserError(
            f"run.memory_limit is {show_size(limit)}, the GPU has {show_size(total)}: give less or leave it out"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(limit / total, index)


def starting_point(path: str | Path) -> tuple[Path, UniterConfig | None]:
    """Weights file of ``model.checkpoint`` and, where it tells, the sizes: a file, a checkpoint's or a run's folder.

    Raises:
        UserError: nothing is there.
    """
    path = Path(path)
    folder = path if (path / SIZES).is_file() else newest(path / "checkpoints")
    if folder is not None:
        return folder / MODEL, UniterConfig.from_json(folder / SIZES)
    if not path.is_file():
        problem = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise UserError(f"model.checkpoint {path} {problem}: give a run's folder or a local weights file")
    return path, None


def model_config(
    config: ModelConfig, vocab_size: int, img_dim: int, vocabulary: Vocabulary | None = None
) -> UniterConfig:
    """Sizes of the model: those of ``checkpoint`` or ``size``, the data's vocabulary and features, the fields set.

    Args:
        vocab_size, img_dim: of the data; a checkpoint's must cover them.
        vocabulary: of the data, where it is known; a run's checkpoint must have been trained with the same.

    Raises:
        UserError: sizes that do not fit.
    """
    sizes = None if config.checkpoint is None else starting_point(config.checkpoint)[1]
    if sizes is None:
        if config.size in ("base", "large"):
            sizes = UniterConfig.base() if config.size == "base" else UniterConfig.large()
        else:
            sizes = UniterConfig.from_json(config.size)
        if config.checkpoint is None:
            sizes = dataclasses.replace(sizes, vocab_size=vocab_size, img_dim=img_dim)
    given = {name: getattr(config, name) for name in SIZE_FIELDS if getattr(config, name) is not None}
    try:
        made = dataclasses.replace(sizes, **given)
    except ValueError as error:
        raise UserError(str(error).replace("UniterConfig.", "model.")) from error
    if made.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size is {made.vocab_size}, the captions use a vocabulary of {vocab_size}: the checkpoint and "
            "the text database must share their vocabulary"
        )
    if made.img_dim != img_dim:
        raise UserError(f"model.img_dim is {made.img_dim}, the region features have {img_dim} numbers")
    if vocabulary is None:
        return made
    trained = sizes.vocabulary if config.checkpoint is not None else None
    if trained is not None and not same_vocabulary(trained, vocabulary):
        raise UserError(
            f"model.checkpoint {config.checkpoint} was trained on captions of another vocabulary: "
            f"{in_words(trained)}, those of the text database have {in_words(vocabulary)}"
        )
    return dataclasses.replace(made, vocabulary=dict(vocabulary))


def vocabulary_note(config: ModelConfig, sizes: UniterConfig, vocab_size: int) -> str | None:
    """A warning where weights from elsewhere know another number of word pieces than the captions use."""
    if config.checkpoint is None or sizes.vocab_size == vocab_size:
        return None
    return (
        f"warning: model.checkpoint {config.checkpoint} has a vocabulary of {sizes.vocab_size} word pieces, the text "
        f"database one of {vocab_size}: its weights are of use only if they number the pieces alike"
    )


def build_model(config: ModelConfig, sizes: UniterConfig, seed: int) -> tuple[UniterForRetrieval, LoadReport | None]:
    """A model with the weights of ``checkpoint``, or random ones of ``seed``; dropout and frozen layers are set."""
    torch.manual_seed(seed)
    model, report = UniterForRetrieval(sizes), None
    if config.checkpoint is not None:
        weights = starting_point(config.checkpoint)[0]
        verify_weights(weights)
        report = load_checkpoint(model, weights)
    model.set_dropout(config.dropout)
    try:
        model.freeze_layers(config.freeze_layers)
    except ValueError as error:
        raise UserError(f"model.freeze_layers: {error}") from error
    model.checkpoint_activations(config.activation_checkpointing)
    return model, report
