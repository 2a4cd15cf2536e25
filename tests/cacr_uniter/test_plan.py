"""``cacr train --plan`` against what torch's allocator says of real steps, and against formulas at published sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cacr_kernels import problem
from cacr_uniter.cli import main
from cacr_uniter.model import UniterConfig
from cacr_uniter.training import dry_run
from cacr_uniter.training.build import build_accelerator, build_model, model_config
from cacr_uniter.training.command import load_config
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.dry_run import LiveBytes
from cacr_uniter.training.optim import trained_parameters
from cacr_uniter.training.plan import make_plan
from cacr_uniter.training.source import MemorySource
from cacr_uniter.training.step import Stepper
from cacr_uniter.training.testing import (
    SMALL,
    VOCABULARY,
    small_config,
    small_run,
    synthetic_source,
    write_databases,
)

TEXT, REGIONS, IMG_DIM, CHUNK = 34, 64, 128, 7
#: activations dwarf what the allocator rounds; no dropout, of which the CPU keeps more than a GPU
MEDIUM = {
    "model__hidden_size": 128,
    "model__num_hidden_layers": 4,
    "model__num_attention_heads": 4,
    "model__intermediate_size": 512,
    "model__dropout": 0.0,
    "batch__score_chunk": CHUNK,
    "run__validate_every": 0,
    "aux__backend": "auto",
}
MEAN = {"aux__kind": "probs", "aux__heads": "mean"}
CASES: dict[str, dict[str, Any]] = {
    "none": {"aux__loss": "none", **MEAN},
    "scores": {},
    "qk": {"aux__source": "qk"},
    "checkpointing": {"model__activation_checkpointing": True},
    "frozen": {"model__freeze_layers": 2},
    "bf16": {"run__precision": "bf16"},
    "bf16-frozen-checkpointing": {
        "run__precision": "bf16",
        "model__freeze_layers": 1,
        "model__activation_checkpointing": True,
    },
    "all-pairs": {"aux__pairs": "all"},
    "all-pairs-mean": {"aux__pairs": "all", **MEAN},
    "all-pairs-qk": {"aux__pairs": "all", "aux__source": "qk"},
    "all-pairs-iais": {"aux__pairs": "all", "aux__loss": "iais-singular", **MEAN},
    "all-pairs-layers": {
        "aux__pairs": "all",
        "aux__loss": "iais-distributed",
        "aux__layers": "[0,1,2,3]",
        **MEAN,
    },
    "random": {"batch__mining": "random"},
    "shared": {"batch__mining": "shared", "batch__anchors": 4},
    "softmax": {"loss__kind": "softmax"},
}


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_databases(tmp_path_factory.mktemp("data"))


def sizes_of(config: TrainConfig) -> UniterConfig:
    return model_config(config.model, VOCABULARY, IMG_DIM)


def stepper_of(config: TrainConfig) -> Stepper:
    """A real step of float16 features, all pairs as long as the longest."""
    images = 12
    source = MemorySource(
        torch.ones(images, TEXT, dtype=torch.int64),
        np.full(images, TEXT - 2),
        torch.ones(images, REGIONS, IMG_DIM, dtype=torch.float16),
        torch.ones(images, REGIONS, 7),
        np.full(images, REGIONS),
        np.arange(images),
    )
    model, _ = build_model(config.model, sizes_of(config), 0)
    parameters = list(trained_parameters(model).values())
    optimizer = cast(torch.optim.Optimizer, None)
    return Stepper(model.train(), parameters, optimizer, config, source, build_accelerator(config.run))


def allocated(function: Callable[[], Any]) -> int:
    """Most bytes that torch's allocator held at once for the function, temporaries inside operators included.

    Without oneDNN, whose bfloat16 products take memory that depends on the CPU.
    """
    with (
        torch.backends.mkldnn.flags(enabled=False),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(live.max())


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_the_allocator_gives(tmp_path: Path, case: str) -> None:
    config = small_config(tmp_path, **(MEDIUM | CASES[case]))
    stepper = stepper_of(config)
    *_, portion = stepper.portions(config.optim.steps - 1)
    measured = allocated(lambda: stepper.backward(portion))
    near = 0.03 if config.run.precision == "fp32" else 0.05
    plan = make_plan(sizes_of(config), config, TEXT, REGIONS)
    assert plan.use(8).training == pytest.approx(measured, rel=near)
    if config.batch.mining == "hard":
        pool, pairs = portion.pairs.nbytes, portion.pairs
        with torch.no_grad():
            stepper.model.eval()
            assert plan.use(8).scoring == pytest.approx(allocated(lambda: stepper.score(pairs)) + pool, rel=near)


def test_the_kernels_keep_as_much_as_the_dry_run_says() -> None:
    assert dry_run.ROW_NUMBERS == problem.ROW_NUMBERS


def test_live_bytes_follow_storages() -> None:
    before = torch.ones(1000)
    with LiveBytes() as counted:
        before.add_(1)
        kept = before[:10] + before[10:20]
        assert counted.live == 512
        view = kept.view(2, 5)
        del kept
        assert counted.live == 512
        del view
        assert (counted.live, counted.peak) == (0, 512)
        torch.ones(129)
        assert (counted.lap(), counted.lap()) == (1024, 0)


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_published_sizes_by_formula(size: str) -> None:
    """fp16: whole layers keep the float32 inputs of norms, the half inputs of products, and of GELU its argument.

    The last layer and the embeddings are the rest.
    """
    config = load_config(f"flickr-{size}", ["--preset", "aux-cacr"])
    sizes = getattr(UniterConfig, size)()
    plan = make_plan(sizes, config, text=62, regions=100)
    use = plan.use(32)
    h, f, tokens = sizes.hidden_size, sizes.intermediate_size, 32 * 162
    whole_layers = sizes.num_hidden_layers - config.model.freeze_layers - 1
    norms, halves, masks = 2 * 4 * h, 2 * (h + 3 * h + h + h + f), 2 * h
    cast = 2 * whole_layers * (4 * h * h + 2 * h * f)
    assert use.activations == pytest.approx(whole_layers * tokens * (norms + halves + masks) + cast, rel=0.1)
    assert use.batch == pytest.approx(32 * 100 * 4 * (2048 + 7), rel=0.02)  # in the forward as float32
    pool = 400 * 100 * (2 * 2048 + 4 * 7)  # as stored, each image once
    assert use.scoring > pool + 100 * 162 * 2 * 2 * f
    assert plan.fixed == pytest.approx(4 * plan.dry_run.parameters + 12 * plan.dry_run.trained, rel=0.02)


def test_a_step_of_image_groups_holds_one_image_a_pool(tmp_path: Path) -> None:
    plans = {}
    for halves in ("image", "both"):
        config = small_config(tmp_path, **MEDIUM, batch__halves=halves, batch__pool=200, batch__pairs_per_forward=4)
        plans[halves] = make_plan(sizes_of(config), config, TEXT, REGIONS).use(4)
    pool = 200 * REGIONS * (2 * IMG_DIM + 4 * 7)
    texts = 200 * 8 * TEXT
    assert plans["both"].scoring - plans["image"].scoring == pytest.approx(pool - texts, rel=0.01)


def test_dropout_keeps_a_byte_a_number(tmp_path: Path) -> None:
    plain, dropped = (
        make_plan(sizes_of(config), config, TEXT, REGIONS).use(4).activations
        for config in (small_config(tmp_path, **(MEDIUM | {"model__dropout": p})) for p in (0.0, 0.1))
    )
    tokens, h, layers = 4 * (TEXT + REGIONS), 128, 3  # the last layer has one row
    # a mask for each residual branch and for the embeddings, whose undropped output is kept besides
    assert dropped - plain == pytest.approx((2 * layers + 1) * tokens * h, rel=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"batch__anchors": 4},
        {"batch__anchors": 4, "batch__mining": "shared"},
        {"batch__anchors": 4, "batch__pool": 150, "batch__score_chunk": 50, "model__activation_checkpointing": True},
    ],
)
def test_the_largest_portion_fits_and_one_more_group_does_not(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = small_config(tmp_path, **(MEDIUM | fields))
    plan = make_plan(sizes_of(config), config, TEXT, REGIONS)
    peaks = {pairs: plan.peak(pairs) for pairs in range(4, 33, 4)}
    for pairs in (4, 12, 20, 28):
        if peaks[pairs] < peaks[pairs + 4]:
            assert plan.largest(peaks[pairs] + 1) == pairs
    assert plan.largest(10 * peaks[32]) == 32  # the whole step: 4 groups of each half
    assert plan.largest(peaks[4] - 2) == 0


def test_plan_from_the_command(databases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        f"--{key}={value}" for key, value in (SMALL | {"data.scenes": databases, "run.out": tmp_path / "x"}).items()
    ]
    assert main(["train", *words, "--run.memory_limit", "11GB", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "8 text columns and 5 regions" in shown
    assert "batch of 8 pairs" in shown
    assert "11.0 GB hold batch.pairs_per_forward up to 16, a whole step" in shown
    assert not (tmp_path / "x").exists()
    assert main(["train", *words, "--batch.pairs_per_forward", "9999", "--plan"]) == 0
    assert "batch of 16 pairs" in capsys.readouterr().out
    for limit, fields, advice in (
        ("1MB", [], "1.0 MB do not hold one group of 4 pairs: weights, gradients and moments alone need 35"),
        ("35.8MB", ["--model.hidden_size", "32"], "model.activation_checkpointing true, fewer"),
        ("36MB", ["--batch.pool", "20000"], "try a smaller batch.score_chunk or batch.pool"),
    ):
        assert main(["train", *words, *fields, "--run.memory_limit", limit, "--plan"]) == 0
        assert advice in capsys.readouterr().out


def test_the_plan_takes_its_sizes_from_a_checkpoint(
    databases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = SMALL | {"run.out": tmp_path / "run", "data.scenes": databases, "optim.steps": 2}
    assert main(["train", "--progress", "false", *(f"--{key}={value}" for key, value in fields.items())]) == 0
    capsys.readouterr()
    assert main(["train", *(f"--{key}={value}" for key, value in fields.items()), "--plan"]) == 0
    small = capsys.readouterr().out
    sizeless = {k: v for k, v in fields.items() if not k.startswith("model.")} | {"model.checkpoint": tmp_path / "run"}
    assert main(["train", *(f"--{key}={value}" for key, value in sizeless.items()), "--plan"]) == 0
    assert capsys.readouterr().out == small


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fields", [{}, {"aux__pairs": "all"}, {"model__activation_checkpointing": True}], ids=str)
def test_the_plan_is_near_the_measured_peak(tmp_path: Path, precision: str, fields: dict[str, Any]) -> None:
    config = small_config(
        tmp_path,
        run__device="cuda",
        run__precision=precision,
        model__hidden_size=768,
        model__num_hidden_layers=12,
        model__num_attention_heads=12,
        model__intermediate_size=3072,
        batch__pairs_per_forward=512,
        batch__anchors=64,
        batch__mining="random",
        optim__steps=3,
        aux__backend="auto",
        **fields,
    )
    source = synthetic_source()
    text, regions = int(np.max(source.n_text)) + 2, int(np.max(source.n_regions))
    torch.cuda.reset_peak_memory_stats()
    measured = small_run(config).history[-1]["memory"]
    sizes = model_config(config.model, VOCABULARY, source.img_dim)
    assert make_plan(sizes, config, text, regions, torch.float32).peak(512) == pytest.approx(measured, rel=0.15)
