"""
What each matrix product of a LoRA layer's step takes, in the orders that LoRAProduct (lora_minimal.py) chooses between.

    python bench/products.py                                                   128 -> 512, 2,048 tokens, on the CPU
    python bench/products.py --device cuda --dtype bfloat16 --features 768 3072 --tokens 8192

The products are timed in turn, round by round; medians in microseconds. On CUDA each is captured in a graph and repeated
in it, so that what is timed is the product and not its launch.
"""
import argparse
import statistics
import time

import torch
from torch.nn import functional as F


def products(N, inside, outside, r, device, dtype):
    """{what it computes, and how: a function that does it}"""
    def random(*shape, dtype=dtype):
        return torch.randn(*shape, device=device, dtype=dtype)

    x, g, y, dx, u, v = (random(N, n) for n in (inside, outside, outside, inside, r, r))
    W, A, B, b = random(outside, inside), random(r, inside), random(outside, r), random(outside)
    W32 = W.float()
    return {
        "x Wᵀ + b, forward": lambda: F.linear(x, W, b),
        "g W, gradient of x": lambda: g @ W,
        "gᵀ x, gradient of W (full fine-tuning only)": lambda: g.t() @ x,
        "u = x Aᵀ": lambda: x @ A.t(),
        "y += u Bᵀ": lambda: y.addmm_(u, B.t()),
        "v = g B": lambda: g @ B,
        "v = g B, Bᵀ laid out anew": lambda: g @ B.t().contiguous().t(),
        "gradient of B: gᵀ u": lambda: g.t() @ u,
        "gradient of B: (uᵀ g)ᵀ": lambda: (u.t() @ g).t(),
        "gradient of A: vᵀ x": lambda: v.t() @ x,
        "∂x += v A": lambda: dx.addmm_(v, A),
        "W + B A, W in float32": lambda: (torch.addmm(W32, B, A) if dtype == torch.float32 else
                                          torch.add(W32, B @ A, out=torch.empty_like(W))),
    }


def timer(f, device, repeat):
    """-> a function that does f `repeat` times and says how many microseconds one took."""
    for _ in range(3):
        f()
    if device != "cuda":
        def run():
            clock = time.perf_counter()
            for _ in range(repeat):
                f()
            return (time.perf_counter() - clock) / repeat * 1e6
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            f()

    def run():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeat * 1e3
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", nargs=2, type=int, default=[128, 512], metavar=("IN", "OUT"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    made = products(args.tokens, *args.features, args.r, args.device, getattr(torch, args.dtype))
    timers = {name: timer(f, args.device, repeat=5) for name, f in made.items()}
    times = {name: [] for name in timers}
    for _ in range(args.rounds):
        for name, run in timers.items():
            times[name].append(run())
    for name, values in times.items():
        print(f"{name:<45} {statistics.median(values):>8.0f} µs")


if __name__ == "__main__":
    main()
