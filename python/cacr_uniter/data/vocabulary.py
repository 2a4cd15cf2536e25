"""Which vocabulary captions were split with, as far as a text database tells, and how two of them differ.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Mapping

Vocabulary = Mapping[str, int]
"""Number of pieces (`size`) and ids of CLS, SEP and, where it is told, MASK."""


def same_vocabulary(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether what both tell is equal; names that only one of them has are no difference."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def in_words(vocabulary: Vocabulary) -> str:
    """Such as "28996 pieces (CLS 101, SEP 102, MASK 103)"."""
    ids = ", ".join(f"{name} {value}" for name, value in vocabulary.items() if name != "size")
    return f"{vocabulary['size']} pieces ({ids})"
