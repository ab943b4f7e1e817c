"""
An adapter on disk: the directory that PEFT writes, adapter_config.json and weights.

The names of the tensors are those of the layers, between a prefix and a suffix:

    base_model.model.transformer.h.0.attn.c_attn.lora_A.weight      of a linear layer
    base_model.model.transformer.wpe.lora_embedding_A               of an embedding

A is (r, in) and B (out, r), in float32, also for layers whose weight is stored as (in, out).
"""
import json
import math
import re
import time
from pathlib import Path

import regex
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lab import files
from lab.files import (
    advice_on_pickles,
    open_tensors,
    read_all,
    read_json,
    some,
    write_weights,
)
from lab.nf4 import lora_classes
from lora_minimal import (
    active_layers,
    adapt_layers,
    check_state,
    find_lora_layers,
    is_lora,
    load_lora_state_dict,
    scaling_of,
)

PREFIX = "base_model.model."
# What a pattern from a file can raise.
UNUSABLE = (regex.error, AttributeError, TypeError, TimeoutError, RecursionError, MemoryError)
LINEAR_SUFFIXES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}
EMBEDDING_SUFFIXES = {"lora_A": ".lora_embedding_A", "lora_B": ".lora_embedding_B"}

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REQUIRED = {"r", "lora_alpha"}
# Keys of adapter_config.json that may only have these values.
ALLOWED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
# Keys whose values are used here.
USED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"}
# Keys that choose the layers; the tensors say the same.
LAYER_CHOICE = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}
# Keys that do not change what is computed. All other keys must be unset.
NOTES = {
    "task_type", "fan_in_fan_out", "base_model_name_or_path", "inference_mode", "revision",
    "peft_version", "auto_mapping", "megatron_core", "qalora_group_size",
}
CARD = """\
---
library_name: peft
base_model: {base}
tags:
- lora
---
A LoRA adapter of rank {r} for {base}. Load it with `peft.PeftModel.from_pretrained(model, dir)`.
"""


# ---- writing -----------------------------------------------------------------------

def save_lora(model, dir, base_model_name_or_path=None):
    """lora_minimal.save_lora: write an adapter, and a short model card if there is none."""
    model = unwrapped(model)
    layers = active_layers(model)
    check_classes(layers)
    check_single_settings(layers)
    check_scaling(layers)
    tensors = {}
    for path, layer in layers.items():
        is_embedding = isinstance(layer, nn.Embedding)
        suffixes = EMBEDDING_SUFFIXES if is_embedding else LINEAR_SUFFIXES
        for part, suffix in suffixes.items():
            tensor = getattr(layer, part).detach()
            if tensor.is_meta:
                raise ValueError(f"{path} is on the meta device; there is nothing to save")
            tensor = tensor.cpu().float()
            tensors[PREFIX + saved_path(path) + suffix] = tensor.contiguous()
    config = adapter_config(layers)
    config["task_type"] = "CAUSAL_LM" if hasattr(model, "generate") else None
    if base_model_name_or_path is not None:
        base_model_name_or_path = str(base_model_name_or_path)
    config["base_model_name_or_path"] = base_model_name_or_path
    base = json.dumps(base_model_name_or_path or "unknown")
    write_weights(dir, files.ADAPTER, tensors, files.ADAPTER_CONFIG, config)
    files.write_card(dir, CARD.format(base=base, r=config["r"]))


WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model):
    """The model inside the wrappers of torch.compile, data parallelism and averaging."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, WRAPPERS):
            model = model.module
        else:
            return model


def saved_path(path):
    """The path without the wrappers of submodules."""
    wrappers = ("_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(name for name in path.split(".") if name not in wrappers)


def check_scaling(layers):
    """Raises ValueError if a scaling was set by hand: the files say r and alpha only."""
    for path, layer in layers.items():
        expected = scaling_of(layer.r, layer.alpha, layer.use_rslora)
        if not math.isclose(layer.scaling, expected, rel_tol=1e-6):
            raise ValueError(
                f"{path} has scaling {layer.scaling}, but r and alpha give "
                f"{expected}; change alpha instead"
            )


def check_classes(layers):
    """Raises ValueError if a layer is a variant, with more than A and B in PEFT's format."""
    classes = {type(layer) for layer in layers.values()}
    other = [each.__name__ for each in classes - set(lora_classes().values())]
    if other:
        raise ValueError(
            f"{some(other)} computes something else than LoRA: it cannot be saved in "
            "the format of PEFT, or share a model with other adapters"
        )


