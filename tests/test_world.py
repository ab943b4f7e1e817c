"""Runs in the world: strange texts, names, consoles, signals, servers, several processes."""
import errno
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

import lab.models
import train
from conftest import last_of_each, make_gpt, run
from data import LARGEST_HELDOUT, Corpus, encode, read_text
from data.bpe import EOT, train_bpe
from lab.adapters import Adapters
from lab.cli import make_parser
from lab.measure import LiveBytes
from lab.models import continue_text
from lab.progress import Progress, signals_noted
from lab.settings import Settings
from lab.tokenizer_files import save_tokenizer
from train import Step, evaluate, main

TRAIN = str(Path(train.__file__))
TINY = ["--steps", "4", "--batch-size", "2", "--block-size", "16", "--eval-every", "2",
        "--device", "cpu"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="signals, permissions, torchrun")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with two texts, and a base that was trained on the first."""
    home = tmp_path_factory.mktemp("home")
    write_stories(home / "text.txt", "sea", "hill", "town")
    write_stories(home / "other.txt", "moon", "lake", "road")
    model = make_gpt(vocab_size=300, block_size=16, n_embd=16, n_head=2)
    model.save_pretrained(home / "base")
    encoding = train_bpe(read_text(home / "text.txt", 0.1, home).all_train, 300)
    save_tokenizer(encoding, home / "base")
    record = {"asked": {"data": str(home / "text.txt")}}
    (home / "base" / "training.json").write_text(json.dumps(record))
    return home


def write_stories(path, *places):
    stories = []
    for adjective, noun, place in itertools.product(("old", "red", "sad"), ("man", "fox"), places):
        line = f"The {adjective} {noun} went to the {place}, and it was {adjective}.\n"
        stories += [line * 8, line * 5 + "It was late.\n" * 9]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(EOT.join(stories), encoding="utf-8")
    return path


def tune(home, out, *flags):
    """A command line that tunes the base to its own text."""
    return last_of_each([
        "tune", "--base", home / "base", "--data", home / "text.txt", "--out", out, *TINY, *flags
    ])


def is_one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1 and "--debug" not in error


@contextmanager
def within(seconds):
    """Raises TimeoutError in the block if it takes longer. Nothing that waits in C ends."""
    def ring(number, frame):
        raise TimeoutError(f"longer than {seconds} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# ---- what is held out ----------------------------------------------------------------------------

TEXTS = {
    "stories": EOT.join(f"Story {i} was short.\n" * 9 for i in range(60)),
    "few stories": EOT.join(f"Story {i} was long.\n" * 999 for i in range(3)),
    "one huge story": "".join(f"It went on and on, {i} times.\n" for i in range(40_000)),
    "a huge story among others": EOT.join(["Short.\n" * 9] * 30 + ["x y z " * 50_000]),
    "one long word": "a" * 300_000,
    "characters of four bytes": "😀" * 200_000,
    "many empty lines": "a b c\n" * 999 + "\n" * 300_000 + "d e f\n" * 999,
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_share_holds_out_a_larger_one_does_too_and_never_too_much(tmp_path, name):
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[name], encoding="utf-8")
    before = set()
    for share in (0.01, 0.05, 0.1, 0.3):
        text = read_text(path, share, tmp_path)
        assert 0 < text.heldout_bytes <= LARGEST_HELDOUT
        everything = sorted(piece.text for piece in text.train + text.heldout)
        heldout = {piece.text for piece in text.heldout}
        assert before <= heldout
        assert "".join(everything).count("a") == TEXTS[name].count("a")
        before = heldout


# ---- texts as they come --------------------------------------------------------------------------

STRANGE = {
    "spaces": "a " * 2000 + " " * 50_000 + "b " * 2000,
    "empty lines": "a b c\n" * 999 + "\n" * 1_000_000 + "d e f\n" * 999,
    "a long word": "a" * 50_000,
    "emoji": "😀👨‍👩‍👧" * 10_000,
    "CJK": "".join(chr(0x4E00 + i * 7919 % 20_000) for i in range(100_000)),
}


@linux
@pytest.mark.parametrize("name", STRANGE)
def test_a_tokenizer_of_any_text_is_learned_encodes_and_is_saved_in_seconds(tmp_path, name):
    path = tmp_path / "text.txt"
    path.write_text(STRANGE[name], encoding="utf-8")
    text = read_text(path, 0.1, tmp_path)
    with within(10):
        encoding = train_bpe(text.all_train, 300)
        tokens = encode(text.train, encoding, name)
        save_tokenizer(encoding, tmp_path)
    joined = "".join(piece.text for piece in text.train)
    assert encoding.decode(tokens[tokens != encoding.eot_token].tolist()) == joined


@linux
@pytest.mark.parametrize("name", STRANGE)
def test_a_prompt_of_any_length_is_continued_in_seconds(home, name):
    model, encoding, _ = lab.models.load_model(home / "base", "cpu")
    with within(10):
        [text] = continue_text(model, encoding, STRANGE[name], 1, seed=0)
    assert text.startswith(STRANGE[name])


# ---- consoles and streams ------------------------------------------------------------------------

@linux
@pytest.mark.parametrize("encoding, streams", [
    ("cp1251", ""),
    ("ascii", "| head -1"),
    ("cp1252", ">&- 2>&-"),
    ("utf-8", ">/dev/full 2>/dev/full"),
])
def test_a_console_that_fails_is_no_fault_of_the_run(home, tmp_path, encoding, streams):
    out = tmp_path / "out"
    text = write_stories(tmp_path / "×漢.txt", "sea", "hill")
    words = tune(home, out, "--data", text)
    script = f'set -o pipefail; "$@" {streams}'
    result = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, TRAIN, *map(str, words)],
        capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr
    assert "curve" in json.loads((out / "training.json").read_text())


# ---- signals -------------------------------------------------------------------------------------

@linux
def test_a_signal_that_the_process_was_told_to_ignore_stays_ignored():
    """nohup starts a process so, and a shell without job control its background processes."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert noted == []
    finally:
        signal.signal(signal.SIGHUP, old)


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_that_ends_a_run_leaves_a_checkpoint_that_resume_continues(
        home, tmp_path, capsys, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(Step, "set_learning_rate", signal_at(number, Step.set_learning_rate))
        code, _, error = run(capsys, *tune(home, tmp_path))
    assert code == 130
    assert "--resume" in error
    assert (tmp_path / "checkpoint.safetensors").exists()
    code, _, error = run(capsys, *tune(home, tmp_path), "--resume")
    assert code == 0, error


def signal_at(number, function):
    """The function, but the process gets a signal at its second call."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return function(*args)

    return interrupted


@linux
def test_ctrl_c_while_the_best_weights_are_put_back_is_not_swallowed(
        home, tmp_path, capsys, monkeypatch):
    check = Progress.stop_if_asked

    def late(progress, n):
        check(progress, n)
        if n == progress.settings.steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "stop_if_asked", late)
    code, _, _ = run(capsys, *tune(home, tmp_path))
    assert code == 130


@linux
def test_after_a_stop_of_a_fresh_run_the_advice_can_be_followed(
        home, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Step, "set_learning_rate", signal_at(signal.SIGINT, Step.set_learning_rate))
        run(capsys, *tune(home, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(train.models, "load_corpus", press_ctrl_c)
        code, _, error = run(capsys, *tune(home, tmp_path, "--fresh", "--lr", "0.001"))
    assert code == 130
    assert "--resume" not in error, "the checkpoint that is there is that of another run"

    with monkeypatch.context() as patch:
        patch.setattr(Step, "set_learning_rate", signal_at(signal.SIGINT, Step.set_learning_rate))
        code, _, error = run(capsys, *tune(home, tmp_path, "--fresh"))
    assert code == 130
    assert "without --fresh" in error or "instead of --fresh" in error


def press_ctrl_c(*args, **options):
    raise KeyboardInterrupt


def test_after_a_stop_of_a_fresh_comparison_the_advice_leaves_out_fresh(
        home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.comparison, "measure_runs", press_ctrl_c)
    code, _, error = run(
        capsys, "compare", "--base", home / "base", "--data", home / "other.txt", "--out",
        tmp_path, *TINY, "--fresh",
    )
    assert code == 130
    assert "--fresh" in error, "the same command again would discard the finished parts"


def test_a_disk_without_locks_is_said_in_words(home, tmp_path, capsys, monkeypatch):
    def no_locks(*args, **options):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    code, _, error = run(capsys, *tune(home, tmp_path))
    assert code == 1
    assert is_one_line(error)
    assert "has no file locks" in error


# ---- the command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("words", [
    ["voices", "--data", "pirate", "--data", "noir"],
    ["tune", "--data", "noir", "--base", "b", "--out", "o", "--target-modules", "c_fc",
     "--target-modules", "c_attn"],
    ["tune", "--data", "noir", "--base", "b", "--out", "o", "--steps", "3", "--steps", "4"],
    ["--steps", "3", "tune", "--data", "noir", "--base", "b", "--out", "o", "--steps", "4"],
    ["sample", "--base", "b", "--prompt", "One", "--prompt", "Two"],
], ids=lambda words: " ".join(words))
def test_a_second_value_of_a_flag_is_refused_and_not_put_in_the_place_of_the_first(capsys, words):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(words)
    assert stop.value.code == 2
    assert "twice" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ["tune", "--data", "TEXT", "--out", "OUT", "--prompt", "Once"],
    ["voices", "--data", "TEXT", "--out", "OUT", "--preset", "gpt2"],
], ids=["a prompt for tune", "a preset beside a base"])
def test_a_flag_without_any_use_is_refused(home, tmp_path, capsys, words):
    places = {"TEXT": home / "other.txt", "OUT": tmp_path / "new"}
    words = [places.get(word, word) for word in words]
    code, _, error = run(capsys, *words, "--base", home / "base", *TINY)
    assert code == 2
    assert words[-2] in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag, value", [
    ("--seed", str(2**64)),
    ("--seed", "-" + "9" * 30),
    ("--max-new-tokens", "-5"),
    ("--temperature", "nan"),
    ("--top-p", "0"),
    ("--top-k", "-1"),
])
def test_a_value_that_sampling_cannot_use_is_refused_by_name(home, capsys, flag, value):
    code, _, error = run(
        capsys, "sample", "--base", home / "base", "--device", "cpu", "--prompt", "The",
        f"{flag}={value}",
    )
    assert code != 0
    assert is_one_line(error)
    assert flag.strip("-").replace("-", "_") in error.replace("-", "_")


@pytest.mark.parametrize("batch_size, block_size", [(2**30, 2), (2**27, 16)])
def test_a_batch_that_no_memory_holds_is_refused(batch_size, block_size):
    with pytest.raises(ValueError, match="--batch-size"):
        Settings(steps=1, batch_size=batch_size, block_size=block_size, lr=1e-3)


@linux
def test_a_printed_command_can_be_pasted(home, tmp_path, capsys):
    out = tmp_path / "it's $HOME; `x` \"y\""
    code, printed, error = run(capsys, *tune(home, out))
    assert code == 0, error
    [line] = [line for line in printed.splitlines() if "train.py sample" in line]
    shown = subprocess.run(
        ["bash", "-c", line.replace("python train.py", "printf '%s\\n'")],
        capture_output=True, text=True, timeout=20,
    )
    assert str(out) in shown.stdout.splitlines()


# ---- long runs that fail at their end ------------------------------------------------------------

LONG = {
    "compare": ["compare", "--data", "OTHER"],
    "voices": ["voices", "--data", "OTHER"],
}


def never_trains(*args, **options):
    pytest.fail("this was found only after the training")


def run_without_training(capsys, monkeypatch, home, *words):
    """Run a command line that must be refused before it trains."""
    monkeypatch.setattr(train, "train", never_trains)
    words = [home / "other.txt" if word == "OTHER" else word for word in words]
    code, _, error = run(capsys, *words, *TINY)
    assert code in (1, 2)
    assert is_one_line(error)
    return error


@pytest.mark.parametrize("command", LONG)
@pytest.mark.parametrize("asked, says", [
    ({"data": "http://127.0.0.1:9/x.txt"}, "--base-data"),
    ({"data": "gone.txt"}, "gone.txt"),
    ({"data": "TEXT", "corpus": "0" * 16}, "--base-data"),
], ids=["a URL", "a file that is gone", "a changed text"])
def test_a_base_whose_text_cannot_be_used_is_refused_before_training(
        home, tmp_path, capsys, monkeypatch, command, asked, says):
    base = copy_of_base(home, tmp_path / "base", asked)
    error = run_without_training(
        capsys, monkeypatch, home, *LONG[command], "--base", base, "--out", tmp_path / "out"
    )
    assert says in error


def copy_of_base(home, dir, asked):
    """The base with another record."""
    dir.mkdir()
    for path in (home / "base").iterdir():
        (dir / path.name).write_bytes(path.read_bytes())
    asked = {key: str(home / "text.txt") if value == "TEXT" else value
             for key, value in asked.items()}
    (dir / "training.json").write_text(json.dumps({"asked": asked}))
    return dir


def test_all_texts_of_voices_are_read_before_the_first_is_trained(
        home, tmp_path, capsys, monkeypatch):
    error = run_without_training(
        capsys, monkeypatch, home, "voices", "--data", "OTHER", "gone.txt", "--base",
        home / "base", "--out", tmp_path,
    )
    assert "gone.txt" in error


@pytest.mark.parametrize("name", ["base", "tokens", "downloads", "voices.json", "the base"])
def test_a_voice_named_like_what_is_beside_it_is_refused_before_training(
        home, tmp_path, capsys, monkeypatch, name):
    text = write_stories(tmp_path / f"{name}.txt", "moon", "lake")
    run_without_training(capsys, monkeypatch, home, "voices", "--data", text, "--out", tmp_path)


def test_a_voice_named_like_the_text_of_the_base_is_refused_or_beside_it(home, tmp_path, capsys):
    text = write_stories(tmp_path / "text.txt", "moon", "lake")
    out = tmp_path / "out"
    code, _, error = run(
        capsys, "voices", "--base", home / "base", "--data", text, "--out", out, *TINY
    )
    if code != 0:
        assert is_one_line(error)
        assert not out.joinpath("text", "training.json").exists()
    else:
        report = json.loads((out / "voices.json").read_text())
        assert len(report["bpb"]["the base"]) == 2


@pytest.mark.parametrize("name", ["$x$", "the base"])
def test_a_comparison_is_finished_whatever_its_text_is_called(home, tmp_path, capsys, name):
    text = write_stories(tmp_path / f"{name}.txt", "moon", "lake")
    code, _, error = run(
        capsys, "compare", "--base", home / "base", "--data", text, "--out", tmp_path / "out",
        *TINY, "--steps", "1",
    )
    assert code == 0, error
    assert (tmp_path / "out" / "comparison.png").exists()


# ---- caches, downloads, leftovers, permissions ---------------------------------------------------

def curve_of(dir):
    curve = json.loads((dir / "training.json").read_text())["curve"]
    return [point["bpb"] for point in curve]


@pytest.fixture(scope="module")
def tuned(home):
    """A finished run."""
    assert main([str(word) for word in tune(home, home / "tuned")]) == 0
    return home / "tuned"


@pytest.mark.parametrize("part", ["train.npy", "heldout.npy", "train.sha256", "heldout.sha256"])
@pytest.mark.parametrize("damage", [
    lambda content: b"",
    lambda content: content[:-40],
    lambda content: content[:-1] + bytes([content[-1] ^ 1]),
], ids=["empty", "truncated", "a flipped bit"])
def test_a_damaged_cache_of_tokens_is_made_again(home, tuned, tmp_path, capsys, part, damage):
    (tmp_path / "tokens").mkdir()
    for path in (tuned / "tokens").iterdir():
        content = path.read_bytes()
        if path.name.endswith(part):
            content = damage(content)
        (tmp_path / "tokens" / path.name).write_bytes(content)
    code, _, error = run(capsys, *tune(home, tmp_path))
    assert code == 0, error
    assert curve_of(tmp_path) == curve_of(tuned)


def test_what_killed_runs_left_behind_is_removed_wherever_a_run_writes(home, tmp_path, capsys):
    left = []
    for dir in (tmp_path, tmp_path / "tokens", tmp_path / "downloads"):
        dir.mkdir(exist_ok=True)
        left.append(dir / ".something.npy.0123.tmp")
        left[-1].write_bytes(b"half of a file")
    code, _, error = run(capsys, *tune(home, tmp_path))
    assert code == 0, error
    assert [path for path in left if path.exists()] == []


@linux
def test_all_files_have_the_same_permissions(tuned):
    modes = {}
    for path in tuned.rglob("*.*"):
        if path.is_file() and path.name != ".lock":
            modes[path.name] = stat.S_IMODE(path.stat().st_mode)
    old = os.umask(0)
    os.umask(old)
    assert set(modes.values()) == {0o666 & ~old}, modes


@pytest.fixture
def server(home):
    """A server on this machine: server.url, and server.content, which it sends."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.content = (home / "text.txt").read_bytes()
    server.url = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("content", [
    b"<html>Not found</html>",
    b"\0" * 9000,
    b"\xe9" * 9000,
    b"",
    b"Try <|endoftext|> later",
], ids=["a page", "binary", "Latin-1", "empty", "too few tokens"])
def test_a_bad_download_is_fetched_again_by_the_next_run(
        home, tmp_path, capsys, server, content):
    good = server.content
    server.content = content
    words = tune(home, tmp_path, "--data", f"http://{server.url}/text.txt")
    code, _, error = run(capsys, *words)
    assert code == 1
    assert is_one_line(error)
    server.content = good
    code, _, error = run(capsys, *words)
    assert code == 0, error


@pytest.mark.parametrize("command", ["tune", "compare", "voices"])
@pytest.mark.parametrize("path", ["/private.txt", "", "/private/"])
def test_a_password_in_a_url_is_neither_printed_nor_kept(
        home, tmp_path, capsys, server, command, path):
    url = f"http://bob:secret@{server.url}{path}"
    _, printed, error = run(
        capsys, command, "--base", home / "base", "--data", url, "--out", tmp_path, *TINY
    )
    assert "secret" not in printed + error
    for kept in tmp_path.rglob("*"):
        assert "secret" not in str(kept.relative_to(tmp_path))
        assert kept.is_dir() or b"secret" not in kept.read_bytes()


# ---- several processes ---------------------------------------------------------------------------

def run_ranks(commands, **environment):
    """Run a command line in each of two connected processes. Returns [(exit code, errors)]."""
    port = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    environment = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port.server_port), **environment,
    }
    port.server_close()
    processes = []
    for rank, words in enumerate(commands):
        processes.append(subprocess.Popen(
            [sys.executable, TRAIN, *map(str, words)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ))
    results = []
    try:
        for process in processes:
            _, error = process.communicate(timeout=60)
            results.append((process.returncode, error))
    finally:
        for process in processes:
            process.kill()
    return results


@linux
def test_a_text_to_measure_forgetting_on_that_one_process_lacks_is_said_in_one_line(
        home, tmp_path):
    commands = []
    for text in ("text.txt", "gone.txt"):
        commands.append([
            "compare", "--base", home / "base", "--data", home / "other.txt", "--base-data",
            home / text, "--out", tmp_path, *TINY,
        ])
    results = run_ranks(commands)
    assert [code for code, _ in results] == [1, 1]
    lines = "".join(error for _, error in results)
    assert is_one_line(lines), lines
    assert "gone.txt" in lines


@linux
def test_processes_with_different_texts_refuse_to_train_together(home, tmp_path):
    commands = [tune(home, tmp_path), tune(home, tmp_path, "--data", home / "other.txt")]
    results = run_ranks(commands)
    assert [code for code, _ in results] == [1, 1]
    lines = "".join(error for _, error in results)
    assert is_one_line(lines), lines
    assert "different texts" in lines


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "many"), ("RANK", "first")])
def test_a_variable_left_over_that_is_no_number_is_named(
        home, tmp_path, capsys, monkeypatch, name, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(name, value)
    code, _, error = run(capsys, *tune(home, tmp_path))
    assert code in (1, 2)
    assert is_one_line(error)
    assert name in error


# ---- memory --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lora_step():
    """A training step of one short window, and its peak in bytes."""
    model = make_gpt(vocab_size=4000, block_size=64, n_embd=128, n_layer=4)
    adapters = Adapters(model)
    adapters.add("style")
    settings = Settings(
        steps=1, batch_size=1, block_size=64, lr=1e-3, loss_chunk=2**16, recompute=True
    )
    step = Step(model.train(), settings)
    x, y = torch.randint(4000, (2, 1, 64), generator=torch.Generator().manual_seed(0))
    step(x, y)
    with LiveBytes(list(model.parameters())) as training:
        step(x, y)
    return step, training.peak


def test_evaluating_needs_no_more_memory_than_the_smallest_training_step(lora_step):
    step, peak_of_training = lora_step
    tokens = np.arange(6000, dtype=np.uint16) % 4000
    corpus = Corpus("numbers", tokens, tokens, heldout_bytes=6000, digest="")
    with LiveBytes(list(step.model.parameters())) as evaluating:
        evaluate(step.model, corpus, 64, at_once=1)
    assert evaluating.peak <= peak_of_training


def test_sampling_needs_no_more_memory_than_the_smallest_training_step(lora_step):
    step, peak_of_training = lora_step
    idx = torch.randint(4000, (1, 64), generator=torch.Generator().manual_seed(0))
    with LiveBytes(list(step.model.parameters())) as sampling:
        step.model.generate(idx, 3, temperature=0.7, top_k=40)
    assert sampling.peak <= peak_of_training
