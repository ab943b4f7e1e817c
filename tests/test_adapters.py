"""lab/adapters.py: many adapters over one base."""
import copy
import math

import peft
import pytest
import torch
from helpers_lora import (
    adapted,
    edit_tensors,
    fill_lora,
    snapshot,
    train_steps,
    transformers_gpt2,
)
from torch import nn

from conftest import make_gpt
from lab.adapters import Adapters
from lora_minimal import (
    disable_lora,
    load_lora,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    save_lora,
)

VOICES = {
    "pirate": {},
    "bard": dict(r=2, alpha=3, target_modules=["attn.c_proj", "c_fc"]),
    "noir": dict(use_rslora=True),
}
SEEDS = {"pirate": 1, "bard": 2, "noir": 3}


@pytest.fixture
def voices(tmp_path):
    """A GPT with three adapters of different ranks and layers, and {name: a GPT with it alone}."""
    adapters = Adapters(make_gpt())
    alone = {None: make_gpt()}
    for name, settings in VOICES.items():
        alone[name] = adapted(**settings)
        torch.manual_seed(SEEDS[name])
        fill_lora(alone[name])
        save_lora(alone[name], tmp_path / name)
        adapters.load(tmp_path / name, name)
    return adapters, alone


def base_parameters(model):
    return {name: p for name, p in model.named_parameters() if "lora_" not in name}


def addresses(model):
    """Where the base weights are in memory."""
    return {name: p.data_ptr() for name, p in base_parameters(model).items()}


# ---- switching -----------------------------------------------------------------------------------

def test_switching_gives_each_adapter_alone_and_never_touches_the_base(voices, idx):
    adapters, alone = voices
    model = adapters.model
    base = dict(make_gpt().named_parameters())
    before = addresses(model)
    assert adapters.names == sorted(VOICES)
    for name in ("bard", "pirate", None, "noir", None, "bard"):
        adapters.use(name)
        assert adapters.current == name
        assert torch.equal(model(idx)[0], alone[name](idx)[0])
        assert addresses(model) == before
        for path, p in base_parameters(model).items():
            assert torch.equal(p, base[path])


def test_the_state_dict_is_of_the_base_and_the_adapter_in_use(voices):
    adapters, alone = voices
    for name in (None, "bard"):
        adapters.use(name)
        assert adapters.model.state_dict().keys() == alone[name].state_dict().keys()


@pytest.mark.parametrize("which", ["parrot", ["pirate", "parrot"], [], ""])
def test_an_unknown_adapter_is_refused_and_the_known_ones_are_named(voices, idx, which):
    adapters, alone = voices
    with pytest.raises(ValueError, match="bard, noir, pirate"):
        adapters.use(which)
    assert adapters.current == "noir"
    assert torch.equal(adapters.model(idx)[0], alone["noir"](idx)[0])


def test_deleting_forgets_one_adapter_and_leaves_the_others(voices, idx):
    adapters, alone = voices
    model = adapters.model
    adapters.delete("noir")
    assert adapters.names == ["bard", "pirate"]
    assert torch.equal(model(idx)[0], alone[None](idx)[0])
    adapters.use("bard")
    assert torch.equal(model(idx)[0], alone["bard"](idx)[0])
    with pytest.raises(ValueError, match="noir"):
        adapters.delete("noir")


