"""UNITER with its matching heads. Depends on the layers and on `Batch`; knows nothing of losses or files."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cacr_uniter.data.batch import Batch
from cacr_uniter.model.config import UniterConfig
from cacr_uniter.model.layers import EncoderLayer, ImageEmbeddings, LayerNorm, Pooler, TextEmbeddings


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        rank_scores: [B] raw logit of the ranking head; higher means a better match.
        itm_logits: [B, 2] logits of the matching head, column 1 = match.
        last_input: [B, S, H] hidden states entering the last encoder layer, S = T + R, text columns first.
    """

    rank_scores: Tensor
    itm_logits: Tensor
    last_input: Tensor


class Encoder(nn.Module):
    """The stack of encoder layers."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    @property
    def last(self) -> EncoderLayer:
        """The layer whose scores the congruence losses read."""
        return cast(EncoderLayer, self.layer[-1])


class UniterModel(nn.Module):
    """Embeddings, encoder and pooler over the uncompacted sequence [text padded to T | regions padded to R].

    Padding is masked in every layer and regions carry no position, so the results do not depend on T or R.
    """

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.img_embeddings = ImageEmbeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)
        self.frozen_layers = 0
        self.checkpoint_activations = False

    def embed(self, batch: Batch) -> Tensor:
        """Joint sequence [B, T + R, H]."""
        text = self.embeddings(batch.input_ids)
        region_type = self.embeddings.token_type_embeddings.weight[1]
        regions = self.img_embeddings(batch.features, batch.boxes, region_type)
        return torch.cat([text, regions], dim=1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the pooled vector [B, H] and the input of the last layer [B, S, H].

        Of the last layer's output only [CLS] is computed, which is all that the pooler reads. Under autocast the pooler
        is computed in the dtype of its weights.

        Embeddings and layers below `frozen_layers` run without autograd, so none of their activations are kept.
        """
        mask = torch.cat([batch.text_mask, batch.region_mask], dim=1)[:, None, None, :]
        learn = torch.is_grad_enabled()
        with torch.set_grad_enabled(learn and self.frozen_layers == 0):
            hidden = self.embed(batch)
        last_input = hidden
        for index, layer in enumerate(self.encoder.layer):
            last_input = hidden
            rows = 1 if layer is self.encoder.last else None
            with torch.set_grad_enabled(learn and index >= self.frozen_layers):
                if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                    hidden = checkpoint(layer, hidden, mask, rows, True, use_reentrant=False)
                else:
                    hidden = layer(hidden, mask, rows)
        with torch.autocast(hidden.device.type, enabled=False):  # half precision ties the scores of many pairs
            return self.pooler(hidden), last_input


class UniterForRetrieval(nn.Module):
    """UNITER with the ranking head and the two-way matching head on the pooled vector.

    State-dict keys are the published ones: `uniter.*`, `itm_output.*`, `rank_output.*`. Weights start as N(0,
    initializer_range), biases 0, layer norms 1 and 0.

    Args:
        config: sizes of the model.
    """

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.config = config
        self.uniter = UniterModel(config)
        self.itm_output = nn.Linear(config.hidden_size, 2)
        self.rank_output = nn.Linear(config.hidden_size, 1)
        self.apply(self._initialise)
        with torch.no_grad():
            self.uniter.img_embeddings.mask_embedding.weight[0].zero_()

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, LayerNorm)):
            nn.init.zeros_(module.bias)

    def forward(self, batch: Batch) -> Output:
        """Scores every pair of the batch.

        Args:
            batch: B pairs, text padded to T columns, regions to R; see `Batch`.

        Returns:
            Output with rank_scores [B] and itm_logits [B, 2] in float32 (float64 for a float64 model), last_input [B,
            T + R, H].

        Raises:
            ValueError: T exceeds max_position_embeddings, or the region features have another width than
                `config.img_dim`.
        """
        if batch.features.shape[-1] != self.config.img_dim:
            raise ValueError(
                f"batch.features: expected width img_dim={self.config.img_dim}, got {batch.features.shape[-1]}; "
                "set img_dim in the model configuration to the width of the features"
            )
        pooled, last_input = self.uniter(batch)
        dtype = torch.promote_types(pooled.dtype, torch.float32)
        with torch.autocast(pooled.device.type, enabled=False):
            rank_scores, itm_logits = self.rank_output(pooled).squeeze(-1), self.itm_output(pooled)
        return Output(rank_scores.to(dtype), itm_logits.to(dtype), last_input)

    def last_layer_qk(self, last_input: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of the last encoder layer, recomputed from its input with its own projections.

        Their scaled product q k^T / sqrt d is the layer's attention score matrix S (paper, Eq. 1), which the forward
        pass never forms. Gradients flow to the two projections and to everything below.

        Args:
            last_input: [B, S, H], `Output.last_input`, or any rows of it.

        Returns:
            q and k, each [B, A, S, d].
        """
        attention = self.uniter.encoder.last.attention.self
        return attention.split_heads(attention.query(last_input)), attention.split_heads(attention.key(last_input))

    def freeze_layers(self, count: int) -> None:
        """Freezes the embeddings and the first `count` encoder layers; 0 frees all of them again.

        Frozen parts take no gradient and run without autograd: nothing below the first trained layer is kept for the
        backward pass. In training mode their dropout stays active.

        Raises:
            ValueError: `count` is negative or more than the number of layers.
        """
        layers = self.uniter.encoder.layer
        if not 0 <= count <= len(layers):
            raise ValueError(f"count: expected 0 to {len(layers)} layers to freeze, got {count}")
        self.uniter.frozen_layers = count
        for embeddings in (self.uniter.embeddings, self.uniter.img_embeddings):
            embeddings.requires_grad_(count == 0)
        self.uniter.img_embeddings.mask_embedding.weight.requires_grad_(False)
        for index, layer in enumerate(layers):
            layer.requires_grad_(index >= count)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Recomputes every trained encoder layer in the backward pass instead of keeping its activations (training
        mode only).
        """
        self.uniter.checkpoint_activations = enabled

    def set_dropout(self, probability: float) -> None:
        """Overwrites every dropout probability, as the published training configuration does.

        Raises:
            ValueError: `probability` is outside [0, 1).
        """
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"probability: expected a value in [0, 1), got {probability!r}")
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
