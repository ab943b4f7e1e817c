"""
LoRA in one file (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

Fine-tuning changes a weight W by some ΔW of the same size. LoRA freezes W, and learns
ΔW as the product of two thin matrices (§4.1):

    y = W x + b + scaling B A x        W (out, in) is frozen, scaling = alpha / r
                                       A (r, in) and B (out, r) are trained

The rank r is much smaller than in and out, so A and B have few numbers: 30,720
instead of 2,359,296 for a layer 768 -> 3072 with r = 8. Only they need gradients,
optimizer state and a place on disk. B starts at zero, so training starts exactly at
the base model. After training, scaling B A can be added to W: the tuned model is then
as fast as the base.

    apply_lora(model, r=8, alpha=16, target_modules=("c_attn", "c_proj", "c_fc"))
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=3e-3)    # then train
    merge_lora(model)                                     # W becomes W + scaling B A

Read it from the top. The layer, LoRA on a model, and merging are the method. Then
comes the same product with a backward pass written by hand, without which LoRA on all
layers is often no faster than full fine-tuning. The last parts are for reference:
other kinds of layers, what can be adapted, and how a layer is replaced.
"""
import math
import sys
import weakref
from collections import Counter
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F


class LoRALinear(nn.Linear):
    """nn.Linear with a low-rank update beside its frozen weight.

    x (..., in_features) -> W x + b + scaling * B A x, (..., out_features)
    """

    def __init__(self, base, r=8, alpha=16, dropout=0.0, use_rslora=False):
        super().__init__(base.in_features, base.out_features, device="meta")  # no memory
        self.weight, self.bias = base.weight, base.bias     # shared with base, not copied
        options = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **options))
        # U(-1/√in, 1/√in), as in PEFT. The paper draws A from a Gaussian (§4.1).
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = scaling_of(r, alpha, use_rslora)             # alpha / r
        init_state(self, r, alpha, dropout, use_rslora)

    def definition(self, x):
        """The equation as it is written. Autograd finds the gradients."""
        y = F.linear(x, self.W, self.bias)                      # (..., out)
        dropped = F.dropout(x, self.dropout, self.training)
        h = F.linear(dropped.to(self.lora_A.dtype), self.lora_A)        # (..., r)
        if self.rank_mask is not None:          # the rows of x use different adapters
            h = mask_ranks(h, self.rank_mask)
        update = self.scaling * F.linear(h, self.lora_B)        # (..., out)
        return y + update.to(y.dtype)

    # That is LoRA. The rest of the class switches it off, merges it, saves it and
    # makes it faster.

    def forward(self, x):
        """x (..., in_features) -> (..., out_features)."""
        if self.lora_A is None:                 # LoRA is switched off: see disable_lora
            return F.linear(x, self.W, self.bias)
        if is_merged(self):                     # W contains scaling * B A already
            y = F.linear(x, self.W, self.bias)
            return guard_backward(y, self)
        if product_applies(self, x):            # the usual case: the same, but faster
            return self.product(x)
        return self.definition(x)

    def product(self, x):
        """The result of definition(x), with the backward pass of LoRAProduct: faster."""
        A, B = self.lora_A, self.lora_B
        return LoRAProduct.apply(x, self.W, self.bias, A, B, self.scaling)

    @property
    def W(self):
        """The weight as (out, in). LoRAConv1D stores its transpose."""
        return self.weight

    def delta_weight(self):
        """scaling * B A in the shape of the weight."""
        return scaled_BA(self)

    def without_lora(self):
        """A plain nn.Linear that shares the weight and the bias."""
        layer = nn.Linear(self.in_features, self.out_features, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def extra_repr(self):
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}"

    # state_dict() always holds W, even when the layer is merged. If it held W + scaling
    # * B A, merging after loading it would add B A a second time.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if is_merged(self):
            destination[prefix + "weight"] = self.unmerged_weight

    def _load_from_state_dict(self, *args, **kwargs):
        unmerge(self)
        nn.Module._load_from_state_dict(self, *args, **kwargs)


