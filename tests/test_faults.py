"""Nothing a user made is lost, and an error is one line.

Killed processes, full disks, damaged files, invalid flags, gradients that are not finite. `pytest
-m long` tries ten times as many faults.
"""
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
from conftest import last_of_each, make_gpt, run
from data import read_text, tokenize
from data.bpe import train_bpe
from gpt import GPT
from lab.capture import captured
from lab.console import size
from lab.settings import Settings
from lab.tokenizer_files import save_tokenizer
from lora_minimal import apply_lora
from train import Step, main

ROOT = Path(train.__file__).parent
FEW_OR_MANY = [
    pytest.param(1, id="few"),
    pytest.param(10, id="many", marks=pytest.mark.long),
]
TINY = ["--steps", "6", "--batch-size", "2", "--block-size", "16", "--eval-every", "2",
        "--device", "cpu", "--dropout", "0.1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a text, a base model and an adapter."""
    home = tmp_path_factory.mktemp("home")
    stories = make_stories()
    (home / "text.txt").write_text("<|endoftext|>\n".join(stories), encoding="utf-8")
    base = make_gpt(vocab_size=300, block_size=16, n_embd=16, n_head=2)
    base.save_pretrained(home / "base")
    save_tokenizer(train_bpe("\n".join(stories), 300), home / "base")
    assert main([*tune(home), "--out", str(home / "lora")]) == 0
    return home


def make_stories():
    stories = []
    for adjective in ("old", "red", "sad"):
        for noun in ("man", "fox", "ship"):
            for place in ("sea", "hill", "town"):
                line = f"The {adjective} {noun} went to the {place}, and it was {adjective}.\n"
                stories.append(line * 8)
    return stories


def tune(home):
    """A command line that tunes the base to the text; --out is missing."""
    return ["tune", "--base", str(home / "base"), "--data", str(home / "text.txt"), *TINY]


def is_one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1


# ---- killed processes, full disks, two runs in one directory -------------------------------------

KILLER = """
import os
import random
import signal
import sys
import time
from pathlib import Path

from safetensors import safe_open

import train            # imported once; each trial is a fork of this process

trials = int(sys.argv[1])
home = Path(sys.argv[2])
out = Path(sys.argv[3])
argv = sys.argv[4:]


def seconds_of_a_whole_run(name):
    start = time.monotonic()
    assert train.main([*argv, "--out", str(out.with_name(name))]) == 0
    return time.monotonic() - start


def train_in_a_child(flags):
    # Returns the number of the new process.
    child = os.fork()
    if child != 0:
        return child
    sys.stdout = open(home / "stdout", "w")
    sys.stderr = open(home / "stderr", "w")
    code = 70
    try:
        code = train.main([*argv, "--out", str(out), *flags])
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code_within(child, seconds):
    # Returns None if the process still runs after this time.
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def read_every_tensor():
    # A dead writer leaves hidden files behind, which glob does not find.
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                file.get_tensor(name)


draw = random.Random(0)
seconds_of_a_whole_run("warm-1")        # the first time, torch loads what it needs
whole = seconds_of_a_whole_run("warm-2")
killed = 0
resumed = 0
finished = 0
while killed < trials:
    resume = ["--resume"] if (out / "checkpoint.safetensors").exists() else []
    child = train_in_a_child(resume)
    code = exit_code_within(child, draw.uniform(0, 1.2 * whole))
    if code is not None:
        assert code == 0, (home / "stderr").read_text()
        finished += 1
        out.rename(out.with_name(f"finished-{finished}"))
        continue
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed += 1
    resumed += len(resume)
    read_every_tensor()
print("\\n", killed, resumed, finished)
"""


@linux
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("times", FEW_OR_MANY)
def test_a_run_killed_at_any_moment_is_resumed_and_ends_with_the_same_weights(
        home, tmp_path, method, times):
    argv = [*tune(home), "--method", method]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    trials = 50 * times
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(trials), tmp_path, tmp_path / "out", *argv,
         "--save-every", "1"],
        capture_output=True, text=True, timeout=110 * times, cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},         # CUDA does not survive a fork
    )
    assert result.returncode == 0, result.stderr
    last_line = result.stdout.splitlines()[-1]
    killed, resumed, finished = [int(word) for word in last_line.split()]
    print(f"{method}: killed {killed} times, {resumed} of them after it had been resumed; "
          f"finished {finished} times")
    assert killed == trials
    assert finished > 0
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    expected = (tmp_path / "whole" / name).read_bytes()
    for i in range(1, finished + 1):
        assert (tmp_path / f"finished-{i}" / name).read_bytes() == expected


