"""lora_minimal.py against PEFT, and what must hold of LoRA on any model."""
import copy
import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_minimal
from conftest import make_gpt
from lora_minimal import (LoRALinear, LoRAProduct, apply_lora, combine_lora, delete_lora, disable_lora, list_lora, load_lora,
                          load_lora_state_dict, lora_layers, lora_parameters, lora_state_dict, merge_lora, remove_lora,
                          save_lora, unmerge_lora, use_lora)

TARGETS = ("c_attn", "c_proj", "c_fc")


def adapted(seed=0, std=0.1, **settings):
    """A small GPT with LoRA whose B is not zero, as after training."""
    model = make_gpt(seed)
    apply_lora(model, **{**dict(r=4, alpha=16, target_modules=TARGETS), **settings})
    for p in lora_state_dict(model).values():
        nn.init.normal_(p, std=std)
    return model


def plain_names(model):
    return {name for name, _ in model.named_parameters()}


# ---- the layer -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (16,)])
def test_forward_is_the_equation(shape):
    torch.manual_seed(0)
    base = nn.Linear(16, 24)
    layer = LoRALinear(base, r=3, alpha=7)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape)
    expected = x @ base.weight.T + base.bias + 7 / 3 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)


def test_the_weight_is_shared_and_never_copied():
    base = nn.Linear(16, 24)
    layer = LoRALinear(base, r=3, alpha=7)
    assert layer.weight is base.weight and layer.bias is base.bias


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert LoRALinear(nn.Linear(4, 4), r=4, alpha=16).scaling == 4
    assert LoRALinear(nn.Linear(4, 4), r=4, alpha=16, use_rslora=True).scaling == 8


def test_initialisation_is_that_of_peft():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 8), r=8, alpha=16)
    assert not layer.lora_B.any()
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(400)
    assert layer.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)


def test_adapters_of_a_bf16_base_are_float32_and_the_output_is_bf16():
    layer = LoRALinear(nn.Linear(16, 24, dtype=torch.bfloat16), r=3, alpha=7)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.randn(5, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("fast", [True, False])
def test_b_zero_is_bitwise_the_base_layer(fast):
    torch.manual_seed(0)
    base = nn.Linear(16, 24)
    layer = LoRALinear(base, r=3, alpha=7)
    layer.requires_grad_(False).fast = fast
    for x in (torch.randn(5, 16), torch.randn(2, 40, 16)):
        assert torch.equal(layer(x), base(x))


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


# ---- applying --------------------------------------------------------------------------------------------------------

def test_with_b_zero_the_model_is_bitwise_the_base(model, idx):
    before = model(idx)[0]
    apply_lora(model)
    assert torch.equal(model(idx)[0], before)


def test_base_names_survive_and_only_a_and_b_train(model):
    before = plain_names(model)
    names = apply_lora(model)
    assert len(names) == 4 * 2
    added = {f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")}
    assert plain_names(model) == before | added
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added
    widths = 64 + 192, 64 + 64, 64 + 256, 256 + 64          # in + out of the four linears of a block
    assert sum(p.numel() for p in lora_parameters(model)) == 2 * 8 * sum(widths)


def test_targets_match_whole_components_as_in_peft(model):
    linear = copy.deepcopy(model)
    for targets in (["c_proj"], ["attn.c_proj"], ["mlp.c_proj", "c_attn"], ["h.1.attn.c_attn"]):
        ours = copy.deepcopy(linear)
        names = apply_lora(ours, target_modules=targets)
        theirs = peft.get_peft_model(copy.deepcopy(linear), peft.LoraConfig(r=8, target_modules=targets))
        assert set(names) == set(theirs.targeted_module_names)


@pytest.mark.parametrize("bad, says", [
    (dict(target_modules=["proj"]), "'proj' matches no module"), (dict(target_modules=["c_attn", "typo"]), "typo"),
    (dict(target_modules=[]), "empty"), (dict(target_modules=["attn"]), "not an nn.Linear"),
    (dict(target_modules=["lm_head"]), "shares its weight"),
    (dict(r=0), "rank"), (dict(r=True), "rank"), (dict(r=2.0), "rank"),
    (dict(alpha=float("nan")), "alpha"), (dict(alpha=0), "alpha"), (dict(dropout=1.0), "dropout"),
    (dict(dropout=-0.1), "dropout")])
def test_a_bad_argument_is_refused_and_changes_nothing(model, bad, says):
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=says):
        apply_lora(model, **bad)
    after = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    assert before.keys() == after.keys() and all(before[k][0] is after[k][0] and before[k][1] == after[k][1] for k in before)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_applying_twice_is_refused(model):
    apply_lora(model)
    with pytest.raises(ValueError, match="has LoRA already"):
        apply_lora(model)


def test_any_module_with_linears_can_be_adapted():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    assert apply_lora(net, r=2, target_modules=["0", "2"][:1]) == ["0", "2.0"]


def test_a_model_without_lora_is_told_so(model):
    for call in (lora_parameters, lora_state_dict, merge_lora, unmerge_lora, remove_lora):
        with pytest.raises(ValueError, match="no LoRA layers"):
            call(model)


# ---- training --------------------------------------------------------------------------------------------------------

def train_steps(model, idx, n, lr=1e-2):
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=lr)
    for _ in range(n):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_first_step_moves_b_and_not_a(model, idx):
    apply_lora(model)
    before = {name: p.clone() for name, p in lora_state_dict(model).items()}
    train_steps(model, idx, 1, lr=1e-3)
    for name, p in lora_state_dict(model).items():
        if name.endswith("lora_B"):
            assert not torch.equal(p, before[name])
        else:       # its gradient is exactly zero: what is left is AdamW's weight decay
            torch.testing.assert_close(p, before[name] * (1 - 1e-3 * 1e-2), atol=1e-8, rtol=0)


