"""gpt.py against transformers' GPT-2, and what must hold of any GPT."""
import json
import math
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from conftest import make_gpt
from gpt import GPT, ChunkedLoss, GPTConfig, replacing, sample

SHAPES = [dict(), dict(n_layer=1, n_head=1, n_embd=16, vocab_size=300), dict(n_layer=3, n_head=6, n_embd=48, block_size=20)]


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
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "b").eval()(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def test_a_model_without_biases_survives_its_directory_and_transformers(tmp_path, idx):
    model = make_gpt(bias=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(idx)[0], model(idx)[0])
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def test_saving_and_loading_is_bitwise(tmp_path, model, idx):
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_loss_is_the_cross_entropy_of_the_targets(model, idx):
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    p = logits.softmax(-1).gather(2, idx[:, 1:, None]).squeeze(2)
    assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-5)


def test_an_untrained_model_is_as_uncertain_as_a_uniform_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("tiny"))
    idx = torch.randint(2048, (4, 65))
    assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(math.log(2048), abs=0.1)


def test_the_future_cannot_change_the_past(model, idx):
    other = idx.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 97
    a, b = model(idx)[0], model(other)[0]
    torch.testing.assert_close(a[:, :10], b[:, :10], atol=1e-6, rtol=0)
    assert not torch.allclose(a[:, 10], b[:, 10], atol=1e-2)


def test_residual_projections_start_smaller_by_the_root_of_their_number():
    torch.manual_seed(0)
    block = GPT(GPTConfig.preset("tiny")).transformer.h[0]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.05)


def test_parameter_counts_are_gpt2s():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig.preset("gpt2")).parameters()) == 124_439_808


def uncached_greedy(model, idx, n):
    for _ in range(n):
        idx = torch.cat((idx, model(idx[:, -model.config.block_size:])[0][:, -1:].argmax(-1)), dim=1)
    return idx


@pytest.mark.parametrize("prompt, n", [(1, 31), (20, 30), (32, 5), (40, 20)])       # within, across and beyond the context
def test_cached_greedy_equals_uncached_greedy(prompt, n):
    model = make_gpt(seed=3)
    idx = torch.randint(97, (3, prompt))
    assert torch.equal(model.generate(idx, n, temperature=0), uncached_greedy(model, idx, n))


def test_greedy_continuation_equals_transformers(tmp_path, model, idx):
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    out = theirs.generate(idx, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(idx, 12, temperature=0), out)


def test_rows_stop_on_their_own_and_the_loop_stops_with_the_last(model, idx):
    free = model.generate(idx, 12, temperature=0)
    stop = free[0, 24].item()                       # a token that row 0 writes within the twelve
    out = model.generate(idx, 12, temperature=0, stop_token=stop)
    lengths = []
    for row, whole in zip(out[:, 20:].tolist(), free[:, 20:].tolist()):
        n = whole.index(stop) + 1 if stop in whole else 12
        assert row[:n] == whole[:n] and set(row[n:]) <= {stop}
        lengths.append(n)
    assert out.size(1) == 20 + max(lengths) and lengths[0] <= 5


def test_top_k_1_is_greedy(model, idx):
    assert torch.equal(model.generate(idx, 10, temperature=1.0, top_k=1), model.generate(idx, 10, temperature=0))


def test_samples_follow_the_distribution_and_its_cuts():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(20_000, 4)
    torch.manual_seed(0)

    def shares(**cut):
        return torch.bincount(sample(logits, **cut).flatten(), minlength=4) / 20_000

    torch.testing.assert_close(shares(), p, atol=0.015, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5), p**2 / (p**2).sum(), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(top_p=0.01), torch.tensor([1.0, 0, 0, 0]), atol=0, rtol=0)


def test_generating_leaves_the_mode_as_it_was(model, idx):
    model.train()
    model.generate(idx, 2)
    assert model.training


@pytest.mark.parametrize("change, says", [
    (dict(n_head=5), "heads"), (dict(n_layer=0), "n_layer"), (dict(n_embd="64"), "n_embd"), (dict(dropout=1.0), "dropout"),
    (dict(vocab_size=True), "vocab_size"), (dict(bias="no"), "bias"), (dict(dropout=float("nan")), "dropout")])