def scaling_of(r, alpha, use_rslora):
    """The factor of B A.

    Dividing alpha by r reduces the need to retune the learning rate when r changes
    (§4.1). For large r it makes the update too small; rsLoRA divides by √r instead
    (Kalajdzievski 2023, arXiv 2312.03732).
    """
    return alpha / math.sqrt(r) if use_rslora else alpha / r


def init_state(layer, r, alpha, dropout, use_rslora):
    """Set what a LoRA layer has in addition to W, A, B and the scaling."""
    layer.r, layer.alpha = r, alpha
    layer.dropout, layer.use_rslora = dropout, use_rslora
    layer.fast = True                       # use product() where it applies
    # Buffers move with the model. Neither of these is part of the state dict.
    layer.register_buffer("rank_mask", None, persistent=False)          # see mask_ranks
    layer.register_buffer("unmerged_weight", None, persistent=False)    # see merge


# ---- LoRA on a model ---------------------------------------------------------------

def apply_lora(model, r=8, alpha=16, target_modules=("c_attn", "c_proj", "c_fc"),
               dropout=0.0, use_rslora=False, layers=None):
    """Freeze the model, and add a trainable update to each layer that a target matches.

    A target matches whole names at the end of a dotted path, as in PEFT: "c_proj"
    matches both h.0.attn.c_proj and h.0.mlp.c_proj, "attn.c_proj" only the first.
    "all-linear" matches every linear layer, except those that share their weight and
    the output heads of transformers' models. A second call on other layers adds to
    the first, so the rank may differ between layers.

    layers  {class of a layer: its LoRA class}, in addition to Linear, Embedding and Conv1D

    Returns the paths of the adapted layers. Raises ValueError, and leaves the model
    as it was, if a setting is out of range, a target matches nothing, or a layer
    cannot be adapted (see check_can_adapt).
    """
    lora_classes = known_classes(layers)
    paths = find_targets(model, target_modules, lora_classes)
    settings = {"r": r, "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora}
    adapt_layers(model, dict.fromkeys(paths, settings), lora_classes)
    return paths


def adapt_layers(model, settings, lora_classes):
    """Adapt each path of settings {path: {"r", "alpha", "dropout", "use_rslora"}}.

    Everything is checked, and all layers are made, before anything is changed.
    """
    check_model(model)
    for path, arguments in settings.items():
        check_settings(**arguments)
        check_can_adapt(model, path, lora_classes)
    new_layers = {}
    for path, arguments in settings.items():
        base = model.get_submodule(path)
        new_layers[path] = lora_classes[type(base)](base, **arguments)
    model.requires_grad_(False)
    for path, layer in new_layers.items():
        replace_layer(model, path, layer)
    # That froze the A and B of earlier calls, too.
    for layer in find_lora_layers(model).values():
        for name, p in layer.named_parameters(recurse=False):
            is_A_or_B = name not in ("weight", "bias")
            p.requires_grad_(is_A_or_B)


def is_lora(module):
    """Whether a module is a LoRA layer."""
    return isinstance(module, (LoRALinear, LoRAEmbedding))


def find_lora_layers(model):
    """{path: layer} of the adapted layers, which may be empty."""
    return {path: module for path, module in model.named_modules() if is_lora(module)}


def lora_layers(model):
    """{path: layer} of the adapted layers.

    Raises ValueError if there are none, or if one was changed after apply_lora.
    """
    layers = find_lora_layers(model)
    if not layers:
        raise ValueError("this model has no LoRA layers; call apply_lora or load_lora first")
    for path, layer in layers.items():
        if "weight" not in layer._parameters or "forward" in vars(layer):
            raise ValueError(
                f"{path} was changed after apply_lora (pruned, parametrized, given "
                "another forward, ...); undo that first"
            )
    return layers


def active_layers(model):
    """{path: layer} of the adapted layers that use their adapter now.

    Raises ValueError if there are none, or if different rows of a batch use different
    adapters.
    """
    layers = lora_layers(model)
    layers = {path: layer for path, layer in layers.items() if layer.lora_A is not None}
    if not layers:
        raise ValueError(
            "LoRA is switched off; leave disable_lora, or select an adapter with "
            "lab.adapters.Adapters.use(name)"
        )
    if any(layer.rank_mask is not None for layer in layers.values()):
        raise ValueError(
            "the rows of a batch use different adapters; select a single one with "
            "lab.adapters.Adapters.use(name)"
        )
    return layers


def lora_parameters(model):
    """The parameters to give to the optimizer: every A (r, in) and B (out, r)."""
    parameters = []
    for layer in active_layers(model).values():
        parameters += [layer.lora_A, layer.lora_B]
    return parameters


def lora_state_dict(model):
    """{"<path>.lora_A": (r, in), "<path>.lora_B": (out, r)}; they share the model's memory."""
    state = {}
    for path, layer in active_layers(model).items():
        state[f"{path}.lora_A"] = layer.lora_A.detach()
        state[f"{path}.lora_B"] = layer.lora_B.detach()
    return state


@torch.no_grad()
def load_lora_state_dict(model, state):
    """Copy the tensors of a lora_state_dict into the model. A merged model is unmerged.

    Raises ValueError, and changes nothing, if a tensor is missing, unknown, of
    another shape, or not finite.
    """
    current = lora_state_dict(model)
    check_state(state, {name: tuple(tensor.shape) for name, tensor in current.items()})
    unmerge_lora(model)
    for name, tensor in state.items():
        current[name].copy_(tensor)


def check_state(state, shapes):
    """Raises ValueError if `state` is not finite, or not of the names and shapes given."""
    missing = sorted(shapes.keys() - state.keys())
    unknown = sorted(state.keys() - shapes.keys())
    for problem, names in (("it lacks", missing), ("unexpected", unknown)):
        if names:
            raise ValueError(
                f"the adapter does not fit this model: {problem} "
                f"{', '.join(names[:4])} ({len(names)} in all); was it made with the "
                "same target_modules?"
            )
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the model needs "
                f"{shapes[name]}; was it trained on another base?"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} contains NaN or infinity; is the file damaged, or did "
                "training diverge?"
            )


