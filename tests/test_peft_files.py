"""State dicts and lab/peft_files.py: adapters on disk, PEFT both ways, and damaged files."""
import math
import time

import peft
import pytest
import torch
from helpers_lora import (
    adapted,
    edit_config,
    edit_tensors,
    fill_lora,
    snapshot,
    transformers_gpt2,
    with_changes,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from conftest import make_gpt
from lab.adapters import Adapters
from lora_minimal import (
    LoRALinear,
    adapt_layers,
    apply_lora,
    is_lora,
    known_classes,
    load_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_lora,
)

# ---- state dicts ---------------------------------------------------------------------------------


def test_the_state_dict_round_trips_through_safetensors(tmp_path, idx):
    model = adapted()
    other = adapted(seed=0, std=0.3)
    save_file(lora_state_dict(model), tmp_path / "lora.safetensors")
    load_lora_state_dict(other, load_file(tmp_path / "lora.safetensors"))
    assert torch.equal(other(idx)[0], model(idx)[0])


@pytest.mark.parametrize("name, tensor, says", [
    ("transformer.h.0.attn.c_attn.lora_A", None, "lacks transformer.h.0.attn.c_attn.lora_A"),
    ("extra", torch.zeros(1), "extra"),
    ("transformer.h.0.attn.c_attn.lora_A", torch.zeros(5, 64), "shape"),
    ("transformer.h.1.mlp.c_fc.lora_B", torch.full((256, 4), math.nan), "NaN"),
])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(idx, name, tensor, says):
    model = adapted()
    before = model(idx)[0]
    state = with_changes(lora_state_dict(adapted(seed=9)), {name: tensor})
    with pytest.raises(ValueError, match=says):
        load_lora_state_dict(model, state)
    assert torch.equal(model(idx)[0], before)


# ---- PEFT both ways ------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {},
    dict(r=1, alpha=3),
    dict(target_modules=["attn.c_proj"]),
    dict(use_rslora=True),
])
def test_peft_reads_what_we_write(tmp_path, idx, settings):
    model = adapted(**settings)
    save_lora(model, tmp_path / "adapter")
    base = transformers_gpt2(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx)[0], atol=1e-5, rtol=0)


def peft_model(dir, **settings):
    """PEFT's LoRA on transformers' GPT-2."""
    defaults = dict(
        r=4, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    config = peft.LoraConfig(**(defaults | settings))
    return peft.get_peft_model(transformers_gpt2(dir), config).eval()


@pytest.mark.parametrize("settings", [
    {},
    dict(r=2, lora_alpha=5),
    dict(target_modules="all-linear"),
    dict(use_rslora=True),
])
def test_we_read_what_peft_writes(tmp_path, idx, settings):
    targets = dict(target_modules=["c_attn", "mlp.c_proj"])
    theirs = peft_model(tmp_path, **(targets | settings))
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    model = make_gpt()
    load_lora(model, tmp_path / "adapter")
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def test_a_second_adapter_is_loaded_over_the_first(tmp_path, idx):
    first = adapted(seed=1)
    second = adapted(seed=1, std=0.2)
    save_lora(second, tmp_path)
    load_lora(first, tmp_path)
    assert torch.equal(first(idx)[0], second(idx)[0])


def test_an_adapter_is_loaded_over_a_merged_one(tmp_path, idx):
    first = adapted(seed=1)
    second = adapted(seed=1, std=0.2)
    save_lora(second, tmp_path)
    merge_lora(first)
    load_lora(first, tmp_path)
    assert torch.equal(first(idx)[0], second(idx)[0])


def test_an_adapter_with_other_settings_is_not_loaded_over_the_first(tmp_path, idx):
    model = adapted()
    before = model(idx)[0]
    save_lora(adapted(r=2), tmp_path)
    with pytest.raises(ValueError, match="remove_lora"):
        load_lora(model, tmp_path)
    assert torch.equal(model(idx)[0], before)


def saved_by_peft(dir, std=0.1, **settings):
    """PEFT's LoRA on transformers' GPT-2, saved in dir/adapter. Returns the PEFT model.

    It is read again from the file, and the file is what counts: PEFT sorts the patterns when it
    writes them, and takes the first pattern that matches.
    """
    theirs = peft_model(dir, **settings)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=std)
    theirs.save_pretrained(dir / "adapter")
    base = GPT2LMHeadModel.from_pretrained(dir / "base")
    return peft.PeftModel.from_pretrained(base, dir / "adapter").eval()


