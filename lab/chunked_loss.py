"""
The cross-entropy of a language model without its logits: computed for a few tokens at a time.

The logits are the largest tensor of a training step. For 8 × 1024 tokens and 50,257
vocabulary entries they are 1.6 GB in float32, and a plain loss makes several tensors
of that size. Here only one chunk of them exists at a time. The gradient of a chunk is
known as soon as the chunk is,

    ∂loss/∂logits = softmax(logits) - onehot(target),

so the forward pass turns it into the gradients of the hidden states and of the head at
once, and forgets the chunk. The backward pass only scales these gradients. A frozen
head, as under LoRA, gets none. (The same idea is in the Liger Kernel, Hsu et al. 2024,
and in Cut Cross-Entropy, Wijmans et al. 2024.)

    model.loss = functools.partial(chunked_loss, chunk=2**24)

Letters: N tokens, n tokens of a chunk, C channels, V vocabulary entries.
"""
import math

import torch
from torch.nn import functional as F

IGNORED = -100      # the target that does not count, as in F.cross_entropy


def chunked_loss(x, head, targets, chunk):
    """The mean cross-entropy in nats, for about `chunk` logits at a time.

    x (..., C) are the hidden states, head is an nn.Linear without bias whose weight
    is (V, C), targets (...) int64, where -100 is ignored. A chunk is a multiple of 8
    tokens. Returns (None, loss): there are no logits, and the loss () is float32, or
    float64 if x is.
    """
    wants_gradients = torch.is_grad_enabled()       # inside a Function's forward it is always off
    loss = ChunkedLoss.apply(
        x.flatten(0, -2), head.weight, targets.flatten(), chunk, wants_gradients
    )
    return None, loss


class ChunkedLoss(torch.autograd.Function):
    """The mean cross-entropy of x Wᵀ (N, V) against targets (N,), chunk by chunk."""

    @staticmethod
    def forward(ctx, x, W, targets, chunk, wants_gradients):
        device, V = x.device.type, len(W)
        ctx.dtype = dtype = x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        precise = torch.float32 if dtype.itemsize < 4 else dtype    # for sums and logarithms
        with torch.autocast(device, enabled=False):
            valid = targets != IGNORED
            n_valid = valid.sum()
            targets = targets.where(valid, 0)[:, None]      # (N, 1)
            x_low = x.to(dtype)
            W_low = padded_to_multiple_of_8(W.to(dtype))    # (V + padding, C)
            loss = torch.zeros((), dtype=precise, device=x.device)
            dx = []                                         # a part for each chunk
            head_trains = wants_gradients and ctx.needs_input_grad[1]
            dW = torch.zeros_like(W) if head_trains else None

            rows = max(8, chunk // V // 8 * 8)              # n
            for start in range(0, len(x), rows):
                part = slice(start, start + rows)
                logits = without_padding(x_low[part] @ W_low.t(), V)    # (n, V + padding)
                P, log_sums = softmax_and_log_sum_exp(logits, precise)
                target_logits = logits.gather(1, targets[part]).squeeze(1)
                losses = log_sums - target_logits           # (n,)
                # Not in place: torch.compile of torch 2.11 would lose the gradients.
                loss = loss + (losses * valid[part]).sum()
                if wants_gradients:
                    d_logits = minus_onehot(P, targets[part])
                    dx.append(d_logits @ W_low)             # of ignored tokens, too
                if head_trains:
                    x_valid = x_low[part] * valid[part, None]
                    dW = added(dW, (d_logits.t() @ x_valid)[:V])
                logits = P = d_logits = None                # freed before the next ones are made
            if wants_gradients:
                ctx.save_for_backward(torch.cat(dx) * valid[:, None], dW, n_valid)
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
        return dx, dW, None, None, None


def padded_to_multiple_of_8(W):
    """W (V, C) -> (V rounded up to a multiple of 8, C), filled with rows of zeros.

    GPT-2's V of 50,257 misaligns the matrix products: without padding they took 15 of
    the 39 ms of a 124M step on an H200. See without_padding.
    """
    missing = -len(W) % 8
    return F.pad(W, (0, 0, 0, missing)) if missing else W


def without_padding(logits, V):
    """The logits (n, V + padding) with -inf as those of the padding: probability 0."""
    if logits.size(1) == V:
        return logits
    if torch.compiler.is_compiling():       # it may lose writes in place
        is_padding = torch.arange(logits.size(1), device=logits.device) >= V
        return logits.masked_fill(is_padding, -math.inf)
    logits[:, V:] = -math.inf
    return logits


def softmax_and_log_sum_exp(logits, dtype):
    """The probabilities P = softmax(logits), and log Σ exp(logits) (n,) in `dtype`.

    The largest probability is exp(largest logit - log Σ exp(logits)). So P has the
    sum, and no float32 copy of the logits is needed to find it. That probability is
    never less than 1/V, so its logarithm is safe. If P is in bfloat16, it is rounded
    by up to 0.2%, which moves the loss of a token by up to 0.002 nats, up or down.
    """
    if torch.compiler.is_compiling():       # it makes one kernel of this, without the copy
        log_sums = logits.to(dtype).logsumexp(dim=1)
        P = (logits - log_sums[:, None]).exp().to(logits.dtype)
        return P, log_sums
    P = logits.softmax(dim=1)
    return P, logits.amax(dim=1).to(dtype) - P.amax(dim=1).to(dtype).log()


def minus_onehot(P, targets):
    """∂loss/∂logits = P - onehot(target), (n, V + padding), in the memory of P."""
    if torch.compiler.is_compiling():       # it may lose writes in place
        is_target = torch.arange(P.size(1), device=P.device) == targets
        return P - is_target.to(P.dtype)
    return P.scatter_add_(1, targets, P.new_full((1, 1), -1.0).expand(targets.shape))


def added(total, part):
    """total + part, in the memory of `total` unless this is compiled."""
    if torch.compiler.is_compiling():
        return total + part
    return total.add_(part)
