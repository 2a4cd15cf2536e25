"""Queries and keys of attention layers that do not hand them out, caught by hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QueriesAndKeys:
    """Calling it gives q [B, H, N, D] and k [B, H_k, N, D] of an attention layer's last call, with their graph.

        last = QueriesAndKeys(model.encoder.layers[-1].self_attn)  # once, when the model is built and not yet compiled
        output = model(inputs)
        loss = task(output) + fused_cacr_qk(*last(), n_text)

    ``nn.MultiheadAttention`` keeps its q and k to itself, so they are projected once more from its inputs: 4 N E^2
    flops an example. Any other layer is named by the two linear layers that make them: :meth:`of_linears`.

    Set them when the model's layers are what they will be (adapters replace linear layers) and before torch.compile,
    which is told to look at hooks (``torch._dynamo.config.skip_nnmodule_hook_guards = False``): it would run code that
    it made for a layer without hooks, and this object would answer with the q and k of an earlier call.
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
        self._handles = [attention.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)]
        _guard_hooks()

    @classmethod
    def of_linears(cls, query: nn.Module, key: nn.Module, heads: int, key_heads: int | None = None) -> QueriesAndKeys:
        """Of a layer that calls ``query`` and ``key``, whose outputs [B, N, H D] and [B, N, H_k D] are all heads' q, k.

        Only where nothing is done to them before the scores: no rotary embeddings, no norms of q and k.

        Args:
            query, key: modules with one tensor as output, as ``layer.attention.attention.query`` of the ViLT of
                Hugging Face.
            heads, key_heads: H, and H_k of grouped queries (H unless given).

        Raises:
            TypeError: query or key is no module, heads or key_heads no int.
            ValueError: query and key are one module, or there are no heads.
        """
        key_heads = heads if key_heads is None else key_heads
        for name, module in (("query", query), ("key", key)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"QueriesAndKeys expects {name} to be an nn.Module, got {type(module).__name__}")
        for name, number in (("heads", heads), ("key_heads", key_heads)):
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"QueriesAndKeys expects {name} to be an int, got {type(number).__name__}")
            if number < 1:
                raise ValueError(f"QueriesAndKeys expects {name} to be at least 1, got {number}")
        if query is key:
            raise ValueError(
                "QueriesAndKeys expects a module each for queries and keys, got one for both: of a fused projection "
                "take q and k where the layer splits its output"
            )
        self = cls.__new__(cls)
        self._attention = None
        self._heads, self._key_heads = heads, key_heads
        self._clear()
        self._handles = [query.register_forward_hook(self._keep_query), key.register_forward_hook(self._keep_key)]
        _guard_hooks()
        return self

    def remove(self) -> None:
        """Takes the hooks off the layer, and lets go of what they caught."""
        for handle in self._handles:
            handle.remove()
        self._clear()

    def __call__(self) -> tuple[Tensor, Tensor]:
        """(q, k) of the last call.

        Raises:
            RuntimeError: the layer was not called since the hooks were set, or it ran without gradients although they
                are wanted now.
            TypeError: what was caught are no dense tensors.
            ValueError: outputs of linear layers that are no [B, N, H D].
        """
        if self._query is None or self._key is None:
            raise RuntimeError(
                "QueriesAndKeys has seen no call of its layer: run the model first, make QueriesAndKeys before "
                "torch.compile, and leave torch._dynamo.config.skip_nnmodule_hook_guards False as it sets it"
            )
        if torch.is_grad_enabled() and not self._with_graph:
            raise RuntimeError(
                "QueriesAndKeys: the layer ran without gradients, under torch.no_grad or in a checkpoint of the "
                "reentrant kind, which loses the gradient of its q and k: use checkpoint(..., use_reentrant=False)"
            )
        query, key = self._query, self._key
        for name, x in (("queries", query), ("keys", key)):
            if not isinstance(x, Tensor) or x.is_nested:
                kind = "a nested tensor" if isinstance(x, Tensor) else type(x).__name__
                hint = (
                    " (nn.TransformerEncoder makes them: enable_nested_tensor=False)" if isinstance(x, Tensor) else ""
                )
                raise TypeError(f"QueriesAndKeys expects {name} in a dense tensor [B, N, H * D], got {kind}{hint}")
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
        """A model is saved and copied with its hooks, but not with the activations of its last call.

        Copy both, ``copy.deepcopy((model, last))``: this object goes on answering for the model that it was made of.
        """
        return self.__dict__ | {"_query": None, "_key": None}


def _guard_hooks() -> None:
    import torch._dynamo  # a second or two, which only those pay who need it

    torch._dynamo.config.skip_nnmodule_hook_guards = False


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
    # outside the autocast that the model ran in, its inputs may have another dtype than the weights
    return tuple(  # type: ignore[return-value]
        F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))
        for x, w, b in ((query, w_q, b_q), (key, w_k, b_k))
    )


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] as [B, H, N, D]."""
    if x.dim() != 3 or x.shape[-1] % heads:
        raise ValueError(f"QueriesAndKeys expects queries and keys [B, N, {heads} heads * D], got {list(x.shape)}")
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
