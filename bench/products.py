"""
How long each matrix product of a LoRA layer takes, in the orders that
lora_minimal.LoRAProduct chooses between.

    python bench/products.py            128 -> 512, 2,048 tokens, on the CPU
    python bench/products.py --device cuda --dtype bfloat16 \\
        --features 768 3072 --tokens 8192

The products are timed in turn, round after round; the table has the medians. On CUDA
each product is repeated in a CUDA graph, so that its own time counts and not its launch.
"""
import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from lab.capture import WARMUP
from lab.console import aligned, device_name
from lab.measure import round_robin, timed
from lora_minimal import folded, scaled_transpose

REPEAT_ON_CPU = 5
REPEAT_IN_GRAPH = 200       # a replay and its end take some 20 µs: 0.1 µs for each product


def products(N, n_in, n_out, r, device, dtype):
    """{what is computed, and how: a function that computes it} for N tokens.

    The names are those of lora_minimal.LoRAProduct, with s = 1.
    """
    random = partial(torch.randn, device=device, dtype=dtype)
    W, b = random(n_out, n_in), random(n_out)
    A, B = random(r, n_in), random(n_out, r)
    x, u = random(N, n_in), random(N, r)
    y = random(N, n_out)
    g, v = random(N, n_out), random(N, r)
    dx = random(N, n_in)
    Bt = scaled_transpose(B, 1, dtype)
    return {
        "x Wᵀ + b, forward": partial(F.linear, x, W, b),
        "g W, gradient of x": partial(torch.mm, g, W),
        "gᵀ x, gradient of W (full fine-tuning only)": partial(torch.mm, g.t(), x),
        "u = x Aᵀ": partial(torch.mm, x, A.t()),
        "y += u Bᵀ": partial(y.addmm_, u, B.t()),
        "v = g B": partial(torch.mm, g, B),
        "v = g B, with Bᵀ stored contiguously": partial(mm_after_copy, g, B),
        "gradient of B: gᵀ u": partial(torch.mm, g.t(), u),
        "gradient of B: (uᵀ g)ᵀ": partial(transposed_mm, u.t(), g),
        "gradient of A: vᵀ x": partial(torch.mm, v.t(), x),
        "∂x += v A": partial(dx.addmm_, v, A),
        "W + B A, W in float32": partial(folded, W.float(), A, Bt),
    }


def mm_after_copy(g, B):
    """g B; it includes the time to copy Bᵀ."""
    return g @ B.t().contiguous().t()


def transposed_mm(P, Q):
    """(P Q)ᵀ; the transposition itself is only a view."""
    return (P @ Q).t()


def sampler(product, device):
    """A sampler for lab.measure.round_robin: returns the seconds of one product."""
    if device == "cpu":
        return timed(product, device, REPEAT_ON_CPU)
    graph = repeated_in_graph(product, REPEAT_IN_GRAPH)
    seconds_of_graph = timed(graph.replay, device)

    def sample():
        return seconds_of_graph() / REPEAT_IN_GRAPH
    return sample


def repeated_in_graph(product, repeat):
    """A CUDA graph that computes a product `repeat` times."""
    for _ in range(WARMUP):
        product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            product()
    return graph


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--features", nargs=2, type=int, default=[128, 512], metavar=("IN", "OUT"),
        help="the shape of W; default: 128 512")
    add("--tokens", type=int, default=2048, help="rows of x; default: 2048")
    add("--r", type=int, default=8, help="rank; default: 8")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of x, W, A and B; default: float32")
    add("--rounds", type=int, default=40, help="how often each is timed; default: 40")
    return parser.parse_args()


def main():
    args = parse_args()
    n_in, n_out = args.features
    dtype = getattr(torch, args.dtype)
    all_products = products(args.tokens, n_in, n_out, args.r, args.device, dtype)
    samplers = {}
    for name, product in all_products.items():
        samplers[name] = sampler(product, args.device)
    seconds = round_robin(samplers, args.rounds, warmup=1, title="rounds")

    print(f"{n_in} -> {n_out}, {args.tokens:,} tokens, r = {args.r}, {args.dtype}, on "
          f"{device_name(args.device)}, torch {torch.__version__}")
    rows = [("product", "median")]
    for name, samples in seconds.items():
        microseconds = 1e6 * statistics.median(samples)
        rows.append((name, f"{microseconds:.0f} µs"))
    print(aligned(rows))


if __name__ == "__main__":
    main()
