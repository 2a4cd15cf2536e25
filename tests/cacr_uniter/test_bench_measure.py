"""What `cacr bench` measures: floors, contenders and their float64 references, processes of their own."""

import signal
import subprocess
import sys
import threading

import pytest
import torch

from cacr_uniter.benchmark import contenders, measure, pool, results
from cacr_uniter.benchmark.measure import Job
from cacr_uniter.benchmark.run import finished, merge
from cacr_uniter.benchmark.shapes import Shape
from cacr_uniter.benchmark.timing import process_memory, time_cpu
from cacr_uniter.benchmark.work import Work, floor, work

SHAPE = Shape("small", 1, 2, 3, 5, 16)
CEILINGS = {"copy": 1e9, "matmul float32": 1e10, "matmul bfloat16": 1e11, "exp": 1e8}


def job(contender, variant="scores", kind="scores", **fields):
    fields = {"dtype": "float32", "device": "cpu", "seconds": 0.001, "shape": SHAPE.as_dict()} | fields
    return Job(contender=contender, variant=variant, kind=kind, **fields)


# floors


def test_work_of_the_score_variant_counts_its_products_and_bytes():
    shape = Shape("uniter", 128, 12, 60, 100)
    both = work(shape, "scores", "scores", "cpu", "both", "float32")
    assert both.flops == 12 * 60 * 100 * 160 * 1536
    assert both.bytes == 2 * 160 * 160 * 4 * 1536  # S read once, dS written: the gradient can be formed in the forward
    forward = work(shape, "scores", "scores", "cpu", "forward", "float32")
    assert forward.exps == both.exps == 2 * (60**2 + 100**2) * 1536


def test_work_from_q_and_k_grows_with_the_square_of_the_length():
    small, large = (Shape("s", 1, 1, n, n, 64) for n in (512, 1024))
    flops = [work(shape, "qk", "scores", "cpu", "forward", "float32").flops for shape in (small, large)]
    assert flops == [4 * 2 * n * n * 64 for n in (512, 1024)]


def test_a_tile_pads_sizes_and_16_bit_inputs_count_the_second_product_twice():
    shape = Shape("s", 1, 1, 60, 100)
    padded = work(shape, "scores", "scores", "triton", "forward", "float32", tile=16)
    assert padded.flops == 4 * 64 * 112 * 176
    half = work(shape, "scores", "scores", "triton", "forward", "bfloat16")
    assert half.flops == 1.5 * work(shape, "scores", "scores", "triton", "forward", "float32").flops
    assert half.bytes == 160 * 160 * 2


@pytest.mark.parametrize(
    ("needed", "bound", "ms"),
    [(Work(2e9, 1, 1), "bandwidth", 2000), (Work(1, 3e10, 1), "matmul", 3000), (Work(1, 1, 4e8), "exp", 4000)],
)
def test_the_floor_is_the_largest_of_three_times(needed, bound, ms):
    found = floor(needed, CEILINGS, "float32")
    assert (found.bound, found.ms) == (bound, pytest.approx(ms))


def test_float32_may_use_three_tf32_products():
    fast = CEILINGS | {"matmul tf32": 9e10}
    assert floor(Work(0, 3e10, 0), fast, "float32").ms == pytest.approx(1000)


def test_a_cpu_is_held_to_its_multiply_adds_where_a_library_is_slower():
    fast = CEILINGS | {"multiply-add float32": 2e10}
    assert floor(Work(0, 3e10, 0), fast, "float32").ms == pytest.approx(1500)
    assert floor(Work(0, 3e10, 0), fast, "bfloat16").ms == pytest.approx(300)
    assert floor(Work(0, 3e10, 0), fast | {"multiply-add float32": 5e9}, "float32").ms == pytest.approx(3000)


# measuring


@pytest.mark.parametrize("variant", ["scores", "qk"])
def test_every_contender_agrees_with_float64(variant):
    for kind in ("scores", "softmax") if variant == "qk" else ("scores", "softmax", "probs"):
        names = [name for name in contenders.names(variant, kind, "cpu", "float32") if "compiled" not in name]
        for name in names:
            rows = list(measure.measure(job(name, variant, kind)))
            directions = ["forward"] if name == "loop" else ["forward", "backward", "both"]
            assert [row["direction"] for row in rows] == directions, (name, rows)
            assert all(row["status"] == "ok" and row["samples"] for row in rows)
            assert rows[0]["loss_error"] < 1e-5
            assert name == "loop" or rows[0]["gradient_error"] < 1e-4


@pytest.mark.parametrize("variant", ["scores", "qk"])
def test_our_kernel_takes_part(variant):
    from cacr_kernels import backends

    if not backends()["cpu"].available:
        pytest.skip(f"cpu: {backends()['cpu'].reason}")
    assert contenders.names(variant, "scores", "cpu", "float32")[0] == "cpu"


def test_the_compiled_closed_form_is_measured():
    rows = list(measure.measure(job("compiled")))
    assert [row["status"] for row in rows] == ["ok"] * 3, rows


