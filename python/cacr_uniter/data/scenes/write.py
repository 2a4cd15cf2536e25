"""Draws a scene data set and writes it in the published database formats, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cacr_uniter.data.image_writer import ImageDBWriter
from cacr_uniter.data.scenes.catalogue import Catalogue
from cacr_uniter.data.scenes.painting import paint
from cacr_uniter.data.scenes.sampling import Contrast, Sampler
from cacr_uniter.data.scenes.settings import SceneSettings
from cacr_uniter.data.scenes.shapes import NOUNS, Shapes
from cacr_uniter.data.scenes.sprites import Sprites
from cacr_uniter.data.scenes.statements import Combination, Scene, Statement
from cacr_uniter.data.text_db import TextDBWriter
from cacr_uniter.data.tokenize import WordPieceTokenizer, train_vocabulary, write_vocabulary
from cacr_uniter.errors import UserError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how many are done, how many there are)."""

SPLITS = ("train", "val", "winoground")

_CATALOGUE, _HELD_OUT, _DRAW, _CAPTION, _PAINT = range(5)


@dataclass(frozen=True)
class Picture:
    """One picture: its npz name, its scene, and what its captions say."""

    name: str
    scene: Scene
    statements: list[Statement]


def write_scenes(
    out: Path,
    settings: SceneSettings,
    progress: Progress = lambda what, done, total: None,
    workers: int = 1,
) -> dict[str, Any]:
    """Writes `out`: images/, img/, txt/{train,val,winoground}.db/, vocab.txt, winoground.json and scenes.json.

    Everything is first written to a hidden neighbour of `out`, which is renamed at the end.

    Args:
        out: folder to make; must not exist.
        settings: what is drawn; with the files they name, they alone decide the content.
        progress: told of every step.
        workers: processes that paint.

    Returns:
        The content of scenes.json: settings, numbers of pictures and captions, held-out combinations.

    Raises:
        UserError: `out` exists, an option is wrong, a folder cannot be written.
    """
    settings.check()
    if settings.vocab is not None:
        WordPieceTokenizer(settings.vocab)
    if out.exists():
        raise UserError(f"--out: {out} exists already; remove it or choose another folder")
    catalogue, sampler = _world(settings)
    pictures, kinds = _draw(settings, sampler, progress)
    with _renamed_when_complete(out) as folder:
        _write_pictures(folder, settings.seed, pictures, catalogue, progress, workers)
        _write_texts(folder, settings, pictures)
        _write_quadruples(folder, pictures["winoground"], kinds)
        description = _describe(settings, sampler, pictures)
        (folder / "scenes.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    return description


def _world(settings: SceneSettings) -> tuple[Catalogue, Sampler]:
    catalogue: Catalogue
    if settings.sprites is not None:
        catalogue = Sprites(settings.sprites, settings.things, np.random.default_rng([settings.seed, _CATALOGUE]))
    else:
        if settings.things is not None and settings.things > len(NOUNS):
            raise UserError(f"--things is {settings.things}: there are {len(NOUNS)} shapes")
        catalogue = Shapes(settings.things, settings.attributes)
    held_out = np.random.default_rng([settings.seed, _HELD_OUT])
    return catalogue, Sampler(
        catalogue,
        settings.relations,
        settings.attributes,
        settings.objects,
        settings.size,
        settings.held_out,
        held_out,
    )


def _draw(settings: SceneSettings, sampler: Sampler, progress: Progress) -> tuple[dict[str, list[Picture]], list[str]]:
    """Pictures of each split, two after the other from one contrast; and the kind of every quadruple."""
    trained: set[Combination] = set()
    kinds = ["seen" if i % 2 == 0 or not sampler.held_out else "held_out" for i in range(settings.n_winoground)]
    accepts: dict[str, Callable[[Statement], bool]] = {
        "train": sampler.trains,
        "seen": lambda s: s.combinations() <= trained,
        "held_out": lambda s: (frozenset((s.first.noun, s.second.noun)), s.axis) in sampler.held_out,
    }
    rules_of = {
        "train": ["train"] * (settings.n_train // 2),
        "val": ["seen"] * (settings.n_val // 2),
        "winoground": kinds,
    }
    pictures: dict[str, list[Picture]] = {}
    for split, rules in rules_of.items():
        pictures[split] = []
        for i, rule in enumerate(rules):
            key = [settings.seed, SPLITS.index(split), i]
            contrast = sampler.contrast(np.random.default_rng([*key, _DRAW]), accepts[rule])
            captions = 1 if split == "winoground" else settings.captions
            pictures[split] += _pictures(split, i, contrast, captions, sampler, np.random.default_rng([*key, _CAPTION]))
            if split == "train":
                trained.update(c for p in pictures[split][-2:] for s in p.statements for c in s.combinations())
            progress(f"{split} scenes", i + 1, len(rules))
    return pictures, kinds


def _pictures(
    split: str, number: int, contrast: Contrast, captions: int, sampler: Sampler, rng: np.random.Generator
) -> list[Picture]:
    found = []
    for k in (0, 1):
        scene, statement = contrast.scenes[k], contrast.statements[k]
        statements = [statement, *sampler.further(scene, captions - 1, rng, {statement.caption()})]
        found.append(Picture(f"scenes_{split}_{2 * number + k:06d}.npz", scene, statements))
    return found


def _write_pictures(
    folder: Path,
    seed: int,
    pictures: dict[str, list[Picture]],
    catalogue: Catalogue,
    progress: Progress,
    workers: int,
) -> None:
    (folder / "images").mkdir()
    jobs = [
        (picture.scene, [seed, SPLITS.index(split), i, _PAINT])
        for split, own in pictures.items()
        for i, picture in enumerate(own)
    ]
    names = [picture.name for own in pictures.values() for picture in own]
    with ImageDBWriter(folder / "img") as images, closing(paint(jobs, catalogue, workers)) as painted:
        for done, (name, rendered) in enumerate(zip(names, painted, strict=True), 1):
            images.write(name, rendered.features, rendered.norm_bb, rendered.conf)
            (folder / "images" / name.replace(".npz", ".png")).write_bytes(rendered.png)
            progress("pictures", done, len(names))


def _write_texts(folder: Path, settings: SceneSettings, pictures: dict[str, list[Picture]]) -> None:
    vocab = folder / "vocab.txt"
    if settings.vocab is None:
        write_vocabulary(train_vocabulary(s.caption() for p in pictures["train"] for s in p.statements), vocab)
    else:
        shutil.copyfile(settings.vocab, vocab)
    tokenizer = WordPieceTokenizer(vocab, lowercase=settings.vocab is not None and "uncased" in str(settings.vocab))
    (folder / "txt").mkdir()
    numbers = _caption_numbers(pictures)
    for split, own in pictures.items():
        text_folder = folder / "txt" / f"{split}.db"
        with TextDBWriter(text_folder, tokenizer.special_ids, len(tokenizer), "scenes") as texts:
            for imgid, picture in enumerate(own):
                for caption_id, statement in zip(numbers[picture.name], picture.statements, strict=True):
                    raw = statement.caption()
                    ids = tokenizer.encode(raw)
                    texts.write(
                        caption_id,
                        ids,
                        picture.name,
                        tokens=raw.split(),
                        raw=raw,
                        imgid=imgid,
                        sentid=int(caption_id),
                        image_id=imgid,
                        toked_caption=tokenizer.pieces(ids),
                    )
        contrasts = _contrasts(own, numbers)
        (text_folder / "contrasts.json").write_text(json.dumps(contrasts), encoding="utf-8")


def _caption_numbers(pictures: dict[str, list[Picture]]) -> dict[str, list[str]]:
    """Caption ids of every picture, counted through all splits."""
    numbers: dict[str, list[str]] = {}
    count = 0
    for own in pictures.values():
        for picture in own:
            numbers[picture.name] = [str(count + i) for i in range(len(picture.statements))]
            count += len(picture.statements)
    return numbers


def _contrasts(pictures: list[Picture], numbers: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Of every two pictures that differ as little as they can, the captions that tell them apart.

    [{"images": [npz name, npz name], "captions": [[ids true of the first only], [ids true of the second only]]}]
    """

    def telling(own: Picture, other: Picture) -> list[str]:
        said = zip(numbers[own.name], own.statements, strict=True)
        return [caption_id for caption_id, statement in said if statement.holds(other.scene) is False]

    return [
        {"images": [one.name, two.name], "captions": [telling(one, two), telling(two, one)]}
        for one, two in zip(pictures[::2], pictures[1::2], strict=True)
    ]


def _write_quadruples(folder: Path, pictures: list[Picture], kinds: list[str]) -> None:
    numbers = json.loads((folder / "txt" / "winoground.db" / "img2txts.json").read_text(encoding="utf-8"))
    quadruples = []
    for i, (one, two, kind) in enumerate(zip(pictures[::2], pictures[1::2], kinds, strict=True)):
        statement = one.statements[0]
        quadruples.append(
            {
                "id": i,
                "caption_0": statement.caption(),
                "caption_1": two.statements[0].caption(),
                "image_0": one.name,
                "image_1": two.name,
                "caption_ids": [numbers[one.name][0], numbers[two.name][0]],
                "tag": statement.tag,
                "collapsed_tag": "Object" if statement.attribute is None else "Relation",
                "num_main_preds": 1,
                "secondary_tag": "",
                "split": kind,
            }
        )
    (folder / "winoground.json").write_text(json.dumps(quadruples, indent=1), encoding="utf-8")


def _describe(settings: SceneSettings, sampler: Sampler, pictures: dict[str, list[Picture]]) -> dict[str, Any]:
    return {
        "settings": settings.as_dict(),
        "nouns": list(sampler.catalogue.nouns),
        "pictures": {split: len(own) for split, own in pictures.items()},
        "captions": {split: sum(len(p.statements) for p in own) for split, own in pictures.items()},
        "held_out": sorted([*sorted(nouns), axis] for nouns, axis in sampler.held_out),
    }


@contextmanager
def _renamed_when_complete(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that gets its name if the block succeeds, and is removed if it does not."""
    hidden = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir()
        yield hidden
        hidden.rename(out)
    except OSError as error:
        raise UserError(f"--out: {out} could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
