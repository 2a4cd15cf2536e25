"""Scores of caption-image pairs by a model in evaluation mode, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.data.image_db import ImageDB
from cacr_uniter.data.text_db import TextDB
from cacr_uniter.data.vocabulary import Vocabulary, in_words, same_vocabulary
from cacr_uniter.errors import UserError
from cacr_uniter.evaluation.examples import Example, read_examples
from cacr_uniter.model.checkpoint import load_checkpoint
from cacr_uniter.model.config import UniterConfig
from cacr_uniter.model.uniter import Output, UniterForRetrieval

RUN_CONFIG = "config.yaml"
Head = Literal["rank", "itm"]
Pair = tuple[str, str]
"""Caption id and image name."""


def head_scores(output: Output, head: Head) -> Tensor:
    """Scores [B]: the ranking head's logit, or the matching head's logit difference match - no match.

    The difference orders pairs as softmax(itm_logits)[:, 1] does, without its ties where it saturates.
    """
    return output.rank_scores if head == "rank" else output.itm_logits[:, 1] - output.itm_logits[:, 0]


@torch.inference_mode()
def score_pairs(
    model: UniterForRetrieval,
    dataset: RetrievalDataset,
    pairs: Sequence[Pair],
    head: Head = "rank",
    batch_size: int = 256,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:
    """Scores of the pairs, [len(pairs)] float32, in their order; the model is left in the mode it was in.

    Pairs are put together by length, so padding is small; it does not change the scores.
    """
    device = next(model.parameters()).device
    lengths = dataset.text_db.lengths
    order = sorted(range(len(pairs)), key=lambda i: (dataset.image_db.count(pairs[i][1]), lengths[pairs[i][0]]))
    scores = np.empty(len(pairs), dtype=np.float32)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = dataset.pairs([pairs[i] for i in rows]).to(device).batch()  # every image travels once, as stored
            scores[rows] = head_scores(model(batch), head).float().cpu().numpy()
            progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(training)
    if not np.isfinite(scores).all():
        raise UserError("the model's scores are not finite: its training diverged, take an earlier checkpoint")
    return scores


def score_examples(
    model: UniterForRetrieval,
    dataset: RetrievalDataset,
    examples: Sequence[Example],
    head: Head = "rank",
    batch_size: int = 256,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float64]:
    """Winoground scores [n, 2, 2], indexed [example, caption, image].

    Raises:
        UserError: a caption or image of an example is not in the databases, or a caption is too long for the model.
    """
    dataset.check_lengths(model.config.max_position_embeddings)
    captions = caption_ids(examples, dataset)
    pairs = [
        (ids[c], example.images[i])
        for example, ids in zip(examples, captions, strict=True)
        for c in (0, 1)
        for i in (0, 1)
    ]
    scores = score_pairs(model, dataset, pairs, head, batch_size, progress)
    return scores.reshape(-1, 2, 2).astype(np.float64)


def caption_ids(examples: Sequence[Example], dataset: RetrievalDataset) -> list[tuple[str, str]]:
    """Ids of the two captions of every example.

    Raises:
        UserError: a caption or image of an example is not in the databases.
    """
    captions = [example.caption_ids or _caption_ids(example, dataset) for example in examples]
    for example, ids in zip(examples, captions, strict=True):
        for kind, names, known in (
            ("caption", ids, dataset.text_db.lengths),
            ("image", example.images, dataset.image_db),
        ):
            absent = [name for name in names if name not in known]
            if absent:
                raise UserError(f"example {example.id}: {kind} {absent[0]!r} is not in the database")
    return captions


def _caption_ids(example: Example, dataset: RetrievalDataset) -> tuple[str, str]:
    """Ids of a published example's captions: those of its two images in the text database, told apart by their text."""
    found = []
    for image, caption in zip(example.images, example.captions, strict=True):
        own = [i for i in dataset.img2txts.get(image, []) if dataset.text_db.caption(i).record.get("raw") == caption]
        if not own:
            raise UserError(f"example {example.id}: no caption of {image} in the text database reads {caption!r}")
        found.append(own[0])
    return found[0], found[1]


def open_examples(
    scenes: Path | None,
    path: Path | None = None,
    text: Path | None = None,
    images: Path | None = None,
    rule: BoxRule | None = None,
) -> tuple[RetrievalDataset, list[Example]]:
    """Captions and regions of a Winoground-like set, and its examples.

    Args:
        scenes: scene set; it stands for the three others where they are None.
        path: examples, see `read_examples`.
        text, images: databases of the captions and of the region features.
        rule: of the regions used, see `ImageDB`.

    Raises:
        UserError: neither a scene set nor all three, or one of them is missing or damaged.
    """
    if scenes is None and (path is None or text is None or images is None):
        raise UserError("--checkpoint needs --data DIR of a scene set, or --examples, --text and --images")
    root = scenes or Path()
    examples = read_examples(path or root / "winoground.json")
    regions = ImageDB(images or root / "img", rule)
    return RetrievalDataset(TextDB(text or root / "txt" / "winoground.db"), regions), examples


