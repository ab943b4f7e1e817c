"""
AdamW and Muon for a model, in eager steps and in captured ones.
"""
import torch


def make_optimizers(trained, settings, capturable):
    """AdamW for `trained` {name: parameter}, or Muon and AdamW if muon_lr is not 0.

    Muon (Jordan et al. 2024) makes each update of a matrix nearly orthogonal; it
    trains the matrices of the blocks. Biases and layer norms, which have one
    dimension, do not decay. AdamW's betas are those of GPT-3 (Brown et al. 2020,
    appendix B). `capturable` keeps the learning rate in a tensor.
    """
    by_muon, decaying, others = [], [], []
    for name, p in trained.items():
        if settings.muon_lr and ".h." in name and p.dim() == 2:
            by_muon.append(p)
        elif p.dim() == 2:
            decaying.append(p)
        else:
            others.append(p)
    lr = settings.lr
    if capturable:
        lr = torch.tensor(settings.lr, device=next(iter(trained.values())).device)
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    options = dict(betas=(0.9, 0.95), fused=True, capturable=capturable)
    optimizers = [torch.optim.AdamW(groups, lr=lr, **options)]
    if by_muon:
        options = dict(lr=settings.muon_lr, weight_decay=settings.weight_decay)
        optimizers.append(torch.optim.Muon(by_muon, **options))
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

    A fused optimizer can skip the update by itself, if found_inf is 1 (GradScaler
    uses this), so that the CPU does not wait for a GPU to read `bad`. MPS ignores
    found_inf.
    """
    if optimizer.defaults.get("fused") and bad.device.type != "mps":
        optimizer.found_inf = bad.float()
        optimizer.step()
    elif not bad:
        optimizer.step()
