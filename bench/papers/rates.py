"""
Claims about the learning rate.
"""
import math
import statistics
from dataclasses import replace

from bench.papers.arms import Arm
from bench.papers.claim import (
    NOTES,
    SECOND_HAND,
    Claim,
    Panel,
    at_least,
    between,
    edge_note,
    of_all,
    slope,
    spread,
)
from bench.papers.laboratory import first_guess

FULL = Arm(method="full")
SCHULMAN = "Schulman et al. 2025, LoRA Without Regret"
CHEN = "Chen, Villar and Hayou 2026 (arXiv 2602.06204)"


def ratio_of(lora, full):
    """What the best rates {"rates", ...} of two arms have as ratios, seed by seed."""
    ratios = [a / b for a, b in zip(lora["rates"], full["rates"])]
    return {
        "ratios": ratios, "mean": statistics.geometric_mean(ratios),
        "at_edge": lora["at_edge"] or full["at_edge"],
    }


def range_of(values):
    """'9.1 to 12.4'"""
    return f"{min(values):.3g} to {max(values):.3g}"


def bars(values, mean):
    """The longer distance from the mean to one of the values, for an error bar."""
    return max(abs(value - mean) for value in values)


class TenTimes(Claim):
    group = "Learning rate"
    sentence = "LoRA's best learning rate is about ten times that of full fine-tuning."
    source = f"{SCHULMAN}; Biderman et al. 2024, §4.7"
    paper = "9.8 times"
    read = SECOND_HAND
    threshold = "reproduced from 5 to 20 times, partly from 3.3 to 30"
    advice = (
        "Start LoRA at ten times the rate that you would give full fine-tuning, and try twice "
        "and half of it."
    )
    otherwise = "Search for LoRA's rate on its own; here it is not ten times full's."
    differs = "The runs here are short, and the factor of B A is 2 instead of 32 / r."

    def measure(self, lab):
        full, lora = lab.best_rates(FULL), lab.best_rates(Arm())
        return {"full": full, "lora": lora, "ratio": ratio_of(lora, full)}

    def judge(self, found):
        ratio = found["ratio"]
        why = f"{ratio['mean']:.1f} times ({range_of(ratio['ratios'])})" + edge_note(ratio)
        return between(ratio["mean"], (5, 20), (10 / 3, 30), why)

    def here(self, found):
        return f"{found['ratio']['mean']:.1f} times"

    def panel(self, found):
        series = {}
        for name in ("full", "lora"):
            best = found[name]
            series[name] = [(name, best["mean"], bars(best["rates"], best["mean"]))]
        return Panel("best learning rate", series, log_y=True)


class SameRateForAllRanks(Claim):
    group = "Learning rate"
    sentence = "The best learning rate hardly depends on the rank."
    source = SCHULMAN
    paper = "less than a factor of 2 from r = 4 to 512"
    read = NOTES
    threshold = (
        "the best rates of all ranks from 4 up are within a factor of 2: reproduced; of 4: partly"
    )
    advice = "With alpha fixed, change the rank without searching for the rate again."
    otherwise = "Search for the rate again after a change of the rank."
    differs = "The largest rank here is 64."

    def measure(self, lab):
        return {str(r): lab.best_rates(Arm(r=r)) for r in lab.scale.ranks}

    def judge(self, found):
        means = {int(r): best["mean"] for r, best in found.items()}
        lowest = min(means)
        others = [mean for r, mean in means.items() if r != lowest]
        factor = max(others) / min(others)
        first = means[lowest] / statistics.geometric_mean(others)
        why = (
            f"a factor of {factor:.2f} between the ranks above {lowest}; r = {lowest} takes "
            f"{first:.2f} times their rate" + edge_note(*found.values())
        )
        return between(factor, (1, 2), (1, 4), why)

    def here(self, found):
        rates = [f"r = {r}: {best['mean']:.1e}" for r, best in found.items()]
        return ", ".join(rates)

    def panel(self, found):
        points = []
        for r, best in found.items():
            points.append((int(r), best["mean"], bars(best["rates"], best["mean"])))
        return Panel("best learning rate", {"LoRA": points}, "rank", log_x=True, log_y=True)


class LargerInShortRuns(Claim):
    group = "Learning rate"
    sentence = "The ratio of the best rates is larger in short runs."
    source = SCHULMAN
    paper = "about 15 in very short runs, 10 in long ones"
    read = SECOND_HAND
    threshold = "1.25 times as large in the short runs: reproduced; 1.05 times: partly"
    advice = "Search for the rate with runs as long as the one that you will make."
    differs = "Here a short run has 40 steps and a long one 120; the paper's long runs are longer."

    def measure(self, lab):
        steps = {"short": lab.scale.short, "long": lab.scale.steps}
        found = {"steps": steps}
        for name, n in steps.items():
            n = 0 if name == "long" else n      # 0 is the usual length: shared with others
            full = lab.best_rates(replace(FULL, steps=n))
            lora = lab.best_rates(Arm(steps=n))
            found[name] = ratio_of(lora, full)
        return found

    def judge(self, found):
        short, long = found["short"], found["long"]
        why = (
            f"{short['mean']:.1f} in {found['steps']['short']} steps "
            f"({range_of(short['ratios'])}), {long['mean']:.1f} in {found['steps']['long']} "
            f"({range_of(long['ratios'])})" + edge_note(short, long)
        )
        return at_least(short["mean"] / long["mean"], 1.25, 1.05, why)

    def here(self, found):
        return f"{found['short']['mean']:.1f} and {found['long']['mean']:.1f}"

    def panel(self, found):
        points = []
        for name, steps in found["steps"].items():
            ratio = found[name]
            points.append((steps, ratio["mean"], bars(ratio["ratios"], ratio["mean"])))
        return Panel("LoRA's best rate / full's", {"ratio": points}, "steps")


