"""What `cacr bench` adds to kernels: ceilings, numerics, training, the report about a GPU."""

import argparse
import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

from cacr_kernels import backends
from cacr_uniter import cli
from cacr_uniter.benchmark import (
    calls,
    ceilings,
    contenders,
    numerics,
    results,
    training_cost,
    training_run,
)
from cacr_uniter.benchmark.ceilings import measure_ceilings
from cacr_uniter.benchmark.training_cost import Setting, largest, measure_setting
from cacr_uniter.errors import UserError
from cacr_uniter.training.config import AuxConfig


def test_ceilings_are_positive_rates():
    found = measure_ceilings("cpu", 0.01, scale=0.05)
    assert set(found) - {"multiply-add float32"} == {"copy", "matmul float32", "matmul bfloat16", "exp"}
    assert ("multiply-add float32" in found) == backends()["cpu"].available
    assert all(0 < value < float("inf") for value in found.values())  # how fast is no test on a shared machine


@pytest.mark.parametrize(
    ("capability", "runs", "served"), [((7, 5), True, True), ((7, 5), False, False), ((6, 1), True, False)]
)
def test_the_exp_unit_is_measured_where_triton_runs(monkeypatch, capability, runs, served):
    def exp2_rounds(numbers):
        if not runs:
            raise RuntimeError("no code for this card")

    unit = SimpleNamespace(ROUNDS=256, exp2_rounds=exp2_rounds)
    monkeypatch.setitem(sys.modules, "cacr_uniter.benchmark.exp_unit", unit)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch, "rand", lambda n, device: [0.5] * n)
    found = ceilings._exp2_rounds(16)
    assert (found is not None) == served
    assert not served or found[0] == 16 * 256


