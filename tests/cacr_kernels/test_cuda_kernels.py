"""The CUDA kernels against the reference, on a card and, from the same source, on emulated threads.

The emulation (csrc/cuda/host/emulation.h) runs the threads as fibers in a shuffled order: it proves indexing, barriers
and mathematics without a card, and says nothing of speed or of the device code.
"""

import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from cacr_kernels import backends, fused_cacr, fused_cacr_blocks, native
from cacr_kernels.problem import Options, Spans
from cacr_kernels.reference import cacr_closed_form, cacr_loop
from cacr_kernels.reference.closed_form import scores_reference
from cacr_kernels.testing import loss_and_gradients, make_input, make_scores, relative_error, score_errors

NAN = float("nan")
#: sides, projection_scale, projection_mean, row_mean, stop_gradient, expected_grad, scale, backend of the operators
OPTIONS = ("both", 1.0, False, False, "none", 1.0, 1.0, "cuda")
CSRC = Path(__file__).parents[2] / "csrc"
KINDS = ("scores", "softmax", "probs")


def build_emulation(compiler, directory):
    """The native module with the CUDA kernels emulated; its CPU functions stay unresolved (lazy binding)."""
    import pybind11

    sources = ("bindings.cpp", "cuda/host/emulation.cpp", "cuda/forward.cu", "cuda/backward.cu")
    read = [p for where in ("*.cpp", "cuda/**/*.*", "include/*", "cpu/*.h") for p in sorted(CSRC.glob(where))]
    names = ("CACR_COMPILER", "CACR_CUDA_COMPILER", "CACR_CUDA_ARCHITECTURES", "CACR_CUDA_REASON")
    # another namespace: Python already knows the types of the installed module
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Dcacr=cacr_emulated", "-DCACR_WITH_CUDA"]
    flags += [f'-D{name}="emulation"' for name in names]
    flags += [f"-I{path}" for path in (CSRC, CSRC / "include", CSRC / "cuda")]
    flags += [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    flags += os.environ.get("CXXFLAGS", "").split()  # for example -fsanitize=address,undefined
    text = b"".join(p.read_bytes() for p in read) + f"{flags} {sys.version}".encode()
    folder = directory / hashlib.sha256(text).hexdigest()[:16]
    library = folder / "_native.so"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            folder.mkdir(exist_ok=True)
            objects = [folder / f"{Path(source).stem}.o" for source in sources]
            for source, target in zip(sources, objects, strict=True):
                level = "-O1" if source.startswith("cuda") else "-O0"
                command = [compiler, *flags, level, "-x", "c++", "-c", str(CSRC / source), "-o", str(target)]
                subprocess.run(command, check=True)
            unfinished = folder / "unfinished"
            link = [compiler, *flags, "-shared", "-Wl,-z,lazy", *map(str, objects), "-o", str(unfinished)]
            subprocess.run(link, check=True)
            unfinished.rename(library)
    return library


class Emulation:
    def __init__(self, library):
        self.controls = ctypes.CDLL(str(library), mode=os.RTLD_LAZY)
        self.controls.cacr_emulation_barriers.restype = ctypes.c_char_p
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)
        try:
            loader = importlib.machinery.ExtensionFileLoader("_native", str(library))
            self.module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_native", loader))
            loader.exec_module(self.module)
        finally:
            sys.setdlopenflags(flags)

    def configure(self, seed, skipped_barrier=""):
        self.controls.cacr_emulation_configure(ctypes.c_ulonglong(seed), skipped_barrier.encode())

    def tensor_cores(self, on):
        self.controls.cacr_emulation_tensor_cores(int(on))

    def multiply_add(self, a, b, d):
        """One instruction of a warp: a [32, 4, 2] and b [32, 2, 2] float16, d [32, 4] float32 in place."""
        assert self.controls.cacr_emulation_multiply_add(*(ctypes.c_void_p(x.data_ptr()) for x in (a, b, d))) == 0

    def launches(self):
        return self.controls.cacr_emulation_launches()

    def largest_y(self):
        return self.controls.cacr_emulation_largest_y()

    def barriers(self):
        return self.controls.cacr_emulation_barriers().decode().split()


