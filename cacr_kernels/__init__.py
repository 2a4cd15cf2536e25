"""CACR kernels: Cross-modal Attention Congruence Regularization (ACL 2023), fused, on GPU and CPU.

    from cacr_kernels import fused_cacr
    loss = fused_cacr(scores, n_text)        # scores [B, H, N, N] before the softmax

Importing needs neither Triton nor the native module nor a GPU; ``backends()`` says what this machine can run.
"""

from . import ops  # registers the operators before anything can be traced
from .api import CACRLoss, fused_cacr, fused_cacr_blocks, fused_cacr_qk
from .backends import BackendStatus, backends
from .hooks import QueriesAndKeys
from .reference import block_softmax

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "CACRLoss",
    "QueriesAndKeys",
    "__version__",
    "backends",
    "block_softmax",
    "fused_cacr",
    "fused_cacr_blocks",
    "fused_cacr_qk",
    "ops",
]
