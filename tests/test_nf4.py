"""A frozen weight in four bits: beside bitsandbytes, and beside the float weight it stands for."""
import copy

import pytest
import torch
from helpers_lora import TARGETS, fill_lora, train_steps, transformers_gpt2
from torch import nn

from conftest import make_gpt
from lab.adapters import Adapters
from lab.gpt2_files import read_model
from lab.measure import LiveBytes, bytes_of, measure_memory
from lab.nf4 import (
    GROUP,
    LAYERS,
    NF4_LEVELS,
    SCALE_LEVELS,
    LoRANF4Linear,
    NF4Linear,
    decode,
    decode_scales,
    dequantize,
    encode,
    encode_scales,
    parameter_count,
    quantize,
    quantize_linears,
)
from lab.predict import predict_memory
from lab.settings import Settings
from lora_minimal import (
    LoRALinear,
    apply_lora,
    disable_lora,
    find_lora_layers,
    load_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_lora,
)
from train import Step

bnb = pytest.importorskip("bitsandbytes.functional", reason="no bitsandbytes on this machine")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outlier():
    W = normal(100, 64)
    W[3, 5] = 1000.0
    return W


WEIGHTS = {
    "one block": normal(64),
    "rows of blocks": normal(128, 192),
    "blocks across rows": normal(1600, 48),
    "odd": normal(500, 333),
    "less than a block": normal(3, 7),
    "one number": normal(1),
    "one more than a block": normal(65),
    "zeros": torch.zeros(130),
    "one value": torch.full((128,), -0.37),
    "a block of zeros": torch.cat([torch.zeros(64), normal(64)]),
    "huge": 1e38 * normal(200).clamp(-2, 2),
    "tiny": 1e-30 * normal(200),
    "an outlier": with_outlier(),
    "uniform": torch.linspace(-1, 1, 4096),
}
each_weight = pytest.mark.parametrize("W", WEIGHTS.values(), ids=WEIGHTS.keys())


# ---- beside bitsandbytes -------------------------------------------------------------------------

def test_the_levels_are_those_of_bitsandbytes():
    assert torch.equal(NF4_LEVELS, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(SCALE_LEVELS, bnb.create_dynamic_map())


@each_weight
def test_codes_scales_and_values_are_those_of_bitsandbytes(W):
    codes, scales = encode(W)
    theirs, state = bnb.quantize_4bit(W.flatten(), blocksize=64, quant_type="nf4")
    assert torch.equal(codes[:len(theirs)], theirs.flatten()), "we fill up the last block"
    # Of an incomplete block of zeros they say 1e-38.
    torch.testing.assert_close(scales, state.absmax, rtol=0, atol=2e-38)
    # As one row: their kernel for the CPU gets blocks wrong that go on in the next row.
    with torch.compiler.set_stance("force_eager"):      # they compile odd sizes
        values = bnb.dequantize_4bit(theirs, state).flatten()
    ours = decode(codes, scales, W.shape, torch.float32)
    torch.testing.assert_close(ours.flatten(), values, rtol=0, atol=2e-38)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "huge"])
