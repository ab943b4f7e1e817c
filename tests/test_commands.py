"""The commands, on the command line and as functions, with tiny settings."""
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

import train
from conftest import make_gpt, run
from data import BUILT_IN, read_text, tokenize
from gpt import GPT
from lab.comparison import comparison_report, measure_runs
from lab.models import load_corpus
from lab.settings import UsageError, settings_for
from lab.tokenizer_files import load_tokenizer, save_tokenizer
from lora_minimal import load_lora
from train import evaluate, main

TRAIN = str(Path(train.__file__))
MINI = dict(steps=4, batch_size=2, block_size=32, eval_every=2, device="cpu")
FLAGS = ["--steps", "4", "--batch-size", "2", "--block-size", "32", "--eval-every", "2",
         "--device", "cpu"]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The whole story, run once as a user would, from another directory.

    Returns (its --out, what it printed).
    """
    place = tmp_path_factory.mktemp("story")
    result = subprocess.run(
        [sys.executable, TRAIN, *FLAGS], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return place / "out", result.stdout


@pytest.fixture(scope="module")
def base(story):
    return str(story[0] / "base")


@pytest.fixture(scope="module")
def voices(base, tmp_path_factory):
    """`train.py voices` with the base of the story. Returns (its --out, what it printed)."""
    out = tmp_path_factory.mktemp("voices")
    argv = ["voices", "--base", base, "--out", str(out), *FLAGS, "--lr", "0.02"]
    result = subprocess.run(
        [sys.executable, TRAIN, *argv], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return out, result.stdout


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """A base model that is evaluated faster than that of the story: its text is shorter."""
    dir = tmp_path_factory.mktemp("small") / "base"
    train.pretrain("noir", dir, **MINI)
    return dir


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def names_in(dir):
    return {path.name for path in Path(dir).iterdir()}


# ---- the story -----------------------------------------------------------------------------------

def test_the_story_leaves_a_base_two_tunings_and_a_comparison(story):
    out, printed = story
    assert names_in(out) == {
        "base", "full", "lora", "tokens", "comparison.json", "comparison.png"
    }
    assert names_in(out / "lora") == {
        ".lock", "README.md", "adapter_config.json", "adapter_model.safetensors",
        "training.json",
    }
    for line in ("Pretraining", "Full fine-tuning on pirate", "LoRA on pirate",
                 "like for like", "whole command", "after LoRA"):
        assert line in printed


def test_comparison_json_has_exactly_the_documented_keys(story):
    report = read(story[0] / "comparison.json")
    assert report.keys() == {
        "device", "torch", "config", "base", "methods", "process_peak", "like_for_like",
        "defaults",
    }
    assert report["process_peak"].keys() == {"resident"}
    assert report["defaults"].keys() == {"speed", "memory"}
    assert report["like_for_like"].keys() == {
        "speed", "memory", "loss_chunk", "base_dtype", "lora"
    }
    assert report["base"].keys() == {"bpb"}
    assert report["methods"].keys() == {"full", "lora"}
    for method in report["methods"].values():
        assert method.keys() == {
            "trainable_params", "total_params", "checkpoint_bytes", "memory", "time",
            "tokens_per_s", "style_bpb_before", "style_bpb_after", "base_bpb_after",
            "seconds_to_best", "steps",
        }
        assert method["memory"].keys() == {
            "weights", "gradients", "optimizer", "activations", "peak"
        }
        assert method["time"].keys() == {
            "forward_ms", "backward_ms", "optimizer_ms", "step_ms", "ahead_ms", "captured"
        }


def test_the_comparison_counts_what_arithmetic_says(story):
    report = read(story[0] / "comparison.json")
    full, lora = report["methods"]["full"], report["methods"]["lora"]
    n = full["total_params"]
    added = 4 * 8 * (512 + 256 + 640 + 640)     # 4 blocks, rank 8, inputs + outputs of each layer
    assert full["trainable_params"] == n
    assert lora["trainable_params"] == added
    assert lora["total_params"] == n + added
    assert full["memory"]["weights"] == full["memory"]["gradients"] == 4 * n
    assert lora["memory"]["weights"] == 4 * (n + added)
    assert lora["memory"]["gradients"] == 4 * added
    for method in (full, lora):
        memory = method["memory"]
        # AdamW keeps two moments for each number, and a step counter for each tensor.
        counters = memory["optimizer"] - 2 * memory["gradients"]
        assert 0 <= counters < 4 * 100
        assert memory["peak"] >= memory["weights"] + memory["optimizer"]
        assert method["style_bpb_after"] < method["style_bpb_before"]


def test_the_phases_of_the_comparison_add_up_and_the_command_holds_more_than_a_step(story):
    report = read(story[0] / "comparison.json")
    for method in report["methods"].values():
        times = method["time"]
        phases = times["forward_ms"] + times["backward_ms"] + times["optimizer_ms"]
        assert phases == pytest.approx(times["step_ms"], rel=0.05)
        assert report["process_peak"]["resident"] > method["memory"]["peak"]
    assert report["like_for_like"]["speed"] == report["defaults"]["speed"]      # on a CPU


def test_like_for_like_lora_has_the_loss_and_the_base_of_full_fine_tuning(small_base):
    lora = {"r": 8, "alpha": 16.0, "target_modules": ["c_attn"]}
    records = {}
    for method, base_dtype in (("full", None), ("lora", "bfloat16")):
        settings = asdict(settings_for(method, **MINI, base_dtype=base_dtype))
        records[method] = {"asked": {"settings": settings, "lora": lora}}
    records["full"]["asked"]["lora"] = None
    corpus = load_corpus("noir", load_tokenizer(small_base), small_base, 32)
    costs, _ = measure_runs(records, small_base, "cpu", corpus, train.Step)
    config = GPT.from_pretrained(small_base).config
    qualities = {"full": {}, "lora": {}}
    report = comparison_report(config, 1.0, records, costs, qualities, {}, "cpu")

    full, default = report["methods"]["full"], report["methods"]["lora"]
    alike = report["like_for_like"]
    assert alike["base_dtype"] == "float32"
    assert alike["lora"]["memory"]["weights"] > full["memory"]["weights"]       # and A and B
    assert default["memory"]["weights"] < 0.6 * full["memory"]["weights"]
    for ratios, of_lora in ((alike, alike["lora"]), (report["defaults"], default)):
        assert ratios["speed"] == full["time"]["step_ms"] / of_lora["time"]["step_ms"]
        assert ratios["memory"] == full["memory"]["peak"] / of_lora["memory"]["peak"]


def test_the_story_again_from_python_reuses_what_is_finished(story, capsys):
    out, _ = story
    before = times_of_change(out)
    report = train.story(out, **MINI)
    printed = capsys.readouterr().out
    assert printed.count("is reused") == 3
    assert times_of_change(out) == before
    assert report == read(out / "comparison.json")


def times_of_change(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*/training.json")}


# ---- voices, sample, merge -----------------------------------------------------------------------

def test_voices_leaves_an_adapter_for_each_text_and_judges_every_text_with_each(voices):
    out, printed = voices
    names = ["pirate", "bard", "noir"]
    assert names_in(out) == {*names, "tokens", "voices.json"}
    report = read(out / "voices.json")
    assert list(report["bpb"]) == ["the base", *names]
    for bpb_of_texts in report["bpb"].values():
        assert list(bpb_of_texts) == ["tales", *names]
    for name in names:
        curve = read(out / name / "training.json")["curve"]
        best = min(point["bpb"] for point in curve)
        assert report["bpb"][name][name] == pytest.approx(best, rel=1e-5)
        files = ("adapter_model.safetensors", "adapter_config.json")
        on_disk = sum((out / name / file).stat().st_size for file in files)
        assert report["bytes"]["voices"][name] == on_disk
    assert sum(report["bytes"]["voices"].values()) < 0.2 * report["bytes"]["base"]
    assert "the 3 adapters" in printed
    assert "a row for each" in printed


def test_the_matrix_is_what_each_adapter_alone_gives(voices, base):
    out, _ = voices
    model = GPT.from_pretrained(base)
    load_lora(model, out / "bard")
    text = read_text("noir", 0.1, out)
    corpus = tokenize(text, load_tokenizer(base), out / "tokens", 32)
    expected = read(out / "voices.json")["bpb"]["bard"]["noir"]
    assert evaluate(model.eval(), corpus, 32) == pytest.approx(expected, rel=1e-5)


def test_sample_prints_the_base_and_each_adapter_side_by_side_and_merging_changes_nothing(
        voices, base, capsys):
    out, _ = voices
    argv = ["sample", "--base", base, "--prompt", "Once", "--device", "cpu",
            "--max-new-tokens", "8", "--temperature", "0"]
    adapters = ["--adapter", out / "pirate", "--adapter", out / "noir"]
    code, mixed, _ = run(capsys, *argv, *adapters)
    assert code == 0
    assert mixed.count("---") > 3
    assert mixed.count("Once") == 3
    _, merged, _ = run(capsys, *argv, *adapters, "--merge")
    assert merged == mixed
    _, alone, _ = run(capsys, *argv)
    first_column = line_of_text(mixed).split("  ")[0]
    assert line_of_text(alone) == first_column


def line_of_text(printed):
    """The first line below the titles."""
    return next(line for line in printed.splitlines() if line.startswith("Once"))


def test_merge_writes_a_plain_model_that_transformers_opens(voices, base, tmp_path, capsys):
    adapter = voices[0] / "bard"
    merged = tmp_path / "merged"
    argv = ["merge", "--base", base, "--out", merged]
    code, _, error = run(capsys, *argv, "--adapter", adapter)
    assert code == 0, error

    idx = torch.arange(20)[None]
    ours = GPT.from_pretrained(base)
    load_lora(ours, adapter)
    logits, _ = ours.eval()(idx)
    theirs = GPT2LMHeadModel.from_pretrained(merged)
    torch.testing.assert_close(theirs(idx).logits, logits, atol=1e-5, rtol=0)
    tokens = AutoTokenizer.from_pretrained(merged)("Once")["input_ids"]
    assert tokens == load_tokenizer(base).encode("Once")

    code, _, error = run(capsys, *argv, "--adapter", voices[0] / "noir")
    assert code == 1
    assert "--fresh" in error


@pytest.mark.parametrize("argv", [
    ["merge", "--adapter", "ADAPTER", "--out", "ADAPTER"],
    ["merge", "--adapter", "ADAPTER", "--out", "BASE", "--fresh"],
    ["tune", "--data", "noir", "--out", "BASE", "--fresh", *FLAGS],
])
def test_what_is_read_is_never_overwritten(voices, base, capsys, argv):
    adapter = str(voices[0] / "pirate")
    paths = {"ADAPTER": adapter, "BASE": base}
    argv = [paths.get(arg, arg) for arg in argv]
    before = contents(adapter, base)
    code, _, error = run(capsys, *argv, "--base", base)
    assert code == 1
    assert "choose another directory" in error
    assert contents(adapter, base) == before


def contents(*dirs):
    """{path: bytes} of all files in the directories."""
    found = {}
    for dir in dirs:
        found |= {path: path.read_bytes() for path in Path(dir).rglob("*.*") if path.is_file()}
    return found


def test_a_note_says_that_an_adapter_was_trained_on_another_base(voices, story, base, capsys):
    argv = ["sample", "--adapter", voices[0] / "noir", "--prompt", "Once", "--device", "cpu",
            "--max-new-tokens", "2"]
    _, printed, _ = run(capsys, *argv, "--base", base)
    assert "another base" not in printed
    _, printed, _ = run(capsys, *argv, "--base", story[0] / "full")
    assert "another base" in printed


# ---- tune ----------------------------------------------------------------------------------------

def test_a_base_can_have_any_name_for_example_gpt2_on_the_hub(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: base)
    code, printed, error = run(
        capsys, "tune", "--base", "gpt2", "--data", "noir", "--out", tmp_path / "noir", *FLAGS
    )
    assert code == 0, error
    assert "--base gpt2 --adapter" in printed


def test_a_wider_base_gets_a_smaller_learning_rate_unless_one_is_given(tmp_path, capsys, base):
    make_gpt(n_embd=256, vocab_size=2048).save_pretrained(tmp_path / "wide")
    save_tokenizer(load_tokenizer(base), tmp_path / "wide")
    argv = ["tune", "--base", tmp_path / "wide", "--data", "noir", *FLAGS]
    for flags, lr in ((["--lr", "0.25"], 0.25), ([], 0.0015)):
        out = tmp_path / str(lr)
        run(capsys, *argv, "--out", out, *flags)
        assert read(out / "training.json")["asked"]["settings"]["lr"] == lr


def test_a_text_of_ones_own_without_separators_and_a_long_prompt(tmp_path, capsys):
    book = tmp_path / "book.txt"
    paragraph = "It was a bright cold day, and the clocks were striking.\n\n"
    book.write_text(paragraph * 400, encoding="utf-8")
    base = tmp_path / "base"
    code, _, error = run(capsys, "pretrain", "--data", book, "--out", base, *FLAGS)
    assert code == 0, error
    code, printed, error = run(
        capsys, "tune", "--base", base, "--data", book, "--out", tmp_path / "own", *FLAGS
    )
    assert code == 0, error
    assert "held out" in printed

    argv = ["sample", "--base", base, "--device", "cpu", "--max-new-tokens", "5"]
    code, printed, _ = run(capsys, *argv, "--prompt", "clock " * 200)
    assert code == 0
    assert "clock clock" in printed
    code, _, _ = run(capsys, *argv, "--prompt", "")
    assert code == 0


def test_a_full_fine_tuning_can_be_the_base_of_another_tuning(story, tmp_path, capsys):
    code, _, error = run(
        capsys, "tune", "--method", "lora", "--base", story[0] / "full", "--data", "noir",
        "--r", "2", "--target-modules", "attn.c_proj", "--out", tmp_path / "noir", *FLAGS,
    )
    assert code == 0, error
    config = read(tmp_path / "noir" / "adapter_config.json")
    assert config["r"] == 2
    assert len(config["target_modules"]) == 4


def test_a_dtype_of_the_base_is_refused_unless_the_base_is_frozen(base, tmp_path, capsys):
    argv = ["tune", "--base", base, "--data", "noir", "--base-dtype", "bfloat16", *FLAGS]
    code, _, error = run(capsys, *argv, "--method", "full", "--out", tmp_path / "full")
    assert code == 2
    assert "--base-dtype bfloat16" in error
    assert "--method lora" in error
    assert not (tmp_path / "full").exists()
    code, _, error = run(capsys, *argv, "--out", tmp_path / "lora")
    assert code == 0, error
    settings = read(tmp_path / "lora" / "training.json")["asked"]["settings"]
    assert settings["base_dtype"] == "bfloat16"


def test_training_works_if_the_directory_of_the_texts_is_read_only(tmp_path, capsys):
    dir = BUILT_IN["tales"].parent
    texts = sorted(dir.glob("*.txt"))
    before = [path.stat().st_mtime_ns for path in (dir, *texts)]
    code, _, _ = run(capsys, "pretrain", "--data", "pirate", "--out", tmp_path / "base", *FLAGS)
    assert code == 0
    after = [path.stat().st_mtime_ns for path in (dir, *texts)]
    assert after == before, "nothing is written beside the texts"


# ---- flags ---------------------------------------------------------------------------------------

def test_flags_before_the_command_count(tmp_path, capsys):
    before = ["--steps", "3", "--batch-size", "2", "--block-size", "32", "--device", "cpu"]
    code, _, error = run(capsys, *before, "pretrain", "--data", "pirate", "--out", tmp_path)
    assert code == 0, error
    record = read(tmp_path / "training.json")
    assert record["asked"]["settings"]["steps"] == 3
    assert [point["step"] for point in record["curve"]] == [0, 3]


@pytest.mark.parametrize("flag, value, command", [
    ("--alpha", "4", ["pretrain", "--data", "noir", "--out", "OUT"]),
    ("--preset", "tiny", ["tune", "--base", "nowhere", "--data", "noir", "--out", "OUT"]),
    ("--steps", "3", ["sample", "--base", "nowhere"]),
    ("--lr", "1", ["merge", "--base", "nowhere", "--adapter", "nowhere", "--out", "OUT"]),
])
def test_a_flag_before_a_command_that_does_not_have_it_is_refused_and_named(
        tmp_path, capsys, flag, value, command):
    out = tmp_path / "new"
    argv = [out if arg == "OUT" else arg for arg in command]
    code, _, error = run(capsys, flag, value, *argv)
    assert code == 2
    assert re.search(rf"(no flag --|unknown setting ){flag[2:]}\b", error)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("argv, exit_code, says", [
    (["pretrain", "--data", "missing.txt"], 1, "there is no text 'missing.txt'"),
    (["pretrain", "--data", "tales", "--preset", "huge"], 2, "unknown preset"),
    (["pretrain", "--data", "tales", "--device", "quantum"], 2, "--device quantum"),
    (["pretrain", "--data", "tales", "--steps", "0"], 2, "--steps is 0"),
    (["pretrain", "--data", "tales", "--lr", "nan"], 2, "--lr is nan"),
    (["pretrain", "--data", "tales", "--dtype", "int8"], 2, "--dtype"),
    (["pretrain", "--data", "tales", "--dropout", "1"], 2, "--dropout"),
    (["pretrain", "--data", "tales", "--accumulate", "3"], 2, "multiple of 3"),
    (["pretrain", "--data", "tales", "--fsdp"], 2, "torchrun"),
    (["pretrain", "--data", "pirate", "--resume"], 1, "no interrupted run"),
    (["tune", "--base", "nowhere", "--data", "pirate"], 1, "nowhere/config.json does not exist"),
    (["tune", "--base", "BASE", "--data", "pirate", "--r", "129"],
     2, "--r 129 exceeds the smaller side"),
    (["tune", "--base", "BASE", "--data", "pirate", "--base-dtype", "int8"], 2, "--base-dtype"),
    (["tune", "--base", "BASE", "--data", "pirate", "--target-modules", "q_proj"],
     2, "'q_proj' matches no module"),
    (["tune", "--base", "BASE", "--data", "pirate", "--block-size", "64"],
     2, "--block-size 64 exceeds the base model's 32"),
])
def test_bad_input_is_one_line_of_error_and_nothing_is_written(
        base, tmp_path, capsys, argv, exit_code, says):
    command, *flags = [base if arg == "BASE" else arg for arg in argv]
    code, _, error = run(capsys, command, "--out", tmp_path / "new", *FLAGS, *flags)
    assert code == exit_code
    assert says in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("training.json"))


@pytest.mark.parametrize("argv", [
    ["--steps", "many"],
    ["dance"],
    ["tune"],
    ["tune", "--method", "magic"],
    ["--r", "0"],
    ["--r", "1.5"],
    ["--alpha", "nan"],
    ["--alpha", "-1"],
    ["--seed", "1e3"],
])
def test_bad_usage_is_one_line_of_error_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1


# ---- the commands as functions -------------------------------------------------------------------

def test_pretrain_and_tune_return_the_record_that_they_write(small_base, tmp_path):
    again = train.pretrain("noir", small_base, **MINI)
    records = {small_base: again}
    for method in ("lora", "full"):
        out = tmp_path / method
        records[out] = train.tune(small_base, "bard", out, method, **MINI)
    for dir, record in records.items():
        assert record.keys() == {"asked", "curve", "finished"}
        assert [point["step"] for point in record["curve"]] == [0, 2, 4]
        assert record == read(dir / "training.json")


def test_voices_returns_what_is_in_voices_json(small_base, tmp_path):
    report = train.voices(["bard"], tmp_path, small_base, r=4, **MINI)
    assert report == read(tmp_path / "voices.json")
    assert list(report["bpb"]) == ["the base", "bard"]
    assert list(report["bpb"]["bard"]) == ["noir", "bard"]


def test_an_unknown_setting_is_named(small_base, tmp_path):
    calls = {
        "pretrain": lambda: train.pretrain("noir", tmp_path, stepz=3),
        "tune": lambda: train.tune(small_base, "noir", tmp_path, stepz=3),
        "compare": lambda: train.compare(small_base, "noir", tmp_path, stepz=3),
        "voices": lambda: train.voices(["noir"], tmp_path, small_base, stepz=3),
        "story": lambda: train.story(tmp_path, stepz=3),
    }
    for command, call in calls.items():
        with pytest.raises(UsageError, match="stepz"):
            call()
            pytest.fail(f"{command} accepts stepz")
    assert not list(tmp_path.rglob("training.json"))
