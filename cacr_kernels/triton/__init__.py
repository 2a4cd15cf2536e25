"""Backend "triton": GPUs of compute capability 8.0 and newer (and CPU tensors under TRITON_INTERPRET=1).

Importing this module imports triton; cacr_kernels itself never does.
"""

from .scores import scores_backward, scores_forward

__all__ = ["scores_backward", "scores_forward"]
