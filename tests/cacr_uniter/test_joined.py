"""Several databases as one: the pairs of all of them, as COCO's train and restval need it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import yaml

from cacr_uniter import cli
from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.dataset import RetrievalDataset
from cacr_uniter.data.joined import open_images, open_texts
from cacr_uniter.data.lmdb import ImageDB, ImageDBWriter, TextDB, TextDBWriter
from cacr_uniter.errors import UserError
from cacr_uniter.training.testing import SMALL, write_databases

SPECIAL = {"UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs of `whole` in two databases each; image 9 has a caption in either."""
    root = tmp_path_factory.mktemp("halves")
    whole = write_databases(root / "whole")
    texts, images = TextDB(whole / "txt" / "train.db"), ImageDB(whole / "img")
    keys, names = texts.ids(), images.names()
    for part, own in (("a", keys[:19]), ("b", keys[19:])):
        with TextDBWriter(root / f"{part}.db", SPECIAL, texts.vocab_size, "vocab") as writer:
            for key in own:
                writer.write(key, texts.caption(key).input_ids, texts.txt2img[key])
    for part, own in (("a", names[:8]), ("b", names[8:])):
        with ImageDBWriter(root / part, dtype="float32") as writer:
            for name in own:
                record = images.record(name)
                writer.write(name, record["features"], record["norm_bb"])
    return root


def folders(root: Path) -> tuple[list[str], list[str]]:
    return [str(root / f"{part}.db") for part in "ab"], [str(root / part) for part in "ab"]


def test_two_halves_are_the_whole(halves: Path) -> None:
    texts, images = folders(halves)
    joined = RetrievalDataset(open_texts(texts), open_images(images, BoxRule()))
    joined = pickle.loads(pickle.dumps(joined))
    whole = RetrievalDataset(
        open_texts(str(halves / "whole/txt/train.db")), open_images(str(halves / "whole/img"), BoxRule())
    )
    assert (joined.caption_ids, joined.image_names) == (whole.caption_ids, whole.image_names)
    assert (joined.txt2img, joined.img2txts) == (whole.txt2img, whole.img2txts)
    assert joined.image_db.names() == whole.image_db.names()
    assert joined.image_db.has_counts
    pairs = list(zip(whole.caption_ids, reversed(whole.caption_ids), strict=True))
    one, two = (data.batch([(key, data.txt2img[other]) for key, other in pairs]) for data in (joined, whole))
    for name, value in vars(one).items():
        torch.testing.assert_close(value, getattr(two, name), rtol=0, atol=0)
    assert [joined.image_db.count(name) for name in joined.image_names] == [
        whole.image_db.count(name) for name in whole.image_names
    ]
    for key, database in (("absent", joined.text_db.caption), ("absent.npz", joined.image_db.read)):
        with pytest.raises(UserError, match=f"no record '{key}'"):
            database(key)
    joined.text_db.close()
    joined.image_db.close()


def test_what_does_not_belong_together_is_refused(halves: Path, tmp_path: Path) -> None:
    texts, images = folders(halves)
    with pytest.raises(UserError, match=r"caption .0. is in .*a\.db too"):
        open_texts([texts[0], texts[1], texts[0]])
    with TextDBWriter(tmp_path / "c.db", SPECIAL, 31, "vocab") as writer:
        writer.write("x", [5], "0.npz")
    with pytest.raises(UserError, match="different vocabularies"):
        open_texts([texts[0], str(tmp_path / "c.db")])
    with ImageDBWriter(tmp_path / "c") as writer:
        writer.write("x.npz", torch.ones(3, 5).numpy(), torch.zeros(3, 6).numpy())
    with pytest.raises(UserError, match="features of 12 and 5 numbers"):
        open_images([images[0], str(tmp_path / "c")], BoxRule())
    for opened in (lambda: open_texts([]), lambda: open_images([], BoxRule())):
        with pytest.raises(UserError, match="got an empty list"):
            opened()


def test_training_reads_lists(halves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = []
    texts, images = folders(halves)
    whole = str(halves / "whole" / "txt" / "train.db"), str(halves / "whole" / "img")
    for out, text, image in (("one", *whole), ("two", f"[{','.join(texts)}]", f"[{','.join(images)}]")):
        values = SMALL | {"run.out": tmp_path / out, "data.text": text, "data.images": image, "optim.steps": 2}
        words = ["train", "--progress", "false", *(f"--{key}={value}" for key, value in values.items())]
        assert cli.main([*words, "--plan"]) == 0
        logs.append(capsys.readouterr().out)
        assert cli.main(words) == 0
        capsys.readouterr()
    assert logs[0] == logs[1]
    saved = yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())
    assert (saved["data"]["text"], saved["data"]["images"]) == (texts, images)
    weights = [(tmp_path / out / "checkpoints/step-00000002/model.safetensors").read_bytes() for out in ("one", "two")]
    assert weights[0] == weights[1]
    assert cli.main(["train", "--progress", "false", "--config", str(tmp_path / "two" / "config.yaml")]) == 0
