"""Retrieval recall over the full score matrix. NumPy only.

Z [n_txt, n_img] holds the score of every caption with every image. A rank counts from 1:

    rank of image v for caption t   = 1 + #{v' : Z[t, v'] > Z[t, v]} + #{ties before v}
    IR R@k = share of captions whose image has rank <= k among the images
    TR R@k = share of images whose best caption has rank <= k among the captions

Ties: "index" counts an equal score before the matching one if it comes first in the data, as sorting would;
"pessimistic" counts every equal score of a pair that does not match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ties = Literal["index", "pessimistic"]
CUTS = (1, 5, 10)
ROWS = 512


def image_ranks(scores: NDArray[np.float32], image_of: NDArray[np.int64], ties: Ties = "index") -> NDArray[np.int64]:
    """Rank of every caption's image among the images [n_txt].

    Args:
        scores: Z [n_txt, n_img], finite.
        image_of: number of every caption's image [n_txt].
        ties: rule for equal scores.
    """
    columns = np.arange(scores.shape[1])
    ranks = np.empty(len(scores), dtype=np.int64)
    for start in range(0, len(scores), ROWS):
        block, own = np.asarray(scores[start : start + ROWS]), image_of[start : start + ROWS, None]
        mine = np.take_along_axis(block, own, axis=1)
        rivals = columns < own if ties == "index" else columns != own
        ranks[start : start + ROWS] = 1 + (block > mine).sum(axis=1) + ((block == mine) & rivals).sum(axis=1)
    return ranks


def caption_ranks(scores: NDArray[np.float32], image_of: NDArray[np.int64], ties: Ties = "index") -> NDArray[np.int64]:
    """Best rank of every image's captions among the captions [n_img]; an image without caption gets n_txt + 1.

    Captions of the same image are no rivals: of several, the best scored counts, and a tie between them is no tie.
    """
    n_txt, n_img = scores.shape
    ranks = np.full(n_img, n_txt + 1, dtype=np.int64)
    position = np.arange(n_txt)
    for image in np.unique(image_of).tolist():
        column, own = np.asarray(scores[:, image]), image_of == image
        best = column[own].max()
        first = int(position[own & (column == best)][0])
        rivals = ~own & (position < first) if ties == "index" else ~own
        ranks[image] = 1 + int((column > best).sum()) + int(((column == best) & rivals).sum())
    return ranks


def recall(scores: NDArray[np.float32], image_of: NDArray[np.int64], ties: Ties = "index") -> dict[str, float]:
    """Recalls in percent: ir_r1, ir_r5, ir_r10, tr_r1, tr_r5, tr_r10, their means, and rsum, the sum of the six."""
    found = {
        **_at_cuts("ir", image_ranks(scores, image_of, ties)),
        **_at_cuts("tr", caption_ranks(scores, image_of, ties)),
    }
    six = list(found.values())
    return found | {
        "ir_mean": float(np.mean(six[:3])),
        "tr_mean": float(np.mean(six[3:])),
        "r_mean": float(np.mean(six)),
        "rsum": float(np.sum(six)),
    }


def _at_cuts(name: str, ranks: NDArray[np.int64]) -> dict[str, float]:
    return {f"{name}_r{k}": 100 * float((ranks <= k).mean()) for k in CUTS}


def subset(image_of: Sequence[int], n_images: int) -> list[int]:
    """Numbers of the captions whose image is among the first `n_images`."""
    return [caption for caption, image in enumerate(image_of) if image < n_images]
