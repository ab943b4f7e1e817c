"""lora_minimal.py with one adapter: against PEFT, and what must hold of LoRA on any model."""
import copy
import math
from collections import Counter

import peft
import pytest
import torch
from helpers_lora import (
    TARGETS,
    adapted,
    fill_lora,
    parameter_names,
    snapshot,
    train_steps,
    transformers_gpt2,
)
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from conftest import make_gpt
from lora_minimal import (
    LoRALinear,
    LoRAProduct,
    apply_lora,
    disable_lora,
    is_lora,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_lora,
    unmerge_lora,
    with_low_rank_term,
)

# ---- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (16,)])
def test_forward_is_the_equation(shape):
    torch.manual_seed(0)
    base = nn.Linear(16, 24)
    layer = LoRALinear(base, r=3, alpha=7)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape)
    update = 7 / 3 * x @ layer.lora_A.T @ layer.lora_B.T
    expected = x @ base.weight.T + base.bias + update
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.definition(x), expected, atol=1e-5, rtol=0)


def test_the_weight_is_shared_and_never_copied():
    base = nn.Linear(16, 24)
    layer = LoRALinear(base, r=3, alpha=7)
    assert layer.weight is base.weight
    assert layer.bias is base.bias


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert LoRALinear(nn.Linear(4, 4), r=4, alpha=16).scaling == 4
    assert LoRALinear(nn.Linear(4, 4), r=4, alpha=16, use_rslora=True).scaling == 8


def test_initialization_is_that_of_peft():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 8), r=8, alpha=16)
    assert not layer.lora_B.any()
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(400)
    assert layer.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)


def test_adapters_of_a_bf16_base_are_float32_and_the_output_is_bf16():
    layer = LoRALinear(nn.Linear(16, 24, dtype=torch.bfloat16), r=3, alpha=7)
    assert layer.lora_A.dtype == torch.float32
    assert layer.lora_B.dtype == torch.float32
    assert layer(torch.randn(5, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float64])
def test_a_and_b_are_float32_whatever_the_default_dtype(base_dtype):
    net = nn.Sequential(nn.Embedding(10, 4, dtype=base_dtype), nn.Linear(4, 4, dtype=base_dtype))
    apply_lora(net, target_modules=["0", "1"])
    assert {p.dtype for p in lora_parameters(net)} == {torch.float32}
    assert net(torch.arange(3)).dtype == base_dtype


def test_a_and_b_are_made_on_the_device_of_the_base():
    with torch.device("meta"):
        net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6))
        idx = torch.zeros(2, 3, dtype=torch.int64)
    apply_lora(net, target_modules=["0", "1"])
    assert all(p.is_meta for p in lora_parameters(net))
    assert net(idx).shape == (2, 3, 6)
    assert net(idx).is_meta
    on_the_cpu = nn.Sequential(nn.Linear(4, 6))
    with torch.device("meta"):
        apply_lora(on_the_cpu, target_modules=["0"])
    assert not any(p.is_meta for p in on_the_cpu.parameters())


@pytest.mark.parametrize("fast", [True, False])
def test_b_zero_is_bitwise_the_base_layer(fast):
    torch.manual_seed(0)
    base = nn.Linear(16, 24)
    layer = LoRALinear(base, r=3, alpha=7)
    layer.requires_grad_(False).fast = fast
    for x in (torch.randn(5, 16), torch.randn(2, 40, 16)):
        assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows_give_no_rows_and_gradients_of_zero(shape, fast):
    layer, _ = layer_and_input()
    layer.fast = fast
    x = torch.empty(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 24)
    y.sum().backward()
    assert x.grad.shape == shape
    for p in (layer.lora_A, layer.lora_B):
        assert torch.equal(p.grad, torch.zeros_like(p))


def test_dropout_acts_on_the_adapter_alone():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 24), r=3, alpha=7, dropout=0.5)
    x = torch.randn(5, 16)
    assert torch.equal(layer(x), layer.eval()(x)), "with B = 0 there is nothing to drop"
    nn.init.normal_(layer.lora_B)
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_layers_survive_deepcopy():
    model = adapted()
    twin = copy.deepcopy(model)
    idx = torch.arange(10)[None]
    assert torch.equal(twin(idx)[0], model(idx)[0])
    lora_parameters(twin)[0].data.zero_()
    assert not torch.equal(twin(idx)[0], model(idx)[0])


# ---- applying ------------------------------------------------------------------------------------

def test_with_b_zero_the_model_is_bitwise_the_base(model, idx):
    before = model(idx)[0]
    apply_lora(model)
    assert torch.equal(model(idx)[0], before)


def lora_names(paths):
    """The names of the A's and B's of the layers at `paths`."""
    return {f"{path}.lora_A" for path in paths} | {f"{path}.lora_B" for path in paths}


