"""
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): an optimizer for the
matrices of a model's blocks.

SGD with momentum moves a weight matrix along M, a running mean of its gradients. A few
directions dominate M: most of its singular values are small. Muon replaces M = U S Vᵀ by
the orthogonal matrix U Vᵀ, which moves the weight equally far in all of these directions.

It needs no singular value decomposition. For a polynomial p with odd powers only,

    p(X) = a X + b (X Xᵀ) X + c (X Xᵀ)² X        has the singular vectors of X, and turns
                                                 each singular value s into p(s)

so applying p a few times to M / |M|, whose singular values are at most 1, drives all of
them towards 1 (a Newton-Schulz iteration). That is a handful of matrix products, which
GPUs are best at. All matrices of one shape are computed together: with one batched
product in the place of many small ones, the GPU is busy.
"""
import math

import torch

# p(s) = a s + b s³ + c s⁵. Near 0 it multiplies by a: the larger a is, the fewer
# iterations small singular values need. These coefficients have about the largest a for
# which five iterations still bring them to between 0.7 and 1.2. They never converge to 1
# exactly, which does not harm training.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(M):
    """U Vᵀ, approximately, for each matrix M = U S Vᵀ of a stack (n, rows, columns).

    Computed and returned in bfloat16, whose three digits are enough for it.
    """
    a, b, c = COEFFICIENTS
    X = M.bfloat16()
    is_tall = X.size(1) > X.size(2)
    if is_tall:
        X = X.mT                            # X Xᵀ is then the smaller of the two products
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)    # singular values are now <= 1
    for _ in range(ITERATIONS):
        S = X @ X.mT
        P = torch.baddbmm(S, S, S, beta=b, alpha=c)             # b S + c S²
        X = torch.baddbmm(X, P, X, beta=a)                      # a X + (b S + c S²) X
    return X.mT if is_tall else X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized. The parameters must be matrices.

    lr is a number, or a tensor () if the step is captured in a CUDA graph. Computes
    what torch.optim.Muon computes, without waiting for the GPU.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        for group in self.param_groups:
            for matrices in of_one_shape(group["params"]):
                # The momenta of all matrices of one shape are the state of the first.
                shape = (len(matrices), *matrices[0].shape)
                self.state[matrices[0]]["momenta"] = matrices[0].new_zeros(shape)

    @torch.no_grad()
    def step(self, unless=None):
        """Move the matrices. If the tensor `unless` () is true, nothing changes."""
        for group in self.param_groups:
            for matrices in of_one_shape(group["params"]):
                self.move(matrices, group, unless)

    def move(self, matrices, group, unless):
        """One step for n matrices (rows, columns) of one shape."""
        lr, momentum = group["lr"], group["momentum"]
        G = torch.stack([p.grad for p in matrices])             # (n, rows, columns)
        pace = 1 - momentum
        if unless is not None:
            # Instead of an `if`, which would wait for the GPU: gradients that are not
            # finite become 0, and all factors of the step too.
            G.masked_fill_(unless, 0.0)
            lr = lr * ~unless
            pace = pace * ~unless
        M = self.state[matrices[0]]["momenta"]
        M.lerp_(G, pace)                                        # the running mean
        ahead = G.lerp(M, momentum)                             # Nesterov: look one step ahead
        rows, columns = matrices[0].shape
        size = math.sqrt(max(1, rows / columns))                # as much for each output of W
        change = orthogonalized(ahead).to(G.dtype) * (lr * size)
        keep = 1 - lr * group["weight_decay"]
        for p, change_of_p in zip(matrices, change):
            p.mul_(keep)
            p.sub_(change_of_p)


def of_one_shape(matrices):
    """The matrices as lists of one shape each."""
    lists = {}
    for p in matrices:
        lists.setdefault(p.shape, []).append(p)
    return list(lists.values())
