"""
LoRA in one file (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685).

Fine-tuning changes a weight W by some ΔW of the same size. LoRA freezes W and learns ΔW as a product of two thin
matrices (§4.1):

    h = W x + (alpha / r) · B A x        W (out, in) frozen;   A (r, in), B (out, r) trained;   r « in, out

B A starts at zero, so training begins exactly at the base model. Trained are r · (in + out) numbers instead of
in · out: for GPT-2's c_fc, 768 -> 3072, with r = 8, it is 30,720 instead of 2,359,296. Only they need gradients,
optimizer state, and a place on disk; and once trained, B A can be added into W, so that using it costs nothing (§4.1,
"No Additional Inference Latency").

    apply_lora(model, r=8, alpha=16, target_modules=("c_attn", "c_proj", "c_fc"))      # any nn.Module with nn.Linear
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=3e-3)                     # then train as ever
    save_lora(model, "out/pirate")                                                     # a small file; PEFT reads it
    merge_lora(model); unmerge_lora(model); remove_lora(model)
    with disable_lora(model): ...                                                      # the base model

Many adapters can share one base, each under a name, and be switched, mixed in one batch, and added up:

    load_lora(model, "out/pirate", name="pirate"); load_lora(model, "out/bard", name="bard")
    use_lora(model, "pirate"); use_lora(model, None); use_lora(model, ["pirate", None, "bard"])     # the last: row by row
    combine_lora(model, {"pirate": 0.5, "bard": 0.5}, name="both"); delete_lora(model, "bard"); list_lora(model)

Shapes in the comments: (…, in) and (…, out) stand for inputs and outputs with any leading dimensions.
"""
import copy
import json
import math
import os
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


