"""What the tests of LoRA share: small adapted models, a few training steps, changes to files."""
import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel

from conftest import make_gpt
from lora_minimal import apply_lora, lora_parameters

TARGETS = ("c_attn", "c_proj", "c_fc")


def fill_lora(model, std=0.1):
    """Draw every A and B from N(0, std²), so that B is not zero, as after training."""
    for p in lora_parameters(model):
        nn.init.normal_(p, std=std)
    return model


def adapted(seed=0, std=0.1, **settings):
    """A small GPT with LoRA whose B is not zero."""
    model = make_gpt(seed)
    defaults = dict(r=4, alpha=16, target_modules=TARGETS)
    apply_lora(model, **(defaults | settings))
    return fill_lora(model, std)


def parameter_names(model):
    return {name for name, _ in model.named_parameters()}


def snapshot(model):
    """What must be the same after a refusal: modules, parameters, and which of these train."""
    modules = [(path, id(module)) for path, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return modules, parameters


def train_steps(model, idx, n, lr=1e-2):
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=lr)
    for _ in range(n):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def transformers_gpt2(dir):
    """transformers' GPT-2 with the weights of make_gpt(), by way of files in dir/base."""
    make_gpt().save_pretrained(dir / "base")
    return GPT2LMHeadModel.from_pretrained(dir / "base").eval()


def edit_config(dir, removed=(), **changes):
    """Change adapter_config.json: some keys are set, some are removed."""
    path = dir / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    for key in removed:
        del config[key]
    path.write_text(json.dumps(config))


def edit_tensors(dir, changes):
    """Change adapter_model.safetensors: {name: its new tensor, or None to remove it}."""
    path = dir / "adapter_model.safetensors"
    tensors = with_changes(load_file(path), changes)
    save_file(tensors, path)


def with_changes(tensors, changes):
    """The dict with some entries replaced, added or, if the new value is None, removed."""
    changed = tensors | changes
    return {name: value for name, value in changed.items() if value is not None}