def save_lora(model, dir, base_model_name_or_path=None):
    """Write the adapter into `dir` as PEFT does: adapter_config.json and weights.

    base_model_name_or_path is stored as a note. Raises ValueError, and writes
    nothing, if the format cannot express what the model computes. Needs lab/ and
    safetensors.
    """
    from lab import peft_files
    peft_files.save_lora(model, dir, base_model_name_or_path)


def load_lora(model, dir):
    """Read an adapter directory written by save_lora or by PEFT.

    If the model has LoRA with the same layers and settings, its A and B are
    overwritten. Returns the paths of the adapted layers. Raises FileNotFoundError, or
    ValueError if a file is damaged, is for another model, or asks for what is not
    supported here (DoRA, trained biases, ...); the model is then unchanged.
    """
    from lab import peft_files
    return peft_files.load_lora(model, dir)


@contextmanager
def disable_lora(model):
    """Inside the block the model is the base model, bit for bit, even if it is merged."""
    before = []
    try:
        for layer in lora_layers(model).values():
            before.append((layer, layer.lora_A, layer.lora_B, is_merged(layer)))
            unmerge(layer)
            layer.lora_A = layer.lora_B = None
        yield model
    finally:
        for layer, A, B, was_merged in before:
            layer.lora_A, layer.lora_B = A, B
            if was_merged:
                merge(layer)


# ---- merging -----------------------------------------------------------------------

def merge_lora(model):
    """Add the update to the weights: the model then runs at the speed of the base.

    The original weights are kept until unmerge_lora or remove_lora. The sum is
    rounded to the dtype of the weight: a bfloat16 weight loses updates smaller than
    half the distance between adjacent bfloat16 numbers. Layers that are merged already
    are skipped. Raises ValueError, and changes nothing, if the model has no LoRA, it is
    switched off, or a weight is not of a float type.
    """
    layers = active_layers(model)
    for path, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise ValueError(
                f"{path} keeps its weight as {layer.weight.dtype}, which cannot hold the "
                "sum; load the adapter for the base in float weights, and merge it there"
            )
    for layer in layers.values():
        merge(layer)


def unmerge_lora(model):
    """Undo merge_lora: the base weights are bit-identical to what they were before it.

    Raises ValueError if the model has no LoRA.
    """
    for layer in lora_layers(model).values():
        unmerge(layer)


