"""Groups whose matched pairs are each other's negatives: caption i competes with the captions of other anchors, image i
with their images, and both halves read the same pairs.

Every caption and every image of a step is then right once and wrong as often as any other, so that nothing which only
captions, or only images, show can lower the loss. From random weights this is what makes matching learnable in minutes:
with negatives drawn apart, the noise of such one-sided features drowns it. NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cacr_uniter.errors import UserError
from cacr_uniter.files import parse_json
from cacr_uniter.training.config import Half
from cacr_uniter.training.sampling import Group, Indices, Sampler, counter_generator

SHARED = 100
"""Purpose number of the generator, apart from those of the other sampler."""

CONTRASTS = "contrasts.json"


@dataclass(frozen=True)
class Contrast:
    """Two images and, for each, the captions that are true of it and false of the other, by number."""

    images: tuple[int, int]
    captions: tuple[Indices, Indices]


def read_contrasts(folder: Path, caption_ids: list[str], image_names: list[str]) -> list[Contrast]:
    """The contrasts of a text database that are whole in the data set: `contrasts.json` beside its records.

    The file is a list of {"images": [name, name], "captions": [[id, ...], [id, ...]]}.

    Raises:
        UserError: no such file, damaged, or none of them is in the data set.
    """
    path = folder / CONTRASTS
    caption_of = {name: number for number, name in enumerate(caption_ids)}
    image_of = {name: number for number, name in enumerate(image_names)}
    try:
        entries = parse_json(path.read_text(encoding="utf-8"))
        found = [
            Contrast(
                (image_of[entry["images"][0]], image_of[entry["images"][1]]),
                (
                    np.array([caption_of[c] for c in entry["captions"][0] if c in caption_of], dtype=np.int64),
                    np.array([caption_of[c] for c in entry["captions"][1] if c in caption_of], dtype=np.int64),
                ),
            )
            for entry in entries
            if all(image in image_of for image in entry["images"])
        ]
    except FileNotFoundError as error:
        raise UserError(
            f"batch.contrasts: {path} is missing; only sets of `cacr data scenes` have it, set it to false"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"batch.contrasts: {path} is damaged ({type(error).__name__}: {error})") from error
    whole = [contrast for contrast in found if all(map(len, contrast.captions))]
    if not whole:
        raise UserError(f"batch.contrasts: {path} has no contrast of captions in the data set")
    return whole


class SharedSampler(Sampler):
    """Groups of a training step that share their pairs.

    Anchors are drawn anew for every step, no image twice. With contrasts, anchors 2 j and 2 j + 1 are the two sides of
    one contrast and each other's first negative.

    Args:
        image_of: image number of every caption [captions].
        n_images: images.
        seed: of the run.
        anchors: matched pairs A of a step, over all processes.
        draws: negatives K of a group, less than A.
        contrasts: draw anchors from these; none: any captions.

    Raises:
        UserError: too few anchors, images or contrasts.
    """

    def __init__(
        self,
        image_of: Indices,
        n_images: int,
        seed: int,
        anchors: int,
        draws: int,
        contrasts: list[Contrast] | None = None,
    ) -> None:
        if draws >= anchors:
            raise UserError(
                f"batch.negatives is {draws}: batch.mining shared takes them from the other anchors, give less than "
                f"batch.anchors {anchors}"
            )
        if contrasts is not None and (anchors % 2 or anchors > 2 * len(contrasts)):
            raise UserError(
                f"batch.anchors is {anchors} with batch.contrasts: give an even number, at most {2 * len(contrasts)}"
            )
        if anchors > n_images:
            raise UserError(f"batch.anchors is {anchors}, there are {n_images} images: give fewer anchors")
        super().__init__(image_of, n_images, seed, anchors, draws)
        self.contrasts = contrasts
        self.images = np.unique(image_of)
        self._step: tuple[int, Indices, Indices] | None = None

    def anchor_pairs(self, step: int) -> tuple[Indices, Indices]:
        """Captions and images [anchors] of a step's matched pairs, the same in any process."""
        if self._step is None or self._step[0] != step:
            generator = counter_generator(self.seed, SHARED, step)
            if self.contrasts is None:
                images = generator.choice(self.images, self.anchors, replace=False)
                captions = np.array([generator.choice(self.captions_of[i]) for i in images.tolist()], dtype=np.int64)
            else:
                drawn = generator.choice(len(self.contrasts), self.anchors // 2, replace=False)
                sides = [(self.contrasts[n], k) for n in drawn.tolist() for k in (0, 1)]
                images = np.array([contrast.images[k] for contrast, k in sides], dtype=np.int64)
                captions = np.array([generator.choice(c.captions[k]) for c, k in sides], dtype=np.int64)
            self._step = (step, captions, images)
        return self._step[1], self._step[2]

    def group(self, step: int, index: int, half: Half) -> Group:
        """Group `index` (0 <= index < anchors) of optimizer step `step` (from 0).

        Text groups look forward and image groups backward, so that both use the pairs (caption i, image i + distance).
        """
        captions, images = self.anchor_pairs(step)
        numbers = np.concatenate(([index], self._rivals(index, 1 if half == "text" else -1)))
        same = np.full(len(numbers), index)
        if half == "text":
            return Group(half, captions[same], images[numbers])
        return Group(half, captions[numbers], images[same])

    def _rivals(self, index: int, direction: int) -> Indices:
        if self.contrasts is None:
            return (index + direction * np.arange(1, self.draws + 1)) % self.anchors
        even = (index + 2 * direction * np.arange(1, self.anchors // 2)) % self.anchors
        return np.concatenate(([index ^ 1], even, even ^ 1))[: self.draws]
