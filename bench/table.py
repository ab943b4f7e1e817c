"""
What bench/peers.py measured, from bench/results/*.json, as a table in Markdown.

    python bench/table.py

docs/write.py puts it into docs/measurements.md.
"""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# {shape: what the table says about it}, in the order of the table
SHAPES = {
    "tiny": "1M, 16 × 128",
    "small": "11M, 32 × 256",
    "gpt2": "GPT-2 124M, 8 × 1024",
    "gpt2-xl": "GPT-2 XL 1.6B, 1 × 1024",
}
LIBRARIES = ("full, chunked loss", "naive", "PEFT", "loralib", "ours, float32 base", "ours")


def table():
    """The table as lines of Markdown."""
    header = ["machine", "model, batch", "step", "layers", *LIBRARIES]
    lines = [line(header), "|---" * len(header) + "|"]
    for result in sorted(read_results(), key=order):
        modes = dict.fromkeys(row["mode"] for row in result["rows"])
        for mode in modes:
            for targets in ("all", "attention"):
                found = rows_by_library(result, mode, targets)
                if found:
                    lines.append(line(describe(result, mode, targets) + cells(found)))
    return "\n".join(lines) + "\n"


def line(cells):
    """One line of the table."""
    return "| " + " | ".join(cells) + " |"


def read_results():
    """What bench/peers.py wrote."""
    results = []
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in result:                # else it is of another benchmark
            results.append(result)
    return results


def order(result):
    """The key to sort results by: CPUs first, then the smaller shapes."""
    on_gpu = "NVIDIA" in result["device"]
    return on_gpu, list(SHAPES).index(result["shape"]), result["recompute"]


def rows_by_library(result, mode, targets):
    """{library: its row} for one mode; empty if no library adapted these targets."""
    rows = [row for row in result["rows"] if row["mode"] == mode]
    if not any(row["targets"] == targets for row in rows):
        return {}
    full_or_targets = ("-", targets)        # full fine-tuning has no targets: "-"
    return {row["library"]: row for row in rows if row["targets"] in full_or_targets}


def describe(result, mode, targets):
    """The first cells of a line: what was measured, where and how."""
    step = mode
    if result["loss_chunk"]:
        exponent = result["loss_chunk"].bit_length() - 1
        step += f", 2^{exponent}"
    if result["recompute"]:
        step += ", recomputed"
    machine = result["device"].replace("x86_64 CPU, 2 threads", "2 CPU cores")
    return [machine, SHAPES[result["shape"]], step, targets]


def cells(found):
    """The other cells of a line, from {library: row}: time / memory of each library, or nothing."""
    texts = []
    for library in LIBRARIES:
        text = ""
        if library in found:
            row = found[library]
            text = f"{row['speedup_vs_full']:.2f} / {row['memory_vs_full']:.2f}"
        if text and library == "ours":
            text = f"**{text}**"
        texts.append(text)
    return texts


if __name__ == "__main__":
    print(table(), end="")
