"""The harness of `cacr bench`: floors, files, refusal of wrong contenders, processes, pictures."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cacr_uniter import cli
from cacr_uniter.benchmark import contenders, machine, measure, pool, results, run, summary, worker
from cacr_uniter.benchmark.machine import provenance, slug
from cacr_uniter.benchmark.measure import Job
from cacr_uniter.benchmark.plots import draw
from cacr_uniter.benchmark.run import Plan, finished, merge, run_benchmark
from cacr_uniter.benchmark.shapes import Shape, parse_shapes, preset_shapes
from cacr_uniter.benchmark.timing import PeakMemory, process_memory, time_cpu
from cacr_uniter.benchmark.work import Work, floor, work
from cacr_uniter.errors import UserError

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
    assert both.bytes == 3 * 160 * 160 * 4 * 1536
    forward = work(shape, "scores", "scores", "cpu", "forward", "float32")
    assert forward.exps == 2 * (60**2 + 100**2) * 1536


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
    with PeakMemory("cpu") as peak:
        torch.ones(16 << 20)
    assert 60e6 < peak.extra < 90e6


def test_the_clock_repeats():
    calls = []
    times = time_cpu(lambda: lambda: calls.append(0), 0.001, False)
    assert times.timer == "wall"
    assert len(calls) >= len(times.samples) >= 3


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


def test_a_job_beyond_the_memory_limit_is_out_of_memory():
    big = measure_job_dict("bmm") | {"shape": Shape("m", 1, 400, 400, 400).as_dict()}  # 1 GB of scores
    ((_, rows),) = pool.run_tasks([("kernel", big)], "cpu", memory_limit=1_000_000_000, threads=1)
    assert rows[-1]["status"] == "oom", rows


def measure_job_dict(name):
    from dataclasses import asdict

    return asdict(job(name))


# files


def test_results_are_appended_and_read_back(tmp_path):
    row = {**provenance("cpu"), "what": "copy", "value": 1.5, "unit": "B/s"}
    results.append(tmp_path, "ceilings", [row])
    results.append(tmp_path, "ceilings", [row | {"value": 2.5}])
    rows = results.read(tmp_path, "ceilings")
    assert [r["value"] for r in rows] == ["1.5", "2.5"]
    assert tuple(rows[0]) == results.COLUMNS["ceilings"]
    assert [r["value"] for r in results.newest(rows, ["what"])] == ["2.5"]


def test_a_skipped_row_does_not_replace_a_measured_one():
    rows = [{"key": key, "status": status} for key, status in (("a", "skipped"), ("a", "oom"), ("a", "skipped"))]
    assert [row["status"] for row in results.newest([*rows, {"key": "b", "status": "skipped"}], ["key"])] == [
        "oom",
        "skipped",
    ]


def test_a_folder_holds_one_device(tmp_path):
    results.append(tmp_path, "ceilings", [{"device": "NVIDIA A", "what": "copy"}])
    with pytest.raises(UserError, match="holds results of NVIDIA A, not of NVIDIA B: give another folder with --out"):
        results.append(tmp_path, "kernels", [{"device": "NVIDIA B", "shape": "tiny"}])
    assert not (tmp_path / "kernels.csv").exists()


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "ceilings.csv").write_text("date,what\n")
    with pytest.raises(UserError, match="other columns"):
        results.append(tmp_path, "ceilings", [{"what": "copy"}])
    with pytest.raises(UserError, match="unknown columns speed"):
        results.append(tmp_path, "kernels", [{"speed": 1}])


def test_samples_of_several_processes_are_put_together():
    time = {"direction": "both", "status": "ok", "samples": [1.0, 2.0], "extra_mb": None}
    memory = {"direction": "both", "status": "ok", "extra_mb": 7.0}
    (row,) = merge([time, time | {"samples": [3.0]}, memory])
    assert (row["samples"], row["extra_mb"]) == ([1.0, 2.0, 3.0], 7.0)
    assert merge([time, {"direction": "both", "status": "oom"}])[0]["status"] == "oom"


def test_machine_names_are_folder_names():
    assert slug("Intel(R) Xeon(R) CPU @ 2.50GHz, 2 threads") == "intel-xeon-cpu-2.50ghz-2-threads"
    assert slug("NVIDIA H200") == "nvidia-h200"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_have_the_promised_shapes(device):
    full = preset_shapes("full", device)
    sizes = {(s.problems, s.n_text, s.n_vision) for s in full}
    assert {(b, t, r) for b in (48, 384, 1536) for t, r in ((20, 36), (60, 100))} <= sizes
    assert {1024, 4096, 16384} <= {s.n for s in full}
    assert any((s.n_text, s.n_vision) == (40, 200) for s in full)
    assert len({s.name for s in full}) == len(full)


def test_shapes_are_parsed():
    named, written = parse_shapes(["vilt-b32", "2x3x4x5x8"], "quick", "cpu")
    assert named.n_vision == 200
    assert (written.batch, written.heads, written.n_text, written.n_vision, written.head_dim) == (2, 3, 4, 5, 8)
    with pytest.raises(UserError, match="neither"):
        parse_shapes(["2x3"], "quick", "cpu")


# the machine


def test_two_processors_of_one_name_have_folders_of_their_own(monkeypatch):
    names = []
    for details in ("avx512, OpenMP, GNU 12", "avx2, OpenMP, GNU 12", ""):
        monkeypatch.setattr(machine, "backends", lambda details=details: {"cpu": SimpleNamespace(details=details)})
        names.append(machine.device_name("cpu"))
    assert " (AVX-512), " in names[0]
    assert " (AVX2), " in names[1]
    assert names[2] == names[1].replace(" (AVX2)", "")
    assert "-avx-512-" in slug(names[0])


def test_results_are_no_changes_of_the_code(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words], check=True)

    code, rows = tmp_path / "code/machine.py", tmp_path / "benchmarks/results/a/kernels.csv"
    for path in (code, rows):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(machine, "__file__", str(code))
    clean = machine.commit()
    rows.write_text("2")
    assert machine.commit() == clean
    assert "+" not in clean
    code.write_text("2")
    assert machine.commit() == clean + "+"


def test_cuda_versions_name_driver_and_compiler(monkeypatch):
    details = {"cuda": SimpleNamespace(details="nvcc 13.0.88 for 90-real")}
    monkeypatch.setattr(machine, "backends", lambda: details)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert machine.cuda_versions.__wrapped__() in ("13.0, nvcc 13.0.88", f"13.0, driver {driver()}, nvcc 13.0.88")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.cuda_versions.__wrapped__() == ""


def driver():
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.is_file() else ""


# the whole command


def in_this_process(tasks, device, **_):
    for index, (task, arguments) in enumerate(tasks):
        yield index, list(worker.TASKS[task](arguments))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results folder with two small squares, measured in this process."""
    out = tmp_path_factory.mktemp("machine")
    shapes = (Shape("square-8", 1, 2, 4, 4, 16), Shape("square-16", 1, 2, 8, 8, 16))
    names = ("eager", "bmm", "factored")
    plan = Plan(shapes, ("float32",), ("scores",), "cpu", 0.001, 1, 5.0, contenders=names, threads=1)
    bars = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_tasks", in_this_process)
        rows = run_benchmark(plan, out, lambda *bar: bars.append(bar))
    assert bars[-1][1] == bars[-1][2] == 8
    return out, rows


