"""
A small trained network as a black box, for notebook 1: its weights, how well it predicts
text, and a gradient, all as numpy arrays. Notebook 2 opens the box.

The network predicts text. It is trained on short tales, and then tuned on pirate stories
in the ordinary way, by changing all of its weights.
"""
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from data import Batches
from lab.models import load_model
from notebooks.checks import steps
from notebooks.texts import load_text
from train import evaluate, pretrain, tune

OUT = Path("../out/notebooks")
BASE = OUT / "base"
TUNED = OUT / "full-40"
BLOCK_SIZE = 128


def train_network():
    """Train the base network and its tuned version, or reuse them if they are there."""
    pretrain("tales", BASE, steps=steps(300), eval_every=100, device="cpu")
    tune(
        BASE, "pirate", TUNED, method="full", steps=steps(40), batch_size=16,
        block_size=BLOCK_SIZE, lr=1e-3, weight_decay=0.0, eval_every=20, device="cpu",
    )


def matrices(dir):
    """{name: W (out, in) in float64} of the sixteen weight matrices between the layers."""
    found = {}
    for name, tensor in load_file(dir / "model.safetensors").items():
        if ".h." in name and tensor.ndim == 2:
            found[name.removeprefix("transformer.")] = tensor.T.astype(np.float64)
    return found


def base_matrices():
    return matrices(BASE)


def tuned_matrices():
    return matrices(TUNED)


def load_base():
    """The base network, and the pirate stories as numbers."""
    model, encoding, _ = load_model(BASE, "cpu")
    return model, load_text("pirate", encoding, BLOCK_SIZE)


@torch.no_grad()
def bits_per_byte(weights):
    """Bits per byte of held-out pirate stories, with {name: W (out, in)} in the base network."""
    model, corpus = load_base()
    for name, W in weights.items():
        model.get_parameter(f"transformer.{name}").copy_(torch.from_numpy(W))
    return evaluate(model, corpus, BLOCK_SIZE)


def gradient_descent(n, rate):
    """Tune the base by n plain steps of size `rate`, with gradients clipped to norm 1.

    Returns its matrices {name: W (out, in)}.
    """
    model, corpus = load_base()
    model.requires_grad_(True).train()
    batches = Batches(corpus.train, batch_size=16, block_size=BLOCK_SIZE, seed=1337)
    for i in range(steps(n)):
        _, loss = model(*batches[i])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad
                p.grad = None
    found = {}
    for name in base_matrices():
        W = model.get_parameter(f"transformer.{name}")
        found[name] = W.detach().numpy().astype(np.float64)
    return found


def gradient(name):
    """∂loss/∂W (out, in) of one matrix of the base network, for one batch of pirate stories."""
    model, corpus = load_base()
    model.requires_grad_(True)
    batches = Batches(corpus.train, batch_size=16, block_size=BLOCK_SIZE, seed=1337)
    _, loss = model(*batches[0])
    loss.backward()
    return model.get_parameter(f"transformer.{name}").grad.numpy().astype(np.float64)
