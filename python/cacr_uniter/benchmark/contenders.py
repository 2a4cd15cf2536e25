"""Who is measured: the kernels of every backend, and their peers, on the same inputs.

A contender computes one tensor from leaves [B, H, ...]; ``expected`` is the same in float64, what it is checked with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cacr_kernels import backends, block_softmax, fused_cacr, fused_cacr_qk
from cacr_kernels.reference import cacr_closed_form, cacr_loop
from cacr_uniter.benchmark.shapes import DTYPES, Shape

Function = Callable[..., Tensor]

OURS = ("triton", "cuda", "cpu")
PEERS = {
    "scores": ("eager", "compiled", "compiled-max", "bmm", "loop"),
    "qk": ("eager", "compiled", "compiled-max", "factored", "factored-compiled", "sdpa"),
}
LOGIT_DEVIATION = 3.0
"""Deviation of the projected logits X in the inputs: soft rows, as in training."""


@dataclass(frozen=True)
class Inputs:
    """Leaves [B, H, ...] of a variant: [attn] (scores), [q, k] (qk), [q, k, v] (sdpa)."""

    q: Tensor
    k: Tensor
    v: Tensor
    n_text: int

    def leaves(self, variant: str, kind: str, contender: str) -> list[Tensor]:
        if contender == "sdpa":
            return [self.q, self.k, self.v]
        if variant == "qk":
            return [self.q, self.k]
        scores = (self.q.float() @ self.k.float().mT) * self.q.shape[-1] ** -0.5
        return [(block_softmax(scores, self.n_text) if kind == "probs" else scores).to(self.q.dtype)]


def make_inputs(shape: Shape, dtype: str, device: str, seed: int = 0) -> Inputs:
    """q, k, v [B, H, N, D]: normal numbers, scaled so that X of the first head deviates by ``LOGIT_DEVIATION``."""
    size = (shape.batch, shape.heads, shape.n, shape.head_dim)
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (torch.randn(size, generator=generator, device=device) for _ in range(3))
    t, c = shape.n_text, shape.head_dim**-0.5
    head_q, head_k = q[0, 0].double(), k[0, 0].double()
    u = c**3 * head_q[:t] @ (head_k[t:].T @ head_q[t:]) @ (head_k[t:].T @ head_k[t:])
    deviation = float((u[:512] @ head_q[: min(t, 512)].T).std()) or 1.0
    factor = (LOGIT_DEVIATION / deviation) ** (1 / 6)  # X is a product of six vectors
    kind = DTYPES[dtype]
    return Inputs((q * factor).to(kind), (k * factor).to(kind), v.to(kind), t)


def factored_closed_form(q: Tensor, k: Tensor, n_text: int, **options: Any) -> Tensor:
    """CACR of S = q k^T / sqrt(D) in plain PyTorch without the products of order N^3 (kind "scores").

    X_a = c^3 Q_a (K_b^T Q_b)(K_b^T K_b) Q_a^T, Y_a = c Q_a K_a^T in float32 (float64 for float64); loss [B, H].
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(dtype), k.to(dtype)
    c = q.shape[-1] ** -0.5
    text, vision = slice(0, n_text), slice(n_text, None)
    total = q.new_zeros(q.shape[:2])
    for a, b in ((text, vision), (vision, text)):
        q_a, k_a, q_b, k_b = q[..., a, :], k[..., a, :], q[..., b, :], k[..., b, :]
        x = (c**3 * q_a @ ((k_b.mT @ q_b) @ (k_b.mT @ k_b))) @ q_a.mT
        log_p = torch.log_softmax(x, -1)
        log_q = torch.log_softmax(c * q_a @ k_a.mT, -1)
        total = total + ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum((-1, -2))
    return total


def bmm_chain(attn: Tensor, n_text: int) -> Tensor:
    """The products of Eq. 3 and 5 alone, S_ab S_bb S_ab^T of both sides: [B, H, T^2 + R^2]."""
    t, r = slice(0, n_text), slice(n_text, None)
    parts = [attn[..., a, b] @ attn[..., b, b] @ attn[..., a, b].mT for a, b in ((t, r), (r, t))]
    return torch.cat([part.flatten(-2) for part in parts], -1)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5) @ k.mT


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Args:
        function: of the leaves and ``n_text``.
        expected: the same, given float64 leaves.
        graph: whether a CUDA graph can hold it.
        directions: that exist for it.
        note: what the row should say, such as the backend of SDPA.
    """

    function: Function
    expected: Function
    graph: bool = True
    directions: tuple[str, ...] = ("forward", "backward", "both")
    note: str = ""


def names(variant: str, kind: str, device: str, dtype: str) -> list[str]:
    """Contenders that exist for a variant and kind on this machine: ours first."""
    ours = [] if device == "cpu" else ["triton", "cuda"]
    ours = [name for name in (*ours, *(["cpu"] if device == "cpu" else [])) if backends()[name].available]
    if variant == "qk":
        ours = [name for name in ours if name != "cuda"]
    peers = list(PEERS[variant])
    if kind != "scores":
        peers = [name for name in peers if name in ("eager", "compiled")]
    if device == "cpu":
        peers = [name for name in peers if name != "compiled-max"]
    return ours + peers


def make(name: str, variant: str, kind: str, dtype: str, device: str) -> Contender:
    """The contender ``name`` (see ``names``)."""
    options: dict[str, Any] = {"kind": kind, "reduction": "none"}

    def closed_form(attn: Tensor, n_text: int) -> Tensor:
        return cacr_closed_form(attn, n_text, **options)

    def closed_form_qk(q: Tensor, k: Tensor, n_text: int) -> Tensor:
        return cacr_closed_form(scores_of(q, k), n_text, **options)

    expected = closed_form if variant == "scores" else closed_form_qk
    if variant == "qk" and kind == "scores":
        expected = factored_closed_form
    if name in OURS:
        ours = fused_cacr if variant == "scores" else fused_cacr_qk
        return Contender(lambda *x: ours(*x, **options, backend=name), expected)
    if name == "loop":
        return Contender(lambda *x: cacr_loop(*x, **options), expected, graph=False, directions=("forward",))
    if name == "bmm":
        return Contender(bmm_chain, bmm_chain)
    if name == "sdpa":
        return _sdpa(dtype, device)
    plain = (
        factored_closed_form
        if name.startswith("factored")
        else (closed_form if variant == "scores" else closed_form_qk)
    )
    if name in ("eager", "factored"):
        return Contender(plain, expected)
    if name == "compiled-max":
        # inside our own graph, as everybody: graphs of its own would be timed with the host's part of their replay
        mode = "max-autotune-no-cudagraphs"
        return Contender(torch.compile(plain, mode=mode, dynamic=False), expected, note=mode)
    return Contender(torch.compile(plain, dynamic=False), expected)


def _sdpa(dtype: str, device: str) -> Contender:
    """Flash attention; on a GPU memory-efficient attention for float32 and before 8.0, which flash does not take."""
    efficient = device == "cuda" and (dtype == "float32" or torch.cuda.get_device_capability() < (8, 0))
    backend = SDPBackend.EFFICIENT_ATTENTION if efficient else SDPBackend.FLASH_ATTENTION

    def function(q: Tensor, k: Tensor, v: Tensor, n_text: int) -> Tensor:
        with sdpa_kernel(backend):
            return attention(q, k, v)

    def expected(q: Tensor, k: Tensor, v: Tensor, n_text: int) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(q, k, v)

    return Contender(function, expected, note=backend.name.lower())
