"""
This LoRA beside full fine-tuning, a LoRA written in the obvious way, PEFT and loralib.

All train the same GPT on the same batch, with the same training step: train.Step (forward,
backward, clipping, AdamW).

    python bench/peers.py --shape tiny --device cpu             two minutes on two cores
    python bench/peers.py --shape gpt2 --device cuda --modes captured compiled \\
        --json bench/results/h200-gpt2.json

The competitors take their steps in turn, round after round, so a machine that slows
down slows all of them; the medians of the rounds are compared. Peak memory is that of an
eager step (lab.measure.measure_memory).

The libraries compute as their users would: float32 weights, on CUDA bfloat16 autocast,
and the plain loss. Ours runs with its defaults: the loss in chunks, and on CUDA the
frozen base stored in bfloat16. Two more competitors separate these effects: ours with a
float32 base, and full fine-tuning with the loss in chunks.
"""
import argparse
import platform
import statistics
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import loralib
import peft
import torch
from torch import nn
from tqdm import tqdm

from gpt import GPT, GPTConfig
from lab.capture import WARMUP, captured
from lab.console import aligned, device_name, size
from lab.files import write_json
from lab.measure import measure_memory, round_robin, timed
from lab.settings import Settings, default_loss_chunk
from lora_minimal import apply_lora
from train import Step

# {preset: the shape of its batches (B, T)}
SHAPES = {"tiny": (16, 128), "small": (32, 256), "gpt2": (8, 1024), "gpt2-xl": (1, 1024)}
TARGETS = {"all": ["c_attn", "c_proj", "c_fc"], "attention": ["c_attn", "attn.c_proj"]}
MODES = ("eager", "captured", "compiled")
R, ALPHA = 8, 16

# Every competitor is compiled. By default torch compiles a function eight times, and
# then runs it uncompiled with no more than a warning.
torch._dynamo.config.recompile_limit = 100
torch._dynamo.config.fail_on_recompile_limit_hit = True

# GPT-2's 50,257 entries, filled up to a multiple of 64 as in nanoGPT. It makes the plain
# loss faster.
PADDED_VOCABULARY = 50304
PLAIN_LOSS, CHUNKED_LOSS = False, True


# ---- the competitors -----------------------------------------------------------------------------

class NaiveLoRA(nn.Module):
    """y = W x + b + (α/r) B A x. Autograd finds the gradients."""

    def __init__(self, base):
        super().__init__()
        device = base.weight.device
        self.base = base                                                        # W x + b
        self.A = nn.Parameter(torch.randn(R, base.in_features, device=device) / R)
        self.B = nn.Parameter(torch.zeros(base.out_features, R, device=device))

    def forward(self, x):
        """x (..., in) -> y (..., out)"""
        return self.base(x) + ALPHA / R * (x @ self.A.T @ self.B.T)


# Each of these functions returns a model on args.device, and whether its loss is in chunks.

def full(args, targets):
    return new_gpt(args), PLAIN_LOSS


def full_with_chunked_loss(args, targets):
    return new_gpt(args), CHUNKED_LOSS


def naive(args, targets):
    return replace_linears(new_gpt(args), targets, NaiveLoRA), PLAIN_LOSS


def with_peft(args, targets):
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets)
    return peft.get_peft_model(new_gpt(args), config), PLAIN_LOSS


def with_loralib(args, targets):
    return replace_linears(new_gpt(args), targets, loralib_linear), PLAIN_LOSS


def ours_with_float32_base(args, targets):
    return ours(args, targets, torch.float32)


def ours(args, targets, base_dtype=None):
    if base_dtype is None:
        base_dtype = torch.bfloat16 if on_cuda(args) else torch.float32
    model = new_gpt(args).to(base_dtype)
    apply_lora(model, r=R, alpha=ALPHA, target_modules=targets)
    return model, CHUNKED_LOSS


FULL = {"full": full, "full, chunked loss": full_with_chunked_loss}
LORA = {
    "naive": naive,
    "PEFT": with_peft,
    "loralib": with_loralib,
    "ours, float32 base": ours_with_float32_base,
    "ours": ours,
}
LIBRARIES = [*FULL, *LORA]


def new_gpt(args):
    """A GPT in float32 on args.device: always with the same weights."""
    torch.manual_seed(0)
    with torch.device(args.device):
        return GPT(config_of(args.shape))


def config_of(shape):
    changes = {"vocab_size": PADDED_VOCABULARY} if shape.startswith("gpt2") else {}
    return GPTConfig.preset(shape, **changes)


def chunk_of(args, mode, model):
    """The loss_chunk for a model whose loss is in chunks."""
    head_trains = model.lm_head.weight.requires_grad
    default = default_loss_chunk(args.device, head_trains, compile=mode == "compiled")
    return args.loss_chunk or default


def on_cuda(args):
    return torch.device(args.device).type == "cuda"


def replace_linears(model, targets, make):
    """Replace each targeted nn.Linear by make(linear). Only what that adds trains."""
    model.requires_grad_(False)
    endings = tuple(f".{target}" for target in targets)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(endings):
            model.set_submodule(path, make(module))
    return model


def loralib_linear(base):
    """loralib's layer with the weights of an nn.Linear."""
    has_bias = base.bias is not None
    layer = loralib.Linear(
        base.in_features, base.out_features, r=R, lora_alpha=ALPHA, bias=has_bias
    )
    layer = layer.to(base.weight.device)
    layer.weight = base.weight
    layer.bias = base.bias
    return layer


