"""Pickles inside region features: plain data is read, nothing is ever run."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from cacr_uniter.data.importers import import_features
from cacr_uniter.data.importers.pickled import read_pickled_data
from cacr_uniter.data.importers.testing import hdf5, milvlg_npz
from cacr_uniter.data.testing import Payload
from cacr_uniter.errors import UserError


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_code_is_not_run(protocol: int, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for value in (
        Payload(proof),
        {"rows": [Payload(proof)]},
        np.array([Payload(proof)], dtype=object),
        {1: Path.touch},
    ):
        with pytest.raises(ValueError, match="refused"):
            read_pickled_data(pickle.dumps(value, protocol))
    path = hdf5(tmp_path, adaptive=False)
    (tmp_path / "train36_imgid2idx.pkl").write_bytes(pickle.dumps({1: Payload(proof)}, protocol))
    with pytest.raises(UserError, match="refused"):
        import_features("hdf5-fixed", path, tmp_path / "img")
    folder = milvlg_npz(tmp_path)
    for file in folder.iterdir():
        arrays = dict(np.load(file, allow_pickle=True))
        np.savez(file, **{**arrays, "info": np.array({"objects_conf": Payload(proof)}, dtype=object)})
    with pytest.raises(UserError, match="refused"):
        import_features("milvlg-npz", folder, tmp_path / "img")
    assert not proof.exists()


def test_what_is_shared_is_read_once() -> None:
    value: list = [1]
    for _ in range(60):  # written out, 2^60 lists
        value = [value, value]
    data = read_pickled_data(pickle.dumps(value))
    assert data[0] is data[1]


@pytest.mark.parametrize("protocol", range(5))
def test_pickled_data_is_read(protocol: int) -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    value = {
        "int": [1, -300, 2**40, 2**70],
        "float": (1.5, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "text": ["caf\u00e9", b"\x00\xff", "", True, False, None],
        "array": [array, np.asfortranarray(np.arange(6.0).reshape(2, 3)), array],
        "scalar": [np.float32(2.5), np.int64(-1)],
        "empty": [{}, [], np.zeros((0, 4))],
    }
    data = read_pickled_data(pickle.dumps(value, protocol))
    for key, expected in value.items():
        for got, wanted in zip(data[key], expected, strict=True):
            assert type(got) is type(wanted)
            np.testing.assert_array_equal(got, wanted)
    whole = pickle.dumps(value, protocol)
    for cut in range(0, len(whole) - 1, 7):
        with pytest.raises(ValueError, match=r"."):
            read_pickled_data(whole[:cut])
