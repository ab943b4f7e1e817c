"""
A base in four bits beside one in float32 and bfloat16: what it costs and what it saves.

    python bench/nf4.py steps --shape gpt2-xl --recompute
    python bench/nf4.py command --shape gpt2-xl --recompute
    python bench/nf4.py quality --minutes 8

steps      one training step of LoRA for each base, and of full fine-tuning: its time, all
           in turn, round after round, and its peak memory
command    the whole command `train.py tune`, from reading the base to writing the
           adapter, in a process of its own: the peak memory of the GPU and of the host
quality    bits per byte of held-out text after tuning, for each base, text and seed.
           Finished runs are kept in --work: after --minutes it stops, and the same
           command continues

Each writes its results into --out, by convention bench/results/nf4/<machine>-<what>.json.

With --mini everything is so small that a CPU needs seconds. bench/nf4_table.py makes the
tables of docs/four_bits.md.
"""
import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from data import HELDOUT, read_text
from data.bpe import train_bpe
from gpt import GPT, PRESETS, GPTConfig
from lab.capture import WARMUP, captured
from lab.console import aligned, device_name, size
from lab.files import write_json
from lab.measure import measure_memory, round_robin, timed
from lab.models import load_corpus, load_model, save_model
from lab.nf4 import LAYERS, quantize_linears
from lab.progress import best_of
from lab.runs import MAY
from lab.settings import RECIPES, Settings, default_dtype, default_loss_chunk, settings_of
from lora_minimal import apply_lora, load_lora

BASES = ("float32", "bfloat16", "float16", "nf4")
CHILD = "child"                             # this script, as started by itself
FULL = "full"                               # full fine-tuning: no frozen base
TEXTS = ("pirate", "bard", "noir")
# {preset: the batch (B, T) of a step}
SHAPES = {"tiny": (16, 128), "small": (32, 256), "gpt2": (8, 1024), "gpt2-xl": (1, 1024)}
# {preset: the recipe that it is trained with, on any device}
RECIPE_OF = {"tiny": "cpu", "small": "gpu"}


# ---- steps -------------------------------------------------------------------------

def measure_steps(args):
    """A row for each base: the median time of a step, and its peak memory."""
    config = GPTConfig.preset(args.shape)
    batch = SHAPES[args.shape]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(config.vocab_size, (2, *batch), generator=generator).to(args.device)
    peaks, weights, steps = {}, {}, {}
    for base in args.bases:
        step = make_step(args, base, config)
        memory = measure_memory(step, x, y)
        peaks[base], weights[base] = memory["peak"], memory["weights"]
        steps[base] = captured(step)
        for _ in range(WARMUP + 1):         # on CUDA the last of these is the capture
            steps[base](x, y)
    samplers = {}
    for base, step in steps.items():
        samplers[base] = timed(partial(step, x, y), args.device, args.repeat)
    seconds = round_robin(samplers, args.rounds, title="rounds")
    rows = []
    for base in args.bases:
        samples = [1000 * each for each in seconds[base]]
        rows.append({
            "base": base, "step_ms": statistics.median(samples), "samples_ms": samples,
            "peak_bytes": peaks[base], "weight_bytes": weights[base],
        })
    return rows


def make_step(args, base, config):
    """A train.Step: LoRA on a base, or full fine-tuning. Random weights, always the same."""
    torch.manual_seed(0)
    with torch.device(args.device):
        model = GPT(config)
    dtype = "float16" if base == "float16" else args.dtype
    if base == "nf4":
        quantize_linears(model)
        model.to(getattr(torch, dtype))     # embeddings, norms and biases
    elif base != FULL:
        model.to(getattr(torch, base))
    if base != FULL:
        apply_lora(model, r=8, alpha=16, layers=LAYERS)
    batch_size, block_size = SHAPES[args.shape]
    return train.Step(model.train(), Settings(
        steps=1000, batch_size=batch_size, block_size=block_size, lr=1e-4, dtype=dtype,
        base_dtype="float32" if base == FULL else base, recompute=args.recompute,
        graph=not args.eager, loss_chunk=default_loss_chunk(args.device, base == FULL),
    ))


def print_steps(rows):
    by_base = {row["base"]: row for row in rows}
    reference = by_base.get("bfloat16", rows[0])
    cells = [("base", "step", f"÷ {reference['base']}", "peak", "weights")]
    for row in rows:
        cells.append((
            row["base"], f"{row['step_ms']:.2f} ms",
            f"{row['step_ms'] / reference['step_ms']:.3f}",
            size(row["peak_bytes"]), size(row["weight_bytes"]),
        ))
    print(aligned(cells))