def test_a_shape_that_cannot_be_built_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        make_gpt(**change)


def test_bad_arguments_of_generate_are_refused(model, idx):
    for bad in (dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            model.generate(idx, 1, **bad)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(idx[:, :0], 1)
    with pytest.raises(ValueError, match="block size"):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="tiny"):
        GPTConfig.preset("huge")


@pytest.mark.parametrize("damage, says", [
    (lambda d: (d / "model.safetensors").unlink(), "does not exist"),
    (lambda d: (d / "config.json").unlink(), "does not exist"),
    (lambda d: (d / "config.json").write_text("{"), "config.json"),
    (lambda d: (d / "config.json").write_text("[1]"), "config.json"),
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]), "whole safetensors"),
    (lambda d: (d / "model.safetensors").write_bytes(b""), "whole safetensors"),
    (lambda d: change_config(d, n_embd=32), "do not fit"),
    (lambda d: change_config(d, n_layer=-1), "n_layer"),
    (lambda d: change_config(d, activation_function="gelu"), "activation_function"),
    (lambda d: change_config(d, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    (lambda d: change_tensors(d, lambda t: t.pop("transformer.ln_f.weight")), "transformer.ln_f.weight"),
    (lambda d: change_tensors(d, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})), "head of its own"),
    (lambda d: change_config(d, n_inner=100), "n_inner"),
    (lambda d: change_config(d, n_positions="many"), "block_size"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickle"),
    (lambda d: (d / "model.safetensors").rename(d / "model.safetensors.index.json"), "not an index"),
    (lambda d: shard_index(d, "../model.safetensors"), "not a file beside"),
    (lambda d: shard_index(d, "other.safetensors"), "other.safetensors does not exist"),
])
def test_a_damaged_or_foreign_directory_is_refused(tmp_path, model, damage, says):
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        GPT.from_pretrained(tmp_path)


def change_config(dir, **changes):
    config = json.loads((dir / "config.json").read_text())
    (dir / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(dir, change):
    tensors = load_file(dir / "model.safetensors")
    change(tensors)
    save_file(tensors, dir / "model.safetensors")


def shard_index(dir, file):
    (dir / "model.safetensors").unlink()
    (dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": file}}))


# ---- directories of others -------------------------------------------------------------------------------------------

def test_old_files_without_the_prefix_and_with_masks_and_a_tied_head_are_read(tmp_path, model, idx):
    model.save_pretrained(tmp_path)

    def as_on_the_hub(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(32, 32).tril()[None, None]
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    change_tensors(tmp_path, as_on_the_hub)
    change_config(tmp_path, activation_function="gelu_pytorch_tanh", n_inner=4 * 64, architectures=["GPT2Model"])
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], model(idx)[0])


def test_weights_in_several_files_are_read(tmp_path, model, idx):
    model.save_pretrained(tmp_path / "one")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "several", max_shard_size="100KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    assert torch.equal(GPT.from_pretrained(tmp_path / "several")(idx)[0], model(idx)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_reading_never_holds_the_model_twice(tmp_path):
    model = make_gpt(n_layer=12, n_embd=512)
    model.save_pretrained(tmp_path / "large")
    make_gpt().save_pretrained(tmp_path / "small")      # read first: what torch needs for itself does not count
    program = ("import re, sys, gpt, safetensors.torch\n"
               "most = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024\n"
               "for dir in sys.argv[1:]: before = most(); gpt.GPT.from_pretrained(dir); grown = most() - before\nprint(grown)")
    argv = [sys.executable, "-c", program, tmp_path / "small", tmp_path / "large"]
    grown = int(subprocess.run(argv, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout)
    size = sum(p.nbytes for p in model.parameters())
    assert 0.9 * size < grown < 1.5 * size


def test_gpt2_is_fetched_by_name_from_the_hub(tmp_path, model, idx, monkeypatch):
    model.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or str(tmp_path))
    assert torch.equal(GPT.from_pretrained("gpt2-medium")(idx)[0], model(idx)[0])
    assert asked == ["openai-community/gpt2-medium"]


def test_without_network_or_library_the_error_says_how_to_get_gpt2(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="cannot be fetched"):
        GPT.from_pretrained("gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OSError, match="pip install huggingface_hub"):
        GPT.from_pretrained("gpt2")


def test_a_directory_called_gpt2_goes_before_the_hub(tmp_path, model, idx, monkeypatch):
    model.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(GPT.from_pretrained("gpt2")(idx)[0], model(idx)[0])


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_dropout_only_acts_in_training(idx):
    model = make_gpt(dropout=0.5)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_targets_of_minus_100_do_not_count(model, idx):
    targets = idx.clone()
    targets[:, :10] = -100
    logits, loss = model(idx, targets)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:, 10:].flatten(0, 1), idx[:, 10:].flatten()).item(), rel=1e-5)