def competitors(args):
    """{(library, targets): the function that makes it}, in the order of the table."""
    made = {(library, "-"): make for library, make in FULL.items()}
    for targets in args.targets:
        for library, make in LORA.items():
            made[library, targets] = make
    libraries = set(LIBRARIES)
    if not on_cuda(args):
        libraries.remove("ours, float32 base")      # on other devices ours has that anyway
    baseline = "full"
    if args.recompute:      # how small can it get: the smallest of each kind
        baseline = "full, chunked loss"
        libraries = {baseline, "ours"}
    if args.only:
        libraries &= {baseline, *args.only}
    return {key: make for key, make in made.items() if key[0] in libraries}


# ---- the measurement -----------------------------------------------------------------------------

def measure(args, mode):
    """Measure all competitors in one mode. Returns a row, a dict, for each."""
    x, y = random_batch(args)
    steps, peaks = {}, {}
    bar = tqdm(competitors(args).items(), f"{mode}: preparing", disable=None, leave=False)
    for (library, targets), make in bar:
        model, is_chunked = make(args, TARGETS.get(targets))
        chunk = chunk_of(args, mode, model) if is_chunked else 0
        step = Step(model.train(), step_settings(args, mode, chunk))
        peaks[library, targets] = measure_memory(step, x, y)["peak"]
        steps[library, targets] = captured(step)
    seconds = time_steps(args, steps, x, y, title=f"{mode}: rounds")

    baseline = next(iter(steps))
    rows = []
    for key in steps:
        library, targets = key
        rows.append({
            "library": library,
            "targets": targets,
            "mode": mode,
            "step_ms": 1000 * seconds[key],
            "speedup_vs_full": seconds[baseline] / seconds[key],
            "peak_bytes": peaks[key],
            "memory_vs_full": peaks[baseline] / peaks[key],
        })
    return rows


def random_batch(args):
    """Inputs and targets (B, T) of random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = config_of(args.shape).vocab_size
    x = torch.randint(vocabulary, SHAPES[args.shape], generator=generator)
    y = torch.randint(vocabulary, SHAPES[args.shape], generator=generator)
    return x.to(args.device), y.to(args.device)


def step_settings(args, mode, chunk):
    """The Settings of a competitor whose loss computes `chunk` logits at a time (0: all)."""
    batch, block = SHAPES[args.shape]
    return Settings(
        steps=1000,
        batch_size=batch,
        block_size=block,
        lr=1e-4,
        dtype="bfloat16" if on_cuda(args) else "float32",
        loss_chunk=chunk,
        recompute=args.recompute,
        compile=mode == "compiled",
        graph=mode != "eager",
    )


def time_steps(args, steps, x, y, title):
    """The median seconds of each of `steps` {key: function of x, y}."""
    for step in steps.values():
        for _ in range(WARMUP + 1):         # on CUDA the last of these is the capture
            step(x, y)
    samplers = {
        key: timed(partial(step, x, y), args.device, args.repeat) for key, step in steps.items()
    }
    seconds = round_robin(samplers, args.rounds, title=title)
    return {key: statistics.median(samples) for key, samples in seconds.items()}


# ---- the command line ----------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny",
        help="a preset of gpt.py, with a batch that suits it; default: tiny")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is a GPU, else cpu")
    add("--modes", nargs="+", choices=MODES, default=["eager"],
        help="captured: the step in a CUDA graph; compiled: torch.compile as well; default: eager")
    add("--only", nargs="+", choices=LIBRARIES, metavar="LIBRARY",
        help=f"only full fine-tuning and these; among: {'; '.join(LIBRARIES)}")
    add("--recompute", action="store_true",
        help="only full fine-tuning and ours, both with gradient checkpointing")
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS),
        help="which layers get LoRA; default: all attention")
    add("--loss-chunk", type=int,
        help="logits that the chunked loss computes at a time; default: what train.py uses")
    add("--rounds", type=int, default=15, help="how often each step is timed; default: 15")
    add("--repeat", type=int, default=1, help="steps of one competitor in a round; default: 1")
    add("--json", type=Path, help="write the rows into this file")
    return parser.parse_args()


def print_rows(args, rows):
    batch, block = SHAPES[args.shape]
    recomputed = ", blocks recomputed" if args.recompute else ""
    print(f"{args.shape}: {batch} x {block} tokens, on {device_name(args.device)}, "
          f"torch {torch.__version__}{recomputed}")
    cells = [("library", "layers", "mode", "step", "full / it", "peak", "full / it")]
    for row in rows:
        cells.append((
            row["library"], row["targets"], row["mode"],
            f"{row['step_ms']:.2f} ms", f"{row['speedup_vs_full']:.3f}",
            size(row["peak_bytes"]), f"{row['memory_vs_full']:.3f}",
        ))
    print(aligned(cells))


def write_rows(args, rows):
    batch, block = SHAPES[args.shape]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, {
        "device": device_name(args.device),
        "shape": args.shape,
        "batch": batch,
        "block": block,
        "recompute": args.recompute,
        "loss_chunk": args.loss_chunk,
        "rounds": args.rounds,
        "rows": rows,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "peft": peft.__version__,
            "loralib": version("loralib"),
        },
    })


def main():
    args = parse_args()
    rows = []
    for mode in args.modes:
        rows += measure(args, mode)
    print_rows(args, rows)
    if args.json:
        write_rows(args, rows)


if __name__ == "__main__":
    main()
