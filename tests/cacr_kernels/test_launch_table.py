"""The user's launch table: what a file may say, what it replaces, and where; the tuner's candidates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from cacr_kernels import fused_cacr, fused_cacr_qk
from cacr_kernels.testing import make_input
from cacr_kernels.triton import aot, configs, qk_aot, space, table
from cacr_kernels.triton.configs import Key, Launch
from cacr_kernels.triton.qk_launch import HEADS, QK_BLOCKS
from cacr_kernels.triton.qk_launch import launch as qk_launch

ROWS = Key("scores", "rows_128", "bfloat16")
FORWARD = Key("qk", "forward", "float16", 64)
MEASURED = table.Measured(
    0.5, 0.75, "backward of scores scores uniter-36-b32 bfloat16", "2026-01-02", "2.13.0", "3.7.1"
)


def entry(key=ROWS, gpu="NVIDIA A", arch=90, **changes):
    return table.Entry(gpu, arch, key, replace(space.builtin(key, arch), **changes), MEASURED)


ENTRIES = [entry(num_stages=2), entry(FORWARD, num_stages=3), entry(gpu="NVIDIA B", arch=86)]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file that CACR_LAUNCH_TABLE names; what an earlier one said is forgotten."""
    path = tmp_path / "launches" / "table.json"
    monkeypatch.setenv(table.VARIABLE, str(path))
    for known in (table.of_gpu, table._scores_plan, table._qk_plan):
        known.cache_clear()
    yield path
    table.of_gpu.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, as far as its name is asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: ("NVIDIA A", "NVIDIA B")[index or 0])
    return torch.device("cuda", 0)


