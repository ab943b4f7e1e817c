"""
The measured parts of README.md and docs/, made from result files.

    python docs/write.py                write them
    python docs/write.py --check        only compare: exit code 1 if a page says something else

A part stands between two comments, "made by docs/write.py: <its name>" and "end". The
results are those of bench/ in bench/results/, and of two commands in docs/runs/:

    python train.py --out out | tee docs/runs/story.txt         and out/comparison.json
    python train.py voices --out out | tee docs/runs/voices.txt
"""
import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import differences
from bench.table import SHAPES, read_results, table
from lab.console import size

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "docs" / "runs"
PART = re.compile(r"(<!-- made by docs/write.py: ([^\n]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NAMES = {
    "tiny": "1M", "small": "11M", "gpt2": "GPT-2 124M", "gpt2-xl": "GPT-2 XL 1.6B",
}


# ---- the results ---------------------------------------------------------------------------------

def peers_row(library, shape, mode, recompute=False, targets="all"):
    """The row of bench/peers.py for a library, with its device; None if there is none."""
    for result in read_results():
        if (result["shape"], result["recompute"]) != (shape, recompute):
            continue
        for row in result["rows"]:
            is_this = row["library"] == library and row["mode"] == mode
            if is_this and row["targets"] in ("-", targets):
                return {**row, "device": result["device"]}
    return None


def machine_of(row):
    """The machine of a row, in a word or two."""
    if "NVIDIA" not in row["device"]:
        return "two CPU cores"
    return row["device"].removeprefix("NVIDIA ")


def read_json(name):
    return json.loads((RUNS / name).read_text(encoding="utf-8"))


def read_lines(name):
    return (RUNS / name).read_text(encoding="utf-8").splitlines()


