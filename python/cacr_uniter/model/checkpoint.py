"""Weights in and out: local files of any known dialect into the model, and the model into safetensors.

Nothing is downloaded and no pickled code is run.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cacr_uniter.errors import UserError
from cacr_uniter.files import replacing
from cacr_uniter.model.dialects import to_published
from cacr_uniter.model.uniter import UniterForRetrieval

NESTS = ("model_state_dict", "state_dict", "model")
HEADS = ("rank", "itm")
PRETRAINING_HEADS = ("cls.", "feat_regress.", "region_classifier.", "heads.")
TORCH_STARTS = (b"PK", b"\x80")
"""First bytes of a zip archive and of a pickle."""

POSITION_IDS = "uniter.embeddings.position_ids"
MASK_EMBEDDING = "uniter.img_embeddings.mask_embedding.weight"


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave to the model.

    Attributes:
        path: the file.
        dialect: "uniter" (published names), "mmf" or "volta".
        loaded: number of tensors taken over.
        missing: keys of the model which the file lacks and which keep their initial value.
        unexpected: keys of the file which the model does not have.
        ignored: surplus keys without meaning here: pre-training heads, the position counter of some BERT dumps.
        rank_from_itm: the ranking head was made from row 1 ("match") of the matching head.
        heads: of `HEADS`, those that the file holds and whose weights, as far as it says, are not random.
        notes: remarks, for example on a dialect.
    """

    path: str
    dialect: str
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    rank_from_itm: bool
    heads: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.loaded} tensors loaded, {self.dialect} names"]
        if self.rank_from_itm:
            lines.append("ranking head initialised from the match row of the matching head")
        if self.ignored:
            lines.append(f"{len(self.ignored)} tensors of pre-training heads and counters ignored")
        if self.missing:
            lines.append(f"not in the file, left at their initial value: {', '.join(self.missing)}")
        if self.unexpected:
            lines.append(f"in the file, not in the model: {', '.join(self.unexpected)}")
        return "\n".join([*lines, *self.notes])


#: what torch.load raises of files that are cut or changed
DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    OSError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)


def _unpickled(path: Path) -> Any:
    with path.open("rb") as stream:
        start = stream.read(40)
    if start and not start.startswith(TORCH_STARTS):
        raise UserError(
            f"checkpoint {path}: no weights file, it begins with {start!r}; expected what torch.save writes, or a file "
            "named .safetensors"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path}: not plain weights (damaged, or it holds pickled Python objects, which are never run); "
            "save its state dict alone, or as .safetensors, with the program that made it"
        ) from error
    except DAMAGE as error:
        raise UserError(f"checkpoint {path}: truncated or damaged ({_first_line(error)}); copy it again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a local checkpoint under the names they have there.

    `.safetensors` files are read as such; anything else with torch's loader restricted to weights. Dicts nested under
    `model_state_dict`, `state_dict` or `model` are unwrapped; entries that are no tensors are dropped.

    Args:
        path: the file.

    Raises:
        UserError: missing, truncated, holding pickled code, or without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; give the path of a local UNITER checkpoint")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"checkpoint {path}: truncated or damaged ({_first_line(error)}); copy it again") from error
    content = _unpickled(path)
    while isinstance(content, Mapping):
        inner = next((content[key] for key in NESTS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"checkpoint {path}: holds no state dict; expected names and tensors")
    return tensors


def heads_record(heads: tuple[str, ...] | None) -> dict[str, str]:
    """The entry of a safetensors header that tells which heads a run trained or loaded; none where that is unknown."""
    return {} if heads is None else {"heads": " ".join(heads)}


def recorded_heads(path: Path) -> tuple[str, ...] | None:
    """Inverse of `heads_record`: None for a file that does not tell."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="numpy") as file:
        record = (file.metadata() or {}).get("heads")
    return None if record is None else tuple(record.split())


def _check_shapes(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    if wrong:
        key = wrong[0]
        raise UserError(
            f"checkpoint {path}: {len(wrong)} tensors have other shapes than the model, first {key} "
            f"{list(state[key].shape)} instead of {list(own[key].shape)}; choose the model configuration (base, large, "
            "vocabulary) that fits the checkpoint"
        )


def load_checkpoint(model: UniterForRetrieval, path: str | Path, strict: bool = True) -> LoadReport:
    """Loads a local checkpoint into the model.

    Tensors are cast to the model's dtype (half-precision files become float32). A file without a ranking head gets one:
    a copy of row 1 ("match") of the matching head; a file that has one keeps it. Nothing is changed if anything is
    wrong.

    Args:
        model: built with the configuration of the checkpoint.
        path: a local `.pt`, `.bin`, `.pth` or `.safetensors` file; see `read_state_dict`.
        strict: refuse files that lack a part of the model other than the heads and the mask embedding, or have unknown
            keys other than pre-training heads.

    Returns:
        A report of what was loaded, missing and ignored.

    Raises:
        UserError: the file cannot be read, is not UNITER, does not fit the configuration, is refused by `strict`, or
            holds numbers that are not finite.
    """
    path = Path(path)
    try:
        state, dialect, notes = to_published(read_state_dict(path))
    except ValueError as error:
        raise UserError(f"checkpoint {path}: not a UNITER checkpoint ({error})") from error
    own = model.state_dict()
    rank_from_itm = "rank_output.weight" not in state and "itm_output.weight" in state and "itm_output.bias" in state
    _check_shapes(path, state, own)
    if rank_from_itm:
        state["rank_output.weight"] = state["itm_output.weight"][1:2].clone()
        state["rank_output.bias"] = state["itm_output.bias"][1:2].clone()
    missing = [key for key in own if key not in state]
    surplus = [key for key in state if key not in own]
    ignored = [key for key in surplus if key.startswith((*PRETRAINING_HEADS, POSITION_IDS))]
    unexpected = [key for key in surplus if key not in ignored]
    if strict:
        optional = (MASK_EMBEDDING, "rank_output.", "itm_output.")
        lost = [key for key in missing if not key.startswith(optional)]
        if lost or unexpected:
            raise UserError(
                f"checkpoint {path}: does not fit the model ({len(lost)} tensors missing, {len(unexpected)} unknown; "
                f"first {', '.join([*lost[:2], *unexpected[:2]])}); check the configuration, for example the number of "
                "layers"
            )
    taken = {key: value.to(own[key].dtype) for key, value in state.items() if key in own}
    broken = [key for key, value in taken.items() if not value.isfinite().all()]
    if broken:
        raise UserError(
            f"checkpoint {path}: {len(broken)} tensors hold numbers that are not finite, first {broken[0]}: the "
            "training that wrote it diverged; take an earlier checkpoint"
        )
    model.load_state_dict(taken, strict=False)
    recorded = recorded_heads(path)
    whole = [head for head in HEADS if not any(key.startswith(f"{head}_output.") for key in missing)]
    return LoadReport(
        path=str(path),
        dialect=dialect,
        loaded=len(taken),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        ignored=tuple(ignored),
        rank_from_itm=rank_from_itm,
        heads=tuple(head for head in whole if recorded is None or head in recorded),
        notes=tuple(notes),
    )


def export_safetensors(model: UniterForRetrieval, path: str | Path) -> None:
    """Writes the model's weights with the published keys as safetensors, whole or not at all.

    Raises:
        UserError: the file cannot be written; an existing file of that name stays as it was.
    """
    path = Path(path)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    try:
        with replacing(path) as partial:
            save_file(state, partial, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be written ({_first_line(error)})") from error
