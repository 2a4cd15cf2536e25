"""The training step on tensors that have shapes and no numbers, and the bytes that are alive at each moment of it.

The step is the real one (``Stepper``). Attention and dropout are replaced by the operators that torch takes on a GPU,
CACR by a function that keeps what its kernels keep. What libraries allocate for themselves is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cacr_uniter.data.batch import Pairs
from cacr_uniter.model import UniterConfig
from cacr_uniter.training.build import build_model
from cacr_uniter.training.config import TrainConfig
from cacr_uniter.training.optim import trained_parameters
from cacr_uniter.training.sampling import Indices
from cacr_uniter.training.shared import Contrast
from cacr_uniter.training.step import Portion, Stepper

#: the GPU's allocator gives whole blocks
BLOCK = 512
#: float32 numbers that the GPU's CACR kernels keep of a row of scores
ROW_NUMBERS = 8
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators inside the block make, while they live, in ``live`` and ``peak``.

    Tensors that were there before do not count; what an operator takes and returns within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, counts=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._meet(tensor, counts=True)
        return out

    def _meet(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK if counts else 0
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def lap(self) -> int:
        """The peak since the last lap."""
        peak, self.peak = self.peak, self.live
        return peak


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class AsOnGPU(TorchFunctionMode):
    """Masked attention and dropout by the operators of a GPU: memory-efficient attention, dropout with a mask of bytes.

    On the CPU attention with dropout would keep its probabilities, and dropout whole floats. Checks of values, of which
    there are none, find nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is Tensor.__bool__:
            return False
        return func(*args, **kwargs)

    @classmethod
    def around(cls, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, inside of the mode."""

        def inside(*args: Any) -> Tensor:
            with cls():
                return function(*args)

        return inside

    @staticmethod
    def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    @staticmethod
    def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float) -> Tensor:
        batch, heads, rows, _ = q.shape
        columns = k.shape[2]
        bias = torch.zeros(batch, 1, 1, -(-columns // 8) * 8, dtype=q.dtype)[..., :columns]
        bias = bias.expand(batch, heads, rows, columns)
        learn = torch.is_grad_enabled() and q.requires_grad
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, learn, dropout_p, False)[0]


class _Kernel(torch.autograd.Function):
    """Keeps the inputs and `ROW_NUMBERS` a row; the backward has a workspace of one input, in float32."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        ctx.save_for_backward(*inputs, x.new_empty(*x.shape[:2], ROW_NUMBERS, x.shape[2]))
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *inputs, _ = ctx.saved_tensors
        workspace = torch.empty_like(inputs[0])
        found = tuple(torch.empty_like(x) for x in inputs)
        del workspace
        return found


def _kernel(*inputs: Tensor, **options: Any) -> Tensor:
    return _Kernel.apply(*inputs)


class LongestPairs(Pairs):
    """Pairs that are all as long as the longest, and that are copied when they are moved, as from CPU to GPU."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LongestPairs:
        return LongestPairs(**{name: tensor.clone() for name, tensor in vars(self).items()})

    def longest(self, rows: slice | Tensor) -> tuple[int, int]:
        return self.input_ids.shape[1] - 2, self.features.shape[1]


@dataclass
class Longest:
    """A source (``PairSource``) with enough captions and images, one caption an image, all of the longest kind.

    Args:
        n_images: images.
        img_dim: width of a region feature.
        text: columns of a text.
        regions: regions of an image.
        dtype: of the features.
    """

    n_images: int
    img_dim: int
    text: int
    regions: int
    dtype: torch.dtype
    workers: int = 0

    def __post_init__(self) -> None:
        self.image_of: Indices = np.arange(self.n_images)

    def pairs(self, captions: Indices, images: Indices) -> Pairs:
        texts, pictures, count = len(set(captions.tolist())), len(set(images.tolist())), len(captions)
        return LongestPairs(
            input_ids=torch.empty(texts, self.text, dtype=torch.int64),
            n_text=torch.empty(texts, dtype=torch.int32),
            features=torch.empty(pictures, self.regions, self.img_dim, dtype=self.dtype),
            boxes=torch.empty(pictures, self.regions, 7),
            n_regions=torch.empty(pictures, dtype=torch.int32),
            caption=torch.empty(count, dtype=torch.int64),
            image=torch.empty(count, dtype=torch.int64),
            sizes=torch.empty(count, 2, dtype=torch.int32),
        )

    def contrasts(self) -> list[Contrast]:
        one = self.image_of[:, None]
        return [Contrast((i, i + 1), (one[i], one[i + 1])) for i in range(0, self.n_images - 1, 2)]


class _Recorder:
    """Stands for the accelerator of one process; ``backward`` notes what is alive before it."""

    num_processes, process_index, scaler = 1, 0, None
    device = torch.device("cpu")

    def __init__(self, precision: str, bytes_: LiveBytes) -> None:
        self.half, self.bytes, self.kept = HALF.get(precision), bytes_, 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.half is None else torch.autocast("cpu", self.half)

    def backward(self, loss: Tensor) -> None:
        self.kept = self.bytes.live
        loss.backward()


class _DryStepper(Stepper):
    def score(self, pairs: Pairs) -> Tensor:
        """Of the equal chunks two are enough: the second has all weights cast beside it."""
        chunk = self.config.batch.score_chunk
        with self.accelerator.autocast():
            for start in range(0, min(len(pairs), 2 * chunk), chunk):
                self.model(pairs.batch(slice(start, start + chunk)))
        return torch.empty(len(pairs))


@dataclass(frozen=True)
class Use:
    """Bytes of one process beside weights, gradients and moments.

    Args:
        batch: the pairs with gradient.
        activations: kept for the backward, with the weights that autocast cast.
        backward: what the backward takes beside them at its peak.
        scoring: peak while a pool is scored without gradient, the pool included.
    """

    batch: int
    activations: int
    backward: int
    scoring: int

    @property
    def training(self) -> int:
        """Peak with gradient."""
        return self.batch + self.activations + self.backward

    @property
    def peak(self) -> int:
        """Peak of the step."""
        return max(self.training, self.scoring)


class DryRun:
    """Steps of a model of the longest pairs, on tensors without numbers.

    Args:
        sizes: of the model.
        config: of the run.
        text: longest text in columns, [CLS] and [SEP] included.
        regions: most regions of an image.
        dtype: of the features as they are stored.

    Attributes:
        parameters: numbers of all parameters.
        trained: of the trained ones.
        whole: groups of a step, which is the most that a portion can have.
    """

    def __init__(
        self, sizes: UniterConfig, config: TrainConfig, text: int, regions: int, dtype: torch.dtype = torch.float16
    ) -> None:
        batch = config.batch
        aux = replace(config.aux, backend="auto")
        self.config = replace(config, model=replace(config.model, checkpoint=None), aux=aux)
        candidates = config.run.validation_candidates if config.run.validate_every else 0
        images = max(2 * batch.anchors, batch.pool + 2, batch.negatives + 2, candidates)
        self.source = Longest(images + images % 2, sizes.img_dim, text, regions, dtype)
        self.candidates = candidates
        self.fake = FakeTensorMode()
        with self.fake:
            self.model, _ = build_model(self.config.model, sizes, config.run.seed)
        for layer in self.model.uniter.encoder.layer:  # in the backward, which recomputes them, no mode of ours is on
            layer.forward = AsOnGPU.around(layer.forward)
        trained = trained_parameters(self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trained = sum(p.numel() for p in trained.values())
        self.whole = batch.anchors * (2 if batch.halves == "both" else 1)

    def use(self, groups: int) -> Use:
        """What a step needs whose portions have so many groups."""
        with self.fake, LiveBytes() as counted, AsOnGPU():
            recorder = _Recorder(self.config.run.precision, counted)
            stepper = self._stepper(groups, recorder)
            portion = self._largest(stepper)
            counted.lap()
            start, marks = counted.live, list[tuple[int, int]]()

            def training_begins(module: nn.Module, arguments: Any) -> None:
                if torch.is_grad_enabled():
                    marks.append((counted.lap() - start, counted.live - start))

            hook = self.model.register_forward_pre_hook(training_begins)
            self.model.train()
            stepper.backward(portion)
            hook.remove()
            peak = counted.lap() - start
            ((scoring, batch),) = marks
            if self.candidates:
                scoring = max(scoring, self._validation(stepper, counted))
        kept = recorder.kept - start
        return Use(batch, kept - batch, peak - kept, scoring)

    def _stepper(self, groups: int, recorder: _Recorder) -> Stepper:
        size = self.config.batch.negatives + 1
        config = replace(self.config, batch=replace(self.config.batch, pairs_per_forward=groups * size))
        parameters = list(trained_parameters(self.model).values())
        optimizer = cast(torch.optim.Optimizer, None)  # never asked to update
        stepper = _DryStepper(self.model, parameters, optimizer, config, self.source, cast(Accelerator, recorder))
        if stepper.auxiliary is not None:
            stepper.auxiliary.fused_scores = stepper.auxiliary.fused_qk = _kernel
        return stepper

    def _largest(self, stepper: Stepper) -> Portion:
        """The portion of a step with the most pairs, and of those the one with the most images."""
        largest: Portion | None = None
        for portion in stepper.portions(self.config.optim.steps - 1):
            if largest is None or _extent(portion) > _extent(largest):
                largest = portion
        assert largest is not None
        return largest

    @torch.no_grad()
    def _validation(self, stepper: Stepper, counted: LiveBytes) -> int:
        start = counted.live
        self.model.eval()
        all_images = np.arange(self.candidates)
        stepper.score(self.source.pairs(all_images[:1].repeat(self.candidates), all_images))
        return counted.lap() - start


def _extent(portion: Portion) -> tuple[int, int]:
    return len(portion.pairs), len(portion.pairs.features)
