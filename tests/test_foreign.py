"""Modules and files as they are in the world: what others make gives the right result here,
or is refused by name and left as it was.

The oracles are PEFT, transformers and tokenizers, and the base model itself with
W + scaling B A in the place of W.
"""
import copy
import io
import json
import os
import pickle
import time
from pathlib import Path

import accelerate
import peft
import pytest
import tokenizers
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers_lora import edit_config, fill_lora, snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from conftest import last_of_each, make_gpt
from data.bpe import EOT, train_bpe
from gpt import GPT
from lab.adapters import Adapters
from lab.models import load_model, save_model
from lab.tokenizer_files import load_tokenizer, save_tokenizer
from lora_minimal import (
    LoRALinear,
    apply_lora,
    find_lora_layers,
    load_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_lora,
    unmerge_lora,
)
from train import main

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).eval()


def adapt(net, targets=("0", "2"), **settings):
    apply_lora(net, target_modules=targets, **(dict(r=2, alpha=5) | settings))
    return fill_lora(net, std=0.3)


def adapted_net():
    return adapt(make_net())


def put_into_the_weights(plain, adapted):
    """Add every scaling B A of `adapted` to the weights of `plain`, which has no LoRA."""
    for path, layer in lora_layers(adapted).items():
        weight = plain.get_submodule(path).weight
        weight.data = weight.data + layer.delta_weight().detach()
    return plain


