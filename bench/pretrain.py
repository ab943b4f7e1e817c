"""
This project's pretraining beside nanoGPT's recipe: milliseconds a step, and bits per
byte after equal seconds.

Both train the same GPT on the same batches of tales, with train.Step. They differ in

    nanoGPT    AdamW (fused) for everything, at nanoGPT's rate for its small models,
               torch.compile, all logits at once
    ours       Muon for the matrices of the blocks and AdamW for the rest, as in
               lab/settings.py; on CUDA the step is captured in a graph
    compiled   ours, with torch.compile as well

    python bench/pretrain.py --device cuda --json bench/results/pretrain/h100-small.json
    python bench/pretrain.py --device cuda --shape gpt2 --budgets
    python bench/pretrain.py --device cpu --budgets 60 120

First the steps are timed in turn, round after round; the table has the medians. Then
each recipe trains a new model for as many steps as its step time allows in each of
--budgets, with a learning rate that falls to zero at the end of it.
"""
import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data import HELDOUT, Batches, read_text, tokenize
from data.bpe import train_bpe
from gpt import GPT, GPTConfig
from lab.capture import WARMUP, captured
from lab.console import aligned, device_name, say
from lab.files import DOWNLOADS, TOKENS, write_json
from lab.measure import round_robin, timed
from lab.settings import settings_for
from train import Step, train

# {preset: the shape of its batches (B, T)}
SHAPES = {"tiny": (16, 128), "small": (64, 256), "gpt2": (8, 1024)}
NANOGPT_LR = {"tiny": 1e-3, "small": 1e-3, "gpt2": 6e-4}      # of its configurations
RECIPES = ("nanoGPT", "ours", "compiled")
VOCABULARY = 2048
# GPT-2's 50,257 entries, filled up to a multiple of 64 as in nanoGPT. The text uses the
# first 2,048 of them.
VOCABULARY_OF_GPT2 = 50304


def settings_of_recipe(recipe, args, steps=1000):
    """The Settings of a recipe for args.shape on args.device."""
    batch_size, block_size = SHAPES[args.shape]
    changes = dict(
        steps=steps, batch_size=batch_size, block_size=block_size, eval_every=steps,
        dropout=args.dropout,
    )
    if recipe == "nanoGPT":
        changes |= dict(muon_lr=0.0, lr=args.nanogpt_lr or NANOGPT_LR[args.shape])
        changes |= dict(loss_chunk=0, compile=not args.no_compile, graph=False)
    if recipe == "compiled":
        changes |= dict(compile=True)
    return settings_for("pretrain", args.device, **changes)