def remove_lora(model):
    """Put plain layers back: the base model or, after merge_lora, the merged one.

    All parameters stay frozen; model.requires_grad_(True) makes them trainable again.
    Raises ValueError if the model has no LoRA.
    """
    for path, layer in lora_layers(model).items():
        replace_layer(model, path, layer.without_lora())


def scaled_BA(layer):
    """scaling * B A (out, in), in float32, or float64 if A is."""
    dtype = torch.promote_types(layer.lora_A.dtype, torch.float32)
    return layer.scaling * (layer.lora_B.to(dtype) @ layer.lora_A.to(dtype))


def is_merged(layer):
    """Whether the weight of a layer contains scaling * B A."""
    return layer.unmerged_weight is not None


@torch.no_grad()
def merge(layer):
    """merge_lora for one layer."""
    if layer.lora_A is None or is_merged(layer):
        return
    layer.unmerged_weight = layer.weight.data
    layer.weight.data = (layer.weight + layer.delta_weight()).to(layer.weight.dtype)
    note_change(layer)


def unmerge(layer):
    """unmerge_lora for one layer: put the original tensor back."""
    if is_merged(layer):
        layer.weight.data = layer.unmerged_weight
        layer.unmerged_weight = None
        note_change(layer)


def note_change(layer):
    """Tell autograd that the weight has changed: it does not notice an assigned .data.

    A backward pass whose forward used the old weight then raises an error, instead of
    silently using the new one.
    """
    torch.autograd.graph.increment_version(layer.weight)


def guard_backward(y, layer):
    """Return y, the output of a merged layer; its backward raises if A and B should train."""
    trains = torch.is_grad_enabled() and layer.lora_A.requires_grad
    # torch.compile cannot trace a backward that raises: there is no guard there.
    if trains and not torch.compiler.is_compiling():
        return RefuseBackward.apply(y, layer.lora_A)
    return y


class RefuseBackward(torch.autograd.Function):
    """The identity. Its backward raises, because a merged layer has no gradient for A, B."""

    generate_vmap_rule = True       # so that a merged model works under torch.func.vmap

    @staticmethod
    def forward(y, A):
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("A and B are merged and get no gradient; call unmerge_lora(model)")


# ---- W x + b + scaling B A x with a backward pass by hand --------------------------