def trainable_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_base_names_survive_and_only_a_and_b_train(model):
    before = parameter_names(model)
    paths = apply_lora(model)
    assert len(paths) == 4 * 2
    assert parameter_names(model) == before | lora_names(paths)
    assert trainable_names(model) == lora_names(paths)
    in_plus_out = 64 + 192, 64 + 64, 64 + 256, 256 + 64         # of the four linears of a block
    assert sum(p.numel() for p in lora_parameters(model)) == 2 * 8 * sum(in_plus_out)


@pytest.mark.parametrize("targets", [
    ["c_proj"],
    ["attn.c_proj"],
    ["mlp.c_proj", "c_attn"],
    ["h.1.attn.c_attn"],
])
def test_targets_match_whole_components_as_in_peft(model, targets):
    config = peft.LoraConfig(r=8, target_modules=targets)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    paths = apply_lora(model, target_modules=targets)
    assert set(paths) == set(theirs.targeted_module_names)


@pytest.mark.parametrize("bad, says", [
    (dict(target_modules=["proj"]), "'proj' matches no module"),
    (dict(target_modules=["c_attn", "typo"]), "typo"),
    (dict(target_modules=[]), "empty"),
    (dict(target_modules=["attn"]), "not an nn.Linear"),
    (dict(target_modules=["lm_head"]), "shares its weight"),
    (dict(r=0), "rank"),
    (dict(r=True), "rank"),
    (dict(r=2.0), "rank"),
    (dict(alpha=float("nan")), "alpha"),
    (dict(alpha=0), "alpha"),
    (dict(alpha=10**400), "alpha"),
    (dict(dropout=1.0), "dropout"),
    (dict(dropout=-0.1), "dropout"),
    (dict(use_rslora=1), "use_rslora"),
])
def test_a_bad_argument_is_refused_and_changes_nothing(model, bad, says):
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        apply_lora(model, **bad)
    assert snapshot(model) == before
    assert not any(is_lora(module) for module in model.modules())


def test_applying_twice_is_refused(model):
    apply_lora(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="has LoRA already"):
        apply_lora(model)
    assert snapshot(model) == before


def test_a_second_call_on_other_layers_adds_to_the_first(model, idx):
    base = model(idx)[0]
    first = apply_lora(model, r=2, alpha=4, target_modules=["c_attn"])
    second = apply_lora(model, r=5, alpha=15, target_modules=["c_fc", "wpe"])
    assert trainable_names(model) == lora_names(first + second)
    layers = lora_layers(model)
    assert {layers[path].r for path in first} == {2}
    assert {layers[path].r for path in second} == {5}
    assert {layers[path].scaling for path in first} == {2}
    assert {layers[path].scaling for path in second} == {3}
    assert len(lora_parameters(model)) == 2 * len(first + second)
    before = {name: p.clone() for name, p in lora_state_dict(model).items()}
    torch.testing.assert_close(model(idx)[0], base, atol=1e-6, rtol=0)
    train_steps(model, idx, 2)
    for name, p in lora_state_dict(model).items():
        assert not torch.equal(p, before[name]), name


def test_any_module_with_linears_can_be_adapted():
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), inner)
    assert apply_lora(net, r=2, target_modules=["0"]) == ["0", "2.0"]


@pytest.mark.parametrize(
    "call", [lora_parameters, lora_state_dict, merge_lora, unmerge_lora, remove_lora]
)
def test_a_model_without_lora_is_refused(model, call):
    with pytest.raises(ValueError, match="no LoRA layers"):
        call(model)


class Doubled(LoRALinear):
    """A variant of LoRA: its update is twice as large."""

    def definition(self, x):
        base = nn.functional.linear(x, self.W, self.bias)
        return 2 * super().definition(x) - base

    def product(self, x):
        return self.definition(x)


def test_a_variant_is_used_for_the_layers_of_its_class():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6))
    plain = copy.deepcopy(net)
    apply_lora(net, r=2, target_modules=["0", "1"], layers={nn.Linear: Doubled})
    apply_lora(plain, r=2, target_modules=["0", "1"])
    assert type(net[1]) is Doubled
    assert type(net[0]) is type(plain[0]), "the classes that are not named stay"
    fill_lora(plain)
    net.load_state_dict(plain.state_dict())
    idx = torch.arange(10)
    with disable_lora(plain):
        base = plain[1](plain[0](idx))
    hidden = net[0](idx)
    update = plain[1](hidden) - nn.functional.linear(hidden, plain[1].weight, plain[1].bias)
    expected = nn.functional.linear(hidden, plain[1].weight, plain[1].bias) + 2 * update
    torch.testing.assert_close(net(idx), expected, atol=1e-5, rtol=0)
    remove_lora(net)
    assert type(net[1]) is nn.Linear
    torch.testing.assert_close(net(idx), base, atol=1e-6, rtol=0)


# ---- layers on which LoRA would be lost ----------------------------------------------------------

def with_forward_of_its_own():
    net = nn.Sequential(nn.Linear(4, 4))
    original = net[0].forward
    net[0].forward = lambda x: original(x)
    return net


