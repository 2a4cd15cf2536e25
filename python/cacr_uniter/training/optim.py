"""AdamW with the published parameter groups, and the gradient of several processes."""

from __future__ import annotations

from collections.abc import Iterable

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


#: floats per all-reduce: 64 MiB
BUCKET = 16 * 2**20


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds the gradients of all processes, in flat buckets, after the last backward of a step.

    Every process holds a gradient for the same parameters; one that a process did not reach counts as 0.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(x.numel() for x in bucket) >= BUCKET:
            _reduce(bucket)
            bucket = []
    if bucket:
        _reduce(bucket)


def _reduce(gradients: list[Tensor]) -> None:
    flat = torch.cat([x.flatten() for x in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([x.numel() for x in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
