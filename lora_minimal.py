"""
LoRA in one file (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685).

Fine-tuning changes a weight W by some ΔW of the same size. LoRA freezes W and learns ΔW as a product of two thin
matrices (§4.1):

    h = W x + (alpha / r) · B A x        W (out, in) frozen;   A (r, in), B (out, r) trained;   r « in, out

A starts random and B at zero, so training begins exactly at the base model. Trained are r · (in + out) numbers instead
of in · out: for GPT-2's c_fc, 768 -> 3072, with r = 8, it is 30,720 instead of 2,359,296. Only they need gradients,
optimizer state, and a place on disk; and once trained, B A can be added into W, so that using it costs nothing (§4.1,
"No Additional Inference Latency").

    apply_lora(model, r=8, alpha=16, target_modules=("c_attn", "c_proj", "c_fc"))      # any nn.Module with nn.Linear
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=3e-3)                     # then train as ever
    save_lora(model, "out/pirate")                                                     # a small file; PEFT reads it
    merge_lora(model); unmerge_lora(model); remove_lora(model)
    with disable_lora(model): ...                                                      # the base model

Shapes in the comments: (…, in) and (…, out) stand for inputs and outputs with any leading dimensions.
"""
import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


class LoRALinear(nn.Linear):
    """nn.Linear with an adapter: x (…, in) -> W x + b + scaling · B A x, (…, out).

    It takes over the weight and bias of the layer it replaces, the very Parameters: nothing is copied, and the base's
    names in the state dict stay. A and B are float32 whatever the base is stored in, since small updates to a bf16
    number round away."""

    def __init__(self, base, r, alpha, dropout=0.0, use_rslora=False):
        nn.Module.__init__(self)            # not nn.Linear's: it would allocate a weight of its own
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        # alpha / r keeps the size of the update about equal when r changes (§4.1); with larger r it shrinks too much,
        # and rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) divides by √r.
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.dropout = nn.Dropout(dropout)
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))      # U(±1/√in), as loralib and PEFT; the paper: Gaussian
        self.enabled = self.fast = True     # fast: by LoRAProduct; False: by the definition, for comparison
        self.register_buffer("unmerged_weight", None, persistent=False)     # W while W + scaling · B A takes its place
        self.train(base.training)

    def forward(self, x):
        if self.merged or not self.enabled:
            return F.linear(x, self.weight, self.bias)
        frozen = not any(p.requires_grad for p in (self.weight, self.bias) if p is not None)
        if self.fast and frozen and not (self.training and self.dropout.p > 0):
            return LoRAProduct.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling)
        h = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)                        # (…, r): the definition
        y = F.linear(x, self.weight, self.bias)                                                 # (…, out)
        return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)

    @property
    def merged(self):
        return self.unmerged_weight is not None

    @torch.no_grad()
    def merge(self):
        """Put W + scaling · B A in the place of W, computed in float32. W is kept aside. Merging again does nothing."""
        if not self.merged:
            delta = self.scaling * (self.lora_B.float() @ self.lora_A.float())      # (out, in)
            self.unmerged_weight = self.weight.data
            self.weight.data = (self.weight.float() + delta).to(self.weight.dtype)

    def unmerge(self):
        """Put W back: the very tensor, so to the last bit."""
        if self.merged:
            self.weight.data, self.unmerged_weight = self.unmerged_weight, None

    # A state dict is W, A and B, merged or not: were it W + B A beside A and B, loading it would add B A twice.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.unmerged_weight

    def _load_from_state_dict(self, *args, **kwargs):
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self):
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}" + (", merged" if self.merged else "")


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
    """{name: LoRALinear} of a model's adapted layers. Raises ValueError when there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("this model has no LoRA layers; call apply_lora(model) or load_lora(model, dir) first")
    return layers


def apply_lora(model, r=8, alpha=16, target_modules=("c_attn", "c_proj", "c_fc"), dropout=0.0, use_rslora=False):
    """Freeze every parameter of model and put a LoRALinear in the place of every nn.Linear that a target names.

    A target matches whole components at the end of a dotted name, as in PEFT: "c_proj" matches h.0.attn.c_proj and
    h.0.mlp.c_proj, "attn.c_proj" the first of them. -> the names of the adapted layers.

    Raises ValueError, and leaves the model as it was, for r not a positive integer, alpha or dropout out of range, a
    target that matches nothing or something other than nn.Linear, a layer that has LoRA already, and a weight that
    another module uses too (a tied head: changing one would change both)."""
    return _adapt(model, _match(model, target_modules), r, alpha, dropout, use_rslora)


def _adapt(model, names, r, alpha, dropout, use_rslora):
    """apply_lora on the modules of just these names."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r is {r!r}; the rank must be a positive integer")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}; it must be a positive number (the update is scaled by alpha / r)")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; it must be a number from 0 up to, not including, 1")
    holders = {}            # id of a parameter -> the modules that hold it
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), set()).add(name)
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, LoRALinear):
            raise ValueError(f"{name} has LoRA already; remove_lora(model) first, or load the other adapter into it")
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}, not an nn.Linear; the linear layers are called "
                             f"{_linear_names(model)}")
        shared = holders[id(module.weight)] - {name}
        if shared:
            raise ValueError(f"{name} shares its weight with {', '.join(sorted(shared))}: adapting it would change both")
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), r, alpha, dropout, use_rslora))
    return names


