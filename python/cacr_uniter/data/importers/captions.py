"""`import_captions`: a Karpathy-split JSON (Flickr30k, COCO) into text databases, one a split."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cacr_uniter.data.names import image_namer
from cacr_uniter.data.text_db import TextDBWriter
from cacr_uniter.data.tokenize import WordPieceTokenizer
from cacr_uniter.errors import UserError
from cacr_uniter.files import parse_json

PUBLISHED_SIZES = {
    "flickr30k": {"train": (29_000, 145_000), "val": (1_014, 5_070), "test": (1_000, 5_000)},
}
Progress = Callable[[str, int, int], None]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"captions {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"captions {path}: not valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"captions {path}: expected an object with a list `images` (Karpathy's dataset JSON)")
    return content


def _image_id(filename: str) -> int:
    digits = re.search(r"(\d+)$", Path(filename).stem)
    return int(digits[1]) if digits else -1


def _write_image(writer: TextDBWriter, tokenizer: WordPieceTokenizer, image: dict[str, Any], name: str) -> int:
    """Writes the captions of one image and returns their number."""
    for sentence in image["sentences"]:
        ids = tokenizer.encode(sentence["raw"])
        writer.write(
            str(sentence["sentid"]),
            ids,
            name,
            tokens=sentence.get("tokens", []),
            raw=sentence["raw"],
            imgid=image.get("imgid", sentence.get("imgid", -1)),
            sentid=sentence["sentid"],
            image_id=_image_id(image["filename"]),
            toked_caption=tokenizer.pieces(ids),
        )
    return len(image["sentences"])


def import_captions(
    source: str | Path,
    out: str | Path,
    vocab: str | Path,
    *,
    names: str = "auto",
    splits: Sequence[str] | None = None,
    lowercase: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Tokenises captions into `itm_<data set>_<split>.db` folders.

    Args:
        source: Karpathy's dataset JSON: images[] with filename, split, imgid, sentences[] (raw, sentid, tokens).
        out: folder that will hold the databases.
        vocab: local vocab.txt; UNITER uses bert-base-cased.
        names: how npz names are made of file names, see `image_namer`; "auto" follows the JSON's `dataset`.
        splits: splits to write; None: all.
        lowercase: see `WordPieceTokenizer`.
        progress: called with ("images", done, total) after every image.

    Returns:
        For each split: folder, images, captions, longest caption, and a note where the published counts differ.

    Raises:
        UserError: an unreadable or strange file, an unknown split, or an existing database.
    """
    path, target = Path(source), Path(out)
    content, tokenizer = _read(path), WordPieceTokenizer(vocab, lowercase)
    dataset = str(content.get("dataset", path.stem.removeprefix("dataset_")))
    if names == "auto":
        names = dataset if dataset in ("flickr30k", "coco") else "keep"
    namer = image_namer(names)
    images: dict[str, list[dict[str, Any]]] = {}
    for image in content["images"]:
        if not isinstance(image, dict):
            raise UserError(f"captions {path}: an image is a {type(image).__name__} instead of an object")
        images.setdefault(str(image.get("split")), []).append(image)
    chosen = list(images) if splits is None else list(splits)
    unknown = [split for split in chosen if split not in images]
    if unknown:
        raise UserError(f"captions {path}: no split {', '.join(unknown)}; it has {', '.join(images)}")
    done, total = 0, sum(len(images[split]) for split in chosen)
    reports: dict[str, dict[str, Any]] = {}
    for split in chosen:
        folder, captions = target / f"itm_{dataset}_{split}.db", 0
        meta = {"source": path.name, "split": split, "lowercase": tokenizer.lowercase}
        with TextDBWriter(folder, tokenizer.special_ids, len(tokenizer), Path(vocab).name, meta) as writer:
            for image in images[split]:
                try:
                    captions += _write_image(writer, tokenizer, image, namer(str(image["filename"])))
                except (KeyError, TypeError, ValueError) as error:
                    where = image.get("filename", f"number {done + 1}")
                    raise UserError(f"captions {path}: image {where} is not as expected ({error!r})") from error
                done += 1
                if progress is not None:
                    progress("images", done, total)
            longest = writer.longest
        reports[split] = {
            "folder": str(folder),
            "images": len(images[split]),
            "captions": captions,
            "longest_caption": longest,
            "note": _compare(dataset, split, len(images[split]), captions),
        }
    return reports


def _compare(dataset: str, split: str, images: int, captions: int) -> str:
    published = PUBLISHED_SIZES.get(dataset, {}).get(split)
    if published is None or published == (images, captions):
        return ""
    return f"other than the published split, which has {published[0]} images and {published[1]} captions"
