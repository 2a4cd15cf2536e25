"""AdamW with the published parameter groups, and the gradient as one tensor."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cacr_uniter.training.config import OptimConfig

REFERENCE_NO_DECAY = ("bias", "LayerNorm.weight", "LayerNorm.bias")


def decayed(name: str, parameter: Tensor, rule: str) -> bool:
    """Whether weight decay acts on a parameter.

    ``reference``: unless the name contains ``bias``, ``LayerNorm.weight`` or ``LayerNorm.bias``, so the two image norms
    ``img_layer_norm.weight`` and ``pos_layer_norm.weight`` are decayed. ``norms-exempt``: matrices only.
    """
    if rule == "reference":
        return not any(part in name for part in REFERENCE_NO_DECAY)
    return parameter.dim() > 1


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the losses reach, by name: not frozen, and not the two-way head, which takes no part."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith("itm_output.")
    }


def build_optimizer(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over two groups, decayed and not, in the order of ``parameters``; one fused update where torch has it."""
    groups: list[dict[str, object]] = []
    for decay in (True, False):
        names = [name for name, value in parameters.items() if decayed(name, value, config.decay_rule) is decay]
        weight_decay = config.weight_decay if decay else 0.0
        groups.append({"params": [parameters[name] for name in names], "weight_decay": weight_decay, "names": names})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class FlatGradients:
    """The gradients of all trained parameters in one buffer: cleared, summed over processes and clipped as one tensor.

    Args:
        parameters: their ``grad`` becomes a view of the buffer, into which autograd adds.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        first = parameters[0]
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        for parameter, part in zip(parameters, self.buffer.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def clear(self) -> None:
        """Sets every gradient to 0."""
        self.buffer.zero_()

    def sum_processes(self) -> None:
        """Adds the gradients of all processes."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.buffer)

    def clip(self, limit: float) -> float:
        """Scales the whole gradient to an L2 norm of at most ``limit`` (0: no limit). Returns the norm before."""
        norm = float(torch.linalg.vector_norm(self.buffer))
        if limit and norm > limit:
            self.buffer.mul_(limit / norm)
        return norm