class LoRAProduct(torch.autograd.Function):
    """y = W x + b + s B A x, with a backward pass that is faster than autograd's.

    s is the scaling. For N tokens, x is (N, in), y and g = ∂loss/∂y are (N, out):

        u = x Aᵀ                   (N, r)
        y = x Wᵀ + b + s u Bᵀ      (N, out)

    A product Y = P Q has the gradients ∂P = ∂Y Qᵀ and ∂Q = Pᵀ ∂Y, where ∂P is short for
    ∂loss/∂P. For s u Bᵀ, and then for u = x Aᵀ, whose gradient is v, that gives

        v = s g B                  (N, r)
        ∂x = g W + v A             (N, in)
        ∂A = vᵀ x                  (r, in)
        ∂B = s gᵀ u                (out, r)

    W is frozen, so ∂W = gᵀ x, a third of the products of full fine-tuning, is not
    computed. Autograd finds the same gradients from definition(), but more slowly:

    1. g is stored row by row, and gᵀ u reads it column by column. (uᵀ g)ᵀ is the same
       matrix, and reads it row by row, which is faster on a CPU. For the same reason g B
       is faster with a contiguous copy of Bᵀ.
    2. Adding s u Bᵀ to the finished x Wᵀ reads and writes all of y once more. If N > in,
       y is larger than W, and it is cheaper to add s B A to W first: y = x (W + s B A)ᵀ.
       This is called folding. ∂x = g (W + s B A) is folded in the same cases.

        as autograd does it     µs       as it is done here      µs
        gᵀ u                   974       (uᵀ g)ᵀ                201
        g B                    407       g B, B transposed      179
        y += s u Bᵀ            177       W + s B A               19
        ∂x += v A              177       W + s B A               19

    These are the times for 128 -> 512, N = 2048 and r = 8 on two CPU cores, where x
    Wᵀ, g W and gᵀ x take 1465, 1191 and 1421 µs; bench/products.py measures them.

    Folding rounds W + s B A to the dtype of the products. If W is stored in float32,
    nothing is lost: without autocast nothing is rounded, and with it W would be rounded
    anyway. But a W stored in bfloat16 is exact as it is, and in the rounded sum an update
    smaller than half the gap between neighboring bfloat16 numbers would vanish. So there
    the two terms stay separate: see with_low_rank_term.

    Saved for backward: x, W, and tensors with a side of length r.
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, s):
        device = x.device.type
        dtype = W.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            rows = x.reshape(-1, x.size(-1)).to(dtype)              # (N, in)
            A_cast = A.to(dtype)                                    # (r, in)
            b_cast = None if b is None else b.to(dtype)             # (out,)
            sBt = scaled_transpose(B, s, dtype)                     # (r, out)
            u = rows @ A_cast.t()                                   # (N, r)
            is_precise = W.element_size() >= 4
            has_many_tokens = len(rows) > W.size(1)                 # N > in
            ctx.fold = is_precise and has_many_tokens
            if ctx.fold:
                y = F.linear(rows, folded(W, A_cast, sBt), b_cast)  # (N, out)
            else:
                y = with_low_rank_term(rows, W.to(dtype).t(), u, sBt, b_cast)
        ctx.save_for_backward(rows, s * u, W, A_cast, sBt)
        ctx.x_shape = x.shape
        ctx.x_dtype, ctx.A_dtype, ctx.B_dtype = x.dtype, A.dtype, B.dtype
        return y.view(*x.shape[:-1], W.size(0))

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "LoRAProduct has no second derivative; set layer.fast = False to get one"
            )
        rows, su, W, A_cast, sBt = ctx.saved_tensors
        g = g.reshape(len(rows), W.size(0))                         # (N, out)
        v = g @ sBt.t()                                             # (N, r)
        dA = v.t() @ rows                                           # (r, in)
        dB = transposed_product(g, su)                              # (out, r)
        dx = None
        if ctx.needs_input_grad[0]:
            if ctx.fold:
                dx = g @ folded(W, A_cast, sBt)                     # (N, in)
            else:
                dx = with_low_rank_term(g, W.to(rows.dtype), v, A_cast)
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, None, None, dA.to(ctx.A_dtype), dB.to(ctx.B_dtype), None


def with_low_rank_term(X, M, u, C, b=None):
    """X M + u C + b (N, n), for X (N, m), M (m, n), u (N, r), C (r, n) and b (n,) or None.

    In the forward pass X is x, M = Wᵀ and C = s Bᵀ; in the backward pass X is g, M = W,
    u is v and C = A. Adding u C to the finished X M reads and writes all of it once more.
    On an H200 that takes 46 µs for 8,192 tokens and 768 -> 3072, while X M itself takes
    64. If the result is much wider than X, it takes only 30 µs to copy X and M and
    compute one longer product instead:

        X M + u C = [X u] [M]
                          [C]
    """
    N, m = X.shape
    is_wide = M.size(1) >= 2 * m
    aligned = (m + u.size(1)) % 8 == 0              # else the product is slow on a GPU
    if is_wide and aligned and m < N:
        if M.is_contiguous():
            MC = torch.cat((M, C))                          # (m + r, n)
        else:                           # a transpose: copied in the order of its memory
            MC = torch.cat((M.t(), C.t()), dim=1).t()       # (m + r, n)
        return F.linear(torch.cat((X, u), dim=1), MC.t(), b)
    y = F.linear(X, M.t(), b)
    return y.addmm_(u, C)


def scaled_transpose(B, s, dtype):
    """(s * B.t()).to(dtype).contiguous(), (r, out), in one kernel."""
    r, out_features = B.t().shape
    result = B.new_empty(r, out_features, dtype=dtype)
    return torch.mul(B.t(), s, out=result)


def transposed_product(g, u):
    """gᵀ u (out, r), for g (N, out) and u (N, r)."""
    if g.is_cpu:
        return (u.t() @ g).t()      # reads g row by row, as stored: five times faster
    return g.t() @ u


def folded(W, A_cast, sBt):
    """W + s B A (out, in) in the dtype of A_cast.

    s B A is computed in that dtype, the sum in that of W.
    """
    if W.dtype == A_cast.dtype:
        return torch.addmm(W, sBt.t(), A_cast)
    sBA = sBt.t() @ A_cast
    result = torch.empty_like(W, dtype=A_cast.dtype)
    return torch.add(W, sBA, out=result)        # one kernel, which rounds what it stores


def product_applies(layer, x):
    """Whether product() can be used for x.

    It does not support dropout, a trainable W or b, rows with different adapters,
    dtypes that differ without autocast, empty, meta, sparse or nested tensors,
    transforms of torch.func, and export. definition() supports all of them.
    """
    if not layer.fast or layer.rank_mask is not None:
        return False
    if x.is_nested or x.layout != torch.strided or x.numel() == 0 or x.is_meta:
        return False
    if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
        return False
    if layer.training and layer.dropout > 0:
        return False
    return dtypes_fit(layer, x) and not is_transformed()


def dtypes_fit(layer, x):
    """Whether LoRAProduct returns the dtype that nn.Linear would return."""
    if torch.is_autocast_enabled(x.device.type):
        return layer.weight.dtype != torch.float64      # autocast leaves float64 alone
    return x.dtype == layer.weight.dtype


def is_transformed():
    """Whether torch.func, forward-mode derivatives or torch.export must trace a Function."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    # torch.compile takes LoRAProduct as it is; torch.export, without it, looks inside.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


