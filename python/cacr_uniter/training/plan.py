"""What a run will need of the GPU's memory, and the largest portion that fits: ``cacr train --plan``.

The activations are counted, not guessed: one and two pairs of the longest kind go through the real model on the CPU,
and what autograd keeps for the backward is added up. Everything kept is linear in the number of pairs. With activation
checkpointing it is each layer's input and the activations of one layer. The auxiliary loss of one pair in a group is
not counted: it is below a hundredth (of all pairs, with `aux.pairs all`, it is not).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cacr_uniter.data.batch import Batch
from cacr_uniter.errors import UserError
from cacr_uniter.model import UniterForRetrieval
from cacr_uniter.training.build import build_model, model_config
from cacr_uniter.training.checks import check
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.data import open_dataset, resolve
from cacr_uniter.training.losses import matching_loss
from cacr_uniter.training.optim import trained_parameters
from cacr_uniter.training.sizes import parse_size, show_size

#: bytes of an element in the autocast forward
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.bfloat16}
#: share of the allocator's memory lost between blocks
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Plan:
    """Estimated bytes of one process, for pairs of ``text`` columns and ``regions`` regions.

    Args:
        weights: parameters.
        gradients: of the trained ones.
        moments: AdamW's two.
        per_pair: kept for the backward for each pair of a portion.
        per_forward: kept for it once (weights cast by autocast).
        temporary: of the backward, for each pair.
        scoring: of a chunk scored without gradient.
        pool: the pairs that one group is mined from.
        group: pairs of a group.
        portion: pairs of a portion with gradient, as configured.
        text, regions: the shape it was computed for.
    """

    weights: int
    gradients: int
    moments: int
    per_pair: int
    per_forward: int
    temporary: int
    scoring: int
    pool: int
    group: int
    portion: int
    text: int
    regions: int

    @property
    def fixed(self) -> int:
        """Bytes held all the time."""
        return self.weights + self.gradients + self.moments

    def peak(self, pairs: int) -> int:
        """Largest need of a step whose portions have ``pairs`` pairs."""
        training = self.per_forward + pairs * (self.per_pair + self.temporary)
        scoring = self.scoring + pairs // self.group * self.pool
        return int((self.fixed + max(training, scoring)) * (1 + FRAGMENTATION))

    def largest(self, limit: int) -> int:
        """Most pairs of a portion, in whole groups, that fit in ``limit`` bytes; 0 if not even one group does."""
        groups = 0
        while groups < 4096 and self.peak((groups + 1) * self.group) <= limit:
            groups += 1
        return groups * self.group

    def rows(self) -> list[tuple[str, str]]:
        """Part and size, for people."""
        pairs = self.portion
        return [
            ("weights", show_size(self.weights)),
            ("gradients", show_size(self.gradients)),
            ("AdamW moments", show_size(self.moments)),
            ("weights cast for autocast", show_size(self.per_forward)),
            (f"activations of {pairs} pairs", show_size(pairs * self.per_pair)),
            ("temporaries of the backward", show_size(pairs * self.temporary)),
            ("scoring of a pool (not at the same time)", show_size(self.scoring + pairs // self.group * self.pool)),
            (f"peak, {FRAGMENTATION:.0%} fragmentation included", show_size(self.peak(pairs))),
        ]


def make_plan(model: UniterForRetrieval, config: TrainConfig, text: int, regions: int) -> Plan:
    """Counts the memory of a step.

    Args:
        model: on the CPU, with the configuration's frozen layers and checkpointing.
        config: of the run.
        text: longest text in columns, [CLS] and [SEP] included.
        regions: most regions of an image.
    """
    model.checkpoint_activations(False)
    one, two = (_kept(model, config, _longest(model, pairs, text, regions)) for pairs in (1, 2))
    model.checkpoint_activations(config.model.activation_checkpointing)
    activations = two - one
    trained = sum(p.numel() for p in trained_parameters(model).values())
    element, sizes = ELEMENT[config.run.precision], model.config
    length = text + regions
    widest = max(sizes.intermediate_size, 3 * sizes.hidden_size)
    layers = sizes.num_hidden_layers - config.model.freeze_layers
    if config.model.activation_checkpointing and layers:
        activations = activations // layers + layers * length * 4 * sizes.hidden_size
    batch, chunk = config.batch, config.batch.score_chunk
    hard = batch.mining == "hard"
    features = 4 * regions * (sizes.img_dim + 7)
    scored = min(chunk, batch.pool + 1) * (length * (2 * widest * element + 8 * sizes.hidden_size) + features)
    return Plan(
        weights=4 * sum(p.numel() for p in model.parameters()),
        gradients=4 * trained,
        moments=8 * trained,
        per_pair=activations + features,
        per_forward=max(0, 2 * one - two),
        temporary=length * (2 * widest * element + 8 * sizes.hidden_size),
        scoring=scored if hard else 0,
        pool=(batch.pool + 1) * features if hard else 0,
        group=batch.negatives + 1,
        portion=(batch.pairs_per_forward // (batch.negatives + 1)) * (batch.negatives + 1),
        text=text,
        regions=regions,
    )


def _longest(model: UniterForRetrieval, pairs: int, text: int, regions: int) -> Batch:
    return Batch(
        input_ids=torch.ones(pairs, text, dtype=torch.int64),
        text_mask=torch.ones(pairs, text, dtype=torch.bool),
        features=torch.zeros(pairs, regions, model.config.img_dim),
        boxes=torch.zeros(pairs, regions, 7),
        region_mask=torch.ones(pairs, regions, dtype=torch.bool),
        n_text=torch.full((pairs,), text - 2, dtype=torch.int32),
        n_regions=torch.full((pairs,), regions, dtype=torch.int32),
    )


def _kept(model: UniterForRetrieval, config: TrainConfig, batch: Batch) -> int:
    """Bytes that autograd keeps for the backward of one group, without parameters and the batch itself."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *vars(batch).values())}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    precision = config.run.precision
    mixed = torch.autocast("cpu", AUTOCAST[precision]) if precision != "fp32" else contextlib.nullcontext()
    was_training = model.training
    model.train()
    with _dropout_masks(model) as masks, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
        output = model(batch)
        loss = matching_loss(output.rank_scores[None].expand(1, -1), config.loss).sum()
    model.train(was_training)
    del loss
    return sum(size for size, _ in found.values()) + sum(masks)