def _match(model, target_modules):
    """-> the names of the modules that the targets match."""
    targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    if not targets:
        raise ValueError(f"target_modules is empty; name the linear layers to adapt, of {_linear_names(model)}")
    names = []
    for target in targets:
        matched = [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not matched or target == "":
            raise ValueError(f"target {target!r} matches no module; the linear layers are called {_linear_names(model)}")
        names += [name for name in matched if name not in names]
    return names


def _linear_names(model):
    return ", ".join(sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}))


def lora_parameters(model):
    """The parameters to give to the optimizer: every A and B."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def lora_state_dict(model):
    """{"….lora_A": (r, in), "….lora_B": (out, r)}: the adapter alone, as tensors that share the model's memory."""
    return {f"{name}.{part}": getattr(layer, part).detach()
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


@torch.no_grad()
def load_lora_state_dict(model, state):
    """Copy an adapter into a model that has LoRA layers of the same names and shapes. A merged layer is unmerged.

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
    """Fold the adapter into the weights: from here on the model runs at the base's speed. Twice is once.

    Until unmerge_lora the original weights are kept too, so the adapted layers take twice their memory; remove_lora
    after merge_lora keeps only the merged ones. A state dict always holds the unmerged weights."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model):
    """Undo merge_lora: the base weights are back to the last bit, and the adapter works beside them again."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove_lora(model):
    """Put a plain nn.Linear in the place of every LoRALinear: the base model, or, after merge_lora, the merged one.

    Parameters stay frozen, as apply_lora left them; model.requires_grad_(True) makes them trainable again."""
    for name, layer in lora_layers(model).items():
        with torch.device("meta"):          # no second weight is allocated
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(name, plain.train(layer.training))


@contextmanager
def disable_lora(model):
    """Inside the block the model is the base model, bit for bit; merged layers are unmerged meanwhile."""
    layers = list(lora_layers(model).values())
    before = [(layer, layer.enabled, layer.merged) for layer in layers]
    for layer in layers:
        layer.enabled = False
        layer.unmerge()
    try:
        yield model
    finally:
        for layer, enabled, merged in before:
            layer.enabled = enabled
            if merged:
                layer.merge()


# ---- files: PEFT's format --------------------------------------------------------------------------------------------
# adapter_config.json, and adapter_model.safetensors with "base_model.model." before our names and ".weight" after them.

PREFIX, SUFFIX = "base_model.model.", ".weight"
ALLOWED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}
KNOWN = {"r", "lora_alpha", "use_rslora", "lora_dropout",       # read; the layers are read from the tensors' names, and
         "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",      # these need not be
         "task_type", "fan_in_fan_out", "base_model_name_or_path", "inference_mode", "revision", "peft_version",
         "auto_mapping", "megatron_core", "qalora_group_size"}      # nor these: they say nothing of what is computed


def save_lora(model, dir, base_model_name_or_path=None):
    """Write the adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors, float32.

    All adapted layers must have one r, alpha and kind of scaling (ValueError); base_model_name_or_path is a note."""
    layers = lora_layers(model)
    settings = {(layer.r, layer.alpha, layer.use_rslora, layer.dropout.p) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(f"the adapted layers differ in (r, alpha, rsLoRA, dropout): {sorted(settings)}; "
                         "one file describes them only if they agree")
    (r, alpha, use_rslora, dropout), = settings
    config = {"peft_type": "LORA", "bias": "none", "task_type": "CAUSAL_LM",
              "base_model_name_or_path": base_model_name_or_path,
              "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": use_rslora, "fan_in_fan_out": True,
              "inference_mode": True, "target_modules": sorted(layers)}
    tensors = {PREFIX + name + SUFFIX: p.float().contiguous() for name, p in lora_state_dict(model).items()}
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    files = {"adapter_model.safetensors": lambda path: save_file(tensors, path, metadata={"format": "pt"}),
             "adapter_config.json": lambda path: path.write_text(json.dumps(config, indent=2) + "\n")}
    for name, write in files.items():       # written beside its name and moved onto it: never half a file
        beside = dir / f".{name}.{os.getpid()}.tmp"
        try:
            write(beside)
            os.replace(beside, dir / name)
        finally:
            beside.unlink(missing_ok=True)


def load_lora(model, dir):
    """Read an adapter directory into a model: onto plain layers, which become LoRALinear, or into LoRA layers alike.

    -> the names of the adapted layers. Raises FileNotFoundError, or ValueError for a damaged file, an adapter for another
    model, or a feature that LoRALinear has not (DoRA, trained biases, per-layer ranks, …); the model is then unchanged."""
    config, state = _read_adapter(Path(dir))
    names = sorted({name.rpartition(".")[0] for name in state})
    settings = dict(r=config["r"], alpha=config["lora_alpha"], use_rslora=config.get("use_rslora", False),
                    dropout=config.get("lora_dropout", 0.0))
    modules, shapes = dict(model.named_modules()), {}
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{dir} adapts {name}, which the model has not as a linear layer: another base?")
        shapes |= {f"{name}.lora_A": (config["r"], layer.in_features), f"{name}.lora_B": (layer.out_features, config["r"])}
    _check_fit(state, shapes)
    old = {name: module for name, module in modules.items() if isinstance(module, LoRALinear)}
    if not old:
        _adapt(model, names, **settings)
    elif old.keys() != set(names) or any((layer.r, layer.alpha, layer.use_rslora) !=
                                         (settings["r"], settings["alpha"], settings["use_rslora"])
                                         for layer in old.values()):
        raise ValueError(f"{dir} differs from the model's LoRA layers in names, r or alpha; remove_lora(model) first")
    load_lora_state_dict(model, state)
    return names


def _read_adapter(dir):
    """-> config, {our name: tensor}; refuses by name whatever would change the function and is not implemented here."""
    config_path, tensor_path = dir / "adapter_config.json", dir / "adapter_model.safetensors"
    for path in (config_path, tensor_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; an adapter is adapter_config.json and "
                                    "adapter_model.safetensors")
    try:
        config = dict(json.loads(config_path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config_path} is not a JSON object: {error}") from error
    missing = {"peft_type", "r", "lora_alpha"} - config.keys()
    if missing:
        raise ValueError(f"{config_path} lacks {_some(missing)}")
    refused = [f"{key}={value!r}" for key, value in config.items()
               if (value not in ALLOWED[key] if key in ALLOWED else value and key not in KNOWN)]
    if refused:
        raise ValueError(f"{config_path} asks for what is not supported here: {_some(refused)}")
    try:
        tensors = load_file(tensor_path)
    except SafetensorError as error:
        raise ValueError(f"{tensor_path} is not a whole safetensors file ({error}); fetch or write it again") from error
    state = {name.removeprefix(PREFIX).removesuffix(SUFFIX): tensor for name, tensor in tensors.items()}
    layers = {name.rpartition(".")[0] for name in state}
    expected = {f"{PREFIX}{layer}.{part}{SUFFIX}" for layer in layers for part in ("lora_A", "lora_B")}
    if not tensors or tensors.keys() != expected:
        raise ValueError(f"{tensor_path} is not a plain LoRA: unexpected {_some(tensors.keys() - expected)}; "
                         f"missing {_some(expected - tensors.keys())}")
    return config, state


def _some(names, most=4):
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
