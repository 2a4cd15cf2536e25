"""Checkpoints: every known dialect, the ranking head, refusals, export."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cacr_uniter.data.testing import Payload
from cacr_uniter.errors import UserError
from cacr_uniter.model import UniterConfig, UniterForRetrieval
from cacr_uniter.model.checkpoint import export_safetensors, load_checkpoint, read_state_dict

TINY = UniterConfig(
    vocab_size=30,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
    img_dim=6,
)
State = dict[str, Tensor]


def make(seed: int) -> UniterForRetrieval:
    torch.manual_seed(seed)
    model = UniterForRetrieval(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.fixture
def pretrained() -> State:
    """A pre-training checkpoint: backbone, matching head and other heads, no ranking head."""
    state = {key: value for key, value in make(1).state_dict().items() if not key.startswith("rank_output")}
    state["cls.predictions.bias"] = torch.zeros(30)
    state["feat_regress.bias"] = torch.zeros(6)
    state["region_classifier.net.3.bias"] = torch.zeros(5)
    return state


def published(state: State) -> State:
    return dict(state)


def old_endings(state: State) -> State:
    def rename(key: str) -> str:
        if "LayerNorm" in key or "layer_norm" in key:
            return re.sub(r"weight$", "gamma", re.sub(r"bias$", "beta", key))
        return key

    return {rename(key): value for key, value in state.items()}


def bert_prefix(state: State) -> State:
    return {re.sub(r"^uniter\.", "bert.", key): value for key, value in state.items()}


def bare(state: State) -> State:
    return {key.removeprefix("uniter."): value for key, value in state.items()}


def module(state: State) -> State:
    return {f"module.{key}": value for key, value in state.items()}


def half(state: State) -> State:
    return {key: value.half() for key, value in state.items()}


def mmf(state: State) -> State:
    renamed = {}
    for key, value in state.items():
        key = key.replace("uniter.embeddings.", "uniter.text_embeddings.")
        key = key.replace("img_embeddings.LayerNorm", "img_embeddings.final_layer_norm")
        renamed[f"model.{key}"] = value
    return renamed


def volta(state: State) -> State:
    names = {
        "img_embeddings.img_linear": "embeddings.image_embeddings",
        "img_embeddings.pos_linear": "embeddings.image_location_embeddings",
        "img_embeddings.img_layer_norm": "embeddings.image_layer_norm",
        "img_embeddings.pos_layer_norm": "embeddings.image_location_layer_norm",
        "img_embeddings.LayerNorm": "embeddings.v_LayerNorm",
        "pooler.": "t_pooler.",
    }
    renamed = {}
    for key, value in state.items():
        if "mask_embedding" in key:
            continue
        for old, new in names.items():
            key = key.replace(old, new)
        layer = re.search(r"layer\.(\d+)\.(.*)", key)
        if layer:
            attention = layer[2].startswith("attention")
            rest = layer[2].replace("attention.self", "attention_self").replace("attention.output", "attention_output")
            key = f"uniter.encoder.layer.{2 * int(layer[1]) + (not attention)}.{rest}"
            twin = re.sub(r"\.(query|key|value|dense|LayerNorm)\.", r".v_\1.", key)
            renamed[twin.replace("uniter.", "bert.")] = value
        key = key.replace("itm_output", "cls.bi_seq_relationship").replace("uniter.", "bert.")
        renamed[key] = value
    return renamed


DIALECTS: list[Callable[[State], State]] = [published, old_endings, bert_prefix, bare, module, half, mmf, volta]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.__name__)
def test_every_dialect_gives_the_same_weights(
    dialect: Callable[[State], State], pretrained: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(dialect(pretrained), path)
    model = make(2)
    before = model.state_dict()["uniter.img_embeddings.mask_embedding.weight"].clone()
    report = load_checkpoint(model, path)
    loaded = model.state_dict()
    for key, value in pretrained.items():
        if key.startswith(("uniter.", "itm_output.")):
            expected = value.half().float() if dialect is half else value
            if dialect is volta and "mask_embedding" in key:
                expected = before
            assert torch.equal(loaded[key], expected), key
            assert loaded[key].dtype == torch.float32
    assert report.dialect == (dialect.__name__ if dialect in (mmf, volta) else "uniter")
    assert report.rank_from_itm
    assert report.unexpected == ()
    assert len(report.ignored) == 3
    assert report.missing == (("uniter.img_embeddings.mask_embedding.weight",) if dialect is volta else ())


@pytest.mark.parametrize("nest", ["model_state_dict", "state_dict", "model"])
def test_nested_files(nest: str, pretrained: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 3, nest: pretrained}, path)
    model = make(2)
    load_checkpoint(model, path)
    assert torch.equal(model.itm_output.weight, pretrained["itm_output.weight"])


def test_rank_head_is_a_copy_of_the_match_row(pretrained: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(pretrained, path)
    model = make(2)
    load_checkpoint(model, path)
    assert torch.equal(model.rank_output.weight, pretrained["itm_output.weight"][1:2])
    assert torch.equal(model.rank_output.bias, pretrained["itm_output.bias"][1:2])
    with torch.no_grad():
        model.rank_output.weight.add_(1.0)
    assert torch.equal(model.itm_output.weight, pretrained["itm_output.weight"])


def test_a_fine_tuned_rank_head_is_kept(tmp_path: Path) -> None:
    source, model = make(1), make(2)
    path = tmp_path / "weights.pt"
    torch.save(source.state_dict(), path)
    report = load_checkpoint(model, path)
    assert not report.rank_from_itm
    assert torch.equal(model.rank_output.weight, source.rank_output.weight)
    assert not torch.equal(model.rank_output.weight, source.itm_output.weight[1:2])


def test_five_number_boxes_of_volta_are_widened_exactly(pretrained: State, tmp_path: Path) -> None:
    state = volta(pretrained)
    key = "bert.embeddings.image_location_embeddings.weight"
    state[key] = torch.randn(8, 5)
    path = tmp_path / "volta.bin"
    torch.save(state, path)
    model = make(2)
    report = load_checkpoint(model, path)
    box = torch.rand(7)
    five = box[[0, 1, 2, 3, 6]]
    torch.testing.assert_close(model.uniter.img_embeddings.pos_linear.weight @ box, state[key] @ five)
    assert any("widened" in note for note in report.notes)


def test_two_stream_weights_are_refused(pretrained: State, tmp_path: Path) -> None:
    state = volta(pretrained)
    key = "bert.encoder.layer.0.attention_self.v_query.weight"
    state[key] = state[key] + 1
    path = tmp_path / "vilbert.bin"
    torch.save(state, path)
    with pytest.raises(UserError, match="do not share weights"):
        load_checkpoint(make(2), path)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    torch.save({"state_dict": make(1).state_dict(), "extra": Payload(proof)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload(proof), protocol=2))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(UserError, match="never run"):
            load_checkpoint(make(2), tmp_path / name)
    assert not proof.exists()


def test_an_old_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"weights"):
            read_state_dict(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files_are_refused(suffix: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    source, model = make(1), make(2)
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        export_safetensors(source, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"weights.*(damaged|truncated)"):
        load_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [b"hello, I am text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"\x1f\x8b\x08\x00gzip"],
)
def test_other_files_are_called_what_they_are(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    words = f"no weights file, it begins with {content[:40]!r}; expected what torch.save writes"
    with pytest.raises(UserError, match=re.escape(words)):
        load_checkpoint(make(2), tmp_path / "weights.pt")


def test_files_that_do_not_fit_are_refused(pretrained: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"

    def refused(state: object, message: str) -> None:
        torch.save(state, path)
        with pytest.raises(UserError, match=message):
            load_checkpoint(make(2), path)

    wide = dict(pretrained)
    wide["uniter.pooler.dense.weight"] = torch.zeros(9, 9)
    refused(wide, r"other shapes.*pooler.*\[9, 9\] instead of \[8, 8\]")
    short = {key: value for key, value in pretrained.items() if ".layer.1." not in key}
    refused(short, "16 tensors missing")
    deep = pretrained | {key.replace("layer.1", "layer.2"): value for key, value in pretrained.items()}
    refused(deep, "16 unknown")
    refused({"weight": torch.zeros(3)}, "not a UNITER checkpoint")
    refused({"step": 3}, "no state dict")
    refused([1, 2], "no state dict")
    with pytest.raises(UserError, match="no such file"):
        read_state_dict(tmp_path / "absent.pt")
    torch.save(short, path)
    report = load_checkpoint(make(2), path, strict=False)
    assert len(report.missing) == 16
    assert "left at their initial value" in str(report)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    """Else training would blame its learning rate for them."""
    source, model = make(1), make(2)
    with torch.no_grad():
        source.rank_output.weight[0, 3] = value
    export_safetensors(source, tmp_path / "weights.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"weights\.safetensors: 1 tensors .* not finite, first rank_output\.weight"):
        load_checkpoint(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_export_and_reload(tmp_path: Path) -> None:
    source, model = make(1), make(2)
    path = tmp_path / "model.safetensors"
    export_safetensors(source, path)
    assert set(load_file(path)) == set(source.state_dict())
    report = load_checkpoint(model, path)
    assert report.missing == report.unexpected == report.ignored == ()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make(1), path)
    before = path.read_bytes()

    def full(state: State, target: Path, metadata: dict[str, str]) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cacr_uniter.model.checkpoint.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        export_safetensors(make(2), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