def test_the_base_stays_frozen_bit_for_bit_and_the_loss_falls(model, idx):
    before = {name: p.clone() for name, p in model.named_parameters()}
    apply_lora(model)
    first = model(idx[:, :-1], idx[:, 1:])[1].item()
    train_steps(model, idx, 20)
    assert model(idx[:, :-1], idx[:, 1:])[1].item() < 0.8 * first
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_equal_pefts(model, idx, rslora):
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=list(TARGETS), use_rslora=rslora))
    apply_lora(model, r=4, alpha=16, target_modules=TARGETS, use_rslora=rslora)
    their_parameters = dict(theirs.named_parameters())
    pairs = []
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.1)
            q = their_parameters[f"base_model.model.{name}.default.weight"]
            q.data.copy_(p.data)
            pairs.append((p, q))
    (ours, our_loss), (other, their_loss) = model(idx, idx), theirs(idx, idx)
    torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)
    our_loss.backward()
    their_loss.backward()
    assert len(pairs) == 16
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


# ---- the hand-written backward -----------------------------------------------------------------------------------------

def layer_and_input(shape=(3, 40, 16), bias=True, dtype=torch.float32, transposed=False):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 24, bias=bias, dtype=dtype), r=3, alpha=7)
    layer.requires_grad_(False)
    for p in (layer.lora_A, layer.lora_B):
        nn.init.normal_(p.requires_grad_(True), std=0.5)
    x = torch.randn(shape[::-1] if transposed else shape, dtype=dtype)
    return layer, (x.T if transposed else x).requires_grad_(True)


def gradients(layer, x, fast, call=None):
    """Output and gradients of A, B and x for a fixed weighting of the outputs."""
    layer.fast = fast
    y = (layer if call is None else call)(x)
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    inputs = [layer.lora_A, layer.lora_B] + ([x] if x.requires_grad else [])
    return y, *torch.autograd.grad((y * weighting).sum(), inputs)


@pytest.mark.parametrize("tokens", [5, 40])        # fewer than `in`: added to the output; more: folded into W
@pytest.mark.parametrize("bias", [True, False])
def test_the_backward_is_the_derivative(tokens, bias):
    layer, x = layer_and_input((tokens, 16), bias, torch.float64)
    A, B = (p.detach().double().requires_grad_(True) for p in (layer.lora_A, layer.lora_B))
    assert torch.autograd.gradcheck(
        lambda x, A, B: LoRAProduct.apply(x, layer.weight, layer.bias, A, B, layer.scaling), (x, A, B))


@pytest.mark.parametrize("options", [
    dict(), dict(shape=(40, 16)), dict(shape=(5, 16)), dict(shape=(16,)), dict(shape=(2, 2, 9, 16)), dict(bias=False),
    dict(shape=(40, 16), transposed=True), dict(shape=(1, 16))])
