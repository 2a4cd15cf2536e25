"""WordPiece: captions to ids with a local vocabulary file, and a small deterministic vocabulary trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from cacr_uniter.errors import UserError

SPECIALS = {"PAD": "[PAD]", "UNK": "[UNK]", "CLS": "[CLS]", "SEP": "[SEP]", "MASK": "[MASK]"}


class WordPieceTokenizer:
    """BERT's basic tokenising and word pieces.

    A caption is split on white space first and every word is tokenised alone; words of which nothing remains are
    skipped. Text that looks like a special token, such as "[SEP]", is cut into ordinary pieces.

    Args:
        vocab: path of a vocab.txt, one piece a line, ids by line number.
        lowercase: lower-case and strip accents; None: only if the path says "uncased".

    Raises:
        UserError: the file is missing, not text, has a piece twice, lacks a special token, or [PAD] is not id 0.
    """

    def __init__(self, vocab: str | Path, lowercase: bool | None = None) -> None:
        self.path = Path(vocab)
        pieces = self._read(self.path)
        self.vocab = {piece: index for index, piece in enumerate(pieces)}
        if len(self.vocab) != len(pieces):
            twice = next(piece for piece, count in Counter(pieces).items() if count > 1)
            raise UserError(f"vocabulary {self.path}: piece {twice!r} occurs twice; ids would be ambiguous")
        missing = [token for token in SPECIALS.values() if token not in self.vocab]
        if missing:
            raise UserError(f"vocabulary {self.path}: lacks {', '.join(missing)}; give a BERT vocab.txt")
        if self.vocab[SPECIALS["PAD"]] != 0:
            raise UserError(f"vocabulary {self.path}: [PAD] must be the first line, it is the model's padding id 0")
        self.lowercase = "uncased" in str(self.path).lower() if lowercase is None else lowercase
        self.special_ids = {name: self.vocab[token] for name, token in SPECIALS.items() if name != "PAD"}
        self._pieces = pieces
        model = WordPiece(self.vocab, unk_token=SPECIALS["UNK"], max_input_chars_per_word=100)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = BertNormalizer(lowercase=self.lowercase)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._word = lru_cache(maxsize=65536)(self._encode_word)

    @staticmethod
    def _read(path: Path) -> list[str]:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"vocabulary {path}: cannot be read ({error.strerror}); give a BERT vocab.txt") from error
        except UnicodeDecodeError as error:
            raise UserError(f"vocabulary {path}: is not UTF-8 text; give a BERT vocab.txt") from error
        return text.removesuffix("\n").split("\n")

    def __len__(self) -> int:
        return len(self._pieces)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption, without [CLS] and [SEP]."""
        return [piece for word in caption.split() for piece in self._word(word)]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The pieces of `ids`; a piece that continues a word starts with `##`."""
        return [self._pieces[index] for index in ids]


def train_vocabulary(captions: Iterable[str], size: int = 2000, lowercase: bool = False) -> list[str]:
    """Learns word pieces from captions: the most frequent pair of neighbouring pieces is merged again and again.

    Deterministic: ties go to the pair that sorts first. Every character of the captions is a piece in both positions,
    so no caption has an unknown word.

    Args:
        captions: raw texts.
        size: largest number of pieces, special tokens included.
        lowercase: lower-case and strip accents first, as `WordPieceTokenizer(lowercase=True)` does.

    Returns:
        The lines of a vocab.txt: special tokens, characters, merged pieces.

    Raises:
        ValueError: `size` is too small for the special tokens and the characters.
    """
    normalizer, splitter = BertNormalizer(lowercase=lowercase), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        for word in caption.split():
            counts.update(piece for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(word)))
    words = {word: [word[0], *("##" + char for char in word[1:])] for word in sorted(counts)}
    characters = sorted({char for word in words for char in word})
    vocabulary = [*SPECIALS.values(), *characters, *("##" + char for char in characters)]
    if size < len(vocabulary):
        raise ValueError(f"size: expected at least {len(vocabulary)} for the characters of the captions, got {size}")
    known = set(vocabulary)
    pairs: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[str]] = {}

    def count_pairs(word: str, sign: int) -> None:
        for pair in zip(words[word], words[word][1:]):
            pairs[pair] += sign * counts[word]
            where.setdefault(pair, set()).add(word)

    for word in words:
        count_pairs(word, 1)
    while len(vocabulary) < size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] <= 0:
            break
        merged = best[0] + best[1].removeprefix("##")
        for word in where.pop(best):
            count_pairs(word, -1)
            pieces, result = words[word], []
            while pieces:
                join = tuple(pieces[:2]) == best
                result.append(merged if join else pieces[0])
                pieces = pieces[2 if join else 1 :]
            words[word] = result
            count_pairs(word, 1)
        del pairs[best]
        if merged not in known:
            known.add(merged)
            vocabulary.append(merged)
    return vocabulary


def write_vocabulary(pieces: Iterable[str], path: str | Path) -> None:
    """Writes a vocab.txt."""
    Path(path).write_text("".join(piece + "\n" for piece in pieces), encoding="utf-8")
