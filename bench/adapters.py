"""
Many adapters for one base: what it costs to switch between them, to mix them in a batch
and to merge one, beside the plain base and PEFT.

    python bench/adapters.py --shape tiny --device cpu
    python bench/adapters.py --shape gpt2 --device cuda \\
        --json bench/results/adapters/h200-gpt2.json

A mixed batch has one row for each adapter. It is compared with what one would do
otherwise: run the adapters one after another, with a batch of one row each. All take
turns, round after round; the medians of the rounds are compared.
"""
import argparse
import copy
import itertools
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch
from torch import nn

from gpt import GPT, PRESETS, GPTConfig
from lab.adapters import Adapters
from lab.console import aligned, device_name
from lab.files import write_json
from lab.measure import round_robin, timed
from lora_minimal import lora_parameters, merge_lora, remove_lora

TARGETS = ["c_attn", "c_proj", "c_fc"]


# ---- the models ----------------------------------------------------------------------------------

@dataclass
class Models:
    """The same GPT four times."""

    base: nn.Module
    adapters: Adapters      # ours; their .model is a copy of the base
    merged: nn.Module       # one of our adapters merged into the weights
    theirs: nn.Module       # with PEFT's adapters

    @classmethod
    def make(cls, args):
        base = new_gpt(args)
        return cls(base, with_ours(base, args), with_one_merged(base, args), with_peft(base, args))


def new_gpt(args):
    torch.manual_seed(0)
    with torch.device(args.device):
        return GPT(GPTConfig.preset(args.shape)).eval()


def with_ours(base, args):
    """A copy of the base with our adapters. Returns the Adapters; their .model is the copy."""
    adapters = Adapters(copy.deepcopy(base))
    for name in args.names:
        adapters.add(name, r=args.r, alpha=2 * args.r, target_modules=TARGETS)
        for p in lora_parameters(adapters.model):
            nn.init.normal_(p, std=0.02)
    return adapters


def with_one_merged(base, args):
    """A plain GPT: a copy of the base with one of our adapters merged into its weights."""
    model = with_ours(base, args).model
    merge_lora(model)
    remove_lora(model)
    return model


def with_peft(base, args):
    """A copy of the base with PEFT's adapters."""
    config = peft.LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=TARGETS)
    first, *others = args.names
    model = peft.get_peft_model(copy.deepcopy(base), config, first)
    for name in others:
        model.add_adapter(name, config)
    return model.eval()


# ---- the measurement -----------------------------------------------------------------------------

@torch.no_grad()
def measure(args):
    """{what was measured: median seconds}"""
    models = Models.make(args)
    samplers = {**switches(models, args), **forwards(models, args), **generations(models, args)}
    seconds = round_robin(samplers, args.rounds, warmup=1, title="rounds")
    return {what: statistics.median(samples) for what, samples in seconds.items()}


# The next three functions return {what is measured: a sampler for lab.measure.round_robin}.

def switches(models, args):
    ours = switching(models.adapters.use, args.names[:2])
    theirs = switching(models.theirs.set_adapter, args.names[:2])
    mix = partial(models.adapters.use, args.names)
    return {
        "switch: ours": sampler(args, ours),
        "switch: PEFT": sampler(args, theirs),
        f"set up a mix of {args.adapters}": sampler(args, mix),
    }


def forwards(models, args):
    idx = random_tokens(models, args, models.base.config.block_size)
    ours = partial(models.adapters.model, idx)
    theirs = partial(models.theirs, idx, adapter_names=args.names)
    use_one = partial(models.adapters.use, args.names[0])
    mix = partial(models.adapters.use, args.names)
    n = args.adapters
    return {
        "forward: base": sampler(args, partial(models.base, idx)),
        "forward: merged": sampler(args, partial(models.merged, idx)),
        "forward: one adapter": sampler(args, ours, use_one),
        f"forward: {n} adapters in one batch": sampler(args, ours, mix),
        f"forward: {n} adapters in one batch, PEFT": sampler(args, theirs),
    }


def generations(models, args):
    prompts = random_tokens(models, args, args.prompt)
    greedy = dict(max_new_tokens=args.new_tokens, temperature=0)
    base = partial(models.base.generate, prompts, **greedy)
    ours = partial(models.adapters.model.generate, prompts, **greedy)
    mix = partial(models.adapters.use, args.names)
    n = args.adapters

    def one_by_one():
        for name, prompt in zip(args.names, prompts):
            models.adapters.use(name)
            models.adapters.model.generate(prompt[None], **greedy)

    return {
        f"generate: base, batch of {n}": sampler(args, base, repeat=1),
        f"generate: {n} adapters in one batch": sampler(args, ours, mix, repeat=1),
        f"generate: {n} adapters one by one": sampler(args, one_by_one, repeat=1),
    }


def random_tokens(models, args, n):
    """A row of n tokens for each adapter."""
    vocabulary = models.base.config.vocab_size
    return torch.randint(vocabulary, (args.adapters, n), device=args.device)


def switching(use, names):
    """A function that uses the next of the names at each call, over and over."""
    following = itertools.cycle(names)

    def switch():
        use(next(following))
    return switch


def sampler(args, work, prepare=None, repeat=5):
    """Times work(), after prepare() and a first call that does not count.

    That call fills the caches, in which other competitors have left their data.
    """
    seconds_of_work = timed(work, args.device, repeat)

    def sample():
        if prepare is not None:
            prepare()
        work()
        return seconds_of_work()
    return sample


# ---- the command line ----------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=PRESETS, default="tiny", help="a preset of gpt.py; default: tiny")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is a GPU, else cpu")
    add("--adapters", type=int, default=4, help="how many, at least 2; default: 4")
    add("--r", type=int, default=8, help="rank of each adapter; default: 8")
    add("--prompt", type=int, default=16, help="tokens of each row's prompt; default: 16")
    add("--new-tokens", type=int, default=64, help="tokens to generate in a row; default: 64")
    add("--rounds", type=int, default=11, help="how often each is timed; default: 11")
    add("--json", type=Path, help="write the medians into this file")
    args = parser.parse_args()
    if args.adapters < 2:
        parser.error("--adapters must be at least 2: one cannot switch between fewer")
    args.names = [f"voice{i}" for i in range(args.adapters)]
    return args


def comparison(what, seconds):
    """What the last column says about one of `seconds` {what: median seconds}."""
    if what.startswith("forward"):
        ratio = seconds[what] / seconds["forward: base"]
        return f"{ratio:.2f} × the base's time"
    if what.startswith("generate"):
        [one_by_one] = [value for name, value in seconds.items() if name.endswith("one by one")]
        ratio = one_by_one / seconds[what]
        return f"{ratio:.2f} × the throughput of one by one"
    return ""


def print_medians(args, seconds):
    print(f"{args.shape}, {args.adapters} adapters of rank {args.r}, on "
          f"{device_name(args.device)}, torch {torch.__version__}, peft {peft.__version__}")
    rows = [("", "median", "compared with")]
    for what, value in seconds.items():
        rows.append((what, f"{1000 * value:.3f} ms", comparison(what, seconds)))
    print(aligned(rows))


def write_medians(args, seconds):
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, {
        "device": device_name(args.device),
        "shape": args.shape,
        "adapters": args.adapters,
        "r": args.r,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "seconds": seconds,
        "torch": torch.__version__,
        "peft": peft.__version__,
    })


def main():
    args = parse_args()
    seconds = measure(args)
    print_medians(args, seconds)
    if args.json:
        write_medians(args, seconds)


if __name__ == "__main__":
    main()