@pytest.mark.parametrize("settings", [
    dict(rank_pattern={"c_attn": 2, "h.1.mlp.c_fc": 7}),
    dict(alpha_pattern={"mlp.c_proj": 3, "c_proj": 40}),
    dict(
        rank_pattern={r"h\.1\..*": 6},
        alpha_pattern={r".*\.c_(attn|fc)": 9},
        use_rslora=True,
    ),
    dict(target_modules=r".*\.1\.attn\.c_(attn|proj)"),
    dict(layers_to_transform=[1]),
    dict(exclude_modules=["mlp.c_proj"]),
    dict(target_modules=["c_attn", "wpe"]),
    dict(init_lora_weights="gaussian"),
])
def test_whatever_peft_computes_from_its_file_we_compute(tmp_path, idx, settings):
    theirs = saved_by_peft(tmp_path, **settings)
    model = make_gpt()
    load_lora(model, tmp_path / "adapter")
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings, says", [
    (dict(use_dora=True), "use_dora"),
    (dict(bias="lora_only"), "bias"),
    (dict(modules_to_save=["ln_f"]), "modules_to_save"),
    (dict(lora_bias=True), "lora_bias"),
    (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    (dict(init_lora_weights="pissa"), "init_lora_weights"),
    (dict(target_modules=["c_attn", "wte"]), "shares its weight"),
])
@pytest.mark.filterwarnings("ignore")
def test_what_peft_can_and_we_cannot_is_refused_by_name(tmp_path, model, idx, settings, says):
    before = model(idx)[0]
    saved_by_peft(tmp_path, **settings)
    with pytest.raises(ValueError, match=says):
        load_lora(model, tmp_path / "adapter")
    assert torch.equal(model(idx)[0], before)
    assert not any(is_lora(module) for module in model.modules())


def greedy(model, idx, n):
    """transformers' greedy continuation of idx by n tokens."""
    return model.generate(
        idx, max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None
    )


def test_greedy_continuations_equal_pefts_both_ways(tmp_path, idx):
    theirs = saved_by_peft(tmp_path, std=0.3)
    model = make_gpt()
    load_lora(model, tmp_path / "adapter")
    ours = model.generate(idx, 12, temperature=0)
    assert torch.equal(greedy(theirs, idx, 12), ours)
    save_lora(model, tmp_path / "again")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "again")
    assert torch.equal(greedy(again, idx, 12), ours)


def nested_net():
    """The names of its layers end in one another: "0" is a pattern for "2.0" too."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), inner)


def settings_of(r, alpha):
    return dict(r=r, alpha=alpha, dropout=0.0, use_rslora=False)


def assert_survives_the_file_and_peft(model, make_net, x, dir):
    """Save the adapter of `model`, and read it into a new net, here and in PEFT."""
    save_lora(model, dir)
    other = make_net()
    load_lora(other, dir)
    assert torch.equal(other(x), model(x))
    for path, layer in lora_layers(model).items():
        loaded = other.get_submodule(path)
        assert (loaded.r, loaded.alpha) == (layer.r, layer.alpha)
    theirs = peft.PeftModel.from_pretrained(make_net(), dir)
    torch.testing.assert_close(theirs(x), model(x), atol=1e-5, rtol=1e-5)


def test_layers_of_different_rank_and_alpha_survive_the_file_and_peft(tmp_path):
    model = nested_net()
    settings = {
        "0": settings_of(r=2, alpha=8),
        "2.0": settings_of(r=3, alpha=4.5),
        "2.1.0": settings_of(r=4, alpha=16),
    }
    adapt_layers(model, settings, known_classes())
    fill_lora(model, std=1.0)
    assert_survives_the_file_and_peft(model, nested_net, torch.randn(5, 8), tmp_path)


ODD_NAMES = ["x[1]", "x1", "a|b", "b", "c+", "c", "(d", "d*", "e$", "^f", r"g\h", "i j", "ü"]


def oddly_named_net():
    """Layers whose names have a meaning in a regular expression."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name in ODD_NAMES:
        net.add_module(name, nn.Linear(8, 8))
    return net


