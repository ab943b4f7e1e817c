"""Nothing a user made is ever lost, and whatever is wrong is said in one line: killed processes, full disks, damaged files,
bad flags, gradients that are not finite. `pytest -m long` tries ten times as many."""
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import train
from conftest import make_gpt
from data.bpe import save_tokenizer, train_bpe
from gpt import GPT
from lora_minimal import apply_lora
from train import Settings, Step, main

FEW_OR_MANY = [pytest.param(1, id="few"), pytest.param(10, id="many", marks=pytest.mark.long)]
TINY = ["--steps", "6", "--batch-size", "2", "--block-size", "16", "--eval-every", "2", "--device", "cpu", "--dropout", "0.1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a text, a base model and an adapter."""
    home = tmp_path_factory.mktemp("home")
    stories = [f"The {a} {b} went to the {c}, and it was {a}.\n" * 8 for a in ("old", "red", "sad")
               for b in ("man", "fox", "ship") for c in ("sea", "hill", "town")]
    (home / "text.txt").write_text("<|endoftext|>\n".join(stories), encoding="utf-8")
    base = make_gpt(vocab_size=300, block_size=16, n_embd=16, n_head=2)
    base.save_pretrained(home / "base")
    save_tokenizer(train_bpe("\n".join(stories), 300), home / "base")
    assert main(["tune", "--base", str(home / "base"), "--data", str(home / "text.txt"), "--out", str(home / "lora"),
                 *TINY]) == 0
    return home


def run(capsys, *argv):
    try:
        code = main(list(map(str, argv)))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


# ---- killed processes, full disks, two at once -----------------------------------------------------------------------

KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import train                        # imported once; every trial is a fork of this process
from safetensors import safe_open

trials, home, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
argv = sys.argv[4:]
draw, killed, resumed, finished = random.Random(0), 0, 0, 0
for warm in "12":           # twice: the first time, torch loads what it needs
    start = time.monotonic()
    assert train.main([*argv, "--out", str(out.with_name(f"warm-{warm}"))]) == 0
    whole = time.monotonic() - start
while killed < trials:
    resume = ["--resume"] if (out / "checkpoint.safetensors").exists() else []
    child = os.fork()
    if child == 0:
        sys.stdout = open(home / "stdout", "w"); sys.stderr = open(home / "stderr", "w")
        code = 70
        try:
            code = train.main([*argv, "--out", str(out), *resume])
        finally:
            sys.stderr.flush(); os._exit(code)
    end = time.monotonic() + draw.uniform(0, 1.2 * whole)
    done = 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if done:
        error = (home / "stderr").read_text()
        assert os.waitstatus_to_exitcode(status) == 0, error
        finished += 1
        yet = out.with_name(f"finished-{finished}"); out.rename(yet)
        continue
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    killed += 1; resumed += bool(resume)
    for path in out.glob("*.safetensors"):          # glob leaves out the hidden files that a dead writer leaves behind
        with safe_open(path, framework="np") as file:
            [file.get_tensor(name) for name in file.keys()]
print("\\n", killed, resumed, finished)
"""


@linux
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("times", FEW_OR_MANY)
def test_killed_at_any_instant_a_run_goes_on_and_ends_with_the_very_same_weights(home, tmp_path, method, times):
    argv = ["tune", "--method", method, "--base", str(home / "base"), "--data", str(home / "text.txt"), *TINY]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    result = subprocess.run([sys.executable, "-c", KILLER, str(50 * times), tmp_path, tmp_path / "out", *argv,
                             "--save-every", "1"], capture_output=True, text=True, timeout=110 * times,
                            cwd=Path(train.__file__).parent, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})     # forks, CUDA not
    assert result.returncode == 0, result.stderr
    killed, resumed, finished = map(int, result.stdout.splitlines()[-1].split())
    print(f"{method}: killed {killed} times, {resumed} of them when resumed; finished {finished} times")
    assert killed == 50 * times and finished > 0
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    for i in range(1, finished + 1):
        assert (tmp_path / f"finished-{i}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@linux
def test_a_full_disk_is_said_and_the_last_checkpoint_opens(home, tmp_path):
    program = ("import resource, sys, train; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
               "sys.exit(train.main(sys.argv[2:]))")
    argv = ["tune", "--method", "full", "--base", home / "base", "--data", home / "text.txt", "--out", tmp_path, *TINY]
    whole = (home / "base" / "model.safetensors").stat().st_size
    result = subprocess.run([sys.executable, "-c", program, str(whole * 2), *argv, "--save-every", "1"], capture_output=True,
                            text=True, cwd=Path(train.__file__).parent)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "checkpoint.safetensors could not be written" in result.stderr
    assert not list(tmp_path.glob(".*.tmp")) and not (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(home, tmp_path, capsys, monkeypatch):
    argv = ["tune", "--base", home / "base", "--data", home / "text.txt", "--out", tmp_path, *TINY]
    sync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    code, _, error = run(capsys, *argv, "--save-every", "1")
    monkeypatch.undo()
    assert code == 1 and "No space left" in error
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["about"])["step"] > 0
    assert run(capsys, *argv, "--resume")[0] == 0
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == (home / "lora" / "adapter_model.safetensors").read_bytes()


def test_a_second_run_into_the_same_directory_is_refused(home, tmp_path, capsys):
    program = ("import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); "
               "sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", program, tmp_path / ".lock"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    argv = ["tune", "--base", home / "base", "--data", home / "text.txt", "--out", tmp_path, *TINY]
    code, _, error = run(capsys, *argv)
    assert code == 1 and "another run" in error and not (tmp_path / "training.json").exists()
    holder.communicate()
    assert run(capsys, *argv)[0] == 0


# ---- damaged files ---------------------------------------------------------------------------------------------------

def damage(content, draw):
    """One random corruption of a file's bytes."""
    kind, n = draw.randrange(6), len(content)
    i, j = sorted((draw.randrange(n), draw.randrange(n)))
    if kind == 0:
        return content[:i]
    if kind == 1:       # a flipped bit
        return content[:i] + bytes([content[i] ^ 1 << draw.randrange(8)]) + content[i + 1:]
    if kind == 2:
        return content[:i] + draw.randbytes(j - i) + content[j:]
    if kind == 3:
        return content[:i] + content[j:]
    if kind == 4:       # a flipped bit where the structure is
        i = draw.randrange(min(n, 400))
        return content[:i] + bytes([content[i] ^ 1 << draw.randrange(8)]) + content[i + 1:]
    return draw.randbytes(draw.randrange(200))


def damage_json(content, draw):
    """Another value in one place of a JSON file, or damage to its bytes."""
    if draw.random() < 0.3:
        return damage(content, draw)
    root = json.loads(content)
    at = root
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = draw.choice(list(keys))
        if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.7:
            at = at[key]
            continue
        if draw.random() < 0.2:
            del at[key]
        else:
            at[key] = draw.choice([None, True, -1, 0, 3, 10**30, 1e300, float("nan"), "", "x", [], {}, [1], {"a": 1}, "[" * 9])
        return json.dumps(root).encode()


SAMPLE = ["sample", "--base", "base", "--adapter", "lora", "--prompt", "The old", "--max-new-tokens", "1", "--device", "cpu"]
TUNE = ["tune", "--base", "base", "--data", "text.txt", "--out", "stopped", *TINY]


@pytest.mark.parametrize("times", FEW_OR_MANY)
@pytest.mark.parametrize("file, argv", [
    ("base/config.json", SAMPLE), ("base/model.safetensors", SAMPLE), ("base/tokenizer.json", SAMPLE),
    ("lora/adapter_config.json", SAMPLE), ("lora/adapter_model.safetensors", SAMPLE), ("lora/training.json", SAMPLE),
    ("stopped/training.json", [*TUNE, "--resume"]), ("stopped/checkpoint.safetensors", [*TUNE, "--resume"]),
    ("text.txt", [*TUNE[:-2], "--out", "new", "--steps", "1"])])
def test_a_damaged_file_is_read_or_refused_in_one_line(home, tmp_path, capsys, monkeypatch, file, argv, times):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "stopped" in file:
        with monkeypatch.context() as patch:
            patch.setattr(Step, "schedule", stop_at(3, Step.schedule))
            assert run(capsys, *TUNE, "--save-every", "2")[0] == 1
    path, draw, outcomes = tmp_path / file, random.Random(file), {0: 0, 1: 0, 2: 0}
    whole, keep = path.read_bytes(), tmp_path.with_name(tmp_path.name + "-kept")
    shutil.copytree(tmp_path, keep)
    for _ in range(100 * times):
        path.write_bytes(bad := (damage_json if path.suffix == ".json" else damage)(whole, draw))
        code, _, error = run(capsys, *argv)
        outcomes[code] += 1
        assert code == 0 or error.startswith("error: ") and error.count("\n") == 1 and "--debug" not in error, error
        if code:
            assert path.read_bytes() == bad, "what was refused was not touched"
        if "--out" in argv:
            for made in ("stopped", "new", "tokens"):
                shutil.rmtree(tmp_path / made, ignore_errors=True)
            shutil.copytree(keep, tmp_path, dirs_exist_ok=True)
    print(f"{file}: {100 * times} corruptions, {outcomes[0]} read, {outcomes[1] + outcomes[2]} refused")


def stop_at(step, schedule):
    def stopping(self, n):
        if n == step:
            raise OSError("stopped by the test")
        schedule(self, n)
    return stopping


@pytest.mark.parametrize("content", [b"\x80\x04\x95", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_read(home, tmp_path, capsys, name, content):
    shutil.copy(home / "base" / "config.json", tmp_path)
    (tmp_path / name).write_bytes(content)
    code, _, error = run(capsys, "sample", "--base", tmp_path, "--prompt", "x", "--device", "cpu")
    assert code == 1 and "pickle" in error and "convert" in error


def test_no_code_that_reads_pickles_is_in_the_program():
    root = Path(train.__file__).parent
    for path in [*root.glob("*.py"), *(root / "data").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        assert "import pickle" not in source and "torch.load(" not in source and "torch.save(" not in source


# ---- flags -----------------------------------------------------------------------------------------------------------

FLAGS = {"--steps": int, "--batch-size": int, "--block-size": int, "--eval-every": int, "--seed": int, "--r": int,
         "--accumulate": int, "--loss-chunk": int, "--lr": float, "--muon-lr": float, "--weight-decay": float, "--dropout": float,
         "--warmup": float, "--grad-clip": float, "--alpha": float, "--save-every": int}


def is_bad(flag, text):
    try:
        return not 0 <= FLAGS[flag](text) < float("inf")
    except (ValueError, OverflowError):
        return True


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flag=st.sampled_from(list(FLAGS)), text=st.one_of(st.text(max_size=8), st.integers(max_value=-1).map(str),
                                                         st.floats().map(str), st.sampled_from(["nan", "inf", "1e999"])))
def test_a_flag_that_is_no_number_from_zero_up_is_refused(home, tmp_path, capsys, flag, text):
    if not is_bad(flag, text):
        return
    code, _, error = run(capsys, "tune", "--base", home / "base", "--data", home / "text.txt", "--out", tmp_path / "new",
                         "--device", "cpu", f"{flag}={text}")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prompt", ["", "<|endoftext|>", "a" * 5000, "\x00\x01", "\ud800", "日本 🏴‍☠️"])
def test_any_prompt_is_continued_or_refused_in_one_line(home, capsys, prompt):
    argv = ["sample", "--base", home / "base", "--prompt", prompt, "--max-new-tokens", "3", "--device", "cpu"]
    code, _, error = run(capsys, *argv)
    assert code == 0 or error.count("\n") == 1 and "--debug" not in error


# ---- training that goes wrong ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])
@pytest.mark.parametrize("options", [dict(), dict(muon_lr=0.02), dict(grad_clip=0.0), dict(accumulate=2)])
def test_a_step_whose_gradients_are_not_finite_changes_nothing_and_is_counted(options, device):
    model = make_gpt().to(device).train()
    step = Step(model, Settings(**{**dict(steps=10, batch_size=2, block_size=8, lr=1e-2), **options}))
    x = torch.randint(97, (2, 8), device=device)
    for _ in range(5):          # on CUDA from the fourth on captured
        step(x, x)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [t.clone() for o in step.optimizers for state in o.state.values() for t in state.values()]
    hook = [True]
    good = model.transformer.ln_f.weight.detach().clone()
    if device == "cpu":
        handle = model.transformer.ln_f.register_full_backward_hook(
            lambda *_: (torch.full_like(_[1][0], float("nan")),) if hook[0] else None)
        step(x, x)
        handle.remove()
    else:                       # in a captured step, through a weight
        model.transformer.ln_f.weight.data.fill_(float("inf"))
        step(x, x)
        model.transformer.ln_f.weight.data.copy_(good)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    after = [t for o in step.optimizers for state in o.state.values() for t in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after))
    assert step.skipped == 1 and step.skipped_in_a_row == 1
    step(x, x)
    assert step.skipped == 1 and step.skipped_in_a_row == 0
    assert not torch.equal(before[0], next(model.parameters()))


def test_training_that_diverges_stops_says_why_and_keeps_finite_weights(home, tmp_path, capsys):
    argv = ["tune", "--base", home / "base", "--data", home / "text.txt", "--out", tmp_path, *TINY, "--steps", "40"]
    code, _, error = run(capsys, *argv, "--lr", "1e30", "--grad-clip", "0", "--method", "full")
    assert code == 1 and "not finite" in error and "--lr" in error and error.count("\n") == 1
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys() if name.startswith("best/"))


def test_a_base_that_gives_no_number_is_said_before_training(home, tmp_path):
    model = make_gpt()
    nn.init.constant_(model.transformer.ln_f.weight, 3e38)
    apply_lora(model)
    corpus = train.tokenize(train.read_text(str(home / "text.txt"), 0.1, tmp_path), train_bpe("x" * 99, 257), tmp_path, 8)
    corpus.train, corpus.heldout = np.minimum(corpus.train, 96), np.minimum(corpus.heldout, 96)
    with pytest.raises(ArithmeticError, match="before any training"):
        train.train(model, corpus, Settings(steps=2, batch_size=1, block_size=8, lr=1e-3), tmp_path)


# ---- several processes -----------------------------------------------------------------------------------------------

@linux
@pytest.mark.parametrize("flags", [["--method", "lora"], ["--method", "full", "--accumulate", "2"],
                                   ["--method", "lora", "--fsdp"]])
def test_two_processes_take_the_steps_of_one(home, tmp_path, flags):
    argv = ["tune", "--base", home / "base", "--data", home / "text.txt", *TINY, "--batch-size", "8", "--dropout", "0"]
    assert main([*map(str, argv), *[flag for flag in flags if flag != "--fsdp"], "--out", str(tmp_path / "one")]) == 0
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                             train.__file__, *argv, *flags, "--out", tmp_path / "two"],
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("parameters train") == 1, "the first process alone prints"
    curves = [json.loads((tmp_path / name / "training.json").read_text())["curve"] for name in ("one", "two")]
    assert [point["bpb"] for point in curves[1]] == pytest.approx([point["bpb"] for point in curves[0]], rel=1e-4)
    numbers = {"full": sum(p.numel() for p in GPT.from_pretrained(home / "base").parameters()),
               "lora": 2 * 8 * (4 * 16 + 2 * 16 + 5 * 16 + 5 * 16)}
    assert f"sent {train.compare.size(4 * numbers[flags[1]])} of gradients" in result.stdout


@linux
def test_an_error_in_the_first_process_ends_all_of_them(home, tmp_path):
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                             train.__file__, "tune", "--base", home / "base", "--data", home / "text.txt", *TINY, "--out",
                             tmp_path, "--resume"], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and result.stderr.count("no interrupted run") == 1
