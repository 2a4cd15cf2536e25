"""The configuration of a training run: plain typed dataclasses, filled from YAML and the command line by jsonargparse.

Defaults are those of the published Flickr30k recipe (UNITER, IAIS) unless the field says otherwise. Only the standard
library is imported here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Half = Literal["image", "text"]


@dataclass(frozen=True)
class DataConfig:
    """Where the training pairs come from.

    Args:
        scenes: folder written by ``cacr data scenes``; stands for the four paths below.
        text: folder of the training captions (published text LMDB), or a list of them: COCO has train and restval.
        images: folder of the region features (published image LMDB), or a list: COCO has train2014 and val2014.
        val_text: folder of the validation captions; none means no validation.
        val_images: folder of their region features (default: ``images``).
        max_text: longest caption used for training, in word pieces without [CLS] and [SEP]; -1 keeps all.
        missing: captions whose image is not among the region features: ``refuse`` them, or ``skip`` them and say how
            many; of the training only, validation refuses them always.
        max_regions: upper bound of the regions used of an image, by confidence.
        min_regions: lower bound, also below the confidence threshold.
        confidence: regions above this confidence are used.
        fixed_regions: use so many regions of every image instead (published without adaptive boxes: 36).
        cache: ``memory`` decodes everything once and keeps it as tensors; ``disk`` reads records when they are needed;
            ``auto`` is ``memory`` if it fits in ``cache_limit``.
        cache_limit: size such as ``4GB``.
        workers: threads that read ahead (``disk`` only).
    """

    scenes: str | None = None
    text: str | list[str] | None = None
    images: str | list[str] | None = None
    val_text: str | None = None
    val_images: str | None = None
    max_text: int = 60
    missing: Literal["refuse", "skip"] = "refuse"
    max_regions: int = 100
    min_regions: int = 10
    confidence: float = 0.2
    fixed_regions: int | None = None
    cache: Literal["auto", "memory", "disk"] = "auto"
    cache_limit: str = "4GB"
    workers: int = 2


@dataclass(frozen=True)
class ModelConfig:
    """The model: a published size, or another one.

    Args:
        size: ``base``, ``large``, or the path of a JSON file with the published keys.
        checkpoint: local weights to start from (any dialect the loader knows, or a folder written by ``cacr train``);
            none starts from random weights.
        hidden_size: width of a layer, replaces that of ``size``, as the next three do.
        num_hidden_layers: layers of the encoder.
        num_attention_heads: heads of a layer.
        intermediate_size: width inside a feed-forward block.
        vocab_size: word pieces of the vocabulary; by default the data says.
        img_dim: numbers of a region's feature; by default the data says.
        initializer_range: deviation of random weights, replaces that of ``size``; small models need more than 0.02.
        dropout: probability of every dropout.
        freeze_layers: the embeddings and the first so many layers are not trained, and no activation is kept for them;
            0 trains everything.
        activation_checkpointing: recompute each layer in the backward: less memory, about a third more time.
    """

    size: str = "base"
    checkpoint: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    img_dim: int | None = None
    initializer_range: float | None = None
    dropout: float = 0.1
    freeze_layers: int = 0
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class BatchConfig:
    """What one optimizer step sees, and in which portions.

    Args:
        anchors: matched pairs per half and optimizer step, over all processes. The published runs accumulate 8 per
            process (UNITER, IAIS; 8 processes: 64) or 4 (the paper; 4 processes: 16).
        halves: ``both`` is the published recipe: image-anchored groups (one image, captions compete) and text-anchored
            groups (one caption, images compete).
        negatives: negatives per matched pair that get a gradient.
        mining: ``hard`` scores a pool without gradient and keeps the highest; ``random`` draws the negatives;
            ``shared`` makes the step's matched pairs each other's negatives, which is what random weights need.
        contrasts: with ``shared``, draw the matched pairs as contrasts (scene sets have them), each other's first
            negative.
        pool: size of that pool, without the matched pair.
        pairs_per_forward: upper bound of the pairs in one forward with gradient (whole groups).
        score_chunk: pairs in one forward without gradient.
    """

    anchors: int = 8
    halves: Literal["both", "image", "text"] = "both"
    negatives: int = 31
    mining: Literal["hard", "random", "shared"] = "hard"
    contrasts: bool = False
    pool: int = 399
    pairs_per_forward: int = 32
    score_chunk: int = 400


@dataclass(frozen=True)
class LossConfig:
    """The matching loss of a group: p_0 is the matched pair, p_1..p_K the negatives.

    Args:
        kind: ``margin``: mean_k max(0, margin + p_k - p_0) on p = sigmoid(rank score) (published);
            ``softmax``: -log softmax(rank scores)_0, which learns faster from random weights.
        margin: of the ranking loss.
    """

    kind: Literal["margin", "softmax"] = "margin"
    margin: float = 0.2


@dataclass(frozen=True)
class AuxConfig:
    """The auxiliary loss on the attention of the pairs.

    Every ambiguity of the paper is a field; the defaults are what its authors most probably ran, being those of the
    IAIS code wherever the paper says nothing else. ``kind``, ``row_reduction``, ``stop_gradient``, ``projection_scale``
    and ``backend`` belong to ``cacr`` alone.

    Args:
        loss: ``cacr`` (Eq. 6), ``iais-singular``, ``iais-distributed`` or ``none``.
        source: ``scores`` forms S = q k^T / sqrt(d) of the matched pairs; ``qk`` never forms it (``cacr`` only).
        kind: what the triple product holds: ``scores`` (Eq. 3-6 as printed), ``softmax`` (each head's probabilities
            inside each block) or ``probs`` (the probabilities are the target too; needs ``heads: mean``).
        heads: ``each`` (a loss per head, averaged), ``mean`` (probabilities averaged over heads), ``mean-scores`` or
            ``sum-scores`` (scores averaged or summed over heads).
        sides: ``both`` (Eq. 6), ``text``, ``vision``, or ``alternate``: vision in image-anchored groups, text in
            text-anchored ones (IAIS).
        special_tokens: whether [CLS] and [SEP] count as text.
        pairs: ``positives``: the matched pair of each group; ``all``: its negatives too, averaged over the group.
        layers: which layers, negative counts from the end; the losses are averaged.
        stop_gradient: ``none``, ``target`` (S_aa) or ``projection`` (the triple product).
        row_reduction: ``sum`` over rows (Eq. 4) or ``mean`` (IAIS).
        projection_scale: factor of the triple product before its softmax, one over its temperature; ``mean`` is
            1 / n_b^2 (Algorithm 1).
        scaled: whether scores are divided by sqrt(d); the paper prints none.
        weight: largest weight.
        schedule: weight at u = s / T: ``exp`` exp(5 (u - 1)), ``linear`` u, ``log`` 1 - exp(-5 u), ``constant`` 1.
        normalise: ``accum``: averaged over the matched pairs of a step like the matching loss; ``reference``: not
            divided by the accumulated micro-steps, that is ``reference_batch`` times larger (IAIS).
        reference_batch: accumulated micro-steps of the reference run (IAIS 8, the paper 4).
        backend: of the kernels.
    """

    loss: Literal["none", "cacr", "iais-singular", "iais-distributed"] = "cacr"
    source: Literal["scores", "qk"] = "scores"
    kind: Literal["scores", "softmax", "probs"] = "probs"
    heads: Literal["each", "mean", "mean-scores", "sum-scores"] = "mean"
    sides: Literal["both", "text", "vision", "alternate"] = "both"
    special_tokens: bool = False
    pairs: Literal["positives", "all"] = "positives"
    layers: list[int] = field(default_factory=lambda: [-1])
    stop_gradient: Literal["none", "target", "projection"] = "none"
    row_reduction: Literal["sum", "mean"] = "mean"
    projection_scale: float | Literal["mean"] = 1.0
    scaled: bool = True
    weight: float = 1.0
    schedule: Literal["exp", "linear", "log", "constant"] = "exp"
    normalise: Literal["accum", "reference"] = "reference"
    reference_batch: int = 8
    backend: Literal["auto", "triton", "cuda", "cpu", "reference"] = "auto"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate.

    Args:
        lr: largest learning rate: lr s / w while s < w, then lr (T - s) / (T - w), with s counted from 1.
        decay: shape after the warm-up: ``linear`` (published) or ``constant``.
        steps: optimizer steps T.
        warmup: steps w of the warm-up.
        betas: decay of the running mean of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: decoupled from the gradient (AdamW).
        decay_rule: ``reference`` exempts names that contain ``bias``, ``LayerNorm.weight`` or ``LayerNorm.bias`` (two
            image norms are decayed, as published); ``norms-exempt`` exempts every bias and norm.
        clip: largest L2 norm of the whole gradient; 0 switches clipping off.
    """

    lr: float = 5e-5
    decay: Literal["linear", "constant"] = "linear"
    steps: int = 5000
    warmup: int = 500
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    decay_rule: Literal["reference", "norms-exempt"] = "reference"
    clip: float = 2.0


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run executes.

    Args:
        out: folder of the run: checkpoints, logs, report.
        seed: of everything.
        device: ``auto`` is the GPU if there is one.
        precision: of the autocast forward; losses and attention scores of the auxiliary loss are float32 always.
        memory_limit: largest GPU memory of the process, such as ``11GB`` (10^9) or ``11GiB``.
        threads: CPU threads of torch; none leaves its own choice.
        resume: ``auto`` continues the newest checkpoint in ``out``, ``no`` wants an empty ``out``, else the folder of a
            checkpoint, which counts as long as ``out`` holds no newer one.
        overwrite: delete an earlier run in ``out`` first.
        checkpoint_every: steps between checkpoints (one is written at the end too).
        keep: newest checkpoints that are kept.
        log_every: steps between lines of the log.
        tensorboard: write TensorBoard events beside the JSON lines.
        report: write ``report.md`` and its curves at the end.
        validate_every: steps between validations; 0 is never.
        best: what decides which validated weights are kept in ``out/best``: ``mean_r1`` (mean recall at 1 of images and
            captions), ``ir_r1``, ``tr_r1``, ``mean_rank`` (small is good), or ``none`` to keep none.
        validation_anchors: captions and images used by a validation.
        validation_candidates: candidates each of them is ranked among (the published validation: 400).
    """

    out: str = "runs/train"
    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    memory_limit: str | None = None
    threads: int | None = None
    resume: str = "auto"
    overwrite: bool = False
    checkpoint_every: int = 500
    keep: int = 3
    log_every: int = 10
    tensorboard: bool = True
    report: bool = True
    validate_every: int = 500
    best: Literal["mean_r1", "ir_r1", "tr_r1", "mean_rank", "none"] = "mean_r1"
    validation_anchors: int = 200
    validation_candidates: int = 400


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    aux: AuxConfig = field(default_factory=AuxConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, fit for YAML and JSON."""
        values = asdict(self)
        values["optim"]["betas"] = list(self.optim.betas)
        return values

    def to_repeat(self) -> dict[str, Any]:
        """``as_dict`` for a file that a run can be started from again: without ``run.overwrite``, which deletes one."""
        values = self.as_dict()
        del values["run"]["overwrite"]
        return values