def check_single_settings(layers):
    """Raises ValueError if the layers differ in what the format has only one value for."""
    for setting in ("use_rslora", "dropout"):
        values = {getattr(layer, setting) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(
                f"cannot save layers with different {setting} "
                f"({some(map(str, values))}): the format of PEFT has a single value "
                "for all layers"
            )


def adapter_config(layers):
    """The content of adapter_config.json for {path: layer}."""
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "bias": "none",
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "fan_in_fan_out": True,         # of a Conv1D; PEFT corrects it for other layers
        "inference_mode": True,
        "target_modules": sorted(map(saved_path, layers)),
    }
    if len({(layer.r, layer.alpha) for layer in layers.values()}) > 1:
        config["rank_pattern"] = {}
        config["alpha_pattern"] = {}
        # The first pattern that matches the end of a path counts: "2.0" must precede
        # "0".
        for path in sorted(layers, key=len, reverse=True):
            pattern = re.escape(saved_path(path))
            config["rank_pattern"][pattern] = layers[path].r
            config["alpha_pattern"][pattern] = layers[path].alpha
    return config


# ---- reading -----------------------------------------------------------------------

def load_lora(model, dir):
    """lora_minimal.load_lora: put the adapter in `dir` into a model."""
    model = unwrapped(model)
    settings, state = read_adapter(dir)
    check_fit(model, dir, settings, state)
    existing = find_lora_layers(model)
    if existing:
        check_same_settings(existing, settings, dir, "call remove_lora(model) first")
    else:
        adapt_layers(model, settings, lora_classes())
    load_lora_state_dict(model, {name: state[name] for name in names_of(settings)})
    return list(settings)


def check_same_settings(existing, settings, dir, advice):
    """Raises ValueError unless the adapter {path: layer} has the settings of the file."""
    held = {}
    for path, layer in existing.items():
        held[path] = {
            "r": layer.r,
            "alpha": layer.alpha,
            "use_rslora": layer.use_rslora,
            "dropout": layer.dropout,
        }
    if held != settings:
        raise ValueError(
            f"{dir} differs from the adapter of this model in layers, r, alpha, "
            f"rsLoRA or dropout; {advice}"
        )


def read_adapter(dir):
    """Read an adapter directory without a model.

    Returns {path: {"r", "alpha", "use_rslora", "dropout"}}, and the tensors
    {"<path>.lora_A": tensor, ...}, with other tensors of the file under their names
    in the model. Raises FileNotFoundError, or ValueError naming whatever would change
    the result and is not supported.
    """
    for name in (files.ADAPTER_CONFIG, files.ADAPTER):
        if not Path(dir, name).is_file():
            raise FileNotFoundError(
                f"{Path(dir, name)} does not exist; an adapter is "
                f"{files.ADAPTER_CONFIG} and {files.ADAPTER}{advice_on_pickles(dir)}"
            )
    config_path = Path(dir, files.ADAPTER_CONFIG)
    config = read_json(config_path)
    refuse_other_adapters(config_path, config)
    paths, state = read_state(Path(dir, files.ADAPTER))
    deadline = time.monotonic() + 2.0       # a file must not be able to stop the program
    try:
        settings = {path: settings_for_path(config, path, deadline) for path in paths}
    except UNUSABLE as error:
        raise ValueError(
            f"{config_path}: rank_pattern or alpha_pattern cannot be used: {error!r}"
        ) from error
    return settings, state


