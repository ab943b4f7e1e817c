"""gpt.py: what must hold of any GPT, and transformers' GPT-2 as a reference for generation."""
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from conftest import make_gpt
from gpt import GPT, GPTConfig, sample

# ---- the model -----------------------------------------------------------------------------------

def test_loss_is_the_cross_entropy_of_the_targets(model, idx):
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    p = logits.softmax(-1).gather(2, idx[:, 1:, None]).squeeze(2)
    assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-5)


def test_targets_of_minus_100_do_not_count(model, idx):
    targets = idx.clone()
    targets[:, :10] = -100
    logits, loss = model(idx, targets)
    expected = F.cross_entropy(logits[:, 10:].flatten(0, 1), idx[:, 10:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_untrained_model_is_as_uncertain_as_a_uniform_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("tiny"))
    idx = torch.randint(2048, (4, 65))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(math.log(2048), abs=0.1)


def test_the_future_cannot_change_the_past(model, idx):
    other = idx.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 97
    a, _ = model(idx)
    b, _ = model(other)
    torch.testing.assert_close(a[:, :10], b[:, :10], atol=1e-6, rtol=0)
    assert not torch.allclose(a[:, 10], b[:, 10], atol=1e-2)


def test_residual_projections_start_smaller_by_the_root_of_their_number():
    torch.manual_seed(0)
    block = GPT(GPTConfig.preset("tiny")).transformer.h[0]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    smaller = 0.02 / math.sqrt(2 * 4)
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        assert projection.weight.std().item() == pytest.approx(smaller, rel=0.05)


def test_parameter_counts_are_gpt2s():
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("gpt2"))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_dropout_only_acts_in_training(idx):
    model = make_gpt(dropout=0.5)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("change, says", [
    (dict(n_head=5), "heads"),
    (dict(n_layer=0), "n_layer"),
    (dict(n_embd="64"), "n_embd"),
    (dict(dropout=1.0), "dropout"),
    (dict(dropout=float("nan")), "dropout"),
    (dict(vocab_size=True), "vocab_size"),
    (dict(bias="no"), "bias"),
])
def test_a_shape_that_cannot_be_built_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        make_gpt(**change)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="tiny"):
        GPTConfig.preset("huge")


def test_more_tokens_than_the_block_size_are_refused(model):
    with pytest.raises(ValueError, match="block size"):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_recomputing_the_blocks_changes_no_gradient_and_keeps_less(idx):
    model = make_gpt(dropout=0.1).train()
    loss, gradients, kept = loss_gradients_and_bytes_kept(model, idx, recompute=False)
    again, gradients_again, kept_less = loss_gradients_and_bytes_kept(model, idx, recompute=True)
    assert torch.equal(loss, again)
    assert kept_less < kept
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, atol=1e-6, rtol=1e-5)


def loss_gradients_and_bytes_kept(model, idx, recompute):
    """A training step; the bytes are those that the forward pass keeps for the backward pass."""
    torch.manual_seed(0)
    model.recompute = recompute
    model.zero_grad()
    sizes = []

    def note(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits, loss = model(idx, idx)
        loss.backward()
    assert logits is not None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients, sum(sizes)


# ---- generation ----------------------------------------------------------------------------------

def uncached_greedy(model, idx, n):
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size:])
        token = logits[:, -1:].argmax(-1)
        idx = torch.cat((idx, token), dim=1)
    return idx


@pytest.mark.parametrize("prompt, n", [
    (1, 31),        # within the context
    (20, 30),       # across its end
    (32, 5),        # a full context, and beyond
    (40, 20),       # beyond from the start
])
def test_cached_greedy_equals_uncached_greedy(prompt, n):
    model = make_gpt(seed=3)
    idx = torch.randint(97, (3, prompt))
    assert torch.equal(model.generate(idx, n, temperature=0), uncached_greedy(model, idx, n))


def test_greedy_continuation_equals_transformers(tmp_path, model, idx):
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    expected = theirs.generate(
        idx, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(model.generate(idx, 12, temperature=0), expected)


def test_rows_stop_on_their_own_and_the_loop_stops_with_the_last(model, idx):
    free = model.generate(idx, 12, temperature=0)
    stop = free[0, 24].item()                       # a token that row 0 writes within the twelve
    stopped = model.generate(idx, 12, temperature=0, stop_token=stop)
    lengths = []
    for row, whole in zip(stopped[:, 20:].tolist(), free[:, 20:].tolist()):
        n = whole.index(stop) + 1 if stop in whole else 12
        assert row[:n] == whole[:n]
        assert set(row[n:]) <= {stop}
        lengths.append(n)
    assert stopped.size(1) == 20 + max(lengths)
    assert lengths[0] <= 5


def test_top_k_1_is_greedy(model, idx):
    greedy = model.generate(idx, 10, temperature=0)
    assert torch.equal(model.generate(idx, 10, temperature=1.0, top_k=1), greedy)


@pytest.mark.parametrize("settings, expected, tolerance", [
    ({}, [0.5, 0.3, 0.15, 0.05], 0.015),
    (dict(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068], 0.015),       # p² / sum(p²)
    (dict(top_k=2), [0.625, 0.375, 0.0, 0.0], 0.015),
    (dict(top_p=0.7), [0.625, 0.375, 0.0, 0.0], 0.015),
    (dict(top_p=0.01), [1.0, 0.0, 0.0, 0.0], 0.0),
])
def test_samples_follow_the_distribution_and_its_cuts(settings, expected, tolerance):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(20_000, 4)
    torch.manual_seed(0)
    tokens = sample(logits, **settings).flatten()
    shares = torch.bincount(tokens, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor(expected), atol=tolerance, rtol=0)


@pytest.mark.parametrize("bad", [
    dict(temperature=-1),
    dict(temperature=float("nan")),
    dict(top_k=0),
    dict(top_p=0.0),
    dict(top_p=1.5),
])
def test_bad_arguments_of_generate_are_refused(model, idx, bad):
    [name] = bad
    with pytest.raises(ValueError, match=name):
        model.generate(idx, 1, **bad)


def test_generating_from_an_empty_prompt_is_refused(model, idx):
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(idx[:, :0], 1)


@pytest.mark.parametrize("training", [True, False])
def test_generating_leaves_the_mode_as_it_was(model, idx, training):
    model.train(training)
    model.generate(idx, 2)
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_generating_leaves_training_mode_as_it_was_after_an_exception(
    model, idx, monkeypatch, exception
):
    modes = []

    def fail_at_the_second_token(context, cache):
        modes.append(model.training)
        if len(modes) == 2:
            raise exception
        return GPT.hidden(model, context, cache)

    monkeypatch.setattr(model, "hidden", fail_at_the_second_token)
    model.train()
    with pytest.raises(exception):
        model.generate(idx, 5)
    assert modes == [False, False]
    assert all(module.training for module in model.modules())


def test_generating_leaves_training_mode_as_it_was_if_the_logits_are_not_finite(model, idx):
    model.transformer.ln_f.weight.data[0] = float("nan")
    model.train()
    with pytest.raises(ArithmeticError, match="not finite"):
        model.generate(idx, 5)
    assert all(module.training for module in model.modules())