# ---- other kinds of layers ---------------------------------------------------------

class LoRAEmbedding(nn.Embedding):
    """nn.Embedding with a low-rank update. Here "in" is the vocabulary.

    idx (...) int64 -> W[idx] + scaling * (B A).T[idx], (..., embedding_dim)

    As in PEFT, dropout is stored but has no effect, and A, not B, starts at zero: the
    first step then changes only the tokens that occurred.
    """

    def __init__(self, base, r=8, alpha=16, dropout=0.0, use_rslora=False):
        super().__init__(**embedding_options(base), device="meta")
        self.weight = base.weight
        options = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.zeros(r, self.num_embeddings, **options))
        self.lora_B = nn.Parameter(torch.empty(self.embedding_dim, r, **options))
        nn.init.normal_(self.lora_B)
        self.scaling = scaling_of(r, alpha, use_rslora)
        init_state(self, r, alpha, dropout, use_rslora)

    def forward(self, idx):
        """idx (...) int64 -> (..., embedding_dim)."""
        y = super().forward(idx)                                # (..., out)
        if self.lora_A is None:
            return y
        if is_merged(self):
            return guard_backward(y, self)
        h = F.embedding(
            idx, self.lora_A.t(), self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )                                                       # (..., r)
        if self.rank_mask is not None:
            h = mask_ranks(h, self.rank_mask)
        update = self.scaling * F.linear(h, self.lora_B)        # (..., out)
        return y + update.to(y.dtype)

    def delta_weight(self):
        """scaling * B A in the shape of the weight (vocabulary, embedding_dim)."""
        return scaled_BA(self).t()

    def without_lora(self):
        """A plain nn.Embedding that shares the weight."""
        layer = nn.Embedding(**embedding_options(self), device="meta")
        layer.weight = self.weight
        return layer

    def extra_repr(self):
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}"

    _save_to_state_dict = LoRALinear._save_to_state_dict
    _load_from_state_dict = LoRALinear._load_from_state_dict


def embedding_options(layer):
    """The arguments that make an embedding like this one."""
    names = ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq", "sparse")
    return {name: getattr(layer, name) for name in names}


class LoRAConv1D(LoRALinear):
    """LoRALinear for the Conv1D of transformers' GPT-2, whose weight is (in, out)."""

    def __init__(self, base, r=8, alpha=16, dropout=0.0, use_rslora=False):
        in_features, out_features = base.weight.shape
        linear = nn.Linear(in_features, out_features, device="meta")
        linear.weight, linear.bias = base.weight, base.bias
        super().__init__(linear, r, alpha, dropout, use_rslora)

    @property
    def W(self):
        """The weight as (out, in)."""
        return self.weight.t()

    def delta_weight(self):
        """scaling * B A in the shape of the weight (in, out)."""
        return scaled_BA(self).t()

    def without_lora(self):
        """A plain Conv1D that shares the weight and the bias."""
        with torch.device("meta"):
            layer = conv1d_class()(self.out_features, self.in_features)
        layer.weight, layer.bias = self.weight, self.bias
        return layer


