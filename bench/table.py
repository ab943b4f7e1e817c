"""
Make the README's table of measurements from bench/results/*.json:  python bench/table.py
"""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- made by bench/table.py -->\n", "<!-- end of what bench/table.py made -->"
NAMES = {"laptop": "1M, 16 × 128", "tiny": "11M, 32 × 256", "gpt2": "GPT-2 124M, 8 × 1024", "gpt2-xl": "GPT-2 XL 1.6B, 1 × 1024"}
LIBRARIES = ("full, chunked loss", "naive", "PEFT", "loralib", "ours, float32 base", "ours")


def table():
    lines = ["| machine | model, batch | step | layers | " + " | ".join(LIBRARIES) + " |",
             "|---" * (4 + len(LIBRARIES)) + "|"]
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("*.json"))]
    for result in sorted(results, key=lambda r: ("NVIDIA" in r["device"], list(NAMES).index(r["shape"]), r["recompute"])):
        for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
            for targets in ("all", "attention"):
                found = {row["library"]: row for row in result["rows"]
                         if row["mode"] == mode and row["targets"] in (targets, "-")}
                if any(row["targets"] == targets for row in found.values()):
                    cells = ["{speedup_vs_full:.2f} / {memory_vs_full:.2f}".format(**found[name]) if name in found
                             else "" for name in LIBRARIES]
                    cells[-1] = f"**{cells[-1]}**" if cells[-1] else ""
                    chunk = f", 2^{result['loss_chunk'].bit_length() - 1}" if result["loss_chunk"] else ""
                    how = mode + chunk + (", recomputed" if result["recompute"] else "")
                    lines.append("| " + " | ".join([result["device"].replace("x86_64 CPU, 2 threads", "2 CPU cores"),
                                                    NAMES[result["shape"]], how, targets, *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    (ROOT / "README.md").write_text(before + BEGIN + table() + END + after, encoding="utf-8")
