"""
What can be seen in weights: spectra, shared directions, intruder dimensions.

Letters: W (out, in) is a weight of the base, D = ΔW (out, in) what tuning added to it.
"""
import torch

LEADING = 10        # singular vectors of a tuned weight in which intruders are looked for
SIMILAR = 0.5       # an intruder has a cosine below this with every singular vector of the base


def is_adapted(name):
    """Whether a parameter of a GPT is the weight of a linear layer in a block."""
    return ".c_" in name and name.endswith(".weight")


def matrices(weights):
    """{name: W (out, in)} of the linear layers in the blocks; q, k and v of c_attn apart."""
    found = {}
    for name, weight in weights.items():
        if not is_adapted(name):
            continue
        path = name.removesuffix(".weight")
        if path.endswith("c_attn"):
            for letter, part in zip("qkv", weight.chunk(3)):
                found[f"{path}.{letter}"] = part
        else:
            found[path] = weight
    return found


def changes(weights, base):
    """{name: D} of the matrices() of a tuned model."""
    before = matrices(base)
    return {name: after - before[name] for name, after in matrices(weights).items()}


def svd(matrix):
    """U (out, n), S (n,), Vh (n, in) in float32, n the smaller side.

    Computed from the eigenvectors of the smaller of MᵀM and MMᵀ, in float64: several
    hundred of them are needed, and these are the smallest eigenproblems that will do.
    Directions whose singular value is zero, to 8 digits, are zero vectors on one side.
    """
    M = matrix.double()
    if M.size(0) < M.size(1):
        U, S, Vh = svd(M.t())
        return Vh.t(), S, U.t()
    squares, V = torch.linalg.eigh(M.t() @ M)               # ascending
    S = squares.flip(0).clamp(min=0).sqrt()
    V = V.flip(1)
    inverse = torch.where(1e-8 * S[0] < S, 1 / S, 0.0)
    U = (M @ V) * inverse
    return U.float(), S.float(), V.t().float()


def rank_for_energy(matrix, energy=0.9):
    """How many singular values have a share of the sum of all their squares."""
    _, S, _ = svd(matrix)
    squares = S.double()**2
    reached = squares.cumsum(0) >= energy * squares.sum()
    return int(reached.int().argmax()) + 1


def truncated(weights, base, factors, rank):
    """The weights with D cut to its `rank` largest singular values, in each linear layer.

    factors {name of a parameter: (U, S, Vh) of its D}. Everything else stays as tuned.
    """
    found = dict(weights)
    for name, (U, S, Vh) in factors.items():
        found[name] = base[name] + (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return found


def change_factors(weights, base):
    """{name of a parameter: (U, S, Vh) of its D} of the linear layers, q, k, v together."""
    found = {}
    for name in weights:
        if is_adapted(name):
            found[name] = svd(weights[name] - base[name])
    return found


def overlap(V1, V2):
    """φ (Hu et al. 2021, §7.2): how much of the span of V1 (in, i) is in that of V2 (in, j).

    Both have orthonormal columns. From 0 (orthogonal) to 1 (contained).
    """
    smaller = min(V1.size(1), V2.size(1))
    return float((V1.t() @ V2).square().sum() / smaller)


def amplification(D, W, r):
    """‖D‖ / ‖Uᵀ W V‖, with U and V the first r singular vectors of D (Hu et al. 2021, §7.3)."""
    U, S, Vh = svd(D)
    within = U[:, :r].t() @ W.float() @ Vh[:r].t()
    return float(S[:r].norm() / within.norm())


def intruders(U, U_tuned):
    """Which of the leading singular vectors of a tuned weight are intruder dimensions.

    U and U_tuned (out, n) are the left singular vectors of the weight before and
    after. Returns (LEADING or n,) bool: whether the vector has a cosine below SIMILAR
    with every one of the base's (Shuttleworth et al. 2024, §3).
    """
    similar = (U_tuned[:, :LEADING].t() @ U).abs().amax(dim=1)
    return similar < SIMILAR


def without_intruders(W, tuned, factor):
    """The tuned weight with the singular values of its intruders multiplied by `factor`."""
    U, S, Vh = svd(tuned)
    which = intruders(svd(W)[0], U)
    lost = torch.zeros_like(S)
    lost[:len(which)] = (1 - factor) * S[:len(which)] * which
    return tuned.float() - (U * lost) @ Vh


def random_update(D, r, generator):
    """A product of two random matrices of rank r, as large as D in the Frobenius norm."""
    shape = dict(generator=generator, device=D.device)
    B = torch.randn(D.size(0), r, **shape)
    A = torch.randn(r, D.size(1), **shape)
    update = B @ A
    return update * (D.norm() / update.norm())
