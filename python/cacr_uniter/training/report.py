"""The final report of a run: a Markdown page and its curves."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from cacr_uniter.files import replacing, write_text
from cacr_uniter.training.best import Best
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.sizes import show_size, show_time

#: the picture beside the page
CURVES = "report.png"

#: curves of the training records: field, title
TRAINED = (
    ("matching", "matching loss"),
    ("auxiliary", "auxiliary loss, unweighted"),
    ("first", "matched pair ranked first"),
    ("lr", "learning rate"),
    ("auxiliary_weight", "weight of the auxiliary loss"),
    ("grad_norm", "gradient norm before clipping"),
)


def write_report(
    path: Path,
    config: TrainConfig,
    history: list[dict[str, Any]],
    checkpoint: Path,
    best: Best,
    accelerator: Accelerator,
) -> None:
    """Writes ``path`` and ``report.png`` beside it from the log of a finished run."""
    trained = [record for record in history if record["event"] == "train"]
    last = trained[-1]
    device = "CPU"
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    pairs = 2 if config.batch.halves == "both" else 1
    pairs *= config.batch.anchors * (config.batch.negatives + 1) * config.optim.steps
    facts = {
        "steps": config.optim.steps,
        "trained pairs": f"{pairs:,}",
        "time": f"{show_time(last['seconds'])} on {accelerator.num_processes} process(es), {device}",
        "pairs per second at the end": f"{last['pairs_per_second']:.0f}",
        "peak memory": show_size(last["memory"]),
        "precision": config.run.precision,
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "checkpoint": f"`{checkpoint}`",
    }
    if "loss_scale" in last:
        facts["updates skipped after an fp16 overflow"] = str(sum(record.get("skipped", 0) for record in trained))
    if best.path is not None:
        facts["best on validation"] = str(best)
    final = {title: "-" if last[field] is None else f"{last[field]:.4g}" for field, title in TRAINED}
    lines = ["# Training report", "", *_table(("", ""), facts.items()), "", "## Last training record", ""]
    lines += [*_table(("quantity", "value"), final.items()), ""]
    for record in (record for record in history if record["event"] == "weights"):
        lines += ["## Starting weights", "", "```", record["report"], "```", ""]
    for event in ("validation", "evaluation"):
        records = [{k: v for k, v in record.items() if k != "event"} for record in history if record["event"] == event]
        if records:
            rows = [[_show(value) for value in record.values()] for record in records]
            lines += [f"## {event.capitalize()}", "", *_table(tuple(records[-1]), rows), ""]
    lines += [f"![curves]({CURVES})", "", "## Configuration", "", "```yaml"]
    lines += [yaml.safe_dump(config.to_repeat(), sort_keys=False).rstrip(), "```", ""]
    _draw(path.with_name(CURVES), trained, [r for r in history if r["event"] != "train"])
    write_text(path, "\n".join(lines))


def _show(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *rows)]


def _draw(path: Path, trained: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3).flatten()
    for axis, (field, title) in zip(axes, TRAINED):
        axis.plot([r["step"] for r in trained], [r[field] for r in trained], linewidth=0.8)
        axis.set_title(title, fontsize=9)
    axes[6].plot([r["step"] for r in trained], [r["pairs_per_second"] for r in trained], linewidth=0.8)
    axes[6].set_title("pairs per second", fontsize=9)
    for axis, event in zip(axes[7:], ("validation", "evaluation")):
        records = [r for r in others if r["event"] == event]
        for name in records[-1] if records else ():
            if name not in ("step", "event", "candidates"):
                axis.plot([r["step"] for r in records], [r.get(name) for r in records], marker=".", label=name)
        axis.set_title(event, fontsize=9)
        if records:
            axis.legend(fontsize=7)
    for axis in axes:
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
