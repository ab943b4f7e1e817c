"""
The cross-entropy of a language model, without holding all of its logits at a time.

The logits are the largest tensor of a training step. For 8 × 1024 tokens and 50,257
vocabulary entries they are 1.6 GB in float32, and a plain loss makes several tensors
of that size. Here only a chunk of them, the logits of a few tokens, exists at a time.
As soon as they are computed, their gradient is known, too:

    ∂loss/∂logits = softmax(logits) - onehot(target)

So the forward pass also computes the gradients of the hidden states and of the head,
chunk by chunk, and frees each chunk. The backward pass only scales these gradients. A
frozen head, as under LoRA, gets none. (The same idea is in the Liger Kernel, Hsu et al. 2024,
and in Cut Cross-Entropy, Wijmans et al. 2024.)

    model.loss = functools.partial(chunked_loss, chunk=2**24)

Letters: N tokens, n tokens of a chunk, C channels, V vocabulary entries.
"""
import functools
import math

import torch
from torch.nn import functional as F

IGNORED = -100      # the target that does not count, as in F.cross_entropy


@torch.compiler.disable     # compiled with the model, it would keep the logits of all chunks
def chunked_loss(x, head, targets, chunk, compile=False):
    """The mean cross-entropy in nats, for about `chunk` logits at a time.

    x (..., C) are the hidden states, head is an nn.Linear without bias whose weight
    is (V, C), targets (...) int64, where -100 is ignored. A chunk has chunk / V tokens,
    rounded down to a multiple of 8, but at least 8. compile: compile what is done with
    the logits of a chunk. Returns (None, loss): there are no logits, and the loss () is
    float32, or float64 if x is.
    """
    wants_gradients = torch.is_grad_enabled()       # inside a Function's forward it is always off
    loss = ChunkedLoss.apply(
        x.flatten(0, -2), head.weight, targets.flatten(), chunk, wants_gradients, compile
    )
    return None, loss


class ChunkedLoss(torch.autograd.Function):
    """The mean cross-entropy of x Wᵀ (N, V) against targets (N,), chunk by chunk."""

    @staticmethod
    def forward(ctx, x, W, targets, chunk, wants_gradients, compile):
        device, V = x.device.type, len(W)
        dtype = x.dtype                             # of the products
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        sum_dtype = torch.float32 if dtype.itemsize < 4 else dtype
        with torch.autocast(device, enabled=False):
            valid = targets != IGNORED
            n_valid = valid.sum()
            targets = targets.where(valid, 0)[:, None]      # (N, 1)
            x_cast = x.to(dtype)
            W_cast = padded_to_multiple_of_8(W.to(dtype))   # (V + padding, C)
            loss = torch.zeros((), dtype=sum_dtype, device=x.device)
            dx = []                                         # a part for each chunk
            head_trains = wants_gradients and ctx.needs_input_grad[1]
            dW = torch.zeros_like(W) if head_trains else None

            compute = losses_and_gradients
            if compile:
                compute = compiled_losses_and_gradients()
            rows = max(8, chunk // V // 8 * 8)              # n
            for start in range(0, len(x), rows):
                part = slice(start, start + rows)
                logits = mask_padding(x_cast[part] @ W_cast.t(), V)    # (n, V + padding)
                losses, d_logits = compute(logits, targets[part], sum_dtype)
                loss += (losses * valid[part]).sum()
                if wants_gradients:
                    dx.append(d_logits @ W_cast)            # of ignored tokens, too
                if head_trains:
                    x_valid = x_cast[part] * valid[part, None]
                    dW += (d_logits.t() @ x_valid)[:V]
                logits = d_logits = None                # freed before the next ones are made
            if wants_gradients:
                ctx.save_for_backward(torch.cat(dx) * valid[:, None], dW, n_valid)
            ctx.dtype = x.dtype
            ctx.head_gradient_bytes = dW.nbytes if head_trains else 0   # for lab/measure.py
        return loss / n_valid

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ChunkedLoss has no second derivative; the loss with loss_chunk = 0 has"
            )
        dx, dW, n_valid = ctx.saved_tensors
        # The mean is taken here, and not before, because g may be large: in float16 a
        # gradient divided by n_valid could be lost before it is scaled (lab/loss_scale.py).
        share = g / n_valid
        dx = (dx * share).to(ctx.dtype)
        dW = None if dW is None else dW * share
        return dx, dW, None, None, None, None


def padded_to_multiple_of_8(W):
    """W (V, C) -> (V rounded up to a multiple of 8, C), filled with rows of zeros.

    GPT-2's V of 50,257 misaligns the matrix products: without padding they took 15 of
    the 39 ms of a 124M step on an H200. See mask_padding.
    """
    missing = -len(W) % 8
    return F.pad(W, (0, 0, 0, missing)) if missing else W


def mask_padding(logits, V):
    """Set the padding of the logits (n, V + padding) to -inf, so that softmax makes it 0."""
    logits[:, V:] = -math.inf
    return logits


def losses_and_gradients(logits, targets, dtype):
    """The cross-entropies (n,) in `dtype`, and ∂loss/∂logits = softmax(logits) - onehot(targets).

    The loss of a token is log Σ exp(logits) - logits[target]. The sum need not be
    computed again: the largest probability p is exp(largest logit) / Σ exp(logits), so
    log Σ exp(logits) = largest logit - log p. p is at least 1/V, so log p is safe. In
    bfloat16 p is rounded by up to 0.2%, which moves the loss of a token by up to 0.002
    nats, up or down.
    """
    P = logits.softmax(dim=1)                               # (n, V + padding)
    largest_logits = logits.amax(dim=1).to(dtype)           # (n,)
    largest_probabilities = P.amax(dim=1).to(dtype)         # (n,)
    log_sums = largest_logits - largest_probabilities.log()
    losses = log_sums - logits.gather(1, targets).squeeze(1)
    minus_one = P.new_full((1, 1), -1.0)
    d_logits = P.scatter_add_(1, targets, minus_one.expand(targets.shape))
    return losses, d_logits


@functools.cache
def compiled_losses_and_gradients():
    """losses_and_gradients in fewer kernels, which read and write the logits less often."""
    return torch.compile(losses_and_gradients)