@pytest.fixture(scope="session")
def emulation():
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs a C++17 compiler on Linux to build the emulated CUDA kernels")
    directory = CSRC.parent / "build" / "cuda_emulation"
    directory.mkdir(parents=True, exist_ok=True)
    return Emulation(build_emulation(compiler, directory))


@pytest.fixture
def emulated(emulation, monkeypatch):
    """backend="cuda" runs the emulated kernels on CPU tensors, two problems a chunk."""

    def run(problem, x, workspace_bytes, launch):
        workspace = torch.full((workspace_bytes(problem) // 4 * 2,), NAN)
        problem.set_workspace(workspace.data_ptr(), workspace.numel() * 4)
        launch(problem)

    monkeypatch.setattr(native, "_native", emulation.module)
    monkeypatch.setattr(native.cuda, "_run", run)
    monkeypatch.setattr(sys.modules[backends.__module__], "_why_not", lambda *_: "")
    emulation.configure(0)
    emulation.tensor_cores(True)
    return emulation


@pytest.fixture(params=["emulated", pytest.param("card", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of the tensors that backend="cuda" takes; what it must write starts as NaN."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    elif not backends()["cuda"].available:
        pytest.skip(f"cuda: {backends()['cuda'].reason}")
    monkeypatch.setattr(native, "_new_gradients", lambda inputs: [torch.full(x.shape, NAN).to(x) for x in inputs])
    return "cpu" if request.param == "emulated" else "cuda"


@pytest.fixture(params=["tensor cores", "multiply-adds"])
def products(request, device):
    """How the kernels multiply float16: emulated, as from sm_75 and as before; a card has its own way."""
    if device == "cpu":
        request.getfixturevalue("emulation").tensor_cores(request.param == "tensor cores")
    elif (torch.cuda.get_device_capability() >= (7, 5)) != (request.param == "tensor cores"):
        pytest.skip("cuda: the card multiplies float16 the other way")
    return request.param


@pytest.fixture
def emulated_order(request, device):
    """Changes the order of the emulated threads; a card has its own."""
    return request.getfixturevalue("emulation").configure if device == "cpu" else lambda seed: None


def cuda(x, n_text, **options):
    return fused_cacr(x, n_text, backend="cuda", **options)


def agree(attn, n_text, tolerance, **options):
    """Loss and gradient against the closed form in float64 on the same values."""
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, n_text, **options), attn)
    expected, (expected_gradient,) = loss_and_gradients(lambda x: cacr_closed_form(x, n_text, **options), attn.double())
    assert loss.dtype == torch.float32
    assert gradient.dtype == attn.dtype
    assert relative_error(loss, expected) < tolerance
    assert relative_error(gradient, expected_gradient) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_text", "n_vision"), [(1, 1), (2, 7), (33, 1), (7, 63), (63, 33), (129, 2), (65, 129)])
def test_sizes(device, kind, n_text, n_vision):
    attn = make_input(kind, n_text, n_vision, std=0.5, seed=n_text, device=device)
    agree(attn, n_text, 2e-5, kind=kind)


@pytest.mark.parametrize(
    "options",
    [
        {"sides": "text"},
        {"sides": "vision", "row_reduction": "mean"},
        {"projection_scale": 0.25, "reduction": "sum"},
        {"projection_scale": "mean"},
        {"stop_gradient": "target"},
        {"stop_gradient": "projection", "reduction": "none"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
@pytest.mark.parametrize("kind", KINDS)
def test_options(device, kind, options):
    agree(make_input(kind, 6, 9, batch=2, heads=3, std=0.5, seed=3, device=device), 6, 2e-5, kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(device, products, dtype, kind):
    if device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("cuda: bfloat16 needs compute capability 8.0")
    attn = make_input(kind, 20, 37, std=0.5, dtype=dtype, seed=1, device=device)
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 20, kind=kind), attn)
    expected, (expected_gradient,) = loss_and_gradients(lambda x: cacr_closed_form(x, 20, kind=kind), attn.double())
    assert relative_error(loss, expected) < 1e-5
    # two contributions of S_tt and S_vv, one rounding: half a unit in the last place, root mean square below a third
    assert relative_error(gradient, expected_gradient) < 0.35 * torch.finfo(dtype).eps


def test_half_precision_gradient_overflows_to_infinity(device, products):
    attn = make_scores(8, 8, std=150.0, dtype=torch.float16, seed=2, device=device)
    _, (gradient,) = loss_and_gradients(lambda x: cuda(x, 8), attn)
    _, (expected,) = loss_and_gradients(lambda x: cacr_closed_form(x, 8), attn.double())
    assert torch.isinf(expected.half()).any()
    assert torch.equal(gradient.isinf(), expected.half().isinf())


def half_precision_agrees(attn, n_text, weight=1.0, **options):
    """float16 against float64 on the same values: the loss, and the gradient, rounded once, also row by row."""
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, n_text, **options) * weight, attn)
    expected, (expected_gradient,) = loss_and_gradients(
        lambda x: cacr_closed_form(x, n_text, **options) * weight, attn.double()
    )
    eps = torch.finfo(torch.float16).eps
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 0.35 * eps
    # a row may lie where float16 has less than 11 bits: its rounding is half of 2^-24 an element
    rounding = 0.5 * eps * expected_gradient.norm(dim=-1) + 2.0**-25 * attn.shape[-1] ** 0.5
    assert ((gradient.double() - expected_gradient).norm(dim=-1) < 1.05 * rounding).all()


@pytest.mark.parametrize(("n_text", "n_vision"), [(1, 1), (2, 7), (33, 1), (7, 63), (63, 33), (129, 2), (65, 100)])
def test_half_precision_sizes(device, n_text, n_vision):
    attn = make_scores(n_text, n_vision, std=0.5, dtype=torch.float16, seed=n_text, device=device)
    half_precision_agrees(attn, n_text)


@pytest.mark.parametrize("kind", ["scores", "probs"])
@pytest.mark.parametrize(
    "options",
    [
        {"sides": "text", "projection_scale": "mean"},
        {"sides": "vision", "row_reduction": "mean"},
        {"stop_gradient": "target"},
        {"stop_gradient": "projection", "reduction": "none"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_half_precision_options(device, kind, options):
    attn = make_input(kind, 6, 19, batch=2, heads=2, std=0.5, dtype=torch.float16, seed=3, device=device)
    half_precision_agrees(attn, 6, kind=kind, **options)


def test_half_precision_ragged(device):
    """Spans of several sizes in one launch, what lies outside is NaN and gets a gradient of 0."""
    spans = {"text_start": [2, 30, 0], "n_text": [5, 70, 0], "vision_start": [8, 1, 4], "n_vision": [81, 17, 9]}
    attn = torch.full((3, 2, 100, 100), NAN, dtype=torch.float16, device=device)
    inside = torch.zeros_like(attn, dtype=torch.bool)
    for example, (text, n_text, vision, n_vision) in enumerate(zip(*spans.values(), strict=True)):
        where = torch.cat([torch.arange(text, text + n_text), torch.arange(vision, vision + n_vision)]).to(device)
        scores = make_scores(n_text, n_vision, heads=2, std=0.5, seed=example, dtype=torch.float16, device=device)
        attn[example][:, where[:, None], where] = scores[0]
        inside[example][:, where[:, None], where] = True
    table = {name: torch.tensor(values, device=device) for name, values in spans.items()}
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, **table, max_n_text=70, max_n_vision=81), attn)
    expected, (expected_gradient,) = loss_and_gradients(
        lambda x: cacr_closed_form(x, **table), attn.double().masked_fill(~inside, 0)
    )
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 0.35 * torch.finfo(torch.float16).eps
    assert (gradient[~inside] == 0).all()


def test_half_precision_layouts(device):
    attn = make_scores(19, 26, batch=2, heads=2, std=0.7, dtype=torch.float16, seed=6, device=device)
    for view in (attn.mT, attn[..., 1:40, 2:41], attn[:1, :1].expand(2, 2, 45, 45)):
        half_precision_agrees(view, 15)


@pytest.mark.parametrize(
    ("std", "weight", "options"),
    [
        # U is up to 1e6 and G down to 1e-9, then the other way round; float16 ends at 6e4 and 6e-8
        (100.0, 1.0, {"projection_scale": 1e-6}),
        (100.0, 2.0**10, {"projection_scale": 1e-6}),
        (1e-2, 1.0, {"projection_scale": 1e6}),
        (1e-3, 2.0**-20, {"projection_scale": 1e8}),
        # X is 1e15
        (1e4, 2.0**-40, {}),
        (1.0, 2.0**6, {"row_reduction": "mean"}),
    ],
)
def test_half_precision_of_any_magnitude(device, products, std, weight, options):
    attn = make_scores(20, 37, dtype=torch.float64, seed=5, device=device)
    half_precision_agrees((attn * std).half(), 20, weight, **options)


def test_half_precision_rows_of_any_magnitude(device, products):
    """Rows of S from 1e-4 to 1e3: their U lie nine decades apart, and each row's X has a softmax of its own."""
    order = torch.randperm(57, generator=torch.Generator().manual_seed(0))
    rows = torch.logspace(-4, 3, 57, dtype=torch.float64)[order]
    attn = make_scores(20, 37, dtype=torch.float64, seed=5) * rows[:, None]
    half_precision_agrees(attn.half().to(device), 20, projection_scale=1e-3)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), NAN])
def test_half_precision_is_nan_where_a_score_is_not_finite(device, products, value):
    attn = make_scores(5, 9, dtype=torch.float16, device=device)
    attn[..., 2, 8] = value
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 5), attn)
    assert loss.isnan()
    assert gradient.isnan().any()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "heads last"])