class LoRALayer(nn.Module):
    """A layer with adapters beside its weight W. Of the one in use, A (r, in), B (out, r), scaling, … are attributes.

    It takes over the weight and bias of the layer it replaces, the very Parameters: nothing is copied, and the base's
    names in the state dict stay. A and B are float32 whatever the base is stored in, since small updates to a bf16
    number round away. A state dict holds W, A and B, merged or not: were it W + B A, loading it would add B A twice."""

    ADAPTER = ("lora_A", "lora_B", "r", "alpha", "use_rslora", "dropout", "scaling")

    def __init__(self, base, r, alpha, dropout=0.0, use_rslora=False, name="default"):
        nn.Module.__init__(self)            # not nn.Linear's: it would allocate a weight of its own
        vars(self).update({key: value for key, value in vars(base).items() if not key.startswith("_")})    # in_features, …
        self._parameters.update(base._parameters, lora_A=None, lora_B=None)
        vars(self)["plain"] = copy.copy(base)       # for remove_lora; set past nn.Module, which would register it
        self.plain._parameters = {}
        self.fast = True                    # by LoRAProduct; False: by the definition, for comparison
        self.register_buffer("unmerged_weight", None, persistent=False)     # W while W + scaling · B A takes its place
        self.register_buffer("rows", None, persistent=False)                # (B, r): the ranks that a row uses, in a mix
        self.name, self.kept = None, {}
        self.add(name, r, alpha, dropout, use_rslora)

    def add(self, name, r, alpha, dropout=0.0, use_rslora=False):
        """Make an adapter with B A = 0 and put it in use."""
        fan_out, fan_in = self.weight.shape if isinstance(self, nn.Linear) else self.weight.t().shape
        A, B = (nn.Parameter(torch.zeros(size, device=self.weight.device)) for size in ((r, fan_in), (fan_out, r)))
        if isinstance(self, nn.Linear):
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))     # U(±1/√in), as loralib and PEFT; the paper: Gaussian
        else:
            nn.init.normal_(B)      # the other way round, as loralib and PEFT: a step moves just the tokens it has seen
        # alpha / r lets r change without another learning rate (§4.1); rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)
        # divides by √r, so that the update does not shrink as r grows.
        scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.kept[name] = dict(zip(self.ADAPTER, (A, B, r, alpha, use_rslora, dropout, scaling)))
        self.use(name)

    @property
    def adapters(self):
        """{name: {"lora_A": …, "scaling": …, …}}, the one in use with what its attributes have become."""
        if self.name in self.kept:
            self.kept[self.name] = {key: getattr(self, key) for key in self.ADAPTER}
        return self.kept

    def use(self, name):
        """Put an adapter in use. None, or a name that this layer has not, is none; a tuple is a name for each row of a
        batch. A merged layer is unmerged."""
        self.unmerge()
        self.rows, adapter = None, self.adapters.get(name, dict.fromkeys(self.ADAPTER))
        if isinstance(name, tuple) and any(one in self.kept for one in name):
            A, B, owners = self.concatenate(dict.fromkeys(name, 1.0))
            self.rows = torch.tensor([[float(owner == one) for owner in owners] for one in name], device=self.weight.device)
            adapter |= dict(lora_A=nn.Parameter(A, False), lora_B=nn.Parameter(B, False), r=len(A), dropout=0.0, scaling=1.0)
        self.name = name
        for key, value in adapter.items():
            if isinstance(value, nn.Parameter):     # the layer may have moved while the adapter was not in use
                value.data = value.data.to(self.weight.device)
            setattr(self, key, value)

    @torch.no_grad()
    def concatenate(self, weights):
        """Σ w s B A over {name: w} as one product, [w₁ s₁ B₁ | w₂ s₂ B₂ | …] [A₁; A₂; …]: exact, and its rank the sum of
        theirs. -> A (Σ r, in), B (out, Σ r), and the name that each rank comes from."""
        own, device = {name: self.adapters[name] for name in weights if name in self.kept}, self.weight.device
        return (torch.cat([a["lora_A"].to(device) for a in own.values()]),
                torch.cat([weights[name] * a["scaling"] * a["lora_B"].to(device) for name, a in own.items()], dim=1),
                [name for name, a in own.items() for _ in range(a["r"])])

    def delta(self, h):
        """scaling · B h for h = A x (…, r); in a mix the ranks that belong to other rows' adapters are set to zero first."""
        if self.rows is not None:
            if h.dim() < 2 or h.size(0) not in (1, len(self.rows)):
                raise ValueError(f"a batch of shape {tuple(h.shape[:-1])} met use_lora(model, …) for {len(self.rows)} rows")
            h = h * self.rows.view(len(self.rows), *[1] * (h.dim() - 2), -1)
        return self.scaling * F.linear(h, self.lora_B)

    @torch.no_grad()
    def merge(self):
        """Put W + scaling · B A in the place of W, added in float32 at least. W is kept aside. Twice is once."""
        if self.rows is not None:
            raise ValueError("rows with different adapters cannot be merged into one weight; use_lora(model, name) first")
        if not self.merged and self.lora_A is not None:
            BA = self.lora_B.float() @ self.lora_A.float()
            self.unmerged_weight = self.weight.data
            self.weight.data = torch.add(self.weight.data, BA if isinstance(self, nn.Linear) else BA.t(), alpha=self.scaling
                                         ).to(self.weight.dtype)

    def unmerge(self):
        """Put W back: the very tensor, so to the last bit."""
        if self.merged:
            self.weight.data, self.unmerged_weight = self.unmerged_weight, None

    @property
    def merged(self):
        return self.unmerged_weight is not None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.unmerged_weight

    def _load_from_state_dict(self, *args, **kwargs):
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self):
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}" + (", merged" if self.merged else "")