# ---- the whole command -------------------------------------------------------------

def measure_commands(args):
    """A row for each base: the peak memory of `train.py tune` in a process of its own."""
    base_dir = args.work / f"base-{args.shape}"
    if not (base_dir / "config.json").exists():
        write_random_base(args, base_dir)
    batch_size, block_size = SHAPES[args.shape]
    rows = []
    for base in args.bases:
        argv = [
            "tune", "--base", base_dir, "--data", args.text, "--out", args.work / f"tuned-{base}",
            "--base-dtype", base, "--batch-size", batch_size,
            "--block-size", block_size, "--steps", args.steps, "--eval-every", args.steps,
            "--device", args.device, "--fresh",
        ]
        argv += ["--dtype", "float16" if base == "float16" else args.dtype]
        if args.recompute:
            argv.append("--recompute")
        rows.append({"base": base, **in_own_process(list(map(str, argv)))})
    return rows


def write_random_base(args, dir):
    """A model directory of a shape: random weights, and a tokenizer that is small."""
    torch.manual_seed(0)
    with torch.device(args.device):
        model = GPT(GPTConfig.preset(args.shape))
    text = read_text(args.text, HELDOUT, dir)
    save_model(model, train_bpe(text.all_train), dir)


def in_own_process(argv):
    """Run train.py with these arguments in a new process. Returns what child() measures."""
    with tempfile.TemporaryDirectory() as dir:
        path = Path(dir, "measured.json")
        print("python train.py " + " ".join(argv), flush=True)
        subprocess.run([sys.executable, __file__, CHILD, path, *argv], check=True)
        return json.loads(path.read_text(encoding="utf-8"))