def refuses(call, model, says=""):
    """Check that a call raises ValueError in one line, and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before
    return str(caught.value)


def applied_or_refused(net, targets):
    """Whether LoRA was applied. If it was refused, the model must be unchanged."""
    before = snapshot(net)
    try:
        apply_lora(net, r=2, alpha=5, target_modules=targets)
    except ValueError as error:
        assert "\n" not in str(error)
        assert snapshot(net) == before
        return False
    return True


# ---- a layer that is more than its weight --------------------------------------------------------

def with_a_hook(net):
    add_hook_to_module(net[0], ModelHook())


def with_offloading(net):
    accelerate.cpu_offload(net, execution_device="cpu")


def with_a_device_map(net):
    accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("prepare", [with_a_hook, with_offloading, with_a_device_map])
def test_a_layer_with_a_hook_of_accelerate_is_refused(prepare):
    net = make_net()
    prepare(net)
    refuses(lambda: apply_lora(net, target_modules=["0"]), net, "forward of its own")


def test_a_hook_of_accelerate_on_the_whole_model_does_not_disturb():
    net = make_net()
    add_hook_to_module(net, ModelHook())
    adapt(net)
    expected = put_into_the_weights(make_net(), net)(X)
    torch.testing.assert_close(net(X), expected)


@pytest.mark.parametrize("compute", [
    lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
    lambda layer: old_weight_norm(layer, "bias", None),
], ids=["pruned", "weight_norm"])
def test_a_layer_whose_bias_is_computed_is_refused(compute):
    net = make_net()
    compute(net[0])
    refuses(lambda: apply_lora(net, target_modules=["0"]), net)


class Parent(nn.Module):
    """A layer that has something beside its weight, which its parent uses."""

    def __init__(self, name, value):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.name = name
        setattr(self.layer, name, value)

    def forward(self, x):
        value = getattr(self.layer, self.name)
        return value(self.layer(x)) if callable(value) else value * self.layer(x)


@pytest.mark.parametrize("name, value", [
    ("gain", 2.0),
    ("act", torch.tanh),
    ("gain", nn.Parameter(torch.full((8,), 2.0))),
    ("norm", nn.LayerNorm(8)),
], ids=["number", "function", "parameter", "module"])
def test_what_else_a_layer_holds_is_carried_over_or_refused(name, value):
    net = Parent(name, value)
    expected = net(X)
    keys = set(net.state_dict())
    if applied_or_refused(net, ["layer"]):
        assert torch.equal(net(X), expected)
        assert keys <= set(net.state_dict())
        remove_lora(net)
        assert set(net.state_dict()) == keys
        assert torch.equal(net(X), expected)


def test_a_hook_before_loading_is_called_with_the_layer_that_is_there():
    net = make_net()
    seen = []
    net[0].register_load_state_dict_pre_hook(lambda module, *rest: seen.append(module))
    apply_lora(net, target_modules=["0"])
    net.load_state_dict(net.state_dict())
    assert seen == [net[0]]


def replaced_forward(layer):
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)


@pytest.mark.parametrize("change", [
    lambda net: prune.l1_unstructured(net[0], "weight", amount=0.5),
    lambda net: old_weight_norm(net[0]),
    lambda net: old_spectral_norm(net[0]),
    lambda net: parametrizations.weight_norm(net[0]),
    lambda net: parametrizations.spectral_norm(net[0]),
    lambda net: accelerate.cpu_offload(net, execution_device="cpu"),
    lambda net: replaced_forward(net[0]),
], ids=["pruning", "old weight_norm", "old spectral_norm", "weight_norm", "spectral_norm",
        "offloading", "monkeypatch"])
def test_merging_is_right_or_refused_if_the_layer_was_changed_after_apply_lora(change):
    net = adapt(make_net(), ["0"])
    change(net)
    net.eval()
    expected = net(X).detach()
    try:
        merge_lora(net)
        torch.testing.assert_close(net(X).detach(), expected)
        remove_lora(net)
    except ValueError:
        pass
    torch.testing.assert_close(net(X).detach(), expected)


def test_a_layer_that_is_compiled_on_its_own_runs_its_adapter_or_is_refused():
    net = make_net()
    net[0] = torch.compile(net[0], backend="eager")
    before = net(X).detach()
    if applied_or_refused(net, ["_orig_mod"]):
        fill_lora(net, std=0.3)
        assert (net(X) - before).abs().max() > 1e-3


def test_a_compiled_model_follows_merging_switching_off_and_removal():
    torch._dynamo.reset()
    net = adapted_net()
    compiled = torch.compile(net, backend="eager")
    expected = compiled(X).detach()
    merge_lora(net)
    torch.testing.assert_close(compiled(X).detach(), expected)
    unmerge_lora(net)
    torch.testing.assert_close(compiled(X).detach(), expected)
    remove_lora(net)
    assert torch.equal(compiled(X), make_net()(X))


def test_a_decoder_layer_is_adapted_in_evaluation_too():
    batch = torch.randn(2, 5, 8)
    torch.manual_seed(0)
    plain = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    net = adapt(copy.deepcopy(plain), ["linear1", "linear2"])
    put_into_the_weights(plain, net)
    with torch.no_grad():
        torch.testing.assert_close(net(batch, batch), plain(batch, batch))


# ---- models of transformers ----------------------------------------------------------------------

SMALL = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=2)
TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))


def make_transformer(kind, **changes):
    """A small model of transformers: kind "Llama" -> LlamaForCausalLM, and so on."""
    heads = {"Bert": "ForMaskedLM", "Albert": "ForMaskedLM"}
    options = SMALL | changes
    if kind == "Albert":
        options["embedding_size"] = 8
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    head = options.pop("head", heads.get(kind, "ForCausalLM"))
    return getattr(transformers, f"{kind}{head}")(config).eval()


@pytest.mark.parametrize("kind, targets", [
    ("Llama", "all-linear"), ("Qwen2", "all-linear"), ("Bert", "all-linear"),
    ("Albert", "all-linear"), ("Mamba", ["in_proj", "x_proj"]), ("Mamba", ["dt_proj"]),
])
def test_a_model_of_transformers_is_adapted_or_refused(kind, targets):
    net = make_transformer(kind)
    if applied_or_refused(net, targets):
        fill_lora(net, std=10.0 if targets == ["dt_proj"] else 0.1)
        plain = put_into_the_weights(make_transformer(kind), net)
        with torch.no_grad():
            expected = plain(TOKENS).logits
            torch.testing.assert_close(net(TOKENS).logits, expected, atol=1e-4, rtol=0)
            merge_lora(net)
            torch.testing.assert_close(net(TOKENS).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, task, changes", [
    ("Llama", "CAUSAL_LM", {}),
    ("Llama", "CAUSAL_LM", {"tie_word_embeddings": True}),
    ("Bert", None, {}),
    ("Llama", "SEQ_CLS", {"head": "ForSequenceClassification"}),
    ("Bert", "SEQ_CLS", {"head": "ForSequenceClassification"}),
])
def test_all_linear_are_the_layers_that_peft_takes(kind, task, changes):
    config = peft.LoraConfig(target_modules="all-linear", task_type=task)
    theirs = peft.get_peft_model(make_transformer(kind, **changes), config)
    paths = set()
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            paths.add(name.removeprefix("base_model.model."))
    ours = make_transformer(kind, **changes)
    assert set(apply_lora(ours, target_modules="all-linear")) == paths


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.parametrize("wrap", [nn.DataParallel, Wrapper])
def test_all_linear_leaves_out_the_head_of_a_model_inside_another(wrap):
    net = wrap(make_transformer("Llama"))
    paths = apply_lora(net, target_modules="all-linear")
    assert not any("lm_head" in path for path in paths)


# ---- shapes, dtypes and transforms ---------------------------------------------------------------

@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float32,
                                        torch.float64])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_under_autocast_the_output_has_the_dtype_of_the_base(base_dtype, autocast):
    plain = make_net().to(base_dtype)
    net = make_net().to(base_dtype)
    apply_lora(net, target_modules=["0", "2"])
    with torch.autocast("cpu", autocast):
        expected = plain(X.to(base_dtype))
        output = net(X.to(base_dtype))
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_layer_without_inputs_or_outputs_is_what_it_was(shape):
    net = nn.Sequential(nn.Linear(*shape))
    x = torch.randn(3, shape[0])
    expected = net(x)
    apply_lora(net, r=2, target_modules=["0"])
    assert torch.equal(net(x), expected)
    net(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_converted_while_merged_can_be_unmerged(dtype):
    net = adapted_net()
    expected = net(X).detach()
    merge_lora(net)
    net.to(dtype)
    unmerge_lora(net)
    output = net(X.to(dtype)).detach()
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=0)
    assert torch.equal(net[0].weight.float(), make_net()[0].weight.to(dtype).float())


def test_a_state_dict_is_assigned_to_a_merged_model():
    source = adapted_net()
    net = adapt(make_net())
    merge_lora(net)
    net.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(net(X), source(X))
    assert [p.requires_grad for p in net[0].parameters()] == [False, False, True, True]


def test_a_model_on_meta_gets_its_tensors_by_assignment():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    apply_lora(net, r=2, alpha=5, target_modules=["0", "2"])
    source = adapted_net()
    net.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(net(X), source(X))


def test_an_adapter_without_data_is_not_saved(tmp_path):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 6))
    apply_lora(net, target_modules=["0"])
    refuses(lambda: save_lora(net, tmp_path), net, "meta")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_not_loaded_into_a_model_without_data(tmp_path):
    save_lora(adapted_net(), tmp_path)
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    refuses(lambda: load_lora(net, tmp_path), net, "meta")


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_survives_pickle_and_torch_save(merged):
    net = adapted_net()
    if merged:
        merge_lora(net)
    expected = net(X).detach()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert torch.equal(again(X).detach(), expected)
        remove_lora(again)


def test_a_lazy_layer_elsewhere_is_refused_or_left_as_it_was():
    net = nn.Sequential(nn.Linear(8, 4), nn.LazyLinear(4))
    try:
        apply_lora(net, target_modules=["0"])
    except ValueError:
        assert not find_lora_layers(net)
        assert all(p.requires_grad for p in net.parameters())


def test_a_lazy_layer_can_be_adapted_after_its_first_call():
    net = nn.Sequential(nn.LazyLinear(4))
    net(X)
    plain = copy.deepcopy(net)
    adapt(net, ["0"])
    put_into_the_weights(plain, net)
    torch.testing.assert_close(net(X), plain(X))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64,
                                   torch.float8_e5m2])
def test_a_weight_that_is_no_float_is_refused_by_its_dtype(dtype):
    net = make_net()
    net[0].weight = nn.Parameter(net[0].weight.data.to(dtype), requires_grad=False)
    refuses(lambda: apply_lora(net, target_modules=["0"]), net, str(dtype))


def test_a_quantized_layer_is_refused():
    net = torch.ao.quantization.quantize_dynamic(make_net(), {nn.Linear})
    with pytest.raises(ValueError, match="cannot be adapted"):
        apply_lora(net, target_modules=["0"])


def test_forward_mode_derivatives_are_those_of_the_definition():
    net = adapted_net()
    direction = torch.ones_like(X)
    with forward_ad.dual_level():
        output = net(forward_ad.make_dual(X, direction))
        tangent = forward_ad.unpack_dual(output).tangent
    _, expected = torch.func.jvp(net, (X,), (direction,))
    torch.testing.assert_close(tangent, expected)


def test_a_batch_of_gradients_is_each_of_them():
    net = adapted_net()
    x = X.clone().requires_grad_()
    y = net(x)
    directions = torch.randn(3, *y.shape)
    [batch] = torch.autograd.grad(y, [x], directions, is_grads_batched=True)
    for direction, gradient in zip(directions, batch):
        [expected] = torch.autograd.grad(net(x), [x], direction)
        torch.testing.assert_close(gradient, expected)


def test_an_ensemble_of_adapted_models_is_each_of_them():
    nets = [adapted_net() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)

    def call(parameters, buffers):
        return torch.func.functional_call(nets[0], (parameters, buffers), (X,))

    outputs = torch.vmap(call)(parameters, buffers)
    for net, output in zip(nets, outputs):
        torch.testing.assert_close(output, net(X))


def test_an_adapted_model_is_exported_for_any_number_of_rows():
    net = adapted_net()
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(net, (X,), dynamic_shapes=({0: rows},))
    more = torch.randn(20, 8)
    torch.testing.assert_close(exported.module()(more), net(more))


def test_sequences_of_different_lengths_in_one_nested_tensor_are_each_of_them():
    net = adapted_net()
    parts = [torch.randn(3, 8), torch.randn(2, 8)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for output, part in zip(net(nested).unbind(), parts):
        torch.testing.assert_close(output, net(part))


def test_a_sparse_input_is_its_dense_form():
    net = adapt(make_net(), ["0"])
    torch.testing.assert_close(net(X.to_sparse()), net(X))


# ---- arguments, and several calls ----------------------------------------------------------------

def test_a_model_that_is_a_single_layer_is_adapted_or_refused():
    net = nn.Linear(8, 4)
    expected = net(X)
    if applied_or_refused(net, "all-linear"):
        assert torch.equal(net(X), expected)


@pytest.mark.parametrize("targets", [None, 5, [1], [None], [b"0"], ".0", "0.", "*", "0|2"])
def test_targets_that_are_no_names_are_refused(targets):
    net = make_net()
    refuses(lambda: apply_lora(net, target_modules=targets), net)


@pytest.mark.parametrize("alpha", [1e39, 1e308, 10**300], ids=["1e39", "1e308", "integer"])
def test_an_alpha_that_float32_cannot_hold_is_refused(alpha):
    net = make_net()
    refuses(lambda: apply_lora(net, r=1, alpha=alpha, target_modules=["0"]), net, "alpha")


@pytest.mark.parametrize("r", [2**63, 10**30])
def test_a_rank_that_is_no_size_is_refused(r):
    net = make_net()
    refuses(lambda: apply_lora(net, r=r, target_modules=["0", "2"]), net)


def test_a_rank_that_memory_cannot_hold_changes_nothing():
    net = make_net()
    before = snapshot(net)
    with pytest.raises((ValueError, RuntimeError)):
        apply_lora(net, r=10**15, target_modules=["0", "2"])
    assert snapshot(net) == before


class Picky(LoRALinear):
    """A variant that refuses small layers."""

    def __init__(self, base, **settings):
        if base.in_features < 8:
            raise ValueError("too small")
        super().__init__(base, **settings)


def test_a_variant_that_refuses_one_layer_leaves_all_of_them():
    net = make_net()

    def call():
        apply_lora(net, target_modules=["0", "2"], layers={nn.Linear: Picky})

    refuses(call, net, "too small")


def test_layers_adapted_beside_an_adapters_object_are_not_forgotten():
    net = adapt(make_net(), ["0"])
    adapters = Adapters(net)
    apply_lora(net, target_modules=["2"])
    fill_lora(net)
    expected = net(X).detach()
    adapters.use(None)
    adapters.use("default")
    assert torch.equal(net(X), expected)


def test_an_adapter_of_removed_layers_cannot_be_used():
    net = adapted_net()
    adapters = Adapters(net)
    adapters.use(None)
    remove_lora(net)
    with pytest.raises(ValueError, match="remove_lora"):
        adapters.use("default")


@pytest.mark.parametrize("name", [None, 1, ("a",)])
def test_a_name_that_is_no_text_is_refused(name):
    net = adapted_net()
    adapters = Adapters(net)
    expected = net(X).detach()
    refuses(lambda: adapters.add(name, target_modules=["0"]), net, "name")
    assert torch.equal(net(X), expected)


def test_an_adapter_not_in_use_fits_a_model_that_was_converted():
    net = adapted_net()
    adapters = Adapters(net)
    expected = net(X).detach()
    adapters.use(None)
    net.half()
    adapters.use("default")
    torch.testing.assert_close(net(X.half()).float(), expected, atol=2e-2, rtol=0)


def test_generating_leaves_every_part_of_the_model_in_its_mode():
    model = make_gpt().train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 2)
    assert [module.training for module in model.modules()] == before


# ---- saving --------------------------------------------------------------------------------------

def check_round_trip(net, dir):
    """Check that what is saved is what `net` computes, for us and for PEFT; or refused."""
    expected = net(X).detach().cpu()            # DataParallel moves itself to a GPU
    try:
        save_lora(net, dir)
    except ValueError:
        assert list(dir.iterdir()) == []
        return
    ours = make_net()
    load_lora(ours, dir)
    torch.testing.assert_close(ours(X), expected)
    theirs = peft.PeftModel.from_pretrained(make_net(), dir)
    torch.testing.assert_close(theirs(X), expected)


def with_checkpointed_layer(net):
    net[0] = checkpoint_wrapper(net[0])
    return net


def compiled_part(net):
    net[2] = torch.compile(net[2], backend="eager")
    return net


@pytest.mark.parametrize("wrap", [
    with_checkpointed_layer, AveragedModel, nn.DataParallel, compiled_part,
    lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
], ids=["checkpoint_wrapper", "AveragedModel", "DataParallel", "compiled part", "two wrappers"])
def test_names_that_a_wrapper_adds_are_not_saved(tmp_path, wrap):
    check_round_trip(wrap(adapted_net()), tmp_path)


def test_a_scaling_set_by_hand_is_saved_or_refused(tmp_path):
    net = adapted_net()
    net[0].scaling = 7.0
    check_round_trip(net, tmp_path)


def test_the_base_may_be_given_as_a_path(tmp_path):
    save_lora(adapted_net(), tmp_path, Path("out") / "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == os.path.join("out", "base")


@pytest.mark.parametrize("base", [object(), "a\ud800b"], ids=["object", "surrogate"])
def test_a_base_that_cannot_be_written_leaves_the_adapter_of_before(tmp_path, base):
    save_lora(adapted_net(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    try:
        save_lora(adapted_net(), tmp_path, base)
    except (ValueError, TypeError):
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_inside_distributed_data_parallel_is_refused(tmp_path):
    """It has listed the parameters whose gradients it averages, and A and B are not among them."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(make_net())
        refuses(lambda: apply_lora(net, target_modules=["0"]), net, "DistributedDataParallel")
    finally:
        torch.distributed.destroy_process_group()


