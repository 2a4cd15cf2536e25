"""Queries and keys of chosen encoder layers, recomputed from the hidden states that enter them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cacr_uniter.errors import UserError
from cacr_uniter.model import UniterForRetrieval
from cacr_uniter.model.layers import EncoderLayer


class LayerAttention:
    """Keeps the input of chosen layers during a forward pass and makes their queries and keys of it.

    The last layer's input is an output of the model; the others are caught by hooks. Activation checkpointing runs the
    hooks a second time in the backward, outside of ``watch``, where they do nothing.

    Args:
        model: whose layers.
        layers: layer numbers, negative ones from the end.

    Raises:
        UserError: a layer that does not exist, or one named twice.
    """

    def __init__(self, model: UniterForRetrieval, layers: list[int]) -> None:
        self.model = model
        modules = model.uniter.encoder.layer
        count = len(modules)
        self.layers = [layer % count for layer in layers if -count <= layer < count]
        if len(self.layers) != len(layers) or len(set(self.layers)) != len(layers):
            raise UserError(f"aux.layers is {layers}: give different layers of 0 to {count - 1}, or -1 to -{count}")
        self._inputs: dict[int, Tensor] = {}
        self._watching = False
        for layer in self.layers:
            if layer != count - 1:
                modules[layer].register_forward_pre_hook(self._keep(layer))

    def _keep(self, layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if self._watching:
                self._inputs[layer] = arguments[0]

        return hook

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Inside the block forward passes leave their layers' inputs."""
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def forget(self) -> None:
        """Lets go of the inputs, and of the graph that hangs on them."""
        self._inputs.clear()

    def queries_and_keys(self, last_input: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """q and k [rows, A, S, d] of each layer in float32, for rows of the last watched batch.

        Args:
            last_input: the model's output of that name [B, S, H].
            rows: int64, positions in the batch.
        """
        with torch.autocast(last_input.device.type, enabled=False):
            for layer in self.layers:
                if layer == len(self.model.uniter.encoder.layer) - 1:
                    yield self.model.last_layer_qk(last_input.index_select(0, rows).float())
                else:
                    attention = cast(EncoderLayer, self.model.uniter.encoder.layer[layer]).attention.self
                    hidden = self._inputs[layer].index_select(0, rows).float()
                    yield attention.split_heads(attention.query(hidden)), attention.split_heads(attention.key(hidden))
