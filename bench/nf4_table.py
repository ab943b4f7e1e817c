"""
The tables of docs/four_bits.md: predicted by arithmetic, and measured by bench/nf4.py.

    python bench/nf4_table.py               write them into the page, between the two markers
    python bench/nf4_table.py --check       only compare: exit code 1 if the page has others
"""
import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.nf4 import summaries
from bench.parts import differences, with_part
from gpt import GPT, GPTConfig
from lab.console import size
from lab.nf4 import LAYERS, quantize_linears
from lab.predict import predict_memory
from lab.settings import Settings, default_loss_chunk
from lora_minimal import apply_lora

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "four_bits.md"
RESULTS = ROOT / "bench" / "results" / "nf4"
PRESETS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def tables():
    """All tables as Markdown."""
    parts = [f"**Predicted**, a LoRA step of 1 × 1024 tokens in 16 bits:\n\n{predicted()}"]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    for result in sorted(results, key=place):
        title = f"**Measured** on {result['device']}, torch {result['torch']}"
        parts.append(f"{title}: {SHOW[result['part']](result)}")
    return "\n".join(parts)


def place(result):
    """The place of a result among the tables: steps first, the float16 ones after the others."""
    bases = [row["base"] for row in result["rows"]]
    return (
        list(SHOW).index(result["part"]), "bfloat16" not in bases, not result.get("recompute"),
    )


def markdown(rows):
    """Rows of cells as a Markdown table; the first row is the header."""
    first, *others = rows
    lines = [first, ["---"] * len(first), *others]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# ---- predicted ---------------------------------------------------------------------

def predicted():
    """What lab/predict.py says of the presets, for a base in 16 and in four bits."""
    rows = [["model", "16 bits", "four bits", "recomputed: 16 bits", "four bits"]]
    for preset in PRESETS:
        models = [adapted_model(preset, nf4) for nf4 in (False, True)]
        cells = [f"`{preset}`"]
        for recompute in (False, True):
            for model in models:
                cells.append(size(sum(prediction(model, recompute).values())))
        rows.append(cells)
    return markdown(rows)


def adapted_model(preset, nf4):
    """A model with LoRA on the meta device, where it needs no memory."""
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(preset))
    model.bfloat16()
    if nf4:
        quantize_linears(model)
    apply_lora(model, r=8, layers=LAYERS)
    return model


def prediction(model, recompute):
    """{kind: bytes} of a training step."""
    settings = Settings(
        steps=1, batch_size=1, block_size=1024, lr=1e-4, dtype="bfloat16",
        loss_chunk=default_loss_chunk("cuda", head_trains=False), recompute=recompute,
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    step = SimpleNamespace(model=model, settings=settings, trained=trained)
    return predict_memory(step, torch.empty(1, 1024, device="meta"))


# ---- measured ----------------------------------------------------------------------

def show_steps(result):
    batch, block = result["batch"]
    how = "recomputed, " if result["recompute"] else ""
    how += "captured" if result["captured"] else "eager"
    by_base = {row["base"]: row for row in result["rows"]}
    reference = "bfloat16" if "bfloat16" in by_base else "float16"
    if reference == "float16":
        how += ", with `--dtype float16`"
    rows = [["base", "step", f"÷ {reference}", "peak of a step", "weights"]]
    for row in result["rows"]:
        ratio = row["step_ms"] / by_base[reference]["step_ms"]
        rows.append([
            name_of_base(row["base"]), f"{row['step_ms']:.1f} ms", f"{ratio:.2f}",
            size(row["peak_bytes"]), size(row["weight_bytes"]),
        ])
    return f"a step of `{result['shape']}`, {batch} × {block}, {how}\n\n{markdown(rows)}"


def show_command(result):
    batch, block = result["batch"]
    how = ", recomputed" if result["recompute"] else ""
    rows = [["base", "GPU: tensors", "GPU: reserved by torch", "host"]]
    for row in result["rows"]:
        kinds = ("gpu_allocated_bytes", "gpu_reserved_bytes", "host_bytes")
        cells = ["-" if row[kind] is None else size(row[kind]) for kind in kinds]
        rows.append([name_of_base(row["base"]), *cells])
    title = f"peaks of the whole command `tune`, `{result['shape']}`, {batch} × {block}{how}"
    return f"{title}\n\n{markdown(rows)}"


def show_quality(result):
    rows = [["model, base", "runs", "held out", "÷ bfloat16", "adapter on the float base"]]
    for summary in summaries(result["rows"]):
        ratio = summary["ratio"]
        rows.append([
            f"`{summary['shape']}`, {name_of_base(summary['base'])}", str(summary["runs"]),
            f"{summary['bpb']:.4f} bpb", "-" if ratio is None else f"{ratio:.4f}",
            f"{summary['bpb_on_float_base']:.4f} bpb",
        ])
    texts = sorted({row["text"] for row in result["rows"]})
    return f"bits per byte after tuning, mean over {', '.join(texts)} and seeds\n\n{markdown(rows)}"


SHOW = {"steps": show_steps, "command": show_command, "quality": show_quality}


def name_of_base(base):
    return "full fine-tuning" if base == "full" else f"LoRA, {base} base"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    old = PAGE.read_text(encoding="utf-8")
    new = with_part(old, "bench/nf4_table.py", tables())
    if args.check:
        found = differences(old, new, "docs/four_bits.md")
        sys.stdout.writelines(found)
        return 1 if found else 0
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
