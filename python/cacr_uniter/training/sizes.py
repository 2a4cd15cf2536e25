"""Sizes in bytes and times, read and written as people write them. Standard library only."""

from __future__ import annotations

import re

from cacr_uniter.errors import UserError

UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def parse_size(text: str, name: str) -> int:
    """Bytes of ``11GB`` (10^9), ``11GiB`` (2^30), ``500 MB`` or a plain number.

    Raises:
        UserError: another form; ``name`` is the option.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"{name} is {text!r}: give a size such as 11GB, 11GiB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def show_size(size: float) -> str:
    """``11.3 GB``, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def show_time(seconds: float) -> str:
    """Seconds below two minutes, else minutes, else hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
