"""
Many adapters over one base: what switching, mixing in one batch and merging cost, beside the plain base and PEFT.

    python bench/adapters.py --shape tiny --device cpu
    python bench/adapters.py --shape gpt2 --device cuda --json bench/results/adapters/h200-gpt2.json

A mixed batch of as many rows as there are adapters, each row through its own, is set beside running the adapters one
after another at batch 1; that is what one would do without it. All competitors take turns, round by round; medians.
"""
import argparse
import copy
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch
from torch import nn
from tqdm import tqdm

import compare
from data.runs import write_json
from gpt import GPT, PRESETS, GPTConfig
from lora_minimal import apply_lora, lora_parameters, merge_lora, remove_lora, use_lora
from train import device_name

TARGETS = ["c_attn", "c_proj", "c_fc"]


def models(args):
    """The same GPT four times: plain, with our adapters, with one of them merged in, and with PEFT's."""
    torch.manual_seed(0)
    with torch.device(args.device):
        base = GPT(GPTConfig.preset(args.shape)).eval()
        ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
        config = peft.LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=TARGETS)
        for name in args.names:
            apply_lora(ours, r=args.r, alpha=2 * args.r, target_modules=TARGETS, name=name)
            for p in lora_parameters(ours):
                nn.init.normal_(p, std=0.02)
            theirs = peft.get_peft_model(theirs, config, name) if name == args.names[0] else theirs
            if name != args.names[0]:
                theirs.add_adapter(name, config)
    merged = copy.deepcopy(ours)
    merge_lora(merged)
    remove_lora(merged)
    return base, ours, merged, theirs.eval()


@torch.no_grad()
def measure(args):
    """-> {what: median seconds}"""
    base, ours, merged, theirs = models(args)
    vocabulary, n = base.config.vocab_size, len(args.names)
    batch = torch.randint(vocabulary, (n, args.prompt), device=args.device)
    long = torch.randint(vocabulary, (n, base.config.block_size), device=args.device)

    def one_by_one(run, switch):
        for name, row in zip(args.names, batch):
            switch(name)
            run(row[None])

    def generate(model):
        return lambda idx: model.generate(idx, args.new_tokens, temperature=0)

    def turns(*switches):       # every call makes the next of the switches
        state = [0]
        return lambda: (switches[state[0] % len(switches)](), state.__setitem__(0, state[0] + 1))

    first, second = args.names[:2]
    work = {
        "switch: ours": turns(lambda: use_lora(ours, first), lambda: use_lora(ours, second)),
        "switch: PEFT": turns(lambda: theirs.set_adapter(first), lambda: theirs.set_adapter(second)),
        f"set up a mix of {n}": lambda: use_lora(ours, args.names),
        "forward: base": lambda: base(long),
        "forward: merged": lambda: merged(long),
        "forward: one adapter": (lambda: use_lora(ours, first), lambda: ours(long)),
        f"forward: {n} adapters in one batch": (lambda: use_lora(ours, args.names), lambda: ours(long)),
        f"forward: {n} adapters in one batch, PEFT": lambda: theirs(long, adapter_names=args.names),
        f"generate: base, batch of {n}": lambda: generate(base)(batch),
        f"generate: {n} adapters in one batch": (lambda: use_lora(ours, args.names), lambda: generate(ours)(batch)),
        f"generate: {n} adapters one by one": lambda: one_by_one(generate(ours), lambda name: use_lora(ours, name)),
    }
    times = {what: [] for what in work}
    for round in tqdm(range(args.rounds + 1), desc="rounds", disable=None):
        for what, (prepare, run) in ((what, w if isinstance(w, tuple) else (lambda: None, w)) for what, w in work.items()):
            repeat = 1 if what.startswith("generate") else 5
            prepare()
            run()               # not counted: whatever ran before has left its marks on caches and clocks
            start = compare.clock(args.device)
            for _ in range(repeat):
                run()
            if round:
                times[what].append((compare.clock(args.device) - start) / repeat)
    return {what: statistics.median(values) for what, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=PRESETS, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16, help="tokens in each row's prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the medians there")
    args = parser.parse_args()
    args.names = [f"voice{i}" for i in range(args.adapters)]
    n, seconds = len(args.names), measure(args)
    forward, one_by_one = seconds["forward: base"], seconds[f"generate: {n} adapters one by one"]
    print(f"{args.shape}, {n} adapters of rank {args.r}, on {device_name(args.device)}, torch {torch.__version__}, "
          f"peft {peft.__version__}")
    print(compare.aligned([("", "median", "compared with"), *((what, f"{s * 1000:.3f} ms", (
        f"{s / forward:.2f} × the base's time" if what.startswith("forward") else
        f"{one_by_one / s:.2f} × the throughput of one by one" if what.startswith("generate") else "")) for what, s in
        seconds.items())]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, {"device": device_name(args.device), "shape": args.shape, "adapters": n, "r": args.r,
                               "prompt": args.prompt, "new_tokens": args.new_tokens, "seconds": seconds,
                               "torch": torch.__version__, "peft": peft.__version__})


if __name__ == "__main__":
    main()