def test_layouts(device, layout):
    attn = {
        "transposed": lambda: make_scores(9, 12, batch=2, heads=2, device=device).mT,
        "sliced": lambda: make_scores(11, 13, batch=2, heads=2, device=device)[..., 1:22, 2:23],
        "expanded": lambda: make_scores(9, 12, heads=1, device=device).expand(3, 2, 21, 21),
        "heads last": lambda: make_scores(9, 12, batch=2, heads=21, device=device).movedim(1, -1)[:, 0:2],
    }[layout]()
    agree(attn[..., :21, :21], 9, 2e-5)


# text_start, n_text, vision_start, n_vision of examples with 32 tokens, at most 9 and 20 in a span
VALID = [[1, 5, 8, 20], [20, 7, 2, 11], [0, 0, 4, 9], [3, 9, 12, 20], [2, 4, 6, 1], [7, 3, 0, 0]]
INVALID = [[30, 4, 0, 5], [-1, 3, 9, 9], [0, 4, 3, 9], [0, 10, 10, 5], [0, 3, 2**31 - 1, 20], [-(2**31), 2, 5, -3]]


def problem_of(table, kind, bounds, device):
    """Arguments of the operators after the tensors: the public functions refuse invalid spans that they can see."""
    return (torch.tensor(table, dtype=torch.int32, device=device), 0, bounds[0], 0, bounds[1], kind, *OPTIONS)


