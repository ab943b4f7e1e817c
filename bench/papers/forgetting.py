"""
Claims about what a model forgets while it learns.
"""
import statistics

from bench.papers.arms import Arm
from bench.papers.claim import (
    ABSTRACT,
    NOT_REPRODUCED,
    NOTES,
    PARTLY,
    REPRODUCED,
    Claim,
    Panel,
    Verdict,
    bpb,
    edge_note,
    is_above,
    of_all,
    spread,
)
from bench.papers.laboratory import chosen_point
from bench.papers.rates import FULL

BIDERMAN = "Biderman et al. 2024, LoRA Learns Less and Forgets Less (arXiv 2405.09673)"


class LearnsLessForgetsLess(Claim):
    group = "Forgetting"
    sentence = "After equal steps, LoRA has learned less and forgotten less."
    source = f"{BIDERMAN}, abstract"
    paper = "both"
    read = ABSTRACT
    threshold = "both, by more than noise: reproduced; one of them: partly"
    advice = "If what the base knows matters, LoRA is the gentler way at its usual rate."
    otherwise = "Measure what is forgotten: LoRA is not gentler by itself."
    differs = "What is forgotten is the fit to the text of pretraining, not skills."

    def measure(self, lab):
        before = lab.before()
        found = {"before": {"style": before["report"], "base": before["base"]}}
        for name, arm in (("full", FULL), ("LoRA", Arm())):
            points = [chosen_point(result) for result in lab.reports(arm)]
            found[name] = {
                "style": spread([point["report"] for point in points]),
                "base": spread([point["base"] for point in points]),
                "at_edge": lab.sweep(arm).at_edge,
            }
        return found

    def judge(self, found):
        full, lora = found["full"], found["LoRA"]
        why = (
            f"the style: LoRA {bpb(lora['style'])}, full {bpb(full['style'])}; the base's text: "
            f"LoRA {bpb(lora['base'])}, full {bpb(full['base'])}, before "
            f"{found['before']['base']:.3f}" + edge_note(full, lora)
        )
        learns_less = is_above(lora["style"], full["style"])
        forgets_less = is_above(full["base"], lora["base"])
        return of_all([learns_less, forgets_less], why)

    def here(self, found):
        texts = []
        for text in ("style", "base"):
            lora, full = found["LoRA"][text]["mean"], found["full"][text]["mean"]
            texts.append(f"{text} {lora:.3f} against {full:.3f}")
        return ", ".join(texts)

    def panel(self, found):
        series = {}
        for name in ("LoRA", "full"):
            for text in ("style", "base"):
                s = found[name][text]
                series.setdefault(name, []).append((text, s["mean"], s["std"]))
        return Panel("bpb", series)


class ForgetsLessAtEqualLearning(Claim):
    group = "Forgetting"
    sentence = "LoRA forgets less than full fine-tuning when both have learned the same."
    source = f"Shuttleworth et al. 2024, Figure 6; {BIDERMAN}, §4.3"
    paper = "Shuttleworth: yes; Biderman: in code yes, in math no"
    read = NOTES
    threshold = (
        "full fine-tuning at the lower rate with which it ends where LoRA ends has forgotten "
        "more, by more than noise: reproduced; within noise: partly"
    )
    advice = "If forgetting matters, prefer LoRA even where full fine-tuning fits."
    otherwise = "If full fine-tuning forgets too much, lower its rate: LoRA gains by learning less."
    differs = "The papers compare points along one run; here whole runs, each with its own rate."

    lower = 3           # rates below the best one, each half of the one before

    def measure(self, lab):
        before = lab.before()
        lora = [end_of(result) for result in lab.reports(Arm())]
        level = statistics.fmean(style for style, _ in lora)
        best = lab.sweep(FULL).best
        runs = [lab.reports(FULL, k) for k in range(best - self.lower, best + 1)]
        curves = []
        for of_seed in zip(*runs):
            curves.append([(before["report"], before["base"]), *map(end_of, of_seed)])
        return {
            "before": before["base"], "level": level, "curves": curves, "ends": lora,
            "LoRA": spread([base for _, base in lora]),
            "full": spread([base_at(curve, level) for curve in curves]),
        }

    def judge(self, found):
        full, lora = found["full"], found["LoRA"]
        why = (
            f"where the style costs {found['level']:.3f} bpb, the base's text costs {bpb(full)} "
            f"after full fine-tuning and {bpb(lora)} after LoRA; {found['before']:.3f} before"
        )
        if is_above(full, lora):
            return Verdict(REPRODUCED, why)
        return Verdict(NOT_REPRODUCED if is_above(lora, full) else PARTLY, why)

    def here(self, found):
        more = found["full"]["mean"] - found["LoRA"]["mean"]
        who = "full" if more > 0 else "LoRA"
        return f"{who} forgets {abs(more):.3f} bpb more at equal learning"

    def panel(self, found):
        series = {"full, four rates": [], "LoRA": [point_of(found["ends"])]}
        for same_rate in zip(*found["curves"]):
            series["full, four rates"].append(point_of(same_rate))
        return Panel("bpb of the base's text", series, "bpb of the style")


def end_of(result):
    """(style, base): the bits per byte of both texts at the end of a run."""
    last = result["points"][-1]
    return last["report"], last["base"]


def point_of(pairs):
    """A point (x, y, error) of a Panel from (style, base) of several seeds."""
    base = spread([base for _, base in pairs])
    return statistics.fmean(style for style, _ in pairs), base["mean"], base["std"]


def base_at(curve, level):
    """The bits per byte of the base's text where a curve reaches a level of the style.

    curve [(style, base), ...] is linear between its points; its end if it never gets there.
    """
    for (style, base), (next_style, next_base) in zip(curve, curve[1:]):
        if next_style <= level < style:
            part = (style - level) / (style - next_style)
            return base + part * (next_base - base)
    return curve[-1][1]
