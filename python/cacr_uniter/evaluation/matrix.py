"""The score matrix of all captions with all images, in parts that survive a kill and can be shared by processes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.scoring import Head, head_scores
from cacr_uniter.files import parse_json, replacing
from cacr_uniter.model.uniter import UniterForRetrieval
from cacr_uniter.training.source import PairSource

IDENTITY = "matrix.json"
WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class Identity:
    """What decides the numbers of a matrix; parts are only taken over from a run with the same.

    Weights, captions and images are digests of their contents, so that it does not matter where they lie.
    """

    weights: str
    head: str
    captions: str
    images: str
    block: int


def captions_digest(dataset: RetrievalDataset) -> str:
    """SHA-256 of the ids and word pieces of all captions."""
    found = hashlib.sha256(json.dumps([dataset.text_db.cls, dataset.text_db.sep]).encode("utf-8"))
    for caption in dataset.caption_ids:
        found.update(json.dumps([caption, dataset.text_db.caption(caption).input_ids]).encode("utf-8"))
    return found.hexdigest()


def images_digest(dataset: RetrievalDataset) -> str:
    """SHA-256 of the names, region features and boxes of all images, as the box rule cuts them."""
    found = hashlib.sha256()
    for name in dataset.image_names:
        regions = dataset.image_db.read(name)
        found.update(json.dumps([name, list(regions.features.shape)]).encode("utf-8"))
        found.update(regions.features.numpy().tobytes())
        found.update(regions.boxes.numpy().tobytes())
    return found.hexdigest()


def weights_digest(model: UniterForRetrieval) -> str:
    """SHA-256 of all parameters, in the order of the state dict."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode("utf-8"))
        found.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def open_parts(folder: Path, identity: Identity) -> None:
    """Makes the folder of the parts, or finds it left by a run with the same identity.

    Raises:
        UserError: it belongs to another model or data set, or cannot be written.
    """
    path, wanted = folder / IDENTITY, asdict(identity)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = parse_json(path.read_text(encoding="utf-8"))
            changed = [name for name, value in wanted.items() if before.get(name) != value]
            if changed:
                raise UserError(
                    f"--out: {folder} holds scores of another run (different {', '.join(changed)}); give another folder"
                )
            return
        with replacing(path, f".{os.getpid()}") as partial:
            partial.write_text(json.dumps(wanted), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {folder} cannot be used ({error})") from error


@torch.inference_mode()
def score_blocks(
    folder: Path,
    model: UniterForRetrieval,
    source: PairSource,
    order: NDArray[np.int64],
    n_captions: int,
    block: int,
    head: Head,
    batch_size: int,
    rank: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the parts of this process that do not exist yet: part k holds Z[:, order[k block : (k + 1) block]].

    Args:
        folder: of the parts, see `open_parts`.
        model: on its device, in evaluation mode.
        source: captions and images by number.
        order: image numbers, sorted so that images of similar size share a part.
        n_captions: captions 0 .. n_captions - 1 are scored.
        block: images per part.
        head, batch_size: as in `score_pairs`.
        rank, processes: this process does the parts rank, rank + processes, ...
        progress: told of the pairs done and wanted.
    """
    device = next(model.parameters()).device
    numbers = range(rank, -(-len(order) // block), processes)
    done, total = 0, sum(len(order[k * block : (k + 1) * block]) for k in numbers) * n_captions
    for k in numbers:
        images, path = order[k * block : (k + 1) * block], folder / part_name(k)
        if path.exists():
            done += n_captions * len(images)
            progress(done, total)
            continue
        part = np.empty(n_captions * len(images), dtype=np.float32)
        captions = np.repeat(np.arange(n_captions), len(images))
        pairs = source.pairs(captions, np.tile(images, n_captions)).to(device)
        for start in range(0, len(part), batch_size):
            rows = slice(start, start + batch_size)
            part[rows] = head_scores(model(pairs.batch(rows)), head).float().cpu().numpy()
            progress(done + min(start + batch_size, len(part)), total)
        done += len(part)
        if not np.isfinite(part).all():
            raise UserError("the model's scores are not finite: its training diverged, take an earlier checkpoint")
        _write(path, part.reshape(n_captions, len(images)))


def part_name(number: int) -> str:
    """File of one part."""
    return f"part-{number:06d}.npy"


def _write(path: Path, part: NDArray[np.float32]) -> None:
    try:
        with replacing(path, f".{os.getpid()}") as partial, partial.open("wb") as stream:
            np.save(stream, part, allow_pickle=False)
    except OSError as error:
        raise UserError(f"--out: {path} could not be written ({error.strerror}); earlier parts are kept") from error


def join_parts(folder: Path, order: NDArray[np.int64], n_captions: int, block: int) -> NDArray[np.float32]:
    """The matrix Z [n_captions, len(order)]: waits for the parts of other processes, then reads all.

    Raises:
        UserError: a part is damaged.
    """
    scores = np.empty((n_captions, len(order)), dtype=np.float32)
    for k in range(-(-len(order) // block)):
        path, images = folder / part_name(k), order[k * block : (k + 1) * block]
        while not path.exists():
            time.sleep(WAIT_SECONDS)
        try:
            part = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"--out: {path} is damaged ({error}); delete it and run the same command again") from error
        if part.shape != (n_captions, len(images)):
            raise UserError(f"--out: {path} has shape {part.shape}; delete it and run the same command again")
        scores[:, images] = part
    return scores