def load_model(
    path: Path,
    size: str | None,
    vocab_size: int,
    img_dim: int,
    device: torch.device,
    head: Head = "rank",
    say: Callable[[str], None] = lambda text: None,
    vocabulary: Vocabulary | None = None,
) -> UniterForRetrieval:
    """A model from a training run (its folder, or one checkpoint's folder), or from a local weights file.

    Args:
        path: folder or file.
        size: for a file: "base", "large" or the path of a configuration JSON; None is "base".
        vocab_size, img_dim: of the data; they must fit the model.
        head: that will score; a missing ranking head is made from the match row of the matching head.
        say: told what was loaded, and whether its training was stopped; warned where weights of unknown captions have
            more word pieces than the data.
        vocabulary: of the data; it must be that of the captions which trained the model, where both are known.

    Raises:
        UserError: nothing loadable there, it is damaged, does not fit the data, or lacks the head or never trained it.
    """
    from cacr_uniter.training.checkpoint import unfinished, verify_weights

    folder = _run_checkpoint(path)
    if folder is not None:
        if size is not None:
            raise UserError(f"--model-size is for weights files; {folder} says its own size")
        config, weights = UniterConfig.from_json(folder / "uniter.json"), folder / "model.safetensors"
    elif path.is_dir():
        raise UserError(f"--checkpoint: {path} holds no checkpoint; give a run's folder or a weights file")
    else:
        config, weights = _published_size(size or "base"), path
    if config.vocab_size < vocab_size or config.img_dim != img_dim:
        raise UserError(
            f"--checkpoint: {path} has a vocabulary of {config.vocab_size} and region features of {config.img_dim} "
            f"numbers, the data {vocab_size} and {img_dim}; they must belong together"
        )
    known = config.vocabulary
    if known is not None and vocabulary is not None and not same_vocabulary(known, vocabulary):
        raise UserError(
            f"--checkpoint: {path} was trained on captions of another vocabulary: {in_words(known)}, those of the data "
            f"have {in_words(vocabulary)}; make the text database with the vocabulary of the run (cacr data import)"
        )
    if known is None and config.vocab_size != vocab_size:
        say(
            f"warning: {path} has a vocabulary of {config.vocab_size} word pieces, the data one of {vocab_size}: "
            "scores mean something only if they number the pieces alike"
        )
    verify_weights(weights)
    model = UniterForRetrieval(config)
    report = load_checkpoint(model, weights)
    lost = [key for key in report.missing if key.startswith(f"{head}_output.")]
    if lost:
        source = " and itm_output, of which it could be made" if head == "rank" else ""
        raise UserError(
            f"--checkpoint: {weights} lacks {', '.join(lost)}{source}: the {head} head would score at random; choose a "
            "head that it has (--head), or fine-tune it first (cacr train)"
        )
    if head not in report.heads:
        raise UserError(
            f"--checkpoint: the {head} head of {weights} was neither trained nor loaded from other weights: it would "
            f"score at random; take --head {' or '.join(report.heads)}"
        )
    say(str(report))
    left = unfinished(path)
    if left is not None:
        say(f"{left}: training is not finished")
    return model.to(device).eval()


def run_rule(path: Path) -> BoxRule | None:
    """The box rule that a checkpoint was trained with, from its run's config.yaml; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    folder = _run_checkpoint(path)
    if folder is None:
        return None
    for config in (folder.parent / RUN_CONFIG, folder.parent.parent / RUN_CONFIG):  # of best/, of checkpoints/step-N/
        if not config.is_file():
            continue
        try:
            data = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
            return BoxRule(data["confidence"], data["max_regions"], data["min_regions"], data["fixed_regions"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise UserError(
                f"{config}: cannot be read as the configuration of a run ({type(error).__name__}); put it right, or "
                f"give the box rule (--confidence, --max-regions, --min-regions, --fixed-regions)"
            ) from error
    return None


def _run_checkpoint(path: Path) -> Path | None:
    from cacr_uniter.training.checkpoint import newest

    if (path / "uniter.json").is_file():
        return path
    return newest(path / "checkpoints")


def _published_size(size: str) -> UniterConfig:
    if size in ("base", "large"):
        return UniterConfig.base() if size == "base" else UniterConfig.large()
    return UniterConfig.from_json(size)


def pick_device(name: str) -> torch.device:
    """The device called "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        UserError: it does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); see `cacr doctor`") from error
    return device