class LoRALinear(LoRALayer, nn.Linear):
    """nn.Linear with adapters: x (…, in) -> W x + b + scaling · B A x, (…, out)."""

    def forward(self, x):
        if self.merged or self.lora_A is None:
            return F.linear(x, self.weight, self.bias)
        frozen = not any(p.requires_grad for p in (self.weight, self.bias) if p is not None)
        if self.fast and frozen and self.rows is None and not (self.training and self.dropout):
            return LoRAProduct.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling)
        y = F.linear(x, self.weight, self.bias)                                                     # (…, out): the definition
        return y + self.delta(F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)).to(y.dtype)


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """nn.Embedding with adapters: idx (…) int64 -> W[idx] + scaling · B A[:, idx], (…, out). "in" is the vocabulary."""

    def forward(self, idx):
        y = nn.Embedding.forward(self, idx)                                                         # (…, out)
        return y if self.merged or self.lora_A is None else y + self.delta(F.embedding(idx, self.lora_A.t())).to(y.dtype)


KINDS = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding}        # just these: a subclass may compute something else


class LoRAProduct(torch.autograd.Function):
    """h = W x + b + s · B A x, differentiated by hand, because the order of the products decides what LoRA costs.

    x is (N, in), g = ∂loss/∂h is (N, out), N tokens. With u = x Aᵀ (N, r) and v = s · g B (N, r) the chain rule gives

        ∂A = vᵀ x        ∂B = s · gᵀ u        ∂x = g W + v A        and no ∂W, a third of a full fine-tuning step.

    Autograd finds the same, in the order that the forward pass was written in. That order is dear. On two CPU cores, for
    128 -> 512, N = 2,048, r = 8, where x Wᵀ, g W and ∂W take 1,465, 1,191 and 1,421 µs (bench/products.py):

        gᵀ u takes 974 µs; its transpose uᵀ g, which reads g as it lies in memory, 201
        g B takes 407; with Bᵀ laid out anew first, 179
        adding u Bᵀ to the output and v A to ∂x takes 177; folding W + s · B A before the products, 19 each time

    Folding rounds the sum to the dtype of the products, as full fine-tuning under autocast rounds its weights. With W
    stored in float32 that is fair. With W stored in bfloat16 it is not: W lies on bfloat16's grid already, and an update
    smaller than half a step of the grid would vanish; there the thin products are added to the results. (In a block 768
    wide, on an H200, that is 105 µs beside the 345 of x Wᵀ and g W.)

    Kept for backward are x and what is rank-sized."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, s):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W.dtype
        with torch.autocast(device, enabled=False):
            x2, A_, b_ = x.reshape(-1, x.size(-1)).to(dtype), A.to(dtype), None if b is None else b.to(dtype)   # x2 (N, in)
            sBt = torch.mul(B.t(), s, out=B.new_empty(B.shape[::-1], dtype=dtype))      # (r, out), in that order in memory
            u = x2 @ A_.t()                                                             # (N, r)
            ctx.fold = W.element_size() >= 4 and len(x2) > W.size(1)                    # for few tokens folding costs more
            y = F.linear(x2, _fold(W, A_, sBt), b_) if ctx.fold else F.linear(x2, W.to(dtype), b_).addmm_(u, sBt)
        ctx.save_for_backward(x2, u, W, A_, sBt)
        ctx.s, ctx.shape, ctx.dtypes = s, x.shape, (x.dtype, A.dtype, B.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("LoRAProduct has no second derivative; with layer.fast = False LoRALinear has one")
        x, u, W, A_, sBt = ctx.saved_tensors
        g, dx = g.reshape(-1, g.size(-1)), None                                         # (N, out)
        v = g @ sBt.t()                                                                 # (N, r)
        dA = v.t() @ x                                                                  # (r, in)
        dB = torch.addmm(g.new_empty(1), u.t(), g, beta=0, alpha=ctx.s).t()             # (out, r): s (uᵀ g)ᵀ
        if ctx.needs_input_grad[0]:
            dx = g @ _fold(W, A_, sBt) if ctx.fold else (g @ W.to(x.dtype)).addmm_(v, A_)       # (N, in)
            dx = dx.view(ctx.shape).to(ctx.dtypes[0])
        return dx, None, None, dA.to(ctx.dtypes[1]), dB.to(ctx.dtypes[2]), None


def _fold(W, A, sBt):
    """W + s · B A in the dtype of A, (out, in): summed in W's precision, then rounded once."""
    if W.dtype == A.dtype:
        return torch.addmm(W, sBt.t(), A)
    return torch.add(W, sBt.t() @ A, out=torch.empty_like(W, dtype=A.dtype))


