"""Shared by the kernel tests: which backends this machine can run on which device."""

import os

import pytest
import torch

# Triton kernels run in Python on CPU tensors where there is no GPU. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cacr_kernels import backends
from cacr_kernels.testing import device_of


def pytest_generate_tests(metafunc):
    """A test with an argument ``backend`` runs on every backend; an unavailable one is skipped with its reason."""
    if "backend" in metafunc.fixturenames and not any(
        "backend" in m.args[0] for m in metafunc.definition.iter_markers("parametrize")
    ):
        states = backends()
        metafunc.parametrize(
            "backend",
            [
                pytest.param(name, marks=() if state.available else pytest.mark.skip(reason=f"{name}: {state.reason}"))
                for name, state in states.items()
            ],
        )


@pytest.fixture
def device(backend):
    return device_of(backend)
