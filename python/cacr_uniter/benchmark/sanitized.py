"""Small calls of every GPU backend, variant, kind and span form, for compute-sanitizer to watch."""

from __future__ import annotations

import os
from typing import Any

import torch

from cacr_kernels import backends, fused_cacr, fused_cacr_qk
from cacr_kernels.testing import make_input

SIZES = ((1, 1), (7, 33), (60, 100), (130, 70))


def call_everything(device: str, names: list[str], sizes: tuple[tuple[int, int], ...] = SIZES) -> int:
    """Runs forward and backward of all of them; returns the number of calls."""
    calls = 0
    for name in names:
        for n_text, n_vision in sizes:
            for kind in ("scores", "softmax", "probs"):
                for dtype in (torch.float32, torch.bfloat16):
                    attn = make_input(kind, n_text, n_vision, batch=2, heads=2, dtype=dtype, device=device)
                    attn.requires_grad_()
                    lengths = torch.tensor([n_text, max(n_text - 1, 0)], device=device)
                    fused_cacr(attn, n_text, kind=kind, backend=name).backward()
                    ragged: dict[str, Any] = {"max_n_text": n_text, "n_vision": n_vision, "vision_start": n_text}
                    fused_cacr(attn, lengths, kind=kind, backend=name, **ragged).backward()
                    calls += 2
                    if name != "cuda" and kind != "probs":
                        q, k = (torch.randn(2, 2, n_text + n_vision, 64, device=device).to(dtype) for _ in range(2))
                        q.requires_grad_()
                        fused_cacr_qk(q, k, n_text, kind=kind, backend=name).backward()
                        calls += 1
    return calls


def main() -> None:
    # every tensor an allocation of its own: inside a cached segment nothing is out of bounds
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if not torch.cuda.is_available():
        raise SystemExit("no GPU")
    names = [name for name in ("triton", "cuda") if backends()[name].available]
    print(f"{call_everything('cuda', names)} calls of {', '.join(names)}")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