# ---- on a whole model ------------------------------------------------------------------------------------------------

def lora_layers(model):
    """{path: LoRALayer} of a model's adapted layers. Raises ValueError when there are none."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}
    if not layers:
        raise ValueError("this model has no LoRA layers; call apply_lora(model) or load_lora(model, dir) first")
    return layers


def apply_lora(model, r=8, alpha=16, target_modules=("c_attn", "c_proj", "c_fc"), dropout=0.0, use_rslora=False, name="default"):
    """Freeze every parameter of model, and give a new adapter to every nn.Linear and nn.Embedding that a target names.

    A target matches whole components at the end of a dotted path, as in PEFT: "c_proj" matches h.0.attn.c_proj and
    h.0.mlp.c_proj, "attn.c_proj" the first of them. -> the paths of the adapted layers.

    Raises ValueError, and leaves the model as it was, for r not a positive integer, alpha or dropout out of range, a
    target that matches nothing or a layer of another kind, a layer that has an adapter of this name, and a weight that
    another module uses too (a tied head: merging into one would change both)."""
    targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    layers = {}
    for target in targets:
        found = [path for path, _ in model.named_modules() if target and f".{path}".endswith(f".{target}")]
        if not found:
            raise ValueError(f"target {target!r} matches no module; {_can_adapt(model)}")
        layers |= dict.fromkeys(found, dict(r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora))
    if not layers:
        raise ValueError(f"target_modules is empty; {_can_adapt(model)}")
    _adapt(model, layers, name)
    return list(layers)


def _adapt(model, layers, name):
    """Give an adapter to the modules of layers, {path: dict(r, alpha, dropout, use_rslora)}, and put it in use."""
    uses = Counter(id(p) for _, module in model.named_modules(remove_duplicate=False) for p in module.parameters(recurse=False))
    for path, settings in layers.items():
        module, r, alpha, dropout = model.get_submodule(path), settings["r"], settings["alpha"], settings["dropout"]
        if type(r) is not int or r < 1:
            raise ValueError(f"r is {r!r}; the rank must be a positive integer")
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha!r}; it must be a positive number (the update is scaled by alpha / r)")
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; it must be a number from 0 up to, not including, 1")
        if isinstance(module, LoRALayer) and name in module.adapters:
            raise ValueError(f"{path} has LoRA already, under the name {name!r}; delete_lora(model, {name!r}) first")
        if type(module) not in (*KINDS, *KINDS.values()):
            raise ValueError(f"{path} is a {type(module).__name__}, not an nn.Linear or nn.Embedding; {_can_adapt(model)}")
        if uses[id(module.weight)] > 1:
            raise ValueError(f"{path} shares its weight with another module (tied): merging into one would change both")
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            layer.use(None)                 # so that its adapters are not frozen with the rest
    model.requires_grad_(False)
    for path, settings in layers.items():
        module = model.get_submodule(path)
        if isinstance(module, LoRALayer):
            module.add(name, **settings)
        else:
            model.set_submodule(path, KINDS[type(module)](module, **settings, name=name))


def _can_adapt(model):
    names = {path.rpartition(".")[2] for path, m in model.named_modules() if type(m) in (*KINDS, *KINDS.values())}
    return "the layers that can be adapted are called " + ", ".join(sorted(names))


def list_lora(model):
    """The names of a model's adapters."""
    return sorted({name for layer in lora_layers(model).values() for name in layer.adapters})


