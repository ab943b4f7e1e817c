"""
What a claim is, and what can become of it.
"""
import math
import statistics
from dataclasses import dataclass, field

REPRODUCED = "reproduced"
PARTLY = "partly"
NOT_REPRODUCED = "not reproduced"
NOT_TESTABLE = "not testable here"

# Where a number of a paper was read.
ABSTRACT = "the abstract was read"
SECOND_HAND = "quoted from summaries of the paper"
NOTES = "quoted from notes on the paper, and not checked against it again"
UNCHECKED = "not checked"


@dataclass
class Verdict:
    """One of the four words above, and the reason in a sentence made from the numbers."""

    word: str
    why: str


@dataclass
class Panel:
    """A picture of what was found: {label: [(x, y, error), ...]}. x is a number or a name."""

    ylabel: str
    series: dict
    xlabel: str = ""
    log_x: bool = False
    log_y: bool = False
    lines: dict = field(default_factory=dict)       # {label: y} to draw across


class Claim:
    """One claim of a paper, written down before it is tested.

    measure(lab) makes the runs, and returns what they found as JSON values; judge(found)
    returns a Verdict. They are separate, so that a judge can be tested on any numbers.
    """

    group = ""          # the heading it stands under
    sentence = ""       # the claim in plain words
    source = ""         # paper, and section or figure
    paper = ""          # what the paper reports
    read = UNCHECKED    # where that was read
    threshold = ""      # what counts as reproduced and as partly reproduced
    advice = ""         # what to make of it when tuning a model of one's own
    otherwise = ""      # the same, if the claim is not reproduced here; "": as above
    differs = ""        # why it may be different here

    @property
    def id(self):
        """Its name in the results: AttentionAlone -> attention-alone."""
        words = ""
        for letter in type(self).__name__:
            if letter.isupper() and words:
                words += "-"
            words += letter.lower()
        return words

    def why_not_testable(self, lab):
        """Why the claim cannot be tested in this laboratory, or None."""
        return None

    def measure(self, lab):
        raise NotImplementedError

    def judge(self, found):
        raise NotImplementedError

    def here(self, found):
        """What was found, in a few words for the table."""
        raise NotImplementedError

    def panel(self, found):
        """A Panel, or None."""
        return None


class ShareClaim(Claim):
    """A claim whose runs found {name: spread}: shares of what full fine-tuning learns."""

    def here(self, found):
        return texts_of(found)

    def panel(self, found):
        return share_panel(found)


# ---- statistics ----------------------------------------------------------------------

def spread(values):
    """{"mean", "std" (of a sample), "values"} of a list of numbers."""
    std = 0.0
    if not all(map(math.isfinite, values)):
        std = math.inf                          # a run diverged
    elif len(values) > 1:
        std = statistics.stdev(values)
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def shares(before, values, full):
    """The part of what full fine-tuning learns that each run learns, as a spread.

    before, and the mean of `full`, are bits per byte: (before - value) / (before - full).
    """
    learnable = before - statistics.fmean(full)
    return spread([(before - value) / learnable for value in values])


def noise(a, b):
    """The standard error of the difference of the means of two spreads."""
    variances = (s["std"]**2 / len(s["values"]) for s in (a, b))
    return math.sqrt(sum(variances))


def is_above(a, b):
    """Whether the mean of spread a exceeds that of b by more than twice its standard error."""
    return a["mean"] - b["mean"] > 2 * noise(a, b)


def slope(x, y):
    """The slope of the least-squares line through points, x and y lists of numbers."""
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    products = [(a - mean_x) * (b - mean_y) for a, b in zip(x, y)]
    return sum(products) / sum((a - mean_x)**2 for a in x)


def part(low, high):
    """The mean of spread low as a part of that of high; NaN if high is not above zero.

    NaN is below every threshold.
    """
    return low["mean"] / high["mean"] if high["mean"] > 0 else math.nan


# ---- verdicts ------------------------------------------------------------------------

def between(value, reproduced, partly, why):
    """Judge a value by two ranges (low, high), bounds included."""
    if reproduced[0] <= value <= reproduced[1]:
        return Verdict(REPRODUCED, why)
    if partly[0] <= value <= partly[1]:
        return Verdict(PARTLY, why)
    return Verdict(NOT_REPRODUCED, why)


def at_least(value, reproduced, partly, why):
    """Judge a value by two lower limits, both included."""
    return between(value, (reproduced, math.inf), (partly, math.inf), why)


def of_all(holds, why):
    """Judge several conditions: all hold, some do, or none."""
    holds = list(holds)
    if all(holds):
        return Verdict(REPRODUCED, why)
    return Verdict(PARTLY if any(holds) else NOT_REPRODUCED, why)


# ---- how numbers are written ---------------------------------------------------------

def percent(value):
    return f"{100 * value:.1f}%"


def bpb(s):
    """bpb(spread) -> '1.676 ± 0.002'"""
    return f"{s['mean']:.3f} ± {s['std']:.3f}"


def share(s):
    """share(spread) -> '98.5 ± 0.3%', and how many runs diverged, if any did."""
    text = f"{100 * s['mean']:.1f} ± {100 * s['std']:.1f}%"
    if diverged(s):
        median = percent(statistics.median(s["values"]))
        text += f" ({diverged_runs(s)}; the median is {median})"
    return text


def diverged(s, whole=1.0):
    """The values of a spread that lie below the median by half of what there is to learn."""
    median = statistics.median(s["values"])
    return [value for value in s["values"] if median - value > whole / 2]


def diverged_runs(s, whole=1.0):
    """diverged_runs(spread) -> '2 of 5 runs diverged'"""
    return f"{len(diverged(s, whole))} of {len(s['values'])} runs diverged"


def settled(s, whole=1.0):
    """The spread of the runs that did not diverge: pictures show these."""
    gone = diverged(s, whole)
    return spread([value for value in s["values"] if value not in gone])


def edge_note(*parts):
    """A half sentence if one of {"at_edge"} is true."""
    if any(part["at_edge"] for part in parts):
        return "; a sweep ends at its edge, so the best rate may lie beyond"
    return ""


def texts_of(found):
    """The shares {name: spread} of what full fine-tuning learns, as text."""
    return ", ".join(f"{name} {share(s)}" for name, s in found.items())


def share_panel(found):
    """The shares {name: spread} of what full fine-tuning learns, as a Panel.

    Runs that diverged are left out, and the name says so.
    """
    series = {}
    for name, s in found.items():
        shown = settled(s)
        if diverged(s):
            name = f"{name}, {len(shown['values'])} of {len(s['values'])}"
        series[name] = [(name, 100 * shown["mean"], 100 * shown["std"])]
    return Panel("% of what full learns", series, lines={"full": 100.0})