def test_fast_and_plain_agree_in_float32(options):
    layer, x = layer_and_input(**options)
    for fast, plain in zip(gradients(layer, x, True), gradients(layer, x, False)):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_fast_and_plain_agree_to_rounding_in_bfloat16(base):
    layer, x = layer_and_input(dtype=base)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=base == torch.float32):
        fast, plain = gradients(layer, x, True), gradients(layer, x, False)
    assert fast[0].dtype == torch.bfloat16 and fast[1].dtype == fast[2].dtype == torch.float32 and fast[3].dtype == base
    exact, x = copy.deepcopy(layer).float(), x.detach().float().requires_grad_(True)
    for a, b, c in zip(fast, plain, gradients(exact, x, False)):
        error_fast, error_plain = ((z.float() - c).norm() / c.norm() for z in (a, b))
        assert error_fast < 0.015 and error_fast < 2 * error_plain + 0.002


def test_an_input_that_needs_no_gradient_costs_none():
    layer, x = layer_and_input()
    x = x.detach()
    for fast, plain in zip(gradients(layer, x, True), gradients(layer, x, False)):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_fast_compiles():
    layer, x = layer_and_input()
    layer.fast = True
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for fast, plain in zip(gradients(layer, x, True, compiled), gradients(layer, x, False)):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_fast_works_under_checkpointing():
    layer, x = layer_and_input()
    for fast, plain in zip(gradients(layer, x, True, lambda x: checkpoint(layer, x, use_reentrant=False)),
                           gradients(layer, x, False)):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_only_the_input_and_what_is_rank_sized_is_kept_for_backward():
    layer, x = layer_and_input()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    assert sorted(t.numel() for t in kept if t.data_ptr() not in own) == [3 * 24, 3 * 3 * 40], "B and u: r × out, N × r"


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
    torch.testing.assert_close(layer.weight.grad, x.detach().flatten(0, 1).sum(0).expand(24, 16), atol=1e-4, rtol=1e-4)


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
    x[:, 1] = -1                                            # the ones cancel, and what remains is the update: zero
    assert layer(x)[0, 2].item() == pytest.approx(0, abs=1e-6)


