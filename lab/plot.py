"""
The picture of a comparison: memory by kind, time by phase, and the held-out loss
while training.
"""
import warnings

from matplotlib.figure import Figure

from lab.files import replacing
from lab.report import METHODS

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


def plot_comparison(report, curves, style, path):
    """Draw comparison.json (report) and the training curves {method: [point, ...]} into a PNG."""
    figure = Figure(figsize=(13, 4), layout="constrained")      # needs no screen, unlike pyplot
    memory_axes, time_axes, bpb_axes = figure.subplots(1, 3)
    stack(memory_axes, report, "memory", MEMORY, scale=1e6)
    memory_axes.set(ylabel="memory (MB)", title="Memory of a training step")
    stack(time_axes, report, "time", TIME, scale=1)
    time_axes.set(ylabel="time (ms per step)", title="Time of a training step")
    for method, color, line in (("full", "#D55E00", "--"), ("lora", "#0072B2", "-")):
        seconds = [point["seconds"] for point in curves[method]]
        bpb = [point["bpb"] for point in curves[method]]
        look = dict(marker="o", markersize=3, color=color, label=METHODS[method])
        bpb_axes.plot(seconds, bpb, line, **look)
    title = f"Held-out {style}".replace("$", r"\$")       # not mathematics
    bpb_axes.set(xlabel="training time (s)", ylabel="bits per byte", title=title)
    bpb_axes.legend(frameon=False)
    for axes in (memory_axes, time_axes, bpb_axes):
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")      # in a title, of no font here
        figure.savefig(temporary, dpi=120, format="png")


def stack(axes, report, key, kinds, scale):
    """Draw one stacked bar for each method."""
    bottom = [0.0, 0.0]
    for kind, (color, hatch) in kinds.items():
        values = [report["methods"][method][key][kind] / scale for method in METHODS]
        label = kind.removesuffix("_ms")
        axes.bar(
            list(METHODS.values()), values, bottom=bottom, width=0.6, label=label, color=color,
            hatch=hatch, edgecolor="white",
        )
        bottom = [below + value for below, value in zip(bottom, values)]
    axes.set_ylim(0, 1.35 * max(bottom))
    axes.legend(loc="upper center", ncols=2, fontsize="small", frameon=False)
