"""Every region-feature format, written here exactly as its makers write it, into the image database."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacr_uniter.data.check import check_database
from cacr_uniter.data.importers import FORMATS, import_features
from cacr_uniter.data.importers.testing import (
    NAMES,
    Image,
    b64,
    butd_tsv,
    hdf5,
    images,
    lxmert_tsv,
    milvlg_npz,
    uniter_npz,
    vinvl_tsv,
)
from cacr_uniter.data.lmdb import BoxRule, ImageDB
from cacr_uniter.data.names import image_namer
from cacr_uniter.errors import UserError
from cacr_uniter.files import write_json

Maker = Callable[[Path], Path]
CASES: dict[str, tuple[str, Maker, bool]] = {
    "butd": ("butd-tsv", butd_tsv, False),
    "butd zlib": ("butd-tsv", lambda folder: butd_tsv(folder, compress=True), False),
    "lxmert": ("lxmert-tsv", lxmert_tsv, True),
    "lxmert, sides exchanged": ("lxmert-tsv", lambda folder: lxmert_tsv(folder, exchanged=True), True),
    "volta": ("lxmert-tsv", lambda folder: lxmert_tsv(folder, volta=True), True),
    "vinvl": ("vinvl-tsv", vinvl_tsv, True),
    "vinvl json": ("vinvl-tsv", lambda folder: vinvl_tsv(folder, as_json=True), True),
    "milvlg": ("milvlg-npz", milvlg_npz, True),
    "milvlg transposed": ("milvlg-npz", lambda folder: milvlg_npz(folder, transposed=True), True),
    "uniter": ("uniter-npz", uniter_npz, True),
    "uniter, columns exchanged": ("uniter-npz", lambda folder: uniter_npz(folder, exchanged=True), True),
    "fixed": ("hdf5-fixed", lambda folder: hdf5(folder, adaptive=False), False),
    "adaptive": ("hdf5-adaptive", lambda folder: hdf5(folder, adaptive=True, protocol=0), False),
}


def test_every_format_has_a_case() -> None:
    assert {kind for kind, _, _ in CASES.values()} == set(FORMATS)


@pytest.mark.parametrize("case", CASES)
def test_import(case: str, tmp_path: Path) -> None:
    kind, make, confident = CASES[case]
    steps: list[tuple[int, int]] = []
    report = import_features(
        kind,
        make(tmp_path),
        tmp_path / "img",
        names="flickr30k",
        labels=tmp_path / "predictions.tsv" if kind == "vinvl-tsv" else None,
        progress=lambda unit, done, total: steps.append((done, total)),
    )
    assert report.images == 3
    assert report.swapped_size is (case == "lxmert, sides exchanged")
    assert steps[-1][0] == steps[-1][1]
    database = ImageDB(tmp_path / "img")
    assert sorted(database.names()) == sorted(f"flickr30k_{int(name):012d}.npz" for name in NAMES)
    for name, image in images().items():
        stored = database.record(f"flickr30k_{int(name):012d}.npz")
        order = np.argsort(-image.conf, kind="stable") if confident else np.arange(image.size)
        kept = order[: BoxRule().count(image.conf if confident else None, image.size)]
        assert set(stored) == {"norm_bb", "features", "conf"}
        np.testing.assert_allclose(stored["features"], image.features[kept].astype(np.float16), rtol=0, atol=0)
        np.testing.assert_allclose(stored["norm_bb"], image.norm_bb[kept], rtol=0, atol=2e-3)
        expected = image.conf[kept] if confident else np.ones(len(kept))
        np.testing.assert_allclose(stored["conf"][:, 0], expected, rtol=0, atol=1e-3)
    check = check_database(tmp_path / "img")
    assert check.ok, str(check)
    remarks = report.findings["remarks"]
    assert ("no confidences, file order kept" in remarks) is not confident
    assert ("columns width and height exchanged, put right" in remarks) is (case == "uniter, columns exchanged")
    written = json.loads((tmp_path / "img" / "feat_th0.2_max100_min10_import.json").read_text())
    assert written["images"] == 3
    assert sorted(entry.name for entry in (tmp_path / "img").iterdir()) == [
        "feat_th0.2_max100_min10",
        "feat_th0.2_max100_min10_import.json",
        "nbb_th0.2_max100_min10.json",
    ]


def test_options(tmp_path: Path) -> None:
    source = lxmert_tsv(tmp_path, volta=True)
    report = import_features(
        "lxmert-tsv", source, tmp_path / "img", fixed=5, compressed=True, dtype="float32", soft_labels=True, limit=2
    )
    assert (report.images, report.boxes) == (2, (5, 5.0, 5))
    database = ImageDB(tmp_path / "img", BoxRule(fixed=5))
    record = database.record(f"{NAMES[0]}.npz")
    assert record["features"].dtype == np.float32
    np.testing.assert_array_equal(record["soft_labels"][:, :1], record["conf"])


def kill(source: Path, out: Path) -> None:
    """Imports in a child process that ends without any clean-up at the last row."""

    def die(unit: str, done: int, total: int) -> None:
        if done == total:
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(
        target=import_features, args=("lxmert-tsv", source, out), kwargs={"progress": die}
    )
    child.start()
    child.join(timeout=60)
    assert child.exitcode == -signal.SIGKILL


def interrupt(source: Path, out: Path) -> None:
    def stop(unit: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_features("lxmert-tsv", source, out, progress=stop)


@pytest.mark.parametrize("end", [interrupt, kill])
def test_an_interrupted_import_goes_on(
    end: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacr_uniter.data.lmdb_store.COMMIT_EVERY", 2)
    source = lxmert_tsv(tmp_path)
    end(source, tmp_path / "img")
    assert [entry.name for entry in (tmp_path / "img").iterdir()] == ["feat_th0.2_max100_min10.partial"]
    with pytest.raises(UserError, match="interrupted import of another source"):
        import_features("lxmert-tsv", source, tmp_path / "img", limit=1)
    report = import_features("lxmert-tsv", source, tmp_path / "img")
    assert (report.images, report.resumed) == (3, 2)
    assert check_database(tmp_path / "img").ok
    import_features("lxmert-tsv", source, tmp_path / "whole")
    for name in ImageDB(tmp_path / "whole").names():
        whole, resumed = ImageDB(tmp_path / "whole").record(name), ImageDB(tmp_path / "img").record(name)
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole)
    with pytest.raises(UserError, match="exists already"):
        import_features("lxmert-tsv", source, tmp_path / "img")


@pytest.mark.parametrize("last", ["_import.json", "nbb_"])
def test_an_import_that_fails_at_its_last_files_goes_on(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacr_uniter.data.lmdb_store.COMMIT_EVERY", 2)
    source = lxmert_tsv(tmp_path)

    def full(path: Path, value: Any) -> None:
        if last in path.name:
            raise OSError("No space left on device")
        write_json(path, value)

    with monkeypatch.context() as patch:
        for module in ("importers.features", "image_writer"):
            patch.setattr(f"cacr_uniter.data.{module}.write_json", full)
        with pytest.raises(OSError, match="No space"):
            import_features("lxmert-tsv", source, tmp_path / "img")
    report = import_features("lxmert-tsv", source, tmp_path / "img")
    assert report.images == 3
    assert report.resumed >= 2
    assert check_database(tmp_path / "img").ok
    folder = Path(report.folder)
    assert {path.name for path in folder.iterdir()} <= {"data.mdb", "lock.mdb"}


@pytest.mark.parametrize("row", ['{"features": "AAAA"}', "[1]"])
def test_an_odd_row_at_the_start_is_left_out(row: str, tmp_path: Path) -> None:
    good = vinvl_tsv(tmp_path)
    source = tmp_path / "odd.tsv"
    source.write_text(f"odd\t{row}\n" + good.read_text())
    with pytest.raises(UserError, match=r"line 1 \(odd\)"):
        import_features("vinvl-tsv", source, tmp_path / "img")
    assert len(import_features("vinvl-tsv", source, tmp_path / "img", skip_bad=True).skipped) == 1


def butd_line(image: Image, **changes: Any) -> str:
    fields = {
        "id": "7",
        "w": image.width,
        "h": image.height,
        "n": image.size,
        "boxes": b64(image.boxes),
        "features": b64(image.features),
    }
    return "\t".join(str(value) for value in (fields | changes).values())


def xywh(image: Image) -> np.ndarray:
    return np.concatenate([image.boxes[:, :2] + 300, image.boxes[:, 2:] - image.boxes[:, :2]], axis=1)


def broken_lines() -> dict[str, str]:
    image = Image(5)
    nothing = image.features.copy()
    nothing[3, 3] = np.nan
    return {
        r"expected 6 columns": butd_line(image).rsplit("\t", 1)[0],
        r"features: damaged base64": butd_line(image, features=b64(image.features)[:-3]),
        r"features: 380 bytes are not 12 rows": butd_line(image, features=b64(image.features.reshape(-1)[:95])),
        r"not 11 rows": butd_line(image, n=11),
        r"columns are not x1, y1, x2, y2": butd_line(image, boxes=b64(xywh(image))),
        r"not finite": butd_line(image, features=b64(nothing)),
        r"size 0 x 480 is not positive": butd_line(image, w=0),
        r"invalid literal": butd_line(image, n="twelve"),
        r"not 0 rows": butd_line(image, n=0),
    }


@pytest.mark.parametrize("message", broken_lines())
def test_damaged_rows_stop_the_import_or_are_left_out(message: str, tmp_path: Path) -> None:
    good = butd_tsv(tmp_path)
    source = tmp_path / "broken.tsv"
    source.write_text(good.read_text() + broken_lines()[message] + "\n")
    with pytest.raises(UserError, match=rf"line 4 \(7\): .*{message}"):
        import_features("butd-tsv", source, tmp_path / "img")
    report = import_features("butd-tsv", source, tmp_path / "img", skip_bad=True)
    assert report.images == 3
    assert len(report.skipped) == 1
    assert "captions whose image was left out; data.missing skip leaves them out too" in str(report)


def test_remarks(tmp_path: Path) -> None:
    outside, image = Image(1), Image(2)
    outside.boxes[2, 2:] = (700, 500)
    again = butd_line(image, id="8")
    source = tmp_path / "a.tsv"
    source.write_text("\n".join([butd_line(outside), again, again]))
    report = import_features("butd-tsv", source, tmp_path / "img")
    assert report.images == 2
    assert report.findings["remarks"] == {
        "boxes outside the image, clipped": 1,
        "images that occur again, first kept": 1,
        "no confidences, file order kept": 2,
        "normalised boxes beyond 0 to 1, clipped": 1,
    }
    stored = ImageDB(tmp_path / "img").record("7.npz")["norm_bb"]
    assert stored[:, :4].max() == 1
    assert "1 images: boxes outside the image, clipped" in str(report)


def test_features_of_two_widths_are_refused(tmp_path: Path) -> None:
    wide = Image(2)
    wide.features = np.zeros((12, 5), np.float32)
    source = tmp_path / "a.tsv"
    source.write_text("\n".join([butd_line(Image(1)), butd_line(wide, id="8")]))
    with pytest.raises(UserError, match="width 5, others before had"):
        import_features("butd-tsv", source, tmp_path / "img")


def test_wrong_columns_of_normalised_boxes_are_refused(tmp_path: Path) -> None:
    folder = uniter_npz(tmp_path)
    path = sorted(folder.iterdir())[0]
    arrays = dict(np.load(path))
    for boxes, message in ((arrays["norm_bb"][:, [0, 2, 1, 3, 4, 5]], "not their width and height"),):
        np.savez(path, **{**arrays, "norm_bb": boxes})
        with pytest.raises(UserError, match=message):
            import_features("uniter-npz", folder, tmp_path / "img")
        (tmp_path / "img").rename(tmp_path / "old")
    np.savez(path, **{**arrays, "norm_bb": arrays["norm_bb"].astype(np.float32) * 500})
    with pytest.raises(UserError, match="these are pixels"):
        import_features("uniter-npz", folder, tmp_path / "img")


def test_sources_that_cannot_be_opened(tmp_path: Path) -> None:
    source = butd_tsv(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        import_features("butd-tsv", tmp_path / "absent.tsv", tmp_path / "img")
    with pytest.raises(UserError, match="format: expected one of butd-tsv"):
        import_features("caffe", source, tmp_path / "img")
    with pytest.raises(UserError, match="folder of npz files"):
        import_features("uniter-npz", source, tmp_path / "img")
    with pytest.raises(UserError, match="names: expected one of"):
        import_features("butd-tsv", source, tmp_path / "img", names="x.npz")
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(UserError, match="no image could be imported"):
        import_features("butd-tsv", tmp_path / "empty.tsv", tmp_path / "img")


def test_damaged_hdf5(tmp_path: Path) -> None:
    path = hdf5(tmp_path, adaptive=True)
    with pytest.raises(UserError, match="row 0"):
        import_features("hdf5-fixed", path, tmp_path / "a")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not an HDF5 file"):
        import_features("hdf5-adaptive", path, tmp_path / "b")
    path.write_bytes(data)
    (tmp_path / "train36_imgid2idx.pkl").unlink()
    with pytest.raises(UserError, match=r"imgid2idx file of train36\.hdf5"):
        import_features("hdf5-adaptive", path, tmp_path / "b")
    (tmp_path / "rows.json").write_text(json.dumps({name: row for row, name in enumerate(NAMES)}))
    assert import_features("hdf5-adaptive", path, tmp_path / "b", ids=tmp_path / "rows.json").images == 3


@pytest.mark.parametrize(
    ("names", "source", "expected"),
    [
        ("keep", "1000092795.jpg", "1000092795.npz"),
        ("keep", "36979.jpg.npz", "36979.npz"),
        ("keep", "nlvr2_dev-12-0-img0.npz", "nlvr2_dev-12-0-img0.npz"),
        ("flickr30k", "1000092795.jpg", "flickr30k_001000092795.npz"),
        ("coco", "COCO_val2014_000000391895.jpg", "coco_val2014_000000391895.npz"),
        ("coco_train2014", "9", "coco_train2014_000000000009.npz"),
        ("vg", "2315446.jpg", "vg_000002315446.npz"),
        ("winoground_{}.npz", "0001_0", "winoground_0001_0.npz"),
        ("winoground", "images/ex_7_img_1.png", "winoground_0007_1.npz"),
        ("winoground", "0399_0.npz", "winoground_0399_0.npz"),
        ("winoground", "winoground_0012_1.npz", "winoground_0012_1.npz"),
        ("x_{:03d}.npz", "img7.png", "x_007.npz"),
    ],
)
def test_names(names: str, source: str, expected: str) -> None:
    assert image_namer(names)(source) == expected


def test_names_without_digits_are_refused() -> None:
    with pytest.raises(ValueError, match="does not end in a number"):
        image_namer("flickr30k")("dog.jpg")
    with pytest.raises(ValueError, match="train2014 or val2014"):
        image_namer("coco")("391895.jpg")
    for name in ("ex_7_img_2.png", "ex_img_1", "7.jpg"):
        with pytest.raises(ValueError, match="example and image, such as ex_7_img_1"):
            image_namer("winoground")(name)
    for names in ("plain", "{}{}.npz", "{x}.npz", "{"):
        with pytest.raises(UserError, match="names: expected one of"):
            image_namer(names)
