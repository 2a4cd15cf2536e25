"""docs/integration.md: its code runs as printed, and the q and k it takes are those of the model's own attention."""

import re
from pathlib import Path

import pytest
import torch

from cacr_kernels.reference import cacr_closed_form
from cacr_kernels.testing import relative_error

GUIDE = Path(__file__).parents[2] / "docs" / "integration.md"


@pytest.fixture(scope="module")
def guide():
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    namespace = {"__name__": "guide"}
    with torch.random.fork_rng():
        exec("\n".join(blocks), namespace)
    return namespace


def test_queries_and_keys_are_those_of_the_model(guide):
    model, used = guide["Reader"](), guide["used"]
    attention = model.encoder.layers[-1].self_attn
    last, inputs = guide["QueriesAndKeys"](attention), []
    attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(guide["ids"], guide["regions"], ~used)
    q, k = last()
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~used[:, None, None, :], -torch.inf)
    attention.eval()
    _, expected = attention(*inputs[:1] * 3, ~used, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(scores.softmax(-1), expected)


def test_loss_is_that_of_the_examples_alone(guide):
    q, k = guide["q"].detach().double(), guide["k"].detach().double()
    losses = []
    for i, (n_text, n_vision) in enumerate(zip(guide["n_words"].tolist(), guide["n_regions"].tolist())):
        rows = [*range(1, 1 + n_text), *range(guide["T"], guide["T"] + n_vision)]
        scores = q[i][:, rows] @ k[i][:, rows].mT / q.shape[-1] ** 0.5
        losses.append(cacr_closed_form(scores[None], n_text, row_reduction="mean", projection_scale="mean"))
    assert relative_error(guide["congruence"], torch.stack(losses).mean()) < 1e-5


def test_gradients_reach_the_projection(guide):
    gradient = guide["model"].encoder.layers[-1].self_attn.in_proj_weight.grad
    hidden = gradient.shape[1]
    assert all((gradient[i * hidden : (i + 1) * hidden].abs().sum() > 0) for i in range(3))
    assert torch.isfinite(gradient).all()
