"""
docs/claims.md and its figures, from the results of bench/claims.py.

The verdicts are judged again from the numbers in the results, so a changed threshold
shows at once.
"""
import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from bench.papers.all_claims import CLAIMS
from bench.papers.claim import NOT_TESTABLE, REPRODUCED, Verdict
from lab.files import replacing

RESULTS = Path(__file__).resolve().parents[1] / "results" / "claims.json"
COLUMNS = 3
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"

# What to do, in the order of the README; each line stands on the claims that follow it.
RULES = {
    "Rank": (
        "8 or 16 for a style. A higher one gained little here; a rank of 1 lost much.",
        ("rank-one-suffices", "low-ranks-run-out"),
    ),
    "Alpha": (
        "Fix it, for example at 16. The best learning rate then hardly depends on the rank.",
        ("same-rate-for-all-ranks", "rate-against-rank"),
    ),
    "Learning rate": (
        "Ten to twenty times that of full fine-tuning. The ratio was not the same for all widths: "
        "it grew with the model. It is the one number worth a search.",
        ("ten-times", "ratio-against-width"),
    ),
    "Layers": (
        "All linear layers. If you must choose, the MLP before attention.",
        ("attention-alone", "attention-on-top", "many-matrices"),
    ),
    "Batch": (
        "Small batches and more steps.",
        ("large-batches-hurt",),
    ),
    "The base": (
        "Freeze it in 16 bits, or in four: neither cost more than 0.2% of the bits per byte.",
        ("sixteen-bit-base", "four-bit-base"),
    ),
    "Variants": (
        "Plain LoRA with A random and B zero. None did better at its own best rate.",
        ("variants-are-equal", "faster-b", "random-a-is-better"),
    ),
    "Forgetting": (
        "LoRA does not protect the base by itself. Lower the rate, or shrink ΔW afterwards.",
        ("forgets-less-at-equal-learning", "smaller-intruders"),
    ),
    "When not": (
        "If full fine-tuning fits and every percent counts, or if the model is so small that "
        "its embeddings are a large part of it.",
        ("as-much-as-full", "gap-shrinks-with-size", "embeddings-are-the-gap"),
    ),
}


METHOD = """\
Every claim was written down before the run, with the threshold that counts as reproduced: one
class each in `bench/papers/`. Unless a claim says otherwise, a GPT of 11M parameters,
pretrained on *tales*, is tuned to *pirate* in 120 steps of 32 × 256 tokens. The held-out text
is cut into two halves, story by story: the learning rate of each arm, and the step at which a
run is best, are chosen on one half with one seed. What is reported is measured on the other
half with five other seeds, as mean ± standard deviation; best rates are measured with three. A
difference is *more than noise* if it exceeds twice its standard error over the seeds. A run
that *diverged* learned less than the median of its seeds by half of what there was to learn;
every mean includes such runs, and the pictures leave them out. *bpb* is bits per byte of
held-out text (lower is better); a percentage of *what full learns* compares the fall of the
bpb below the base's with that after full fine-tuning."""


def by_name(name):
    """The claim of a name. Raises KeyError if there is none."""
    return {claim.id: claim for claim in CLAIMS}[name]


def verdict_of(claim, entry):
    """The Verdict on a claim, from its entry in the results."""
    if entry["found"] is None:
        return Verdict(NOT_TESTABLE, entry["why"])
    return claim.judge(entry["found"])


def here_of(claim, entry):
    """What was found, in a few words."""
    return "" if entry["found"] is None else claim.here(entry["found"])


def groups(results):
    """{group: [claim, ...]} of the claims in the results."""
    found = {}
    for claim in CLAIMS:
        if claim.id in results["claims"]:
            found.setdefault(claim.group, []).append(claim)
    return found


# ---- tables --------------------------------------------------------------------------

