"""
This LoRA beside full fine-tuning, a LoRA written the obvious way, PEFT and loralib: the same GPT, the same batch, the
same training step (train.py's Step: forward, backward, clipping, AdamW). One run, one table.

    python bench/peers.py --shape laptop --device cpu                     two minutes on two cores
    python bench/peers.py --shape gpt2 --device cuda --modes captured compiled --json bench/results/h200-gpt2.json

The competitors take their steps in turn, round by round, so that a machine that slows down slows all of them; medians of
the rounds are compared. Peak memory is that of an eager step (compare.py's measure_memory). Libraries compute as their
users would: float32 weights, on CUDA with bfloat16 autocast, and the plain loss. Ours is shown with its defaults (chunked
loss; on CUDA the frozen base stored in bfloat16), and, to separate the effects, with a float32 base, and full fine-tuning
is shown with the chunked loss too.
"""
import argparse
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import loralib
import peft
import torch
from torch import nn
from tqdm import tqdm

import compare
from data.runs import write_json
from gpt import GPT, GPTConfig
from lora_minimal import apply_lora
from train import Settings, Step, device_name, loss_chunk

SHAPES = {      # preset, batch, block; 50,304 is GPT-2's vocabulary as nanoGPT fills it up, to be kind to everyone
    "laptop": (dict(name="tiny"), 16, 128),
    "tiny": (dict(name="small"), 32, 256),
    "gpt2": (dict(name="gpt2", vocab_size=50304), 8, 1024),
    "gpt2-xl": (dict(name="gpt2-xl", vocab_size=50304), 1, 1024),
}
TARGETS = {"all": ["c_attn", "c_proj", "c_fc"], "attention": ["c_attn", "attn.c_proj"]}
R, ALPHA = 8, 16


class NaiveLoRA(nn.Module):
    """The equation as one would write it down, differentiated by autograd."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(R, base.in_features, device=base.weight.device) / R)
        self.B = nn.Parameter(torch.zeros(base.out_features, R, device=base.weight.device))

    def forward(self, x):
        return self.base(x) + ALPHA / R * (x @ self.A.T @ self.B.T)


def with_loralib(base):
    layer = loralib.Linear(base.in_features, base.out_features, r=R, lora_alpha=ALPHA, bias=base.bias is not None)
    layer = layer.to(base.weight.device)
    layer.weight, layer.bias = base.weight, base.bias
    return layer


def replace(model, targets, make):
    """Put make(linear) in the place of every targeted nn.Linear; train only what that adds."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(name.endswith(f".{target}") for target in targets):
            old = set(model.parameters())
            model.set_submodule(name, make(module))
            for p in set(model.parameters()) - old:
                p.requires_grad_(True)
    return model


def competitors(args, shape):
    """{(library, targets): function that makes its model and says its loss_chunk}"""
    def gpt(dtype=torch.float32):
        torch.manual_seed(0)
        with torch.device(args.device):
            return GPT(GPTConfig.preset(**shape)).to(dtype)

    def ours(targets, dtype):
        model = gpt(dtype)
        apply_lora(model, r=R, alpha=ALPHA, target_modules=targets)
        return model, args.loss_chunk or loss_chunk("lora", args.device)

    def with_peft(targets):
        config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets)
        return peft.get_peft_model(gpt(), config), 0

    made = {("full", "-"): lambda: (gpt(), 0), ("full, chunked loss", "-"): lambda: (
        gpt(), args.loss_chunk or loss_chunk("full", args.device))}
    for name in args.targets:
        targets = TARGETS[name]
        made["naive", name] = lambda targets=targets: (replace(gpt(), targets, NaiveLoRA), 0)
        made["PEFT", name] = lambda targets=targets: with_peft(targets)
        made["loralib", name] = lambda targets=targets: (replace(gpt(), targets, with_loralib), 0)
        if args.device.startswith("cuda"):
            made["ours, float32 base", name] = lambda targets=targets: ours(targets, torch.float32)
            made["ours", name] = lambda targets=targets: ours(targets, torch.bfloat16)
        else:
            made["ours", name] = lambda targets=targets: ours(targets, torch.float32)
    if args.recompute:      # how small can it get: both sides with all that saves memory
        made = {key: make for key, make in made.items() if key[0] in ("full, chunked loss", "ours")}
    return {key: make for key, make in made.items() if not args.only or key[0] in ("full", *args.only)}


def run(args, shape, batch, block, mode):
    """-> rows of one mode: eager, captured (the step in a CUDA graph) or compiled (and captured)."""
    settings = dict(steps=1000, batch_size=batch, block_size=block, lr=1e-4, graph=mode != "eager", compile=mode == "compiled",
                    recompute=args.recompute, dtype="bfloat16" if args.device.startswith("cuda") else "float32")
    generator = torch.Generator().manual_seed(0)
    vocabulary = GPTConfig.preset(**shape).vocab_size
    x, y = (torch.randint(vocabulary, (batch, block), generator=generator).to(args.device) for _ in range(2))
    steps, peaks, times = {}, {}, {}
    for key, make in tqdm(competitors(args, shape).items(), desc=f"{mode}: preparing", disable=None):
        model, chunk = make()
        steps[key] = Step(model.train(), Settings(**settings, loss_chunk=chunk))
        peaks[key] = compare.measure_memory(steps[key], x, y)["peak"]
        for _ in range(4):          # warm-up, and on CUDA the capture
            steps[key](x, y)
        times[key] = []
    for _ in tqdm(range(args.rounds), desc=f"{mode}: rounds", disable=None):
        for key, step in steps.items():
            start = compare.clock(args.device)
            for _ in range(args.repeat):
                step(x, y)
            times[key].append((compare.clock(args.device) - start) / args.repeat * 1000)
    median = {key: statistics.median(values) for key, values in times.items()}
    full = next(iter(median))
    return [{"library": library, "targets": targets, "mode": mode, "step_ms": median[library, targets],
             "speedup_vs_full": median[full] / median[library, targets], "peak_bytes": peaks[library, targets],
             "memory_vs_full": peaks[full] / peaks[library, targets]} for library, targets in median]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="laptop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="+", choices=("eager", "captured", "compiled"), default=["eager"])
    parser.add_argument("--only", nargs="+", help="of the libraries only these, beside full fine-tuning")
    parser.add_argument("--recompute", action="store_true", help="full and ours alone, both with checkpointing")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--loss-chunk", type=int, help="logits at a time in the chunked loss; train.py's if not given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=1, help="steps in a round of one competitor")
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    shape, batch, block = SHAPES[args.shape]
    rows = [row for mode in args.modes for row in run(args, shape, batch, block, mode)]
    print(f"{args.shape}: {shape['name']}, {batch} x {block} tokens, on {device_name(args.device)}, torch {torch.__version__}"
          + (", blocks recomputed" if args.recompute else ""))
    print(f"{'mode':<9} {'library':<19} {'targets':<9} {'step':>10} {'full / it':>9} {'peak':>9} {'full / it':>9}")
    for row in rows:
        print(f"{row['mode']:<9} {row['library']:<19} {row['targets']:<9} {row['step_ms']:>7.2f} ms "
              f"{row['speedup_vs_full']:>9.3f} {compare.size(row['peak_bytes']):>9} {row['memory_vs_full']:>9.3f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, {
            "device": device_name(args.device), "shape": args.shape, "batch": batch, "block": block,
            "recompute": args.recompute, "loss_chunk": args.loss_chunk, "rounds": args.rounds, "rows": rows,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__,
                         "loralib": version("loralib")}})


if __name__ == "__main__":
    main()
