"""A frozen weight in four bits: beside bitsandbytes, and beside the float weight it stands for."""
import copy
import importlib.util
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers_lora import TARGETS, fill_lora, train_steps, transformers_gpt2
from torch import nn

import train
from conftest import make_gpt, run
from data import Corpus
from data.bpe import train_bpe
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
from lab.runs import MUST
from lab.settings import Settings, UsageError
from lab.tokenizer_files import save_tokenizer
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


# ---- the commands --------------------------------------------------------------------------------

MINI = dict(steps=4, batch_size=2, block_size=16, eval_every=2, device="cpu")
STORIES = [f"The {word} went out to sea.\n" * 8 for word in ("man", "fox", "ship", "old", "sun")]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sea.txt"
    path.write_text("<|endoftext|>\n".join(STORIES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    dir = tmp_path_factory.mktemp("nf4") / "base"
    make_gpt(std=0.05, vocab_size=300, block_size=16).save_pretrained(dir)
    save_tokenizer(train_bpe("\n".join(STORIES), 300), dir)
    return dir


def bpb_of(record):
    return [point["bpb"] for point in record["curve"]]


def test_tune_and_recomputing_give_the_same_curve_near_that_of_the_float_base(base, text, tmp_path):
    curves = []
    for name, flags in {
        "float": {},
        "nf4": {"base_dtype": "nf4"},
        "again": {"base_dtype": "nf4", "recompute": True},
    }.items():
        record = train.tune(base, text, tmp_path / name, **MINI, **flags)
        curves.append(bpb_of(record))
    assert curves[1] == curves[2]
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.01)


def test_an_interrupted_run_continues_on_the_same_curve(base, text, tmp_path, monkeypatch):
    options = dict(**MINI, base_dtype="nf4")
    whole = train.tune(base, text, tmp_path / "whole", **options)
    after_step = train.Progress.after_step

    def interrupted(progress, n, loss):
        after_step(progress, n, loss)
        if n == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "after_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.tune(base, text, tmp_path / "resumed", **options)
    resumed = train.tune(base, text, tmp_path / "resumed", resume=MUST, **options)
    assert bpb_of(resumed) == bpb_of(whole)


@pytest.mark.parametrize("command", ["compare", "voices"])
def test_longer_commands_tune_on_four_bits(base, text, tmp_path, capsys, command):
    flags = ["--data", text, "--base-data", text, "--steps", "2", "--batch-size", "2"]
    flags += ["--block-size", "16", "--device", "cpu"]
    code, _, error = run(
        capsys, command, "--base", base, "--out", tmp_path, "--base-dtype", "nf4", *flags
    )
    assert code == 0, error
    for dir, stored in {"lora": "nf4", "sea": "nf4", "full": "float32"}.items():
        path = tmp_path / dir / "training.json"
        if path.exists():
            settings = json.loads(path.read_text())["asked"]["settings"]
            assert settings["base_dtype"] == stored
    if command == "compare":
        report = json.loads((tmp_path / "comparison.json").read_text())
        full, lora = report["methods"]["full"], report["methods"]["lora"]
        assert lora["total_params"] == full["total_params"] + lora["trainable_params"]
        assert lora["memory"]["weights"] < 0.5 * full["memory"]["weights"]


@pytest.mark.parametrize("changes, says", [
    (dict(method="full", base_dtype="nf4"), "full fine-tuning changes all weights"),
    (dict(base_dtype="nf4", fsdp=True), "cannot be divided by --fsdp"),
    (dict(base_dtype="int4"), "expected float32 or bfloat16 or float16 or nf4"),
    (dict(base_dtype="bfloat16", dtype="float16"), "does not go with"),
    (dict(base_dtype="float16", dtype="float32"), "does not go with"),
    (dict(base_dtype="nf4", r=10_000), "exceeds the smaller side"),
])
def test_what_does_not_fit_is_refused_and_writes_nothing(base, text, tmp_path, changes, says):
    with pytest.raises(UsageError, match=says):
        train.tune(base, text, tmp_path / "out", cache_dir=tmp_path, **{**MINI, **changes})
    assert not (tmp_path / "out").exists()


def test_merging_folds_into_the_float_weights_and_says_so(base, text, tmp_path, capsys):
    train.tune(base, text, tmp_path / "mine", **MINI, base_dtype="nf4")
    flags = ["--base", base, "--adapter", tmp_path / "mine", "--out", tmp_path / "merged"]
    code, printed, error = run(capsys, "merge", *flags)
    assert code == 0, error
    assert "tuned on the base in four bits" in printed
    merged = read_model(train.GPT, tmp_path / "merged")
    expected = read_model(train.GPT, base)
    load_lora(expected, tmp_path / "mine")
    merge_lora(expected)
    path = "transformer.h.1.mlp.c_proj"
    weight = merged.get_submodule(path).weight
    assert torch.equal(weight, expected.get_submodule(path).weight)


def test_a_base_too_large_for_float16_is_refused(tmp_path):
    model = make_gpt()
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="too large for torch.float16"):
        read_model(type(model), tmp_path, dtype=torch.float16)


# ---- the bench -----------------------------------------------------------------------------------

BENCH = Path(train.__file__).parent / "bench"


def bench(name):
    """A module of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bench_measures_steps_and_the_whole_command(text, tmp_path, monkeypatch):
    nf4 = bench("nf4")
    monkeypatch.setitem(nf4.SHAPES, "tiny", (2, 16))
    common = ["--shape", "tiny", "--device", "cpu"]
    nf4.main(["steps", *common, "--rounds", "2", "--out", str(tmp_path / "steps.json")])
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    weights = {row["base"]: row["weight_bytes"] for row in rows}
    assert weights["nf4"] < weights["bfloat16"] < weights["float32"]
    assert all(row["step_ms"] > 0 and row["peak_bytes"] > row["weight_bytes"] for row in rows)

    out = str(tmp_path / "command.json")
    own = ["--bases", "nf4", "--steps", "2", "--text", str(text), "--work", str(tmp_path)]
    nf4.main(["command", *common, *own, "--out", out])
    [row] = json.loads((tmp_path / "command.json").read_text())["rows"]
    assert row["argv"][:2] == ["tune", "--base"]
    assert row["gpu_allocated_bytes"] is None
    assert row["host_bytes"] is None or row["host_bytes"] > 1e7


def test_the_bench_of_quality_continues_and_pairs_its_runs(tmp_path, monkeypatch):
    windows = Corpus.heldout_windows

    def first_windows(corpus, block_size, at_once):
        return itertools.islice(windows(corpus, block_size, at_once), 2)

    monkeypatch.setattr(Corpus, "heldout_windows", first_windows)       # the others take long
    nf4 = bench("nf4")
    argv = [
        "quality", "--mini", "--device", "cpu", "--shapes", "tiny", "--texts", "noir", "--seeds",
        "1", "--work", str(tmp_path), "--bases", "bfloat16", "nf4",
        "--out", str(tmp_path / "quality.json"),
    ]
    nf4.main([*argv, "--minutes", "0"])
    assert json.loads((tmp_path / "quality.json").read_text())["rows"] == []
    nf4.main(argv)
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [row["base"] for row in rows] == ["bfloat16", "nf4"]
    before = [path.stat().st_mtime_ns for path in tmp_path.glob("*/training.json")]
    nf4.main(argv)
    assert before == [path.stat().st_mtime_ns for path in tmp_path.glob("*/training.json")]
    bf16, four_bits = nf4.summaries(rows)
    assert bf16["ratio"] == 1
    assert four_bits["ratio"] == pytest.approx(rows[1]["bpb"] / rows[0]["bpb"])