LIMITED = """
import resource
import sys

import train

limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(train.main(sys.argv[2:]))
"""


@linux
def test_a_full_disk_is_an_error_of_one_line_and_leaves_no_half_of_a_file(home, tmp_path):
    limit = 2 * (home / "base" / "model.safetensors").stat().st_size
    argv = [*tune(home), "--method", "full", "--out", tmp_path, "--save-every", "1"]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *argv],
        capture_output=True, text=True, cwd=ROOT,
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "checkpoint.safetensors could not be written" in result.stderr
    assert not list(tmp_path.glob(".*.tmp"))
    assert not (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
        home, tmp_path, capsys, monkeypatch):
    argv = [*tune(home), "--out", tmp_path]
    sync = os.fsync
    calls = []

    def disk_is_full_after_a_while(file):
        calls.append(file)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_is_full_after_a_while)
        code, _, error = run(capsys, *argv, "--save-every", "1")
    assert code == 1
    assert "No space left" in error
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["step"] > 0
    code, _, _ = run(capsys, *argv, "--resume")
    assert code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (home / "lora" / name).read_bytes()


HOLDER = """
import sys

import filelock

lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_in_the_same_directory_is_refused(home, tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / ".lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    assert holder.stdout.readline() == "held\n"
    argv = [*tune(home), "--out", tmp_path]
    code, _, error = run(capsys, *argv)
    assert code == 1
    assert "another run" in error
    assert not (tmp_path / "training.json").exists()
    holder.communicate()
    code, _, _ = run(capsys, *argv)
    assert code == 0


# ---- damaged files -------------------------------------------------------------------------------

def damage(content, draw):
    """One random corruption of the bytes of a file."""
    kind = draw.randrange(6)
    n = len(content)
    i, j = sorted((draw.randrange(n), draw.randrange(n)))
    if kind == 0:
        return content[:i]
    if kind == 1:
        return flip_a_bit(content, i, draw)
    if kind == 2:
        return content[:i] + draw.randbytes(j - i) + content[j:]
    if kind == 3:
        return content[:i] + content[j:]
    if kind == 4:
        in_the_header = draw.randrange(min(n, 400))
        return flip_a_bit(content, in_the_header, draw)
    return draw.randbytes(draw.randrange(200))


def flip_a_bit(content, i, draw):
    flipped = content[i] ^ 1 << draw.randrange(8)
    return content[:i] + bytes([flipped]) + content[i + 1:]


STRANGE = [None, True, -1, 0, 3, 10**30, 1e300, float("nan"), "", "x", [], {}, [1], {"a": 1},
           "[" * 9]


def damage_json(content, draw):
    """Another value, or none, in one place of a JSON file; or damage to its bytes."""
    if draw.random() < 0.3:
        return damage(content, draw)
    root = json.loads(content)
    at, key = random_place(root, draw)
    if draw.random() < 0.2:
        del at[key]
    else:
        at[key] = draw.choice(STRANGE)
    return json.dumps(root).encode()


def random_place(at, draw):
    """A place in a JSON value: a dict or list, and a key or index of it."""
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = draw.choice(keys)
        can_descend = isinstance(at[key], (dict, list)) and at[key]
        if not can_descend or draw.random() >= 0.7:
            return at, key
        at = at[key]


SAMPLE = ["sample", "--base", "base", "--adapter", "lora", "--prompt", "The old",
          "--max-new-tokens", "1", "--device", "cpu"]
TUNE = ["tune", "--base", "base", "--data", "text.txt", *TINY]
RESUME = [*TUNE, "--out", "stopped", "--resume"]


@pytest.mark.parametrize("times", FEW_OR_MANY)
@pytest.mark.parametrize("file, argv", [
    ("base/config.json", SAMPLE),
    ("base/model.safetensors", SAMPLE),
    ("base/tokenizer.json", SAMPLE),
    ("lora/adapter_config.json", SAMPLE),
    ("lora/adapter_model.safetensors", SAMPLE),
    ("lora/training.json", SAMPLE),
    ("stopped/training.json", RESUME),
    ("stopped/checkpoint.safetensors", RESUME),
    ("text.txt", [*TUNE, "--out", "new", "--steps", "1"]),
])
def test_a_damaged_file_is_read_or_refused_in_one_line(
        home, tmp_path, capsys, monkeypatch, file, argv, times):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "stopped" in file:
        with monkeypatch.context() as patch:
            patch.setattr(Step, "set_learning_rate", stop_at(3, Step.set_learning_rate))
            code, _, _ = run(capsys, *TUNE, "--out", "stopped", "--save-every", "2")
        assert code == 1
    kept = tmp_path.with_name(tmp_path.name + "-kept")
    shutil.copytree(tmp_path, kept)

    path = tmp_path / file
    whole = path.read_bytes()
    spoil = damage_json if path.suffix == ".json" else damage
    draw = random.Random(file)
    outcomes = {0: 0, 1: 0, 2: 0}
    for _ in range(100 * times):
        bad = spoil(whole, draw)
        path.write_bytes(bad)
        code, _, error = run(capsys, *argv)
        outcomes[code] += 1
        if code != 0:
            assert is_one_line(error), error
            assert "--debug" not in error, error
            assert path.read_bytes() == bad, "a file that is refused is not changed"
        if "--out" in argv:
            for made in ("stopped", "new", "tokens"):
                shutil.rmtree(tmp_path / made, ignore_errors=True)
            shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    refused = outcomes[1] + outcomes[2]
    print(f"{file}: {100 * times} corruptions, {outcomes[0]} read, {refused} refused")


def stop_at(step, set_learning_rate):
    """A replacement for Step.set_learning_rate that fails at a step."""
    def stopping(self, n):
        if n == step:
            raise OSError("stopped by the test")
        set_learning_rate(self, n)
    return stopping


@pytest.mark.parametrize("content", [b"\x80\x04\x95", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_read(home, tmp_path, capsys, name, content):
    shutil.copy(home / "base" / "config.json", tmp_path)
    (tmp_path / name).write_bytes(content)
    code, _, error = run(
        capsys, "sample", "--base", tmp_path, "--prompt", "x", "--device", "cpu"
    )
    assert code == 1
    assert "pickle" in error
    assert "convert" in error


def test_no_code_that_reads_pickles_is_in_the_program():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("lab/*.py")]
    assert len(sources) > 10
    for path in sources:
        source = path.read_text(encoding="utf-8")
        assert "import pickle" not in source, path
        assert "torch.load(" not in source, path
        assert "torch.save(" not in source, path


# ---- flags ---------------------------------------------------------------------------------------

FLAGS = {
    "--steps": int, "--batch-size": int, "--block-size": int, "--eval-every": int, "--seed": int,
    "--r": int, "--accumulate": int, "--loss-chunk": int, "--save-every": int, "--lr": float,
    "--muon-lr": float, "--weight-decay": float, "--dropout": float, "--warmup": float,
    "--grad-clip": float, "--alpha": float,
}
TEXTS = st.one_of(
    st.text(max_size=8),
    st.integers(max_value=-1).map(str),
    st.floats().map(str),
    st.sampled_from(["nan", "inf", "1e999"]),
)


def is_bad(flag, text):
    try:
        return not 0 <= FLAGS[flag](text) < float("inf")
    except (ValueError, OverflowError):
        return True


@settings(
    max_examples=150, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(flag=st.sampled_from(list(FLAGS)), text=TEXTS)
def test_a_flag_that_is_not_a_number_of_at_least_zero_is_refused(
        home, tmp_path, capsys, flag, text):
    if not is_bad(flag, text):
        return
    code, _, error = run(
        capsys, "tune", "--base", home / "base", "--data", home / "text.txt",
        "--out", tmp_path / "new", "--device", "cpu", f"{flag}={text}",
    )
    assert code == 2
    assert is_one_line(error)
    assert "Traceback" not in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prompt", [
    "", "<|endoftext|>", "a" * 5000, "\x00\x01", "\ud800", "日本 🏴‍☠️"
])
def test_any_prompt_is_continued_or_refused_in_one_line(home, capsys, prompt):
    code, _, error = run(
        capsys, "sample", "--base", home / "base", "--prompt", prompt, "--max-new-tokens", "3",
        "--device", "cpu",
    )
    if code != 0:
        assert error.count("\n") == 1
        assert "--debug" not in error


# ---- training that goes wrong --------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("options", [
    {},
    {"muon_lr": 0.02},
    {"grad_clip": 0.0},
    {"accumulate": 2},
])
def test_a_step_whose_gradients_are_not_finite_changes_nothing_and_is_counted(options, device):
    model = make_gpt().to(device).train()
    values = dict(steps=10, batch_size=2, block_size=8, lr=1e-2)
    step = Step(model, Settings(**values, **options))
    take_step = captured(step)
    x = torch.randint(97, (2, 8), device=device)
    for _ in range(5):                          # on CUDA, the fourth call is captured
        take_step(x, x)
    weights = copies(model.parameters())
    moments = copies(states_of(step))

    take_step_without_finite_gradients(take_step, x, model.transformer.ln_f)
    assert all_equal(weights, model.parameters())
    assert all_equal(moments, states_of(step))
    assert step.skipped == 1
    assert step.skipped_in_a_row == 1

    take_step(x, x)
    assert step.skipped == 1
    assert step.skipped_in_a_row == 0
    assert not torch.equal(weights[0], next(model.parameters()))


def take_step_without_finite_gradients(take_step, x, layer_norm):
    """Let the gradients of a step become NaN in the last layer norm."""
    if x.is_cuda:
        # A captured step runs no hooks, so the weights do it.
        good = layer_norm.weight.detach().clone()
        layer_norm.weight.data.fill_(float("inf"))
        take_step(x, x)
        layer_norm.weight.data.copy_(good)
        return

    def poison(module, grad_input, grad_output):
        return (torch.full_like(grad_input[0], float("nan")),)

    handle = layer_norm.register_full_backward_hook(poison)
    take_step(x, x)
    handle.remove()


def states_of(step):
    """All tensors that the optimizers keep."""
    tensors = []
    for optimizer in step.optimizers:
        for state in optimizer.state.values():
            tensors += state.values()
    return tensors


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def all_equal(before, after):
    after = list(after)
    assert len(before) == len(after) > 0
    return all(torch.equal(a, b) for a, b in zip(before, after))


def test_training_that_diverges_stops_with_the_reason_and_keeps_finite_weights(
        home, tmp_path, capsys):
    code, _, error = run(
        capsys, *tune(home), "--out", tmp_path, "--steps", "40", "--lr", "1e18",
        "--grad-clip", "0", "--method", "full",
    )
    assert code == 1
    assert "not finite" in error
    assert "--lr" in error
    assert error.count("\n") == 1
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        names = file.keys()
        best = [name for name in names if name.startswith("best/")]
        assert best
        for name in best:
            assert file.get_tensor(name).isfinite().all(), name


def test_a_base_whose_output_is_not_a_number_is_refused_before_training(home, tmp_path):
    model = make_gpt()
    nn.init.constant_(model.transformer.ln_f.weight, 3e38)
    apply_lora(model)
    text = read_text(home / "text.txt", 0.1, tmp_path)
    corpus = tokenize(text, train_bpe("x" * 99, 257), tmp_path, 8)
    corpus.train = np.minimum(corpus.train, 96)
    corpus.heldout = np.minimum(corpus.heldout, 96)
    two_steps = Settings(steps=2, batch_size=1, block_size=8, lr=1e-3)
    with pytest.raises(ArithmeticError, match="before any training"):
        train.train(model, corpus, two_steps, tmp_path)


# ---- several processes ---------------------------------------------------------------------------

def run_two_processes(*argv):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         train.__file__, *argv],
        capture_output=True, text=True, timeout=120,
    )


@linux
@pytest.mark.parametrize("method, flags", [
    ("lora", []),
    ("full", ["--accumulate", "2"]),
    ("lora", ["--fsdp"]),
    ("lora", ["--base-dtype", "nf4"]),
])
def test_two_processes_take_the_steps_of_one(home, tmp_path, method, flags):
    argv = last_of_each([
        *tune(home), "--batch-size", "8", "--dropout", "0", "--method", method,
    ])
    flags_of_one = [flag for flag in flags if flag != "--fsdp"]
    assert main([*argv, *flags_of_one, "--out", str(tmp_path / "one")]) == 0
    result = run_two_processes(*argv, *flags, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("parameters train") == 1, "only the first process prints"
    expected = read_bpb(tmp_path / "one")
    assert read_bpb(tmp_path / "two") == pytest.approx(expected, rel=1e-4)

    numbers = 2 * 8 * (4 * 16 + 2 * 16 + 5 * 16 + 5 * 16)   # 2 blocks, rank 8, inputs + outputs
    if method == "full":
        numbers = sum(p.numel() for p in GPT.from_pretrained(home / "base").parameters())
    assert f"sent {size(4 * numbers)} of gradients" in result.stdout


def read_bpb(dir):
    curve = json.loads((dir / "training.json").read_text())["curve"]
    return [point["bpb"] for point in curve]


@linux
def test_an_error_in_the_first_process_ends_all_of_them(home, tmp_path):
    result = run_two_processes(*tune(home), "--out", tmp_path, "--resume")
    assert result.returncode != 0
    assert result.stderr.count("no interrupted run") == 1