# ---- adapters of other programs ------------------------------------------------------------------

@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The directory of an adapter for make_net()."""
    dir = tmp_path_factory.mktemp("foreign") / "adapter"
    save_lora(adapted_net(), dir)
    return dir


def copied(dir, tmp_path):
    new = tmp_path / "copy"
    new.mkdir()
    for path in dir.iterdir():
        if path.is_file():
            (new / path.name).write_bytes(path.read_bytes())
    return new


@pytest.mark.parametrize("config", [
    peft.AdaLoraConfig(target_modules=["c_attn"], total_step=10),
    peft.VeraConfig(target_modules=["c_attn"]),
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[]),
], ids=lambda config: config.peft_type.value)
def test_the_refusal_of_another_kind_of_adapter_names_it(tmp_path, config):
    make_gpt().save_pretrained(tmp_path / "base")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "adapter")
    model = make_gpt()
    refuses(lambda: load_lora(model, tmp_path / "adapter"), model, config.peft_type.value)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "(?R)"], ids=["deep", "recursive"])
def test_a_pattern_that_exhausts_the_stack_is_refused(tmp_path, adapter, key, pattern):
    dir = copied(adapter, tmp_path)
    edit_config(dir, **{key: {pattern: 2}})
    net = make_net()
    refuses(lambda: load_lora(net, dir), net, "pattern")


def test_thousands_of_patterns_are_read_or_refused_in_seconds(tmp_path, adapter):
    dir = copied(adapter, tmp_path)
    edit_config(dir, alpha_pattern={f"x{i}y+z": 5 for i in range(20_000)})
    start = time.monotonic()
    try:
        load_lora(make_net(), dir)
    except ValueError as error:
        assert "pattern" in str(error)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("alpha", [1e39, 1e308])
def test_a_file_with_an_alpha_that_float32_cannot_hold_is_refused(tmp_path, adapter, alpha):
    dir = copied(adapter, tmp_path)
    edit_config(dir, lora_alpha=alpha)
    net = make_net()
    refuses(lambda: load_lora(net, dir), net, "alpha")


def special_file(path, kind):
    """Replace `path` by something that is no regular file."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else kind)


