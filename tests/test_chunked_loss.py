"""lab/chunked_loss.py: the plain loss and its gradients, without the logits."""
from functools import partial

import pytest
import torch

import lab.chunked_loss
from conftest import make_gpt
from gpt import plain_loss
from lab.chunked_loss import ChunkedLoss, chunked_loss, losses_and_gradients, mask_padding
from lab.measure import LiveBytes


def loss_and_gradients(model, idx, targets, chunk=0):
    """The loss of a model and {name: gradient}; chunk = 0 means the plain loss."""
    model.loss = partial(chunked_loss, chunk=chunk) if chunk else plain_loss
    model.zero_grad()
    logits, loss = model(idx, targets)
    loss.backward()
    assert (logits is None) == (chunk > 0)
    gradients = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradients[name] = p.grad.clone()
    return loss.detach(), gradients


def random_layer(n_tokens, n_channels, n_vocab, **kind):
    """Hidden states, a head and targets."""
    torch.manual_seed(0)
    x = torch.randn(n_tokens, n_channels, requires_grad=True, **kind)
    head = torch.nn.Linear(n_channels, n_vocab, bias=False, **kind)
    targets = torch.randint(n_vocab, (n_tokens,))
    return x, head, targets


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
    assert gradients.keys() == chunked_gradients.keys()
    assert ("transformer.wte.weight" in gradients) == (head == "trained")
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_chunked_loss_is_the_derivative_of_itself():
    x, head, targets = random_layer(13, 6, 11, dtype=torch.float64)

    def loss(x, W):
        return ChunkedLoss.apply(x, W, targets, 50, True, False)

    assert torch.autograd.gradcheck(loss, (x, head.weight))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss(x, head.weight), x, create_graph=True)


@pytest.mark.parametrize("chunk", [0, 97 * 16])
def test_the_loss_agrees_to_rounding_under_bfloat16_autocast(idx, chunk):
    model = make_gpt(std=0.1)
    exact, exact_gradients = loss_and_gradients(model, idx, idx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model, idx, idx, chunk)
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert gradients.keys() == exact_gradients.keys()
    for name, exact_gradient in exact_gradients.items():
        error = (gradients[name] - exact_gradient).norm()
        assert error < 0.05 * exact_gradient.norm() + 1e-4, name


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-6), (torch.bfloat16, 1e-4), (torch.float16, 1e-4),
])
def test_the_loss_is_that_of_its_logits_even_if_a_probability_vanishes(dtype, tolerance):
    x, head, targets = random_layer(4096, 16, 97)
    x, head = (100 * x).to(dtype), head.to(dtype)
    logits = (x @ head.weight.t()).float()
    exact = torch.nn.functional.cross_entropy(logits, targets)
    assert logits.softmax(dim=1).min() == 0
    _, loss = chunked_loss(x, head, targets, chunk=97 * 512)
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance)


def test_logits_never_exist_whole_with_the_chunked_loss():
    model = make_gpt(vocab_size=5000)
    idx = torch.randint(5000, (8, 32))
    model.loss = partial(chunked_loss, chunk=5000 * 16)
    whole = 8 * 32 * 5000 * 4
    model.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    with LiveBytes(model.parameters()) as live:
        before = live.now
        _, loss = model(idx, idx)
        loss.backward()
    assert live.peak - before < whole / 2


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_in_a_compiled_model_the_chunked_loss_has_the_same_gradients(idx, head):
    model = make_gpt()
    model.lm_head.weight.requires_grad_(head == "trained")
    loss, gradients = loss_and_gradients(model, idx, idx, chunk=97 * 16)
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    compiled_loss, compiled_gradients = loss_and_gradients(model, idx, idx, chunk=97 * 16)
    torch.testing.assert_close(compiled_loss, loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == compiled_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_what_is_done_with_the_logits_compiles_without_a_break():
    logits = mask_padding(torch.randn(26, 104), 97)
    targets = torch.randint(97, (26, 1))
    expected = losses_and_gradients(logits, targets, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(losses_and_gradients, backend="aot_eager", fullgraph=True)
    results = compiled(logits, targets, torch.float32)
    for result, tensor in zip(results, expected, strict=True):
        torch.testing.assert_close(result, tensor, atol=1e-6, rtol=1e-5)


def test_compile_asks_for_the_compiled_function(idx, monkeypatch):
    calls = []

    def noted(*args):
        calls.append(args)
        return losses_and_gradients(*args)

    monkeypatch.setattr(lab.chunked_loss, "compiled_losses_and_gradients", lambda: noted)
    model = make_gpt()
    for compile in (False, True):
        model.loss = partial(chunked_loss, chunk=97 * 16, compile=compile)
        model(idx, idx)
        assert bool(calls) == compile


def test_the_loss_without_gradients_is_the_loss_with_them(model, idx):
    model.loss = partial(chunked_loss, chunk=97 * 16)
    logits, loss = model(idx, idx)
    assert loss.requires_grad
    with torch.no_grad():
        logits_again, loss_again = model(idx, idx)
    assert logits is None and logits_again is None
    assert not loss_again.requires_grad
    assert torch.equal(loss_again, loss)


def test_the_loss_without_gradients_makes_no_gradients():
    x, head, targets = random_layer(2048, 64, 512)

    def extra_bytes():
        with LiveBytes([x, head.weight, targets]) as live:
            before = live.now
            chunked_loss(x, head, targets, chunk=512 * 8)
        return live.peak - before

    dx, dW = x.nbytes, head.weight.nbytes
    assert extra_bytes() > dx + dW
    with torch.no_grad():
        assert extra_bytes() < dW < dx