def with_old_weight_norm():
    return nn.Sequential(old_weight_norm(nn.Linear(4, 4)))


def with_weight_norm():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))


def with_pruning():
    net = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    return net


def with_max_norm():
    return nn.Sequential(nn.Embedding(10, 4, max_norm=1.0))


def with_a_layer_that_is_used_twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, layer)


def with_a_float8_weight():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight = nn.Parameter(net[0].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, says", [
    (with_forward_of_its_own, "forward of its own"),
    (with_old_weight_norm, "is computed"),
    (with_weight_norm, "ParametrizedLinear, not an nn.Linear"),
    (with_pruning, "is computed"),
    (with_max_norm, "max_norm"),
    (with_a_layer_that_is_used_twice, "shares its weight"),
    (with_a_float8_weight, "float8"),
])
def test_a_layer_on_which_lora_would_be_lost_is_refused_and_unchanged(make, says):
    net = make()
    before = snapshot(net)
    tensors = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=says):
        apply_lora(net, target_modules=["0"])
    assert snapshot(net) == before
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor.float(), tensors[name].float())


def test_one_layer_that_is_refused_leaves_the_others_unchanged():
    net = nn.Sequential(nn.Linear(4, 4), nn.Embedding(10, 4, max_norm=1.0))
    before = snapshot(net)
    with pytest.raises(ValueError, match="max_norm"):
        apply_lora(net, target_modules=["0", "1"])
    assert snapshot(net) == before


def encoder_and_input():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
    return nn.Sequential(layer).eval(), torch.randn(2, 5, 16)


@pytest.fixture
def no_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def test_an_encoder_layer_that_would_bypass_lora_is_refused():
    net, _ = encoder_and_input()
    assert torch.backends.mha.get_fastpath_enabled()
    before = snapshot(net)
    for target in ("linear1", "linear2"):
        with pytest.raises(ValueError, match="set_fastpath_enabled"):
            apply_lora(net, target_modules=[target])
    assert snapshot(net) == before


@pytest.mark.usefixtures("no_fast_path")
def test_an_encoder_layer_without_the_fast_path_can_be_adapted():
    net, x = encoder_and_input()
    weights = copy.deepcopy(net)
    before = net(x)
    apply_lora(net, target_modules=["linear1", "linear2"])
    torch.testing.assert_close(net(x), before, atol=1e-6, rtol=0)
    fill_lora(net)
    with torch.no_grad():
        assert (net(x) - before).abs().max() > 0.01
        for path, layer in lora_layers(net).items():
            weights.get_submodule(path).weight += layer.delta_weight()
        torch.testing.assert_close(net(x), weights(x), atol=1e-5, rtol=0)


def test_a_subclass_of_linear_is_refused_since_it_may_compute_something_else():
    attention = nn.MultiheadAttention(8, 2)         # it reads out_proj's weight without a call
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear, not an nn.Linear"):
        apply_lora(attention, target_modules=["out_proj"])


def test_the_text_of_a_model_says_what_is_adapted():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), Conv1D(3, 6))
    apply_lora(net, r=2, alpha=5, target_modules=["0", "1", "2"])
    lines = str(net).splitlines()[1:-1]
    assert len(lines) == 3
    for line, kind in zip(lines, ("LoRAEmbedding", "LoRALinear", "LoRAConv1D"), strict=True):
        assert kind in line
        assert "r=2, alpha=5" in line


# ---- what else a layer has -----------------------------------------------------------------------

def test_removing_puts_back_a_layer_with_the_hooks_it_had():
    net = nn.Sequential(nn.Linear(4, 4))
    calls = []

    def note(module, inputs, output):
        calls.append(1)

    net[0].register_forward_hook(note)
    apply_lora(net, target_modules=["0"])
    remove_lora(net)
    net(torch.ones(1, 4))
    assert calls == [1]
    assert type(net[0]) is nn.Linear


class Hooked:
    """Two linear layers, the first of which has a hook of each kind that counts its calls."""

    def __init__(self):
        self.calls = Counter()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        layer = self.net[0]
        self.handles = [
            layer.register_forward_pre_hook(self.counting("forward pre")),
            layer.register_forward_hook(self.counting("forward")),
            layer.register_forward_hook(self.counting("forward, kwargs"), with_kwargs=True),
            layer.register_full_backward_pre_hook(self.counting("backward pre")),
            layer.register_full_backward_hook(self.counting("backward")),
        ]

    def counting(self, kind):
        def hook(*_):
            self.calls[kind] += 1
        return hook

    def run(self):
        """How often each hook is called by a forward and a backward pass."""
        self.calls.clear()
        x = torch.ones(1, 4, requires_grad=True)
        self.net(x).sum().backward()
        return dict(self.calls)