def test_a_run_writes_every_contender_with_its_floor(measured):
    out, rows = measured
    read = results.read(out, "kernels")
    assert len(read) == len(rows) == 2 * (2 * 3 + 2 * 3)
    for row in read:
        assert row["status"] == "ok"
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["floor_ms"]) > 0
        assert row["bound"] in ("bandwidth", "matmul", "exp")
        assert float(row["loss_error"]) < 1e-5
        assert row["date"]
        assert row["torch"] == torch.__version__
    assert {row["what"] for row in results.read(out, "ceilings")} >= {"copy", "exp", "matmul float32"}


def test_pictures_and_summary_come_from_the_files_alone(measured):
    out, _ = measured
    pictures = draw(out)
    assert [path.name for path in pictures] == ["time.png", "memory.png", "speedup.png", "roofline.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000 for path in pictures)
    text = summary.write_summary(out, pictures).read_text()
    assert "square-16" in text
    assert "speedup.png" in text


def test_an_empty_folder_has_no_pictures(tmp_path):
    assert draw(tmp_path) == []


def test_what_takes_too_long_or_comes_too_late_is_skipped_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measured_ceilings", lambda *_: CEILINGS)
    plan = Plan((Shape("huge", 1, 8, 8192, 8192),), ("float32",), ("scores",), "cpu", 0.001, 1, 0.5, threads=1)
    rows = run_benchmark(plan, tmp_path, lambda *_: None)
    assert rows
    assert {row["status"] for row in rows} == {"skipped"}
    late = Plan((SHAPE,), ("float32",), ("scores",), "cpu", 0.001, 1, 5.0, budget=0.0, threads=1)
    assert {row["note"] for row in run_benchmark(late, tmp_path, lambda *_: None)} == {"the time of this run was over"}


def test_what_compiles_for_long_comes_last_on_a_gpu(monkeypatch):
    ready = {name: SimpleNamespace(available=True) for name in contenders.OURS}
    monkeypatch.setattr(contenders, "backends", lambda: ready)
    shapes = (SHAPE, Shape("other", 1, 2, 3, 5, 16))
    plan = Plan(shapes, ("bfloat16", "float32"), ("scores",), "cuda", 0.1, 1, 5.0, variants=("qk",))
    (batch,) = plan.batches()
    order = list(dict.fromkeys(job.contender for _, job in batch))
    assert order == ["triton", "eager", "sdpa", "factored", "compiled", "factored-compiled", "compiled-max"]
    assert {job.variant for _, job in batch} == {"qk"}
    assert [shape.name for shape, job in batch if job.contender == "triton"] == ["small"] * 2 + ["other"] * 2


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_the_16_bit_dtype_is_one_that_the_gpu_has(monkeypatch, capability, dtype):
    plans = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(run, "run_benchmark", lambda plan, *_: plans.append(plan) or [])
    assert cli.main(["bench", "--device", "cuda", "--out", "nowhere"]) == 0
    assert plans[0].dtypes == ("float32", dtype)


def test_finished_rows_have_quantiles():
    row = {"direction": "both", "status": "ok", "samples": [3.0, 1.0, 2.0]} | job("eager").columns
    done = finished(row, SHAPE, "cpu", CEILINGS)
    assert (done["median_ms"], done["repeats"]) == (2.0, 3)
    assert set(done) <= set(results.COLUMNS["kernels"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contenders", "magic"], "there is no 'magic'"),
        (["--seconds", "-1"], "--seconds is -1.0"),
        (["--shapes", "wide"], "'wide' is neither"),
        (["training", "--groups", "5"], "--groups: 5"),
        (["training", "--memory-limit", "lots"], "--memory-limit is 'lots'"),
        (["numerics", "--out", "missing.md"], "is no file"),
    ],
)
def test_wrong_options_are_one_sentence(capsys, words, message):
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


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
