"""lab/measure.py measures what was made; lab/predict.py predicts what is measured."""
import contextlib
import copy
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lab.measure
from conftest import make_gpt
from lab.measure import (
    LiveBytes,
    bytes_of,
    measure_memory,
    measure_time,
    phases_of,
    process_peak,
    round_robin,
    typical,
)
from lab.predict import predict
from lab.report import adds_up
from lab.settings import Settings
from lora_minimal import apply_lora
from train import Step

X = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(0))


def step_of(lora=False, **changes):
    model = make_gpt(std=0.02).train()
    if lora:
        apply_lora(model)
    settings = dict(steps=10, batch_size=4, block_size=32, lr=1e-3)
    return Step(model, Settings(**(settings | changes)))


# ---- memory --------------------------------------------------------------------------------------

def test_shared_memory_counts_once():
    x = torch.zeros(100)
    assert bytes_of([x, x[:50], x.view(10, 10), torch.zeros(10)]) == 440


def test_live_bytes_follows_births_and_deaths():
    start = torch.zeros(1000)
    with LiveBytes([start]) as live:
        assert live.now == 4000
        a = start + 1
        b = a * 2
        assert live.now == 12_000
        del a
        assert live.now == 8000
        a = b.view(10, 100)
        assert live.now == 8000
        del a, b
    assert live.now == 4000
    assert live.peak == 12_000


def test_live_bytes_sees_the_backward_pass():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes([x]) as live:
        (x * 2).sum().backward()
        assert live.now == 8000, "the gradient remains"


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("changes", [
    {},
    dict(loss_chunk=97 * 16),
    dict(loss_chunk=97 * 16, recompute=True),
])
def test_predicted_memory_is_measured_memory(lora, changes):
    step = step_of(lora, **changes)
    measured = measure_memory(step, X, X)
    predicted = predict(step, X)["memory"]
    assert predicted["weights"] == measured["weights"]
    assert predicted["gradients"] == measured["gradients"]
    assert predicted["optimizer"] == pytest.approx(measured["optimizer"], rel=0.01)
    assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.05)


def test_the_peak_is_no_less_than_what_lives_between_steps():
    memory = measure_memory(step_of(), X, X)
    largest = max(memory["activations"], memory["gradients"])
    assert memory["peak"] > memory["weights"] + memory["optimizer"] + largest


def test_the_gradient_of_the_head_that_the_chunked_loss_makes_ahead_is_no_activation():
    plain, chunked = step_of(), step_of(loss_chunk=97 * 16)
    saved = X.numel() * 97 * 4              # the log-probabilities
    difference = measure_memory(plain, X, X)["activations"]
    difference -= measure_memory(chunked, X, X)["activations"]
    assert difference == pytest.approx(saved, rel=0.05)
    head = chunked.model.lm_head.weight
    assert chunked.forward(X, X).grad_fn.head_gradient_bytes == head.nbytes > 0.05 * saved


def test_the_peak_of_the_process_remembers_what_was_freed():
    before = process_peak("cpu")["resident"]
    now = psutil.Process().memory_info().rss
    assert now <= before
    more = 100_000_000                      # above all that the process has held
    torch.ones((before - now + more) // 4)  # gone at once
    after = process_peak("cpu")["resident"]
    assert after - before == pytest.approx(more, rel=0.2)


# ---- operations ----------------------------------------------------------------------------------

def test_predicted_operations_are_what_torch_counts():
    step = step_of(lr=0.0)
    with FlopCounterMode(display=False) as counter:
        step.forward(X, X)
    operations = predict(step, X)["operations"]
    # torch counts attention over all pairs of tokens, predict() over the causal half.
    attention = 2 * X.numel() * 2 * 64 * 32
    products = operations["forward"] - attention
    assert counter.get_total_flops() in (products, products + 2 * attention)
    assert operations["backward, weights"] == products


def test_lora_needs_no_gradient_of_a_weight_and_pays_thin_products():
    operations = predict(step_of(lora=True), X)["operations"]
    assert operations["backward, weights"] == 0
    in_and_out_features = (64 + 192) + (64 + 64) + (64 + 256) + (256 + 64)
    in_both_blocks = X.numel() * 8 * 2 * in_and_out_features
    assert operations["forward, thin products"] == 2 * in_both_blocks
    assert operations["backward, thin products"] == 4 * in_both_blocks


@pytest.mark.parametrize("lora", [False, True])
def test_the_operations_done_ahead_are_those_that_no_gradient_saves(lora):
    step = step_of(lora)                    # a vocabulary that needs no padding
    step = Step(make_gpt(vocab_size=96).train().requires_grad_(not lora), step.settings)
    if lora:
        apply_lora(step.model)
    chunked = Step(step.model, Settings(**{**vars(step.settings), "loss_chunk": 96 * 16}))
    ahead = operations_forward(chunked)
    with torch.no_grad():
        ahead -= operations_forward(chunked)
    assert predict(chunked, X % 96)["ahead"] == ahead > 0


def operations_forward(step):
    with FlopCounterMode(display=False) as counter:
        step.forward(X % 96, X % 96)
    return counter.get_total_flops()


def test_the_plain_loss_does_nothing_ahead():
    assert predict(step_of(), X)["ahead"] == 0


# ---- time ----------------------------------------------------------------------------------------

def test_a_round_robin_alternates_and_drops_the_warm_up():
    calls = []

    def sampler(name):
        def sample():
            calls.append(name)
            return len(calls)
        return sample

    samplers = {"a": sampler("a"), "b": sampler("b"), "c": sampler("c")}
    results = round_robin(samplers, rounds=2, warmup=1)
    assert calls == ["a", "b", "c"] * 3
    assert results == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}