def test_training_follows_the_same_curve_fast_and_plain(idx):
    losses = []
    for fast in (True, False):
        model = make_gpt()
        torch.manual_seed(0)
        apply_lora(model)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.fast = fast
        train_steps(model, idx, 30, lr=3e-3)
        losses.append(model(idx[:, :-1], idx[:, 1:])[1].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---- merging ---------------------------------------------------------------------------------------------------------

def test_merging_gives_w_plus_ba_and_the_same_outputs(idx):
    model = adapted()
    before, layer = model(idx)[0], model.transformer.h[0].attn.c_attn
    expected = layer.weight + 4 * layer.lora_B @ layer.lora_A
    merge_lora(model)
    torch.testing.assert_close(layer.weight, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(idx)[0], before, atol=2e-5, rtol=0)


def test_merging_twice_is_merging_once(idx):
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
    assert not torch.equal(model.transformer.h[0].attn.c_attn.weight, before["transformer.h.0.attn.c_attn.weight"])
    unmerge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_state_dict_saved_while_merged_cannot_apply_the_adapter_twice(idx):
    model = adapted()
    before, state = model(idx)[0], {name: p.clone() for name, p in model.state_dict().items()}
    merge_lora(model)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    other = adapted(seed=5)
    merge_lora(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(idx)[0], before)


def test_removing_gives_the_base_and_after_merging_the_merged_model(idx):
    base, model = make_gpt()(idx)[0], adapted()
    tuned = model(idx)[0]
    merged = copy.deepcopy(model)
    remove_lora(model)
    assert torch.equal(model(idx)[0], base) and plain_names(model) == plain_names(make_gpt())
    merge_lora(merged)
    remove_lora(merged)
    torch.testing.assert_close(merged(idx)[0], tuned, atol=2e-5, rtol=0)
    assert plain_names(merged) == plain_names(make_gpt())
    assert not any(isinstance(m, LoRALinear) for m in [*model.modules(), *merged.modules()])


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


# ---- many adapters over one base -------------------------------------------------------------------------------------

VOICES = {"pirate": dict(seed=1), "bard": dict(seed=2, r=2, alpha=3, target_modules=["attn.c_proj", "c_fc"]),
          "noir": dict(seed=3, use_rslora=True)}


@pytest.fixture
def voices(tmp_path):
    """A GPT with three adapters of different ranks and layers loaded under names, and {name: the model with it alone}."""
    model, alone = make_gpt(), {None: make_gpt()}
    for name, settings in VOICES.items():
        alone[name] = adapted(**{**settings, "seed": 0})
        torch.manual_seed(settings["seed"])
        for p in lora_parameters(alone[name]):
            nn.init.normal_(p, std=0.1)
        save_lora(alone[name], tmp_path / name)
        load_lora(model, tmp_path / name, name)
    return model, alone


def test_switching_gives_each_adapter_alone_and_never_touches_the_base(voices, idx):
    model, alone = voices
    before = {name: (p.data_ptr(), p.clone()) for name, p in make_gpt().named_parameters()}
    now = {name: (p.data_ptr(), p) for name, p in model.named_parameters()}
    assert list_lora(model) == sorted(VOICES)
    for name in ("bard", "pirate", None, "noir", None, "bard"):
        use_lora(model, name)
        assert torch.equal(model(idx)[0], alone[name](idx)[0])
        assert all(p.data_ptr() == now[k][0] and torch.equal(p, before[k][1])
                   for k, p in model.named_parameters() if k in before)


def test_the_state_dict_is_of_the_base_and_the_adapter_in_use(voices):
    model, alone = voices
    for name in (None, "bard"):
        use_lora(model, name)
        assert model.state_dict().keys() == alone[name].state_dict().keys()


def test_rows_of_a_mixed_batch_are_what_they_would_be_alone(voices):
    model, alone = voices
    rows = ["noir", None, "bard", "pirate", "bard"]
    idx = torch.randint(97, (5, 20), generator=torch.Generator().manual_seed(3))
    own = {p.data_ptr() for p in model.parameters()}
    use_lora(model, rows)
    assert {p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n} <= own, "no base weight is copied"
    logits = model(idx)[0]
    for row, name in enumerate(rows):
        torch.testing.assert_close(logits[row], alone[name](idx[row:row + 1])[0][0], atol=1e-5, rtol=0)
    assert torch.equal(model.generate(idx, 15, temperature=0), torch.cat([
        alone[name].generate(idx[row:row + 1], 15, temperature=0) for row, name in enumerate(rows)]))
    use_lora(model, "pirate")
    assert torch.equal(model(idx)[0], alone["pirate"](idx)[0])


def test_a_mix_of_nothing_but_the_base_is_the_base(voices, idx):
    model, alone = voices
    use_lora(model, [None] * 3)
    assert torch.equal(model(idx)[0], alone[None](idx)[0])


def test_a_batch_of_another_size_than_the_mix_is_refused(voices, idx):
    model, _ = voices
    use_lora(model, ["pirate", "bard"])
    with pytest.raises(ValueError, match="3, 20.*2 rows"):
        model(idx)


def test_a_mix_can_be_neither_merged_nor_saved_nor_trained(voices, tmp_path):
    model, _ = voices
    use_lora(model, ["pirate", "bard"])
    for call in (merge_lora, lora_parameters, lora_state_dict, lambda model: save_lora(model, tmp_path / "mix")):
        with pytest.raises(ValueError, match="use_lora"):
            call(model)
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize("which", ["parrot", ["pirate", "parrot"], [], ""])
def test_an_adapter_that_is_not_there_is_refused_and_those_there_are_named(voices, idx, which):
    model, alone = voices
    with pytest.raises(ValueError, match="bard, noir, pirate"):
        use_lora(model, which)
    assert torch.equal(model(idx)[0], alone["noir"](idx)[0])


def test_deleting_forgets_one_adapter_and_leaves_the_others(voices, idx):
    model, alone = voices
    delete_lora(model, "noir")
    assert list_lora(model) == ["bard", "pirate"] and torch.equal(model(idx)[0], alone[None](idx)[0])
    use_lora(model, "bard")
    assert torch.equal(model(idx)[0], alone["bard"](idx)[0])
    with pytest.raises(ValueError, match="noir"):
        delete_lora(model, "noir")


def test_a_weighted_sum_is_exact_and_an_adapter_like_any_other(voices, idx, tmp_path):
    model, _ = voices
    weights, base = {"pirate": 0.7, "noir": -0.4, "bard": 1.5}, make_gpt()
    combine_lora(model, weights, "mix")
    for path, layer in lora_layers(model).items():
        parts = [w * a["scaling"] * a["lora_B"] @ a["lora_A"] for name, w in weights.items()
                 if (a := layer.adapters.get(name))]
        torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, sum(parts), atol=1e-5, rtol=1e-5)
        base.get_submodule(path).weight.data += sum(parts)
    torch.testing.assert_close(model(idx)[0], base(idx)[0], atol=2e-5, rtol=0)
    save_lora(model, tmp_path / "mix")
    other = make_gpt()
    load_lora(other, tmp_path / "mix")
    assert torch.equal(other(idx)[0], model(idx)[0])
    make_gpt().save_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval(), tmp_path / "mix")
    torch.testing.assert_close(theirs(idx).logits, model(idx)[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("weights, name", [({}, "mix"), ({"parrot": 1.0}, "mix"), ({"pirate": math.nan}, "mix"),
                                           ({"pirate": 1.0}, "bard")])
def test_a_sum_that_cannot_be_made_is_refused_and_changes_nothing(voices, idx, weights, name):
    model, alone = voices
    with pytest.raises(ValueError, match="pirate|bard"):
        combine_lora(model, weights, name)
    assert list_lora(model) == sorted(VOICES) and torch.equal(model(idx)[0], alone["noir"](idx)[0])


def test_training_one_adapter_leaves_the_others_and_the_base_bit_for_bit(voices, idx):
    model, alone = voices
    use_lora(model, "pirate")
    train_steps(model, idx, 3)
    assert not torch.equal(model(idx)[0], alone["pirate"](idx)[0])
    for name in (None, "bard", "noir"):
        use_lora(model, name)
        assert torch.equal(model(idx)[0], alone[name](idx)[0])


def test_a_new_adapter_beside_others_freezes_only_the_base(voices, idx):
    model, alone = voices
    apply_lora(model, r=2, name="fresh", target_modules=["c_attn"])
    assert torch.equal(model(idx)[0], alone[None](idx)[0])
    assert all(p.requires_grad for p in lora_parameters(model)) and len(lora_parameters(model)) == 4
    assert {p for p in model.parameters() if p.requires_grad} == set(lora_parameters(model))
    use_lora(model, "pirate")
    assert {p for p in model.parameters() if p.requires_grad} == set(lora_parameters(model))


def test_an_optimizer_made_before_switching_trains_the_adapter_after_it(voices, idx):
    model, _ = voices
    use_lora(model, "pirate")
    optimizer, before = torch.optim.SGD(lora_parameters(model), lr=0.1), lora_parameters(model)[0].clone()
    use_lora(model, "bard")
    with disable_lora(model):
        model(idx)
    use_lora(model, "pirate")
    model(idx, idx)[1].backward()
    optimizer.step()
    assert not torch.equal(lora_parameters(model)[0], before)


def test_switching_unmerges_first_and_each_adapter_merges(voices, idx):
    model, alone = voices
    for name in ("pirate", "bard"):
        use_lora(model, name)
        merge_lora(model)
        torch.testing.assert_close(model(idx)[0], alone[name](idx)[0], atol=2e-5, rtol=0)
    use_lora(model, None)
    assert torch.equal(model(idx)[0], alone[None](idx)[0])


def test_disabling_a_mix_ends_with_the_mix(voices, idx):
    model, alone = voices
    use_lora(model, ["pirate", None, "bard"])
    mixed = model(idx)[0]
    with disable_lora(model):
        assert torch.equal(model(idx)[0], alone[None](idx)[0])
    assert torch.equal(model(idx)[0], mixed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_an_adapter_not_in_use_follows_its_layer_to_another_device(voices, idx):
    model, alone = voices
    model.to("cuda")
    for name in ("bard", "pirate"):
        use_lora(model, name)
        torch.testing.assert_close(model(idx.cuda())[0].cpu(), alone[name](idx)[0], atol=1e-3, rtol=1e-3)
    use_lora(model, ["bard", "noir", None])
    assert model(idx.cuda())[0].is_cuda


def test_a_copy_with_several_adapters_is_independent(voices, idx):
    model, alone = voices
    twin = copy.deepcopy(model)
    for layer in lora_layers(twin).values():
        for adapter in layer.adapters.values():
            adapter["lora_B"].data.zero_()
    for name in VOICES:
        use_lora(model, name)
        use_lora(twin, name)
        assert torch.equal(model(idx)[0], alone[name](idx)[0]) and torch.equal(twin(idx)[0], alone[None](idx)[0])


def test_a_refused_file_leaves_the_adapters_and_the_one_in_use(voices, tmp_path, idx):
    model, alone = voices
    write_tensors(tmp_path / "bard", lambda t: next(iter(t.values())).fill_(math.nan))
    for name in ("bard", "new"):
        with pytest.raises(ValueError, match="NaN"):
            load_lora(model, tmp_path / "bard", name)
    with pytest.raises(ValueError, match="differs"):
        load_lora(model, tmp_path / "pirate", "noir")
    assert list_lora(model) == sorted(VOICES) and torch.equal(model(idx)[0], alone["noir"](idx)[0])


# ---- embeddings and other kinds of layers ----------------------------------------------------------------------------

def test_an_embedding_is_looked_up_in_w_plus_ba():
    torch.manual_seed(0)
    net, idx = nn.Sequential(nn.Embedding(50, 12, padding_idx=3)), torch.randint(50, (4, 7))
    base, before = net[0], net(idx)
    apply_lora(net, r=3, alpha=6, target_modules=["0"])
    assert torch.equal(net(idx), before) and net[0].weight is base.weight
    for p in lora_parameters(net):
        nn.init.normal_(p)
    expected = base.weight + 2 * (net[0].lora_B @ net[0].lora_A).T
    torch.testing.assert_close(net(idx), expected[idx], atol=1e-5, rtol=0)
    merge_lora(net)
    torch.testing.assert_close(net(idx), expected[idx], atol=1e-5, rtol=0)
    remove_lora(net)
    assert type(net[0]) is nn.Embedding and net[0].padding_idx == 3


def test_a_first_step_moves_only_the_tokens_it_has_seen():
    net = nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 1))
    apply_lora(net, target_modules=["0"])
    before = (net[0].lora_B @ net[0].lora_A).clone()
    optimizer = torch.optim.SGD(lora_parameters(net), lr=0.1)
    net(torch.tensor([4, 9])).sum().backward()
    optimizer.step()
    moved = (net[0].lora_B @ net[0].lora_A - before).abs().sum(0)
    assert moved.nonzero().flatten().tolist() == [4, 9]


def test_rows_of_a_mix_with_an_adapted_position_embedding(tmp_path):
    model, alone = make_gpt(), {}
    for seed, name in enumerate("ab"):
        alone[name] = adapted(target_modules=["wpe", "c_attn"], std=0.1 + 0.1 * seed)
        save_lora(alone[name], tmp_path / name)
        load_lora(model, tmp_path / name, name)
    idx = torch.randint(97, (2, 2))         # as many positions as rows: only by chance would the shapes tell
    use_lora(model, ["b", "a"])
    for row, name in enumerate("ba"):
        torch.testing.assert_close(model(idx)[0][row], alone[name](idx[row:row + 1])[0][0], atol=1e-5, rtol=0)


def test_a_subclass_of_linear_is_refused_since_it_may_compute_something_else():
    attention = nn.MultiheadAttention(8, 2)         # uses its out_proj's weight without calling it
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear, not an nn.Linear"):
        apply_lora(attention, target_modules=["out_proj"])


def test_removing_puts_back_a_layer_with_the_hooks_it_had():
    net, calls = nn.Sequential(nn.Linear(4, 4)), []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    apply_lora(net, target_modules=["0"])
    remove_lora(net)
    net(torch.ones(1, 4))
    assert calls == [1] and type(net[0]) is nn.Linear


# ---- state dicts and files -------------------------------------------------------------------------------------------

def test_the_state_dict_round_trips_through_safetensors(tmp_path, idx):
    model, other = adapted(), adapted(seed=0, std=0.3)
    save_file(lora_state_dict(model), tmp_path / "lora.safetensors")
    load_lora_state_dict(other, load_file(tmp_path / "lora.safetensors"))
    assert torch.equal(other(idx)[0], model(idx)[0])


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("transformer.h.0.attn.c_attn.lora_A"), "lacks transformer.h.0.attn.c_attn.lora_A"),
    (lambda s: s.update(extra=torch.zeros(1)), "extra"),
    (lambda s: s.update({"transformer.h.0.attn.c_attn.lora_A": torch.zeros(5, 64)}), "shape"),
    (lambda s: s["transformer.h.1.mlp.c_fc.lora_B"].fill_(math.nan), "NaN")])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(idx, change, says):
    model = adapted()
    before, state = model(idx)[0], {name: p.clone() for name, p in adapted(seed=9).state_dict().items() if "lora" in name}
    change(state)
    with pytest.raises(ValueError, match=says):
        load_lora_state_dict(model, state)
    assert torch.equal(model(idx)[0], before)