def test_switching_unmerges_first_and_each_adapter_merges(voices, idx):
    adapters, alone = voices
    model = adapters.model
    for name in ("pirate", "bard"):
        adapters.use(name)
        merge_lora(model)
        torch.testing.assert_close(model(idx)[0], alone[name](idx)[0], atol=2e-5, rtol=0)
    adapters.use(None)
    assert torch.equal(model(idx)[0], alone[None](idx)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_an_adapter_not_in_use_follows_its_layer_to_another_device(voices, idx):
    adapters, alone = voices
    model = adapters.model.to("cuda")
    for name in ("bard", "pirate"):
        adapters.use(name)
        ours = model(idx.cuda())[0].cpu()
        torch.testing.assert_close(ours, alone[name](idx)[0], atol=1e-3, rtol=1e-3)
    adapters.use(["bard", "noir", None])
    assert model(idx.cuda())[0].is_cuda


def test_a_copy_with_several_adapters_is_independent(voices, idx):
    adapters, alone = voices
    twin = copy.deepcopy(adapters)
    for name in VOICES:
        for adapter in twin[name].values():
            adapter.lora_B.data.zero_()
    for name in VOICES:
        adapters.use(name)
        twin.use(name)
        assert torch.equal(adapters.model(idx)[0], alone[name](idx)[0])
        assert torch.equal(twin.model(idx)[0], alone[None](idx)[0])


def test_the_adapter_that_a_model_has_already_is_called_default(idx):
    model = adapted()
    tuned = model(idx)[0]
    adapters = Adapters(model)
    assert adapters.names == ["default"]
    assert adapters.current == "default"
    adapters.use(None)
    assert torch.equal(model(idx)[0], make_gpt()(idx)[0])
    adapters.use("default")
    assert torch.equal(model(idx)[0], tuned)


# ---- a batch whose rows use different adapters ---------------------------------------------------

def rows_alone(alone, rows, idx):
    """The logits (B, T, V) of each row from the model that has its adapter alone."""
    logits = [alone[name](idx[i:i + 1])[0] for i, name in enumerate(rows)]
    return torch.cat(logits)


def generated_alone(alone, rows, idx, n):
    """The greedy continuation (B, T + n) of each row from the model that has its adapter alone."""
    tokens = [alone[name].generate(idx[i:i + 1], n, temperature=0) for i, name in enumerate(rows)]
    return torch.cat(tokens)


def test_rows_of_a_mixed_batch_are_what_they_would_be_alone(voices):
    adapters, alone = voices
    model = adapters.model
    rows = ["noir", None, "bard", "pirate", "bard"]
    idx = torch.randint(97, (5, 20), generator=torch.Generator().manual_seed(3))
    before = addresses(model)
    adapters.use(rows)
    assert addresses(model) == before, "no base weight is copied"
    expected = rows_alone(alone, rows, idx)
    torch.testing.assert_close(model(idx)[0], expected, atol=1e-5, rtol=0)
    continued = model.generate(idx, 15, temperature=0)
    assert torch.equal(continued, generated_alone(alone, rows, idx, 15))
    adapters.use("pirate")
    assert torch.equal(model(idx)[0], alone["pirate"](idx)[0])


def test_a_mix_of_nothing_but_the_base_is_the_base(voices, idx):
    adapters, alone = voices
    adapters.use([None] * 3)
    assert torch.equal(adapters.model(idx)[0], alone[None](idx)[0])


def test_a_batch_of_another_size_than_the_mix_is_refused(voices, idx):
    adapters, _ = voices
    adapters.use(["pirate", "bard"])
    with pytest.raises(ValueError, match="3, 20.*2 rows"):
        adapters.model(idx)


def test_a_mix_can_be_neither_merged_nor_saved_nor_trained(voices, tmp_path):
    adapters, _ = voices
    adapters.use(["pirate", "bard"])
    for call in (merge_lora, lora_parameters, lora_state_dict):
        with pytest.raises(ValueError, match="Adapters.use"):
            call(adapters.model)
    with pytest.raises(ValueError, match="Adapters.use"):
        save_lora(adapters.model, tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


def test_disabling_a_mix_ends_with_the_mix(voices, idx):
    adapters, alone = voices
    model = adapters.model
    adapters.use(["pirate", None, "bard"])
    mixed = model(idx)[0]
    with disable_lora(model):
        assert torch.equal(model(idx)[0], alone[None](idx)[0])
    assert torch.equal(model(idx)[0], mixed)


def test_rows_of_a_mix_with_an_adapted_position_embedding(tmp_path):
    adapters = Adapters(make_gpt())
    alone = {}
    for std, name in ((0.1, "a"), (0.2, "b")):
        alone[name] = adapted(target_modules=["wpe", "c_attn"], std=std)
        save_lora(alone[name], tmp_path / name)
        adapters.load(tmp_path / name, name)
    idx = torch.randint(97, (2, 2))         # as many positions as rows: shapes cannot tell
    adapters.use(["b", "a"])
    expected = rows_alone(alone, ["b", "a"], idx)
    torch.testing.assert_close(adapters.model(idx)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_rows_of_a_mix_on_the_conv1d_of_transformers(voices, tmp_path):
    _, alone = voices
    model = transformers_gpt2(tmp_path)
    adapters = Adapters(model)
    for name in VOICES:
        adapters.load(tmp_path / name, name)
    rows = ["bard", None, "noir"]
    idx = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(3))
    adapters.use(rows)
    expected = rows_alone(alone, rows, idx)
    torch.testing.assert_close(model(idx).logits, expected, atol=1e-5, rtol=0)


# ---- sums ----------------------------------------------------------------------------------------

def weighted_update(adapters, weights, path):
    """The sum of w * scaling * B A over {adapter: w} in the layer at `path`."""
    total = 0
    for name, weight in weights.items():
        adapter = adapters[name].get(path)
        if adapter is not None:
            total = total + weight * adapter.scaling * adapter.lora_B @ adapter.lora_A
    return total


def test_a_weighted_sum_is_exact_and_an_adapter_like_any_other(voices, idx, tmp_path):
    adapters, _ = voices
    model = adapters.model
    base = make_gpt()
    weights = {"pirate": 0.7, "noir": -0.4, "bard": 1.5}
    adapters.combine(weights, "mix")
    for path, layer in lora_layers(model).items():
        expected = weighted_update(adapters, weights, path)
        torch.testing.assert_close(layer.delta_weight(), expected, atol=1e-5, rtol=1e-5)
        base.get_submodule(path).weight.data += expected
    torch.testing.assert_close(model(idx)[0], base(idx)[0], atol=2e-5, rtol=0)
    save_lora(model, tmp_path / "mix")
    other = make_gpt()
    load_lora(other, tmp_path / "mix")
    assert torch.equal(other(idx)[0], model(idx)[0])
    theirs = peft.PeftModel.from_pretrained(transformers_gpt2(tmp_path), tmp_path / "mix")
    torch.testing.assert_close(theirs(idx).logits, model(idx)[0], atol=2e-5, rtol=0)


def test_a_sum_can_be_trained(voices, idx):
    adapters, alone = voices
    adapters.combine({"pirate": 0.5, "bard": 0.5}, "both")
    _, first = adapters.model(idx[:, :-1], idx[:, 1:])
    train_steps(adapters.model, idx, 3)
    _, last = adapters.model(idx[:, :-1], idx[:, 1:])
    assert last < first
    for name in VOICES:
        adapters.use(name)
        assert torch.equal(adapters.model(idx)[0], alone[name](idx)[0])


@pytest.mark.parametrize("weights, name", [
    ({}, "mix"),
    ({"parrot": 1.0}, "mix"),
    ({"pirate": math.nan}, "mix"),
    ({"pirate": 1.0}, "bard"),
])
def test_a_sum_that_cannot_be_made_is_refused_and_changes_nothing(voices, idx, weights, name):
    adapters, alone = voices
    with pytest.raises(ValueError, match="pirate|bard"):
        adapters.combine(weights, name)
    assert adapters.names == sorted(VOICES)
    assert torch.equal(adapters.model(idx)[0], alone["noir"](idx)[0])


# ---- training ------------------------------------------------------------------------------------

def trained_parameters(model):
    return {p for p in model.parameters() if p.requires_grad}


def test_training_one_adapter_leaves_the_others_and_the_base_bit_for_bit(voices, idx):
    adapters, alone = voices
    model = adapters.model
    adapters.use("pirate")
    train_steps(model, idx, 3)
    assert not torch.equal(model(idx)[0], alone["pirate"](idx)[0])
    for name in (None, "bard", "noir"):
        adapters.use(name)
        assert torch.equal(model(idx)[0], alone[name](idx)[0])


def test_a_new_adapter_beside_others_freezes_only_the_base(voices, idx):
    adapters, alone = voices
    model = adapters.model
    adapters.add("fresh", r=2, target_modules=["c_attn"])
    assert torch.equal(model(idx)[0], alone[None](idx)[0])
    assert all(p.requires_grad for p in lora_parameters(model))
    assert len(lora_parameters(model)) == 4
    assert trained_parameters(model) == set(lora_parameters(model))
    adapters.use("pirate")
    assert trained_parameters(model) == set(lora_parameters(model))


def test_a_new_adapter_may_be_on_layers_without_lora(voices, idx):
    adapters, alone = voices
    model = adapters.model
    adapters.add("fresh", r=2, target_modules=["wpe", "c_attn"])
    assert trained_parameters(model) == set(lora_parameters(model))
    torch.testing.assert_close(model(idx)[0], alone[None](idx)[0], atol=1e-6, rtol=0)
    train_steps(model, idx, 2)
    for name in (None, "pirate", "bard", "noir"):
        adapters.use(name)
        assert torch.equal(model(idx)[0], alone[name](idx)[0])
        if name is not None:
            assert trained_parameters(model) == set(lora_parameters(model))


def test_an_optimizer_made_before_switching_trains_the_adapter_after_it(voices, idx):
    adapters, _ = voices
    model = adapters.model
    adapters.use("pirate")
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    before = lora_parameters(model)[0].clone()
    adapters.use("bard")
    with disable_lora(model):
        model(idx)
    adapters.use("pirate")
    model(idx, idx)[1].backward()
    optimizer.step()
    assert not torch.equal(lora_parameters(model)[0], before)


# ---- refusals ------------------------------------------------------------------------------------

def test_a_refused_file_leaves_the_adapters_and_the_one_in_use(voices, tmp_path, idx):
    adapters, alone = voices
    name = "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"
    edit_tensors(tmp_path / "bard", {name: torch.full((2, 64), math.nan)})
    for name in ("bard", "new"):
        with pytest.raises(ValueError, match="NaN"):
            adapters.load(tmp_path / "bard", name)
    with pytest.raises(ValueError, match="differs"):
        adapters.load(tmp_path / "pirate", "noir")
    assert adapters.names == sorted(VOICES)
    assert torch.equal(adapters.model(idx)[0], alone["noir"](idx)[0])


@pytest.mark.parametrize("settings, says", [
    (dict(name="bard"), "bard"),
    (dict(name="fresh", r=0), "rank"),
    (dict(name="fresh", target_modules=["c_attn", "lm_head"]), "shares its weight"),
    (dict(name="fresh", target_modules=["typo"]), "typo"),
])
def test_a_new_adapter_that_cannot_be_made_is_refused_and_changes_nothing(
    voices, idx, settings, says
):
    adapters, alone = voices
    before = snapshot(adapters.model)
    with pytest.raises(ValueError, match=says):
        adapters.add(**settings)
    assert snapshot(adapters.model) == before
    assert adapters.names == sorted(VOICES)
    assert adapters.current == "noir"
    assert torch.equal(adapters.model(idx)[0], alone["noir"](idx)[0])


def test_an_adapter_on_a_layer_with_a_forward_of_its_own_is_refused(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4))
    adapters = Adapters(net)
    adapters.add("first", target_modules=["0"])
    save_lora(net, tmp_path)
    other = nn.Sequential(nn.Linear(4, 4))
    original = other[0].forward
    other[0].forward = lambda x: original(x)
    with pytest.raises(ValueError, match="forward of its own"):
        Adapters(other).load(tmp_path, "first")
    assert type(other[0]) is nn.Linear
