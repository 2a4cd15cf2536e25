"""The pieces of UNITER. Attribute names are the published state-dict keys and must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cacr_uniter.model.config import UniterConfig

LAYER_NORM_EPS = 1e-12


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with eps 1e-12, computed in at least float32 and returned in the dtype of its weight.

    In float16 or bfloat16 the published eps would vanish beside the variance, so the statistics are always float32:
    under autocast (float32 weights) the output, and with it the residual stream, stays float32.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=LAYER_NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        output = F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)
        return output.to(self.weight.dtype)


class TextEmbeddings(nn.Module):
    """e_t = Drop(LN(Word[id_t] + Pos[t] + Type[0])), t counted from [CLS] = 0; ids [B, T] -> [B, T, H]."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        limit = self.position_embeddings.num_embeddings
        if length > limit:
            raise ValueError(f"input_ids: expected at most {limit} columns (max_position_embeddings), got {length}")
        total = (
            self.word_embeddings(input_ids)
            + self.position_embeddings.weight[:length]
            + self.token_type_embeddings.weight[0]
        )
        return self.dropout(self.LayerNorm(total))


class ImageEmbeddings(nn.Module):
    """e_r = Drop(LN(LN_img(W_img f_r + b_img) + LN_pos(W_pos p_r + b_pos) + Type[1])); regions have no sequence
    position.

    `mask_embedding` belongs to pre-training (masked regions). It is kept for its checkpoint key and takes no gradient.
    """

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.img_linear = nn.Linear(config.img_dim, config.hidden_size)
        self.img_layer_norm = LayerNorm(config.hidden_size)
        self.pos_layer_norm = LayerNorm(config.hidden_size)
        self.pos_linear = nn.Linear(7, config.hidden_size)
        self.mask_embedding = nn.Embedding(2, config.img_dim, padding_idx=0)
        self.mask_embedding.weight.requires_grad_(False)
        self.LayerNorm = LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, features: Tensor, boxes: Tensor, region_type: Tensor) -> Tensor:
        """features [B, R, img_dim], boxes [B, R, 7], region_type [H] = row 1 of the text table's types -> [B, R, H]."""
        appearance = self.img_layer_norm(self.img_linear(features))
        position = self.pos_layer_norm(self.pos_linear(boxes))
        return self.dropout(self.LayerNorm(appearance + position + region_type))


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt d + mask) v per head, by PyTorch's fused attention; no attention matrix is kept."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def split_heads(self, states: Tensor) -> Tensor:
        """[B, S, H] -> [B, A, S, d], a view."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, hidden: Tensor, mask: Tensor, rows: int | None = None) -> Tensor:
        """hidden [B, S, H], mask bool [B, 1, 1, S] (True: attend) -> [B, rows, H], its first rows (default: all S)."""
        if torch.is_autocast_enabled(hidden.device.type):
            # cast once: each of the three products would keep a copy of its own for the backward
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        context = F.scaled_dot_product_attention(
            self.split_heads(self.query(hidden[:, :rows])),
            self.split_heads(self.key(hidden)),
            self.split_heads(self.value(hidden)),
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return context.transpose(1, 2).flatten(2)


class ResidualOutput(nn.Module):
    """LN(residual + Drop(W x + b)): the close of the attention block and of the feed-forward block."""

    def __init__(self, input_size: int, config: UniterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(hidden)))


class Attention(nn.Module):
    """x1 = LN(x + Drop(W_o attention(x) + b_o))."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden: Tensor, mask: Tensor, rows: int | None = None) -> Tensor:
        return self.output(self.self(hidden, mask, rows), hidden[:, :rows])


@contextmanager
def kept_as(result: Tensor, function: Callable[[Tensor], Tensor], argument: Tensor) -> Iterator[None]:
    """Inside, autograd keeps ``argument`` in place of ``result`` = function(argument); the backward computes it again.

    It saves the memory of ``result`` where ``argument`` is kept anyway.
    """
    argument = argument.detach()
    storage = result.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if tensor.untyped_storage()._cdata == storage else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else function(argument).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class Intermediate(nn.Module):
    """W_1 x + b_1; [B, S, H] -> [B, S, F]."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense(hidden)


class EncoderLayer(nn.Module):
    """One post-LN transformer layer: x1 as in `Attention`, x2 = LN(x1 + Drop(W_2 GELU(W_1 x1))).

    With `rows` only the first rows of the result are computed: the last layer's are read at [CLS] alone. GELU, in its
    exact form, is computed again in the backward and its argument alone is kept, unless `whole`: the layer itself is
    computed again.
    """

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, mask: Tensor, rows: int | None = None, whole: bool = False) -> Tensor:
        attended = self.attention(hidden, mask, rows)
        wide = self.intermediate(attended)
        activated = F.gelu(wide)
        with nullcontext() if whole else kept_as(activated, F.gelu, wide):
            return self.output(activated, attended)


class Pooler(nn.Module):
    """tanh(W h_[CLS] + b); [B, S, H] -> [B, H]."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))