def test_without_the_exp_unit_a_gpu_computes_exponentials_in_its_cache(monkeypatch):
    made, rand = [], torch.rand
    monkeypatch.setattr(ceilings, "_exp2_rounds", lambda n: None)
    monkeypatch.setattr(ceilings, "l2_bytes", lambda: 1 << 16)
    monkeypatch.setattr(torch, "rand", lambda n, device: made.append(n) or rand(n))
    ceilings._exp_rate("cuda", 1 << 22, lambda amount, run: run() and amount)
    assert made == [(1 << 16) // 8]  # float32 numbers in half of the cache


def test_numerics_measure_each_backend_beside_eager():
    eager = numerics.case_errors(contenders.cacr_closed_form, numerics.Case(5, 7, count=2), "float32", "scores", "cpu")
    assert 0 < eager.loss < 1e-5
    near = numerics.case_errors(contenders.cacr_closed_form, numerics.Case(6, 6, pattern="near", count=2), "float32",
                                "scores", "cpu")  # fmt: skip
    assert 0 < near.loss < 1e-3


def test_near_congruent_rows_nearly_agree():
    scores = numerics.near_congruent(6, 0).double()
    t, v = slice(0, 6), slice(6, 12)
    difference = scores[..., t, v] @ scores[..., v, v] @ scores[..., t, v].mT - scores[..., t, t]
    assert float((difference - 100).abs().max()) < 0.06
    assert float((difference - 100).std()) == pytest.approx(0.01, rel=0.5)


def test_the_table_replaces_what_is_between_the_markers(tmp_path):
    text = f"before\n{numerics.BEGIN}\nold\n{numerics.END}\nafter\n"
    made = numerics.replace_between(text, "new", tmp_path)
    assert "old" not in made
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    assert numerics.replace_between(made, "new", tmp_path) == made
    with pytest.raises(UserError, match="expected the line"):
        numerics.replace_between("nothing", "new", tmp_path)


def test_each_line_is_printed_when_it_is_measured_and_refused_dtypes_are_left_out_in_words(monkeypatch, capsys):
    class Refusing(numerics.Part):
        def refusal(self, name, dtype):
            return f"{dtype} needs compute capability 8.0" if dtype == "bfloat16" else ""

    printed = []

    def line(part, *item):
        printed.append(capsys.readouterr().out)
        return tuple(map(str, item[:3])) + ("",) * 8

    monkeypatch.setattr(numerics, "Part", Refusing)
    monkeypatch.setattr(numerics.Part, "line", line)
    monkeypatch.setattr(numerics, "backends", lambda: {"cpu": SimpleNamespace(available=True, reason="")})
    assert cli.main(["bench", "numerics", "--print", "--quick", "--backends", "cpu"]) == 0
    assert printed[0].count("Left out: cpu, bfloat16: bfloat16 needs compute capability 8.0") == 1
    assert printed[1].startswith("| cpu | float32 | scores |")
    assert not any("bfloat16 |" in text for text in printed[1:])


def test_a_backend_that_cannot_run_is_named(capsys):
    state = numerics.backends()["triton"]
    if state.available:
        pytest.skip("triton can run here")
    assert cli.main(["bench", "numerics", "--print", "--backends", "triton"]) == 2
    assert f"--backends: triton cannot run here: {state.reason}" in capsys.readouterr().err


@pytest.mark.parametrize("qk", [False, True])
def test_what_a_backend_does_not_take_is_asked_of_it(qk):
    part = numerics.parts(numerics.QUICK)[qk]
    assert part.refusal("reference", "bfloat16") == ""
    assert "compute" in part.refusal("cuda", "float32") or "cuda" in part.refusal("cuda", "float32")


def test_a_broken_budget_is_shown():
    ours, eager = numerics.Errors(1e-3, 1e-3), numerics.Errors(1e-6, 1e-6)
    assert numerics._line(("cpu",), ours, eager, (1e-6, 5e-5))[-1] == "NO"
    assert numerics._line(("cpu",), eager, eager, None)[-1] == "yes"


@pytest.mark.parametrize("most", [1, 2, 7, 15, 100, 4096])
def test_the_largest_batch_is_found(most):
    tried = []

    def fits(n):
        tried.append(n)
        return n <= most

    found = largest(fits, 1, 4096)
    assert most - max(1, most // 16) < found <= most
    assert len(tried) < 24
    assert largest(lambda n: False, 1, 10) == 0
    assert largest(lambda n: True, 1, 10) == 10


@pytest.mark.parametrize(
    ("auxiliary", "checkpointing", "frozen", "precision"),
    [
        ("none", False, 0, "fp32"),
        ("eager", True, 1, "bf16"),
        ("fused", False, 1, "fp32"),
        ("qk", True, 0, "bf16"),
        ("recipe", False, 0, "bf16"),
    ],
)
def test_a_training_step_is_measured(auxiliary, checkpointing, frozen, precision):
    setting = Setting("tiny", auxiliary, precision, checkpointing, frozen, 4, 5, 4, 2, "cpu", 0.0)
    row = measure_setting(setting)
    assert row["status"] == "ok", row
    assert row["median_ms"] > 0
    assert row["note"] == (f"backend {training_cost.backend_of(setting)}" if auxiliary != "none" else "")
    assert row["peak_mb"] >= 0  # a process that reuses freed memory needs no more; `cacr bench` takes a fresh one
    assert set(row | setting.columns) <= set(results.COLUMNS["training"])


def test_the_recipe_is_what_cacr_train_runs():
    assert Setting("tiny", "recipe", "fp32", False, 0, 4, 5, 4, 2, "cpu", 0.0).config().aux == AuxConfig()


def settings(*words):
    parser = argparse.ArgumentParser()
    training_run.add_arguments(parser)
    return training_run.make_settings(parser.parse_args(words), "cuda")


def test_the_telling_settings_are_few_and_take_the_models_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    quick, all_of_them = settings("--quick"), settings()
    assert len(quick) == 16 < len(all_of_them)
    assert [setting.model for setting in quick] == ["base", "large"] * 8
    assert set(quick) <= set(all_of_them)
    assert {setting.precision for setting in quick} == {"fp32", "fp16"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert {setting.precision for setting in settings("--quick")} == {"fp32", "bf16"}
    assert {setting.auxiliary for setting in settings("--quick", "--auxiliary", "qk")} == {"qk"}


def test_a_row_names_the_backend_of_its_loss(monkeypatch):
    ready = {name: SimpleNamespace(available=name != "triton") for name in contenders.OURS}
    monkeypatch.setattr(contenders, "backends", lambda: ready)
    found = {
        name: training_cost.backend_of(Setting("tiny", name, "fp32", False, 0, 4, 5, 4, 2, "cuda", 0.0))
        for name in training_cost.AUXILIARY
    }
    assert found == {"none": "", "eager": "reference", "fused": "cuda", "qk": "reference", "recipe": "cuda"}


def test_the_sanitizer_sees_every_kind_dtype_and_form(capsys):
    chosen = calls.cases("cpu", ["reference"], ((2, 3),))
    assert len(chosen) == len(set(chosen)) == 4 + 4 + 2 + 2 * 4  # kind "probs" has no q and k
    assert calls.call_everything(chosen) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(chosen)
    assert {word for line in lines for word in line.split(", ")} >= {"softmax", "probs", "float16", "qk ragged: ok"}
    with_cuda = calls.cases("cpu", ["triton", "cuda"], ((2, 3),))
    assert {case.form for case in with_cuda if case.backend == "cuda"} == {"equal", "ragged"}
    assert [case.backend for case in with_cuda[:2]] == ["triton", "cuda"]


def test_several_processes_share_the_calls_and_one_that_fails_is_a_line(capsys):
    good = calls.cases("cpu", ["reference"], ((2, 3),))[:3]
    wrong = dataclasses.replace(good[0], backend="cuda")
    assert calls.call_everything([wrong, *good], 2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cuda, 2 x 3, scores, float32, equal: error ValueError: ")
    assert [line.rsplit(": ", 1)[1] for line in lines[1:]] == ["ok"] * 3


def test_before_8_0_nothing_is_called_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert calls.dtypes_of("cuda") == ["float32", "float16"]