def forward_and_backward(inputs, problem):
    loss, saved = torch.ops.cacr_kernels.scores_forward(inputs, *problem, True)
    gradients = torch.ops.cacr_kernels.scores_backward(torch.ones_like(loss), inputs, saved, *problem)
    return loss, gradients


@pytest.mark.parametrize("kind", KINDS)
def test_span_tables_with_empty_and_invalid_examples(device, kind):
    """Nothing outside the spans is read (NaN there) or given a gradient; an invalid example is NaN throughout."""
    n_valid = len(VALID)
    attn = make_scores(12, 20, batch=n_valid + len(INVALID), heads=2, std=0.5, seed=4, device=device)
    attn = attn.softmax(-1) if kind == "probs" else attn
    inside = torch.zeros(len(attn), 32, dtype=torch.bool, device=device)
    for example, (text, n_text, vision, n_vision) in enumerate(VALID):
        inside[example, text : text + n_text] = inside[example, vision : vision + n_vision] = True
    inside = (inside[:, None, :, None] & inside[:, None, None, :]).expand_as(attn)
    problem = problem_of(VALID + INVALID, kind, (9, 20), device)
    loss, (gradient,) = forward_and_backward([attn.masked_fill(~inside, NAN)], problem)

    table = torch.tensor(VALID, device=device)
    spans = dict(zip(("text_start", "n_text", "vision_start", "n_vision"), table.T, strict=True))
    expected, (expected_gradient,) = loss_and_gradients(
        lambda x: cacr_closed_form(x, **spans, kind=kind, reduction="none"), attn[:n_valid].double()
    )
    assert relative_error(loss[:n_valid], expected) < 2e-5
    assert relative_error(gradient[:n_valid], expected_gradient) < 2e-5
    assert (gradient[:n_valid][~inside[:n_valid]] == 0).all()
    assert (loss[[2, 5]] == 0).all()
    assert (gradient[[2, 5]] == 0).all()
    assert loss[n_valid:].isnan().all()
    assert gradient[n_valid:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_four_blocks_with_a_span_table(device, kind):
    """Spans of separate blocks may overlap as numbers; a table that leaves a block is invalid."""
    table = [[2, 5, 0, 13], [0, 7, 3, 9], [1, 7, 0, 13]]
    shapes = [(7, 7), (7, 13), (13, 7), (13, 13)]
    blocks = [make_scores(r, c, batch=3, heads=2, std=0.5, device=device)[..., :r, -c:] for r, c in shapes]
    blocks = [b.softmax(-1) if kind == "probs" else b for b in blocks]
    loss, gradients = forward_and_backward(blocks, problem_of(table, kind, (7, 13), device))
    spans = Spans(0, 7, 0, 13, torch.tensor(table[:2], dtype=torch.int32, device=device))
    expected, expected_gradients = loss_and_gradients(
        lambda *x: scores_reference(list(x), spans, Options(kind=kind)), *(b[:2].double() for b in blocks)
    )
    assert relative_error(loss[:2], expected) < 2e-5
    assert loss[2].isnan().all()
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient[:2], expected_gradient) < 2e-5
        assert gradient[2].isnan().all()