SPECIAL = ["fifo", "directory", "loop", "/dev/zero", "/dev/null", "/dev/full"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_file_that_is_no_regular_file_is_refused(tmp_path, adapter, kind, name):
    dir = copied(adapter, tmp_path)
    special_file(dir / name, kind)
    net = make_net()
    before = snapshot(net)
    with pytest.raises((OSError, ValueError), match=name):
        load_lora(net, dir)
    assert snapshot(net) == before


FIRST = "base_model.model.0.lora_A.weight"


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2**63, 1], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
    {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
    {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]},
    {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
])
def test_a_tensor_of_an_impossible_size_or_type_is_refused(tmp_path, adapter, entry):
    header = json.dumps({FIRST: entry}).encode()
    dir = copied(adapter, tmp_path)
    data = bytes(entry["data_offsets"][1])
    content = len(header).to_bytes(8, "little") + header + data
    (dir / "adapter_model.safetensors").write_bytes(content)
    net = make_net()
    refuses(lambda: load_lora(net, dir), net, "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool,
                                   torch.complex64])
def test_an_adapter_of_another_dtype_is_refused_by_name(tmp_path, adapter, dtype):
    dir = copied(adapter, tmp_path)
    path = dir / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    net = make_net()
    refuses(lambda: load_lora(net, dir), net, str(dtype))


