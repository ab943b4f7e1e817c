"""
One model and its training step, used for many runs.

Building a model and capturing its step takes as long as half a run of the 11M model. Runs
that differ only in text, steps, learning rate and seed therefore share a Machine: each
run puts the weights, the adapters and the optimizer back to the beginning. That a second
run equals the run of a new machine is tested.
"""
import math
from dataclasses import replace

import torch
from torch import nn

from bench.papers.arms import SLICES
from lab.capture import captured
from lab.nf4 import LAYERS
from lab.parallel import seed_of_step
from lab.settings import settings_for
from lora_minimal import apply_lora, find_lora_layers
from train import Step

EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")


def settings_of_arm(arm, scale, device):
    """The Settings of a run: those of train.py's recipe, in the size of `scale`.

    A trained embedding stays in float32, as do all weights that train.
    """
    sizes = dict(
        steps=arm.steps or scale.steps, batch_size=arm.batch_size or scale.batch_size,
        block_size=scale.block_size, muon_lr=0.0,
    )
    if arm.base_dtype:
        sizes["base_dtype"] = arm.base_dtype
    elif arm.trains_embeddings:
        sizes["base_dtype"] = "float32"
    return settings_for(arm.method, device, **sizes)


class Machine:
    """A base model, what an Arm trains of it, and the training step (captured on a GPU).

    model   the base, as load_model returns it with the dropout and dtype of `settings`; the
            Machine changes it
    """

    def __init__(self, arm, model, settings):
        self.arm = arm
        self.model = model
        self.settings = settings
        choose_parameters(self.model, arm)
        self.step = Step(self.model, self.settings)
        give_own_rates(self.step, arm)
        self.take_step = captured(self.step)
        self.start = {name: p.detach().clone() for name, p in self.step.trained.items()}

    def run(self, batches, lr, seed, points, measure):
        """Train from the beginning.

        batches x, y (steps, B, T); measure() is called after each of the steps in `points`.
        Returns [what measure returned, ...] and the training losses (steps,), a tensor on
        the device: nothing waits for the GPU between two points.
        """
        x, y = batches
        self.reset(lr, seed, steps=len(x))
        self.model.train()
        losses, found = [], []
        for n in range(len(x)):
            torch.manual_seed(seed_of_step(seed, n))
            self.step.set_learning_rate(n)
            losses.append(self.take_step(x[n], y[n]))
            if n + 1 in points:
                found.append(measure())
        return found, torch.stack(losses)

    @torch.no_grad()
    def reset(self, lr, seed, steps):
        """Put weights, adapters and optimizer back to the beginning, in place.

        A captured step reads the same memory in every run.
        """
        for name, p in self.step.trained.items():
            p.copy_(self.start[name])
        torch.manual_seed(seed)
        for layer in find_lora_layers(self.model).values():
            draw_factors(layer, self.arm.random)
        for optimizer in self.step.optimizers:
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
            for group in optimizer.param_groups:
                group["peak_lr"] = lr * group["share_of_lr"]
        self.step.skipped.zero_()
        self.step.skipped_in_a_row.zero_()
        self.step.settings = replace(self.settings, steps=steps)


def choose_parameters(model, arm):
    """Let those parameters of a model require a gradient that the arm trains."""
    if arm.method == "full":
        model.requires_grad_(True)
    else:
        for rank, names in arm.targets.items():
            alpha = rank * arm.factor
            apply_lora(model, r=rank, alpha=alpha, target_modules=names, layers=LAYERS)
        for path, layer in find_lora_layers(model).items():
            layer.lora_A.requires_grad_(arm.frozen != "A")
            layer.lora_B.requires_grad_(arm.frozen != "B")
            if arm.slices and path.endswith("c_attn"):
                separate_slices(layer, arm.slices)
    parameters = dict(model.named_parameters())
    for name in EMBEDDINGS:
        parameters[name].requires_grad_(arm.trains_embeddings)


def separate_slices(layer, slices):
    """Give some of the slices q, k and v of a c_attn adapters of their own, of equal rank.

    Slice s uses its own ranks only: the entries of B (3 C, r) outside its rows and ranks
    get no gradient, and stay zero.
    """
    out, r = layer.lora_B.shape
    rows, ranks = out // len(SLICES), r // len(slices)
    mask = torch.zeros_like(layer.lora_B)
    for i, letter in enumerate(slices):
        start = rows * SLICES.index(letter)
        mask[start:start + rows, i * ranks:(i + 1) * ranks] = 1.0

    def keep_inside(gradient):
        return gradient * mask
    layer.lora_B.register_hook(keep_inside)


def draw_factors(layer, random):
    """Draw the factor of this name ("A" or "B") from U(±1/√fan-in), and set the other to zero."""
    beginning = {"A": layer.lora_A, "B": layer.lora_B}
    drawn = beginning.pop(random)
    [zero] = beginning.values()
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    nn.init.zeros_(zero)


def give_own_rates(step, arm):
    """Divide the groups of AdamW, so that B and the embeddings have rates of their own.

    group["share_of_lr"] is what the rate of a run is multiplied by. Embeddings decay
    as in full fine-tuning.
    """
    [optimizer] = step.optimizers
    for group in optimizer.param_groups:
        group["share_of_lr"] = 1.0
    if arm.method == "full":
        return
    shares = {}
    if arm.b_rate != 1.0:
        shares[".lora_B"] = (arm.b_rate, 0.0)
    if arm.trains_embeddings:
        full_decay = settings_for("full", step.device).weight_decay
        shares["wte.weight"] = shares["wpe.weight"] = (arm.embedding_rate, full_decay)
    for suffix, (share, decay) in shares.items():
        moved = take_out(optimizer, step.trained, suffix)
        lr = optimizer.param_groups[0]["lr"]
        if torch.is_tensor(lr):
            lr = lr.clone()
        optimizer.add_param_group({
            "params": moved, "lr": lr, "weight_decay": decay, "peak_lr": float(lr),
            "share_of_lr": share,
        })


def take_out(optimizer, trained, suffix):
    """Take the parameters whose names end with `suffix` out of their groups. Returns them."""
    moved = [p for name, p in trained.items() if name.endswith(suffix)]
    ids = {id(p) for p in moved}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    return moved
