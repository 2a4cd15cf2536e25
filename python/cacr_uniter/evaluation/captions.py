"""The captions of published Winoground examples as a text database, so that a model can read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cacr_uniter.data.text_db import TextDBWriter
from cacr_uniter.data.tokenize import WordPieceTokenizer
from cacr_uniter.evaluation.examples import read_examples

DATABASE = "winoground.db"


def import_examples(source: Path, out: Path, vocab: Path, lowercase: bool | None = None) -> dict[str, Any]:
    """Tokenises the captions of an examples file into `out/winoground.db`.

    Caption k of example i gets the id `<i>_c<k>`.

    Args:
        source: examples.jsonl, a parquet file or winoground.json, see `read_examples`.
        out: folder that will hold the database.
        vocab: local vocab.txt; UNITER uses bert-base-cased.
        lowercase: see `WordPieceTokenizer`.

    Returns:
        folder, examples, captions, and the longest caption in word pieces.

    Raises:
        UserError: an unreadable file, or the database exists.
    """
    examples, tokenizer = read_examples(source), WordPieceTokenizer(vocab, lowercase)
    longest = 0
    with TextDBWriter(out / DATABASE, tokenizer.special_ids, len(tokenizer), vocab.name) as texts:
        for example in examples:
            for k, (caption, image) in enumerate(zip(example.captions, example.images, strict=True)):
                ids = tokenizer.encode(caption)
                longest = max(longest, len(ids))
                texts.write(f"{example.id}_c{k}", ids, image, raw=caption, toked_caption=tokenizer.pieces(ids))
    return {
        "folder": str(out / DATABASE),
        "examples": len(examples),
        "captions": 2 * len(examples),
        "longest": longest,
    }