@pytest.mark.parametrize("settings", [dict(), dict(r=1, alpha=3), dict(target_modules=["attn.c_proj"]), dict(use_rslora=True)])
def test_peft_reads_what_we_write(tmp_path, idx, settings):
    model = adapted(**settings)
    make_gpt().save_pretrained(tmp_path / "base")
    save_lora(model, tmp_path / "adapter")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [dict(), dict(r=2, lora_alpha=5), dict(target_modules="all-linear"), dict(use_rslora=True)])
def test_we_read_what_peft_writes(tmp_path, idx, settings):
    make_gpt().save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    theirs = peft.get_peft_model(base, peft.LoraConfig(**{
        **dict(r=4, lora_alpha=16, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True), **settings})).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    model = make_gpt()
    load_lora(model, tmp_path / "adapter")
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def test_a_second_adapter_is_loaded_over_the_first(tmp_path, idx):
    first, second = adapted(seed=1), adapted(seed=1, std=0.2)
    save_lora(second, tmp_path)
    load_lora(first, tmp_path)
    assert torch.equal(first(idx)[0], second(idx)[0])


def their_adapter(dir, std=0.1, **settings):
    """PEFT's LoRA on transformers' GPT-2, saved in dir/adapter -> the PEFT model."""
    make_gpt().save_pretrained(dir / "base")
    base = GPT2LMHeadModel.from_pretrained(dir / "base").eval()
    theirs = peft.get_peft_model(base, peft.LoraConfig(**{
        **dict(r=4, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), **settings})).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=std)
    theirs.save_pretrained(dir / "adapter")
    # Read again, for that is what the file means: PEFT sorts the patterns when it writes them, and the first match counts.
    return peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(dir / "base"), dir / "adapter").eval()


