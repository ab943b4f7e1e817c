"""
Which optimizer trains which parameter, and how a step is skipped.
"""
import torch

from lab.muon import Muon


def make_optimizers(trained, settings, capturable):
    """The optimizers for `trained` {name: parameter}: [AdamW], or [AdamW, Muon].

    With muon_lr, Muon trains the matrices of the blocks. AdamW trains the rest: the
    embeddings, with weight decay, and biases and layer norms, which have one
    dimension, without. Its betas are those of GPT-3 (Brown et al. 2020, appendix B).
    `capturable` keeps the learning rates in tensors, which a captured step reads.
    """
    by_muon, decaying, others = [], [], []
    for name, p in trained.items():
        if settings.muon_lr and ".h." in name and p.dim() == 2:
            by_muon.append(p)
        elif p.dim() == 2:
            decaying.append(p)
        else:
            others.append(p)
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    lr, muon_lr = settings.lr, settings.muon_lr
    if capturable:
        device = next(iter(trained.values())).device
        lr = torch.tensor(lr, device=device)
        muon_lr = torch.tensor(muon_lr, device=device)
    adamw = torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, 0.95), fused=True, capturable=capturable
    )
    optimizers = [adamw]
    if by_muon:
        optimizers.append(Muon(by_muon, muon_lr, settings.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = float(group["lr"])       # see scale_learning_rates
    return optimizers


def scale_learning_rates(optimizers, factor):
    """Set every learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = factor * group["peak_lr"]
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)       # a captured step reads this tensor
            else:
                group["lr"] = lr


def step_unless(bad, optimizer):
    """Take the optimizer's step unless the tensor `bad` () is true.

    Muon and a fused AdamW can skip the update by themselves, so that the CPU does not
    wait for a GPU to read `bad`. AdamW does so if its attribute found_inf, which is
    meant for torch's GradScaler, is 1. MPS ignores it, so there the CPU has to look.
    """
    if isinstance(optimizer, Muon):
        optimizer.step(unless=bad)
    elif optimizer.defaults.get("fused") and bad.device.type != "mps":
        optimizer.found_inf = bad.float()
        optimizer.step()
    elif not bad:
        optimizer.step()
