"""lora_minimal.py works without the rest of the project.

The test copies it into an empty directory, and runs this file as a program there: Python's
isolated mode (-I) finds nothing but installed packages, and the program adds that directory.
"""
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent


def test_the_module_stands_alone():
    source = (ROOT / "lora_minimal.py").read_text(encoding="utf-8")
    for other in ("import gpt", "from gpt", "from data"):
        assert other not in source


def test_a_copy_of_the_file_works_where_nothing_else_is(tmp_path):
    shutil.copy(ROOT / "lora_minimal.py", tmp_path)
    command = [sys.executable, "-I", os.fspath(Path(__file__).resolve())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [check.__name__ for check in CHECKS]


# ---- what runs in the other process --------------------------------------------------------------

class TiedNet(nn.Module):
    """A language model so small that it trains in no time. Its head is tied to its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, idx):
        """idx (B, T) -> logits (B, T, 11)."""
        x = self.embed(idx)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x)


def seeded_net():
    torch.manual_seed(0)
    return TiedNet()


def adapted_net(lora):
    net = seeded_net()
    assert lora.apply_lora(net, r=4, target_modules=["up", "down"]) == ["up", "down"]
    return net


def loss_of(net):
    """The mean cross-entropy of counting upwards, modulo 11."""
    tokens = torch.arange(44).view(4, 11) % 11
    logits = net(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), (tokens + 1).flatten() % 11)


def trained_net(lora):
    net = adapted_net(lora)
    optimizer = torch.optim.AdamW(lora.lora_parameters(net), lr=1e-2)
    for _ in range(20):
        loss_of(net).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def nothing_else_can_be_imported(lora):
    for name in ("gpt", "data", "lab", "train"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def it_starts_at_the_base(lora):
    assert torch.equal(loss_of(adapted_net(lora)), loss_of(seeded_net()))


def it_trains_with_the_fast_product(lora):
    net = trained_net(lora)
    assert loss_of(net) < 0.8 * loss_of(seeded_net())
    y = net.up(torch.randn(40, 8))
    assert y.grad_fn.name() == "LoRAProductBackward"
    for name, p in seeded_net().named_parameters():
        assert torch.equal(p, net.get_parameter(name)), "the base is frozen"


def it_merges_and_unmerges(lora):
    net = trained_net(lora)
    before = {name: p.clone() for name, p in net.named_parameters()}
    tuned = loss_of(net)
    lora.merge_lora(net)
    torch.testing.assert_close(loss_of(net), tuned)
    assert not torch.equal(net.up.weight, before["up.weight"])
    lora.unmerge_lora(net)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
    assert torch.equal(loss_of(net), tuned)


def it_refuses_a_tied_layer(lora):
    net = seeded_net()
    for target in ("head", "embed"):
        with pytest.raises(ValueError, match="shares its weight"):
            lora.apply_lora(net, target_modules=["up", target])
    assert type(net.up) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())


def it_gives_and_takes_a_state_dict(lora):
    net = trained_net(lora)
    state = lora.lora_state_dict(net)
    assert state.keys() == {"up.lora_A", "up.lora_B", "down.lora_A", "down.lora_B"}
    other = adapted_net(lora)
    lora.load_lora_state_dict(other, state)
    assert torch.equal(loss_of(other), loss_of(net))


def it_can_be_disabled_and_removed(lora):
    net = trained_net(lora)
    tuned = loss_of(net)
    base = loss_of(seeded_net())
    with lora.disable_lora(net):
        assert torch.equal(loss_of(net), base)
    assert torch.equal(loss_of(net), tuned)
    lora.remove_lora(net)
    assert type(net.up) is nn.Linear
    assert torch.equal(loss_of(net), base)


def only_files_need_the_rest(lora):
    net = trained_net(lora)
    with pytest.raises(ModuleNotFoundError, match="lab"):
        lora.save_lora(net, "out")
    assert not Path("out").exists()


CHECKS = [
    nothing_else_can_be_imported,
    it_starts_at_the_base,
    it_trains_with_the_fast_product,
    it_merges_and_unmerges,
    it_refuses_a_tied_layer,
    it_gives_and_takes_a_state_dict,
    it_can_be_disabled_and_removed,
    only_files_need_the_rest,
]


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    module = importlib.import_module("lora_minimal")
    assert Path(module.__file__).parent == Path.cwd()
    for check in CHECKS:
        check(module)
        print(check.__name__)
