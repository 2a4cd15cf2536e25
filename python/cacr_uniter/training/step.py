"""One optimizer step: draw groups, mine hard negatives, losses, gradients, update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cacr_uniter.data.batch import Batch, Pairs
from cacr_uniter.model import UniterForRetrieval
from cacr_uniter.training.attention import LayerAttention
from cacr_uniter.training.config import Half, TrainConfig
from cacr_uniter.training.losses import AuxiliaryLoss, matching_loss
from cacr_uniter.training.optim import FlatGradients
from cacr_uniter.training.sampling import Group, Sampler, dropout_seed
from cacr_uniter.training.schedule import auxiliary_weight, learning_rate
from cacr_uniter.training.shared import SharedSampler
from cacr_uniter.training.source import PairSource, ahead, read_pairs


def halves_of(config: TrainConfig) -> tuple[Half, ...]:
    """The halves of a step, in the published order."""
    return ("image", "text") if config.batch.halves == "both" else (config.batch.halves,)


@dataclass(frozen=True)
class Portion:
    """Groups that share one forward, with the pairs of all of them (pools where negatives are mined).

    Args:
        step: optimizer step, from 0.
        last: whether the step ends with it.
        groups: G groups of equally many pairs.
        pairs: their pairs, each once where groups share them.
        rows: where the groups' pairs stand in `pairs`, group after group [G * pairs].
    """

    step: int
    last: bool
    groups: list[Group]
    pairs: Pairs
    rows: Tensor


class Stepper:
    """Runs optimizer steps of one process.

    Args:
        model: on its device.
        parameters: those that the optimizer updates.
        optimizer: prepared by ``accelerator``.
        config: of the run.
        source: training pairs.
        accelerator: device, precision, processes.
    """

    def __init__(
        self,
        model: UniterForRetrieval,
        parameters: list[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        source: PairSource,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.gradients = FlatGradients(parameters)
        self.config, self.source, self.accelerator = config, source, accelerator
        self.hard = config.batch.mining == "hard" and config.batch.pool > config.batch.negatives
        draws = config.batch.pool if self.hard else config.batch.negatives
        common = (source.image_of, source.n_images, config.run.seed, config.batch.anchors, draws)
        self.sampler = Sampler(*common)
        if config.batch.mining == "shared":
            self.sampler = SharedSampler(*common, contrasts=source.contrasts() if config.batch.contrasts else None)
        self.halves = halves_of(config)
        if config.batch.mining != "shared":
            self.sampler.check(self.halves)
        self.auxiliary = None if config.aux.loss == "none" else AuxiliaryLoss(config.aux)
        if self.auxiliary is not None and config.aux.backend != "auto":
            self.auxiliary.try_out(model.config.num_attention_heads, model.config.head_dim, accelerator.device)
        self.attention = LayerAttention(model, [] if self.auxiliary is None else config.aux.layers)
        self.size = config.batch.negatives + 1

    def portions(self, start: int) -> Iterator[Portion]:
        """The portions of steps ``start`` .. T - 1, read ahead."""
        return ahead(self._read, self._plan(start), self.source.workers, lambda portion: portion.pairs.nbytes)

    def _plan(self, start: int) -> Iterator[tuple[int, bool, list[Group]]]:
        accelerator = self.accelerator
        together = max(1, self.config.batch.pairs_per_forward // self.size)
        for step in range(start, self.config.optim.steps):
            groups = self.sampler.step_groups(step, self.halves, accelerator.process_index, accelerator.num_processes)
            for first in range(0, len(groups), together):
                yield step, first + together >= len(groups), groups[first : first + together]

    def _read(self, plan: tuple[int, bool, list[Group]]) -> Portion:
        step, last, groups = plan
        captions = np.concatenate([group.captions for group in groups])
        images = np.concatenate([group.images for group in groups])
        rows = np.arange(len(captions))
        if self.config.batch.mining == "shared":
            distinct, rows = np.unique(captions * self.source.n_images + images, return_inverse=True)
            captions, images = np.divmod(distinct, self.source.n_images)
        pairs = read_pairs(self.source, captions, images, self.accelerator.device)
        return Portion(step, last, groups, pairs, torch.from_numpy(rows))

    def begin(self, step: int) -> None:
        """Sets what a step (from 0) depends on: dropout's generator and the learning rate; clears gradients."""
        torch.manual_seed(dropout_seed(self.config.run.seed, step, self.accelerator.process_index))
        optim = self.config.optim
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, optim.lr, optim.steps, optim.warmup, optim.decay)
        self.gradients.clear()
        if not self.model.training:
            self.model.train()

    def backward(self, portion: Portion) -> Tensor:
        """Adds a portion's gradients. Returns the sums (matching, auxiliary, matched pairs ranked first, groups)."""
        config = self.config
        batch, rows = self._batch(portion)
        with self.accelerator.autocast(), self.attention.watch():
            output = self.model(batch)
        scores = output.rank_scores[rows].view(-1, self.size)
        matching = matching_loss(scores, config.loss).sum()
        total = matching / config.batch.anchors
        congruence = matching.new_zeros(())
        weight = self.auxiliary_factor(portion.step)
        if self.auxiliary is not None:
            chosen = rows.view(-1, self.size)[:, : 1 if config.aux.pairs == "positives" else None]
            congruence = self._auxiliary(portion.groups, chosen, batch, output.last_input)
            total = total + weight / config.batch.anchors * congruence
        self.accelerator.backward(total)
        self.attention.forget()
        first = (scores[:, 1:] < scores[:, :1]).all(dim=1).sum()
        return torch.stack(
            [matching.detach(), congruence.detach(), first.float(), first.new_tensor(len(scores)).float()]
        )

    def _batch(self, portion: Portion) -> tuple[Batch, Tensor]:
        """The pairs with gradient and where the groups' pairs stand in them [G * (1 + K)]; the pools are let go."""
        device = self.accelerator.device
        pairs = portion.pairs.to(device, non_blocking=True)
        if not self.hard:
            return pairs.batch(), portion.rows.to(device)
        batch = self._mine(pairs, len(portion.groups))
        return batch, torch.arange(len(batch), device=device)

    def auxiliary_factor(self, step: int) -> float:
        """Factor of the auxiliary loss averaged over matched pairs, at a step counted from 0."""
        aux = self.config.aux
        accumulated = aux.reference_batch if aux.normalise == "reference" else 1
        return aux.weight * accumulated * auxiliary_weight(step, self.config.optim.steps, aux.schedule)

    def gather(self) -> float:
        """Sums gradients over processes and clips them. Returns their norm before clipping."""
        self.gradients.sum_processes()
        self.accelerator.unscale_gradients()
        return self.gradients.clip(self.config.optim.clip)

    def update(self) -> None:
        """The optimizer's update (fp16: skipped, and the loss scale halved, when a gradient overflowed)."""
        self.optimizer.step()

    @torch.no_grad()
    def _mine(self, pairs: Pairs, groups: int) -> Batch:
        """Of every group the matched pair and the highest scored negatives, scored in evaluation mode."""
        self.model.eval()
        scores = self.score(pairs).view(groups, -1)
        self.model.train()
        hardest = scores[:, 1:].topk(self.size - 1, dim=1, sorted=False).indices + 1
        chosen = torch.cat([torch.zeros_like(hardest[:, :1]), hardest], dim=1)
        chosen = chosen + scores.shape[1] * torch.arange(groups, device=chosen.device)[:, None]
        return pairs.batch(chosen.flatten())

    def score(self, pairs: Pairs) -> Tensor:
        """Rank scores [B] in chunks; the caller decides on mode and gradients."""
        chunk = self.config.batch.score_chunk
        with self.accelerator.autocast():
            parts = [
                self.model(pairs.batch(slice(start, start + chunk))).rank_scores
                for start in range(0, len(pairs), chunk)
            ]
        return torch.cat(parts)

    def _auxiliary(self, groups: list[Group], chosen: Tensor, batch: Batch, last_input: Tensor) -> Tensor:
        """Sum over the groups of the auxiliary loss, averaged over a group's pairs at the rows `chosen` [G, pairs]."""
        assert self.auxiliary is not None
        numbers: dict[Half, list[int]] = {}
        for number, group in enumerate(groups):
            half: Half = group.half if self.config.aux.sides == "alternate" else "image"
            numbers.setdefault(half, []).append(number)
        total = last_input.new_zeros((), dtype=torch.float32)
        for half, own in numbers.items():
            index = chosen[torch.tensor(own, device=last_input.device)].flatten()
            pairs = batch.select(index)
            for q, k in self.attention.queries_and_keys(last_input, index):
                total = total + self.auxiliary(q, k, pairs, half)
        return total / (len(self.attention.layers) * chosen.shape[1])
