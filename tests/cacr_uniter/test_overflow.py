"""fp16 overflows: skipped updates are counted and leave the mean, and a run that only overflows ends in words.

A real gradient scaler on the CPU, with loss scales at the end of float32 in the place of fp16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cacr_uniter.errors import UserError
from cacr_uniter.training.build import build_accelerator
from cacr_uniter.training.logs import describe
from cacr_uniter.training.testing import VOCABULARY, small_config, synthetic_source
from cacr_uniter.training.trainer import TrainResult, train_on


def scaled_run(out: Path, scale: float, backoff: float = 0.5, **fields: Any) -> TrainResult:
    config = small_config(out, model__dropout=0.0, **fields)
    accelerator = build_accelerator(config.run)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=backoff)
    accelerator.scaler = scaler
    accelerator.unscale_gradients = lambda: scaler.unscale_(accelerator._optimizers[-1].optimizer)
    return train_on(config, accelerator, synthetic_source(), vocab_size=VOCABULARY, progress=False)


def test_skipped_updates_are_logged_and_left_out_of_the_mean(tmp_path: Path) -> None:
    fields = {"aux__weight": 1000.0, "aux__schedule": "constant", "optim__lr": 1e-30}
    plain = scaled_run(tmp_path / "plain", 1.0, **fields).history
    result = scaled_run(tmp_path / "run", 2.0**127, 2.0**-62, run__log_every=2, run__report=True, **fields)
    assert [record["skipped"] for record in plain] == [0] * 8
    assert [record["skipped"] for record in result.history] == [1, 0, 0, 0]
    assert [record["loss_scale"] for record in result.history] == [2.0**65] * 4
    assert result.history[0]["grad_norm"] == pytest.approx(plain[1]["grad_norm"], rel=1e-3)
    assert "| updates skipped after an fp16 overflow | 1 |" in (tmp_path / "run" / "report.md").read_text()
    every = scaled_run(tmp_path / "every", 2.0**127, 2.0**-62, run__report=True, **fields).history
    assert every[0]["grad_norm"] is None
    assert "grad -" in describe(every[0])
    assert "1 skipped, loss scale 3.69e+19" in describe(every[0])


@pytest.mark.parametrize(("steps", "stops"), [(30, 20), (4, 4)])
def test_a_run_that_only_overflows_ends_in_words(tmp_path: Path, steps: int, stops: int) -> None:
    message = rf"diverged at step {stops} \({stops} updates in a row overflowed, loss scale .*run\.precision bf16"
    with pytest.raises(UserError, match=message):
        scaled_run(tmp_path, 2.0**127, 1 - 1e-7, optim__steps=steps, optim__warmup=0, aux__weight=1000.0)