@pytest.mark.parametrize("settings", [
    dict(rank_pattern={"c_attn": 2, "h.1.mlp.c_fc": 7}), dict(alpha_pattern={"mlp.c_proj": 3, "c_proj": 40}),
    dict(rank_pattern={r"h\.1\..*": 6}, alpha_pattern={r".*\.c_(attn|fc)": 9}, use_rslora=True),
    dict(target_modules=r".*\.1\.attn\.c_(attn|proj)"), dict(layers_to_transform=[1]), dict(exclude_modules=["mlp.c_proj"]),
    dict(target_modules=["c_attn", "wpe"]), dict(init_lora_weights="gaussian")])
def test_whatever_peft_computes_from_its_file_we_compute(tmp_path, idx, settings):
    theirs, model = their_adapter(tmp_path, **settings), make_gpt()
    load_lora(model, tmp_path / "adapter")
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings, says", [
    (dict(use_dora=True), "use_dora"), (dict(bias="lora_only"), "bias"), (dict(modules_to_save=["ln_f"]), "modules_to_save"),
    (dict(lora_bias=True), "lora_bias"), (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    (dict(init_lora_weights="pissa"), "init_lora_weights"), (dict(target_modules=["c_attn", "wte"]), "shares its weight")])
@pytest.mark.filterwarnings("ignore")
def test_what_peft_can_and_we_cannot_is_refused_by_name(tmp_path, model, idx, settings, says):
    before = model(idx)[0]
    their_adapter(tmp_path, **settings)
    with pytest.raises(ValueError, match=says):
        load_lora(model, tmp_path / "adapter")
    assert torch.equal(model(idx)[0], before) and not any(isinstance(m, lora_minimal.LoRALayer) for m in model.modules())


