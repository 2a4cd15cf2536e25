"""WordPiece with a local vocabulary, and the vocabulary trainer."""

from pathlib import Path

import pytest
from tokenizers import BertWordPieceTokenizer

from cacr_uniter.data.tokenize import WordPieceTokenizer, train_vocabulary, write_vocabulary
from cacr_uniter.errors import UserError

CAPTIONS = [
    "A red apple on a wooden table.",
    "Two zebras above an elephant; the elephant isn't happy!",
    "naïve café owner (in Köln) said: [SEP] [MASK]",
    "tab\tand  double  spaces and a\u00a0no-break space",
    "控制 characters \u200b and 汉字",
    "",
]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    write_vocabulary(train_vocabulary(CAPTIONS, size=170), path)
    return path


@pytest.mark.parametrize("lowercase", [False, True])
def test_word_by_word_equals_whole_caption(vocab: Path, lowercase: bool) -> None:
    """The published preprocessing splits on white space first; for BERT this changes nothing."""
    ours = WordPieceTokenizer(vocab, lowercase)
    whole = BertWordPieceTokenizer(str(vocab), lowercase=lowercase)
    for caption in CAPTIONS:
        plain = caption.replace("[SEP] [MASK]", "")
        assert ours.encode(plain) == whole.encode(plain, add_special_tokens=False).ids


def test_pieces_and_special_tokens(vocab: Path) -> None:
    tokenizer = WordPieceTokenizer(vocab)
    ids = tokenizer.encode(CAPTIONS[2])
    assert not set(ids) & set(tokenizer.special_ids.values())
    text = "".join(tokenizer.pieces(ids)).replace("##", "")
    assert text == CAPTIONS[2].replace(" ", "")
    assert tokenizer.encode("") == tokenizer.encode(" \t ") == []
    unknown = tokenizer.special_ids["UNK"]
    assert tokenizer.encode("A Ж") == [*tokenizer.encode("A"), unknown]
    assert tokenizer.encode("a" * 101) == [unknown]
    assert tokenizer.special_ids == {"UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4}


def test_lower_case_follows_the_name(vocab: Path, tmp_path: Path) -> None:
    pieces = vocab.read_text(encoding="utf-8")
    for name, lowercase in (("bert-base-cased-vocab.txt", False), ("bert-base-uncased-vocab.txt", True)):
        (tmp_path / name).write_text(pieces, encoding="utf-8")
        tokenizer = WordPieceTokenizer(tmp_path / name)
        assert tokenizer.lowercase is lowercase
        assert (tokenizer.encode("APPLE") == tokenizer.encode("apple")) is lowercase


def test_training_is_deterministic_and_covers_the_captions() -> None:
    first = train_vocabulary(CAPTIONS, size=170)
    assert first == train_vocabulary(list(reversed(CAPTIONS)), size=170)
    assert len(first) == len(set(first)) == 170
    assert first[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_training_merges_the_most_frequent_pair_first() -> None:
    pieces = train_vocabulary(["ab ab ab bc bc"], size=100)
    assert pieces[5:] == ["a", "b", "c", "##a", "##b", "##c", "ab", "bc"]
    assert train_vocabulary(["aaaa aaaa"], size=100)[-3:] == ["##aa", "##aaa", "aaaa"]


def test_training_finds_whole_words(tmp_path: Path) -> None:
    captions = ["a red circle left of a blue square", "a blue circle right of a red square"] * 3
    write_vocabulary(train_vocabulary(captions, size=500), tmp_path / "vocab.txt")
    tokenizer = WordPieceTokenizer(tmp_path / "vocab.txt")
    assert tokenizer.pieces(tokenizer.encode(captions[0])) == captions[0].split()
    with pytest.raises(ValueError, match="size: expected at least"):
        train_vocabulary(captions, size=10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", "'a' occurs twice"),
        ("[PAD]\n[UNK]\na\n", r"lacks \[CLS\], \[SEP\], \[MASK\]"),
        ("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n", r"\[PAD\] must be the first line"),
    ],
)
def test_bad_vocabularies_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        WordPieceTokenizer(tmp_path / "vocab.txt")


def test_missing_or_binary_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        WordPieceTokenizer(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        WordPieceTokenizer(tmp_path / "vocab.txt")