def test_four_blocks_without_spans(device):
    attn = make_scores(6, 70, batch=2, std=0.4, seed=9, device=device)
    blocks = [attn[..., :6, :6], attn[..., :6, 6:], attn[..., 6:, :6], attn[..., 6:, 6:]]
    loss, gradients = loss_and_gradients(lambda *x: fused_cacr_blocks(*x, backend="cuda"), *blocks)
    whole, (gradient,) = loss_and_gradients(lambda x: cuda(x, 6), attn)
    assert torch.equal(loss, whole)
    assert torch.equal(torch.cat([torch.cat(gradients[:2], -1), torch.cat(gradients[2:], -1)], -2), gradient)


@pytest.mark.parametrize("mean", [-3.0, 3.0])
def test_a_common_offset_of_the_scores_costs_no_precision(device, mean):
    agree(make_scores(12, 36, std=1.0, mean=mean, seed=5, device=device), 12, 1e-5)


@pytest.mark.parametrize(
    ("n_text", "n_vision", "options", "budget"),
    [
        # as the closed form where X is not centred: 3e-7 and 9e-6
        (60, 100, {"std": 0.3, "mean": -3.0}, (1e-7, 1e-6)),
        # 1e-4 and 2e-4 where the row sums do not follow E_p[d]
        (20, 36, {"pattern": "uniform"}, (6e-6, 2e-4)),
        (20, 70, {"std": 10.0}, (2e-7, 2e-6)),
        # float16 is not centred on tensor cores, which round to zero: 6e-8 in multiply-adds
        (60, 100, {"std": 0.3, "mean": -3.0, "dtype": torch.float16}, (1e-6, 3e-4)),
    ],
    ids=["common offset", "nearly uniform rows", "nearly one-hot rows", "common offset, float16"],
)
def test_error_budget(device, n_text, n_vision, options, budget):
    measured = score_errors(cuda, n_text, n_vision, count=3, device=device, **options)
    assert measured.loss <= budget[0]
    assert measured.gradient <= budget[1]