def refuse_other_adapters(config_path, config):
    """Raises ValueError if adapter_config.json asks for what is not supported here."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{config_path}: peft_type={kind!r} is not supported here, only LORA")
    refused = []
    for key, value in config.items():
        if key in ALLOWED_VALUES:
            supported = value in ALLOWED_VALUES[key]
        else:
            supported = key in USED | LAYER_CHOICE | NOTES or not value
        if not supported:
            refused.append(f"{key}={value!r}")
    if refused:
        raise ValueError(f"{config_path}: not supported here: {some(refused)}")
    missing = (REQUIRED | {"peft_type"}) - config.keys()
    if missing:
        raise ValueError(f"{config_path} has no {some(missing)}")


def read_state(path):
    """Read adapter_model.safetensors.

    Returns the paths of the layers, and {"<path>.lora_A": tensor, "<path>.lora_B":
    tensor, ...}. Tensors of PEFT's that are not A or B keep their names, without the
    prefix.
    """
    with open_tensors(path) as file:
        tensors = read_all(file)
    paths = {}
    state = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}; expected a float type")
        layer, part = split_name(name)
        ours = f"{layer}.{part}" if part else name
        if ours in state:
            raise ValueError(f"{path} has two tensors for {ours}")
        state[ours] = tensor
        if part:
            paths[layer] = True
    if not tensors:
        raise ValueError(f"{path} is not a plain LoRA: it is empty")
    missing = set(names_of(paths)) - state.keys()
    if missing or not paths:
        raise ValueError(f"{path} is not a plain LoRA: missing tensors {some(missing)}")
    return list(paths), state


def split_name(name):
    """The layer's path and "lora_A" or "lora_B" of a tensor's name; (None, None) for others."""
    if name.startswith(PREFIX):
        for suffixes in (LINEAR_SUFFIXES, EMBEDDING_SUFFIXES):
            for part, suffix in suffixes.items():
                if name.endswith(suffix):
                    return name.removeprefix(PREFIX).removesuffix(suffix), part
    return None, None


def names_of(paths):
    """The names of the A's and B's of layers, in our form."""
    names = []
    for path in paths:
        names += [f"{path}.lora_A", f"{path}.lora_B"]
    return names


def settings_for_path(config, path, deadline):
    """The arguments of apply_lora for the layer at `path`."""
    rank_pattern, alpha_pattern = config.get("rank_pattern"), config.get("alpha_pattern")
    return {
        "r": first_match(path, rank_pattern, config["r"], deadline),
        "alpha": first_match(path, alpha_pattern, config["lora_alpha"], deadline),
        "use_rslora": config.get("use_rslora", False),
        "dropout": config.get("lora_dropout", 0.0),
    }


def first_match(path, patterns, default, deadline):
    """The value of the first pattern {regular expression: value} that matches the end of path.

    Raises TimeoutError after the deadline, in seconds of time.monotonic().
    """
    for pattern, value in (patterns or {}).items():
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the patterns take too long")
        if regex.match(rf"(.*\.)?({pattern})$", path, timeout=remaining):
            return value
    return default


def check_fit(model, dir, settings, state):
    """Raises ValueError unless the model has layers of the shapes that the adapter needs.

    PEFT may add copies of unchanged weights of the model, such as the embedding: they
    are accepted if they are equal to the model's, and dropped.
    """
    modules = dict(model.named_modules())
    classes = lora_classes()
    shapes = {}
    for path, arguments in settings.items():
        module = modules.get(path)
        if type(module) not in classes and not is_lora(module):
            raise ValueError(
                f"{dir} adapts {path}, but this model has no linear layer or "
                "embedding there; was it trained on another base?"
            )
        if module.weight.is_meta:
            raise ValueError(f"{path} is on the meta device; give the model its weights first")
        in_features, out_features = features(module)
        shapes[f"{path}.lora_A"] = (arguments["r"], in_features)
        shapes[f"{path}.lora_B"] = (out_features, arguments["r"])
    others = state.keys() - shapes.keys()
    weights = model.state_dict()
    changed = [name for name in others if not equals_own_weight(weights, name, state[name])]
    if changed:
        raise ValueError(
            f"{dir} is not a plain LoRA: unexpected tensors {some(changed)}, which "
            "differ from the model's own"
        )
    check_state({name: state[name] for name in shapes}, shapes)


def equals_own_weight(weights, name, tensor):
    """Whether a tensor of an adapter file is a copy of one of the model's {name: weight}."""
    own_name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    own = weights.get(own_name)
    if own is None or own.shape != tensor.shape:
        return False
    return torch.equal(own.cpu().to(tensor.dtype), tensor)


def features(module):
    """(in, out) of a layer, whatever the orientation of its weight."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)       # of an embedding or a Conv1D, both (in, out)
