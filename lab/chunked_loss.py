"""
The cross-entropy of a language model without its logits: computed for a few tokens at a time.

The logits are the largest tensor of a training step. For 8 × 1024 tokens and 50,257
vocabulary entries they are 1.6 GB in float32, and a plain loss makes several tensors
of that size. Here only one chunk of them exists at a time. The gradient of a chunk is
known as soon as the chunk is,

    ∂loss/∂logits = softmax(logits) - onehot(target),

so it is turned into the gradients of the hidden states and of the head at once, and
the chunk is forgotten. A frozen head, as under LoRA, gets no gradient.

    model.loss = functools.partial(chunked_loss, chunk=2**24)

Letters: N tokens, n tokens of a chunk, C channels, V vocabulary entries.
"""
import torch
from torch.nn import functional as F

IGNORED = -100      # the target that does not count, as in F.cross_entropy


def chunked_loss(x, head, targets, chunk):
    """The mean cross-entropy in nats, for about `chunk` logits at a time.

    x (..., C) are the hidden states, head is an nn.Linear without bias whose weight
    is (V, C), targets (...) int64; those of -100 do not count. A chunk is a multiple
    of 8 tokens. Returns (None, loss): there are no logits.
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
                logits = x_low[part] @ W_low.t()            # (n, V + padding)
                log_p = logits[:, :V].log_softmax(dim=-1, dtype=precise)
                log_p_target = log_p.gather(1, targets[part])               # (n, 1)
                # Not in place: torch.compile of torch 2.11 would lose the gradients.
                loss = loss - (log_p_target.squeeze(1) * valid[part]).sum()
                if wants_gradients:
                    logits = to_gradient(logits, log_p, log_p_target, targets[part])
                    dx.append(logits @ W_low)               # of ignored tokens, too
                if head_trains:
                    x_valid = x_low[part] * valid[part, None]
                    dW = added(dW, (logits.t() @ x_valid)[:V])
                del logits, log_p                           # before the next ones are made
            if wants_gradients:
                ctx.save_for_backward(torch.cat(dx) * valid[:, None], dW, n_valid)
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

    GPT-2's V of 50,257 misaligns the matrix products: they took 15 of 39 ms of a 124M
    step on an H200. The softmax does not see the padding.
    """
    missing = -len(W) % 8
    return F.pad(W, (0, 0, 0, missing)) if missing else W


def to_gradient(logits, log_p, log_p_target, targets):
    """softmax(logits) - onehot(target), (n, V + padding), in the place of `logits`.

    The padding needs no care: its logits are zero already, since the rows of W are.
    """
    n_padding = logits.size(1) - log_p.size(1)
    d_target = log_p_target.exp() - 1                       # (n, 1)
    if torch.compiler.is_compiling():       # it fuses these, and may lose writes in place
        d_logits = log_p.exp().scatter(1, targets, d_target)
        return F.pad(d_logits, (0, n_padding)).to(logits.dtype)
    torch.exp(log_p, out=logits[:, :log_p.size(1)])
    return logits.scatter_(1, targets, d_target.to(logits.dtype))


def added(total, part):
    """total + part, in the place of `total` unless this is compiled."""
    if torch.compiler.is_compiling():
        return total + part
    return total.add_(part)
