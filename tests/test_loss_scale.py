"""Training in float16: the loss is scaled, and the scale finds its size."""
import pytest
import torch

from conftest import make_gpt
from lab.chunked_loss import chunked_loss
from lab.loss_scale import DOUBLE_AFTER, FIRST, LossScale
from lab.settings import Settings
from lora_minimal import apply_lora
from train import Step

BAD, GOOD = torch.tensor(True), torch.tensor(False)


def settings(**changes):
    values = dict(steps=4, batch_size=2, block_size=16, lr=1e-2)
    return Settings(**{**values, **changes})


def adapted_step(**changes):
    model = make_gpt(std=0.05)
    apply_lora(model, r=4)
    base_dtype = changes.get("base_dtype", "float32")
    if base_dtype == "float16":
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.half()
    return Step(model.train(), settings(**changes))


def gradients(step, idx):
    loss = step.forward(idx, idx)
    step.backward(loss)
    step.loss_scale.unscale(step.trained.values())
    return {name: p.grad for name, p in step.trained.items()}


def test_the_scale_halves_after_a_bad_step_and_doubles_after_many_good_ones():
    scale = LossScale(True, "cpu")
    scale.update(BAD)
    assert scale.value == FIRST / 2
    for _ in range(DOUBLE_AFTER - 1):
        scale.update(GOOD)
    assert scale.value == FIRST / 2
    scale.update(GOOD)
    assert scale.value == FIRST
    for _ in range(40):
        scale.update(BAD)
    assert scale.value == 1


def test_without_float16_nothing_is_scaled():
    step = adapted_step()
    loss = torch.ones((), requires_grad=True)
    assert step.loss_scale.scaled(loss) is loss
    assert not step.loss_scale.enabled


@pytest.mark.parametrize("base_dtype", ["float32", "float16"])
@pytest.mark.parametrize("loss_chunk", [0, 2**10])
def test_gradients_in_float16_are_near_those_in_float32(idx, base_dtype, loss_chunk):
    half = adapted_step(dtype="float16", base_dtype=base_dtype, loss_chunk=loss_chunk)
    expected = gradients(adapted_step(), idx[:, :16])
    for name, gradient in gradients(half, idx[:, :16]).items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm()
        assert error <= 0.02 * expected[name].norm() + 1e-7, name


def test_a_gradient_that_float16_cannot_hold_survives_because_it_is_scaled():
    """A share of 1 / 4096 of a small gradient is below 6e-8."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 100, bias=False).half()
    head.weight.data.mul_(3e-4)
    x = torch.randn(4096, 8).half().requires_grad_()
    targets = torch.randint(100, (4096,))
    _, loss = chunked_loss(x, head, targets, chunk=2**12)
    (loss * FIRST).backward()
    exact = x.detach().double().requires_grad_()
    logits = exact @ head.weight.double().t()
    torch.nn.functional.cross_entropy(logits, targets).backward()
    assert exact.grad.abs().max() < 6e-8
    scaled = x.grad.double() / FIRST
    assert (scaled - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_a_step_that_overflows_changes_no_weight_and_lowers_the_scale(idx):
    step = adapted_step(dtype="float16")
    step.loss_scale.value.fill_(2.0**40)
    before = {name: p.clone() for name, p in step.trained.items()}
    step(idx[:2, :16], idx[:2, :16])
    assert step.skipped == 1
    assert step.skipped_in_a_row == 0, "a lower scale may help"
    assert step.loss_scale.value == 2.0**39
    for name, p in step.trained.items():
        assert torch.equal(p, before[name])


def test_gradients_that_stay_infinite_count_once_the_scale_cannot_fall():
    step = adapted_step(dtype="float16")
    step.loss_scale.value.fill_(2.0)
    for _ in range(3):
        for p in step.trained.values():
            p.grad = torch.full_like(p, float("nan"))
        step.update()
    assert step.skipped == 3
    assert step.skipped_in_a_row == 2


def test_a_checkpoint_holds_the_scale():
    scale = LossScale(True, "cpu")
    scale.update(BAD)
    scale.update(GOOD)
    other = LossScale(True, "cpu")
    other.load(scale.state())
    assert other.state() == scale.state() == [FIRST / 2, 1]
