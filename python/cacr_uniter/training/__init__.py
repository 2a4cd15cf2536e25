"""Fine-tuning: configuration, sampling, losses, the loop, checkpoints, logs and the report.

``train(config)`` runs one training; ``main(argv)`` is ``cacr train``. Both are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cacr_uniter.training.command import main
    from cacr_uniter.training.config import TrainConfig
    from cacr_uniter.training.trainer import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "main", "train"]

_HOMES = {"main": "command", "TrainConfig": "config", "TrainResult": "trainer", "train": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"cacr_uniter.training.{_HOMES[name]}"), name)