def use_lora(model, which):
    """Switch to an adapter by name, or to the base model with None. Or give a list of these, one for each row: then the
    rows of every batch go through different adapters over the one base, use_lora(model, ["pirate", None, "bard"]) for idx
    (3, T). The mix is of A and B as they are now; train one at a time. Raises ValueError for a name that is not there."""
    one, layers = which is None or isinstance(which, str), lora_layers(model).values()
    if not (one or which) or {*([which] if one else which)} - {None}.union(*(layer.kept for layer in layers)):
        raise ValueError(f"{which!r} asks for adapters that the model has not; it has {_some(list_lora(model))}")
    for layer in layers:
        layer.use(which if one else tuple(which))


def delete_lora(model, name):
    """Forget an adapter; after it the base model is in use. Raises ValueError where there is none of this name."""
    use_lora(model, name)
    use_lora(model, None)
    for layer in lora_layers(model).values():
        layer.adapters.pop(name, None)


def combine_lora(model, weights, name):
    """Make Σ w · B A over {adapter: w} an adapter of its own, exactly, and put it in use. Its rank is the sum of theirs."""
    layers = lora_layers(model)
    if not weights or weights.keys() - {*list_lora(model)} or not all(map(math.isfinite, weights.values())):
        raise ValueError(f"{weights!r} is no weighted sum of the model's adapters, {_some(list_lora(model))}")
    parts = {path: layer.concatenate(weights)[:2] for path, layer in layers.items() if weights.keys() & layer.adapters.keys()}
    _adapt(model, {path: dict(r=len(A), alpha=len(A), dropout=0.0, use_rslora=False) for path, (A, _) in parts.items()}, name)
    for path, (A, B) in parts.items():
        layers[path].lora_A.data, layers[path].lora_B.data = A, B


def _in_use(model):
    """{path: layer} where an adapter is in use. Raises ValueError where none is, or different ones for different rows."""
    layers = {path: layer for path, layer in lora_layers(model).items() if layer.lora_A is not None}
    if not layers or any(layer.rows is not None for layer in layers.values()):
        raise ValueError(f"use_lora(model, name) first: no adapter is in use, or several are, of {_some(list_lora(model))}")
    return layers


def lora_parameters(model):
    """The parameters to give to the optimizer: every A and B of the adapter in use."""
    return [p for layer in _in_use(model).values() for p in (layer.lora_A, layer.lora_B)]


def lora_state_dict(model):
    """{"….lora_A": (r, in), "….lora_B": (out, r)}: the adapter in use, as tensors that share the model's memory."""
    return {f"{path}.{part}": getattr(layer, part).detach()
            for path, layer in _in_use(model).items() for part in ("lora_A", "lora_B")}


@torch.no_grad()
def load_lora_state_dict(model, state):
    """Copy an adapter into the one in use, of the same names and shapes. A merged layer is unmerged.

    Raises ValueError for missing, unknown, wrongly shaped or non-finite tensors; the model is then unchanged."""
    mine = lora_state_dict(model)
    _check_fit(state, {name: tuple(tensor.shape) for name, tensor in mine.items()})
    unmerge_lora(model)
    for name, tensor in state.items():
        mine[name].copy_(tensor)


def _check_fit(state, shapes):
    if state.keys() != shapes.keys():
        raise ValueError(f"the adapter does not fit the model: it lacks {_some(shapes.keys() - state.keys())}; "
                         f"the model does not know {_some(state.keys() - shapes.keys())}")
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, the model needs {shapes[name]}: another base?")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers; the adapter is damaged or its training diverged")