# ---- models of other programs --------------------------------------------------------------------

TEXT = "the old pirate sailed the sea, and the old sea sang of gold. " * 50
ENCODING = train_bpe(TEXT, 280)


def make_base(dir):
    """A model directory whose vocabulary is padded: 280 entries, 288 rows."""
    model = make_gpt(vocab_size=288, n_layer=1, n_embd=16, n_head=2, block_size=16)
    save_model(model, ENCODING, dir)
    return dir


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


def edit_weights(dir, change):
    """Change model.safetensors: change({name: tensor}) returns the new ones."""
    path = dir / "model.safetensors"
    tensors = {name: p.contiguous() for name, p in change(load_file(path)).items()}
    save_file(tensors, path)


def logits_of_both(dir):
    idx = torch.arange(7)[None]
    theirs = GPT2LMHeadModel.from_pretrained(dir, dtype=torch.float32).eval()
    ours = GPT.from_pretrained(dir).eval()
    return ours(idx)[0], theirs(idx).logits


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16,
                                   torch.float64])
def test_weights_of_any_float_type_are_read_as_transformers_does(base, dtype):
    edit_weights(base, lambda state: {name: p.to(dtype) for name, p in state.items()})
    ours, theirs = logits_of_both(base)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused_by_their_dtype(base, dtype):
    edit_weights(base, lambda state: {name: p.to(dtype) for name, p in state.items()})
    with pytest.raises(ValueError, match=str(dtype)):
        GPT.from_pretrained(base)