class SameBeginning(Claim):
    group = "Learning rate"
    sentence = "At one learning rate, all ranks begin with the same loss curve."
    source = SCHULMAN
    paper = "the same at the beginning"
    read = NOTES
    threshold = (
        "after ten steps, the training losses of the ranks differ by at most 5% of what they "
        "have fallen by: reproduced; by at most 10%: partly"
    )
    advice = "The first steps of a run do not tell which rank is better."
    otherwise = "Ranks differ from the first steps on, at one rate."
    differs = "A run has 120 steps here, so ten of them are a longer part of it."

    def measure(self, lab):
        k = first_guess(Arm(), lab.scale)
        losses = {}
        for r in lab.scale.ranks:
            curves = [lab.run(Arm(r=r), k, seed)["losses"] for seed in lab.scale.sweep_seeds]
            losses[str(r)] = [statistics.fmean(column) for column in zip(*curves)]
        return {"losses": losses}

    def difference(self, found):
        """The spread of the last of the early losses, relative to how far they have fallen."""
        curves = list(found["losses"].values())
        last = [curve[-1] for curve in curves]
        fallen = statistics.fmean(curve[0] - curve[-1] for curve in curves)
        return (max(last) - min(last)) / fallen

    def judge(self, found):
        difference = self.difference(found)
        steps = len(next(iter(found["losses"].values())))
        why = f"after {steps} steps they differ by {100 * difference:.1f}% of the fall"
        return between(difference, (0, 0.05), (0, 0.10), why)

    def here(self, found):
        return f"{100 * self.difference(found):.1f}% apart"

    def panel(self, found):
        series = {}
        for r, losses in found["losses"].items():
            points = [(n + 1, loss, 0.0) for n, loss in enumerate(losses)]
            series[f"r = {r}"] = points
        return Panel("training loss (nats)", series, "step")


class RateAgainstRank(Claim):
    group = "Learning rate"
    sentence = (
        "The best rate goes with the rank as r^0, r^-1/4 and r^-1/2 if B A is multiplied by "
        "α/r, α/√r and α."
    )
    source = f"{CHEN}, Corollary 4.4"
    paper = "exponents 0, -0.25 and -0.5"
    read = (
        "the abstract was read (in one setting the rate does not depend on the rank, in "
        "another it falls with it); the exponents are " + NOTES
    )
    threshold = "each exponent within 0.15: reproduced; some of them: partly"
    advice = "Prefer the rule with the exponent nearest to 0: under it a rate survives longest."
    differs = "The theory is for wide models; three ranks fix an exponent only roughly."

    predicted = {"1.0": 0.0, "0.5": -0.25, "0.0": -0.5}
    names = {"1.0": "α/r", "0.5": "α/√r", "0.0": "α"}

    def measure(self, lab):
        ranks = [r for r in lab.scale.ranks if r not in (lab.scale.low_rank, 8)]
        ranks = ranks if len(ranks) > 1 else list(lab.scale.ranks[1:])
        found = {"ranks": ranks, "best": {}}
        for power in self.predicted:
            arms = [Arm(r=r, power=float(power)) for r in ranks]
            found["best"][power] = [lab.best_rates(arm) for arm in arms]
        return found

    def exponents(self, found):
        return {power: slopes(found["ranks"], best) for power, best in found["best"].items()}

    def judge(self, found):
        holds, texts = [], []
        for power, exponent in self.exponents(found).items():
            holds.append(abs(exponent["mean"] - self.predicted[power]) <= 0.15)
            texts.append(
                f"{exponent['mean']:+.2f} ± {exponent['std']:.2f} for {self.names[power]}"
            )
        every = sum(found["best"].values(), [])
        return of_all(holds, ", ".join(texts) + edge_note(*every))

    def here(self, found):
        return ", ".join(f"{e['mean']:+.2f}" for e in self.exponents(found).values())

    def panel(self, found):
        series = {}
        for power, group in found["best"].items():
            points = []
            for r, best in zip(found["ranks"], group):
                points.append((r, best["mean"], bars(best["rates"], best["mean"])))
            series[self.names[power]] = points
        return Panel("best learning rate", series, "rank", log_x=True, log_y=True)


def slopes(x, best):
    """The exponent with which best rates [{"rates"}, ...] go with x, as a spread over seeds."""
    log_x = [math.log(value) for value in x]
    found = []
    for rates in zip(*(b["rates"] for b in best)):
        found.append(slope(log_x, [math.log(value) for value in rates]))
    return spread(found)