def merge_lora(model):
    """Fold the adapter in use into the weights: from here on the model runs at the base's speed. Twice is once.

    Until unmerge_lora the original weights are kept too; remove_lora after merge_lora keeps only the merged ones. The sum
    is rounded to the weights' dtype: a base stored in bfloat16 loses updates below half a step of its grid."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model):
    """Undo merge_lora: the base weights are back to the last bit, and the adapter works beside them again."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove_lora(model):
    """Put back plain layers, with no adapters: the base model, or, after merge_lora, the merged one.

    Parameters stay frozen, as apply_lora left them; model.requires_grad_(True) makes them trainable again."""
    for path, layer in lora_layers(model).items():
        layer.plain._parameters = {name: p for name, p in layer._parameters.items() if name not in layer.ADAPTER}
        model.set_submodule(path, layer.plain.train(layer.training))


@contextmanager
def disable_lora(model):
    """Inside the block the model is the base model, bit for bit; merged layers are unmerged meanwhile."""
    before = [(layer, layer.name, layer.merged) for layer in lora_layers(model).values()]
    use_lora(model, None)
    try:
        yield model
    finally:
        for layer, name, merged in before:
            layer.use(name)
            if merged:
                layer.merge()


# ---- files: PEFT's format --------------------------------------------------------------------------------------------
# adapter_config.json, and adapter_model.safetensors with our paths between PREFIX and one of SUFFIXES.

PREFIX, SUFFIXES = "base_model.model.", {"lora_A": (".lora_A.weight", ".lora_embedding_A"),        # of an nn.Linear,
                                         "lora_B": (".lora_B.weight", ".lora_embedding_B")}        # of an nn.Embedding
ALLOWED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}
KNOWN = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout",      # read; the layers are
         "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",      # those of the tensors; and the
         "task_type", "fan_in_fan_out", "base_model_name_or_path", "inference_mode", "revision", "peft_version",     # rest
         "auto_mapping", "megatron_core", "qalora_group_size"}      # says nothing of what is computed


def save_lora(model, dir, base_model_name_or_path=None):
    """Write the adapter in use as PEFT writes it: adapter_config.json and adapter_model.safetensors, float32.

    base_model_name_or_path is a note. Raises ValueError when no single adapter is in use, or a layer is not just LoRA's."""
    layers = _in_use(model)
    first, strange = next(iter(layers.values())), {type(layer) for layer in layers.values()} - {*KINDS.values()}
    if strange:
        raise ValueError(f"{_some(kind.__name__ for kind in strange)} computes something else than LoRA, and the file cannot "
                         "say so")
    config = {"peft_type": "LORA", "bias": "none", "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
              "base_model_name_or_path": base_model_name_or_path, "r": first.r, "lora_alpha": first.alpha,
              "lora_dropout": first.dropout, "use_rslora": first.use_rslora, "fan_in_fan_out": True, "inference_mode": True,
              "target_modules": sorted(layers)}
    if any((layer.r, layer.alpha) != (first.r, first.alpha) for layer in layers.values()):
        paths = sorted(layers, key=len, reverse=True)       # the first that ends a path counts: "2.0" must precede "0"
        config |= {"rank_pattern": {path: layers[path].r for path in paths},
                   "alpha_pattern": {path: layers[path].alpha for path in paths}}
    tensors = {PREFIX + path + SUFFIXES[part][isinstance(layer, nn.Embedding)]: getattr(layer, part).detach().float().contiguous()
               for path, layer in layers.items() for part in SUFFIXES}
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    files = {"adapter_model.safetensors": lambda path: save_file(tensors, path, metadata={"format": "pt"}),
             "adapter_config.json": lambda path: path.write_text(json.dumps(config, indent=2) + "\n")}
    for name, write in files.items():       # written beside its name and moved onto it: never half a file
        beside = dir / f".{name}.{os.getpid()}.tmp"
        try:
            write(beside)
            os.replace(beside, dir / name)
        except SafetensorError as error:        # save_file's word for a full disk
            raise OSError(f"{dir / name} could not be written: {error}") from error
        finally:
            beside.unlink(missing_ok=True)


