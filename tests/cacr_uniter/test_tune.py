"""The search of `cacr bench tune` with a machine whose times are a formula, and with interpreted kernels."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():  # read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")
from cacr_kernels.triton import configs, space, table
from cacr_kernels.triton.configs import Key, Launch
from cacr_uniter import cli
from cacr_uniter.benchmark import tune_run
from cacr_uniter.benchmark.shapes import Shape
from cacr_uniter.benchmark.tune import Call, Choice, Journal, Search, confirmed
from cacr_uniter.benchmark.tune_run import Kernels, as_code, make_calls, updated
from cacr_uniter.errors import UserError

SHAPE = Shape("small", 1, 1, 3, 5, 16)
FORWARD, BACKWARD = (Call(SHAPE, "bfloat16", "scores", "scores", direction) for direction in ("forward", "backward"))
TUNED, FIRST = Key("scores", "large_v", "bfloat16"), Key("scores", "forward_128", "bfloat16")
ORIGIN = {"device": "NVIDIA A", "torch": "2.13.0"}


class Formula:
    """Rows are fastest in 128 x 64 tiles with 8 warps, the forward as it is built in; two pipeline stages are wrong."""

    arch = 90

    def __init__(self):
        self.measured = []

    def uses(self, call):
        return {FIRST if call.direction == "forward" else TUNED}

    def measure(self, call, launches):
        self.measured.append((call, dict(launches)))
        if any(launch.num_stages == 2 for launch in launches.values()):
            return "wrong: relative error 1.0e+00 of the loss"
        if TUNED not in launches or call.direction == "forward":
            return 10.0 if not launches else 10.5
        launch = launches[TUNED]
        off = [launch.blocks["BLOCK_I"] != 128, launch.blocks["BLOCK_C"] != 64, launch.num_warps != 8]
        return 4.0 + sum(off)


class Clock:
    """Seconds that pass by one at every look."""

    def __init__(self):
        self.time = 0

    def __call__(self):
        self.time += 1
        return self.time


def search(machine, journal=None, seconds=1e9, now=lambda: 0.0, said=None):
    said = [] if said is None else said
    return Search(machine, journal or Journal(None, ORIGIN), seconds, said.append, now=now)


def test_the_search_walks_to_the_fastest_right_launch():
    said = []
    outcome = search(Formula(), said=said).run([FORWARD, BACKWARD])
    (choice,) = outcome.choices
    assert choice.key == TUNED
    assert (choice.launch.blocks["BLOCK_I"], choice.launch.blocks["BLOCK_C"], choice.launch.num_warps) == (128, 64, 8)
    assert (choice.ms, choice.builtin_ms) == (pytest.approx(4.0), pytest.approx(10.0))
    assert outcome.complete
    assert outcome.tuned == {TUNED, FIRST}
    assert outcome.refused
    assert all(launch.num_stages == 2 for _, launch, _ in outcome.refused)
    assert any(line == "scores forward_128 bfloat16: built-in" for line in said)
    assert any("0.400 of built-in" in line for line in said)


def test_a_wrong_launch_is_never_chosen_however_fast():
    class Planted(Formula):
        def measure(self, call, launches):
            found = super().measure(call, launches)
            return found if isinstance(found, str) or not launches else 0.1 + 0.0 * found

    outcome = search(Planted()).run([BACKWARD])
    assert all(choice.launch.num_stages != 2 for choice in outcome.choices)


def test_a_gain_within_the_noise_is_none():
    class Flat(Formula):
        def measure(self, call, launches):
            return 9.8 if launches else 10.0

    assert search(Flat()).run([FORWARD, BACKWARD]).choices == []


def test_a_search_that_was_stopped_goes_on(tmp_path):
    journal = tmp_path / "measured.jsonl"
    machine = Formula()
    first = search(machine, Journal(journal, ORIGIN), 12, Clock()).run([FORWARD, BACKWARD])
    assert not first.complete
    begun = len(machine.measured)
    assert 3 < begun < 16
    with journal.open("a") as file:
        file.write('\n[{"device": "NVIDIA A", "torch"')  # killed while it wrote
    machine = Formula()
    second = search(machine, Journal(journal, ORIGIN)).run([FORWARD, BACKWARD])
    whole = Formula()
    assert second.choices == search(whole).run([FORWARD, BACKWARD]).choices
    assert begun + len(machine.measured) == len(whole.measured)
    other = Formula()
    search(other, Journal(journal, ORIGIN | {"torch": "2.14.0"})).run([FORWARD, BACKWARD])
    assert len(other.measured) == len(whole.measured)


def test_a_candidate_that_ends_the_process_is_not_tried_again(tmp_path):
    journal = tmp_path / "measured.jsonl"

    class Deadly(Formula):
        def measure(self, call, launches):
            if any(launch.num_warps == 8 for launch in launches.values()):
                raise SystemExit("illegal address")
            return super().measure(call, launches)

    runs = 0
    while True:
        runs += 1
        try:
            outcome = search(Deadly(), Journal(journal, ORIGIN)).run([BACKWARD])
        except SystemExit:
            continue
        break
    assert runs > 2
    assert all(choice.launch.num_warps != 8 for choice in outcome.choices)
    assert {why for _, _, why in outcome.refused} >= {"it ended its process"}


def test_an_interrupted_candidate_is_tried_again(tmp_path):
    journal = Journal(tmp_path / "measured.jsonl", ORIGIN)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.outcome(TUNED, Launch({}), BACKWARD, interrupted)
    again = Journal(tmp_path / "measured.jsonl", ORIGIN)
    assert again.outcome(TUNED, Launch({}), BACKWARD, lambda: 2.5) == 2.5
    assert Journal(tmp_path / "measured.jsonl", ORIGIN).found == again.found


def test_a_builtin_launch_that_fails_is_a_sentence():
    class Broken(Formula):
        def measure(self, call, launches):
            return "wrong"

    with pytest.raises(UserError, match="the built-in launch of large_v cannot be timed"):
        search(Broken()).run([BACKWARD])


def test_choices_must_hold_together():
    chosen = [Choice(TUNED, Launch({"BLOCK_I": 64, "BLOCK_C": 64}, 8, 1), 4.0, 10.0, (BACKWARD,))]
    assert confirmed(Formula(), chosen, lambda _: None) == chosen
    wrong = [replace(chosen[0], launch=Launch({}, 8, 2))]
    assert confirmed(Formula(), wrong, lambda _: None) == []
    slow = [Choice(FIRST, Launch({}, 8, 1), 4.0, 10.0, (FORWARD,))]
    assert confirmed(Formula(), slow, lambda _: None) == []


def test_a_table_keeps_what_was_not_tuned():
    measured = table.Measured(1.0, 2.0, "", "2026-01-02", "2.13.0", "3.7.1")
    builtin = {key: space.builtin(key, 90) for key in (TUNED, FIRST)}
    old = [table.Entry(gpu, 90, key, launch, measured) for gpu in ("A", "B") for key, launch in builtin.items()]
    choice = Choice(TUNED, Launch({"BLOCK_I": 64}), 3.0, 4.0, (BACKWARD,))
    origin = {"date": "2026-03-04", "torch": "2.13.0", "triton": "3.7.1"}
    found = updated(old, "A", 90, [choice], {TUNED, FIRST}, origin)
    assert [(entry.gpu, entry.key) for entry in found] == [("B", TUNED), ("B", FIRST), ("A", TUNED)]
    assert found[-1].measured.calls == "backward of scores scores small bfloat16"
    assert updated(old, "A", 90, [], set(), origin) == old
    other_x = replace(old[1], launch=Launch(builtin[FIRST].blocks | {"BLOCK_K": 128}))  # of another version's table
    assert updated([old[0], other_x, *old[2:]], "A", 90, [], set(), origin) == [old[0], *old[2:]]


def test_entries_are_printed_as_code_that_works():
    launch = replace(space.builtin(TUNED, 90), num_warps=8)
    measured = table.Measured(0.123456, 0.2, ", ".join([str(BACKWARD)] * 5), "2026-01-02T03:04:05Z", "2.13.0", "3.7.1")
    code = as_code(
        [table.Entry("NVIDIA A", 90, TUNED, launch, measured), table.Entry("X", 86, FIRST, launch, measured)]
    )
    assert max(map(len, code.splitlines())) <= 120
    assert "# NVIDIA A, 2026-01-02, torch 2.13.0, Triton 3.7.1: 0.1235 ms, rule 0.2 ms" in code
    made = {"Key": Key, "Launch": Launch}
    exec(code, made)
    assert made["MEASURED"] == {86: {FIRST: launch}, 90: {TUNED: launch}}


def test_calls_are_the_combinations_that_exist():
    calls = make_calls([SHAPE, replace(SHAPE, scores=False)], ["float32"], ["scores", "qk"], ["scores", "probs"])
    assert {(call.variant, call.kind) for call in calls} == {
        ("scores", "scores"),
        ("scores", "probs"),
        ("qk", "scores"),
    }
    assert len(calls) == 2 * (2 + 2)


# with the kernels themselves


@pytest.fixture
def interpreted(monkeypatch):
    """Interpreted kernels on tiny inputs, timed by a formula: fewer warps are faster."""
    if torch.cuda.is_available():
        pytest.skip("without a GPU only")
    monkeypatch.setattr(Kernels, "checked", lambda self, call: (call,))
    warps = []

    def timer(device):
        def times(prepare, seconds, graph):
            prepare()()
            warps.append(table.scores_plan(torch.device("cpu"), "float32").kernels["rows_64"].num_warps)
            return type("Times", (), {"p20_ms": float(warps[-1])})

        return times

    monkeypatch.setattr(tune_run, "timer_for", timer)
    return Kernels("cpu", 90, 0.0)


def float32(direction, variant="scores"):
    return Call(SHAPE, "float32", variant, "scores", direction)


def test_the_kernels_of_a_call_are_found(interpreted):
    names = {key.kernel for key in interpreted.uses(float32("backward"))}
    assert names == {"rows_64", "cross_64", "own_64"}
    assert {key.kernel for key in interpreted.uses(float32("forward"))} == {"forward_64"}
    assert {key.kernel for key in interpreted.uses(float32("forward", "qk"))} >= {"gram", "forward"}


def test_candidates_are_checked_before_they_are_timed(interpreted, monkeypatch):
    call = float32("backward")
    rows = Key("scores", "rows_64", "float32")
    good = Launch(dict.fromkeys(configs.BLOCKS["rows_64"], 32), 2, 1)
    assert interpreted.measure(call, {rows: good}) == 2.0

    class Wrong(type(tune_run.prepared(call, "cpu"))):
        """A gradient that is wrong with one launch only."""

        def both(self):
            out, (gradient,) = super().both()
            one = table.scores_plan(torch.device("cpu"), "float32").kernels["rows_64"].num_warps == 1
            return out, (gradient * (1.0 + 1e-3 * one),)

    tune_run.prepared(call, "cpu").__class__ = Wrong
    refused = interpreted.measure(call, {rows: replace(good, num_warps=1)})
    assert refused == "wrong: relative error 1.0e-03 of the gradient, at most 5.0e-06 allowed"
    assert interpreted.measure(call, {rows: good}) == 2.0
    tune_run.prepared.cache_clear()


def test_a_launch_that_cannot_run_is_refused_with_its_reason(interpreted, monkeypatch):
    def out_of_resources(self, calls):
        if table.scores_plan(torch.device("cpu"), "float32").kernels["rows_64"].num_warps == 1:
            raise RuntimeError("out of resource: shared memory\nRequired: 1")
        return 0.0, 0.0

    monkeypatch.setattr(tune_run.Expected, "errors", out_of_resources)
    launch = Launch(dict.fromkeys(configs.BLOCKS["rows_64"], 32), 1, 1)
    refused = interpreted.measure(float32("backward"), {Key("scores", "rows_64", "float32"): launch})
    assert refused == "RuntimeError: out of resource: shared memory"


def test_wrong_built_in_kernels_are_not_tuned(interpreted, monkeypatch):
    monkeypatch.setattr(tune_run.Expected, "errors", lambda self, calls: (float("nan"), 0.0))
    with pytest.raises(UserError, match="nothing can be tuned"):
        interpreted.uses(float32("forward"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds is 0.0"),
        (["--shapes", "wide"], "'wide' is neither"),
        (["--variants", "qk", "--kinds", "probs"], "no kind probs"),
        ([], "tuning needs an NVIDIA GPU"),
    ],
)
def test_wrong_options_are_one_sentence(capsys, words, message, tmp_path):
    if torch.cuda.is_available() and not words:
        pytest.skip("this machine has a GPU")
    assert cli.main(["bench", "tune", "--out", str(tmp_path / "table.json"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_table_that_is_no_table_is_not_replaced(capsys, tmp_path):
    file = tmp_path / "notes.json"
    file.write_text("[]")
    assert cli.main(["bench", "tune", "--out", str(file)]) == 2
    assert "expected one JSON object" in capsys.readouterr().err
    assert file.read_text() == "[]"


def test_a_folder_is_no_table(capsys, tmp_path):
    assert cli.main(["bench", "tune", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder; give a file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "tune", "--help"])
    assert "--out OUT the launch table, a JSON file" in " ".join(capsys.readouterr().out.split())


def test_doctor_says_which_launch_table_is_in_use(capsys, tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    monkeypatch.setenv(table.VARIABLE, str(file))
    file.write_text('{"version": 1}')
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["launch_table"] == "unusable"
    assert any(str(file) in line and "expected the names" in line for line in found["advice"])
    table.write(file, [])
    assert cli.main(["doctor"]) == 0
    assert f"launch table of the Triton kernels: built-in, and {file}: 0 entries" in capsys.readouterr().out