def conv1d_class():
    """transformers' Conv1D, or None if nobody has imported transformers."""
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D


def mask_ranks(h, rank_mask):
    """Zero, in each row of h (rows, ..., r), the ranks of adapters that the row does not use.

    The rows of a batch may use different adapters, whose A and B are stacked
    (lab/adapters.py). rank_mask (rows, r) is 1 for the ranks of the row's own adapter,
    else 0. Returns h's shape; a batch of one row is repeated for every row of the mask.
    Raises ValueError if the batch has another number of rows.
    """
    rows = len(rank_mask)
    if h.dim() < 2 or len(h) not in (1, rows):
        raise ValueError(
            f"the batch has shape {tuple(h.shape[:-1])}, but adapters were chosen "
            f"for {rows} rows; pass that many, or call adapters.use(...) again"
        )
    while rank_mask.dim() < h.dim():
        rank_mask = rank_mask.unsqueeze(1)              # (rows, 1, r)
    return h * rank_mask


# ---- what can be adapted -----------------------------------------------------------

def known_classes(layers=None):
    """{class of a layer: its LoRA class}, with those of `layers` added."""
    known = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding}
    if conv1d_class() is not None:
        known[conv1d_class()] = LoRAConv1D
    return known | (layers or {})


def check_model(model):
    """Raises ValueError if LoRA cannot be applied to any layer of the model now."""
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError("apply LoRA first, and then wrap the model in DistributedDataParallel")
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise ValueError("the model has lazy layers; run it once, so that they get their shapes")


def check_settings(r, alpha, dropout, use_rslora):
    """Raises ValueError if a setting is not of its type, or out of range."""
    if type(r) is not int or not 1 <= r < 2**31:
        raise ValueError(f"r is {r!r}; the rank must be a positive integer")
    if not is_number(alpha) or not 0 < alpha <= torch.finfo(torch.float32).max:
        raise ValueError(f"alpha is {alpha!r}; expected a positive number within float32")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; expected a number in [0, 1)")
    if type(use_rslora) is not bool:
        raise ValueError(f"use_rslora is {use_rslora!r}; expected True or False")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def find_targets(model, target_modules, lora_classes):
    """The paths that the targets match. Raises ValueError if one matches nothing."""
    if isinstance(target_modules, str) and target_modules != "all-linear":
        target_modules = [target_modules]
    if not isinstance(target_modules, (str, list, tuple, set)):
        raise ValueError(f"target_modules is {target_modules!r}; expected a list of names")
    found = {}
    if target_modules == "all-linear":
        found = dict.fromkeys(all_linear(model, lora_classes))
    else:
        for target in target_modules:
            matches = [path for path, _ in model.named_modules() if ends_with(path, target)]
            if not matches:
                raise ValueError(
                    f"target {target!r} matches no module; "
                    f"{adaptable(model, lora_classes)}"
                )
            found |= dict.fromkeys(matches)
    if not found:
        raise ValueError(
            f"target_modules {target_modules!r} is empty or matches nothing; "
            f"{adaptable(model, lora_classes)}"
        )
    return list(found)


def ends_with(path, target):
    """Whether the dotted names of target are the last ones of path."""
    return target != "" and f".{path}".endswith(f".{target}")


def all_linear(model, lora_classes):
    """The paths of all linear layers, except heads and layers that share their weight."""
    heads = set()
    for module in model.modules():
        if hasattr(module, "get_output_embeddings"):        # of transformers' models
            heads.add(module.get_output_embeddings())
        if type(module).__name__.endswith("ForSequenceClassification"):
            heads |= {getattr(module, name, None) for name in ("score", "classifier")}
    uses = weight_uses(model)
    paths = []
    for path, module in model.named_modules():
        known = type(module) in lora_classes or is_lora(module)
        is_linear = known and not isinstance(module, nn.Embedding)
        if is_linear and module not in heads and uses[id(module.weight)] == 1:
            paths.append(path)
    return paths