# ---- what saves memory -----------------------------------------------------------------------------------------------

def loss_and_gradients(model, idx, targets, chunk=0, recompute=False):
    model.loss_chunk, model.recompute = chunk, recompute
    model.zero_grad()
    logits, loss = model(idx, targets)
    loss.backward()
    assert (logits is None) == (chunk > 0)
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 97 * 16, 97 * 50, 10**9])
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_the_chunked_loss_is_the_plain_loss(idx, chunk, head):
    model = make_gpt()
    model.lm_head.weight.requires_grad_(head == "trained")
    targets = idx.roll(-1, dims=1)
    targets[0, :7] = -100
    loss, gradients = loss_and_gradients(model, idx, targets)
    chunked, chunked_gradients = loss_and_gradients(model, idx, targets, chunk)
    torch.testing.assert_close(chunked, loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == chunked_gradients.keys() and ("transformer.wte.weight" in gradients) == (head == "trained")
    for name in gradients:
        torch.testing.assert_close(chunked_gradients[name], gradients[name], atol=1e-5, rtol=1e-4)


def test_the_chunked_loss_is_the_derivative_of_itself():
    torch.manual_seed(0)
    x, W = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (13, 11))
    targets = torch.randint(11, (13,))
    assert torch.autograd.gradcheck(lambda x, W: ChunkedLoss.apply(x, W, targets, 50), (x, W))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(ChunkedLoss.apply(x, W, targets, 50), x, create_graph=True)


def test_the_chunked_loss_agrees_to_rounding_under_bfloat16_autocast(idx):
    model = make_gpt(std=0.1)
    exact, exact_gradients = loss_and_gradients(model, idx, idx)
    for chunk in (0, 97 * 16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, gradients = loss_and_gradients(model, idx, idx, chunk)
        assert loss.item() == pytest.approx(exact.item(), rel=0.01)
        for name, g in gradients.items():
            assert (g - exact_gradients[name]).norm() < 0.05 * exact_gradients[name].norm() + 1e-4, (chunk, name)


def test_logits_never_exist_whole_with_the_chunked_loss():
    from compare import LiveBytes
    model, idx = make_gpt(vocab_size=5000), torch.randint(5000, (8, 32))
    model.loss_chunk, whole = 5000 * 16, 8 * 32 * 5000 * 4
    for module in model.modules():
        module.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    with LiveBytes(model.parameters()) as live:
        before = live.now
        model(idx, idx)[1].backward()
    assert live.peak - before < whole / 2


def test_recomputing_the_blocks_changes_no_gradient_and_keeps_less(idx):
    model = make_gpt(dropout=0.1).train()
    kept = []
    for recompute in (False, True):
        torch.manual_seed(0)
        bytes_kept = 0

        def count(tensor):
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            kept.append((*loss_and_gradients(model, idx, idx, recompute=recompute), bytes_kept))
    assert torch.equal(kept[0][0], kept[1][0]) and kept[1][2] < kept[0][2]
    for name, g in kept[0][1].items():
        torch.testing.assert_close(kept[1][1][name], g, atol=1e-6, rtol=1e-5)
