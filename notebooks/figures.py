"""
The figures of the notebooks. A figure is one or more panels; each function below draws
into a panel.

    panel = figures.panel()
    figures.lines(panel, {"full": (steps, bpb)}, xlabel="step", ylabel="bits per byte")

Every series has a color, a line style and a marker of its own, so that a figure can
also be read without colors. Series with the same names look the same in all figures.
"""
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

BLUE, ORANGE, GREEN, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
GRAY = "#BBBBBB"
COLORS = [BLUE, ORANGE, GREEN, PINK, "black", SKY]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "x"]
HATCHES = ["", "//", "..", "\\\\", "xx", "++"]


def set_style():
    """The style of all figures. Call it once, before the first one."""
    plt.rcParams.update({
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.markersize": 5,
        "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=DASHES) + cycler(marker=MARKERS),
    })


def panel(width=7.0, height=3.4):
    """A figure with one panel. Sizes are in inches."""
    return panels(1, width, height)[0]


def panels(n, width=7.4, height=3.4, sharey=False):
    """A figure with n panels side by side."""
    _, axes = plt.subplots(1, n, figsize=(width, height), sharey=sharey, squeeze=False)
    return list(axes[0])


def lines(panel, series, wide=None, legend="best", **labels):
    """Draw {name: (x, y)} as lines. `labels` go to Axes.set: xlabel, ylabel, ylim, ...

    wide    the name of a series to draw as a wide, pale line, below the others
    """
    for name, (x, y) in series.items():
        look = {"linewidth": 8, "alpha": 0.35, "marker": ""} if name == wide else {}
        every = max(1, len(x) // 8)         # of many points, not each has a marker
        panel.plot(x, y, label=name, markevery=every, **look)
    finish(panel, legend if len(series) > 1 else None, labels)


def growing_line(panel, name, known, **labels):
    """An empty line, to be filled while a model trains, and {name: y} of what is known before.

    Returns the line; set_data(x, y) fills it.
    """
    [line] = panel.plot([], [], label=name)
    levels(panel, known)
    finish(panel, "best", labels)
    plt.close(panel.figure)             # or the cell would show it once more when it ends
    return line


def points(panel, series, names=None, legend="best", **labels):
    """Draw {name: (x, y)} as marks without lines.

    names   {name: [text for each point, ...]}
    """
    for name, (x, y) in series.items():
        panel.plot(x, y, linestyle="none", markersize=8, label=name)
        if names and name in names:
            name_points(panel, x, y, names[name])
    panel.margins(0.12)
    finish(panel, legend if len(series) > 1 else None, labels)


def levels(panel, values, legend="best"):
    """Draw {name: y} as thin horizontal lines."""
    for i, (name, y) in enumerate(values.items()):
        style = DASHES[(i + 3) % len(DASHES)]
        panel.axhline(y, color="black", linewidth=1, linestyle=style, label=name)
    panel.legend(loc=legend, fontsize=9)


def vertical(panel, values):
    """Draw {name: x} as thin vertical lines."""
    for name, x in values.items():
        panel.axvline(x, color="black", linewidth=1, linestyle=":", label=name)
    panel.legend(fontsize=9)


def name_points(panel, x, y, names):
    """Write a name above each point."""
    for name, at_x, at_y in zip(names, x, y):
        panel.annotate(name, (at_x, at_y), (5, 6), textcoords="offset points", fontsize=9)


def bars(panel, values, kinds=None, format="%.0f", **labels):
    """Draw {name: value} as horizontal bars, the first on top, with their values.

    kinds   a number for each bar: bars of one kind have one color and hatch
    """
    kinds = kinds or [0] * len(values)
    drawn = panel.barh(
        list(values), list(values.values()), height=0.7, edgecolor="white",
        color=[COLORS[kind] for kind in kinds], hatch=[HATCHES[kind] for kind in kinds],
    )
    panel.bar_label(drawn, fmt=format, padding=3, fontsize=9)
    panel.margins(x=0.12)
    panel.yaxis.set_inverted(True)
    panel.grid(visible=False, axis="y")
    finish(panel, None, labels)


def grouped_bars(panel, names, series, **labels):
    """Draw {name of a series: [value for each of names, ...]} as bars beside each other."""
    width = 0.8 / len(series)
    places = np.arange(len(names))
    for i, (name, values) in enumerate(series.items()):
        shift = (i - (len(series) - 1) / 2) * width
        panel.bar(
            places + shift, values, width, label=name, color=COLORS[i], hatch=HATCHES[i],
            edgecolor="white",
        )
    panel.set_xticks(places, names)
    panel.grid(visible=False, axis="x")
    finish(panel, "best", labels)


def stacked_bars(panel, bars, marks=None, **labels):
    """Draw {name of a bar: {kind: value}} as stacked bars of up to four kinds.

    marks   {name of a bar: value}: a diamond, for example the measured peak
    """
    kinds = list(next(iter(bars.values())))
    bottoms = np.zeros(len(bars))
    for i, kind in enumerate(kinds):
        heights = np.array([bar[kind] for bar in bars.values()])
        panel.bar(
            list(bars), heights, 0.6, bottoms, label=kind, edgecolor="white",
            color=[*COLORS[:3], GRAY][i], hatch=[*HATCHES[:3], ""][i],
        )
        bottoms += heights
    if marks:
        panel.plot(list(marks), list(marks.values()), "D", color="black", label="measured peak")
    panel.grid(visible=False, axis="x")
    finish(panel, None, labels)
    panel.figure.legend(loc="outside upper center", ncols=5, fontsize=9)


def histogram(panel, values, marks, **labels):
    """Draw how values are distributed, and thin vertical lines at `marks`."""
    panel.hist(values, bins=60, color=GRAY)
    for mark in marks:
        panel.axvline(mark, color=BLUE, linewidth=1)
    panel.set_yticks([])
    finish(panel, None, labels)


def strips(panel, values, **labels):
    """Draw {name: [value, ...]} as a row of marks each, with a line at their mean."""
    for row, of in enumerate(values.values()):
        color = COLORS[row % len(COLORS)]
        mean = np.mean(of)
        panel.plot(of, [row] * len(of), MARKERS[row % len(MARKERS)], color=color, alpha=0.7)
        panel.plot([mean, mean], [row - 0.3, row + 0.3], color=color, linestyle="-", marker="")
    panel.set(yticks=range(len(values)), yticklabels=list(values), ylim=(len(values) - 0.4, -0.6))
    finish(panel, None, labels)


def heatmap(panel, values, rows, columns, label, cmap="cividis", **labels):
    """Draw a matrix (len(rows), len(columns)) with entries from 0 to 1 as colors."""
    image = panel.imshow(values, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 4 else 0)
    panel.set_yticks(range(len(rows)), rows)
    panel.grid(False)
    panel.figure.colorbar(image, label=label)
    finish(panel, None, labels)


def matrices(panel, d_out, d_in, r):
    """Draw W + s B A to scale: the large frozen matrix, and the two thin ones."""
    unit = max(d_out, d_in)
    left_of_B = d_in + 0.2 * unit
    left_of_A = left_of_B + r + 0.34 * unit
    boxes = [
        (0, d_out, d_in, GRAY, f"$W$, frozen\n{d_out} × {d_in}\n{d_out * d_in:,} numbers"),
        (left_of_B, d_out, r, BLUE, f"$B$, starts at 0\n{d_out} × {r}\n{d_out * r:,} numbers"),
        (left_of_A, r, d_in, ORANGE, f"$A$, random\n{r} × {d_in}\n{r * d_in:,} numbers"),
    ]
    for left, height, width, color, text in boxes:
        panel.add_patch(plt.Rectangle((left, 0), width, height, facecolor=color))
        panel.text(left, height + 0.03 * unit, text, fontsize=9, verticalalignment="top")
    panel.text(d_in + 0.05 * unit, 0.3 * d_out, "$+\\ s$", fontsize=13)
    panel.text(left_of_A - 0.09 * unit, 0.02 * unit, "$\\times$", fontsize=13)
    panel.set(xlim=(-0.02 * unit, left_of_A + d_in + 0.12 * unit), ylim=(1.25 * unit, -0.02 * unit))
    panel.set_aspect("equal")
    panel.axis("off")


def finish(panel, legend, labels):
    """Set the labels of a panel, and its legend if there are several series."""
    panel.set(**labels)
    if legend:
        panel.legend(loc=legend, fontsize=9)


def number_ticks(panel, x=None, y=None):
    """Write these numbers at the axes, in plain digits. For logarithmic axes."""
    if x is not None:
        panel.set_xticks(x, [f"{value:g}" for value in x])
    if y is not None:
        panel.set_yticks(y, [f"{value:g}" for value in y])
    panel.minorticks_off()
