"""The published text database: reader and writer. Knows the format, not tokenisers or models.

A folder with data.mdb (caption id -> LZ4 frame of a msgpack map), meta.json, id2len.json, txt2img.json, img2txts.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from cacr_uniter.data import codec
from cacr_uniter.data.lmdb_store import Reader, Writer, read_json
from cacr_uniter.data.vocabulary import Vocabulary
from cacr_uniter.errors import UserError
from cacr_uniter.files import write_json

SPECIAL_IDS = ("CLS", "SEP")
PUBLISHED_VOCABULARY = 28996
WORDS = {int: "whole numbers", str: "names", list: "lists"}


class Caption(NamedTuple):
    """One caption record: word-piece ids without [CLS] and [SEP], image name, and the whole record."""

    input_ids: list[int]
    image: str
    record: dict[str, Any]


class TextDB:
    """Reader of a text database.

    Args:
        folder: the `.db` folder.

    Attributes:
        meta: the database's meta.json.
        cls, sep: ids of [CLS] and [SEP].
        vocab_size: every id is below it.
        lengths: caption id -> word pieces without [CLS] and [SEP], in the file's order.
        txt2img: caption id -> image name.
        img2txts: image name -> caption ids.

    Raises:
        UserError: a file is missing or damaged, or the special ids are absent.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._reader = Reader(self.folder)
        self.meta: dict[str, Any] = read_json(self.folder / "meta.json", "text database")
        self.lengths: dict[str, int] = read_json(self.folder / "id2len.json", "text database")
        self.txt2img: dict[str, str] = read_json(self.folder / "txt2img.json", "text database")
        self.img2txts: dict[str, list[str]] = read_json(self.folder / "img2txts.json", "text database")
        kinds = (("meta", self.meta, object), ("id2len", self.lengths, int), ("txt2img", self.txt2img, str))
        for name, values, kind in (*kinds, ("img2txts", self.img2txts, list)):
            if not isinstance(values, dict) or not all(isinstance(value, kind) for value in values.values()):
                raise UserError(
                    f"text database {self.folder}: {name}.json is not an object"
                    f"{'' if kind is object else f' of {WORDS[kind]}'}; create it again"
                )
        missing = [name for name in SPECIAL_IDS if not isinstance(self.meta.get(name), int)]
        if missing:
            raise UserError(f"text database {self.folder}: meta.json lacks the ids of {', '.join(missing)}")
        self.cls, self.sep = int(self.meta["CLS"]), int(self.meta["SEP"])
        self.vocab_size = self._vocab_size()

    def _vocab_size(self) -> int:
        """End of meta.json's v_range, or of the published vocabulary where an older database has none."""
        given = self.meta.get("v_range", [0, PUBLISHED_VOCABULARY])
        if not (isinstance(given, list) and len(given) == 2 and all(type(end) is int for end in given)):
            raise UserError(f"text database {self.folder}: v_range in meta.json is {given!r}, expected [first, end]")
        if not max(self.cls, self.sep) < given[1]:
            raise UserError(f"text database {self.folder}: CLS and SEP lie outside the vocabulary of {given[1]}")
        return int(given[1])

    @property
    def vocabulary(self) -> Vocabulary:
        """Size and special ids, to tell vocabularies apart.

        Without the start of v_range: the published program and ours begin it at different places of one vocabulary.
        """
        known = {"size": self.vocab_size, "CLS": self.cls, "SEP": self.sep}
        return known | {name: value for name, value in self.meta.items() if name == "MASK" and type(value) is int}

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, max_length: int | None = None) -> list[str]:
        """Caption ids in the database's order, those of at most `max_length` word pieces when it is given."""
        return [key for key, length in self.lengths.items() if max_length is None or length <= max_length]

    def caption(self, caption_id: str) -> Caption:
        """One caption.

        Raises:
            UserError: no such caption, or its record is damaged.
        """
        data = self._reader.get(caption_id)
        try:
            record = codec.unpack_text(data)
            input_ids, image = record["input_ids"], record["img_fname"]
            if not isinstance(input_ids, list) or not all(type(piece) is int and piece >= 0 for piece in input_ids):
                raise ValueError("input_ids is not a list of ids")
            if input_ids and max(input_ids) >= self.vocab_size:
                raise ValueError(f"piece {max(input_ids)} is beyond the vocabulary of {self.vocab_size}")
            if not isinstance(image, str):
                raise ValueError("img_fname is not a string")
        except (ValueError, KeyError) as error:
            raise UserError(
                f"text database {self.folder}: record {caption_id!r} is damaged ({error}); copy or create it again"
            ) from error
        return Caption(input_ids, image, record)

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        self._reader.close()


class TextDBWriter:
    """Writes a text database; use it as a context manager. The folder appears only when the block ends without error.

    Args:
        folder: the `.db` folder to make.
        special_ids: ids of UNK, CLS, SEP and MASK.
        vocab_size: number of word pieces.
        tokenizer: name of the vocabulary, kept in meta.json.
        meta: further entries of meta.json.
    """

    def __init__(
        self,
        folder: str | Path,
        special_ids: dict[str, int],
        vocab_size: int,
        tokenizer: str,
        meta: dict[str, Any] | None = None,
    ) -> None:
        missing = [name for name in ("UNK", "CLS", "SEP", "MASK") if name not in special_ids]
        if missing:
            raise ValueError(f"special_ids: expected UNK, CLS, SEP and MASK, missing {', '.join(missing)}")
        self._writer = Writer(Path(folder))
        first = max(special_ids.values()) + 1
        bounds = {"v_range": [first, vocab_size], "tokenizer": tokenizer}
        self._meta = {**(meta or {}), **special_ids, **bounds}
        self._lengths: dict[str, int] = {}
        self._txt2img: dict[str, str] = {}
        self._img2txts: dict[str, list[str]] = {}

    def write(self, caption_id: str, input_ids: Sequence[int], image: str, **fields: Any) -> None:
        """Adds one caption.

        Args:
            caption_id: unique id.
            input_ids: word pieces without [CLS] and [SEP].
            image: npz name of the matching image.
            fields: further fields of the record, such as `raw` and `toked_caption`.

        Raises:
            ValueError: the id was written before.
        """
        if caption_id in self._lengths:
            raise ValueError(f"caption_id: expected a new id, got {caption_id!r} a second time")
        pieces = [int(piece) for piece in input_ids]
        self._writer.put(caption_id, codec.pack_text({**fields, "input_ids": pieces, "img_fname": image}))
        self._lengths[caption_id] = len(pieces)
        self._txt2img[caption_id] = image
        self._img2txts.setdefault(image, []).append(caption_id)

    @property
    def longest(self) -> int:
        """Word pieces of the longest caption written so far."""
        return max(self._lengths.values(), default=0)

    def close(self) -> None:
        """Writes the JSON files and gives the folder its name."""
        folder = self._writer.partial
        write_json(folder / "meta.json", self._meta)
        write_json(folder / "id2len.json", self._lengths)
        write_json(folder / "txt2img.json", self._txt2img)
        write_json(folder / "img2txts.json", self._img2txts)
        self._writer.finish()

    def __enter__(self) -> TextDBWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.abandon(keep=False)
