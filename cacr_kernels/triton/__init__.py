"""Backend "triton": GPUs of compute capability 8.0 and newer (and CPU tensors under TRITON_INTERPRET=1).

Importing this module imports triton; cacr_kernels itself never does.
"""

from .qk_host import qk_backward, qk_forward
from .scores import scores_backward, scores_forward

__all__ = ["qk_backward", "qk_forward", "scores_backward", "scores_forward"]