def adaptable(model, lora_classes):
    """The names of the layers that can be adapted, for an error message."""
    names = set()
    for path, module in model.named_modules():
        if type(module) in lora_classes:
            names.add(path.rpartition(".")[2])
    return "layers that can be adapted: " + (", ".join(sorted(names)) or "none")


def check_can_adapt(model, path, lora_classes):
    """Raises ValueError if LoRA on a module would have no effect, or change other modules."""
    reason = reason_against_lora(model, path, lora_classes)
    if reason is not None:
        raise ValueError(f"{path} cannot be adapted: {reason}")


def reason_against_lora(model, path, lora_classes):
    """Why a module cannot be adapted, or None. LoRA acts only if the module is called."""
    module = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    if is_lora(module):
        return "it has LoRA already; call remove_lora(model) first"
    if type(module) not in lora_classes:
        kind = type(module).__name__
        names = adaptable(model, lora_classes)
        return f"it is a {kind}, not an nn.Linear or nn.Embedding; {names}"
    if "forward" in vars(module):
        return "it has a forward of its own (an offloading hook?), which bypasses LoRA"
    if parent is module:
        return "it is the model itself; put it into an nn.Sequential"
    return reason_against_parent(parent) or reason_against_parameters(model, module)


def reason_against_parent(parent):
    """Why a module may use its layers without calling them, or None."""
    if hasattr(parent, "_orig_mod"):
        return "it is compiled on its own; compile the model after apply_lora"
    fast_path = torch.backends.mha.get_fastpath_enabled()
    if fast_path and isinstance(parent, nn.TransformerEncoderLayer):
        return (
            "nn.TransformerEncoderLayer reads its weight without calling it; call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    if "Mamba" in type(parent).__name__:
        return "its module reads the weights of layers without calling them"
    return None


def reason_against_parameters(model, module):
    """Why the parameters of a module cannot be adapted, or None."""
    weight = module._parameters.get("weight")
    bias_is_computed = hasattr(module, "bias") and "bias" not in module._parameters
    if weight is None or bias_is_computed:
        return "its weight or bias is computed (weight_norm, pruning, ...); remove that first"
    if module._parameters.keys() - {"weight", "bias"} or module._modules:
        return "it has parameters or modules other than its weight and bias"
    is_float = weight.is_floating_point() and weight.element_size() >= 2
    if not is_float and type(module) in known_classes():    # other classes have their own
        return f"its weight is {weight.dtype}; convert it to a float type first"
    if weight_uses(model)[id(weight)] > 1:
        return (
            "it shares its weight with another module, and merging would change both; "
            "choose other targets, or untie the weights"
        )
    if getattr(module, "max_norm", None) is not None:
        return "it is an embedding with max_norm, which rescales its weight in use"
    return None


def weight_uses(model):
    """How many modules hold each parameter: {id(parameter): count}."""
    uses = Counter()
    for _, module in model.named_modules(remove_duplicate=False):
        uses.update(id(p) for p in module.parameters(recurse=False))
    return uses


# ---- replacing a layer -------------------------------------------------------------

# What a LoRA layer sets itself. An attribute of the old layer with such a name is not kept.
LORA_ATTRIBUTES = ("scaling", "r", "alpha", "dropout", "use_rslora", "fast")


def replace_layer(model, path, new_layer):
    """Replace the layer at `path`, and keep what users have attached to it.

    The new layer gets the old one's training mode, hooks, buffers and extra attributes.
    """
    old = model.get_submodule(path)
    new_layer.training = old.training
    for name, value in vars(old).items():
        # The dicts of hooks are shared, so that the caller's handles can still remove
        # them.
        is_new = name not in vars(new_layer) and name not in LORA_ATTRIBUTES
        if is_new or "hook" in name:
            vars(new_layer)[name] = value
    for name, buffer in old.named_buffers(recurse=False):
        if name not in ("rank_mask", "unmerged_weight"):
            persistent = name not in old._non_persistent_buffers_set
            new_layer.register_buffer(name, buffer, persistent)
    # A hook that receives its module must receive the new one.
    for hook in new_layer._load_state_dict_pre_hooks.values():
        if hook.with_module:
            hook.module = weakref.ref(new_layer)
    model.set_submodule(path, new_layer)
