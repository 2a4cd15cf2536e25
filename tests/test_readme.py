"""The README's example runs as printed, and the commands it names exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_example_runs_and_both_forms_agree():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    assert names["same"].item() == pytest.approx(names["loss"].item(), rel=1e-5)
    assert torch.isfinite(names["q"].grad).all()
    assert names["ragged"].shape == ()


def test_named_make_goals_exist():
    goals = set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, flags=re.M))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "study"} <= goals
    for goal in goals:
        assert re.search(rf"^{goal}:", makefile, flags=re.M), f"the README names `make {goal}`"


def test_named_files_exist():
    for path in re.findall(r"`((?:docs|benchmarks|tests|cacr_kernels|csrc)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), f"the README names {path}"
