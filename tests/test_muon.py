"""What must be true of Muon: it equals torch's, and skips a step without a trace."""
import pytest
import torch
from torch import nn

from lab.checkpoints import load_optimizer
from lab.muon import Muon, orthogonalized

SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32), (24, 8), (8, 32)]


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters, n):
    generator = torch.Generator().manual_seed(n)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_steps_equal_those_of_torch():
    ours, theirs = matrices(), matrices()
    optimizer = Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for n in range(4):
        give_gradients(ours, n)
        give_gradients(theirs, n)
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        # bfloat16 products may be added up in another order.
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 64, 16), (1, 32, 32)])
def test_an_orthogonalized_matrix_has_singular_values_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    X = orthogonalized(torch.randn(shape, generator=generator)).float()
    assert X.shape == shape
    values = torch.linalg.svdvals(X)
    assert values.max() < 1.3
    # Those of a square matrix start close to 0, and are still on their way to 1.
    if shape[1] != shape[2]:
        assert values.min() > 0.6


def test_an_orthogonalized_matrix_keeps_the_singular_vectors():
    M = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    in_its_basis = U.mT @ orthogonalized(M).float() @ Vh.mT
    off_diagonal = in_its_basis - torch.diag_embed(in_its_basis.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 0.05
    assert (in_its_basis.diagonal(dim1=1, dim2=2) > 0.6).all()


def test_each_matrix_is_orthogonalized_on_its_own():
    stack = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    stack[1] *= 1000
    alone = torch.cat([orthogonalized(M[None]) for M in stack])
    torch.testing.assert_close(orthogonalized(stack).float(), alone.float(), atol=0.02, rtol=0)


def test_a_zero_gradient_moves_nothing():
    p = nn.Parameter(torch.ones(4, 8))
    optimizer = Muon([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.zeros(4, 8)
    optimizer.step()
    assert torch.equal(p, torch.ones(4, 8))


def test_a_skipped_step_leaves_no_trace_whatever_the_gradients_are():
    skipping, others = matrices(), matrices()
    optimizer = Muon(skipping, lr=0.02)
    reference = Muon(others, lr=0.02)
    for n in range(3):
        give_gradients(skipping, n)
        give_gradients(others, n)
        optimizer.step(unless=torch.tensor(False))
        reference.step()
        for p in skipping:
            p.grad = torch.full_like(p, float("nan"))
        optimizer.step(unless=torch.tensor(True))
    for p, q in zip(skipping, others, strict=True):
        assert torch.equal(p, q)


def test_a_learning_rate_in_a_tensor_is_read_in_every_step():
    one, other = matrices(), matrices()
    lr = torch.tensor(0.02)
    by_tensor = Muon(one, lr=lr)
    by_number = Muon(other, lr=0.02)
    for n, factor in enumerate((1.0, 0.5, 0.25)):
        lr.fill_(0.02 * factor)
        by_number.param_groups[0]["lr"] = 0.02 * factor
        give_gradients(one, n)
        give_gradients(other, n)
        by_tensor.step()
        by_number.step()
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_its_state_continues_in_another_optimizer():
    straight, resumed = matrices(), matrices()
    first = Muon(straight, lr=0.02)
    second = Muon(resumed, lr=0.02)
    for n in range(2):
        for optimizer, parameters in ((first, straight), (second, resumed)):
            give_gradients(parameters, n)
            optimizer.step()
    third = Muon(resumed, lr=0.02)
    third.load_state_dict(second.state_dict())
    for optimizer, parameters in ((first, straight), (third, resumed)):
        give_gradients(parameters, 2)
        optimizer.step()
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)


def test_a_state_without_its_momenta_is_refused():
    optimizer = Muon(matrices(), lr=0.02)
    foreign = {"optimizer/1/0/momentum_buffer": torch.zeros(24, 8)}
    with pytest.raises(KeyError, match="momenta"):
        load_optimizer(optimizer, foreign, prefix="optimizer/1/")
