"""What must be true of a training step, of evaluate() and of train(), for any command."""
import math

import numpy as np
import pytest
import torch

from conftest import make_gpt
from data import Corpus, read_text, tokenize
from data.bpe import train_bpe
from gpt import GPT
from lab.capture import captured
from lab.measure import LiveBytes
from lab.models import load_model
from lab.settings import Settings, settings_for
from lora_minimal import apply_lora
from train import Step, evaluate, pretrain, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    dir = tmp_path_factory.mktemp("corpus")
    text = read_text("pirate", 0.1, dir)
    encoding = train_bpe(text.all_train, 400)
    return tokenize(text, encoding, dir, 32)


def settings(**changes):
    values = dict(steps=6, batch_size=4, block_size=32, lr=1e-2, eval_every=2)
    return Settings(**{**values, **changes})


# ---- a step --------------------------------------------------------------------------------------

def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = make_gpt()
    step = Step(model, settings(muon_lr=0.02))
    adamw, muon = [parameters_of(optimizer) for optimizer in step.optimizers]
    matrices = set()
    for name, p in model.named_parameters():
        if ".h." in name and p.dim() == 2:
            matrices.add(id(p))
    assert muon == matrices
    assert not adamw & muon
    assert adamw | muon == {id(p) for p in model.parameters()}


def parameters_of(optimizer):
    """The identities of the parameters that an optimizer trains."""
    found = set()
    for group in optimizer.param_groups:
        found |= {id(p) for p in group["params"]}
    return found


def test_the_learning_rate_rises_to_its_peak_and_falls_to_almost_zero():
    step = Step(make_gpt(), settings(steps=100, warmup=0.1, lr=1.0))
    rates = []
    for n in range(100):
        step.set_learning_rate(n)
        rates.append(step.optimizers[0].param_groups[0]["lr"])
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert 8 <= rates.index(max(rates)) <= 10
    assert rates[0] < 0.11
    assert rates[-1] < 0.02
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_compiled_step_is_captured_unless_that_is_refused():
    assert settings_for("lora", "cpu", compile=True).graph
    assert not settings_for("lora", "cpu", compile=True, graph=False).graph


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("lora", [False, True])
def test_a_captured_step_gives_the_losses_of_an_eager_one(lora):
    assert losses_on_cuda(lora, graph=True) == pytest.approx(
        losses_on_cuda(lora, graph=False), rel=1e-4
    )


def losses_on_cuda(lora, graph):
    """The losses of 30 steps, and a check that they were captured if they should be."""
    model = make_gpt(std=0.02).cuda().train()
    torch.manual_seed(0)
    if lora:
        apply_lora(model)
    step = Step(model, settings(steps=30, graph=graph, loss_chunk=97 * 16))
    take_step = captured(step)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for n in range(30):
        step.set_learning_rate(n)
        idx = torch.randint(97, (4, 33), generator=generator).cuda()
        loss = take_step(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
        losses.append(loss.item())
    if graph:
        assert take_step.graph is not None
    else:
        assert take_step is step
    return losses


# ---- evaluate() ----------------------------------------------------------------------------------

def test_bits_per_byte_of_a_uniform_guess_is_known(corpus):
    model = make_gpt(std=0.0, vocab_size=400)
    predicted_tokens = len(corpus.heldout) - 1
    expected = predicted_tokens * math.log2(400) / corpus.heldout_bytes
    assert evaluate(model, corpus, 32) == pytest.approx(expected, rel=1e-4)


def test_evaluating_with_the_loss_in_chunks_needs_less_memory_than_a_training_step():
    vocab_size, block_size = 20_000, 64
    model = make_gpt(vocab_size=vocab_size, block_size=block_size)
    step = Step(model, settings(batch_size=16, block_size=block_size, loss_chunk=2**20))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(vocab_size, (2, 16, block_size), generator=generator)
    step(x, y)                          # the optimizer makes its state
    with LiveBytes(tensors_of(step)) as training:
        step(x, y)

    # More tokens than evaluate() reads at a time.
    tokens = torch.randint(vocab_size, (6000,), generator=generator).numpy().astype(np.uint16)
    corpus = Corpus("random", tokens, tokens, heldout_bytes=6000, digest="")
    with LiveBytes(tensors_of(step)) as evaluating:
        evaluate(model, corpus, block_size)
    assert evaluating.peak < training.peak


def tensors_of(step):
    """The weights and the state of the optimizers."""
    tensors = list(step.model.parameters())
    for optimizer in step.optimizers:
        for state in optimizer.state.values():
            tensors += state.values()
    return tensors


def test_a_saved_base_is_what_was_evaluated(tmp_path):
    record = pretrain(
        "pirate", tmp_path, steps=4, batch_size=2, block_size=32, eval_every=2, device="cpu"
    )
    model, encoding, pretrained_on = load_model(tmp_path, "cpu")
    assert isinstance(model, GPT)
    assert pretrained_on == "pirate"
    text = read_text("pirate", 0.1, tmp_path)
    block_size = record["asked"]["settings"]["block_size"]
    corpus = tokenize(text, encoding, tmp_path / "tokens", block_size)
    best = min(point["bpb"] for point in record["curve"])
    assert evaluate(model, corpus, block_size) == pytest.approx(best, abs=1e-6)


# ---- train() -------------------------------------------------------------------------------------

def test_training_ends_with_the_best_weights_not_the_last(corpus, tmp_path):
    model = make_gpt(std=0.02, vocab_size=400)
    too_fast = settings(lr=0.3, grad_clip=0.0, steps=8, eval_every=1)
    curve = train(model, corpus, too_fast, tmp_path)
    best = min(point["bpb"] for point in curve)
    assert curve[-1]["bpb"] > best, "the learning rate should be so high that the end is not best"
    assert evaluate(model, corpus, 32) == pytest.approx(best, rel=1e-6)


def test_lora_training_does_not_change_a_bit_of_the_base(corpus, tmp_path):
    model = make_gpt(std=0.02, vocab_size=400)
    before = {name: p.clone() for name, p in model.named_parameters()}
    apply_lora(model)
    train(model, corpus, settings(), tmp_path)
    after = dict(model.named_parameters())
    for name, p in before.items():
        assert torch.equal(after[name], p), name
