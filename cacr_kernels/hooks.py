"""Queries and keys of attention layers that do not hand them out, caught by hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QueriesAndKeys:
    """Calling it gives q [B, H, N, D] and k [B, H_k, N, D] of an attention layer's last call, with their graph.

        last = QueriesAndKeys(model.encoder.layers[-1].self_attn)  # once, before torch.compile
        output = model(inputs)
        loss = task(output) + fused_cacr_qk(*last(), n_text)

    ``nn.MultiheadAttention`` keeps its q and k to itself, so they are projected once more from its inputs: 4 N E^2
    flops an example. Any other layer is named by the two linear layers that make them: :meth:`of_linears`.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """
        Args:
            attention: with any of its options but ``add_bias_kv`` and ``add_zero_attn``, whose keys are no tokens.

        Raises:
            TypeError: attention is another module.
            ValueError: attention has one of these options.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(
                f"QueriesAndKeys expects an nn.MultiheadAttention, got {type(attention).__name__}: give the linear "
                "layers of its queries and keys to QueriesAndKeys.of_linears"
            )
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("QueriesAndKeys expects attention over tokens: no add_bias_kv, no add_zero_attn")
        self._attention: nn.MultiheadAttention | None = attention
        self._heads = self._key_heads = attention.num_heads
        self._clear()
        attention.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)

    @classmethod
    def of_linears(cls, query: nn.Module, key: nn.Module, heads: int, key_heads: int | None = None) -> QueriesAndKeys:
        """Of a layer that calls ``query`` and ``key``, whose outputs [B, N, H D] and [B, N, H_k D] are all heads' q, k.

        Only where nothing is done to them before the scores: no rotary embeddings, no norms of q and k.

        Args:
            query, key: modules with one tensor as output, as ``layer.attention.attention.query`` of the ViLT of
                Hugging Face.
            heads, key_heads: H, and H_k of grouped queries (H unless given).
        """
        self = cls.__new__(cls)
        self._attention = None
        self._heads, self._key_heads = heads, key_heads or heads
        self._clear()
        query.register_forward_hook(self._keep_query)
        key.register_forward_hook(self._keep_key)
        return self

    def __call__(self) -> tuple[Tensor, Tensor]:
        """(q, k) of the last call.

        Raises:
            RuntimeError: the layer was not called since the hooks were set, or it ran without gradients although they
                are wanted now.
            ValueError: outputs of linear layers that are no [B, N, H D].
        """
        if self._query is None or self._key is None:
            raise RuntimeError(
                "QueriesAndKeys has seen no call of its layer: run the model first, and make QueriesAndKeys before "
                "torch.compile"
            )
        if torch.is_grad_enabled() and not self._with_graph:
            raise RuntimeError(
                "QueriesAndKeys: the layer ran without gradients, under torch.no_grad or in a checkpoint of the "
                "reentrant kind, which loses the gradient of its q and k: use checkpoint(..., use_reentrant=False)"
            )
        query, key = self._query, self._key
        if self._attention is not None:
            query, key = _projected(self._attention, query, key)
        return _by_head(query, self._heads), _by_head(key, self._key_heads)

    def _clear(self) -> None:
        self._query: Tensor | None = None
        self._key: Tensor | None = None
        self._with_graph = False

    def _keep_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._query = args[0] if args else kwargs["query"]
        self._key = args[1] if len(args) > 1 else kwargs["key"]
        self._with_graph = torch.is_grad_enabled()

    def _keep_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._query = output
        self._with_graph = torch.is_grad_enabled()

    def _keep_key(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._key = output

    def __getstate__(self) -> dict[str, Any]:
        """A model is saved and copied with its hooks, but not with the activations of its last call."""
        return self.__dict__ | {"_query": None, "_key": None}


def _projected(attention: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [B, N, E] of what the module was called with."""
    e = attention.embed_dim
    if attention.in_proj_weight is not None:
        w_q, w_k = attention.in_proj_weight[:e], attention.in_proj_weight[e : 2 * e]
    else:  # keys of another width
        w_q, w_k = attention.q_proj_weight, attention.k_proj_weight
    b_q, b_k = (None, None) if attention.in_proj_bias is None else attention.in_proj_bias[: 2 * e].split(e)
    if query.dim() == 2:  # [N, E]: one example without a batch
        query, key = query.unsqueeze(0), key.unsqueeze(0)
    elif not attention.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    return F.linear(query, w_q, b_q), F.linear(key, w_k, b_k)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] as [B, H, N, D]."""
    if x.dim() != 3 or x.shape[-1] % heads:
        raise ValueError(f"QueriesAndKeys expects queries and keys [B, N, {heads} heads * D], got {list(x.shape)}")
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