def test_a_file_is_read_back(file):
    table.write(file, ENTRIES)
    assert table.read(file) == ENTRIES
    assert [path.name for path in file.parent.iterdir()] == ["table.json"]
    assert json.loads(file.read_text())["entries"][0]["measured"]["ms"] == 0.5


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    table.write(file, ENTRIES)
    before = file.read_text()
    monkeypatch.setattr(table.json, "dump", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        table.write(file, [])
    assert file.read_text() == before


def change(path, value):
    """The text of a good file in which the place ``path`` is ``value``."""

    def spoil(text):
        whole = json.loads(text)
        at = whole
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value
        return json.dumps(whole)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "{", "Expecting property name"),
        (lambda text: "[]", "the file: expected one JSON object; got 'list'"),
        (lambda text: "[" * 100_000, "recursion"),
        (lambda text: text + " " * table.LARGEST_FILE, "larger than"),
        (change(["version"], 2), "version: expected 1; got '2'"),
        (change(["more"], 1), "the file: expected the names entries, format, version"),
        (change(["entries"], {}), "entries: expected a list"),
        (change(["entries", 1], 3), "entry 1: expected an object"),
        (change(["entries", 0, "script"], "rm"), "entry 0: expected the names arch, blocks"),
        (change(["entries", 0, "gpu"], ""), "entry 0, gpu: expected the name of a GPU"),
        (change(["entries", 0, "arch"], 61), "entry 0, arch: expected ten times a compute capability"),
        (change(["entries", 0, "variant"], "magic"), "entry 0, variant: expected one of scores, qk; got 'magic'"),
        (change(["entries", 0, "kernel"], "forward"), "entry 0, kernel: expected one of forward_64"),
        (change(["entries", 0, "dtype"], "float64"), "entry 0, dtype"),
        (change(["entries", 1, "head_size"], 48), "entry 1, head_size: expected one of 32, 64, 128, 256"),
        (change(["entries", 0, "blocks", "BLOCK_I"], 256), "entry 0, BLOCK_I: expected one of 16, 32, 64, 128"),
        (change(["entries", 0, "blocks", "BLOCK_I"], True), "entry 0, BLOCK_I"),
        (change(["entries", 0, "blocks"], {"BLOCK_I": 32}), "entry 0, blocks: expected the names BLOCK_C, BLOCK_I"),
        (change(["entries", 0, "num_warps"], 3), "entry 0, num_warps: expected one of 1, 2, 4, 8, 16; got '3'"),
        (change(["entries", 0, "num_stages"], 4.0), "entry 0, num_stages"),
        (change(["entries", 0, "registers"], 100), "entry 0, registers: expected one of None, 96, 128, 160, 192, 224"),
        (change(["entries", 1, "registers"], 128), "entry 1, registers: expected one of None"),
        (change(["entries", 0, "measured", "ms"], -1), "entry 0, measured, ms: expected a positive number"),
        (change(["entries", 0, "measured", "ms"], float("nan")), "entry 0, measured, ms: expected a positive number"),
        (change(["entries", 0, "measured", "torch"], None), "entry 0, measured, torch: expected text"),
        (change(["entries", 2, "gpu"], "NVIDIA A"), "entry 2: expected every kernel once a GPU"),
    ],
)
def test_a_malformed_file_is_refused_in_words(file, spoil, message):
    table.write(file, ENTRIES)
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ValueError, match="cannot be used") as caught:
        table.read(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "`cacr bench tune`" in str(caught.value)


def test_a_file_holds_on_the_gpu_it_was_measured_on(file, gpu):
    table.write(file, ENTRIES)
    rows = table.scores_plan(gpu, "bfloat16").kernels["rows_128"]
    assert (rows.num_stages, rows.blocks) == (2, configs.plan(90, "bfloat16").kernels["rows_128"].blocks)
    assert table.scores_plan(gpu, "float32") == configs.plan(90, "float32")
    assert table.qk_plan("forward", gpu, 90, torch.float16, 50).stages == 3
    assert table.qk_plan("forward", gpu, 90, torch.float16, 128) == qk_launch("forward", 90, torch.float16, 128)
    other = torch.device("cuda", 1)
    assert table.scores_plan(other, "bfloat16").kernels["rows_128"] == ENTRIES[2].launch
    assert table.qk_plan("forward", other, 90, torch.float16, 50) == qk_launch("forward", 90, torch.float16, 50)
    assert table.scores_plan(torch.device("cpu"), "bfloat16") is configs.INTERPRETER


def test_entries_that_do_not_fit_the_other_kernels_are_left_out(file, gpu):
    """Measured beside built-in ones of another version: X would not be formed alike, or in tensor memory."""
    deep = entry(blocks=entry().launch.blocks | {"BLOCK_K": 16})
    assert deep.launch.blocks["BLOCK_K"] != space.builtin(ROWS, 90).blocks["BLOCK_K"]
    table.write(file, [deep, ENTRIES[1]])
    with pytest.warns(UserWarning, match="1 of 2 entries for NVIDIA A do not fit the kernels of this version"):
        assert table.of_gpu("NVIDIA A") == {FORWARD: ENTRIES[1].launch}
    assert table.scores_plan(gpu, "bfloat16") == configs.plan(90, "bfloat16")
    assert "1 entries for NVIDIA A" in table.in_use(["NVIDIA A"])


@pytest.mark.parametrize("kernel", ["project", "large_v", "cross_64", "large_cross"])
def test_no_candidate_multiplies_in_tensor_memory_on_blackwell(kernel):
    key = Key("scores", kernel, "bfloat16")
    start = space.builtin(key, 100)
    axis = "BLOCK_J" if kernel == "large_cross" else "BLOCK_I"
    rows = replace(start, blocks=start.blocks | {axis: 64})
    assert not space.possible(key, rows, 100)
    assert not space.fits_the_others(key, rows, 103)
    assert space.fits_the_others(key, rows, 80)


def test_a_file_is_read_once_in_a_process(file, gpu, monkeypatch):
    table.write(file, ENTRIES)
    read = []
    monkeypatch.setattr(table, "read", lambda path: read.append(path) or ENTRIES)
    for _ in range(3):
        for dtype in configs.DTYPES:
            table.scores_plan(gpu, dtype)
            table.qk_plan("rows", gpu, 90, getattr(torch, dtype), 64)
    assert read == [file]


def test_without_a_file_or_a_name_the_table_is_built_in(file, gpu, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="No such file"):  # named, and not there: never a silent fallback
        table.scores_plan(gpu, "float32")
    monkeypatch.setenv(table.VARIABLE, "")
    assert table.path() is None
    assert table.scores_plan(gpu, "float32") == configs.plan(90, "float32")
    monkeypatch.delenv(table.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.path() == tmp_path / "cacr" / "launch_table.json"
    assert "built-in (no " in table.in_use([])
    table.write(table.path(), ENTRIES)
    assert "2 entries for NVIDIA A" in table.in_use(["NVIDIA A"])


def test_entries_that_were_measured_and_committed_come_before_the_rules(file, gpu, monkeypatch):
    table.write(file, ENTRIES)
    better = Launch(entry().launch.blocks, 4, 3)
    committed = {90: {ROWS: better, FORWARD: Launch({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 1)}}
    monkeypatch.setattr(configs, "MEASURED", committed)
    assert configs.plan(90, "bfloat16").kernels["rows_128"] == better
    assert configs.plan(80, "bfloat16") is configs.TABLE[80]["bfloat16"]
    assert qk_launch("forward", 90, torch.float16, 64)[:4] == (32, 64, 8, 1)
    assert table.scores_plan(gpu, "bfloat16").kernels["rows_128"].num_stages == 2  # and the user's come before them


def test_a_dot_of_a_dot_has_no_more_warps_than_rows_on_hopper():
    """Each takes 16 rows: with twice as many an H100 computed wrong losses."""
    for kernel in ("forward_128", "rows_128", "cross_128", "own_128", "forward_64", "own_64", "project", "large_v"):
        for dtype in configs.DTYPES:
            key = Key("scores", kernel, dtype)
            builtin = space.builtin(key, 90)
            assert builtin.num_warps == 4
            assert not space.fits_the_others(key, replace(builtin, num_warps=8), 90)
    for kernel in QK_BLOCKS:
        rows = "BLOCK_N" if kernel == "columns" else "BLOCK_M"
        for dtype in configs.DTYPES:
            for head in HEADS:
                if kernel in ("forward", "rows", "columns") and (dtype, head) == ("float32", HEADS[-1]):
                    continue  # these are "wide"
                builtin = space.builtin(Key("qk", kernel, dtype, head), 90)
                assert builtin.blocks[rows] < 64 or 16 * builtin.num_warps <= builtin.blocks[rows]


@pytest.mark.parametrize(
    "key",
    [
        *(Key("scores", name, "bfloat16") for name in ("forward_64", "rows_64", "own_64", "whole_forward_64")),
        Key("scores", "whole_backward_64", "bfloat16"),
        Key("qk", "rows", "bfloat16", 64),
        Key("qk", "columns", "bfloat16", 64),
    ],
)
def test_two_warps_are_no_warp_group_which_would_form_x_by_another_instruction(key):
    builtin = space.builtin(key, 90)
    assert builtin.num_warps % 4 == 0
    assert space.fits_the_others(key, builtin, 90)
    assert not space.fits_the_others(key, replace(builtin, num_warps=2), 90)
    assert space.fits_the_others(key, replace(space.builtin(key, 80), num_warps=2), 80)


def test_fewer_rows_than_64_form_x_by_another_instruction_on_hopper():
    for name in ("whole_rows_128", "forward_128", "rows_64"):
        key = Key("scores", name, "float32")
        builtin = space.builtin(key, 90)
        assert builtin.blocks["BLOCK_I"] == 64
        assert not space.fits_the_others(key, replace(builtin, blocks=builtin.blocks | {"BLOCK_I": 32}), 90)


def test_entries_replace_what_was_measured_before():
    again = replace(ENTRIES[0], launch=Launch(ENTRIES[0].launch.blocks, 2, 2))
    assert table.merged(ENTRIES, [again]) == [again, *ENTRIES[1:]]


def test_a_trial_replaces_launches_and_notes_the_kernels_used(monkeypatch):
    attn = make_input("scores", 3, 5).requires_grad_()
    q = torch.randn(1, 1, 8, 16)
    builtin = table.scores_plan(torch.device("cpu"), "float32").kernels["rows_64"]
    key = Key("scores", "rows_64", "float32")
    with table.trying({key: Launch(builtin.blocks, 1, 1)}) as used:
        assert table.scores_plan(torch.device("cpu"), "float32").kernels["rows_64"].num_warps == 1
        used.clear()
        if not torch.cuda.is_available():
            fused_cacr(attn, 3, backend="triton").backward()
            fused_cacr_qk(q, q, 3, backend="triton")
            kernels = {one.kernel for one in used if one.variant == "scores"}
            assert {"rows_64", "own_64"} < kernels < set(configs.BLOCKS)
            assert Key("qk", "forward", "float32", 32) in used
    assert table.scores_plan(torch.device("cpu"), "float32") is configs.INTERPRETER


def test_the_format_knows_every_kernel():
    assert {name: tuple(entry.blocks) for name, entry in configs.INTERPRETER.kernels.items()} == configs.BLOCKS
    for arch in configs.ARCHITECTURES:
        for dtype in configs.DTYPES:
            keys = [Key("scores", name, dtype) for name in configs.BLOCKS]
            keys += [Key("qk", name, dtype, d) for name in QK_BLOCKS for d in HEADS]
            for key in keys:
                chunked = dtype == "float32" and key.head_size == 256
                if chunked and key.kernel in ("forward", "rows", "columns"):  # "wide" does their work
                    continue
                if key.kernel.startswith("whole") and not configs.plan(arch, dtype).whole:
                    continue
                launch = space.builtin(key, arch)
                assert space.possible(key, launch, arch), (key, arch)
                assert set(launch.blocks.values()) <= set(table.SIZES)


def test_candidates_are_one_step_away_and_fit():
    start = space.builtin(ROWS, 90)
    found = list(space.neighbours(start))
    assert len(found) == len({str(one) for one in found}) > 8
    assert start not in found
    for one in found:
        steps = [a != b for a, b in zip(one.blocks.values(), start.blocks.values())]
        assert sum(steps) + (one.num_stages != start.num_stages) <= 1
    assert [one.registers for one in found if one.registers is not None] == [192]
    capped = replace(space.builtin(FORWARD, 90), registers=192)
    assert not space.possible(FORWARD, capped, 90)  # the query/key kernels know no cap
    wide = {"BLOCK_I": 128, "BLOCK_C": 128, "BLOCK_K": 64}
    float32 = Key("scores", "large_v", "float32")
    assert not space.possible(float32, Launch(wide, 4, 1), 90)  # registers
    assert space.possible(float32, Launch(wide, 8, 2), 90)
    assert not space.possible(float32, Launch(wide, 8, 4), 86)  # shared memory
    assert not space.possible(float32, Launch(wide, 8, 1), 86)  # multiply-adds without tensor cores
    assert not space.possible(float32, Launch(dict.fromkeys(wide, 16), 16, 1), 90)  # idle threads


def test_no_candidate_changes_x():
    for key, axis in ((ROWS, "BLOCK_I"), (FORWARD, "BLOCK_M")):
        start = space.builtin(key, 90)
        size = 32 if start.blocks[axis] >= 64 else 64
        other = Launch(start.blocks | {axis: size}, start.num_warps, start.num_stages)
        assert space.forms_x_alike(key, other, 86)
        assert not space.forms_x_alike(key, other, 90)
    deep = Launch(space.builtin(ROWS, 86).blocks | {"BLOCK_K": 64}, 4, 1)
    assert not space.forms_x_alike(ROWS, deep, 86)


def test_the_ahead_of_time_gate_takes_the_entries_of_a_file(file):
    numbers = entry(Key("scores", "numbers", "float32"), arch=86)
    table.write(file, [*ENTRIES, numbers])
    cases = list(aot.table_cases(file, ["scores", "softmax"]))
    assert [(case.kernel, case.arch, case.kind) for case in cases] == [
        *[("rows_128", arch, kind) for arch in (90, 86) for kind in ("scores", "softmax")],
        ("numbers", 86, "softmax"),
    ]
    assert cases[0].launch == ENTRIES[0].launch
    assert aot.Report(255, 4096, 0, frozenset()).faults(cases[0]) == []  # a measurement justifies the spill
    assert "shared memory" in aot.Report(255, 0, 1 << 20, frozenset()).faults(cases[0])[0]
    (case,) = qk_aot.table_cases(file, ["scores"])
    assert (case.arch, case.dtype, case.d, dict(case.entries)) == (90, "float16", 64, {FORWARD: ENTRIES[1].launch})
    assert qk_aot.faults(case, "rows", aot.Report(255, 4096, 0, frozenset())) == []


def test_the_gate_compiles_an_entry_of_a_file(file):
    """As commands: the kernels of this process may be interpreted ones, which do not compile."""
    blocks = {"BLOCK_I": 16, "BLOCK_J": 64}
    numbers = entry(Key("scores", "numbers", "float32"), arch=86, blocks=blocks, num_warps=2)
    table.write(file, [*ENTRIES[1:2], numbers])
    script = (
        "import sys; from pathlib import Path; from cacr_kernels.triton import aot, qk_aot\n"
        "(case,) = qk_aot.table_cases(Path(sys.argv[1]), ['scores'])\n"
        "print('stages', qk_aot.launches(case)['forward'][2]['num_stages'])\n"
        "sys.exit(aot.main(['--table', sys.argv[1], '--jobs', '1']))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stages 3" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("numbers "))
    assert line.split()[1:4] == ["sm_86", "float32", "softmax"]
    assert 100 < int(line.split()[-2]) < 100_000  # instructions
    assert "0 of 1 outside the limits" in done.stdout