def test_hooks_fire_with_lora_and_after_it():
    hooked = Hooked()
    once_each = hooked.run()
    assert len(once_each) == 5
    assert set(once_each.values()) == {1}
    apply_lora(hooked.net, target_modules=["0"])
    assert hooked.run() == once_each
    remove_lora(hooked.net)
    assert hooked.run() == once_each


@pytest.mark.parametrize("removed", [False, True])
def test_handles_of_hooks_still_remove_them(removed):
    hooked = Hooked()
    apply_lora(hooked.net, target_modules=["0"])
    if removed:
        remove_lora(hooked.net)
    for handle in hooked.handles:
        handle.remove()
    assert hooked.run() == {}


def test_a_hook_registered_with_lora_stays_after_removal():
    net = nn.Sequential(nn.Linear(4, 4))
    calls = []

    def note(module, inputs, output):
        calls.append(1)

    apply_lora(net, target_modules=["0"])
    handle = net[0].register_forward_hook(note)
    remove_lora(net)
    net(torch.ones(1, 4))
    handle.remove()
    net(torch.ones(1, 4))
    assert calls == [1]


def test_buffers_of_the_base_layer_survive():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_buffer("steps", torch.tensor(3))
    net[0].register_buffer("cache", torch.ones(2), persistent=False)
    before = net.state_dict().keys()
    buffers = dict(net[0].named_buffers())
    apply_lora(net, target_modules=["0"])
    assert net.state_dict().keys() == before | {"0.lora_A", "0.lora_B"}
    for name, buffer in buffers.items():
        assert getattr(net[0], name) is buffer
    remove_lora(net)
    assert net.state_dict().keys() == before
    assert dict(net[0].named_buffers()).keys() == {"steps", "cache"}
    for name, buffer in buffers.items():
        assert getattr(net[0], name) is buffer


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_base_layer_survives(training):
    net = nn.Sequential(nn.Linear(4, 4)).train(training)
    apply_lora(net, target_modules=["0"])
    assert net[0].training is training
    remove_lora(net)
    assert net[0].training is training


# ---- training ------------------------------------------------------------------------------------

def test_the_first_step_moves_b_and_not_a(model, idx):
    apply_lora(model)
    before = {name: p.clone() for name, p in lora_state_dict(model).items()}
    train_steps(model, idx, 1, lr=1e-3)
    for name, p in lora_state_dict(model).items():
        if name.endswith("lora_B"):
            assert not torch.equal(p, before[name])
        else:       # its gradient is exactly zero: what is left is AdamW's weight decay
            decayed = before[name] * (1 - 1e-3 * 1e-2)
            torch.testing.assert_close(p, decayed, atol=1e-8, rtol=0)


def test_the_base_stays_frozen_bit_for_bit_and_the_loss_falls(model, idx):
    before = {name: p.clone() for name, p in model.named_parameters()}
    apply_lora(model)
    first = model(idx[:, :-1], idx[:, 1:])[1].item()
    train_steps(model, idx, 20)
    assert model(idx[:, :-1], idx[:, 1:])[1].item() < 0.8 * first
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())


def same_a_and_b(model, theirs, std=0.1):
    """Draw A and B of `model`, copy them into PEFT's model, and return pairs of both."""
    their_parameters = dict(theirs.named_parameters())
    pairs = []
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=std)
            q = their_parameters[f"base_model.model.{name}.default.weight"]
            q.data.copy_(p.data)
            pairs.append((p, q))
    return pairs


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_equal_pefts(model, idx, rslora):
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=list(TARGETS), use_rslora=rslora
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    apply_lora(model, r=4, alpha=16, target_modules=TARGETS, use_rslora=rslora)
    pairs = same_a_and_b(model, theirs)
    our_logits, our_loss = model(idx, idx)
    their_logits, their_loss = theirs(idx, idx)
    torch.testing.assert_close(our_logits, their_logits, atol=1e-5, rtol=1e-5)
    our_loss.backward()
    their_loss.backward()
    assert len(pairs) == 16
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


# ---- the hand-written backward -------------------------------------------------------------------

def layer_and_input(shape=(3, 40, 16), bias=True, dtype=torch.float32, transposed=False):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 24, bias=bias, dtype=dtype), r=3, alpha=7)
    layer.requires_grad_(False)
    for p in (layer.lora_A, layer.lora_B):
        nn.init.normal_(p.requires_grad_(True), std=0.5)
    if transposed:
        x = torch.randn(shape[::-1], dtype=dtype).T
    else:
        x = torch.randn(shape, dtype=dtype)
    return layer, x.requires_grad_(True)


def gradients(layer, x, fast, call=None):
    """The output, and the gradients of A, B and x for a fixed weighting of the outputs."""
    layer.fast = fast
    y = layer(x) if call is None else call(x)
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    inputs = [layer.lora_A, layer.lora_B]
    if x.requires_grad:
        inputs.append(x)
    return y, *torch.autograd.grad((y * weighting).sum(), inputs)