def child(path, argv):
    """Run train.main, and write the peak memory of this process into a file."""
    start = time.perf_counter()
    code = train.main(argv)
    if code != 0:
        sys.exit(code)
    measured = {
        "argv": argv,
        "seconds": time.perf_counter() - start,
        "host_bytes": peak_of_host(),
        "gpu_allocated_bytes": None,
        "gpu_reserved_bytes": None,
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        measured["gpu_allocated_bytes"] = torch.cuda.max_memory_allocated()
        measured["gpu_reserved_bytes"] = torch.cuda.max_memory_reserved()
    write_json(Path(path), measured)


def peak_of_host():
    """The most memory that this process has had in RAM, in bytes, or None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def print_commands(rows):
    cells = [("base", "GPU allocated", "GPU reserved", "host", "time")]
    for row in rows:
        cells.append((
            row["base"], shown(row["gpu_allocated_bytes"]), shown(row["gpu_reserved_bytes"]),
            shown(row["host_bytes"]), f"{row['seconds']:.0f} s",
        ))
    print(aligned(cells))


def shown(n):
    return "-" if n is None else size(n)


# ---- quality -----------------------------------------------------------------------

def measure_quality(args):
    """A row for each shape, base, text and seed that has been tuned until the time is up."""
    end = time.perf_counter() + 60 * args.minutes
    rows = []
    for shape in args.shapes:
        base = args.work / f"base-{shape}"
        with open(args.work / "log.txt", "a", encoding="utf-8") as log:
            with contextlib.redirect_stdout(log):
                train.pretrain(
                    "tales", base, preset=shape, device=args.device, resume=MAY,
                    cache_dir=args.work, **chosen(args, shape, "pretrain"),
                )
                for seed in range(args.seeds):
                    rows += tune_on_texts(args, shape, base, seed, end)
    return rows


def tune_on_texts(args, shape, base, seed, end):
    """Tune with one seed, for each text and each base in turn. Stops when the time is up."""
    rows = []
    for text in args.texts:
        for base_dtype in args.bases:
            if time.perf_counter() > end:
                return rows
            out = args.work / f"{shape}-{text}-{base_dtype}-{seed}"
            settings = chosen(args, shape, "lora")
            if base_dtype == "float16":
                settings["dtype"] = "float16"
            record = train.tune(
                base, text, out, device=args.device, resume=MAY, cache_dir=args.work, seed=seed,
                base_dtype=base_dtype, **settings,
            )
            rows.append({
                "shape": shape, "text": text, "seed": seed, "base": base_dtype,
                "bpb_before": record["curve"][0]["bpb"],
                "bpb": best_of(record["curve"])["bpb"],
                "bpb_on_float_base": bpb_on_float_base(args, base, text, out, record),
            })
    return rows


def bpb_on_float_base(args, base, text, out, record):
    """Bits per byte of the adapter with the base in float32, as merging would give it."""
    model, encoding, _ = load_model(base, args.device)
    load_lora(model, out)
    settings = settings_of(record)
    corpus = load_corpus(text, encoding, args.work, settings.block_size)
    return train.evaluate_as_trained(model, corpus, settings)


def chosen(args, shape, kind):
    """The settings of the recipe of a shape, the same on any device."""
    settings = {**RECIPES[RECIPE_OF[shape]][kind], "dtype": args.dtype}
    if args.mini:
        settings |= {"steps": 2, "batch_size": 2, "eval_every": 2}
    return settings


def print_quality(rows):
    """For each shape and base the mean of bpb, and of its ratio to the bfloat16 base."""
    cells = [("shape, base", "runs", "bpb", "÷ bfloat16", "on the float base")]
    for summary in summaries(rows):
        ratio = summary["ratio"]
        cells.append((
            f"{summary['shape']}, {summary['base']}", str(summary["runs"]),
            f"{summary['bpb']:.4f}", "-" if ratio is None else f"{ratio:.4f}",
            f"{summary['bpb_on_float_base']:.4f}",
        ))
    print(aligned(cells))


def summaries(rows):
    """[{"shape", "base", "runs", "bpb", "bpb_on_float_base", "ratio"}]: means over the runs.

    The ratio is that of two runs with the same text and seed, the second with the
    bfloat16 base.
    """
    reference = {}
    groups = {}
    for row in rows:
        groups.setdefault((row["shape"], row["base"]), []).append(row)
        if row["base"] == "bfloat16":
            reference[row["shape"], row["text"], row["seed"]] = row["bpb"]
    found = []
    for (shape, base), group in groups.items():
        ratios = []
        for row in group:
            other = reference.get((shape, row["text"], row["seed"]))
            if other is not None:
                ratios.append(row["bpb"] / other)
        found.append({
            "shape": shape, "base": base, "runs": len(group),
            "bpb": statistics.mean(row["bpb"] for row in group),
            "bpb_on_float_base": statistics.mean(row["bpb_on_float_base"] for row in group),
            "ratio": statistics.mean(ratios) if ratios else None,
        })
    return found


# ---- the command line --------------------------------------------------------------

PARTS = {
    "steps": (measure_steps, print_steps),
    "command": (measure_commands, print_commands),
    "quality": (measure_quality, print_quality),
}


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of matrix products; default: what train.py uses on the device")
    add("--bases", nargs="+", choices=(FULL, *BASES),
        help="default: float32 bfloat16 nf4, and for steps also full fine-tuning")
    add("--shape", choices=PRESETS.keys() & SHAPES.keys(), default="tiny",
        help="of steps and command; default: tiny")
    add("--recompute", action="store_true", help="gradient checkpointing, in steps and command")
    add("--eager", action="store_true", help="do not capture the step in a CUDA graph")
    add("--rounds", type=int, default=15, help="how often each step is timed; default: 15")
    add("--repeat", type=int, default=1, help="steps of one kind in a round; default: 1")
    add("--steps", type=int, default=20, help="of command; default: 20")
    add("--shapes", nargs="+", choices=RECIPE_OF, default=["tiny", "small"], help="of quality")
    add("--text", default="pirate", help="of command; default: pirate")
    add("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="of quality")
    add("--seeds", type=int, default=3)
    add("--minutes", type=float, default=60, help="after this quality starts no other run")
    add("--work", type=Path, default=Path("out", "nf4"), help="for bases and runs")
    add("--mini", action="store_true", help="quality with two steps a run")
    add("--out", type=Path, help="write the results into this file")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or default_dtype(args.device)
    args.bases = args.bases or default_bases(args.part)
    if args.part != "steps" and FULL in args.bases:
        parser.error("full fine-tuning has no base in another dtype: it is for steps only")
    return args


def default_bases(part):
    bases = ["float32", "bfloat16", "nf4"]
    return [FULL, *bases] if part == "steps" else bases


def main(argv=None):
    args = parse_args(argv)
    if args.part != "steps":
        args.work.mkdir(parents=True, exist_ok=True)
    measure, show = PARTS[args.part]
    rows = measure(args)
    print(f"{args.part}, on {device_name(args.device)}, torch {torch.__version__}")
    show(rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {
            "part": args.part, "device": device_name(args.device), "torch": torch.__version__,
            "shape": args.shape, "batch": SHAPES[args.shape], "recompute": args.recompute,
            "captured": not args.eager and args.device.startswith("cuda"),
            "dtype": args.dtype, "rows": rows,
        })


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