def test_names_with_regular_expression_characters_survive_the_file_and_peft(tmp_path):
    model = oddly_named_net()
    for i, name in enumerate(ODD_NAMES):
        apply_lora(model, r=1 + i % 3, alpha=2 + i, target_modules=[name])
    fill_lora(model)        # small numbers: many layers multiply rounding errors, too
    x = torch.randn(5, 8)
    assert_survives_the_file_and_peft(model, oddly_named_net, x, tmp_path)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore")
def test_a_llama_is_adapted_and_agrees_with_peft_both_ways(tmp_path):
    model = llama()
    idx = torch.randint(97, (2, 9))
    before = model(idx).logits
    apply_lora(model, target_modules=("q_proj", "v_proj", "down_proj", "embed_tokens"))
    torch.testing.assert_close(model(idx).logits, before, atol=1e-6, rtol=0)
    fill_lora(model)
    tuned = model(idx).logits
    save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(idx).logits, tuned, atol=1e-5, rtol=0)
    assert (theirs(idx).logits - before).abs().max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = llama()
    load_lora(again, tmp_path / "theirs")
    torch.testing.assert_close(again(idx).logits, tuned, atol=1e-5, rtol=0)


# ---- damaged and foreign adapters ----------------------------------------------------------------

def refuse_to_load(dir, model, idx, says):
    """Assert that both ways of loading `dir` are refused, quickly, and change nothing."""
    logits = model(idx)[0]
    before = snapshot(model)
    start = time.monotonic()
    for load in (load_lora, load_among_others):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            load(model, dir)
    assert time.monotonic() - start < 60
    assert snapshot(model) == before
    assert torch.equal(model(idx)[0], logits)