def assert_all_close(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def uses_product(layer, x):
    return "LoRAProduct" in type(layer(x).grad_fn).__name__


def test_the_product_is_used_unless_something_forbids_it():
    layer, x = layer_and_input(shape=(5, 16))
    assert uses_product(layer, x)
    layer.fast = False
    assert not uses_product(layer, x)
    layer.fast = True
    layer.dropout = 0.1
    assert not uses_product(layer, x)
    assert uses_product(layer.eval(), x)
    layer.weight.requires_grad_(True)
    assert not uses_product(layer, x)


@pytest.mark.parametrize("tokens", [5, 40])     # up to `in`: added to the output; more: folded
@pytest.mark.parametrize("bias", [True, False])
def test_the_backward_is_the_derivative(tokens, bias):
    layer, x = layer_and_input((tokens, 16), bias, torch.float64)
    A = layer.lora_A.detach().double().requires_grad_(True)
    B = layer.lora_B.detach().double().requires_grad_(True)

    def product(x, A, B):
        return LoRAProduct.apply(x, layer.weight, layer.bias, A, B, layer.scaling)

    assert torch.autograd.gradcheck(product, (x, A, B))


@pytest.mark.parametrize("options", [
    {},
    dict(shape=(40, 16)),
    dict(shape=(5, 16)),
    dict(shape=(16,)),
    dict(shape=(2, 2, 9, 16)),
    dict(bias=False),
    dict(shape=(40, 16), transposed=True),
    dict(shape=(1, 16)),
])
def test_fast_and_plain_agree_in_float32(options):
    layer, x = layer_and_input(**options)
    assert_all_close(gradients(layer, x, fast=True), gradients(layer, x, fast=False))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_fast_and_plain_agree_to_rounding_in_bfloat16(base):
    layer, x = layer_and_input(dtype=base)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=base == torch.float32):
        fast = gradients(layer, x, fast=True)
        plain = gradients(layer, x, fast=False)
    y, dA, dB, dx = fast
    assert y.dtype == torch.bfloat16
    assert dA.dtype == dB.dtype == torch.float32
    assert dx.dtype == base
    exact_layer = copy.deepcopy(layer).float()
    exact_x = x.detach().float().requires_grad_(True)
    exact = gradients(exact_layer, exact_x, fast=False)
    for a, b, c in zip(fast, plain, exact, strict=True):
        error_fast = (a.float() - c).norm() / c.norm()
        error_plain = (b.float() - c).norm() / c.norm()
        assert error_fast < 0.015
        assert error_fast < 2 * error_plain + 0.002


@pytest.mark.parametrize("m, n, tokens", [
    (16, 32, 40),       # a wide result: one product
    (16, 24, 40),       # a narrow one
    (16, 32, 5),        # few tokens
    (12, 32, 40),       # m + r is not a multiple of 8
])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_low_rank_term_is_added_to_a_product_of_any_shape(m, n, tokens, bias, transposed):
    X, W = torch.randn(tokens, m), torch.randn(m, n)
    if transposed:
        W = torch.randn(n, m).t()
    u, C = torch.randn(tokens, 8), torch.randn(8, n)
    b = torch.randn(n) if bias else None
    expected = X @ W + u @ C + (b if bias else 0)
    torch.testing.assert_close(
        with_low_rank_term(X, W, u, C, b), expected, atol=1e-4, rtol=1e-4
    )


def test_a_low_rank_term_inside_the_product_is_no_less_precise_than_added_to_it():
    X, W = torch.randn(64, 16), torch.randn(48, 16).t()
    u, C = torch.randn(64, 8), torch.randn(8, 48)
    low = [tensor.bfloat16() for tensor in (X, W, u, C)]
    exact = low[0].float() @ low[1].float() + low[2].float() @ low[3].float()
    inside = with_low_rank_term(*low)
    added = (low[0] @ low[1]).addmm_(low[2], low[3])
    assert not torch.equal(inside, added), "this shape takes one product"
    assert (inside.float() - exact).norm() <= 1.02 * (added.float() - exact).norm()


def test_an_input_that_needs_no_gradient_costs_none():
    layer, x = layer_and_input()
    x = x.detach()
    assert_all_close(gradients(layer, x, fast=True), gradients(layer, x, fast=False))


@pytest.mark.filterwarnings("ignore")
def test_fast_compiles():
    layer, x = layer_and_input()
    layer.fast = True
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ours = gradients(layer, x, fast=True, call=compiled)
    assert_all_close(ours, gradients(layer, x, fast=False))


def test_fast_works_under_checkpointing():
    layer, x = layer_and_input()

    def recomputed(x):
        return checkpoint(layer, x, use_reentrant=False)

    ours = gradients(layer, x, fast=True, call=recomputed)
    assert_all_close(ours, gradients(layer, x, fast=False))


