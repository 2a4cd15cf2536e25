"""Validation while training: where the match stands among sampled candidates, in both directions."""

from __future__ import annotations

import zlib

import numpy as np
import torch
import torch.distributed as dist

from cacr_uniter.training.config import RunConfig, TrainConfig
from cacr_uniter.training.sampling import Sampler
from cacr_uniter.training.source import PairSource, ahead, read_pairs
from cacr_uniter.training.step import Stepper


def measure(source: PairSource, run: RunConfig) -> str:
    """What the numbers of ``validate`` depend on besides the weights, in words: others are not compared with them.

    The data are known by their numbers, by the image of every caption and by the content of the first pair.

    Raises:
        UserError: the first pair cannot be read.
    """
    first = source.pairs(np.zeros(1, dtype=np.int64), source.image_of[:1])
    content = (source.image_of, first.input_ids.numpy(), first.features.numpy(), first.boxes.numpy())
    data = zlib.crc32(b"".join(values.tobytes() for values in content))
    return (
        f"{run.validation_anchors} anchors, {run.validation_candidates} candidates, seed {run.seed}, "
        f"{len(source.image_of)} captions, {source.n_images} images, data {data:08x}"
    )


@torch.no_grad()
def validate(stepper: Stepper, source: PairSource, config: TrainConfig) -> dict[str, float]:
    """Recall at 1 and mean rank of the match, in percent and counted from 1.

    ``ir``: images for a caption; ``tr``: captions for an image. The same captions, images and candidates every time, at
    most ``validation_candidates`` of them; a tie counts against the match. Equal on every process.
    """
    run, accelerator = config.run, stepper.accelerator
    fewest = len(source.image_of) - max(
        len(own) for own in Sampler(source.image_of, source.n_images, 0, 1, 1).captions_of
    )
    draws = min(run.validation_candidates, source.n_images, fewest + 1) - 1
    anchors = min(run.validation_anchors, len(source.image_of))
    sampler = Sampler(source.image_of, source.n_images, run.seed, anchors, draws)
    groups = sampler.step_groups(0, ("image", "text"), accelerator.process_index, accelerator.num_processes)
    read = ahead(
        lambda group: read_pairs(source, group.captions, group.images, accelerator.device),
        groups,
        source.workers,
        lambda pairs: pairs.nbytes,
    )
    sums = torch.zeros(2, 3, device=accelerator.device)
    stepper.model.eval()
    for group, pairs in zip(groups, read, strict=True):
        scores = stepper.score(pairs.to(accelerator.device, non_blocking=True))
        rank = 1 + (~(scores[1:] < scores[0])).sum()  # a score that is no number counts against the match
        sums[int(group.half == "image")] += torch.stack([rank == 1, rank, torch.ones_like(rank)])
    if accelerator.num_processes > 1:
        dist.all_reduce(sums)
    (ir_first, ir_rank, n_ir), (tr_first, tr_rank, n_tr) = sums.tolist()
    return {
        "ir_r1": 100 * ir_first / n_ir,
        "tr_r1": 100 * tr_first / n_tr,
        "ir_rank": ir_rank / n_ir,
        "tr_rank": tr_rank / n_tr,
        "candidates": draws + 1,
    }
