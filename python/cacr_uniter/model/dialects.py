"""Names of other programs' UNITER checkpoints, turned into the published ones. Pure renaming of state dicts; reads no
file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

BACKBONE_PARTS = ("embeddings.", "img_embeddings.", "text_embeddings.", "encoder.", "pooler.", "t_pooler.")

MMF_NAMES = (
    (r"^text_embeddings\.", "embeddings."),
    (r"^img_embeddings\.final_layer_norm\.", "img_embeddings.LayerNorm."),
)

VOLTA_NAMES = (
    (r"^embeddings\.image_embeddings\.", "img_embeddings.img_linear."),
    (r"^embeddings\.image_location_embeddings\.", "img_embeddings.pos_linear."),
    (r"^embeddings\.image_layer_norm\.", "img_embeddings.img_layer_norm."),
    (r"^embeddings\.image_location_layer_norm\.", "img_embeddings.pos_layer_norm."),
    (r"^embeddings\.v_LayerNorm\.", "img_embeddings.LayerNorm."),
    (r"^(encoder\.layer\.\d+)\.attention_self\.", r"\1.attention.self."),
    (r"^(encoder\.layer\.\d+)\.attention_output\.", r"\1.attention.output."),
    (r"^t_pooler\.", "pooler."),
)


def plain_names(state: Mapping[str, Tensor]) -> StateDict:
    """Undoes wrappers and old TensorFlow endings.

    Strips `module.` and any other common wrapper in front of the backbone, gives the backbone the prefix `uniter.`
    (published; `bert.` and bare backbones occur), and turns `gamma` / `beta` into `weight` / `bias`.

    Raises:
        ValueError: no word embedding is found, or two keys become the same.
    """
    anchors = [key for key in state if key.endswith("embeddings.word_embeddings.weight")]
    if len(anchors) != 1:
        raise ValueError(f"expected one key ending in embeddings.word_embeddings.weight, found {len(anchors)}")
    backbone = re.sub(r"(text_)?embeddings\.word_embeddings\.weight$", "", anchors[0])
    wrapper = re.sub(r"(uniter|bert)\.$", "", backbone)
    renamed: StateDict = {}
    for key, value in state.items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))
        if name.startswith(backbone) and name[len(backbone) :].startswith(BACKBONE_PARTS):
            name = "uniter." + name[len(backbone) :]
        else:
            name = name.removeprefix(wrapper)
        if name in renamed:
            raise ValueError(f"keys {key} and another both mean {name}")
        renamed[name] = value
    return renamed


def _rename(state: StateDict, rules: tuple[tuple[str, str], ...]) -> StateDict:
    def apply(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return {
        "uniter." + apply(key.removeprefix("uniter.")) if key.startswith("uniter.") else key: value
        for key, value in state.items()
    }


def _drop_vision_twins(state: StateDict) -> StateDict:
    """VOLTA stores the shared text and vision weights of a single-stream encoder twice; the vision copy is dropped.

    Raises:
        ValueError: the copies differ, so the checkpoint is a two-stream model.
    """
    kept: StateDict = {}
    for key, value in state.items():
        twin = re.sub(r"\.v_(query|key|value|dense|LayerNorm)\.", r".\1.", key)
        if not key.startswith("uniter.encoder.") or twin == key:
            kept[key] = value
        elif twin not in state or not torch.equal(value, state[twin]):
            raise ValueError(f"{key} differs from {twin}: text and vision do not share weights, this is not UNITER")
    return kept


def _halve_layers(state: StateDict) -> StateDict:
    """VOLTA counts sub-layers: 2n is the attention and 2n + 1 the feed-forward part of layer n."""
    return {
        re.sub(r"(?<=encoder\.layer\.)\d+", lambda match: str(int(match[0]) // 2), key): state[key] for key in state
    }


def _widen_boxes(state: StateDict, notes: list[str]) -> StateDict:
    """Location weights for [x1, y1, x2, y2, area] become weights for seven numbers, zero for width and height:
    exact.
    """
    key = "uniter.img_embeddings.pos_linear.weight"
    weight = state.get(key)
    if weight is None or weight.dim() != 2 or weight.shape[1] != 5:
        return state
    wide = weight.new_zeros(weight.shape[0], 7)
    wide[:, [0, 1, 2, 3, 6]] = weight
    notes.append("five-number box weights widened to seven (zero for width and height)")
    return {**state, key: wide}


def from_mmf(state: StateDict, notes: list[str]) -> StateDict:
    """MMF: text embeddings and the final image layer norm have other names."""
    notes.append("MMF trains on bert-base-uncased: use its vocabulary")
    return _rename(state, MMF_NAMES)


def from_volta(state: StateDict, notes: list[str]) -> StateDict:
    """VOLTA: image embeddings merged into the text ones, sub-layers counted, weights shared by two names."""
    notes.append("VOLTA pools with ReLU, UNITER with tanh: fine-tune before comparing scores")
    state = _widen_boxes(_rename(_halve_layers(_drop_vision_twins(state)), VOLTA_NAMES), notes)
    return {
        key.replace("cls.bi_seq_relationship.", "itm_output."): value
        for key, value in state.items()
        if not key.endswith(("v_pooler.dense.weight", "v_pooler.dense.bias"))
    }


def to_published(state: Mapping[str, Tensor]) -> tuple[StateDict, str, list[str]]:
    """Renames any known dialect to the published keys.

    Args:
        state: names and tensors of one checkpoint.

    Returns:
        The renamed state dict, the dialect ("uniter", "mmf" or "volta"), and notes for the person who loads it.

    Raises:
        ValueError: not a checkpoint of a single-stream UNITER.
    """
    plain, notes = plain_names(state), list[str]()
    dialects: dict[str, tuple[str, Callable[[StateDict, list[str]], StateDict]]] = {
        "mmf": ("uniter.text_embeddings.word_embeddings.weight", from_mmf),
        "volta": ("uniter.embeddings.image_embeddings.weight", from_volta),
    }
    for dialect, (mark, convert) in dialects.items():
        if mark in plain:
            return convert(plain, notes), dialect, notes
    return plain, "uniter", notes
