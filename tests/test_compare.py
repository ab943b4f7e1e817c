"""compare.py: what it measures is what was made, and what it predicts is what it measures."""
import time
from types import SimpleNamespace

import pytest
import torch

import compare
from compare import LiveBytes, bytes_of, measure_memory, measure_time, predict, size
from conftest import make_gpt
from lora_minimal import apply_lora
from train import Settings, Step


def step_of(lora=False, **changes):
    model = make_gpt(std=0.02).train()
    if lora:
        apply_lora(model)
    return Step(model, Settings(**{**dict(steps=10, batch_size=4, block_size=32, lr=1e-3), **changes}))


X = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(0))


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
    assert live.now == 4000 and live.peak == 12_000


def test_live_bytes_sees_the_backward_pass():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes([x]) as live:
        (x * 2).sum().backward()
        assert live.now == 8000, "the gradient remains"


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("changes", [dict(), dict(loss_chunk=97 * 16), dict(loss_chunk=97 * 16, recompute=True)])
def test_predicted_memory_is_measured_memory(lora, changes):
    step = step_of(lora, **changes)
    measured, (predicted, _) = measure_memory(step, X, X), predict(step, X)
    assert predicted["weights"] == measured["weights"] and predicted["gradients"] == measured["gradients"]
    assert predicted["optimizer"] == pytest.approx(measured["optimizer"], rel=0.01)
    assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.05)


def test_predicted_operations_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    step = step_of(lr=0.0)
    with FlopCounterMode(display=False) as counter:
        step.forward(X, X)
    _, operations = predict(step, X)
    attention = 2 * X.numel() * 2 * 64 * 32             # torch counts attention over all pairs, we over the causal half
    products = operations["forward"] - attention
    assert counter.get_total_flops() in (products, products + 2 * attention)
    assert operations["backward, weights"] == products


def test_lora_needs_no_gradient_of_a_weight_and_pays_thin_products():
    _, operations = predict(step_of(lora=True), X)
    assert operations["backward, weights"] == 0
    assert operations["thin products"] == 6 * X.numel() * 8 * 2 * (64 + 192 + 64 + 64 + 64 + 256 + 256 + 64)


def test_the_peak_is_no_less_than_what_lives_between_steps():
    m = measure_memory(step_of(), X, X)
    assert m["peak"] > m["weights"] + m["optimizer"] + max(m["activations"], m["gradients"])


def test_times_are_medians_of_alternating_steps():
    order = []

    class Sleeper:
        def __init__(self, name, seconds):
            self.name, self.seconds, self.settings = name, seconds, SimpleNamespace(accumulate=1)

        def forward(self, x, y):
            order.append(self.name)
            time.sleep(self.seconds)

        def backward(self, loss):
            time.sleep(2 * self.seconds)

        def update(self):
            pass

        def __call__(self, x, y):
            time.sleep(3 * self.seconds)

    times = measure_time({"a": Sleeper("a", 0.002), "b": Sleeper("b", 0.004)}, X, X, rounds=5, warmup=1)
    assert order == ["a", "b"] * 6
    assert 2 <= times["a"]["forward_ms"] < times["b"]["forward_ms"] and times["b"]["backward_ms"] >= 8
    assert times["a"]["step_ms"] >= 6 and times["a"]["optimizer_ms"] < 1


@pytest.mark.parametrize("n, text", [(0, "0 B"), (999, "999 B"), (4_353_024, "4.35 MB"), (1.5e12, "1.5e+03 GB")])
def test_sizes_are_readable(n, text):
    assert size(n) == text


def test_columns_stand_side_by_side():
    text = compare.side_by_side({"a": "one two three four five six", "b": "x"}, 50)
    assert text.splitlines() == ["a                         b", "------------------------  ------------------------",
                                 "one two three four five   x", "six"]


def test_columns_too_narrow_to_read_stand_below_one_another():
    assert compare.side_by_side({"a": "one two", "b": "x"}, 40) == "--- a\none two\n\n--- b\nx"


def test_a_training_that_ended_worse_than_it_began_is_said():
    method = {"memory": dict.fromkeys(("weights", "gradients", "optimizer", "activations", "peak"), 1e6),
              "time": {"step_ms": 1.0}, "checkpoint_bytes": 1e6, "style_bpb_after": 2.0}
    good, bad = ([{"bpb": 2.0}, {"bpb": last}] for last in (1.5, 2.5))
    report = {"methods": {"full": method, "lora": method}}
    assert not any("Diverged" in line for line in compare.findings(report, {"full": good, "lora": good}))
    assert "LoRA ended at 2.500 bits per byte, worse than the 2.000" in compare.findings(report, {"full": good, "lora": bad})[-1]
