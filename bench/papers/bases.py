"""
Claims about the base: its size, its width, and the dtype in which it is frozen.
"""
import math
import statistics

from bench.papers.arms import Arm
from bench.papers.claim import (
    NOT_REPRODUCED,
    NOTES,
    PARTLY,
    REPRODUCED,
    SECOND_HAND,
    Claim,
    Panel,
    ShareClaim,
    Verdict,
    between,
    edge_note,
    of_all,
    percent,
    shares,
    slope,
    spread,
    texts_of,
)
from bench.papers.rates import FULL, SCHULMAN, bars, ratio_of, slopes

WIDTH_LAWS = {"constant": 0.0, "√width": 0.5, "width": 1.0}


class GapShrinksWithSize(Claim):
    group = "The base"
    sentence = "The larger the base, the smaller the gap between LoRA and full fine-tuning."
    source = "the README of this project; no paper that was read measures it"
    paper = "2% at 11M, 1 to 6% at 1M"
    read = "a claim of this project, tested here for the first time"
    threshold = (
        "on every text the gap in percent of bpb is smaller for the largest base than for the "
        "smallest, and its slope over log size is negative: reproduced; on some: partly"
    )
    advice = "What is lost with a small base says little about a large one."
    otherwise = "The gap depends on the text as well as on the size: measure it on yours."
    differs = "All bases read the same text; the largest one has too little of it."

    def measure(self, lab):
        found = {"sizes": [], "gaps": {text: [] for text in lab.scale.texts}, "edges": []}
        for width in lab.scale.widths:
            width_of_arm = 0 if width == lab.scale.width else width
            found["sizes"].append(lab.parameters(Arm(method="full", width=width)))
            arms = {name: Arm(method=name, width=width_of_arm) for name in ("full", "lora")}
            best = {}
            for name, arm in arms.items():
                sweep = lab.sweep(arm)      # on pirate; the other texts take its rate
                best[name] = sweep.best
                if sweep.at_edge:
                    found["edges"].append(f"{name}, width {width}")
            for text in lab.scale.texts:
                bits = {}
                for name in arms:
                    arm = Arm(method=name, width=width_of_arm, text=text)
                    bits[name] = lab.final(arm, best[name])
                full = statistics.fmean(bits["full"])
                found["gaps"][text].append(spread([value / full - 1 for value in bits["lora"]]))
        return found

    def judge(self, found):
        logs = [math.log(size) for size in found["sizes"]]
        holds, texts = [], []
        for text, gaps in found["gaps"].items():
            means = [gap["mean"] for gap in gaps]
            holds.append(means[-1] < means[0] and slope(logs, means) < 0)
            texts.append(f"{text} " + ", ".join(map(percent, means)))
        why = "from the smallest to the largest base: " + "; ".join(texts)
        if found["edges"]:
            why += f"; sweeps end at their edge for {', '.join(found['edges'])}"
        return of_all(holds, why)

    def here(self, found):
        texts = []
        for text, gaps in found["gaps"].items():
            texts.append(f"{text} {percent(gaps[0]['mean'])} to {percent(gaps[-1]['mean'])}")
        return ", ".join(texts)

    def panel(self, found):
        series = {}
        for text, gaps in found["gaps"].items():
            points = []
            for size, gap in zip(found["sizes"], gaps):
                points.append((size, 100 * gap["mean"], 100 * gap["std"]))
            series[text] = points
        return Panel("gap to full fine-tuning (% of bpb)", series, "parameters", log_x=True)


