"""lab/measure.py measures what was made; lab/predict.py predicts what is measured."""
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import make_gpt
from lab.measure import LiveBytes, bytes_of, measure_memory, measure_time, round_robin
from lab.predict import predict
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
    predicted, _ = predict(step, X)
    assert predicted["weights"] == measured["weights"]
    assert predicted["gradients"] == measured["gradients"]
    assert predicted["optimizer"] == pytest.approx(measured["optimizer"], rel=0.01)
    assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.05)


def test_the_peak_is_no_less_than_what_lives_between_steps():
    memory = measure_memory(step_of(), X, X)
    largest = max(memory["activations"], memory["gradients"])
    assert memory["peak"] > memory["weights"] + memory["optimizer"] + largest


# ---- operations ----------------------------------------------------------------------------------

def test_predicted_operations_are_what_torch_counts():
    step = step_of(lr=0.0)
    with FlopCounterMode(display=False) as counter:
        step.forward(X, X)
    _, operations = predict(step, X)
    # torch counts attention over all pairs of tokens, predict() over the causal half.
    attention = 2 * X.numel() * 2 * 64 * 32
    products = operations["forward"] - attention
    assert counter.get_total_flops() in (products, products + 2 * attention)
    assert operations["backward, weights"] == products


def test_lora_needs_no_gradient_of_a_weight_and_pays_thin_products():
    _, operations = predict(step_of(lora=True), X)
    assert operations["backward, weights"] == 0
    in_and_out_features = (64 + 192) + (64 + 64) + (64 + 256) + (256 + 64)
    assert operations["thin products"] == 6 * X.numel() * 8 * 2 * in_and_out_features


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


class Sleeper:
    """Looks like a train.Step; sleeps instead."""

    def __init__(self, name, seconds, order):
        self.name = name
        self.seconds = seconds
        self.order = order
        self.settings = SimpleNamespace(accumulate=1)
        self.can_be_captured = False

    def micro_batches(self, x, y):
        return [(x, y)]

    def forward(self, x, y):
        self.order.append(self.name)
        time.sleep(self.seconds)

    def backward(self, loss):
        time.sleep(2 * self.seconds)

    def update(self):
        pass

    def __call__(self, x, y):
        time.sleep(3 * self.seconds)


def test_times_are_medians_of_alternating_steps():
    order = []
    steps = {"a": Sleeper("a", 0.002, order), "b": Sleeper("b", 0.004, order)}
    times = measure_time(steps, X, X, rounds=5, warmup=1)
    assert order == ["a", "b"] * 6
    assert 2 <= times["a"]["forward_ms"] < times["b"]["forward_ms"]
    assert times["b"]["backward_ms"] >= 8
    assert times["a"]["step_ms"] >= 6
    assert times["a"]["optimizer_ms"] < 1