def table(claims, results, page=""):
    """The claims as a table of Markdown: claim, source, paper, here, verdict.

    `page` is the address of claims.md, where what is said of each claim stands.
    """
    lines = ["| claim | source | paper | here | verdict |", "|---|---|---|---|---|"]
    for claim in claims:
        entry = results["claims"][claim.id]
        verdict = verdict_of(claim, entry)
        cells = (
            f"[{claim.sentence}]({page}#{claim.id})", claim.source, claim.paper,
            here_of(claim, entry), f"**{verdict.word}**",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rules(results, page=""):
    """The rules of thumb as a table of Markdown, each with the verdicts it stands on.

    `page` is the address of claims.md.
    """
    lines = [
        "| choice | rule of thumb | claims of papers, and what came of them here |",
        "|---|---|---|",
    ]
    for name, (text, claims) in RULES.items():
        links = []
        for id in claims:
            if id in results["claims"]:
                claim = by_name(id)
                word = verdict_of(claim, results["claims"][id]).word
                links.append(f"[{claim.sentence}]({page}#{id}) **{word}**")
        lines.append(f"| {name} | {text} | {'<br>'.join(links) or 'not tested yet'} |")
    return "\n".join(lines)


def details(claim, entry):
    """A claim, what was found and what to make of it, as Markdown."""
    verdict = verdict_of(claim, entry)
    word = verdict.word[0].upper() + verdict.word[1:]
    return (
        f'<a id="{claim.id}"></a>\n**{claim.sentence}** {word}: {verdict.why}.\n\n'
        f"*Counts as:* {claim.threshold}. *The paper's numbers:* {claim.read}.\n\n"
        f"{advice_of(claim, entry)} {claim.differs}"
    )


def advice_of(claim, entry):
    """What to make of a claim, which depends on the verdict."""
    if verdict_of(claim, entry).word != REPRODUCED and claim.otherwise:
        return claim.otherwise
    return claim.advice


def introduction(results):
    """What was run, where and when, as Markdown."""
    entries = results["claims"].values()
    devices = sorted({entry["device"] for entry in entries})
    versions = sorted({entry["torch"] for entry in entries})
    dates = sorted({entry["date"] for entry in entries})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    words = [verdict_of(by_name(id), entry).word for id, entry in results["claims"].items()]
    counts = [f"{words.count(word)} {word}" for word in dict.fromkeys(words)]
    runs = sum(entry["runs"] for entry in entries)
    minutes = sum(entry["seconds"] for entry in entries) / 60
    note = ""
    if results["scale"] != "full":
        note = f"\n\n**These are results of the scale {results['scale']!r}: they mean nothing.**"
    return (
        "# What the papers say of LoRA, tested here\n\n"
        f"{len(words)} claims: {', '.join(counts)}. Measured by `python bench/claims.py` on "
        f"{', '.join(devices)} with torch {', '.join(versions)}, {when}: {runs} tuning runs, "
        f"{minutes:.0f} minutes. This page is made by `python bench/claims_page.py` from "
        f"`bench/results/claims.json`.{note}\n\n{METHOD}"
    )


def page(results):
    """The whole page as Markdown."""
    parts = [introduction(results), "## Rules of thumb", rules(results)]
    for group, claims in groups(results).items():
        parts += [f"## {group}", table(claims, results)]
        if has_panels(claims, results):
            parts.append(f"![{group}]({picture_name(group)})")
        for claim in claims:
            parts.append(details(claim, results["claims"][claim.id]))
    return "\n\n".join(parts) + "\n"


def write_page(results, dir):
    """Write claims.md and its pictures into a directory. Returns the paths."""
    paths = []
    for group, claims in groups(results).items():
        if has_panels(claims, results):
            paths.append(Path(dir, picture_name(group)))
            with replacing(paths[-1]) as temporary:
                figure(claims, results).savefig(temporary, dpi=90, format="png")
    paths.append(Path(dir, "claims.md"))
    with replacing(paths[-1]) as temporary:
        temporary.write_text(page(results), encoding="utf-8")
    return paths


def picture_name(group):
    words = group.lower().replace("δ", "delta-").split()
    return f"claims-{'-'.join(words)}.png"


# ---- figures -------------------------------------------------------------------------

def panels(claims, results):
    """[(claim, Panel), ...] of the claims that have one."""
    found = []
    for claim in claims:
        entry = results["claims"][claim.id]
        panel = None if entry["found"] is None else claim.panel(entry["found"])
        if panel is not None:
            found.append((claim, panel))
    return found


def has_panels(claims, results):
    return bool(panels(claims, results))


def figure(claims, results):
    """A Figure with a panel for each claim."""
    found = panels(claims, results)
    columns = min(COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    picture = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False).flatten()
    for axes, (claim, panel) in zip(grid, found):
        draw(axes, panel)
        word = verdict_of(claim, results["claims"][claim.id]).word
        axes.set_title(f"{claim.id}: {word}", fontsize="medium")
    for axes in grid[len(found):]:
        axes.set_visible(False)
    return picture


def draw(axes, panel):
    """Draw a Panel: points with error bars, joined if x is a number."""
    points = sum(panel.series.values(), [])
    is_named = any(isinstance(x, str) for x, _, _ in points)
    names = list(dict.fromkeys(x for x, _, _ in points))
    for i, (label, series) in enumerate(panel.series.items()):
        x = [names.index(x) if is_named else x for x, _, _ in series]
        y = [y for _, y, _ in series]
        errors = [error for _, _, error in series]
        style = dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=5)
        joined = "none" if is_named else "-"
        axes.errorbar(x, y, errors, linestyle=joined, capsize=3, label=label, **style)
    for label, y in panel.lines.items():
        axes.axhline(y, color="gray", linestyle=":", label=label)
    if is_named:
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize="small")
        axes.margins(x=0.1)
    if panel.log_x and not is_named:
        is_large = max(x for x, _, _ in points) > 10_000
        axes.set_xscale("log", base=10 if is_large else 2)
        if not is_large:
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))     # 8, not 2^3
    if panel.log_y:
        axes.set_yscale("log")
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    labels = [label for label in (*panel.series, *panel.lines) if label]
    names_say_it = is_named and all(len(series) == 1 for series in panel.series.values())
    if len(labels) > 1 and not names_say_it:
        axes.legend(frameon=False, fontsize="small")
