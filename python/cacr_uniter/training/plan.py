"""What a run will need of the GPU's memory, and the largest portion that fits: ``cacr train --plan``.

Nothing is guessed: the step of the longest pairs runs without numbers (``dry_run``), and the bytes alive are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cacr_uniter.errors import UserError
from cacr_uniter.model import UniterConfig
from cacr_uniter.training.build import model_config
from cacr_uniter.training.checks import check
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.data import open_dataset, resolve
from cacr_uniter.training.dry_run import DryRun, Use
from cacr_uniter.training.sizes import parse_size, show_size

#: share of the allocator's memory lost between blocks
FRAGMENTATION = 0.05
#: what cuBLAS takes of the allocator
LIBRARIES = 32 << 20


@dataclass(frozen=True)
class Plan:
    """Bytes of one process.

    Args:
        dry_run: counts what a step needs.
        group: pairs of a group.
        portion: pairs of a portion with gradient, in whole groups, as configured; at most a whole step.
    """

    dry_run: DryRun
    group: int
    portion: int

    @property
    def weights(self) -> int:
        """Parameters, in float32."""
        return 4 * self.dry_run.parameters

    @property
    def gradients(self) -> int:
        """Of the trained parameters."""
        return 4 * self.dry_run.trained

    @property
    def moments(self) -> int:
        """AdamW's two."""
        return 8 * self.dry_run.trained

    @property
    def fixed(self) -> int:
        """Bytes held all the time."""
        return self.weights + self.gradients + self.moments + LIBRARIES

    @cached_property
    def _uses(self) -> dict[int, Use]:
        return {}

    def use(self, pairs: int) -> Use:
        """What a step needs beside them whose portions have ``pairs`` pairs; the whole step is the most."""
        groups = min(pairs // self.group, self.dry_run.whole)
        if groups not in self._uses:
            self._uses[groups] = self.dry_run.use(groups)
        return self._uses[groups]

    def peak(self, pairs: int) -> int:
        """Largest need of such a step."""
        return int((self.fixed + self.use(pairs).peak) * (1 + FRAGMENTATION))

    def largest(self, limit: int) -> int:
        """Most pairs of a portion, in whole groups, that fit in ``limit`` bytes; 0 if not even one group does."""
        room, whole = limit / (1 + FRAGMENTATION) - self.fixed, self.dry_run.whole
        one, all_ = self.use(self.group), self.use(whole * self.group)
        if one.peak > room:
            return 0
        fits, too_many, trial = 1, whole + 1, whole
        for first, last in ((one.training, all_.training), (one.scoring, all_.scoring)):
            if last > room:  # both are linear in the groups, but where groups share pairs
                trial = min(trial, 1 + int((room - first) / (last - first) * (whole - 1)))
        while too_many - fits > 1:
            trial = min(max(trial, fits + 1), too_many - 1)
            if self.use(trial * self.group).peak <= room:
                fits, trial = trial, trial + 1
            else:
                trial, too_many = (fits + trial) // 2, trial
        return fits * self.group

    def rows(self) -> list[tuple[str, str]]:
        """Part and size, for people."""
        pairs, use = self.portion, self.use(self.portion)
        sizes = {
            "weights": self.weights,
            "gradients": self.gradients,
            "AdamW moments": self.moments,
            "workspaces of libraries": LIBRARIES,
            f"batch of {pairs} pairs": use.batch,
            "activations, with the weights that autocast casts": use.activations,
            "temporaries of the backward": use.backward,
            "scoring without gradient (not at the same time)": use.scoring,
            f"peak, {FRAGMENTATION:.0%} fragmentation included": self.peak(pairs),
        }
        return [(part, show_size(size)) for part, size in sizes.items()]


def make_plan(
    sizes: UniterConfig, config: TrainConfig, text: int, regions: int, dtype: torch.dtype = torch.float16
) -> Plan:
    """Counts the memory of a step.

    Args:
        sizes: of the model.
        config: of the run.
        text: longest text in columns, [CLS] and [SEP] included.
        regions: most regions of an image.
        dtype: of the region features as they are stored.
    """
    group, dry_run = config.batch.negatives + 1, DryRun(sizes, config, text, regions, dtype)
    portion = min(config.batch.pairs_per_forward // group, dry_run.whole) * group
    return Plan(dry_run, group, portion)


def plan_run(config: TrainConfig) -> tuple[Plan, list[str]]:
    """The plan of a configuration and remarks on what it assumes.

    The data are read for their longest text and largest image if they are there; else the configured bounds count, with
    the published vocabulary and feature width. A checkpoint that is there decides the sizes; none is needed.
    """
    data = config.data
    notes = []
    text, regions, vocabulary, width = data.max_text + 2, data.fixed_regions or data.max_regions, 28996, 2048
    dtype = torch.float16
    texts, dataset = [data.text] if isinstance(data.text, str) else data.text, None
    if data.scenes or (texts and all(Path(folder).is_dir() for folder in texts)):
        dataset = open_dataset(resolve(data), "train")
        assert dataset is not None
        text = max(dataset.text_db.lengths[key] for key in dataset.caption_ids) + 2
        regions = max(dataset.image_db.count(name) for name in dataset.image_names)
        vocabulary, width = dataset.text_db.vocab_size, dataset.feature_dim
        dtype = dataset.image_db.read(dataset.image_names[0]).features.dtype
        validation = open_dataset(resolve(data), "val") if config.run.validate_every else None
        candidates = min(config.run.validation_candidates, len(validation.image_names) if validation else 0)
        config = replace(config, run=replace(config.run, validation_candidates=candidates))
    elif data.max_text < 0:
        raise UserError("data.max_text is -1 and there are no data yet: give a bound to plan for")
    else:
        notes.append("the data are not there yet: planned for the configured bounds and a vocabulary of 28996")
    random = replace(config.model, checkpoint=None)
    known = config.model if config.model.checkpoint and Path(config.model.checkpoint).exists() else random
    sizes = model_config(known, vocabulary, width)
    if dataset is not None:
        dataset.check_lengths(sizes.max_position_embeddings)
    notes.append(f"pairs of {text} text columns and {regions} regions, the longest there are")
    return make_plan(sizes, config, text, regions, dtype), notes


def available_memory(config: TrainConfig) -> int | None:
    """``run.memory_limit``, else the memory of the first GPU, else none."""
    if config.run.memory_limit is not None:
        return parse_size(config.run.memory_limit, "run.memory_limit")
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def show_plan(config: TrainConfig) -> None:
    """Prints the plan as a table, and the largest portion that fits."""
    check(config)
    plan, notes = plan_run(config)
    table = Table("part", "estimate", title="GPU memory of one process")
    for row in plan.rows():
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in notes:
        _say(console, note)
    limit = available_memory(config)
    if limit is None:
        _say(console, "give run.memory_limit to see the largest batch.pairs_per_forward")
        return
    most = plan.largest(limit)
    if most:
        whole = ", a whole step" if most == plan.dry_run.whole * plan.group else ""
        _say(console, f"{show_size(limit)} hold batch.pairs_per_forward up to {most}{whole}")
    else:
        _say(console, f"{show_size(limit)} do not hold one group of {plan.group} pairs: {_advice(plan, limit)}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _advice(plan: Plan, limit: int) -> str:
    """What to change where not even one group fits."""
    room, use = limit / (1 + FRAGMENTATION) - plan.fixed, plan.use(plan.group)
    if room <= 0:
        return (
            f"weights, gradients and moments alone need {show_size(plan.fixed * (1 + FRAGMENTATION))}; try a larger "
            "model.freeze_layers or a smaller model"
        )
    cures = []
    if use.scoring > room:
        cures.append("a smaller batch.score_chunk or batch.pool")
    if use.training > room:
        cures.append("model.activation_checkpointing true, fewer batch.negatives or a larger model.freeze_layers")
    return f"try {'; and '.join(cures)}"
