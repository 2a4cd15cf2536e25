"""Which pairs a training step sees: a pure function of (seed, step, position), so that a resumed run needs no history.

Counter-based generator (Philox): key (seed, purpose), counter (what is drawn). NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cacr_uniter.errors import UserError
from cacr_uniter.training.config import Half

Indices = NDArray[np.int64]

ORDER_IMAGE, ORDER_TEXT, POOL_IMAGE, POOL_TEXT, DROPOUT, VALIDATION = range(6)


def counter_generator(seed: int, purpose: int, *counter: int) -> np.random.Generator:
    """Generator of its own for (seed, purpose, counter), up to three counters."""
    words = np.zeros(4, dtype=np.uint64)
    words[1 : 1 + len(counter)] = counter
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=words))


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step of one process, in [0, 2^63)."""
    return int(counter_generator(seed, DROPOUT, step, rank).integers(2**63))


@dataclass(frozen=True)
class Group:
    """A matched pair at position 0, then the pairs that compete with it.

    Args:
        half: ``image``: one image, captions compete; ``text``: one caption, images compete.
        captions, images: caption and image numbers [1 + negatives or pool].
    """

    half: Half
    captions: Indices
    images: Indices


def _draw_outside(generator: np.random.Generator, n: int, excluded: Indices, size: int) -> Indices:
    """``size`` different numbers of 0..n-1 without those of ``excluded`` (sorted, unique)."""
    free = n - len(excluded)
    drawn = generator.choice(free, size, replace=False, shuffle=False)
    for number in excluded:
        drawn += drawn >= number
    return drawn


class Sampler:
    """Groups of a training step.

    In every epoch each caption is the anchor of one group of each half, in two independent orders. Negatives are drawn
    without replacement: of all captions but the image's own, and of all images but the caption's own.

    Args:
        image_of: image number of every caption [captions].
        n_images: images.
        seed: of the run.
        anchors: groups per half and step, over all processes.
        draws: competitors per group.
    """

    def __init__(self, image_of: Indices, n_images: int, seed: int, anchors: int, draws: int) -> None:
        self.image_of = image_of
        self.n_images = n_images
        self.seed = seed
        self.anchors = anchors
        self.draws = draws
        order = np.argsort(image_of, kind="stable")
        self.captions_of = np.split(order, np.cumsum(np.bincount(image_of, minlength=n_images))[:-1])
        self._orders: dict[int, tuple[int, Indices]] = {}

    def check(self, halves: tuple[Half, ...]) -> None:
        """Refuses more negatives than some anchor of these halves has competitors.

        Raises:
            UserError: names the option.
        """
        most = max(map(len, self.captions_of))
        competitors = {
            "image": (len(self.image_of) - most, "captions of other images"),
            "text": (self.n_images - 1, "other images"),
        }
        for half in halves:
            free, what = competitors[half]
            if self.draws > free:
                raise UserError(
                    f"{self.draws} negatives are wanted of {free} {what}: give a smaller batch.pool (mining hard) or "
                    "batch.negatives"
                )

    def _anchor(self, purpose: int, position: int) -> int:
        epoch, place = divmod(position, len(self.image_of))
        known = self._orders.get(purpose)
        if known is None or known[0] != epoch:
            known = (epoch, counter_generator(self.seed, purpose, epoch).permutation(len(self.image_of)))
            self._orders[purpose] = known
        return int(known[1][place])

    def group(self, step: int, index: int, half: Half) -> Group:
        """Group ``index`` (0 <= index < anchors) of optimizer step ``step`` (from 0), the same in any process."""
        size = self.draws
        if half == "image":
            caption = self._anchor(ORDER_IMAGE, step * self.anchors + index)
            image = int(self.image_of[caption])
            generator = counter_generator(self.seed, POOL_IMAGE, step, index)
            own = self.captions_of[image]
            drawn = _draw_outside(generator, len(self.image_of), own, size)
            captions = np.concatenate(([caption], drawn))
            images = np.full(size + 1, image, dtype=np.int64)
        else:
            caption = self._anchor(ORDER_TEXT, step * self.anchors + index)
            image = int(self.image_of[caption])
            generator = counter_generator(self.seed, POOL_TEXT, step, index)
            drawn = _draw_outside(generator, self.n_images, np.array([image]), size)
            images = np.concatenate(([image], drawn))
            captions = np.full(size + 1, caption, dtype=np.int64)
        return Group(half, captions, images)

    def step_groups(self, step: int, halves: tuple[Half, ...], rank: int = 0, processes: int = 1) -> list[Group]:
        """The groups of one process: indices rank, rank + processes, ... of each half."""
        return [self.group(step, i, half) for half in halves for i in range(rank, self.anchors, processes)]