def test_only_the_input_and_what_is_rank_sized_is_kept_for_backward():
    layer, x = layer_and_input()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, unpack):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    sizes = sorted(tensor.numel() for tensor in kept if tensor.data_ptr() not in own)
    assert sizes == [3 * 24, 3 * 3 * 40], "B (out, r) and u (N, r)"


def test_a_second_derivative_is_refused():
    layer, x = layer_and_input()
    with pytest.raises(RuntimeError, match="second derivative.*fast = False"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    layer.fast = False
    (dx,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    dx.sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0


def test_a_weight_made_trainable_again_gets_its_gradient():
    layer, x = layer_and_input()
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    expected = x.detach().flatten(0, 1).sum(0).expand(24, 16)
    torch.testing.assert_close(layer.weight.grad, expected, atol=1e-4, rtol=1e-4)


def test_a_bias_made_trainable_again_gets_its_gradient():
    layer, x = layer_and_input()
    layer.bias.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((24,), 120.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_too_small_for_a_low_precision_base_is_not_lost(dtype):
    layer = LoRALinear(nn.Linear(16, 16, bias=False, dtype=dtype), r=1, alpha=1)
    layer.requires_grad_(False)
    nn.init.eye_(layer.weight)                              # 1 + 0.001 is 1 in bfloat16
    nn.init.constant_(layer.lora_A, 1.0)
    nn.init.constant_(layer.lora_B, 1e-3)
    x = torch.zeros(40, 16, dtype=dtype)
    x[:, 0] = 1
    assert layer(x)[0, 1].item() == pytest.approx(1e-3, rel=0.01)
    x[:, 1] = -1                                            # A x is now 0, and so is the update
    assert layer(x)[0, 2].item() == pytest.approx(0, abs=1e-6)


def test_training_follows_the_same_curve_fast_and_plain(idx):
    losses = []
    for fast in (True, False):
        model = make_gpt()
        torch.manual_seed(0)
        apply_lora(model)
        for layer in lora_layers(model).values():
            layer.fast = fast
        train_steps(model, idx, 30, lr=3e-3)
        losses.append(model(idx[:, :-1], idx[:, 1:])[1].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---- the transforms of torch.func, and torch.export ----------------------------------------------

@pytest.fixture(params=[False, True], ids=["unmerged", "merged"])
def small_net(request):
    """An embedding and two linears, all adapted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    apply_lora(net, r=2, target_modules=["0", "1", "3"])
    fill_lora(net, std=0.5)
    if request.param:
        merge_lora(net)
    return net


def test_vmap_maps_over_an_adapted_model(small_net):
    idx = torch.arange(10).view(5, 2)
    torch.testing.assert_close(torch.func.vmap(small_net)(idx), small_net(idx))


@pytest.mark.parametrize("small_net", [False], indirect=True)
def test_functionalize_takes_an_adapted_model(small_net):
    idx = torch.arange(10).view(5, 2)
    torch.testing.assert_close(torch.func.functionalize(small_net)(idx), small_net(idx))


def test_transforms_without_gradients_take_an_adapted_model(small_net):
    idx = torch.arange(10).view(5, 2)
    with torch.no_grad():
        expected = small_net(idx)
        torch.testing.assert_close(torch.func.functionalize(small_net)(idx), expected)
        torch.testing.assert_close(torch.func.vmap(small_net)(idx), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_an_adapted_model_can_be_exported(small_net, strict):
    idx = torch.arange(10).view(5, 2)
    exported = torch.export.export(small_net, (idx,), strict=strict)
    torch.testing.assert_close(exported.module()(idx), small_net(idx))


@pytest.mark.filterwarnings("ignore")
def test_an_adapted_gpt_can_be_exported(idx):
    model = adapted()
    exported = torch.export.export(model, (idx,))
    torch.testing.assert_close(exported.module()(idx)[0], model(idx)[0], atol=1e-5, rtol=0)


def functional_loss(net):
    """The loss as a function of A, B and a row of tokens."""
    def loss(parameters, row):
        return torch.func.functional_call(net, parameters, (row,)).square().sum()
    return loss


@pytest.mark.parametrize("small_net", [False], indirect=True)
def test_func_grad_gives_the_gradients_of_autograd(small_net):
    idx = torch.arange(10).view(5, 2)
    ours = torch.func.grad(functional_loss(small_net))(lora_state_dict(small_net), idx)
    small_net(idx).square().sum().backward()
    assert len(ours) == 6
    for name, gradient in ours.items():
        expected = small_net.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("small_net", [False], indirect=True)
def test_vmap_over_grad_gives_the_gradients_of_each_row(small_net):
    idx = torch.arange(10).view(5, 2)
    per_row = torch.func.vmap(torch.func.grad(functional_loss(small_net)), in_dims=(None, 0))
    ours = per_row(lora_state_dict(small_net), idx)
    for i, row in enumerate(idx):
        small_net.zero_grad()
        small_net(row).square().sum().backward()
        for name, gradient in ours.items():
            expected = small_net.get_parameter(name).grad
            torch.testing.assert_close(gradient[i], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("small_net", [True], indirect=True)
def test_func_grad_through_a_merged_model_raises(small_net):
    idx = torch.arange(10).view(5, 2)
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        torch.func.grad(functional_loss(small_net))(lora_state_dict(small_net), idx)


# ---- merging -------------------------------------------------------------------------------------

def test_merging_gives_w_plus_ba_and_the_same_outputs(idx):
    model = adapted()
    before = model(idx)[0]
    layer = model.transformer.h[0].attn.c_attn
    expected = layer.weight + 4 * layer.lora_B @ layer.lora_A
    merge_lora(model)
    torch.testing.assert_close(layer.weight, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(idx)[0], before, atol=2e-5, rtol=0)


def test_merging_twice_is_the_same_as_merging_once(idx):
    model = adapted()
    merge_lora(model)
    once = model(idx)[0]
    merge_lora(model)
    assert torch.equal(model(idx)[0], once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_the_base_bit_for_bit(dtype):
    model = adapted().to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    merge_lora(model)
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(model.get_parameter(name), before[name])
    unmerge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_state_dict_saved_while_merged_cannot_apply_the_adapter_twice(idx):
    model = adapted()
    before = model(idx)[0]
    state = {name: p.clone() for name, p in model.state_dict().items()}
    merge_lora(model)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    other = adapted(seed=5)
    merge_lora(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(idx)[0], before)


def test_removing_gives_the_base_and_after_merging_the_merged_model(idx):
    base = make_gpt()
    model = adapted()
    tuned = model(idx)[0]
    merged = copy.deepcopy(model)
    remove_lora(model)
    assert torch.equal(model(idx)[0], base(idx)[0])
    assert parameter_names(model) == parameter_names(base)
    merge_lora(merged)
    remove_lora(merged)
    torch.testing.assert_close(merged(idx)[0], tuned, atol=2e-5, rtol=0)
    assert parameter_names(merged) == parameter_names(base)
    for each in (model, merged):
        assert not any(is_lora(module) for module in each.modules())


@pytest.mark.parametrize("merged", [False, True])
def test_disabling_gives_the_base_bit_for_bit_and_ends_with_the_block(idx, merged):
    model = adapted()
    if merged:
        merge_lora(model)
    tuned = model(idx)[0]
    with disable_lora(model):
        assert torch.equal(model(idx)[0], make_gpt()(idx)[0])
    assert torch.equal(model(idx)[0], tuned)
    with pytest.raises(RuntimeError), disable_lora(model):
        raise RuntimeError
    assert torch.equal(model(idx)[0], tuned)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("unmerged_again", [False, True])
def test_merging_between_forward_and_backward_raises(idx, fast, unmerged_again):
    model = adapted()
    for layer in lora_layers(model).values():
        layer.fast = fast
    _, loss = model(idx, idx)
    merge_lora(model)
    if unmerged_again:
        unmerge_lora(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fast", [True, False])
def test_merging_conv1d_between_forward_and_backward_raises(tmp_path, idx, fast):
    model = transformers_gpt2(tmp_path)
    apply_lora(model, r=4)
    for layer in lora_layers(fill_lora(model)).values():
        layer.fast = fast
    loss = model(idx, labels=idx).loss
    merge_lora(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unmerging_between_forward_and_backward_raises(idx):
    model = adapted()
    merge_lora(model)
    _, loss = model(idx, idx)
    unmerge_lora(model)
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("targets", [["c_attn"], ["wpe"]])
def test_backward_through_a_merged_model_raises(idx, targets):
    model = adapted(target_modules=targets)
    merge_lora(model)
    _, loss = model(idx, idx)
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        loss.backward()
    assert all(p.grad is None for p in lora_parameters(model))
    unmerge_lora(model)
    model(idx, idx)[1].backward()
    assert all(p.grad is not None for p in lora_parameters(model))


def test_a_merged_frozen_adapter_lets_gradients_through_to_the_input():
    layer, x = layer_and_input()
    net = nn.Sequential(layer)
    expected = layer(x).sum()
    (dx,) = torch.autograd.grad(expected, x)
    net.requires_grad_(False)
    merge_lora(net)
    (merged_dx,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(merged_dx, dx, atol=1e-4, rtol=1e-4)


# ---- embeddings ----------------------------------------------------------------------------------

def test_an_embedding_is_looked_up_in_w_plus_ba():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(50, 12, padding_idx=3))
    idx = torch.randint(50, (4, 7))
    base = net[0]
    before = net(idx)
    apply_lora(net, r=3, alpha=6, target_modules=["0"])
    assert torch.equal(net(idx), before)
    assert net[0].weight is base.weight
    fill_lora(net, std=1.0)
    expected = base.weight + 2 * (net[0].lora_B @ net[0].lora_A).T
    torch.testing.assert_close(net(idx), expected[idx], atol=1e-5, rtol=0)
    merge_lora(net)
    torch.testing.assert_close(net(idx), expected[idx], atol=1e-5, rtol=0)
    remove_lora(net)
    assert type(net[0]) is nn.Embedding
    assert net[0].padding_idx == 3


def test_a_first_step_moves_only_the_tokens_it_has_seen():
    net = nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 1))
    apply_lora(net, target_modules=["0"])
    before = (net[0].lora_B @ net[0].lora_A).clone()
    optimizer = torch.optim.SGD(lora_parameters(net), lr=0.1)
    net(torch.tensor([4, 9])).sum().backward()
    optimizer.step()
    moved = (net[0].lora_B @ net[0].lora_A - before).abs().sum(0)
    assert moved.nonzero().flatten().tolist() == [4, 9]


def test_the_row_of_the_padding_index_does_not_move():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 6, padding_idx=3), nn.Linear(6, 1))
    pad = torch.tensor([3])
    others = torch.tensor([0, 1])
    before = net[0](pad)
    before_others = net[0](others)
    apply_lora(net, r=2, target_modules=["0", "1"])
    optimizer = torch.optim.AdamW(lora_parameters(net), lr=0.1)
    for _ in range(3):
        net(torch.tensor([[3, 0, 1, 3], [1, 3, 3, 0]])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(net[0](pad), before)
    assert not net[0].delta_weight()[3].any()
    assert not torch.allclose(net[0](others), before_others)


@pytest.mark.parametrize("by_frequency", [False, True])
def test_gradients_of_an_embedding_equal_pefts(by_frequency):
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 6, padding_idx=3, scale_grad_by_freq=by_frequency)
    net = nn.Sequential(embedding)
    idx = torch.tensor([[3, 0, 0, 0], [1, 1, 7, 3]])
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    apply_lora(net, r=2, alpha=6, target_modules=["0"])
    fill_lora(net, std=1.0)
    their_parameters = dict(theirs.named_parameters())
    their_A = their_parameters["base_model.model.0.lora_embedding_A.default"]
    their_B = their_parameters["base_model.model.0.lora_embedding_B.default"]
    their_A.data.copy_(net[0].lora_A)
    their_B.data.copy_(net[0].lora_B)
    torch.testing.assert_close(net(idx), theirs(idx))
    net(idx).square().sum().backward()
    theirs(idx).square().sum().backward()
    torch.testing.assert_close(net[0].lora_A.grad, their_A.grad)
    torch.testing.assert_close(net[0].lora_B.grad, their_B.grad)


# ---- the Conv1D of transformers ------------------------------------------------------------------

def test_gpt2_of_transformers_starts_at_the_base(tmp_path, idx):
    model = transformers_gpt2(tmp_path)
    before = model(idx).logits
    paths = apply_lora(model, r=4)
    assert len(paths) == 8
    assert trainable_names(model) == lora_names(paths)
    assert torch.equal(model(idx).logits, before)


def test_outputs_and_gradients_on_conv1d_equal_pefts(tmp_path, idx):
    model = transformers_gpt2(tmp_path)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=list(TARGETS), fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    apply_lora(model, r=4, alpha=16)
    pairs = same_a_and_b(model, theirs)
    ours = model(idx, labels=idx)
    expected = theirs(idx, labels=idx)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=1e-5)
    ours.loss.backward()
    expected.loss.backward()
    assert len(pairs) == 16
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def test_conv1d_is_the_linear_of_our_gpt(tmp_path, idx):
    theirs = transformers_gpt2(tmp_path)
    apply_lora(theirs, r=4, alpha=16)
    ours = adapted()
    for name, p in lora_state_dict(theirs).items():
        p.copy_(lora_state_dict(ours)[name])
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], atol=1e-5, rtol=0)


def test_conv1d_can_be_merged_unmerged_and_removed(tmp_path, idx):
    model = transformers_gpt2(tmp_path)
    base = model(idx).logits
    names = parameter_names(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    apply_lora(model, r=4)
    fill_lora(model)
    tuned = model(idx).logits
    merge_lora(model)
    torch.testing.assert_close(model(idx).logits, tuned, atol=2e-5, rtol=0)
    unmerge_lora(model)
    assert torch.equal(model(idx).logits, tuned)
    merged = copy.deepcopy(model)
    remove_lora(model)
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer) is Conv1D
    assert (layer.nx, layer.nf) == (64, 192)
    assert torch.equal(model(idx).logits, base)
    assert parameter_names(model) == names
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    merge_lora(merged)
    remove_lora(merged)
    torch.testing.assert_close(merged(idx).logits, tuned, atol=2e-5, rtol=0)


def test_peft_reads_the_adapter_of_conv1d_layers(tmp_path, idx):
    model = transformers_gpt2(tmp_path)
    base = copy.deepcopy(model)
    apply_lora(model, r=4)
    fill_lora(model)
    save_lora(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx).logits, atol=1e-5, rtol=0)