def test_first_calls_compile_what_is_measured_and_yield_nothing(monkeypatch):
    made = []

    def make_inputs(shape, *arguments):
        made.append((shape.batch, shape.heads))
        return contenders.make_inputs(shape, *arguments)

    monkeypatch.setattr(measure, "make_inputs", make_inputs)
    monkeypatch.setattr(measure, "make", lambda *_: contenders.Contender(contenders.bmm_chain, contenders.bmm_chain))
    big = Shape("big", 2, 12, 3, 5, 16).as_dict()
    for name in ("compiled", "triton"):  # Triton's kernels are the same for one example of two heads
        measure._inputs.cache_clear()
        assert list(measure.first_calls(job(name, shape=big))) == []
    assert made == [(2, 12), (1, 2)]
    monkeypatch.setattr(measure, "make", lambda *_: 1 / 0)
    (row,) = measure.first_calls(job("bmm"))
    assert (row["status"], row["note"]) == ("error", "ZeroDivisionError: division by zero")


def test_a_wrong_contender_is_not_timed(monkeypatch):
    def wrong(*x):
        return contenders.bmm_chain(*x) * 1.01

    monkeypatch.setattr(
        measure, "make", lambda *_: contenders.Contender(wrong, contenders.bmm_chain)
    )  # fmt: skip
    (row,) = measure.measure(job("bmm"))
    assert row["status"] == "wrong"
    assert row["loss_error"] == pytest.approx(0.01, rel=1e-3)
    assert "samples" not in row


def test_a_wrong_gradient_or_nan_is_not_timed(monkeypatch):
    def detached(attn, n_text):
        return contenders.bmm_chain(attn, n_text) + 0.5 * (attn - attn.detach()).sum()

    def nan(attn, n_text):
        return contenders.bmm_chain(attn, n_text) * float("nan")

    for function in (detached, nan):
        made = contenders.Contender(function, contenders.bmm_chain)
        monkeypatch.setattr(measure, "make", lambda *_, made=made: made)
        assert [row["status"] for row in measure.measure(job("bmm"))] == ["wrong"]


def test_out_of_memory_is_a_result(monkeypatch):
    def greedy(attn, n_text):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = contenders.Contender(greedy, contenders.bmm_chain)
    monkeypatch.setattr(measure, "make", lambda *_: made)
    assert [row["status"] for row in measure.measure(job("bmm"))] == ["oom"]