def test_a_round_robin_without_warm_up_keeps_every_round():
    assert round_robin({"a": lambda: 1}, rounds=3) == {"a": [1, 1, 1]}


def test_typical_times_add_up_and_a_disturbance_does_not_count():
    samples = [{"a": 1.0, "b": 2.0}] * 3 + [{"a": 2.0, "b": 3.0}] * 3
    samples += [{"a": 100.0, "b": 1.0}, {"a": 0.1, "b": 0.1}]
    assert typical(samples) == {"a": 1.5, "b": 2.5}


class Clock:
    """Takes the place of lab.measure.clock, and goes on when something sleeps."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, device):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds


@pytest.fixture
def a_clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(lab.measure, "clock", clock)
    return clock


class Sleeper:
    """Looks like a train.Step; sleeps instead. A loss in chunks takes longer with gradients."""

    def __init__(self, clock, seconds=0.0, loss_chunk=0):
        self.clock = clock
        self.seconds = seconds
        self.starts = []
        self.settings = SimpleNamespace(accumulate=1, loss_chunk=loss_chunk, compile=False)
        self.averaging = SimpleNamespace(micro_batch=lambda is_last: contextlib.nullcontext())
        self.model = SimpleNamespace(loss=self.loss)
        self.can_be_captured = False

    def micro_batches(self, x, y):
        return [(x, y)]

    def loss(self, hidden, head, targets):
        self.clock.sleep(0.025 if torch.is_grad_enabled() else 0.005)
        return torch.zeros(())

    def forward(self, x, y):
        self.starts.append(self.clock.seconds)
        self.clock.sleep(self.seconds)
        if self.settings.loss_chunk:
            return self.model.loss(x.float(), None, y)
        return torch.zeros(())

    def backward(self, loss):
        self.clock.sleep(2 * self.seconds)

    def update(self):
        self.clock.sleep(0.001)


def test_the_methods_are_timed_in_turn(a_clock):
    steps = {"a": Sleeper(a_clock, 0.002), "b": Sleeper(a_clock, 0.004)}
    times = measure_time(steps, X, X, rounds=5, warmup=1)
    starts = zip(steps["a"].starts, steps["b"].starts, strict=True)
    in_order = [start for pair in starts for start in pair]
    assert len(in_order) == 12
    assert in_order == sorted(in_order)
    assert times["a"] == pytest.approx({
        "forward_ms": 2, "backward_ms": 4, "optimizer_ms": 1, "step_ms": 7, "ahead_ms": 0,
        "captured": False,
    })
    assert times["b"]["step_ms"] == pytest.approx(13)


def test_what_the_loss_computes_ahead_is_timed_as_backward(a_clock):
    sleeper = Sleeper(a_clock, seconds=0.001, loss_chunk=1)
    times = measure_time({"it": sleeper}, X, X, rounds=5, warmup=1)["it"]
    assert times == pytest.approx({
        "forward_ms": 1 + 5, "backward_ms": 2 + 20, "optimizer_ms": 1, "step_ms": 29,
        "ahead_ms": 20, "captured": False,
    })


def test_measuring_the_loss_leaves_the_model_its_loss():
    step = step_of(lora=True, loss_chunk=97 * 16)
    loss = step.model.loss
    measure_time({"lora": step}, X, X, rounds=1, warmup=0)
    assert step.model.loss is loss


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("changes", [{}, dict(loss_chunk=97 * 16, accumulate=2)])
def test_the_phases_in_their_order_are_a_step(lora, changes):
    step = step_of(lora, **changes)
    twin = Step(copy.deepcopy(step.model), step.settings)
    step(X, X)
    for _, function in phases_of(twin, X, X):
        function()
    for name, p in step.trained.items():
        assert torch.equal(p, twin.trained[name]), name


@pytest.mark.parametrize("lora", [False, True])
def test_the_phases_add_up_to_the_step(lora):
    step = step_of(lora, loss_chunk=97 * 16)
    times = measure_time({"it": step}, X, X, rounds=4, warmup=1)["it"]
    parts = times["forward_ms"] + times["backward_ms"] + times["optimizer_ms"]
    assert parts == pytest.approx(times["step_ms"], rel=0.001)
    assert adds_up(times)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("changes", [
    {}, dict(accumulate=2), dict(recompute=True), dict(dropout=0.1),
])
def test_captured_phases_add_up_to_the_captured_step(changes):
    steps = {"full": cuda_step(False, **changes), "lora": cuda_step(True, **changes)}
    idx = torch.randint(4096, (16, 257), generator=torch.Generator().manual_seed(0)).cuda()
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    for _ in range(3):                      # another process may disturb one measurement
        times = measure_time(steps, x, y)
        if all(map(adds_up, times.values())):
            break
    for name, of_step in times.items():
        assert of_step["captured"]
        assert adds_up(of_step), (name, of_step)
        assert of_step["ahead_ms"] > 0
    assert times["full"]["ahead_ms"] > times["lora"]["ahead_ms"]


def cuda_step(lora, dropout=0.0, **changes):
    """A step of a few milliseconds: 25M parameters, 16 × 256 tokens."""
    shape = dict(vocab_size=4096, block_size=256, n_layer=6, n_embd=512, n_head=8)
    model = make_gpt(std=0.02, dropout=dropout, **shape).cuda().train()
    if lora:
        apply_lora(model)
    settings = dict(steps=10, batch_size=16, block_size=256, lr=1e-4, loss_chunk=2**22)
    return Step(model, Settings(**settings, dtype="bfloat16", **changes))