def at_most_twice_the_errors_of_the_closed_form(n_text, n_vision, **options):
    measured = score_errors(cuda, n_text, n_vision, count=8, **options)
    eager = score_errors(cacr_closed_form, n_text, n_vision, count=8, **options)
    assert measured.loss <= 2 * eager.loss
    assert measured.gradient <= 2 * eager.gradient
    return measured


@pytest.mark.parametrize(
    ("n_text", "n_vision", "options"),
    [
        (60, 100, {"pattern": "uniform"}),
        (20, 36, {"pattern": "uniform"}),
        (20, 70, {"std": 10.0}),
        (60, 100, {}),
    ],
    ids=["nearly uniform rows", "short nearly uniform rows", "nearly one-hot rows", "normal"],
)
def test_errors_are_at_most_twice_those_of_the_closed_form(device, n_text, n_vision, options):
    at_most_twice_the_errors_of_the_closed_form(n_text, n_vision, device=device, **options)


def test_half_precision_errors_of_nearly_uniform_rows(device, products):
    """1.3e-5, six times eager's, where the row sums move with the maxima and c stays."""
    options = {"pattern": "uniform", "dtype": torch.float16, "device": device}
    assert at_most_twice_the_errors_of_the_closed_form(60, 100, **options).loss <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_congruent_attention_has_zero_loss_and_gradient(device, dtype):
    attn = make_scores(33, 33, pattern="congruent", dtype=dtype, device=device)
    loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 33), attn)
    assert loss == 0
    assert (gradient == 0).all()


def test_loss_of_the_loop(device):
    attn = make_scores(5, 7, batch=2, heads=2, std=0.7, device=device)
    assert relative_error(cuda(attn, 5, reduction="none"), cacr_loop(attn, 5, reduction="none")) < 1e-5


def test_grad_loss_of_any_stride_and_empty_batch(device):
    attn = make_scores(4, 5, batch=2, heads=3, device=device)
    weights = torch.linspace(-1, 2, 6, device=device).view(3, 2).mT
    gradients = [
        loss_and_gradients(lambda x, b=b: fused_cacr(x, 4, reduction="none", backend=b) * weights, attn)[1][0]
        for b in ("cuda", "reference")
    ]
    assert relative_error(*gradients) < 2e-5
    assert cuda(attn[:0], 4) == 0


def test_offsets_beyond_32_bits(device):
    """Rows 2^29 elements apart: the last one starts at 2^31. On the CPU, untouched memory costs nothing."""
    storage = torch.empty((1 << 31) + 64, dtype=torch.float16, device=device)
    attn = storage.as_strided((1, 1, 5, 5), (0, 0, 1 << 29, 7))
    attn.copy_(make_scores(2, 3, seed=3))
    loss, (gradient,) = forward_and_backward([attn], (None, 0, 2, 2, 3, "scores", *OPTIONS))
    expected, (expected_gradient,) = forward_and_backward([attn.clone()], (None, 0, 2, 2, 3, "scores", *OPTIONS))
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)


