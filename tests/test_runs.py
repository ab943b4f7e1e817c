"""A run is never lost: interrupting and resuming it, and what a directory may be used for."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
from conftest import make_gpt, run
from data import BUILT_IN
from lab.runs import MAY, MUST, NEVER, open_run
from train import Step, main

TRAIN = str(Path(train.__file__))
FLAGS = ["--batch-size", "2", "--block-size", "32", "--device", "cpu"]
MINI = ["--steps", "4", "--eval-every", "2", *FLAGS]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    dir = tmp_path_factory.mktemp("runs") / "base"
    assert main(["pretrain", "--data", "noir", "--out", str(dir), *MINI]) == 0
    return str(dir)


def press_ctrl_c(monkeypatch, at_call):
    """Let the process get Ctrl-C when the at_call-th step begins, counted over all models."""
    set_learning_rate = Step.set_learning_rate
    calls = []

    def interrupted(step, n):
        calls.append(n)
        if len(calls) == at_call:
            os.kill(os.getpid(), signal.SIGINT)
        set_learning_rate(step, n)

    monkeypatch.setattr(Step, "set_learning_rate", interrupted)


def out_of_memory(*args, **options):
    raise MemoryError


# ---- the directory of a run ----------------------------------------------------------------------

ASKED = {"lr": 1, "shape": {"n_layer": 2, "n_head": 4}}
POINT = {"step": 0, "seconds": 0.0, "loss": None, "bpb": 2.0, "skipped": 0}


@pytest.fixture
def directory(tmp_path, request):
    """A directory that is "empty", or has an "interrupted" or a "finished" run that did ASKED."""
    if request.param != "empty":
        with open_run(tmp_path, ASKED) as new:
            (tmp_path / "checkpoint.safetensors").write_bytes(b"a checkpoint")
            if request.param == "finished":
                new.finish([POINT])
    return tmp_path


@pytest.mark.parametrize("directory, resume, resuming, reused", [
    ("empty", MAY, False, False),
    ("empty", NEVER, False, False),
    ("interrupted", MUST, True, False),
    ("interrupted", MAY, True, False),
    ("finished", MUST, False, True),
    ("finished", MAY, False, True),
    ("finished", NEVER, False, True),
], indirect=["directory"])
def test_a_directory_is_claimed_for_the_same_run(directory, resume, resuming, reused):
    with open_run(directory, ASKED, resume) as claim:
        assert claim.dir == directory
        assert claim.asked == ASKED
        assert claim.resuming == resuming
        if reused:
            assert claim.record == json.loads((directory / "training.json").read_text())
            assert claim.record["curve"] == [POINT]
        else:
            assert claim.record is None
    assert (directory / "checkpoint.safetensors").exists() == resuming


@pytest.mark.parametrize("directory, resume, says", [
    ("empty", MUST, "holds no interrupted run"),
    ("interrupted", NEVER, "continue it with --resume"),
], indirect=["directory"])
def test_a_directory_that_does_not_fit_resume_is_refused(directory, resume, says):
    before = contents(directory)
    with pytest.raises(ValueError, match=says):
        with open_run(directory, ASKED, resume):
            pytest.fail("the directory is claimed")
    assert contents(directory) == before


def contents(dir):
    """{path: bytes} of the files in a directory, without the lock."""
    return {path: path.read_bytes() for path in dir.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("resume", [MUST, MAY, NEVER])
@pytest.mark.parametrize("directory", ["interrupted", "finished"], indirect=True)
def test_a_run_with_other_settings_is_refused_and_they_are_named(directory, resume):
    other = {"lr": 1, "shape": {"n_layer": 2, "n_head": 8}}
    with pytest.raises(ValueError, match="n_head 4 -> 8"):
        with open_run(directory, other, resume):
            pytest.fail("the directory is claimed")


@pytest.mark.parametrize("directory", ["empty", "interrupted", "finished"], indirect=True)
def test_fresh_starts_over_in_any_directory(directory):
    with open_run(directory, {"lr": 2}, NEVER, fresh=True) as claim:
        assert claim.record is None
        assert not claim.resuming
    assert not (directory / "checkpoint.safetensors").exists()
    assert json.loads((directory / "training.json").read_text()) == {"asked": {"lr": 2}}


def test_a_death_while_starting_over_never_leaves_an_old_checkpoint_to_a_new_run(
        tmp_path, monkeypatch):
    def begin(asked, fresh):
        with open_run(tmp_path, asked, MAY, fresh):
            pass

    checkpoint = tmp_path / "checkpoint.safetensors"
    begin({"lr": 1}, fresh=False)
    for function in ("lab.runs.write_json", "pathlib.Path.unlink"):
        checkpoint.write_bytes(b"of the run with lr 1")
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(function, out_of_memory)
            begin({"lr": 2}, fresh=True)
        if checkpoint.exists():
            with pytest.raises(ValueError, match="lr 1 -> 2"):
                begin({"lr": 2}, fresh=False)


def test_other_settings_are_refused_and_named_not_overwritten(base, capsys):
    argv = ["pretrain", "--data", "noir", "--out", base, *MINI]
    code, _, error = run(capsys, *argv, "--lr", "0.5")
    assert code == 1
    assert "lr 0.008 -> 0.5" in error
    assert "--fresh" in error


def test_a_directory_that_cannot_be_written_fails_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, printed, error = run(
        capsys, "pretrain", "--data", "noir", "--out", tmp_path / "file" / "base", *MINI
    )
    assert code == 1
    assert "step" not in printed
    assert "file" in error


def test_a_model_from_elsewhere_is_not_overwritten(tmp_path, capsys):
    make_gpt().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    code, _, error = run(capsys, "pretrain", "--data", "noir", "--out", tmp_path, *MINI)
    assert code == 1
    assert "no training.json" in error
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_fresh_replaces_a_finished_run(tmp_path, capsys):
    argv = ["pretrain", "--data", "noir", "--out", tmp_path, *MINI]
    code, _, _ = run(capsys, *argv)
    assert code == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    code, _, _ = run(capsys, *argv, "--seed", "5", "--fresh")
    assert code == 0
    assert (tmp_path / "model.safetensors").read_bytes() != before


# ---- interruption --------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ["pretrain", "full", "lora"])
def test_an_interrupted_and_resumed_run_ends_with_the_same_weights_as_an_uninterrupted_one(
        base, tmp_path, capsys, monkeypatch, command):
    argv = ["pretrain"]
    if command != "pretrain":
        argv = ["tune", "--method", command, "--base", base]
    argv += ["--data", "pirate", "--dropout", "0.1", *MINI]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, _, _ = run(capsys, *argv, "--out", whole)
    assert code == 0

    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at_call=3)
        code, _, error = run(capsys, *argv, "--out", parts)
    assert code == 130
    assert "stopped at step 3 of 4" in error

    code, _, error = run(capsys, *argv, "--out", parts)
    assert code == 1
    assert "--resume" in error

    code, _, error = run(
        capsys, *argv, "--out", parts, "--resume", "--data", "noir", "--lr", "0.1"
    )
    assert code == 1, "a checkpoint of another run must not be continued"
    assert "-> noir" in error
    assert "-> 0.1" in error

    code, printed, _ = run(capsys, *argv, "--out", parts, "--resume")
    assert code == 0
    assert "was interrupted and is resumed" in printed
    name = "adapter_model.safetensors" if command == "lora" else "model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert not (parts / "checkpoint.safetensors").exists()


def test_a_run_that_died_without_a_checkpoint_starts_over(tmp_path, capsys, monkeypatch):
    argv = ["pretrain", "--data", "noir", "--out", tmp_path, *MINI]
    with monkeypatch.context() as patch:
        patch.setattr(Step, "set_learning_rate", out_of_memory)
        code, _, error = run(capsys, *argv)
        assert code == 1
        assert "MemoryError" in error
        assert "--debug" in error
        with pytest.raises(MemoryError):
            run(capsys, *argv, "--debug")
    code, _, _ = run(capsys, *argv)
    assert code == 0
    assert (tmp_path / "model.safetensors").exists()


def test_ctrl_c_while_nothing_is_trained_does_not_promise_a_checkpoint(
        tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "read_text", interrupted)
    code, _, error = run(capsys, "pretrain", "--data", "noir", "--out", tmp_path / "base", *MINI)
    assert code == 130
    assert "stopped" in error
    assert "--resume" not in error
    assert "Traceback" not in error


@pytest.mark.parametrize("flags", [[], ["--resume"]], ids=["without", "with --resume"])
@pytest.mark.parametrize("command, parts", [
    ([], ["base", "full", "lora"]),
    (["compare", "--data", "pirate", "--base", "BASE"], ["full", "lora"]),
    (["voices", "--data", "pirate", "noir", "--base", "BASE"], ["pirate", "noir"]),
], ids=["story", "compare", "voices"])
def test_ctrl_c_in_the_last_step_of_a_part_ends_the_command_and_the_same_one_finishes_it(
        base, tmp_path, capsys, monkeypatch, command, parts, flags):
    monkeypatch.setitem(BUILT_IN, "tales", BUILT_IN["noir"])        # shorter, so faster
    argv = [base if arg == "BASE" else arg for arg in command]
    argv += ["--out", tmp_path, "--steps", "2", "--eval-every", "2", *FLAGS]
    first, second = parts[:2]
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at_call=2)
        code, _, error = run(capsys, *argv)
    assert code == 130
    assert f"stopped at step 2 of 2; checkpoint saved in {tmp_path / first}" in error
    assert not (tmp_path / second).exists()

    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at_call=2)
        code, printed, error = run(capsys, *argv, *flags)
    assert code == 130
    assert f"{tmp_path / first} was interrupted and is resumed" in printed
    assert f"stopped at step 2 of 2; checkpoint saved in {tmp_path / second}" in error

    code, printed, error = run(capsys, *argv, *flags)
    assert code == 0, error
    assert f"{tmp_path / first} was finished" in printed
    assert f"{tmp_path / second} was interrupted and is resumed" in printed
    for part in parts:
        record = json.loads((tmp_path / part / "training.json").read_text())
        assert [point["step"] for point in record["curve"]] == [0, 2]
        assert not (tmp_path / part / "checkpoint.safetensors").exists()


def test_sigterm_in_the_story_keeps_what_is_finished_and_the_next_run_resumes(tmp_path):
    argv = [sys.executable, TRAIN, "--steps", "400", "--eval-every", "10", *FLAGS,
            "--out", str(tmp_path)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(argv, **pipes)
    read_until(process, "step   10")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at step" in error

    process = subprocess.Popen(argv, **pipes)
    lines = read_until(process, "step   20")
    process.kill()
    process.communicate()
    assert "step   20" in lines[-1], "a new process has other hashes, so its sets differ in order"
    assert any("base was interrupted and is resumed" in line for line in lines)
    assert not any("step    0" in line for line in lines)


def read_until(process, text):
    """The lines that a process prints, up to one that contains the text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    return lines