def test_greedy_continuations_equal_pefts_both_ways(tmp_path, idx):
    theirs, model = their_adapter(tmp_path, std=0.3), make_gpt()
    load_lora(model, tmp_path / "adapter")
    ours = model.generate(idx, 12, temperature=0)
    assert torch.equal(theirs.generate(idx, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None), ours)
    save_lora(model, tmp_path / "again")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "again")
    assert torch.equal(again.generate(idx, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None), ours)


def test_layers_of_different_rank_and_alpha_survive_the_file_and_peft(tmp_path, idx):
    """Names that end in one another: "0" is a pattern for "2.0" too, unless "2.0" has gone before."""
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))))

    model, x = net(), torch.randn(5, 8)
    lora_minimal._adapt(model, {path: dict(r=r, alpha=alpha, dropout=0.0, use_rslora=False) for path, r, alpha in
                                (("0", 2, 8), ("2.0", 3, 4.5), ("2.1.0", 4, 16))}, "default")
    for p in lora_parameters(model):
        nn.init.normal_(p)
    save_lora(model, tmp_path)
    other, theirs = net(), peft.PeftModel.from_pretrained(net(), tmp_path)
    load_lora(other, tmp_path)
    assert torch.equal(other(x), model(x))
    torch.testing.assert_close(theirs(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_llama_is_adapted_and_agrees_with_peft_both_ways(tmp_path):
    def llama():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)).eval()

    model, idx = llama(), torch.randint(97, (2, 9))
    before = model(idx).logits
    apply_lora(model, target_modules=("q_proj", "v_proj", "down_proj", "embed_tokens"))
    torch.testing.assert_close(model(idx).logits, before, atol=1e-6, rtol=0)
    for p in lora_parameters(model):
        nn.init.normal_(p, std=0.1)
    save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx).logits, atol=1e-5, rtol=0)
    assert (theirs(idx).logits - before).abs().max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = llama()
    load_lora(again, tmp_path / "theirs")
    torch.testing.assert_close(again(idx).logits, model(idx).logits, atol=1e-5, rtol=0)