def markdown(rows):
    """Rows of cells as a table in Markdown; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"


def quoted(lines):
    """Lines of output as a block in Markdown."""
    return "\n".join(["```", *lines, "```", ""])


# ---- the parts -----------------------------------------------------------------------------------

def three_numbers():
    """What LoRA saves, in three numbers with their conditions."""
    methods = read_json("comparison.json")["methods"]
    full_disk, lora_disk = (methods[name]["checkpoint_bytes"] for name in ("full", "lora"))
    xl = steps_of_xl(recompute=True)
    full_peak, lora_peak, bfloat16_peak = (
        xl[base]["peak_bytes"] for base in ("full", "float32", "bfloat16")
    )
    full_124 = peers_row("full, chunked loss", "gpt2", "captured")
    lora_124 = peers_row("ours, float32 base", "gpt2", "captured")
    full_ms, lora_ms = full_124["step_ms"], lora_124["step_ms"]
    return markdown([
        ("measured", "full fine-tuning", "LoRA", "", "condition"),
        ("size on disk", size(full_disk), size(lora_disk),
         f"{full_disk / lora_disk:.0f} × smaller", "the 1M model of the run below"),
        ("memory of a step", size(full_peak), size(lora_peak),
         f"{full_peak / lora_peak:.1f} × less",
         f"GPT-2 XL, 1 × 1024 tokens, {machine_of(xl['full'])}, blocks recomputed. A frozen base "
         f"can also be stored in bfloat16: {size(bfloat16_peak)}, "
         f"{full_peak / bfloat16_peak:.1f} × less"),
        ("time of a step", f"{full_ms:.1f} ms", f"{lora_ms:.1f} ms",
         f"{full_ms / lora_ms:.2f} × faster",
         f"GPT-2 124M, 8 × 1024 tokens, {machine_of(full_124)}, with the backward pass of "
         "`LoRAProduct`"),
    ])


def like_for_like():
    """How many times faster a LoRA step is than full fine-tuning with the same loss."""
    rows = [("model", "machine, step", "base in float32", "base in bfloat16", "PEFT ÷ ours")]
    for shape, mode, recompute in (
        ("tiny", "eager", False), ("small", "captured", False), ("gpt2", "captured", False),
        ("gpt2", "compiled", False),
    ):
        full = peers_row("full, chunked loss", shape, mode, recompute)
        if full is None:
            continue
        machine = machine_of(full)
        in_float32 = peers_row("ours, float32 base", shape, mode, recompute)
        ours = peers_row("ours", shape, mode, recompute)
        if in_float32 is None and not recompute:
            in_float32, ours = ours, None       # a CPU: float32 is its default
        peft = peers_row("PEFT", shape, mode, recompute)
        fastest = min((row["step_ms"] for row in (in_float32, ours) if row), default=None)
        step = f"{mode}, recomputed" if recompute else mode
        rows.append((
            SHAPES[shape], f"{machine}, {step}",
            advantage(full, in_float32), advantage(full, ours),
            f"{peft['step_ms'] / fastest:.2f}" if peft else "",
        ))
    xl = steps_of_xl(recompute=True)
    rows.append((
        SHAPES["gpt2-xl"], f"{machine_of(xl['full'])}, captured, recomputed",
        advantage(xl["full"], xl["float32"]), advantage(xl["full"], xl["bfloat16"]), "",
    ))
    return markdown(rows)


def advantage(full, lora):
    """Time of full ÷ time of LoRA, and the same of memory; "" if LoRA was not measured."""
    if lora is None:
        return ""
    speed = full["step_ms"] / lora["step_ms"]
    memory = full["peak_bytes"] / lora["peak_bytes"]
    return f"{speed:.2f} / {memory:.2f}"


def adapters():
    """The medians of bench/adapters.py."""
    rows = [("model", "switch", "switch, PEFT", "merged forward ÷ base",
             "4 adapters: one by one ÷ one batch")]
    for shape in ("tiny", "small", "gpt2"):
        path = ROOT / "bench" / "results" / "adapters" / f"h200-{shape}.json"
        seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        one_by_one = seconds["generate: 4 adapters one by one"]
        in_one_batch = seconds["generate: 4 adapters in one batch"]
        merged = seconds["forward: merged"] / seconds["forward: base"]
        rows.append((
            NAMES[shape],
            f"{1000 * seconds['switch: ours']:.2f} ms",
            f"{1000 * seconds['switch: PEFT']:.2f} ms",
            f"{merged:.2f}",
            f"{one_by_one / in_one_batch:.2f}",
        ))
    return markdown(rows)


def result_of(*path):
    """A result file of bench/, from its path below bench/results."""
    path = ROOT.joinpath("bench", "results", *path)
    return json.loads(path.read_text(encoding="utf-8"))


def steps_of_xl(recompute):
    """{base: what bench/nf4.py measured of a step of GPT-2 XL, with the device}."""
    name = "h200-xl-recompute.json" if recompute else "h200-xl.json"
    result = result_of("nf4", name)
    return {row["base"]: {**row, "device": result["device"]} for row in result["rows"]}


def billion_parameters():
    """GPT-2 XL in less and less memory: a step, and the whole command."""
    commands = result_of("nf4", "h200-command.json")
    steps = steps_of_xl(recompute=True)
    whole = {row["base"]: row for row in commands["rows"]}
    rows = [("GPT-2 XL, 1 × 1024 tokens, recomputed", "a step", "the whole command",
             "reserved by torch")]
    for name, base in (
        ("full fine-tuning", "full"), ("LoRA, base in bfloat16", "bfloat16"),
        ("LoRA, base in four bits", "nf4"),
    ):
        command = ("", "")
        if base in whole:
            kinds = ("gpu_allocated_bytes", "gpu_reserved_bytes")
            command = tuple(size(whole[base][kind]) for kind in kinds)
        rows.append((name, size(steps[base]["peak_bytes"]), *command))
    return markdown(rows)


def cost_of_gpt2():
    """A step of GPT-2 and GPT-2 XL on a GPU: time and memory of both methods."""
    rows = [("model, batch", "flags", "full fine-tuning", "LoRA")]
    flags = {False: "", True: "`--recompute`"}
    for recompute in flags:
        full = peers_row("full, chunked loss", "gpt2", "captured", recompute)
        lora = peers_row("ours", "gpt2", "captured", recompute)
        rows.append((SHAPES["gpt2"], flags[recompute], cost(full), cost(lora)))
    for recompute in flags:
        xl = steps_of_xl(recompute)
        cells = cost(xl["full"]), cost(xl["bfloat16"])
        rows.append((SHAPES["gpt2-xl"], flags[recompute], *cells))
    nf4 = steps_of_xl(recompute=True)["nf4"]
    rows.append((SHAPES["gpt2-xl"], "`--recompute --base-dtype nf4`", "", cost(nf4)))
    return markdown(rows)


def cost(row):
    return f"{row['step_ms']:.0f} ms, {size(row['peak_bytes'])}"


def pretraining_beside_nanogpt():
    """What bench/pretrain.py measured: a step, and bits per byte after equal seconds."""
    rows = [("machine", "model, batch", "recipe", "a step", "÷ nanoGPT's",
             "bits per byte after about")]
    for path in sorted((ROOT / "bench" / "results" / "pretrain").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        batch = f"{result['batch']} × {result['block']}"
        for recipe, milliseconds in result["step_ms"].items():
            reached = []
            for row in result["budgets"]:
                if row["recipe"] == recipe:
                    reached.append(f"{row['budget_s']:g} s: {row['bpb']:.3f}")
            rows.append((
                machine_of(result), f"{NAMES[result['shape']]}, {batch}", recipe,
                f"{milliseconds:.1f} ms",
                f"{milliseconds / result['step_ms']['nanoGPT']:.2f}", ", ".join(reached),
            ))
    return markdown(rows)


def between(lines, first, last=None):
    """The lines from the one that begins with `first` up to, without it, that with `last`."""
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    if last is None:
        return lines[start:]
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith(last))
    return lines[start:end]


def without_blank_ends(lines):
    """The lines without empty ones at the beginning and at the end."""
    return "\n".join(lines).strip("\n").splitlines()


def run_pretraining():
    """The first evaluations of the story, and the last."""
    lines = without_blank_ends(between(read_lines("story.txt"), "== Pretraining", "== Full"))
    points = [line for line in lines if line.lstrip().startswith("step")]
    head = [line for line in lines if line not in points]
    return quoted([*head, *points[:3], "     ...", points[-1]])


def run_samples():
    """The first three continuations of the story, one of each model."""
    samples = between(read_lines("story.txt"), "the base model ", "the base model ")
    return quoted(without_blank_ends(samples))


def run_findings():
    """What the numbers of the story say."""
    findings = between(read_lines("story.txt"), "By the count", "== One prompt")
    return quoted(without_blank_ends(findings))


def whole_story():
    return quoted(read_lines("story.txt"))


def voices():
    lines = between(read_lines("voices.txt"), "disk space", "* the best")
    legend = next(line for line in read_lines("voices.txt") if line.startswith("* the best"))
    return quoted([*lines, legend])


PARTS = {
    "three numbers": three_numbers,
    "like for like": like_for_like,
    "every library": table,
    "adapters": adapters,
    "a billion parameters": billion_parameters,
    "cost of GPT-2": cost_of_gpt2,
    "beside nanoGPT": pretraining_beside_nanogpt,
    "pretraining": run_pretraining,
    "findings": run_findings,
    "samples": run_samples,
    "whole story": whole_story,
    "voices": voices,
}


# ---- the pages -----------------------------------------------------------------------------------

def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page):
    """The text of a page with its parts made again."""
    def made(match):
        begin, name, _, end = match.groups()
        if name not in PARTS:
            raise SystemExit(f"{page.name} has a part {name!r}; there are: {', '.join(PARTS)}")
        return begin + PARTS[name]() + end

    return PART.sub(made, page.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    differs = False
    for page in pages():
        old, new = page.read_text(encoding="utf-8"), filled(page)
        if not args.check:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            differs = True
            sys.stdout.writelines(differences(old, new, page.name))
    if differs:
        sys.exit(1)


if __name__ == "__main__":
    main()
