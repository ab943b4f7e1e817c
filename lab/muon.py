"""
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): an optimizer
for the matrices of a model's blocks. Pretraining uses it here, because it learns more
in the same time than AdamW (docs/measurements.md); fine-tuning uses AdamW alone.

SGD with momentum moves a weight matrix along M, a running mean of its gradients. A few
directions dominate M: most of its singular values are small. Muon replaces M = U S Vᵀ
by the orthogonal matrix U Vᵀ, whose singular values are all 1. So the weight moves
equally far along every singular direction.

It needs no singular value decomposition. A polynomial with odd powers only,

    p(X) = a X + b (X Xᵀ) X + c (X Xᵀ)² X

has the singular vectors of X, and turns each singular value s into a s + b s³ + c s⁵.
M is first divided by its Frobenius norm, the square root of the sum of its squared
entries. No singular value is larger than that norm, so now all are at most 1. Applying
p a few times drives them towards 1 (a Newton-Schulz iteration). That takes a handful of
matrix products, which GPUs are best at. All matrices of one shape are computed together,
in one batched product, because many small ones would not fill a GPU.
"""
import math

import torch

# a, b, c. An iteration multiplies a small singular value by a: the larger a is, the
# fewer iterations it takes. Jordan et al. chose about the largest a that still brings
# values to a band around 1 instead of to 1 itself, which does not matter for training.
# After five iterations, all values that were 0.0015 or more are between 0.68 and 1.2.
# Smaller ones end below that.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(M):
    """U Vᵀ, approximately, for each matrix M = U S Vᵀ of a stack (n, rows, columns).

    On a GPU it is computed and returned in bfloat16, whose 8 bits of precision are
    enough. Many CPUs compute in bfloat16 ten times slower than in float32, so there
    it is float32.
    """
    a, b, c = COEFFICIENTS
    X = M.to(torch.bfloat16 if M.is_cuda else torch.float32)
    is_tall = X.size(1) > X.size(2)
    if is_tall:
        X = X.mT                # X Xᵀ now has the shorter side of M, not the longer
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)    # so S is at most 1
    for _ in range(ITERATIONS):
        XX = X @ X.mT
        P = torch.baddbmm(XX, XX, XX, beta=b, alpha=c)      # b X Xᵀ + c (X Xᵀ)²
        X = torch.baddbmm(X, P, X, beta=a)                  # a X + P X
    return X.mT if is_tall else X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized. The parameters must be matrices.

    lr is a number, or a tensor () if the step is captured in a CUDA graph. The update
    is that of torch.optim.Muon. What differs: matrices of one shape are computed
    together, and a step can be skipped without waiting for the GPU. q, k and v of
    GPT-2 are one matrix, c_attn, and it is orthogonalized as one.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        for group in self.param_groups:
            for matrices in of_one_shape(group["params"]):
                # One tensor has the momenta of all matrices of a shape. It is kept as
                # the state of the first of them.
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
        share_of_G = 1 - momentum
        if unless is not None:
            # An `if` would wait for the GPU. Instead, the gradients and the factors of
            # the step become 0.
            G.masked_fill_(unless, 0.0)
            lr = lr * ~unless
            share_of_G = share_of_G * ~unless
        M = self.state[matrices[0]]["momenta"]
        M.lerp_(G, share_of_G)                                  # the running mean
        lookahead = G.lerp(M, momentum)                         # Nesterov
        change = orthogonalized(lookahead).to(G.dtype)
        # The root mean square of the entries of U Vᵀ is 1 / √(its longer side). With
        # this factor it is 1 / √columns for every shape.
        rows, columns = matrices[0].shape
        change *= lr * math.sqrt(max(1, rows / columns))
        decay = 1 - lr * group["weight_decay"]
        for p, change_of_p in zip(matrices, change):
            p.mul_(decay)
            p.sub_(change_of_p)


def of_one_shape(matrices):
    """The matrices as lists of one shape each."""
    lists = {}
    for p in matrices:
        lists.setdefault(p.shape, []).append(p)
    return list(lists.values())
