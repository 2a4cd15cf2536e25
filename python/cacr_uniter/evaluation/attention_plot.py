"""The picture of `cacr eval attention`: a pair's own attention beside the one through the other side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cacr_uniter.evaluation.congruence import SIDES, Maps
from cacr_uniter.files import replacing

MOST_LABELS = 60
"""Rows that get a label each; more would overlap."""


def draw(path: Path, maps: Mapping[str, Maps], labels: Mapping[str, Sequence[str]], title: str) -> None:
    """Writes a PNG: a row of pictures for each side, its own attention, the projected one, and their difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.5), layout="constrained")
    figure.suptitle(title)
    for row, side in enumerate(SIDES):
        own, projected = maps[side]
        other = SIDES[1 - row]
        most, apart = max(own.max(), projected.max()), abs(own - projected).max()
        panels = (
            (f"{side}: own attention", own, {"cmap": "viridis", "vmin": 0.0, "vmax": most}),
            (f"{side}: through {other}", projected, {"cmap": "viridis", "vmin": 0.0, "vmax": most}),
            ("through - own", projected - own, {"cmap": "RdBu_r", "vmin": -apart, "vmax": apart}),
        )
        for column, (name, values, look) in enumerate(panels):
            axes = figure.add_subplot(2, 3, 3 * row + column + 1)
            figure.colorbar(axes.imshow(values, **look), ax=axes, shrink=0.8)
            axes.set_title(name)
            numbers = range(len(values)) if len(values) <= MOST_LABELS else range(0)
            axes.set_xticks(numbers, [labels[side][i] for i in numbers], rotation=90, fontsize=7)
            axes.set_yticks(numbers, [labels[side][i] for i in numbers], fontsize=7)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
