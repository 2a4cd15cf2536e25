"""What `cacr bench` leaves behind: files, the machine's name, order, pictures and words of a whole run."""

import dataclasses
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cacr_uniter import cli
from cacr_uniter.benchmark import ahead, contenders, machine, pool, results, run, summary, worker
from cacr_uniter.benchmark.machine import provenance, slug
from cacr_uniter.benchmark.measure import Job
from cacr_uniter.benchmark.plots import draw
from cacr_uniter.benchmark.run import Plan, run_benchmark
from cacr_uniter.benchmark.shapes import Shape, parse_shapes, preset_shapes
from cacr_uniter.errors import UserError

SHAPE = Shape("small", 1, 2, 3, 5, 16)
CEILINGS = {"copy": 1e9, "matmul float32": 1e10, "matmul bfloat16": 1e11, "exp": 1e8}


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


def test_a_line_that_was_cut_is_dropped_before_more_are_appended(tmp_path):
    row = {"device": "NVIDIA A", "what": "copy", "value": 1.5}
    results.append(tmp_path, "ceilings", [row, row])
    path = tmp_path / "ceilings.csv"
    path.write_bytes(path.read_bytes()[:-4])
    results.append(tmp_path, "ceilings", [row | {"what": "exp"}])
    assert [found["what"] for found in results.read(tmp_path, "ceilings")] == ["copy", "exp"]
    path.write_text(path.read_text().splitlines()[0])  # the header alone, without its newline
    results.append(tmp_path, "ceilings", [row])
    assert [found["what"] for found in results.read(tmp_path, "ceilings")] == ["copy"]


@pytest.mark.parametrize(("model", "name"), [("AMD EPYC", "AMD EPYC family 26 model 2 ("), ("Xeon 7", "Xeon 7 (")])
def test_a_name_without_a_number_is_followed_by_the_generation(tmp_path, monkeypatch, model, name):
    info = tmp_path / "cpuinfo"
    info.write_text(
        f"processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {model}\n\nprocessor\t: 1\nmodel\t: 3\n"
    )
    monkeypatch.setattr(machine, "CPU_INFO", info)
    monkeypatch.setattr(machine, "backends", lambda: {"cpu": SimpleNamespace(details="avx2, OpenMP")})
    assert machine.device_name("cpu").startswith(name + "AVX2), ")


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


def test_a_folder_without_results_is_refused(capsys, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert cli.main(["bench", "plot", "--out", str(folder)]) == 2
        assert f"no results in {folder}: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_takes_too_long_or_comes_too_late_is_skipped_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measured_ceilings", lambda *_: CEILINGS)
    plan = Plan((Shape("huge", 1, 8, 8192, 8192),), ("float32",), ("scores",), "cpu", 0.001, 1, 0.5, threads=1)
    rows = run_benchmark(plan, tmp_path, lambda *_: None)
    assert rows
    assert {row["status"] for row in rows} == {"skipped"}
    late = Plan((SHAPE,), ("float32",), ("scores",), "cpu", 0.001, 1, 5.0, budget=0.0, threads=1)
    assert {row["note"] for row in run_benchmark(late, tmp_path, lambda *_: None)} == {pool.LATE}
    assert "--budget" in pool.LATE


def test_only_what_is_missing_is_measured_again(measured, monkeypatch):
    out, _ = measured
    monkeypatch.setattr(run, "measured_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(run, "run_tasks", lambda *_, **__: pytest.fail("everything is known"))
    shapes = (Shape("square-8", 1, 2, 4, 4, 16),)
    plan = Plan(shapes, ("float32",), ("scores",), "cpu", 0.001, 1, 5.0, contenders=("eager", "bmm"), missing=True)
    assert run_benchmark(plan, out, lambda *_: None) == []
    origin = machine.provenance("cpu")
    assert len(run.settled(out, origin)) == 8
    assert run.settled(out, origin | {"commit": "another"}) == set()
    assert run.settled(out / "missing", origin) == set()


def test_a_gpus_ceilings_hold_for_minutes(tmp_path, monkeypatch):
    origin = machine.provenance("cpu")
    monkeypatch.setattr(run, "provenance", lambda device: origin)
    found = {"copy": 2e9, "exp": 1e9}
    monkeypatch.setattr(run, "run_tasks", lambda *_, **__: [(0, [found])])
    assert run._recent_ceilings("cuda", tmp_path) is None
    assert run.measured_ceilings("cuda", tmp_path, 0.1) == found
    assert run._recent_ceilings("cuda", tmp_path) == found
    assert run._recent_ceilings("cpu", tmp_path) is None
    origin = origin | {"date": "2999-01-01T00:00:00Z"}
    assert run._recent_ceilings("cuda", tmp_path) is None


def test_compiling_has_time_before_its_first_answer():
    plan = Plan((SHAPE,), ("float32",), ("scores",), "cuda", 0.1, 1, 5.0, budget=60.0)
    jobs = {
        name: Job(SHAPE.as_dict(), "float32", "scores", "scores", name, "cuda", 0.1)
        for name in contenders.PEERS["scores"]
    }
    patience = {name: run._patience(plan, job) for name, job in jobs.items()}
    assert patience["eager"] == 30 < patience["compiled"] < patience["compiled-max"]
    assert run._patience(dataclasses.replace(plan, budget=float("inf")), jobs["eager"]) == 320


def test_what_compiles_ahead_is_in_the_plans_order_and_triton_does_not_depend_on_the_batch(monkeypatch):
    ready = {name: SimpleNamespace(available=True) for name in contenders.OURS}
    monkeypatch.setattr(contenders, "backends", lambda: ready)
    shapes = (SHAPE, dataclasses.replace(SHAPE, name="more", batch=9))
    plan = Plan(shapes, ("bfloat16",), ("scores",), "cuda", 0.1, 1, 5.0, variants=("scores",))
    found = [(job.contender, job.shape["name"]) for job in ahead.compiling(plan)]
    peers = [(name, shape) for name in ("compiled", "compiled-max") for shape in ("small", "more")]
    assert found == [("triton", "small"), *peers]


def test_compile_only_measures_nothing_and_says_what_failed(capsys, tmp_path):
    words = [
        "--device",
        "cpu",
        "--shapes",
        "1x2x3x5x16",
        "--variants",
        "scores",
        "--kinds",
        "scores",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(["bench", *words, "--contenders", "compiled", "eager", "--compile-only"]) == 0
    assert capsys.readouterr().out.splitlines() == ["1x2x3x5x16 float32 scores scores compiled: ok"]
    assert not list(tmp_path.iterdir())


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


def test_a_terminated_benchmark_is_an_interrupted_one(capsys, monkeypatch):
    def terminated(*_):
        signal.raise_signal(signal.SIGTERM)
        return []

    monkeypatch.setattr(run, "run_benchmark", terminated)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert cli.main(["bench", "--device", "cpu", "--out", "nowhere"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted" in capsys.readouterr().err


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