def fragments(matrix, rows, words):
    """[32, words, 2] as the lanes of a warp hold a matrix [rows, 16] (PTX ISA, mma.m16n8k16; b by columns)."""
    held = torch.empty(32, words, 2, dtype=torch.float16)
    for lane in range(32):
        for i in range(2 * words):
            upper = rows == 16 and not (0 <= i < 2 or 4 <= i < 6)
            right = i >= 4 if rows == 16 else i >= 2
            row = lane // 4 + (8 if upper else 0)
            column = lane % 4 * 2 + (i & 1) + (8 if right else 0)
            held[lane, i // 2, i % 2] = matrix[row, column]
    return held


def multiply_add(emulation, a, b, c):
    """c + a b^T of a [16, 16], b [8, 16] in float16 by one emulated instruction."""
    held = torch.empty(32, 4)
    places = [[(lane // 4 + i // 2 * 8, lane % 4 * 2 + (i & 1)) for i in range(4)] for lane in range(32)]
    for lane, i in ((lane, i) for lane in range(32) for i in range(4)):
        held[lane, i] = c[places[lane][i]]
    emulation.multiply_add(fragments(a, 16, 4), fragments(b, 8, 2), held)
    result = torch.empty(16, 8)
    for lane, i in ((lane, i) for lane in range(32) for i in range(4)):
        result[places[lane][i]] = held[lane, i]
    return result


def test_emulated_tensor_core_multiplies_the_fragments_of_the_ptx_isa(emulation):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-99, 100, s, generator=generator) for s in ((16, 16), (8, 16), (16, 8)))
    result = multiply_add(emulation, a.half(), b.half(), c.float())
    assert torch.equal(result.long(), c + a @ b.T)


def test_emulated_tensor_core_truncates(emulation):
    """Four products and the accumulator are cut off at the 24 bits of the largest of them, their sum at its own."""
    a, b, c = torch.zeros(16, 16).half(), torch.ones(8, 16).half(), torch.full((16, 8), -(2.0**24))
    c[1] = 0
    a[0, 0] = -1.75
    a[1, :4] = torch.tensor([1024.0, 2.0**-13, -1024.0, 2.0**-14])
    result = multiply_add(emulation, a, b, c)
    assert (result[0] == -(2**24)).all()
    assert (result[1] == 2**-13).all()


def test_only_axis_x_grows_with_the_square_of_the_tokens(emulated):
    """Axis y ends at 65,535 blocks: 256 x 256 tiles are more. The bounds of the spans size the launches."""
    attn = make_scores(640, 20, seed=1)
    forward_and_backward([attn], problem_of([[0, 3, 640, 5]], "scores", (640, 20), "cpu"))
    assert emulated.largest_y() <= -(-660 // 16)


@pytest.mark.parametrize(("n_vision", "launches"), [(5, 4), (4, 5)])
def test_gradients_are_filled_first_only_if_spans_leave_something(emulated, n_vision, launches):
    loss_and_gradients(lambda x: cuda(x, 4, n_vision=n_vision), make_scores(4, 5))
    assert emulated.launches() == launches  # forward, loss, [fill], rows, blocks


@pytest.mark.parametrize(("kind", "dtype"), [("softmax", torch.float32), ("scores", torch.float16)])
def test_no_order_of_threads_and_blocks_changes_a_bit(device, emulated_order, kind, dtype):
    attn = make_input(kind, 35, 66, batch=2, std=0.5, dtype=dtype, device=device)
    results = []
    for seed in range(3):
        emulated_order(seed)
        loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 35, kind=kind), attn)
        results.append((loss, gradient))
    assert all(torch.equal(loss, results[0][0]) and torch.equal(g, results[0][1]) for loss, g in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_barrier_is_needed(emulated, dtype):
    """With any one of the barriers taken out, results differ or the emulation refuses: a missing one is found."""

    def results():
        """Loss and gradient for several and for one tile a row; NaN where the emulation refuses."""
        values = []
        for n_text in (66, 20):
            attn = make_scores(n_text, 35, std=0.5, dtype=dtype)
            try:
                loss, (gradient,) = loss_and_gradients(lambda x, n=n_text: cuda(x, n), attn)
            except RuntimeError:
                return torch.tensor(NAN)
            values += [loss.flatten(), gradient.flatten()]
        return torch.cat(values)

    emulated.configure(1)
    expected = results()
    barriers = emulated.barriers()
    assert not expected.isnan().any()
    assert len(barriers) >= 8
    for barrier in barriers:
        emulated.configure(1, barrier)
        assert not torch.equal(results(), expected), f"nobody needs the barrier at {barrier}"
