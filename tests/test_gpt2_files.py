"""lab/gpt2_files.py: model directories, ours, transformers' and damaged ones."""
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from conftest import make_gpt
from gpt import GPT

SHAPES = [
    {},
    dict(n_layer=1, n_head=1, n_embd=16, vocab_size=300),
    dict(n_layer=3, n_head=6, n_embd=48, block_size=20),
]


def change_config(dir, **changes):
    path = dir / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


# ---- transformers and back -----------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers_reading_our_directory(tmp_path, idx, shape):
    model = make_gpt(**shape)
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers_writing_the_directory(tmp_path, idx, shape):
    make_gpt(**shape).save_pretrained(tmp_path / "a")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "a").eval()
    theirs.save_pretrained(tmp_path / "b")
    ours = GPT.from_pretrained(tmp_path / "b").eval()
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def test_a_model_without_biases_survives_its_directory_and_transformers(tmp_path, idx):
    model = make_gpt(bias=False)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path).eval()
    assert torch.equal(again(idx)[0], model(idx)[0])
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def test_saving_and_loading_is_bitwise(tmp_path, model, idx):
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_old_files_without_the_prefix_and_with_masks_and_a_tied_head_are_read(
    tmp_path, model, idx
):
    model.save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        tensors[name.removeprefix("transformer.")] = tensor
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(32, 32).tril()[None, None]
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    change_config(
        tmp_path,
        activation_function="gelu_pytorch_tanh",
        n_inner=4 * 64,
        architectures=["GPT2Model"],
    )
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], model(idx)[0])


def test_weights_in_several_files_are_read(tmp_path, model, idx):
    model.save_pretrained(tmp_path / "one")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "several", max_shard_size="100KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    assert torch.equal(GPT.from_pretrained(tmp_path / "several")(idx)[0], model(idx)[0])


# Prints by how many bytes reading the last directory raises the peak of the memory in use.
MEASURE_READING = r"""
import re, sys
import gpt, safetensors.torch

def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

for dir in sys.argv[1:]:
    before = peak()
    gpt.GPT.from_pretrained(dir)
    grown = peak() - before
print(grown)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_reading_never_holds_the_model_twice(tmp_path):
    model = make_gpt(n_layer=12, n_embd=512)
    model.save_pretrained(tmp_path / "large")
    # The small one is read first: what torch needs for itself does not count.
    make_gpt().save_pretrained(tmp_path / "small")
    process = subprocess.run(
        [sys.executable, "-c", MEASURE_READING, tmp_path / "small", tmp_path / "large"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )
    grown = int(process.stdout)
    size = sum(p.nbytes for p in model.parameters())
    assert 0.9 * size < grown < 1.5 * size


# ---- damaged and foreign directories -------------------------------------------------------------

@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_missing_file_is_refused(tmp_path, model, file):
    model.save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_config_is_refused(tmp_path, model, content):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, says", [
    (dict(n_embd=32), "do not fit"),
    (dict(n_layer=-1), "n_layer"),
    (dict(n_inner=100), "n_inner"),
    (dict(n_positions="many"), "block_size"),
    (dict(activation_function="gelu"), "activation_function"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
])
def test_a_config_of_another_model_is_refused(tmp_path, model, change, says):
    model.save_pretrained(tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(ValueError, match=says):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [5000, 0])
def test_a_file_of_weights_that_broke_off_is_refused(tmp_path, model, kept):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="whole safetensors"):
        GPT.from_pretrained(tmp_path)


def test_weights_without_one_of_the_tensors_are_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="transformer.ln_f.weight"):
        GPT.from_pretrained(tmp_path)


def test_weights_with_a_head_of_their_own_are_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="head of its own"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("file, says", [
    ("pytorch_model.bin", "pickle"),
    ("model.safetensors.index.json", "not an index"),
])
def test_weights_under_a_name_of_another_format_are_refused(tmp_path, model, file, says):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("file, says", [
    ("../model.safetensors", "not a file beside"),
    ("other.safetensors", "other.safetensors does not exist"),
])
def test_an_index_that_points_nowhere_is_refused(tmp_path, model, file, says):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        GPT.from_pretrained(tmp_path)


# ---- the hub -------------------------------------------------------------------------------------

def test_gpt2_is_fetched_by_name_from_the_hub(tmp_path, model, idx, monkeypatch):
    model.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(repo, **_):
        asked.append(repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert torch.equal(GPT.from_pretrained("gpt2-medium")(idx)[0], model(idx)[0])
    assert asked == ["openai-community/gpt2-medium"]


def test_without_network_or_library_the_error_says_how_to_get_gpt2(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="cannot be downloaded"):
        GPT.from_pretrained("gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OSError, match="pip install huggingface_hub"):
        GPT.from_pretrained("gpt2")


def test_a_directory_called_gpt2_goes_before_the_hub(tmp_path, model, idx, monkeypatch):
    model.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(GPT.from_pretrained("gpt2")(idx)[0], model(idx)[0])