def renamed_embedding(state):
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    return state


def test_a_tied_weight_saved_as_the_head_alone_is_read(base):
    edit_weights(base, renamed_embedding)
    ours, theirs = logits_of_both(base)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_tensor_under_two_names_is_refused(base):
    def doubled(state):
        return state | {"wte.weight": state["transformer.wte.weight"] + 1}

    edit_weights(base, doubled)
    with pytest.raises(ValueError, match="wte.weight"):
        GPT.from_pretrained(base)


@pytest.mark.parametrize("name", ["\ud800", "a\0b", ".", "..", "../x", "/dev/zero", "", "x" * 5000,
                                  "config.json", 1, None, [1]], ids=repr)
def test_an_index_with_an_impossible_file_name_is_refused(base, name):
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"a": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((OSError, ValueError)) as caught:
        GPT.from_pretrained(base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_file_that_is_no_regular_file_is_refused(base, kind, name):
    special_file(base / name, kind)
    with pytest.raises((OSError, ValueError), match=name):
        load_model(base, "cpu")


@pytest.mark.parametrize("changes", [
    dict(n_layer=2**31 - 1), dict(n_layer=1000), dict(vocab_size=2**31 - 1),
    dict(n_embd=10**400), dict(n_embd=2**30, n_head=1, vocab_size=2**31 - 1),
    dict(n_layer=True), dict(n_embd=16.0), dict(n_head=[2]), dict(n_embd=None),
], ids=str)
def test_a_config_with_an_impossible_size_is_refused_quickly(base, changes):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    start = time.monotonic()
    with pytest.raises(ValueError, match="config.json|cannot exist"):
        GPT.from_pretrained(base)
    assert time.monotonic() - start < 5


# ---- the token that ends a text ------------------------------------------------------------------

def end_tokens(dir):
    config = json.loads((dir / "config.json").read_text())
    return config["bos_token_id"], config["eos_token_id"]


def set_config(dir, **changes):
    path = dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_that_is_read_and_written_keeps_its_end_of_text(base, tmp_path):
    GPT.from_pretrained(base).save_pretrained(tmp_path / "again")
    assert end_tokens(tmp_path / "again") == (ENCODING.eot_token, ENCODING.eot_token)


@pytest.mark.parametrize("tokens", [(7, 279), (279, [279, 5])])
def test_a_merged_model_keeps_the_end_of_text_of_its_base(base, tmp_path, tokens):
    set_config(base, bos_token_id=tokens[0], eos_token_id=tokens[1])
    model = GPT.from_pretrained(base)
    apply_lora(model, r=2, target_modules=["c_attn"])
    save_lora(model, tmp_path / "adapter")
    run("merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert end_tokens(tmp_path / "out") == (tokens[0], tokens[1])


# ---- tokenizers of other programs ----------------------------------------------------------------

SAMPLES = ["the old pirate's ship, 12 3!  \n\n x", "ünï 🏴 \x00\t", f"a{EOT}b", "  lead",
           "ﬁ ① HELLO", "a\r\nb\u3000c", "１２３ ²", "<pirate> x"]


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(ENCODING, tmp_path)
    return tmp_path


def edit_json(path, change):
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def check_ids(ours, theirs):
    for text in SAMPLES:
        assert ours.encode(text, allowed_special="all") == theirs(text), text


def ids_of_tokenizers(dir):
    theirs = tokenizers.Tokenizer.from_file(str(dir / "tokenizer.json"))
    return lambda text: theirs.encode(text).ids


def ids_of_transformers(dir):
    theirs = AutoTokenizer.from_pretrained(dir)
    return lambda text: theirs(text)["input_ids"]


def set_in(*keys, value):
    """A change of one entry, for edit_json."""
    def change(raw):
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value
    return change


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
ADDED = {"id": 280, "content": "<pirate>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": False}


@pytest.mark.parametrize("change", [
    set_in("pre_tokenizer", "use_regex", value=False),
    set_in("pre_tokenizer", value={"type": "Whitespace"}),
    set_in("pre_tokenizer", value={"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}),
    set_in("pre_tokenizer", value=None),
    set_in("normalizer", value={"type": "NFKC"}),
    set_in("normalizer", value={"type": "Lowercase"}),
    set_in("model", "dropout", value=0.5),
    set_in("model", "byte_fallback", value=True),
    set_in("model", "ignore_merges", value=True),
    set_in("model", "end_of_word_suffix", value="</w>"),
    lambda raw: raw["added_tokens"].append(ADDED),
    lambda raw: raw["model"]["merges"].reverse(),
    lambda raw: raw["model"]["merges"].pop(),
    lambda raw: raw["model"]["merges"].clear(),
    lambda raw: raw["model"]["merges"].insert(0, raw["model"]["merges"][-1]),
])
def test_a_tokenizer_that_would_be_misread_is_refused(tokenizer, change):
    edit_json(tokenizer / "tokenizer.json", change)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tokenizer)


def rename_bytes(raw):
    """Exchange the numbers of a byte and of a merged token."""
    vocab = raw["model"]["vocab"]
    merged = next(text for text, rank in vocab.items() if rank == 256)
    vocab["A"], vocab[merged] = 256, vocab["A"]


@pytest.mark.parametrize("change", [
    set_in("pre_tokenizer", value={"type": "ByteLevel", "add_prefix_space": False,
                                   "trim_offsets": True}),
    set_in("post_processor", value=BYTE_LEVEL),
    set_in("model", "dropout", value=0.0),
    set_in("model", "end_of_word_suffix", value=""),
    rename_bytes,
], ids=["no use_regex", "post-processor", "dropout 0", "empty suffix", "other numbers"])
def test_a_tokenizer_written_a_little_differently_is_read_right(tokenizer, change):
    edit_json(tokenizer / "tokenizer.json", change)
    check_ids(load_tokenizer(tokenizer), ids_of_tokenizers(tokenizer))


def test_a_tokenizer_that_transformers_has_saved_again_is_read(tokenizer, tmp_path):
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "again")
    check_ids(load_tokenizer(tmp_path / "again"), ids_of_transformers(tmp_path / "again"))


def with_a_gap(raw):
    raw["model"]["vocab"][EOT] = 285
    raw["added_tokens"][0]["id"] = 285


def test_an_end_of_text_behind_a_gap_is_read_right_or_refused(tokenizer):
    edit_json(tokenizer / "tokenizer.json", with_a_gap)
    check_read_right_or_refused(tokenizer, ids_of_tokenizers(tokenizer))


def check_read_right_or_refused(tokenizer, theirs):
    """Check that a tokenizer is not loaded, or gives the ids that others give."""
    try:
        ours = load_tokenizer(tokenizer)
    except ValueError:
        return
    check_ids(ours, theirs)


@pytest.mark.parametrize("name, content", [
    ("tokenizer_config.json", {"added_tokens_decoder": {"280": ADDED}}),
    ("tokenizer_config.json", {"pad_token": "<pirate>"}),
    ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    ("added_tokens.json", {"<pirate>": 280}),
])
def test_what_the_files_beside_a_tokenizer_ask_for_is_honored_or_refused(tokenizer, name, content):
    path = tokenizer / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | content))
    check_read_right_or_refused(tokenizer, ids_of_transformers(tokenizer))


