"""From the image names of a source to the npz names that text and image databases share."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from pathlib import PurePath

from cacr_uniter.errors import UserError

PATTERNS = {
    "keep": "{}.npz",
    "flickr30k": "flickr30k_{:012d}.npz",
    "coco_train2014": "coco_train2014_{:012d}.npz",
    "coco_val2014": "coco_val2014_{:012d}.npz",
    "vg": "vg_{:012d}.npz",
}
WINOGROUND = "winoground_{:04d}_{}.npz"
SUFFIXES = (".jpg", ".jpeg", ".png", ".npz", ".npy")


def image_namer(names: str) -> Callable[[str], str]:
    """A function from a source's image id or file name to the npz name.

    Args:
        names: "keep" (stem + .npz), a known set ("flickr30k", "coco_train2014", "coco_val2014", "vg"), "coco" (file
            names that say train2014 or val2014), "winoground" (`ex_7_img_1`, as the published pictures are called, or
            `0007_1`), or a pattern with one field, such as "mine_{:08d}.npz". A numeric field takes the digits at the
            end of the name.

    Raises:
        UserError: `names` is none of these. The returned function raises ValueError for a name without digits.
    """
    if names in SPECIAL:
        return SPECIAL[names]
    pattern = PATTERNS.get(names, names)
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
    except ValueError:
        fields = []
    if fields != [""]:
        known = ", ".join([*SPECIAL, *PATTERNS])
        raise UserError(
            f"names: expected one of {known}, or a pattern with one field like 'x_{{:012d}}.npz', got {names!r}"
        )
    numeric = bool(re.search(r"\{:[^}]*d\}", pattern))

    def name(source: str) -> str:
        stem = _stem(source)
        return pattern.format(_number(stem) if numeric else stem)

    return name


def _stem(source: str) -> str:
    path = PurePath(source)
    while path.suffix.lower() in SUFFIXES:
        path = path.with_suffix("")
    return path.name


def _number(stem: str) -> int:
    digits = re.search(r"(\d+)$", stem)
    if digits is None:
        raise ValueError(f"image name {stem!r} does not end in a number; choose other names, for example keep")
    return int(digits[1])


def _coco_name(source: str) -> str:
    stem = _stem(source)
    split = re.search(r"(train2014|val2014)_(\d+)$", stem)
    if split is None:
        raise ValueError(
            f"image name {stem!r} does not say train2014 or val2014; name the set: coco_train2014 or coco_val2014"
        )
    return f"coco_{split[1]}_{int(split[2]):012d}.npz"


def _winoground_name(source: str) -> str:
    stem = _stem(source)
    found = re.search(r"(\d+)(?:_img)?_([01])$", stem)
    if found is None:
        raise ValueError(f"image name {stem!r} does not end in example and image, such as ex_7_img_1 or 0007_1")
    return WINOGROUND.format(int(found[1]), found[2])


SPECIAL = {"coco": _coco_name, "winoground": _winoground_name}
