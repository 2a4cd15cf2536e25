"""The configuration of UNITER: the eleven published keys, the width of the region features, the vocabulary."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cacr_uniter.errors import UserError
from cacr_uniter.files import parse_json


@dataclasses.dataclass(frozen=True)
class UniterConfig:
    """Sizes of a UNITER model; the defaults are UNITER-base.

    Args:
        vocab_size: number of word pieces (28996 for bert-base-cased).
        hidden_size: width H of the hidden states, a multiple of `num_attention_heads`.
        num_hidden_layers: number of encoder layers.
        num_attention_heads: number A of heads, each of width d = H / A.
        intermediate_size: width F of the feed-forward layer.
        hidden_act: only "gelu", the exact form x (1 + erf(x / sqrt 2)) / 2.
        hidden_dropout_prob: dropout after embeddings, attention output and feed-forward output.
        attention_probs_dropout_prob: dropout on attention probabilities.
        max_position_embeddings: longest text, [CLS] and [SEP] included.
        type_vocab_size: 2, row 0 for text and row 1 for regions.
        initializer_range: deviation of the normal initialisation.
        img_dim: width of a region feature; outside the published JSON, whose code fixes it at 2048.
        vocabulary: of the captions that trained the model, `size` and the ids of CLS, SEP and MASK; None where that is
            unknown, as in the published JSON. Decides no weight.

    Raises:
        ValueError: a size is not positive, the heads do not divide the width, a probability is outside [0, 1), the
            activation is not "gelu", or the vocabulary tells no size.
    """

    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    img_dim: int = 2048
    vocabulary: dict[str, int] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "img_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"UniterConfig.{name}: expected a positive int, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"UniterConfig.hidden_size: expected a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if self.hidden_act != "gelu":
            raise ValueError(f'UniterConfig.hidden_act: expected "gelu", got {self.hidden_act!r}')
        if self.type_vocab_size < 2:
            raise ValueError(f"UniterConfig.type_vocab_size: expected at least 2, got {self.type_vocab_size}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"UniterConfig.{name}: expected a probability in [0, 1), got {value!r}")
        known = self.vocabulary
        if known is not None and not (
            isinstance(known, dict) and "size" in known and all(type(number) is int for number in known.values())
        ):
            raise ValueError(f"UniterConfig.vocabulary: expected size and ids of special pieces, got {known!r}")

    @property
    def head_dim(self) -> int:
        """Width d = H / A of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def base(cls) -> UniterConfig:
        """UNITER-base: 12 layers of width 768."""
        return cls()

    @classmethod
    def large(cls) -> UniterConfig:
        """UNITER-large: 24 layers of width 1024."""
        return cls(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)

    @classmethod
    def from_json(cls, path: str | Path) -> UniterConfig:
        """Reads a published configuration file.

        Raises:
            UserError: the file is missing, is not a JSON object, has a key that is not a field of this class, or a
                value that the class refuses.
        """
        try:
            values: Any = parse_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"model configuration {path}: cannot be read ({error.strerror}); give a UNITER config JSON"
            ) from error
        except ValueError as error:
            raise UserError(f"model configuration {path}: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise UserError(f"model configuration {path}: expected a JSON object, got {type(values).__name__}")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"model configuration {path}: unknown keys {', '.join(unknown)}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"model configuration {path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict (JSON-ready), without the vocabulary where it is unknown."""
        values = dataclasses.asdict(self)
        return values if self.vocabulary is not None else {k: v for k, v in values.items() if k != "vocabulary"}
