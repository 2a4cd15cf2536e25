"""The study: every run once, interrupted or not; results that name every seed."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from cacr_uniter import cli
from cacr_uniter import study as module
from cacr_uniter.commands import study as command
from cacr_uniter.errors import UserError
from cacr_uniter.study import Study, collect, commands, run_folder, run_study, spread

STUDY = Study("scenes", "demo", ("none", "cacr"), (0, 1, 2))

FAKE = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
option = {w.split("=")[0]: w.split("=")[1] for w in words if "=" in w}
with open(pathlib.Path(__file__).parent / "calls", "a") as calls:
    print(words[0], option.get("--run.out", ""), file=calls)
if words[0] == "train":
    if option["--run.out"].endswith("none-seed1") and (pathlib.Path(__file__).parent / "broken").exists():
        print("cacr train: out of memory", file=sys.stderr)
        raise SystemExit(2)
    if option["--run.out"].endswith("cacr-seed0") and (pathlib.Path(__file__).parent / "killed").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if (pathlib.Path(__file__).parent / "slow").exists():
        def save(number, frame):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.2)
            (pathlib.Path(__file__).parent / "saved").touch()
            raise SystemExit(130)
        signal.signal(signal.SIGTERM, save)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(5)
    done = 86 if (pathlib.Path(__file__).parent / "stopped").exists() else 300
    checkpoint = pathlib.Path(option["--run.out"], "checkpoints", f"step-{done:08d}")
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "state.json").write_text(json.dumps({"config": {"optim": {"steps": 300}}}))
    raise SystemExit(0)
seed = int(words[words.index("--checkpoint") + 1][-1])
part = {name: {"score": 50 + seed + 10 * ("cacr" in words[3])} for name in ("text", "image", "group")}
print(json.dumps({**part, "breakdowns": {"split": {"seen": part, "held_out": part}}}))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `cacr` that notes its calls and scores at once."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    popen = module.subprocess.Popen

    def call(words: list[str], **options: object) -> object:
        assert words[:3] == [sys.executable, "-m", "cacr_uniter.cli"]
        return popen([sys.executable, str(script), *words[3:]], **options)

    monkeypatch.setattr(module.subprocess, "Popen", call)
    return tmp_path


def trained(folder: Path) -> int:
    return (folder / "calls").read_text().count("train ")


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def test_every_run_once_and_every_seed_in_the_results(fake: Path) -> None:
    results = run_study(fake / "out", STUDY, 2, quiet)
    assert trained(fake) == 6
    assert results["scores"]["none"]["group"] == {"0": 50.0, "1": 51.0, "2": 52.0}
    assert results["summary"]["cacr"]["group held_out"] == {"mean": 61.0, "sd": 1.0, "min": 60.0, "max": 62.0}
    assert json.loads((fake / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert run_study(fake / "out", STUDY, 1, quiet) == results
    assert trained(fake) == 6, "finished runs are not repeated"


def test_a_failed_run_is_named_and_the_rest_is_kept(fake: Path) -> None:
    (fake / "broken").touch()
    with pytest.raises(UserError, match=r"run none of seed 1 failed \(cacr train: out of memory\); see"):
        run_study(fake / "out", STUDY, 1, quiet)
    (fake / "broken").unlink()
    before = trained(fake)
    done = len(list((fake / "out").glob("*/winoground.json")))
    assert done >= 2
    run_study(fake / "out", STUDY, 1, quiet)
    assert trained(fake) - before == 6 - done


def test_a_killed_run_says_so(fake: Path) -> None:
    (fake / "killed").touch()
    with pytest.raises(UserError, match=r"run cacr of seed 0 failed \(stopped by signal 9"):
        run_study(fake / "out", STUDY, 1, quiet)
    assert not (fake / "out" / "cacr-seed2").exists(), "nothing is begun after a failure"


def test_a_run_that_was_asked_to_stop_is_no_result(fake: Path) -> None:
    """Training saves, ends with status 0, and has weights to score."""
    (fake / "stopped").touch()
    for _ in range(2):
        with pytest.raises(UserError, match=r"run none of seed 0 stopped at step 86 of 300; the same command goes on"):
            run_study(fake / "out", STUDY, 1, quiet)
        # the second time with the scores that earlier versions took from it
        (run_folder(fake / "out", "none", 0) / module.REPORT).write_text("{}")
    (fake / "stopped").unlink()
    results = run_study(fake / "out", STUDY, 1, quiet)
    assert results["scores"]["none"]["group"] == {"0": 50.0, "1": 51.0, "2": 52.0}
    assert trained(fake) == 2 + 6


def test_a_terminated_study_stops_its_runs_and_goes_on(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fake / "scenes").mkdir()
    (fake / "slow").touch()
    words = ["study", "--out", str(fake / "out"), "--scenes", str(fake / "scenes"), "--seeds", "1", "--processes", "1"]

    def ignore(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, ignore)
    try:
        assert cli.main(words) == 130
        assert signal.getsignal(signal.SIGTERM) is ignore
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert (fake / "saved").exists(), "a second signal, as `timeout` sends, does not end the wait for the run"
    assert trained(fake) == 1
    (fake / "slow").unlink()
    assert cli.main(words) == 0


def test_more_seeds_may_be_added_but_no_other_options(fake: Path) -> None:
    run_study(fake / "out", Study("scenes", "demo", ("none",), (0,)), 1, quiet)
    run_study(fake / "out", Study("scenes", "demo", ("none", "cacr"), (0, 1)), 1, quiet)
    assert trained(fake) == 4
    with pytest.raises(UserError, match="other options"):
        run_study(fake / "out", Study("scenes", "demo", ("none",), (0,), ("--optim.steps=5",)), 1, quiet)


def test_commands_differ_in_the_auxiliary_loss_only(tmp_path: Path) -> None:
    made = {variant: commands(tmp_path, STUDY, variant, 1, 1) for variant in module.VARIANTS}
    for variant, (train, score) in made.items():
        assert train[0] == "train"
        assert f"--run.out={run_folder(tmp_path, variant, 1)}" in train
        assert score[:2] == ["eval", "winoground"]
        rest = [w for w in train if not w.startswith(("--aux", "--run.out"))]
        assert rest == [w for w in made["none"][0] if not w.startswith(("--aux", "--run.out"))]


def test_variants_are_options_that_training_takes() -> None:
    from cacr_uniter.training.checks import check
    from cacr_uniter.training.command import load_config

    for variant, options in module.VARIANTS.items():
        config = load_config("demo", ["--data.scenes=x", *options])
        check(config)
        assert config.aux.loss == ("cacr" if variant.startswith("cacr") else variant)


def test_spread_by_hand() -> None:
    assert spread([2.0, 4.0, 6.0]) == {"mean": 4.0, "sd": 2.0, "min": 2.0, "max": 6.0}
    assert spread([5.0])["sd"] == 0.0


def test_the_table_shows_every_seed(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_study(fake / "out", STUDY, 1, quiet)
    command.show(collect(fake / "out", STUDY))
    out = capsys.readouterr().out
    assert "50.0 51.0 52.0" in out
    assert "60.0 61.0 62.0" in out


def test_wrong_studies_are_refused(tmp_path: Path) -> None:
    for study, processes, message in (
        (Study("s", "demo", (), (0,)), 1, "--variants"),
        (Study("s", "demo", ("magic",), (0,)), 1, "'magic'"),
        (Study("s", "demo", ("none",), ()), 1, "--seeds is 0"),
        (Study("s", "demo", ("none",), (0,)), 0, "--processes is 0"),
    ):
        with pytest.raises(UserError, match=message):
            run_study(tmp_path / "out", study, processes, quiet)
    assert not (tmp_path / "out").exists()