class RatioAgainstWidth(Claim):
    group = "The base"
    sentence = "The ratio of LoRA's best rate to full fine-tuning's does not depend on the width."
    source = f"{SCHULMAN}; other papers predict a ratio that grows with width or with √width"
    paper = "about 10 for all models"
    read = SECOND_HAND
    threshold = (
        "the exponent of the width is at most 0.25 from 0: reproduced; nearer to 0 than to 1/2 "
        "and to 1 within its spread: partly"
    )
    advice = "Find the ratio with a small model, and use it for a large one."
    otherwise = "Find the ratio at the width that you use."
    differs = "Each base was pretrained for this, with a rate that goes with its width."

    def measure(self, lab):
        found = {"widths": [], "ratios": []}
        for width in lab.scale.widths:
            width_of_arm = 0 if width == lab.scale.width else width
            lora = lab.best_rates(Arm(width=width_of_arm))
            full = lab.best_rates(Arm(method="full", width=width_of_arm))
            found["widths"].append(width)
            found["ratios"].append(ratio_of(lora, full))
        return found

    def exponent(self, found):
        best = [{"rates": ratio["ratios"]} for ratio in found["ratios"]]
        return slopes(found["widths"], best)

    def judge(self, found):
        exponent = self.exponent(found)
        nearest = min(WIDTH_LAWS, key=lambda law: abs(WIDTH_LAWS[law] - exponent["mean"]))
        ratios = ", ".join(f"{ratio['mean']:.1f}" for ratio in found["ratios"])
        why = (
            f"the ratio goes with the width to the power {exponent['mean']:+.2f} ± "
            f"{exponent['std']:.2f}, nearest to the law {nearest!r}; ratios {ratios}"
            + edge_note(*found["ratios"])
        )
        if abs(exponent["mean"]) <= 0.25:
            return Verdict(REPRODUCED, why)
        is_near = abs(exponent["mean"]) - exponent["std"] <= 0.25
        return Verdict(PARTLY if is_near else NOT_REPRODUCED, why)

    def here(self, found):
        exponent = self.exponent(found)
        return f"width to the power {exponent['mean']:+.2f} ± {exponent['std']:.2f}"

    def panel(self, found):
        points = []
        for width, ratio in zip(found["widths"], found["ratios"]):
            points.append((width, ratio["mean"], bars(ratio["ratios"], ratio["mean"])))
        return Panel(
            "LoRA's best rate / full's", {"ratio": points}, "width", log_x=True, log_y=True,
            lines={"10": 10.0},
        )


class SixteenBitBase(ShareClaim):
    group = "The base"
    sentence = "Freezing the base in bfloat16 instead of float32 costs LoRA nothing."
    source = "common practice; this project's default on a GPU"
    paper = "nothing"
    read = "a claim of this project, tested here for the first time"
    threshold = "at most 0.5% less of what full learns: reproduced; at most 1% less: partly"
    advice = "Freeze the base in bfloat16."
    otherwise = "Keep the base in float32 if it fits."
    differs = "Products are computed in bfloat16 on a GPU either way, in float32 on a CPU."

    dtypes = ("float32", "bfloat16")
    at_most_lost = (0.005, 0.01)        # of what full learns: reproduced, partly

    def measure(self, lab):
        before, full = lab.before()["report"], lab.final(FULL)
        found = {}
        for dtype in self.dtypes:
            arm = Arm(base_dtype=dtype)
            found[dtype] = shares(before, lab.final(arm), full)
            found[dtype]["at_edge"] = lab.sweep(arm).at_edge
        return found

    def judge(self, found):
        exact, rounded = (found[dtype] for dtype in self.dtypes)
        lost = exact["mean"] - rounded["mean"]
        why = texts_of(found) + edge_note(exact, rounded)
        whole, part = self.at_most_lost
        return between(lost, (-math.inf, whole), (-math.inf, part), why)


class FourBitBase(SixteenBitBase):
    sentence = "Freezing the base in NF4, four bits a weight, costs LoRA nothing."
    source = "Dettmers et al. 2023 (QLoRA, arXiv 2305.14314)"
    paper = "the task performance of 16-bit fine-tuning"
    read = NOTES
    threshold = "at most 1% less of what full learns: reproduced; at most 3% less: partly"
    advice = "Freeze the base in four bits."
    otherwise = "Use four bits only if the weights do not fit otherwise."
    differs = "Rounding to four bits hurts small models more than large ones."

    dtypes = ("bfloat16", "nf4")
    at_most_lost = (0.01, 0.03)