def load_lora(model, dir, name="default"):
    """Read an adapter directory into a model, beside the adapters it has, and put it in use; into one of this name, if it
    is alike. -> the paths of the adapted layers. Raises FileNotFoundError, or ValueError for a damaged file, an adapter for
    another model, or what is not supported here (DoRA, trained biases, …); the model is then unchanged."""
    layers, state = _read_adapter(Path(dir))
    modules, shapes, old = dict(model.named_modules()), {}, {}
    for path, settings in layers.items():
        module = modules.get(path)
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            raise ValueError(f"{dir} adapts {path}, which the model has not as a linear layer or embedding: another base?")
        fan_out, fan_in = module.weight.shape if isinstance(module, nn.Linear) else module.weight.t().shape
        shapes |= {f"{path}.lora_A": (settings["r"], fan_in), f"{path}.lora_B": (fan_out, settings["r"])}
    _check_fit(state, shapes)
    old = {path: {key: module.adapters[name][key] for key in ("r", "alpha", "use_rslora", "dropout")}
           for path, module in modules.items() if isinstance(module, LoRALayer) and name in module.adapters}
    if old and old != layers:
        raise ValueError(f"{dir} differs from the model's adapter {name!r} in layers, r, alpha, rsLoRA or dropout; "
                         "delete_lora(model, name) first, or load it under another name")
    use_lora(model, name) if old else _adapt(model, layers, name)
    load_lora_state_dict(model, state)
    return list(layers)


def _read_adapter(dir):
    """-> {path: dict(r, alpha, …)}, {our name: tensor}. What would change the function and is not here is refused by name."""
    config_path, tensor_path = dir / "adapter_config.json", dir / "adapter_model.safetensors"
    for path in (config_path, tensor_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; an adapter is adapter_config.json and {tensor_path.name}"
                                    " (a .bin file is a pickle, which can run any code; save it again with a newer PEFT)")
    try:
        config = dict(json.loads(config_path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{config_path} is not a JSON object: {error}") from error
    refused = [f"{key}={value!r}" for key, value in config.items()
               if (value not in ALLOWED[key] if key in ALLOWED else value and key not in KNOWN)]
    if refused or not {"peft_type", "r", "lora_alpha"} <= config.keys():
        raise ValueError(f"{config_path} asks for what is not supported here: {_some(refused)}" if refused else
                         f"{config_path} lacks {_some({'peft_type', 'r', 'lora_alpha'} - config.keys())}")
    try:
        tensors = load_file(tensor_path)
    except SafetensorError as error:
        raise ValueError(f"{tensor_path} is not a whole safetensors file ({error}); fetch or write it again") from error
    ours = {name: f"{name.removeprefix(PREFIX).removesuffix(suffix)}.{part}" for name in tensors
            for part, suffixes in SUFFIXES.items() for suffix in suffixes if name.startswith(PREFIX) and name.endswith(suffix)}
    paths = sorted({name.rpartition(".")[0] for name in ours.values()})
    missing = {f"{path}.{part}" for path in paths for part in SUFFIXES} - {*ours.values()}
    if missing or tensors.keys() != ours.keys() or not len(ours) == 2 * len(paths) > 0:
        raise ValueError(f"{tensor_path} is not a plain LoRA, an A and a B for each of some layers: unexpected "
                         f"{_some(tensors.keys() - ours.keys())}; missing {_some(missing)}")
    state = {ours[name]: tensor for name, tensor in tensors.items()}

    def value(path, pattern, default):      # of the first regular expression that matches the end of the path, as in PEFT
        return next((v for end, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({end})$", path)), config[default])
    try:
        return {path: dict(r=value(path, "rank_pattern", "r"), alpha=value(path, "alpha_pattern", "lora_alpha"),
                           use_rslora=config.get("use_rslora", False), dropout=config.get("lora_dropout", 0.0))
                for path in paths}, state
    except (re.error, AttributeError) as error:
        raise ValueError(f"{config_path}: rank_pattern or alpha_pattern cannot be read: {error}") from error


def _some(names, most=4):
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