def new_model(args):
    """A GPT of args.shape on args.device: always with the same weights."""
    _, block_size = SHAPES[args.shape]
    config = GPTConfig.preset(
        args.shape, vocab_size=args.vocab_size, block_size=block_size, dropout=args.dropout
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        return GPT(config).train()


def load_text(args, cache_dir):
    """The Corpus of args.data, with a tokenizer trained on it."""
    text = read_text(args.data, HELDOUT, Path(cache_dir, DOWNLOADS))
    encoding = train_bpe(text.all_train[:2**24], min(args.vocab_size, VOCABULARY))
    _, block_size = SHAPES[args.shape]
    return tokenize(text, encoding, Path(cache_dir, TOKENS), block_size)


# ---- the step ------------------------------------------------------------------------------------

def time_steps(args, corpus):
    """{recipe: the median milliseconds of a step}, timed in turn."""
    samplers = {}
    for recipe in args.only:
        settings = settings_of_recipe(recipe, args)
        step = captured(Step(new_model(args), settings))
        batches = Batches(
            corpus.train, settings.batch_size, settings.block_size, settings.seed
        )
        x, y = [tensor.to(args.device) for tensor in batches[0]]
        for _ in range(WARMUP + 1):         # on CUDA the last of these is the capture
            step(x, y)
        samplers[recipe] = timed(partial(step, x, y), args.device, args.repeat)
    seconds = round_robin(samplers, args.rounds, title="timing steps")
    return {recipe: 1000 * statistics.median(values) for recipe, values in seconds.items()}


def print_steps(step_ms):
    first = next(iter(step_ms))
    rows = [("recipe", "a step", f"of {first}'s")]
    for recipe, milliseconds in step_ms.items():
        share = milliseconds / step_ms[first]
        rows.append((recipe, f"{milliseconds:.2f} ms", f"{share:.3f}"))
    say(aligned(rows))


# ---- equal seconds -------------------------------------------------------------------------------

def train_for(seconds, recipe, args, corpus, step_ms, dir):
    """Train a new model for about `seconds`. Returns a row: what came of it."""
    steps = max(1, round(1000 * seconds / step_ms))
    settings = settings_of_recipe(recipe, args, steps)
    curve = train(new_model(args), corpus, settings, dir)
    return {
        "recipe": recipe,
        "budget_s": seconds,
        "steps": steps,
        "seconds": curve[-1]["seconds"],
        "bpb": curve[-1]["bpb"],
    }


def print_budgets(rows):
    cells = [("recipe", "steps", "seconds", "held out")]
    for row in rows:
        cells.append((
            row["recipe"], f"{row['steps']:,}", f"{row['seconds']:.1f}",
            f"{row['bpb']:.3f} bpb",
        ))
    say(aligned(cells))
    say("The seconds are those of training alone, compiling and capturing included.")


# ---- the command line ----------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    on_cuda = torch.cuda.is_available()
    add("--device", choices=("cpu", "cuda"), default="cuda" if on_cuda else "cpu",
        help="default: cuda if there is a GPU, else cpu")
    add("--shape", choices=SHAPES,
        help="a preset of gpt.py; default: small on a GPU, tiny on a CPU")
    add("--data", default="tales", help="a text; default: tales")
    add("--vocab-size", type=int,
        help=f"default: {VOCABULARY}; for gpt2 {VOCABULARY_OF_GPT2}, as in nanoGPT")
    add("--only", nargs="+", choices=RECIPES, help="default: all")
    add("--no-compile", action="store_true",
        help="nanoGPT's recipe without torch.compile, where there is no compiler")
    add("--dropout", type=float, help="of all recipes; default: that of lab/settings.py")
    add("--nanogpt-lr", type=float,
        help="learning rate of nanoGPT's recipe; default: that of its configurations")
    add("--budgets", type=float, nargs="*",
        help="seconds to train for; none: only time steps; default: 3 6 on a GPU, 60 on a CPU")
    add("--rounds", type=int, default=10, help="how often each step is timed; default: 10")
    add("--repeat", type=int, default=1, help="steps of one recipe in a round; default: 1")
    add("--json", type=Path, help="write the results into this file")
    args = parser.parse_args(argv)
    on_cuda = args.device == "cuda"
    args.shape = args.shape or ("small" if on_cuda else "tiny")
    default_size = VOCABULARY_OF_GPT2 if args.shape == "gpt2" else VOCABULARY
    args.vocab_size = args.vocab_size or default_size
    args.only = args.only or RECIPES
    if args.dropout is None:
        args.dropout = settings_for("pretrain", args.device).dropout
    if args.budgets is None:
        args.budgets = [3, 6] if on_cuda else [60]
    return args


def main(argv=None):
    args = parse_args(argv)
    batch_size, block_size = SHAPES[args.shape]
    say(f"{args.shape}: {batch_size} x {block_size} tokens of {args.data}, on "
        f"{device_name(args.device)}, torch {torch.__version__}")
    rows = []
    with tempfile.TemporaryDirectory() as dir:
        corpus = load_text(args, dir)
        step_ms = time_steps(args, corpus)
        print_steps(step_ms)
        for seconds in args.budgets:
            say(f"\nAfter about {seconds:g} seconds of training:")
            of_budget = []
            for recipe in args.only:
                of_budget.append(
                    train_for(seconds, recipe, args, corpus, step_ms[recipe], dir)
                )
            print_budgets(of_budget)
            rows += of_budget
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, {
            "device": device_name(args.device), "torch": torch.__version__,
            "shape": args.shape, "batch": batch_size, "block": block_size,
            "data": args.data, "vocab_size": args.vocab_size, "rounds": args.rounds,
            "compiled": not args.no_compile, "dropout": args.dropout, "step_ms": step_ms,
            "budgets": rows,
        })


if __name__ == "__main__":
    main()
