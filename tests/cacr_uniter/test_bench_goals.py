"""The summary of a GPU's results: goals met or not, what became of the report's stages, rates of the forward."""

import json

import pytest

from cacr_uniter.benchmark import results, summary
from cacr_uniter.benchmark.goals import goals


def row(contender, ms, shape="uniter-100-b128", variant="scores", direction="both", **fields):
    return {
        **dict.fromkeys(results.COLUMNS["kernels"], ""),
        "device": "NVIDIA A",
        "shape": shape,
        "dtype": "bfloat16",
        "variant": variant,
        "kind": "scores",
        "contender": contender,
        "direction": direction,
        "status": "ok",
        "timer": "graph",
        "bound": "exp",
        "median_ms": str(ms),
        "p20_ms": str(ms),
        "p80_ms": str(ms),
        "floor_ms": "0.1",
        "gflop": "400",
        **fields,
    }


LONG = {"shape": "square-4096", "variant": "qk"}
ROWS = [
    *(row("cuda", 0.5), row("triton", 0.25), row("eager", 2.6), row("compiled", 0.7)),
    row("triton", 0.1, "uniter-36-b128", dtype="float32"),
    *(row("triton", 1.6, direction="forward", **LONG), row("triton", 5.0, **LONG)),
    row("sdpa", 6.0, note="flash_attention", **LONG),
]


def test_goals_are_held_against_the_faster_of_ours():
    found = {(goal, where.split(",")[0]): (measured, met) for goal, where, measured, met in goals(ROWS)}
    assert found == {
        ("3 times faster than compiled", "uniter-100-b128"): ("2.8x", "NO"),
        ("10 times faster than eager", "uniter-100-b128"): ("10.4x", "yes"),
        ("within 3 times the floor", "uniter-100-b128"): ("2.5x (exp)", "yes"),
        ("3 times faster than compiled", "uniter-36-b128"): ("not measured", ""),
        ("10 times faster than eager", "uniter-36-b128"): ("not measured", ""),
        ("within 3 times the floor", "uniter-36-b128"): ("1x (exp)", "yes"),
        ("forward at 220 TFLOP/s", "square-4096"): ("250 TFLOP/s", "yes"),
        ("forward + backward no slower than sdpa (flash_attention)", "square-4096"): ("1.2x", "yes"),
    }


def test_the_compiled_peer_is_the_faster_of_both():
    found = {goal: measured for goal, _, measured, _ in goals([*ROWS, row("compiled-max", 0.5)])}
    assert found["3 times faster than compiled-max"] == "2x"
    assert "3.5x" not in found.values()


@pytest.mark.parametrize("fields", [{"status": "oom"}, {"timer": "events"}, {"contender": "cpu"}])
def test_without_a_replayed_measurement_of_ours_there_is_nothing_to_judge(fields):
    assert goals([row("triton", 0.25) | fields, row("compiled", 0.7)]) == []


def test_the_summary_has_goals_stages_and_the_rate_of_the_forward(tmp_path):
    results.append(tmp_path, "kernels", ROWS)
    stages = {"tests": {"outcome": "stopped after 9 s", "seconds": 9.0, "tests": "7 passed, 1 skipped"}}
    (tmp_path / results.REPORT).write_text(json.dumps(stages))
    lines = summary.write_summary(tmp_path, []).read_text().splitlines()
    assert "## Goals" in lines
    assert any(
        line.split("|")[1:5] == [" tests ", " stopped after 9 s ", " 9.0     ", " 7 passed, 1 skipped "]
        for line in lines
    )
    head = next(line for line in lines if "forward TFLOP/s" in line)
    long = next(line for line in lines if line.startswith("| square-4096") and "triton" in line)
    cells = [[cell.strip() for cell in line.split("|")] for line in (head, long)]
    assert dict(zip(*cells))["forward TFLOP/s"] == "250"
