"""
A frozen weight in four bits: NF4, the format of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

LoRA does not change W, so W need not be precise. NF4 keeps each number of W as one of
sixteen levels, and a scale for each block of 64 numbers (§3):

    W ≈ scale · level[code]        scale = the largest |w| of the block, code = 0 … 15

The levels are quantiles of a normal distribution, because trained weights are nearly
normal: the levels lie densest where most weights are. The scales, in float32, would
still cost half a bit per number. They are quantized too ("double quantization"):
their mean is subtracted, and each is stored in eight bits, in groups of 256 blocks
that share one more float32. In all that is

    1/2 + 1/64 + 4 / (64 · 256) = 0.516 bytes a number        (bfloat16: 2)

For each product W is computed again from its codes, in the dtype of the product, and
forgotten: forward and backward keep no copy of it.

    quantize_linears(model)                         # nn.Linear -> NF4Linear, but not a tied head
    apply_lora(model, layers=LAYERS)                # then train as always

Read it from the top: the levels, a matrix, its bytes, the layers.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from lora_minimal import (
    LoRALinear,
    conv1d_class,
    known_classes,
    mask_ranks,
    replace_layer,
    scaled_transpose,
    transposed_product,
    weight_uses,
)

BLOCK = 64          # numbers that share a scale
GROUP = 256         # blocks whose scales share a scale
SMALLEST = 1e-38    # a smaller scale counts as this, so that nothing is divided by zero

# The probability at which the outermost level lies: that of bitsandbytes. The paper
# (§3, equation 4) leaves it open; 1 would put the level at infinity.
OUTERMOST = 0.9677083


# ---- the levels --------------------------------------------------------------------

def nf4_levels():
    """The sixteen levels, ascending from -1 to 1: (16,) float32.

    Eight quantiles above the median, and seven below it, each at equal steps of
    probability; zero between them is exact, so that weights of zero stay zero.
    """
    above = normal_quantiles(8)
    below = -normal_quantiles(7).flip(0)
    return torch.cat([below, torch.zeros(1), above])


def normal_quantiles(n):
    """n quantiles of a normal distribution above its median, ascending, scaled to end at 1."""
    # Falling from OUTERMOST, as bitsandbytes computes them; 0.5, the median, is left out.
    probabilities = torch.linspace(OUTERMOST, 0.5, n + 1)[:-1]
    quantiles = torch.special.ndtri(probabilities.double()).float()
    largest = quantiles[0]
    return (quantiles / largest).flip(0)


def scale_levels():
    """256 numbers in [-1, 1], ascending, for the scales: (256,) float32.

    Seven decades, each with twice as many numbers as the one below it (Dettmers et al.
    2022, arXiv 2110.02861, §2.1): a scale that is far from the others keeps its size,
    and does not cost the others their precision.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decades.append(10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(decades)                                   # (127,)
    return torch.cat([-positive, torch.zeros(1), positive, torch.ones(1)]).sort().values


def nearest(x, levels):
    """The number of the level that is nearest to each x: uint8, in the shape of x."""
    boundaries = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(x, boundaries, out_int32=True).to(torch.uint8)


NF4_LEVELS = nf4_levels()
SCALE_LEVELS = scale_levels()


# ---- a matrix ----------------------------------------------------------------------

def encode(W):
    """W, of any shape, as codes and scales.

    Returns the codes, two in a byte with the first in the upper half, (32 · blocks,)
    uint8; and the scales (blocks,) float32. The last block is filled up with zeros.
    """
    x = W.detach().float().flatten()
    x = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scales = x.abs().amax(dim=1)
    inverse = 1 / scales.clamp(min=SMALLEST)
    codes = nearest(x * inverse[:, None], NF4_LEVELS.to(W.device)).flatten()
    return codes[::2] * 16 + codes[1::2], scales


def decode(codes, scales, shape, dtype):
    """scale · level[code], in a shape and dtype: the inverse of encode(), except for rounding.

    A byte has two codes. A table gives the two levels of each of the 256 bytes, so every
    byte is read once, and not taken apart. The table has the dtype of the result.
    """
    if dtype.itemsize > 4:
        return decode(codes, scales, shape, torch.float32).to(dtype)
    table = on_device(pairs_of_levels, codes.device, dtype)         # (256,)
    pairs = table.index_select(0, codes.int())                      # (32 · blocks,)
    W = pairs.view(dtype).view(-1, BLOCK)
    W *= scales.to(dtype)[:, None]
    return W.flatten()[:shape.numel()].view(shape)


def pairs_of_levels(dtype):
    """For each byte the levels of its two codes, as one integer of twice the dtype's size."""
    byte = torch.arange(256)
    pairs = torch.stack([NF4_LEVELS[byte // 16], NF4_LEVELS[byte % 16]], dim=1)
    as_integer = torch.int32 if dtype.itemsize == 2 else torch.int64
    return pairs.to(dtype).view(as_integer).flatten()


TABLES = {}


def on_device(make, device, *arguments):
    """The tensor make(*arguments) on a device. Later calls return the same one again.

    A copy to a GPU would make the CPU wait for it in every step.
    """
    key = (make, device, *arguments)
    if key not in TABLES:
        with torch.inference_mode(False):
            TABLES[key] = make(*arguments).to(device)
    return TABLES[key]


def encode_scales(scales):
    """Scales (blocks,) in eight bits.

    Returns their mean (1,) and the largest distance from it in each group, (groups,),
    both float32; and the codes (groups, 256) uint8.
    """
    mean = scales.mean(dim=0, keepdim=True)
    distances = F.pad(scales - mean, (0, -len(scales) % GROUP)).view(-1, GROUP)
    largest = distances.abs().amax(dim=1)
    inverse = 1 / largest.clamp(min=SMALLEST)
    return mean, largest, nearest(distances * inverse[:, None], SCALE_LEVELS.to(scales.device))


def decode_scales(mean, largest, codes):
    """The inverse of encode_scales(), except for rounding: (256 · groups,) float32."""
    levels = on_device(scale_levels, codes.device)
    levels = levels.index_select(0, codes.flatten().int()).view(-1, GROUP)
    return torch.addcmul(mean, levels, largest[:, None]).flatten()


# ---- its bytes ---------------------------------------------------------------------
# A layer keeps all of this in one tensor of bytes, its weight. So it is saved, moved
# and counted like any other weight, and model.to(torch.bfloat16) cannot round a scale.

def sizes_of(n):
    """Bytes of the parts of n numbers: (mean and largest, codes of the scales, codes)."""
    blocks = math.ceil(n / BLOCK)
    groups = math.ceil(blocks / GROUP)
    floats = 4 * (1 + groups)
    aligned_floats = 16 * math.ceil(floats / 16)        # so that the codes begin aligned
    return aligned_floats, groups * GROUP, blocks * BLOCK // 2


def quantize(W):
    """W, of any shape, in four bits: (bytes,) uint8.

    Raises ValueError if W is not finite, or so large that its scales have no mean.
    """
    codes, scales = encode(W)
    mean, largest, scale_codes = encode_scales(scales)
    if not (mean.isfinite() & largest.isfinite().all()):
        raise ValueError(
            f"a weight of shape {tuple(W.shape)} has NaN or infinity, or numbers too large "
            "for four bits; is it damaged?"
        )
    packed = torch.zeros(sum(sizes_of(W.numel())), dtype=torch.uint8, device=W.device)
    own_floats, own_scale_codes, own_codes = packed.split(sizes_of(W.numel()))
    floats = torch.cat([mean, largest])
    own_floats.view(torch.float32)[:len(floats)] = floats
    own_scale_codes.copy_(scale_codes.flatten())
    own_codes.copy_(codes)
    return packed


def dequantize(packed, shape, dtype):
    """The weight of a shape from its bytes, in the dtype given."""
    shape = torch.Size(shape)
    floats, scale_codes, codes = packed.split(sizes_of(shape.numel()))
    floats = floats.view(torch.float32)
    scale_codes = scale_codes.view(-1, GROUP)
    scales = decode_scales(floats[:1], floats[1:1 + len(scale_codes)], scale_codes)
    return decode(codes, scales[:2 * len(codes) // BLOCK], shape, dtype)


# ---- the layers --------------------------------------------------------------------

class HasNF4Weight:
    """What layers can do with a weight (out_features, in_features) that is kept in bytes."""

    kept = None         # see for_forward

    def dequantize(self, dtype=torch.float32):
        """The weight (out_features, in_features) in a float dtype."""
        return dequantize(self.weight, (self.out_features, self.in_features), dtype)

    def for_forward(self, dtype, has_backward):
        """The weight for a forward pass.

        A forward pass inside a backward pass is that of gradient checkpointing, and the
        layer's own backward comes soon after it. Until then the weight is kept: that
        saves a third of the work, for the memory of one block.
        """
        W = self.dequantize(dtype)
        inside_backward = torch._C._current_graph_task_id() != -1
        if inside_backward and has_backward:
            self.kept = W
        return W

    def for_backward(self, dtype):
        """The weight for a backward pass."""
        W, self.kept = self.kept, None
        if W is None or W.dtype != dtype:
            W = self.dequantize(dtype)
        return W


class NF4Linear(HasNF4Weight, nn.Linear):
    """A frozen nn.Linear whose weight is in NF4: x (..., in) -> W x + b, (..., out).

    weight (bytes,) uint8 is made by quantize(). The bias stays as it is.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias=False, device="meta")
        n_bytes = sum(sizes_of(in_features * out_features))
        weight = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            zeros = torch.zeros(out_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def of(cls, layer):
        """The NF4Linear of an nn.Linear, or of the Conv1D of transformers' GPT-2.

        The bias is shared. On the meta device the weight stays empty.
        """
        W = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
        new = cls(W.size(1), W.size(0), bias=False, device=W.device)
        new.bias = layer.bias
        if not W.is_meta:
            new.weight.data = quantize(W)
        return new

    def forward(self, x):
        """x (..., in_features) -> (..., out_features)."""
        return NF4Product.apply(x, self.weight, self.bias, self)


class LoRANF4Linear(HasNF4Weight, LoRALinear):
    """LoRALinear beside a weight in NF4.

    It cannot be merged: four bits do not hold W + scaling * B A.
    """

    def definition(self, x):
        """The equation as it is written, and no W is kept for the backward pass."""
        y = NF4Product.apply(x, self.weight, self.bias, self)
        dropped = F.dropout(x, self.dropout, self.training)
        h = F.linear(dropped.to(self.lora_A.dtype), self.lora_A)
        if self.rank_mask is not None:
            h = mask_ranks(h, self.rank_mask)
        update = self.scaling * F.linear(h, self.lora_B)
        return y + update.to(y.dtype)

    def forward(self, x):
        """x (..., in_features) -> (..., out_features)."""
        if self.lora_A is None:
            return NF4Product.apply(x, self.weight, self.bias, self)
        drops = self.training and self.dropout > 0
        if self.fast and self.rank_mask is None and not drops:
            return self.product(x)
        return self.definition(x)

    def product(self, x):
        """The result of definition(x), with a backward pass by hand."""
        A, B = self.lora_A, self.lora_B
        return NF4LoRAProduct.apply(x, self.weight, self.bias, A, B, self)

    @property
    def W(self):
        """The weight as (out, in), in float32."""
        return self.dequantize()

    def without_lora(self):
        """An NF4Linear that shares the weight and the bias."""
        layer = NF4Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer


class NF4Product(torch.autograd.Function):
    """y = W x + b, and ∂x = g W. Saved for backward: the bytes of W."""

    @staticmethod
    def forward(ctx, x, packed, b, layer):
        dtype = dtype_of_products(x)
        with torch.autocast(x.device.type, enabled=False):
            W = layer.for_forward(dtype, ctx.needs_input_grad[0])
            y = F.linear(x.to(dtype), W, b if b is None else b.to(dtype))
        ctx.save_for_backward(packed)       # only to notice if it changes before backward
        ctx.layer, ctx.dtype, ctx.x_dtype = layer, dtype, x.dtype
        return y

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivative()
        ctx.saved_tensors  # noqa: B018    raises if the bytes have changed
        dx = g @ ctx.layer.for_backward(ctx.dtype)
        return dx.to(ctx.x_dtype), None, None, None


class NF4LoRAProduct(torch.autograd.Function):
    """y = W x + b + s B A x, with the backward pass of lora_minimal.LoRAProduct.

    The low-rank terms are added to the results. Saved for backward: x, the bytes of W,
    and tensors with a side of length r.
    """

    @staticmethod
    def forward(ctx, x, packed, b, A, B, layer):
        dtype, s = dtype_of_products(x), layer.scaling
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.size(-1)).to(dtype)              # (N, in)
            A_cast = A.to(dtype)                                    # (r, in)
            sBt = scaled_transpose(B, s, dtype)                     # (r, out)
            u = rows @ A_cast.t()                                   # (N, r)
            W = layer.for_forward(dtype, ctx.needs_input_grad[0])   # (out, in)
            y = F.linear(rows, W, b if b is None else b.to(dtype))  # (N, out)
            y.addmm_(u, sBt)
        ctx.save_for_backward(rows, s * u, packed, A_cast, sBt)
        ctx.layer, ctx.x_shape = layer, x.shape
        ctx.x_dtype, ctx.A_dtype, ctx.B_dtype = x.dtype, A.dtype, B.dtype
        return y.view(*x.shape[:-1], len(W))

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivative()
        rows, su, _, A_cast, sBt = ctx.saved_tensors
        g = g.reshape(len(rows), sBt.size(1))                       # (N, out)
        v = g @ sBt.t()                                             # (N, r)
        dA = v.t() @ rows                                           # (r, in)
        dB = transposed_product(g, su)                              # (out, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ ctx.layer.for_backward(rows.dtype)             # (N, in)
            dx.addmm_(v, A_cast)
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, None, None, dA.to(ctx.A_dtype), dB.to(ctx.B_dtype), None


def dtype_of_products(x):
    """The dtype in which a layer computes with x: that of autocast, or its own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def refuse_second_derivative():
    if torch.is_grad_enabled():
        raise RuntimeError("the product with a weight in NF4 has no second derivative")


# ---- on a model --------------------------------------------------------------------

LAYERS = {NF4Linear: LoRANF4Linear}         # for apply_lora(model, layers=LAYERS)


def lora_classes():
    """{class of a layer: its LoRA class}: those of lora_minimal, and that of NF4Linear."""
    return known_classes(LAYERS)


def quantize_linears(model):
    """Replace each nn.Linear and Conv1D of a model by an NF4Linear, and freeze the model.

    A layer that shares its weight stays, such as a head tied to the embedding, and so do
    embeddings and norms. Returns the paths of the layers, which may be none.
    """
    uses = weight_uses(model)
    kinds = (nn.Linear, conv1d_class())
    paths = []
    for path, layer in model.named_modules():
        if path and type(layer) in kinds and uses[id(layer.weight)] == 1:
            paths.append(path)
    for path in paths:
        replace_layer(model, path, NF4Linear.of(model.get_submodule(path)))
    model.requires_grad_(False)
    return paths


def parameter_count(model):
    """How many parameters a model has: a byte of an NF4 weight holds two."""
    n = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, HasNF4Weight):
            n += module.in_features * module.out_features - module.weight.numel()
    return n