# ---- directories that hold something else --------------------------------------------------------

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a base, two texts and an adapter."""
    home = tmp_path_factory.mktemp("home")
    make_base(home / "base")
    (home / "text.txt").write_text(TEXT)
    (home / "other.txt").write_text("A dark and silent city; he lit one more match! " * 60)
    assert run(*tune(home, home / "adapter", "--lr", "0.1")) == 0
    return home


def run(*argv):
    return main(last_of_each(argv))


TINY = ["--steps", "1", "--batch-size", "1", "--block-size", "8", "--device", "cpu",
        "--eval-every", "1"]


def tune(home, out, *flags):
    data = home / "text.txt"
    return ["tune", "--base", home / "base", "--data", data, "--out", out, *TINY, *flags]


def merge(home, out, *flags):
    return ["merge", "--base", home / "base", "--adapter", home / "adapter", "--out", out, *flags]


@pytest.mark.parametrize("command", [tune, merge])
@pytest.mark.parametrize("name", [
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json",
    "model-00001-of-00002.safetensors", "adapter_model.bin", "adapter_config.json",
    "config.json", "tokenizer.json", "tokenizer_config.json", "model.gguf", "tf_model.h5",
    "checkpoint.safetensors",
])
def test_a_directory_of_others_is_refused_and_kept(home, tmp_path, capsys, command, name):
    path = tmp_path / name
    path.write_text("{}")
    assert run(*command(home, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "--fresh" in error
    assert error.count("\n") == 1
    assert path.read_text() == "{}"


def test_a_directory_that_is_refused_gets_nothing_but_the_lock(home, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert run(*tune(home, tmp_path)) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", ".lock"}


@pytest.mark.parametrize("name, content", [
    ("generation_config.json", {"eos_token_id": 5}),
    ("added_tokens.json", {"pirate": 5}),
])
@pytest.mark.parametrize("flags", [[], ["--fresh"]], ids=["alone", "fresh"])
def test_a_file_of_others_that_transformers_would_obey_does_not_stay_beside_a_new_model(
    home, tmp_path, name, content, flags
):
    (tmp_path / name).write_text(json.dumps(content))
    if run(*tune(home, tmp_path, "--method", "full", *flags)) != 0:
        assert json.loads((tmp_path / name).read_text()) == content
        return
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == ENCODING.eot_token
    check_ids(load_tokenizer(tmp_path), ids_of_transformers(tmp_path))


def full(home, out, *flags):
    return tune(home, out, "--method", "full", *flags)


@pytest.mark.parametrize("command", [merge, full])
def test_a_model_that_replaces_an_adapter_is_read_by_transformers_without_it(
    home, tmp_path, command
):
    assert run(*tune(home, tmp_path, "--seed", "5", "--lr", "0.1")) == 0
    assert run(*command(home, tmp_path, "--fresh")) == 0
    idx = torch.arange(7)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = GPT.from_pretrained(tmp_path).eval()(idx)[0]
    torch.testing.assert_close(theirs(idx).logits, expected, atol=1e-4, rtol=0)


class Killed(BaseException):
    pass


def kill_at(monkeypatch, n):
    """Let the n-th replacement of a file kill the process, before it happens."""
    replace = os.replace
    calls = []

    def replace_or_die(*args):
        calls.append(args)
        if len(calls) == n:
            raise Killed
        replace(*args)

    monkeypatch.setattr(os, "replace", replace_or_die)


def what_is_read(read):
    try:
        return read()
    except (OSError, ValueError):
        return "refused"


def read_adapter_values(home, dir):
    model = GPT.from_pretrained(home / "base")
    load_lora(model, dir)
    layers = lora_layers(model).values()
    tensors = [p.flatten().tolist() for p in lora_parameters(model)]
    return [layer.scaling for layer in layers], tensors


@pytest.mark.parametrize("n", range(1, 6))
def test_an_adapter_replaced_by_a_killed_run_is_the_old_the_new_or_refused(
    home, tmp_path, monkeypatch, n
):
    first = tune(home, tmp_path / "out", "--lr", "0.1")
    second = ["--lr", "0.1", "--alpha", "99", "--seed", "3", "--fresh"]
    assert run(*first) == 0
    old = read_adapter_values(home, tmp_path / "out")
    assert run(*tune(home, tmp_path / "new", *second)) == 0
    new = read_adapter_values(home, tmp_path / "new")
    with monkeypatch.context() as patched:
        kill_at(patched, n)
        try:
            run(*tune(home, tmp_path / "out", *second))
        except Killed:
            pass
    found = what_is_read(lambda: read_adapter_values(home, tmp_path / "out"))
    assert found in (old, new, "refused")


def write_model_for(text, seed, dir):
    encoding = train_bpe(text, 270)
    model = make_gpt(seed, vocab_size=encoding.n_vocab, n_layer=1, n_embd=16, n_head=2)
    save_model(model, encoding, dir)


def read_model_values(dir):
    model, encoding, _ = load_model(dir, "cpu")
    return model.lm_head.weight.flatten().tolist(), encoding.encode(TEXT[:100])


@pytest.mark.parametrize("n", range(1, 6))
def test_a_model_replaced_by_a_killed_run_never_gets_the_tokenizer_of_another(
    home, tmp_path, monkeypatch, n
):
    other = (home / "other.txt").read_text()
    write_model_for(TEXT, 0, tmp_path / "out")
    old = read_model_values(tmp_path / "out")
    write_model_for(other, 1, tmp_path / "new")
    new = read_model_values(tmp_path / "new")
    with monkeypatch.context() as patched:
        kill_at(patched, n)
        try:
            write_model_for(other, 1, tmp_path / "out")
        except Killed:
            pass
    found = what_is_read(lambda: read_model_values(tmp_path / "out"))
    assert found in (old, new, "refused")