def test_double_quantization_is_within_one_level_of_bitsandbytes(name):
    W = WEIGHTS[name]
    _, scales = encode(W)
    _, state = bnb.quantize_4bit(
        W.flatten(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    mean, largest, codes = encode_scales(scales)
    torch.testing.assert_close(mean[0], state.offset, rtol=1e-6, atol=2e-38)
    torch.testing.assert_close(largest, state.state2.absmax, rtol=1e-6, atol=2e-38)
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    ours = decode_scales(mean, largest, codes)[:len(scales)]
    gap = SCALE_LEVELS.diff().max() * largest.repeat_interleave(GROUP)[:len(scales)]
    rounding = 1e-6 * scales + 2e-38
    assert ((ours - theirs).abs() <= gap + rounding).all()
    nearer = (ours - scales).abs() <= (theirs - scales).abs() + rounding
    assert nearer.all(), "where we differ, we are nearer"


# ---- quantize and dequantize ---------------------------------------------------------------------

def test_it_takes_0_516_bytes_a_number():
    n = 64 * 256 * 100
    assert len(quantize(normal(n))) / n == pytest.approx(1/2 + 1/64 + 4/(64*256), abs=1e-4)


@each_weight
def test_zeros_stay_exactly_zero_and_a_second_time_changes_nothing(W):
    codes, scales = encode(W)
    values = decode(codes, scales, W.shape, torch.float32)
    assert (values[W == 0] == 0).all()
    again = decode(*encode(values), W.shape, torch.float32)
    assert torch.equal(again, values)


def test_each_number_is_moved_by_at_most_half_the_widest_gap_of_its_block():
    W = normal(256, 256)
    values = dequantize(quantize(W), W.shape, torch.float32)
    scales = W.view(-1, 64).abs().amax(dim=1, keepdim=True)
    half_gap = NF4_LEVELS.diff().max() / 2
    error_of_scales = 0.02          # of the largest distance from the mean, which is below 3
    assert ((values - W).view(-1, 64).abs() <= half_gap * scales + 3 * error_of_scales).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_the_float32_values_rounded(dtype):
    packed = quantize(normal(100, 70))
    exact = dequantize(packed, (100, 70), torch.float32)
    rounded = dequantize(packed, (100, 70), dtype)
    assert rounded.dtype == dtype
    # The level, the scale and their product are each rounded.
    torch.testing.assert_close(
        rounded.double(), exact.double(), rtol=1.6 * torch.finfo(dtype).eps, atol=1e-7
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    W = normal(64, 64)
    W[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(W)


# ---- the layers ----------------------------------------------------------------------------------

def pair(targets=TARGETS, **changes):
    """A GPT in NF4, and a float one that holds the dequantized values. Both have the same LoRA."""
    nf4 = make_gpt(std=0.05, **changes)
    quantize_linears(nf4)
    plain = make_gpt(std=0.05, **changes)
    for path, layer in nf4.named_modules():
        if isinstance(layer, NF4Linear):
            plain.get_submodule(path).weight.data = layer.dequantize()
    for model in (nf4, plain):
        apply_lora(model, r=4, target_modules=targets, layers=LAYERS)
        torch.manual_seed(1)
        fill_lora(model)
    return nf4, plain


def loss_and_gradients(model, idx):
    _, loss = model(idx, idx)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", [TARGETS, ["c_fc"]], ids=["all", "some"])
@pytest.mark.parametrize("fast", [True, False])
def test_loss_and_gradients_are_those_of_a_float_base_with_these_values(
    idx, recompute, targets, fast
):
    nf4, plain = pair(targets)
    for layer in find_lora_layers(nf4).values():
        layer.fast = fast
    nf4.recompute = recompute
    nf4.train()
    loss, gradients = loss_and_gradients(nf4, idx)
    expected_loss, expected = loss_and_gradients(plain, idx)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    kept = [module for module in nf4.modules() if getattr(module, "kept", None) is not None]
    assert not kept, "no weight is kept after the backward pass"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_in_16_bits_it_is_near_the_float_result(idx, dtype):
    nf4, plain = pair()
    expected, _ = plain(idx)
    with torch.autocast("cpu", dtype=dtype):
        autocast, _ = nf4(idx)
    low, _ = nf4.to(dtype)(idx)
    assert low.dtype == dtype
    for result in (autocast, low):
        assert (result.float() - expected).norm() < 0.02 * expected.norm()


def test_no_dequantized_weight_is_kept_for_the_backward_pass(idx):
    layer = NF4Linear.of(nn.Linear(512, 512))
    net = nn.Sequential(layer, nn.Linear(512, 2))
    apply_lora(net, r=2, target_modules=["0"], layers=LAYERS)
    x = normal(8, 512).requires_grad_()
    with LiveBytes(net.parameters()) as live:
        before = live.now
        y = net[0](x)
        assert live.now - before < 0.1 * 512 * 512 * 4
        y.sum().backward()
    assert live.peak > 512 * 512 * 4, "it exists for the time of a product"


def test_layers_without_bias_and_with_an_adapters_dropout_train(idx):
    model = make_gpt(bias=False)
    quantize_linears(model)
    apply_lora(model, r=2, dropout=0.5, layers=LAYERS)
    model.train()
    before = [p.clone() for p in lora_parameters(model)]
    train_steps(model, idx, 2)
    assert all(not torch.equal(a, b) for a, b in zip(before, lora_parameters(model)))


def test_the_base_does_not_train_and_its_bytes_stay(idx):
    model = make_gpt()
    quantize_linears(model)
    apply_lora(model, layers=LAYERS)
    before = {name: p.clone() for name, p in model.named_parameters() if ".lora_" not in name}
    train_steps(model, idx, 3)
    for name, p in model.named_parameters():
        if name in before:
            assert torch.equal(p, before[name])


def test_only_layers_with_a_weight_of_their_own_are_quantized(model):
    shapes = {path: tuple(m.weight.shape) for path, m in model.named_modules()
              if isinstance(m, nn.Linear)}
    n = sum(p.numel() for p in model.parameters())
    paths = quantize_linears(model)
    assert set(paths) == shapes.keys() - {"lm_head"}
    assert type(model.lm_head) is nn.Linear
    assert parameter_count(model) == n


def test_the_conv1d_of_transformers_is_quantized_and_adapted(tmp_path, idx):
    theirs = transformers_gpt2(tmp_path)
    ours = make_gpt()
    quantize_linears(theirs)
    quantize_linears(ours)
    apply_lora(theirs, layers=LAYERS)
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], atol=1e-4, rtol=0)


def test_converting_the_model_to_16_bits_leaves_the_bytes(model):
    quantize_linears(model)
    path = "transformer.h.0.mlp.c_fc"
    before = model.get_submodule(path).weight.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.get_submodule(path).weight, before)
    assert model.get_submodule(path).bias.dtype == torch.bfloat16


# ---- LoRA on it ----------------------------------------------------------------------------------

def test_an_adapter_is_pefts_and_fits_the_float_base(tmp_path, idx):
    nf4, plain = pair()
    save_lora(nf4, tmp_path)
    fresh = make_gpt()
    load_lora(fresh, tmp_path)
    assert all(type(layer) is LoRALinear for layer in find_lora_layers(fresh).values())
    own = lora_state_dict(nf4)
    for name, tensor in lora_state_dict(fresh).items():
        assert torch.equal(tensor, own[name])
    base = make_gpt(std=0.05)
    quantize_linears(base)
    load_lora(base, tmp_path)
    assert torch.equal(base(idx)[0], nf4(idx)[0])


def test_several_adapters_share_a_base_in_four_bits(idx):
    model = make_gpt()
    quantize_linears(model)
    adapters = Adapters(model)
    alone = {None: model(idx[:1])[0]}
    for name in ("a", "b"):
        adapters.add(name, r=2)
        fill_lora(model)
        alone[name] = model(idx[:1])[0]
    rows = [None, "a", "b"]
    adapters.use(rows)
    together, _ = model(idx[:1].expand(3, -1))
    for row, name in zip(together, rows):
        torch.testing.assert_close(row, alone[name][0], atol=1e-5, rtol=0)


def test_switched_off_or_removed_it_is_the_base(idx):
    nf4, _ = pair()
    base = make_gpt(std=0.05)
    quantize_linears(base)
    expected, _ = base(idx)
    with disable_lora(nf4):
        assert torch.equal(nf4(idx)[0], expected)
    remove_lora(nf4)
    assert torch.equal(nf4(idx)[0], expected)


def test_merging_is_refused_and_changes_nothing(idx):
    nf4, _ = pair()
    expected, _ = nf4(idx)
    with pytest.raises(ValueError, match="cannot hold the sum"):
        merge_lora(nf4)
    assert torch.equal(nf4(idx)[0], expected)
    assert all(type(layer) is LoRANF4Linear for layer in find_lora_layers(nf4).values())


def test_a_state_dict_and_a_copy_hold_the_same_bytes(idx):
    nf4, _ = pair()
    other, _ = pair()
    other.load_state_dict(nf4.state_dict())
    for each in (other, copy.deepcopy(nf4)):
        assert torch.equal(each(idx)[0], nf4(idx)[0])


def test_bytes_that_change_between_forward_and_backward_raise(idx):
    nf4, _ = pair()
    _, loss = nf4(idx, idx)
    nf4.load_state_dict(nf4.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- loading, and the ledger ---------------------------------------------------------------------

def test_reading_in_four_bits_is_reading_and_then_quantizing(tmp_path, idx):
    make_gpt().save_pretrained(tmp_path)
    expected = make_gpt()
    quantize_linears(expected)
    model = read_model(type(expected), tmp_path, nf4=True).eval()
    assert torch.equal(model(idx)[0], expected(idx)[0])
    assert not any(p.requires_grad for p in model.parameters())


class RealBytes(LiveBytes):
    """LiveBytes without tensors on the meta device, which need no memory."""

    def count(self, tensor):
        if not tensor.is_meta:
            super().count(tensor)


def test_reading_in_four_bits_never_holds_the_model_in_float(tmp_path):
    model = make_gpt(n_layer=12, n_embd=128)
    model.save_pretrained(tmp_path)
    floats = bytes_of(model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    with RealBytes([]) as live:
        read = read_model(type(model), tmp_path, nf4=True)
    # Quantizing needs its numbers scaled, and a 32-bit code for each.
    assert live.peak < bytes_of(read.parameters()) + 5 * largest < 0.5 * floats


def settings(**changes):
    values = dict(steps=2, batch_size=2, block_size=32, lr=1e-3)
    return Settings(**{**values, **changes})


@pytest.mark.parametrize("recompute", [False, True])
def test_the_ledger_predicts_what_four_bits_save_in_the_peak(recompute):
    predicted, measured = [], []
    x = torch.randint(97, (2, 16))
    for model in pair(n_layer=3, n_embd=128):
        step = Step(model.train(), settings(recompute=recompute))
        predicted.append(predict_memory(step, x))
        measured.append(measure_memory(step, x, x))
        assert predicted[-1]["weights"] == measured[-1]["weights"]
    nf4, plain = predicted
    blocks = 3 * 12 * 128 * 128
    assert plain["weights"] - nf4["weights"] == pytest.approx((4 - 0.516) * blocks, rel=0.01)
    saved = plain["weights"] - nf4["weights"] - nf4["transient"]
    in_peak = measured[1]["peak"] - measured[0]["peak"]
    assert in_peak == pytest.approx(saved, rel=0.1)