@contextlib.contextmanager
def _dropout_masks(model: UniterForRetrieval) -> Iterator[list[int]]:
    """Switches dropout off and lists the bytes of the masks it would keep on a GPU, one for each number.

    On the CPU dropout keeps whole floats, and attention with dropout keeps its probabilities.
    """
    masks: list[int] = []
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    before = [module.p for module in modules]

    def count(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            masks.append(output.numel())

    hooks = [module.register_forward_hook(count) for module in modules]
    for module in modules:
        module.p = 0.0
    try:
        yield masks
    finally:
        for hook, module, p in zip(hooks, modules, before, strict=True):
            hook.remove()
            module.p = p


def plan_run(config: TrainConfig) -> tuple[Plan, list[str]]:
    """The plan of a configuration and remarks on what it assumes.

    The data are read for their longest text and largest image if they are there; else the configured bounds count, with
    the published vocabulary and feature width. A checkpoint that is there decides the sizes; none is needed.
    """
    data = config.data
    notes = []
    text, regions, vocabulary, width = data.max_text + 2, data.fixed_regions or data.max_regions, 28996, 2048
    texts = [data.text] if isinstance(data.text, str) else data.text
    if data.scenes or (texts and all(Path(folder).is_dir() for folder in texts)):
        dataset = open_dataset(resolve(data), "train")
        assert dataset is not None
        text = max(dataset.text_db.lengths[key] for key in dataset.caption_ids) + 2
        regions = max(dataset.image_db.count(name) for name in dataset.image_names)
        vocabulary, width = dataset.text_db.vocab_size, dataset.feature_dim
    elif data.max_text < 0:
        raise UserError("data.max_text is -1 and there are no data yet: give a bound to plan for")
    else:
        notes.append("the data are not there yet: planned for the configured bounds and a vocabulary of 28996")
    random = replace(config.model, checkpoint=None)
    known = config.model if config.model.checkpoint and Path(config.model.checkpoint).exists() else random
    model, _ = build_model(random, model_config(known, vocabulary, width), config.run.seed)
    notes.append(f"pairs of {text} text columns and {regions} regions, the longest there are")
    return make_plan(model, config, text, regions), notes


def available_memory(config: TrainConfig) -> int | None:
    """``run.memory_limit``, else the memory of the first GPU, else none."""
    if config.run.memory_limit is not None:
        return parse_size(config.run.memory_limit, "run.memory_limit")
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def show_plan(config: TrainConfig) -> None:
    """Prints the plan as a table, and the largest portion that fits."""
    check(config)
    plan, notes = plan_run(config)
    table = Table("part", "estimate", title="memory of one process")
    for row in plan.rows():
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    limit = available_memory(config)
    if limit is None:
        console.print("give run.memory_limit to see the largest batch.pairs_per_forward", highlight=False)
        return
    most = plan.largest(limit)
    if most:
        console.print(f"{show_size(limit)} hold batch.pairs_per_forward up to {most}", highlight=False)
    else:
        console.print(
            f"{show_size(limit)} do not hold one group of {config.batch.negatives + 1} pairs: "
            "try model.activation_checkpointing true, fewer batch.negatives or a larger model.freeze_layers",
            highlight=False,
        )
