"""train.py through its command line, at a miniature size; and what must hold of train()."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

import train
from conftest import make_gpt
from data import BUILT_IN, read_text, tokenize
from data.bpe import load_tokenizer, save_tokenizer, train_bpe
from data.runs import open_run
from gpt import GPT
from lora_minimal import apply_lora, load_lora
from train import Settings, Step, evaluate, main

MINI = ["--steps", "4", "--batch-size", "2", "--block-size", "32", "--eval-every", "2", "--device", "cpu"]
TRAIN = str(Path(train.__file__))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The whole story, run once as a user would, from another directory: (its --out, what it printed)."""
    out = tmp_path_factory.mktemp("story")
    result = subprocess.run([sys.executable, TRAIN, *MINI], cwd=out, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return out / "out", result.stdout


@pytest.fixture(scope="module")
def base(story):
    return str(story[0] / "base")


def run(capsys, *argv):
    code = main(list(map(str, argv)))
    return code, *capsys.readouterr()


# ---- the story -------------------------------------------------------------------------------------------------------

def test_the_story_leaves_a_base_two_tunings_and_a_comparison(story):
    out, printed = story
    assert {path.name for path in out.iterdir()} == {"base", "full", "lora", "tokens", "comparison.json", "comparison.png"}
    assert {path.name for path in (out / "lora").iterdir()} == {
        ".lock", "adapter_config.json", "adapter_model.safetensors", "training.json"}
    for line in ("Pretraining", "Full fine-tuning on pirate", "LoRA on pirate", "full ÷ LoRA", "after LoRA"):
        assert line in printed


def test_comparison_json_has_exactly_the_documented_keys(story):
    report = json.loads((story[0] / "comparison.json").read_text())
    assert report.keys() == {"device", "torch", "config", "base", "methods"}
    assert report["base"].keys() == {"bpb"} and report["methods"].keys() == {"full", "lora"}
    for method in report["methods"].values():
        assert method.keys() == {
            "trainable_params", "total_params", "checkpoint_bytes", "memory", "time", "tokens_per_s", "style_bpb_before",
            "style_bpb_after", "base_bpb_after", "seconds_to_best", "steps"}
        assert method["memory"].keys() == {"weights", "gradients", "optimizer", "activations", "peak"}
        assert method["time"].keys() == {"forward_ms", "backward_ms", "optimizer_ms", "step_ms"}


def test_the_comparison_counts_what_arithmetic_says(story):
    report = json.loads((story[0] / "comparison.json").read_text())
    full, lora = report["methods"]["full"], report["methods"]["lora"]
    n, added = full["total_params"], 4 * 8 * (512 + 256 + 640 + 640)
    assert full["trainable_params"] == n and lora["trainable_params"] == added and lora["total_params"] == n + added
    assert full["memory"]["weights"] == full["memory"]["gradients"] == 4 * n
    assert lora["memory"]["weights"] == 4 * (n + added) and lora["memory"]["gradients"] == 4 * added
    for method in (full, lora):     # AdamW: two moments per number, and a step counter per tensor
        assert 0 <= method["memory"]["optimizer"] - 2 * method["memory"]["gradients"] < 4 * 100
        assert method["memory"]["peak"] >= method["memory"]["weights"] + method["memory"]["optimizer"]
        assert method["style_bpb_after"] < method["style_bpb_before"]


def test_the_story_again_reuses_what_is_finished(story, capsys):
    out, printed = story
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/training.json")}
    code, again, _ = run(capsys, *MINI, "--out", out)
    assert code == 0 and again.count("is reused") == 3
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/training.json")} == stamps


def test_other_settings_are_refused_and_named_rather_than_overwrite(base, capsys):
    code, _, error = run(capsys, "pretrain", "--data", "tales", "--out", base, *MINI, "--lr", "0.5")
    assert code == 1 and "lr 0.008 -> 0.5" in error and "--fresh" in error


@pytest.fixture(scope="module")
def voices(base, tmp_path_factory):
    """`train.py voices` over the story's base, as its own command: (its --out, what it printed)."""
    out = tmp_path_factory.mktemp("voices")
    result = subprocess.run([sys.executable, TRAIN, "voices", "--base", base, "--out", str(out), *MINI, "--lr", "0.02"],
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_voices_leaves_an_adapter_for_each_text_and_judges_every_text_under_every_one(voices):
    out, printed = voices
    names = ["pirate", "bard", "noir"]
    assert {path.name for path in out.iterdir()} == {*names, "tokens", "voices.json"}
    report = json.loads((out / "voices.json").read_text())
    assert list(report["bpb"]) == ["the base", *names]
    for model in report["bpb"].values():
        assert list(model) == ["tales", *names]
    for name in names:
        curve = json.loads((out / name / "training.json").read_text())["curve"]
        assert report["bpb"][name][name] == pytest.approx(min(point["bpb"] for point in curve), rel=1e-5)
        assert report["bytes"]["voices"][name] == sum(
            (out / name / file).stat().st_size for file in ("adapter_model.safetensors", "adapter_config.json"))
    assert sum(report["bytes"]["voices"].values()) < 0.2 * report["bytes"]["base"]
    assert "the 3 adapters" in printed and "a row for each" in printed


def test_the_matrix_is_what_each_adapter_alone_gives(voices, base):
    report, model = json.loads((voices[0] / "voices.json").read_text()), GPT.from_pretrained(base)
    load_lora(model, voices[0] / "bard")
    corpus = tokenize(read_text("noir", 0.1, voices[0]), load_tokenizer(base), voices[0] / "tokens", 32)
    assert evaluate(model.eval(), corpus, Settings(1, 1, 32, 0.1)) == pytest.approx(report["bpb"]["bard"]["noir"], rel=1e-5)


def test_sample_prints_the_base_and_every_adapter_side_by_side_and_merging_changes_nothing(voices, base, capsys):
    argv = ["sample", "--base", base, "--adapter", voices[0] / "pirate", "--adapter", voices[0] / "noir", "--prompt", "Once",
            "--device", "cpu", "--max-new-tokens", "8", "--temperature", "0"]
    code, mixed, _ = run(capsys, *argv)
    assert code == 0 and mixed.count("---") > 3 and mixed.count("Once") == 3
    assert run(capsys, *argv, "--merge")[1] == mixed
    alone = run(capsys, *argv[:3], *argv[7:])[1]
    assert alone.split("\n")[2].strip() == mixed.split("Once")[1].split("  ")[0].join(("Once", ""))


def test_merge_writes_a_plain_model_that_transformers_opens(voices, base, tmp_path, capsys):
    adapter, idx = voices[0] / "bard", torch.arange(20)[None]
    code, _, error = run(capsys, "merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "merged")
    assert code == 0, error
    tuned = GPT.from_pretrained(base)
    load_lora(tuned, adapter)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(theirs(idx).logits, tuned.eval()(idx)[0], atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("Once")["input_ids"] == load_tokenizer(base).encode("Once")
    code, _, error = run(capsys, "merge", "--base", base, "--adapter", voices[0] / "noir", "--out", tmp_path / "merged")
    assert code == 1 and "--fresh" in error


@pytest.mark.parametrize("argv", [["merge", "--adapter", "A", "--out", "A"], ["merge", "--adapter", "A", "--out", "B", "--fresh"],
                                  ["tune", "--data", "noir", "--out", "B", "--fresh"]])
def test_what_is_read_is_never_overwritten(voices, base, capsys, argv):
    paths = {"A": str(voices[0] / "pirate"), "B": base}
    before = {path: path.read_bytes() for dir in paths.values() for path in Path(dir).rglob("*.*")}        # and no new ones
    code, _, error = run(capsys, *[paths.get(arg, arg) for arg in argv], "--base", base, *(MINI if argv[0] == "tune" else []))
    assert code == 1 and "choose another directory" in error
    assert before == {path: path.read_bytes() for dir in paths.values() for path in Path(dir).rglob("*.*")}


def test_an_adapter_tuned_on_another_base_is_remarked_upon(voices, story, base, capsys):
    argv = ["--adapter", voices[0] / "noir", "--prompt", "Once", "--device", "cpu", "--max-new-tokens", "2"]
    assert "another base" not in run(capsys, "sample", "--base", base, *argv)[1]
    assert "another base" in run(capsys, "sample", "--base", story[0] / "full", *argv)[1]


def test_a_base_of_any_name_is_tuned_gpt2_through_the_hub_among_them(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: base)
    code, printed, error = run(capsys, "tune", "--base", "gpt2", "--data", "noir", "--out", tmp_path / "noir", *MINI)
    assert code == 0 and "--base gpt2 --adapter" in printed, error


def test_a_wider_base_gets_a_smaller_learning_rate_unless_one_is_given(tmp_path, capsys, base):
    make_gpt(n_embd=256, vocab_size=2048).save_pretrained(tmp_path / "wide")
    save_tokenizer(load_tokenizer(base), tmp_path / "wide")
    for flags, lr in ((["--lr", "0.25"], 0.25), ([], 0.005)):
        run(capsys, "tune", "--base", tmp_path / "wide", "--data", "noir", "--out", tmp_path / str(lr), *MINI, *flags)
        assert json.loads((tmp_path / str(lr) / "training.json").read_text())["asked"]["settings"]["lr"] == lr


def test_a_text_of_ones_own_without_separators_and_a_long_prompt(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("It was a bright cold day, and the clocks were striking.\n\n" * 400, encoding="utf-8")
    code, printed, error = run(capsys, "pretrain", "--data", book, "--out", tmp_path / "base", *MINI)
    assert code == 0, error
    code, printed, error = run(capsys, "tune", "--base", tmp_path / "base", "--data", book, "--out", tmp_path / "own", *MINI)
    assert code == 0 and "held out" in printed, error
    code, printed, _ = run(capsys, "sample", "--base", tmp_path / "base", "--prompt", "clock " * 200, "--device", "cpu",
                           "--max-new-tokens", "5")
    assert code == 0 and "clock clock" in printed
    assert run(capsys, "sample", "--base", tmp_path / "base", "--prompt", "", "--device", "cpu", "--max-new-tokens", "5")[0] == 0


def test_a_full_fine_tuning_is_a_base_model_in_its_turn(story, tmp_path, capsys):
    code, _, error = run(capsys, "tune", "--method", "lora", "--base", story[0] / "full", "--data", "noir", "--r", "2",
                         "--target-modules", "attn.c_proj", "--out", tmp_path / "noir", *MINI)
    assert code == 0, error
    config = json.loads((tmp_path / "noir" / "adapter_config.json").read_text())
    assert config["r"] == 2 and len(config["target_modules"]) == 4


# ---- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, exit_code, says", [
    (["pretrain", "--data", "missing.txt"], 1, "there is no text 'missing.txt'"),
    (["pretrain", "--data", "tales", "--preset", "huge"], 2, "no preset"),
    (["pretrain", "--data", "tales", "--device", "quantum"], 2, "--device quantum"),
    (["pretrain", "--data", "tales", "--steps", "0"], 2, "--steps is 0"),
    (["pretrain", "--data", "tales", "--lr", "nan"], 2, "--lr is nan"),
    (["pretrain", "--data", "tales", "--dtype", "int8"], 2, "--dtype"),
    (["pretrain", "--data", "tales", "--dropout", "1"], 2, "--dropout"),
    (["pretrain", "--data", "tales", "--accumulate", "3"], 2, "multiple of 3"),
    (["pretrain", "--data", "tales", "--fsdp"], 2, "torchrun"),
    (["pretrain", "--data", "tales", "--resume"], 1, "no interrupted run"),
    (["tune", "--base", "nowhere", "--data", "pirate"], 1, "nowhere/config.json does not exist"),
    (["tune", "--base", "BASE", "--data", "pirate", "--r", "129"], 2, "--r 129 exceeds the smaller side"),
    (["tune", "--base", "BASE", "--data", "pirate", "--base-dtype", "int8"], 2, "--base-dtype"),
    (["tune", "--base", "BASE", "--data", "pirate", "--target-modules", "q_proj"], 2, "'q_proj' matches no module"),
    (["tune", "--base", "BASE", "--data", "pirate", "--block-size", "64"], 2, "--block-size 64 exceeds the base model's 32"),
])
def test_bad_input_is_one_line_of_error_and_nothing_is_written(base, tmp_path, capsys, argv, exit_code, says):
    quick = [] if "--steps" in argv or "--block-size" in argv else MINI[:-2]
    code, _, error = run(capsys, *(base if arg == "BASE" else arg for arg in argv), "--out", tmp_path / "new",
                         *quick, *([] if "--device" in argv else ["--device", "cpu"]))
    assert code == exit_code and says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("training.json"))


@pytest.mark.parametrize("argv", [["--steps", "many"], ["dance"], ["tune"], ["tune", "--method", "magic"], ["--r", "0"],
                                  ["--r", "1.5"], ["--alpha", "nan"], ["--alpha", "-1"], ["--seed", "1e3"]])
def test_bad_usage_is_one_line_of_error_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_a_directory_that_cannot_be_written_fails_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, printed, error = run(capsys, "pretrain", "--data", "tales", "--out", tmp_path / "file" / "base", *MINI)
    assert code == 1 and "step" not in printed and "file" in error


def test_a_foreign_model_is_not_overwritten(tmp_path, capsys):
    make_gpt().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    code, _, error = run(capsys, "pretrain", "--data", "tales", "--out", tmp_path, *MINI)
    assert code == 1 and "no training.json" in error and (tmp_path / "model.safetensors").read_bytes() == before


# ---- interruption ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ["pretrain", "full", "lora"])
def test_an_interrupted_and_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(
        base, tmp_path, capsys, monkeypatch, command):
    argv = (["pretrain", "--data", "tales"] if command == "pretrain" else
            ["tune", "--method", command, "--base", base, "--data", "pirate"])
    argv += ["--dropout", "0.1", *MINI]
    assert run(capsys, *argv, "--out", tmp_path / "whole")[0] == 0
    schedule = Step.schedule

    def interrupted(self, n):
        if n == 2:
            os.kill(os.getpid(), signal.SIGINT)
        schedule(self, n)

    monkeypatch.setattr(Step, "schedule", interrupted)
    code, _, error = run(capsys, *argv, "--out", tmp_path / "parts")
    monkeypatch.undo()
    assert code == 130 and "stopped at step 3 of 4" in error
    code, _, error = run(capsys, *argv, "--out", tmp_path / "parts")
    assert code == 1 and "--resume" in error
    code, _, error = run(capsys, *argv, "--out", tmp_path / "parts", "--resume", "--data", "noir", "--lr", "0.1")
    assert code == 1 and "-> noir" in error and "-> 0.1" in error, "a checkpoint of another run must not be continued"
    code, printed, _ = run(capsys, *argv, "--out", tmp_path / "parts", "--resume")
    assert code == 0 and "was interrupted and is resumed" in printed
    name = "adapter_model.safetensors" if command == "lora" else "model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "parts" / "checkpoint.safetensors").exists()


def test_a_run_that_died_without_a_checkpoint_starts_over(tmp_path, capsys, monkeypatch):
    argv = ["pretrain", "--data", "tales", "--out", tmp_path, *MINI]

    def die(self, n):
        raise MemoryError

    monkeypatch.setattr(Step, "schedule", die)
    code, _, error = run(capsys, *argv)
    assert code == 1 and "MemoryError" in error and "--debug" in error
    with pytest.raises(MemoryError):
        run(capsys, *argv, "--debug")
    monkeypatch.undo()
    assert run(capsys, *argv)[0] == 0 and (tmp_path / "model.safetensors").exists()


def test_a_death_while_starting_over_never_leaves_an_old_checkpoint_to_a_new_run(tmp_path, monkeypatch):
    def begin(asked, resume, fresh):
        with open_run(tmp_path, asked, resume, fresh):
            pass

    begin({"lr": 1}, resume=False, fresh=False)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"of the run with lr 1")

    def die(*args, **kwargs):
        raise MemoryError

    for part in ("data.runs.write_json", "pathlib.Path.unlink"):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(part, die)
            begin({"lr": 2}, resume=None, fresh=True)
        if (tmp_path / "checkpoint.safetensors").exists():
            with pytest.raises(ValueError, match="lr 1 -> 2"):
                begin({"lr": 2}, resume=None, fresh=False)
        (tmp_path / "checkpoint.safetensors").write_bytes(b"of the run with lr 1")


def test_fresh_replaces_a_finished_run(tmp_path, capsys):
    argv = ["pretrain", "--data", "tales", "--out", tmp_path, *MINI]
    assert run(capsys, *argv)[0] == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    assert run(capsys, *argv, "--seed", "5", "--fresh")[0] == 0
    assert (tmp_path / "model.safetensors").read_bytes() != before


def test_sigterm_in_the_story_keeps_what_is_finished_and_the_next_run_resumes(tmp_path):
    argv = [sys.executable, TRAIN, *MINI[2:], "--steps", "400", "--out", str(tmp_path)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step   10" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped at step" in error
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step   20" in line:
            break
    process.kill()
    process.communicate()
    assert "step   20" in lines[-1], "in a new process, whose hashes and so whose sets are ordered otherwise"
    assert any("base was interrupted and is resumed" in line for line in lines)
    assert not any("step    0" in line for line in lines)


# ---- train() ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("corpus")
    text = read_text("pirate", 0.1, tmp)
    encoding = train_bpe(text.all_train, 400)
    return tokenize(text, encoding, tmp, 32)


def settings(**changes):
    return Settings(**{**dict(steps=6, batch_size=4, block_size=32, lr=1e-2, eval_every=2), **changes})


def test_bits_per_byte_of_a_uniform_guess_is_known(corpus):
    model = make_gpt(std=0.0, vocab_size=400)
    expected = (len(corpus.heldout) - 1) * math.log2(400) / corpus.heldout_bytes
    assert evaluate(model, corpus, settings()) == pytest.approx(expected, rel=1e-4)


def test_training_ends_with_the_best_weights_not_the_last(corpus, tmp_path):
    model = make_gpt(std=0.02, vocab_size=400)
    curve = train.train(model, corpus, settings(lr=0.3, grad_clip=0.0, steps=8, eval_every=1), tmp_path)
    best = min(point["bpb"] for point in curve)
    assert curve[-1]["bpb"] > best, "the learning rate was to be so high that the end is not the best"
    assert evaluate(model, corpus, settings()) == pytest.approx(best, rel=1e-6)


def test_lora_training_leaves_the_base_bit_for_bit(corpus, tmp_path):
    model = make_gpt(std=0.02, vocab_size=400)
    before = {name: p.clone() for name, p in model.named_parameters()}
    apply_lora(model)
    train.train(model, corpus, settings(), tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = make_gpt()
    step = Step(model, settings(muon_lr=0.02))
    adamw, muon = ({id(p) for group in o.param_groups for p in group["params"]} for o in step.optimizers)
    assert muon == {id(p) for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    assert adamw | muon == {id(p) for p in model.parameters()} and not adamw & muon


def test_the_learning_rate_rises_to_its_height_and_falls_to_almost_nothing():
    step = Step(make_gpt(), settings(steps=100, warmup=0.1, lr=1.0))
    rates = []
    for n in range(100):
        step.schedule(n)
        rates.append(step.optimizers[0].param_groups[0]["lr"])
    assert max(rates) == pytest.approx(1.0, abs=0.02) and 8 <= rates.index(max(rates)) <= 10
    assert rates[0] < 0.11 and rates[-1] < 0.02 and rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:])[::-1]


def test_training_works_while_data_is_read_only(tmp_path, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in BUILT_IN["tales"].parent.glob("*.txt")}
    folder = BUILT_IN["tales"].parent.stat().st_mtime_ns
    assert run(capsys, "pretrain", "--data", "tales", "--out", tmp_path / "base", *MINI)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert BUILT_IN["tales"].parent.stat().st_mtime_ns == folder, "nothing is written beside the corpora"


def test_a_saved_base_is_what_was_judged(base):
    record = json.loads(Path(base, "training.json").read_text())
    model, encoding, learnt_from = train.load_model(base, "cpu")
    assert learnt_from == "tales" and isinstance(model, GPT)
    text = read_text("tales", 0.05, base)
    corpus = tokenize(text, encoding, Path(base).parent / "tokens", 32)
    best = min(point["bpb"] for point in record["curve"])
    assert evaluate(model, corpus, Settings(**record["asked"]["settings"])) == pytest.approx(best, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("lora", [False, True])
def test_a_captured_step_gives_the_losses_of_an_eager_one(lora):
    curves = []
    for graph in (True, False):
        model = make_gpt(std=0.02).cuda().train()
        torch.manual_seed(0)
        if lora:
            apply_lora(model)
        step = Step(model, settings(steps=30, graph=graph, loss_chunk=97 * 16))
        generator = torch.Generator().manual_seed(0)
        losses = []
        for n in range(30):
            step.schedule(n)
            idx = torch.randint(97, (4, 33), generator=generator).cuda()
            losses.append(step(idx[:, :-1].contiguous(), idx[:, 1:].contiguous()).item())
        assert (step.graph is not None) == graph
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_a_bfloat16_base_is_for_lora_alone(base, tmp_path, capsys):
    for method in ("full", "lora"):
        code, _, error = run(capsys, "tune", "--base", base, "--data", "noir", "--method", method, "--base-dtype", "bfloat16",
                             "--out", tmp_path / method, *MINI)
        assert code == 0, error
        stored = json.loads((tmp_path / method / "training.json").read_text())["asked"]["settings"]["base_dtype"]
        assert stored == ("bfloat16" if method == "lora" else "float32")