def test_a_reference_beyond_the_gpu_is_computed_on_the_cpu():
    class OnGpu:
        device = torch.device("cuda")

        def double(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

        def cpu(self):
            return attn

    attn = torch.randn(1, 2, 8, 8)
    bmm = contenders.make("bmm", "scores", "scores", "float32", "cpu")
    want, gradients = measure.reference(bmm, [OnGpu()], 3, True)
    torch.testing.assert_close(want, contenders.bmm_chain(attn.double(), 3))
    assert gradients[0].shape == attn.shape
    assert measure.reference(bmm, [OnGpu()], 3, False)[1] is None


def test_without_memory_for_the_reference_nothing_is_timed_and_nothing_is_called_too_large(monkeypatch):
    def greedy(attn, n_text):
        raise MemoryError

    made = contenders.Contender(contenders.bmm_chain, greedy)
    monkeypatch.setattr(measure, "make", lambda *_: made)
    (row,) = measure.measure(job("bmm"))
    assert row["status"] == "unchecked"
    assert "float64 reference does not fit" in row["note"]


@pytest.mark.parametrize("variant", ["scores", "qk"])
def test_the_tuned_closed_form_is_captured_like_its_peers(monkeypatch, variant):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    made = contenders.make("compiled-max", variant, "scores", "float32", "cuda")
    assert "compiled-max" in contenders.names(variant, "scores", "cuda", "float32")
    assert made.graph
    assert made.directions == ("forward", "backward", "both")
    assert compiled == [{"mode": "max-autotune-no-cudagraphs", "dynamic": False}]


def test_the_factored_form_is_the_closed_form():
    inputs = contenders.make_inputs(Shape("s", 2, 3, 4, 9, 8), "float32", "cpu")
    q, k = inputs.q.double(), inputs.k.double()
    scores = contenders.scores_of(q, k)
    expected = contenders.cacr_closed_form(scores, 4, reduction="none")
    torch.testing.assert_close(contenders.factored_closed_form(q, k, 4), expected)


def test_inputs_have_soft_rows():
    inputs = contenders.make_inputs(Shape("s", 1, 2, 64, 96), "float32", "cpu")
    scores = contenders.scores_of(inputs.q, inputs.k)[0, 0].double()
    x = scores[:64, 64:] @ scores[64:, 64:] @ scores[:64, 64:].T
    assert float(x.std()) == pytest.approx(contenders.LOGIT_DEVIATION, rel=1e-3)


def test_peak_memory_sees_a_large_block():
    if process_memory("VmHWM") is None:
        pytest.skip("this system does not tell a process its peak memory")
    # in a process of its own, as measurements are: in this one, what other tests have left may be freed meanwhile
    program = """
import torch
from cacr_uniter.benchmark.timing import PeakMemory
with PeakMemory("cpu") as peak:
    torch.ones(64 << 20)
print(peak.extra)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 250e6 < int(done.stdout) < 290e6


def test_the_clock_repeats():
    calls = []
    times = time_cpu(lambda: lambda: calls.append(0), 0.001, False)
    assert times.timer == "wall"
    assert len(calls) >= len(times.samples) >= 3


@pytest.mark.gpu
def test_a_gpu_is_timed_by_graph_replays():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    ours = contenders.names("scores", "scores", "cuda", "float32")[0]  # triton, or cuda where Triton cannot run
    assert ours in contenders.OURS
    for name in (ours, "eager", "bmm"):
        rows = list(measure.measure(job(name, device="cuda")))
        assert [row["status"] for row in rows] == ["ok"] * 3, rows
        assert {row["timer"] for row in rows} == {"graph"}


# processes


def test_a_dead_process_is_a_result_and_the_next_job_runs():
    found = dict(pool.run_tasks([("nothing", {}), ("kernel", measure_job_dict("bmm"))], "cpu", threads=1))
    assert found[0][0]["status"] == "error"
    assert "KeyError" in found[0][0]["note"]
    assert [row["status"] for row in found[1]] == ["ok"] * 3


def test_a_silent_process_is_stopped():
    slow = measure_job_dict("loop") | {"shape": Shape("l", 1, 1, 200, 200).as_dict()}
    ((_, rows),) = pool.run_tasks([("kernel", slow)], "cpu", timeout=0.5, threads=1)
    assert rows[-1]["status"] == "timeout"


def test_an_interrupted_job_leaves_no_process_and_no_watch(monkeypatch):
    begun = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            begun.append(self)
            self.stdout.readline = self.interrupt

        def interrupt(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(pool.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(pool.run_tasks([("nothing", {})], "cpu", timeout=20.0))
    assert begun[0].poll() == -signal.SIGKILL
    watches = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(watch.finished.is_set() for watch in watches)


def test_tasks_run_side_by_side_and_a_dead_process_takes_only_its_own_with_it():
    small = ("first", measure_job_dict("bmm"))
    wrong = ("first", measure_job_dict("cuda"))
    rows = pool.run_side_by_side([("nothing", {}), small, small, wrong], "cpu", 2, 60.0)
    assert [row["status"] for row in rows[0]] == ["error"]
    assert "KeyError" in rows[0][0]["note"]
    assert rows[1:3] == [[], []]
    assert [row["status"] for row in rows[3]] == ["error"]


def test_what_has_no_time_side_by_side_says_so():
    slow = measure_job_dict("loop") | {"shape": Shape("l", 1, 1, 200, 200).as_dict()}
    rows = pool.run_side_by_side([("first", slow), ("first", measure_job_dict("bmm"))], "cpu", 1, 3.0)
    assert [[(row["status"], row["note"]) for row in found] for found in rows] == [[("skipped", pool.LATE)]] * 2


def test_rows_come_as_soon_as_they_exist():
    answers = pool.stream_tasks([("kernel", measure_job_dict("bmm")), ("nothing", {})], "cpu", threads=1)
    index, row = next(answers)
    assert (index, row["direction"]) == (0, "forward")
    rest = [(index, None if row is None else row["status"]) for index, row in answers]
    assert rest == [(0, "ok"), (0, "ok"), (0, None), (1, "error"), (1, None)]


def test_a_job_beyond_the_memory_limit_is_out_of_memory():
    big = measure_job_dict("bmm") | {"shape": Shape("m", 1, 400, 400, 400).as_dict()}  # 1 GB of scores
    ((_, rows),) = pool.run_tasks([("kernel", big)], "cpu", memory_limit=1_000_000_000, threads=1)
    assert rows[-1]["status"] == "oom", rows


def measure_job_dict(name):
    from dataclasses import asdict

    return asdict(job(name))


# rows


def test_samples_of_several_processes_are_put_together():
    time = {"direction": "both", "status": "ok", "samples": [1.0, 2.0], "extra_mb": None}
    memory = {"direction": "both", "status": "ok", "extra_mb": 7.0}
    (row,) = merge([time, time | {"samples": [3.0]}, memory])
    assert (row["samples"], row["extra_mb"]) == ([1.0, 2.0, 3.0], 7.0)
    assert merge([time, {"direction": "both", "status": "oom"}])[0]["status"] == "oom"


def test_finished_rows_have_quantiles():
    row = {"direction": "both", "status": "ok", "samples": [3.0, 1.0, 2.0]} | job("eager").columns
    done = finished(row, SHAPE, "cpu", CEILINGS)
    assert (done["median_ms"], done["repeats"]) == (2.0, 3)
    assert set(done) <= set(results.COLUMNS["kernels"])