def write_config(dir, **changes):
    config = json.loads((dir / "adapter_config.json").read_text())
    (dir / "adapter_config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != "drop"}))


def write_tensors(dir, change):
    tensors = load_file(dir / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, dir / "adapter_model.safetensors")


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize("damage, says", [
    (lambda d: (d / "adapter_config.json").unlink(), "does not exist"),
    (lambda d: (d / "adapter_model.safetensors").unlink(), "does not exist"),
    (lambda d: (d / "adapter_config.json").write_text("{"), "JSON"),
    (lambda d: (d / "adapter_config.json").write_text("[1]"), "JSON"),
    (lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:900]), "whole"),
    (lambda d: write_config(d, use_dora=True), "use_dora"),
    (lambda d: write_config(d, bias="all"), "bias"),
    (lambda d: write_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
    (lambda d: write_config(d, peft_type="IA3"), "peft_type"),
    (lambda d: write_config(d, init_lora_weights="pissa"), "init_lora_weights"),
    (lambda d: write_config(d, alora_invocation_tokens=[1]), "alora"),
    (lambda d: write_config(d, some_future_variant=1), "some_future_variant"),
    (lambda d: write_config(d, lora_alpha="drop"), "lora_alpha"),
    (lambda d: write_config(d, r=5), "shape"),
    (lambda d: write_config(d, r="x"), "rank|shape"),
    (lambda d: write_config(d, lora_alpha=-1), "alpha"),
    (lambda d: write_tensors(d, lambda t: t.pop(FIRST)), "missing"),
    (lambda d: write_tensors(d, lambda t: t.clear()), "not a plain LoRA"),
    (lambda d: write_tensors(d, lambda t: t.update(extra=torch.zeros(1))), "not a plain LoRA"),
    (lambda d: write_tensors(d, lambda t: t[FIRST].fill_(math.inf)), "infinite"),
    (lambda d: write_tensors(d, lambda t: t.update({FIRST: torch.zeros(4, 32)})), "another base"),
])
def test_a_damaged_or_foreign_adapter_is_refused_and_changes_nothing(tmp_path, model, idx, damage, says):
    save_lora(adapted(), tmp_path)
    damage(tmp_path)
    before, grads = model(idx)[0], [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load_lora(model, tmp_path)
    assert torch.equal(model(idx)[0], before) and grads == [p.requires_grad for p in model.parameters()]


def test_loading_adapts_just_the_layers_of_the_file(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))      # "0", and "2.0" ends in it

    model, x = net(), torch.randn(3, 4)
    model[0] = LoRALinear(model[0], r=2, alpha=4)
    nn.init.normal_(model[0].lora_B)
    save_lora(model, tmp_path)
    other = net()
    assert load_lora(other, tmp_path) == ["0"]
    torch.testing.assert_close(other(x), model(x))


def test_an_adapter_for_other_layers_is_refused(tmp_path):
    save_lora(adapted(), tmp_path)
    with pytest.raises(ValueError, match="another base"):
        load_lora(nn.Sequential(nn.Linear(4, 4)), tmp_path)


def test_the_module_stands_alone():
    source = open(lora_minimal.__file__, encoding="utf-8").read()
    assert "import gpt" not in source and "from gpt" not in source and "from data" not in source


def test_an_adapter_of_a_subclass_is_not_saved_as_if_it_were_plain_lora(tmp_path):
    class Scaled(LoRALinear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Scaled(nn.Linear(4, 4), r=2, alpha=4))
    with pytest.raises(ValueError, match="Scaled computes something else"):
        save_lora(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()