def load_among_others(model, dir):
    Adapters(model).load(dir, "name")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused_and_changes_nothing(tmp_path, model, idx, name):
    save_lora(adapted(), tmp_path)
    (tmp_path / name).unlink()
    refuse_to_load(tmp_path, model, idx, "does not exist")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_config_is_refused_and_changes_nothing(tmp_path, model, idx, text):
    save_lora(adapted(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    refuse_to_load(tmp_path, model, idx, "JSON")


def test_a_truncated_weight_file_is_refused_and_changes_nothing(tmp_path, model, idx):
    save_lora(adapted(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:900])
    refuse_to_load(tmp_path, model, idx, "whole")


@pytest.mark.parametrize("changes, says", [
    (dict(use_dora=True), "use_dora"),
    (dict(bias="all"), "bias"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(peft_type="IA3"), "peft_type"),
    (dict(init_lora_weights="pissa"), "init_lora_weights"),
    (dict(alora_invocation_tokens=[1]), "alora"),
    (dict(some_future_variant=1), "some_future_variant"),
    (dict(removed=["lora_alpha"]), "lora_alpha"),
    (dict(r=5), "shape"),
    (dict(r="x"), "rank|shape"),
    (dict(r=10**400), "shape"),
    (dict(lora_alpha=-1), "alpha"),
    (dict(lora_alpha=10**400), "alpha"),
    (dict(alpha_pattern={"c_attn": 10**400}), "alpha"),
    (dict(lora_alpha=math.nan), "alpha"),
    (dict(lora_alpha=math.inf), "alpha"),
    (dict(lora_alpha="16"), "alpha"),
    (dict(lora_dropout="x"), "dropout"),
    (dict(use_rslora="no"), "use_rslora"),
    (dict(rank_pattern={"(": 4}), "rank_pattern"),
    (dict(rank_pattern=["c_attn"]), "rank_pattern"),
    (dict(alpha_pattern="c_attn"), "alpha_pattern"),
    (dict(init_lora_weights=["gaussian"]), "init_lora_weights"),
    (dict(bias={"all": 1}), "bias"),
])
def test_a_config_that_is_not_plain_lora_is_refused_and_changes_nothing(
    tmp_path, model, idx, changes, says
):
    save_lora(adapted(), tmp_path)
    edit_config(tmp_path, **changes)
    refuse_to_load(tmp_path, model, idx, says)


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize("name, tensor, says", [
    (FIRST, None, "missing"),
    ("extra", torch.zeros(1), "not a plain LoRA"),
    (FIRST, torch.full((4, 64), math.inf), "infinity"),
    (FIRST, torch.zeros(4, 32), "another base"),
])
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(
    tmp_path, model, idx, name, tensor, says
):
    save_lora(adapted(), tmp_path)
    edit_tensors(tmp_path, {name: tensor})
    refuse_to_load(tmp_path, model, idx, says)


def test_a_file_without_tensors_is_refused_and_changes_nothing(tmp_path, model, idx):
    save_lora(adapted(), tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    refuse_to_load(tmp_path, model, idx, "not a plain LoRA")


def net_with_a_long_name():
    """A layer on whose name some patterns take exponential time."""
    net = nn.Sequential()
    net.add_module("a" * 60 + "b", nn.Linear(4, 4))
    return net


def save_with_pattern(dir, key, pattern):
    net = net_with_a_long_name()
    apply_lora(net, r=2, alpha=3, target_modules=["a" * 60 + "b"])
    save_lora(net, dir)
    edit_config(dir, **{key: {pattern: 2}})


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(a|a)*$", "(a|aa)+$"])
def test_a_pattern_that_takes_exponential_time_is_refused_quickly(tmp_path, key, pattern):
    save_with_pattern(tmp_path, key, pattern)
    net = net_with_a_long_name()
    before = snapshot(net)
    start = time.monotonic()
    with pytest.raises(ValueError, match="alpha_pattern cannot be used.*timed out"):
        load_lora(net, tmp_path)
    assert time.monotonic() - start < 60
    assert snapshot(net) == before


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*a){20}$"])
def test_a_pattern_that_takes_exponential_time_elsewhere_is_no_match(tmp_path, key, pattern):
    """Python's own `re` needs 2^60 steps for these, `regex` finds at once that they fail."""
    save_with_pattern(tmp_path, key, pattern)
    net = net_with_a_long_name()
    start = time.monotonic()
    (path,) = load_lora(net, tmp_path)
    assert time.monotonic() - start < 60
    layer = net.get_submodule(path)
    assert (layer.r, layer.alpha) == (2, 3)


def test_loading_adapts_just_the_layers_of_the_file(tmp_path):
    model = two_linears()
    x = torch.randn(3, 4)
    model[0] = LoRALinear(model[0], r=2, alpha=4)
    nn.init.normal_(model[0].lora_B)
    save_lora(model, tmp_path)
    other = two_linears()
    assert load_lora(other, tmp_path) == ["0"]
    torch.testing.assert_close(other(x), model(x))


def two_linears():
    """Layers named "0" and "2.0", which ends in "0"."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))


def test_an_adapter_for_other_layers_is_refused(tmp_path):
    save_lora(adapted(), tmp_path)
    with pytest.raises(ValueError, match="another base"):
        load_lora(nn.Sequential(nn.Linear(4, 4)), tmp_path)


# ---- what cannot be saved ------------------------------------------------------------------------

class Scaled(LoRALinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_an_adapter_of_a_subclass_is_not_saved_as_if_it_were_plain_lora(tmp_path):
    net = nn.Sequential(Scaled(nn.Linear(4, 4), r=2, alpha=4))
    with pytest.raises(ValueError, match="Scaled.* computes something else"):
        save_lora(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting, values", [
    ("use_rslora", (False, True)),
    ("dropout", (0.0, 0.1)),
])
def test_layers_that_differ_in_rslora_or_dropout_are_not_saved(tmp_path, setting, values):
    net = two_linears()
    apply_lora(net, target_modules=["2.0"], **{setting: values[0]})
    paths = {"0": settings_of(r=2, alpha=4) | {setting: values[1]}}
    adapt_layers(net, paths, known_classes())
    with pytest.raises(ValueError, match=setting):
        save_lora(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [dict(use_rslora=True), dict(dropout=0.25)])
def test_rslora_and_dropout_survive_the_file(tmp_path, settings):
    save_lora(adapted(**settings), tmp_path)
    other = make_gpt()
    load_lora(other, tmp_path)
    for layer in lora_layers(other).values():
        for name, value in settings.items():
            assert getattr(layer, name) == value
