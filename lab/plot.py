"""
The picture of a comparison: memory by kind, the gradients and optimizer state alone
(beside the activations they can be too small to see), time by phase, and the held-out
loss while training.
"""
import warnings

from matplotlib.figure import Figure

from lab.console import size
from lab.files import replacing
from lab.report import METHODS, as_ms

MEMORY = {
    #  kind          color      hatch
    "weights":     ("#0072B2", ""),
    "gradients":   ("#E69F00", "//"),
    "optimizer":   ("#009E73", ".."),
    "activations": ("#CCCCCC", ""),
}
TIME = {
    #  phase          color      hatch
    "forward_ms":   ("#0072B2", ""),
    "backward_ms":  ("#E69F00", "//"),
    "optimizer_ms": ("#009E73", ".."),
}
BY_TRAINED_PARAMETERS = {kind: MEMORY[kind] for kind in ("gradients", "optimizer")}


def plot_comparison(report, curves, style, path):
    """Draw comparison.json (report) and the training curves {method: [point, ...]} into a PNG."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")    # needs no screen, unlike pyplot
    (memory_axes, part_axes), (time_axes, bpb_axes) = figure.subplots(2, 2)
    bars, alike = bars_of(report), report["like_for_like"]
    memory = {name: costs["memory"] for name, costs in bars.items()}
    times = {name: costs["time"] for name, costs in bars.items()}

    tops = stack(memory_axes, memory, MEMORY, scale=1e6)
    mark(memory_axes, memory, "peak", "peak of a step", scale=1e6, show=size, above=tops)
    title = f"Memory of a step (full ÷ LoRA: {alike['memory']:.2f}, like for like)"
    memory_axes.set(ylabel="memory (MB)", title=title)

    tops = stack(part_axes, memory, BY_TRAINED_PARAMETERS, scale=1e6)
    for i, top in enumerate(tops):
        write_above(part_axes, i, top, size(1e6 * top))
    part_axes.set(ylabel="memory (MB)", title="Of that, gradients and optimizer alone")

    tops = stack(time_axes, times, TIME, scale=1)
    mark(time_axes, times, "step_ms", "a whole step", scale=1, show=as_ms, above=tops)
    title = f"Time of a step (full ÷ LoRA: {alike['speed']:.2f}, like for like)"
    time_axes.set(ylabel="time (ms per step)", title=title)

    plot_curves(bpb_axes, curves)
    title = f"Held-out {style}".replace("$", r"\$")       # not mathematics
    bpb_axes.set(xlabel="training time (s)", ylabel="bits per byte", title=title)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")      # in a title, of no font here
        figure.savefig(temporary, dpi=120, format="png")


def bars_of(report):
    """{the name of a bar: costs}. LoRA has two bars if by default it is not like for like."""
    full, lora = (report["methods"][method] for method in METHODS)
    alike = report["like_for_like"]["lora"]
    if alike["time"] == lora["time"]:
        return {METHODS["full"]: full, METHODS["lora"]: lora}
    return {METHODS["full"]: full, "LoRA, like for like": alike, "LoRA by default": lora}


def stack(axes, bars, kinds, scale):
    """Draw {name: {kind: number}} as a stacked bar for each name. Returns the tops of the bars."""
    tops = [0.0] * len(bars)
    for kind, (color, hatch) in kinds.items():
        values = [numbers[kind] / scale for numbers in bars.values()]
        label = kind.removesuffix("_ms")
        axes.bar(
            list(bars), values, bottom=tops, width=0.6, label=label, color=color,
            hatch=hatch, edgecolor="white",
        )
        tops = [below + value for below, value in zip(tops, values)]
    axes.set_ylim(0, 1.4 * max(tops))
    axes.legend(loc="upper center", ncols=3, fontsize="small", frameon=False)
    return tops


def mark(axes, bars, kind, label, scale, show, above):
    """Mark the number of one kind on each bar, and write it in words above the bar."""
    values = [numbers[kind] for numbers in bars.values()]
    heights = [value / scale for value in values]
    axes.plot(list(bars), heights, "D", color="black", markersize=5, label=label)
    for i, value in enumerate(values):
        write_above(axes, i, max(heights[i], above[i]), show(value))
    axes.set_ylim(0, 1.4 * max(heights + above))
    axes.legend(loc="upper center", ncols=3, fontsize="small", frameon=False)


def write_above(axes, i, height, text):
    """Write a text above the height on bar i."""
    axes.annotate(text, (i, height), (0, 6), textcoords="offset points", ha="center")


def plot_curves(axes, curves):
    """Draw the held-out loss of each method against the time of training."""
    for method, color, line in (("full", "#D55E00", "--"), ("lora", "#0072B2", "-")):
        seconds = [point["seconds"] for point in curves[method]]
        bpb = [point["bpb"] for point in curves[method]]
        look = dict(marker="o", markersize=3, color=color, label=METHODS[method])
        axes.plot(seconds, bpb, line, **look)
    axes.legend(frameon=False)
