"""
Claims about the change that tuning makes to the weights.
"""
import statistics

import torch

from bench.papers import spectra
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
    at_least,
    of_all,
    percent,
    settled,
    share,
    spread,
)
from bench.papers.ranks import FROZEN, HU
from bench.papers.rates import FULL

BIDERMAN = "Biderman et al. 2024 (arXiv 2405.09673)"
SHUTTLEWORTH = "Shuttleworth et al. 2024, An Illusion of Equivalence (arXiv 2410.21228)"
CUTS = (0, 1, 2, 4, 8, 16, 32, 64)


def two_seeds(lab):
    """The seeds of what is measured on weights: that takes longer than a run."""
    return lab.scale.seeds[:2]


class ChangeOfHighRank(Claim):
    group = "The change ΔW"
    sentence = "Full fine-tuning changes the weights by matrices of a high rank."
    source = f"{BIDERMAN}, abstract and §4.6"
    paper = "10 to 100 times the rank of typical LoRA"
    read = ABSTRACT
    threshold = "90% of ΔW's energy needs 10 times r = 8 on average: reproduced; 3 times: partly"
    advice = "The rank of ΔW says little about the rank that you need: see the claim above."
    differs = "Noise of the optimizer has full rank, and short runs have much of it."

    def measure(self, lab):
        base = lab.weights()
        found = {"ranks": {}, "base": {}, "full rank": 0}
        for seed in two_seeds(lab):
            weights, _ = lab.tuned(FULL, seed)
            for name, D in spectra.changes(weights, base).items():
                kind = kind_of(name)
                found["ranks"].setdefault(kind, []).append(spectra.rank_for_energy(D))
        for name, W in spectra.matrices(base).items():
            found["base"].setdefault(kind_of(name), []).append(spectra.rank_for_energy(W))
            found["full rank"] = max(found["full rank"], min(W.shape))
        return found

    def mean(self, found, which="ranks"):
        return statistics.fmean(sum(found[which].values(), []))

    def judge(self, found):
        times = self.mean(found) / 8
        why = (
            f"a rank of {self.mean(found):.0f} of {found['full rank']} on average, {times:.0f} "
            f"times 8; the weights themselves need {self.mean(found, 'base'):.0f}"
        )
        return at_least(times, 10, 3, why)

    def here(self, found):
        return f"rank {self.mean(found):.0f} of {found['full rank']}"

    def panel(self, found):
        series = {}
        for which, label in (("ranks", "ΔW"), ("base", "W")):
            points = []
            for kind, ranks in found[which].items():
                points.append((kind, statistics.fmean(ranks), spread(ranks)["std"]))
            series[label] = points
        return Panel("rank with 90% of the energy", series)


class LowRankDoesTheWork(Claim):
    group = "The change ΔW"
    sentence = "A low rank of full fine-tuning's ΔW does nearly all of its work."
    source = f"{HU}, §4.1 and §7 (the hypothesis of a low intrinsic rank)"
    paper = "no number"
    read = NOTES
    threshold = "ΔW cut to rank 8 keeps 95% of the gain: reproduced; 80%: partly"
    advice = (
        "Compare the two curves: LoRA chooses its directions while it learns, a cut cannot."
    )
    differs = "Full fine-tuning with frozen embeddings, so that only matrices are compared."

    def measure(self, lab):
        base = lab.weights()
        before = lab.before()["report"]
        found = {"kept": {}, "lora": {}}
        for seed in two_seeds(lab):
            weights, _ = lab.tuned(FROZEN, seed)
            factors = spectra.change_factors(weights, base)
            whole = before - lab.score_of(weights)["report"]
            for rank in CUTS:
                cut = spectra.truncated(weights, base, factors, rank)
                kept = (before - lab.score_of(cut)["report"]) / whole
                found["kept"].setdefault(str(rank), []).append(kept)
        full = statistics.fmean(lab.final(FROZEN))
        for r in lab.scale.ranks:
            learned = [(before - value) / (before - full) for value in lab.final(Arm(r=r))]
            found["lora"][str(r)] = learned
        return found

    def mean(self, found, rank):
        return statistics.fmean(found["kept"][str(rank)])

    def judge(self, found):
        texts = [f"rank {rank} {percent(self.mean(found, rank))}" for rank in CUTS]
        low = [f"r = {r} {share(spread(values))}" for r, values in found["lora"].items()]
        why = f"kept: {', '.join(texts)}; LoRA trained at a rank: {', '.join(low)}"
        return at_least(self.mean(found, 8), 0.95, 0.80, why)

    def here(self, found):
        return f"rank 8 keeps {percent(self.mean(found, 8))}"

    def panel(self, found):
        series = {}
        for name, label in (("kept", "ΔW of full, cut"), ("lora", "LoRA, trained")):
            points = []
            for rank, values in found[name].items():
                if int(rank) > 0:
                    s = settled(spread(values))
                    points.append((int(rank), 100 * s["mean"], 100 * s["std"]))
            series[label] = points
        return Panel("% of the gain", series, "rank", log_x=True)


class SharedFirstDirection(Claim):
    group = "The change ΔW"
    sentence = "A low and a high rank learn the same first direction, and share little else."
    source = f"{HU}, Figure 3"
    paper = "φ > 0.5 for one dimension; the others overlap less"
    read = NOTES
    threshold = (
        "the first right singular directions of ΔW overlap by 0.5 on average, and the first "
        "eight by less: reproduced; one of the two: partly"
    )
    advice = "Much of a high rank is not used."
    otherwise = "Two ranks find different directions, and both do the work."
    differs = "The two runs differ in seed as well as in rank."

    def measure(self, lab):
        low, high = Arm(), Arm(r=lab.scale.high_rank)
        if low == high:
            low = Arm(r=lab.scale.low_rank)
        base = lab.weights()
        first, second = lab.scale.seeds[:2]
        low_changes = spectra.changes(lab.tuned(low, first)[0], base)
        high_changes = spectra.changes(lab.tuned(high, second)[0], base)
        found = {"overlap": {}, "chance": {}}
        for i in (1, 2, 4, 8):
            found["overlap"][str(i)] = []
            found["chance"][str(i)] = statistics.fmean(i / D.size(1) for D in low_changes.values())
        for name, D in low_changes.items():
            _, _, low_Vh = spectra.svd(D)
            _, _, high_Vh = spectra.svd(high_changes[name])
            for i, values in found["overlap"].items():
                i = int(i)
                values.append(spectra.overlap(low_Vh[:i].t(), high_Vh[:i].t()))
        return found

    def mean(self, found, i):
        return statistics.fmean(found["overlap"][str(i)])

    def judge(self, found):
        texts = []
        for i in found["overlap"]:
            texts.append(f"first {i}: {self.mean(found, i):.2f}, chance {found['chance'][i]:.3f}")
        one, eight = self.mean(found, 1), self.mean(found, 8)
        return of_all([one >= 0.5, eight < one], "; ".join(texts))

    def here(self, found):
        return f"φ = {self.mean(found, 1):.2f} for one, {self.mean(found, 8):.2f} for eight"

    def panel(self, found):
        points, chance = [], []
        for i, values in found["overlap"].items():
            points.append((int(i), statistics.fmean(values), spread(values)["std"]))
            chance.append((int(i), found["chance"][i], 0.0))
        return Panel("overlap φ", {"ΔW": points, "chance": chance}, "directions", log_x=True)


class AmplifiesWhatWNeglects(Claim):
    group = "The change ΔW"
    sentence = "ΔW amplifies directions that W does not emphasize, the more so the lower the rank."
    source = f"{HU}, Table 7"
    paper = "by 21.5 with r = 4, by 1.9 with r = 64 (Wq of one layer)"
    read = NOTES
    threshold = "by more than 5 with r = 4, and more than three times as with r = 64: reproduced"
    advice = "LoRA turns up what the base has and does not use."
    differs = "The mean over Wq of all layers; ΔW is larger relative to W in a small model."

    def measure(self, lab):
        low, high = lab.scale.ranks[1], lab.scale.high_rank
        base = lab.weights()
        before = spectra.matrices(base)
        found = {}
        for r in (low, high):
            values = []
            for seed in two_seeds(lab):
                changes = spectra.changes(lab.tuned(Arm(r=r), seed)[0], base)
                for name, D in changes.items():
                    if name.endswith(".q"):
                        values.append(spectra.amplification(D, before[name], r))
            found[str(r)] = spread(values)
        return found

    def judge(self, found):
        low, high = (s["mean"] for s in found.values())
        texts = [f"{s['mean']:.1f} ± {s['std']:.1f} with r = {r}" for r, s in found.items()]
        return of_all([low > 5, low > 3 * high], ", ".join(texts))

    def here(self, found):
        return ", ".join(f"{s['mean']:.1f} (r = {r})" for r, s in found.items())

    def panel(self, found):
        series = {f"r = {r}": [(f"r = {r}", s["mean"], s["std"])] for r, s in found.items()}
        return Panel("amplification", series)


class IntruderDimensions(Claim):
    group = "The change ΔW"
    sentence = "LoRA gives the weights intruder dimensions; full fine-tuning, almost none."
    source = f"{SHUTTLEWORTH}, Figure 4"
    paper = "many against almost none"
    read = NOTES
    threshold = (
        "LoRA has 5% of the leading directions as intruders and five times as many as full: "
        "reproduced; it has more than full: partly"
    )
    advice = "They are a matter of the size of ΔW, too: compare the controls."
    differs = "LoRA's ΔW is larger here; two controls give each the size of the other."

    def measure(self, lab):
        base = lab.weights()
        arms = {"full": FULL}
        arms |= {f"r = {r}": Arm(r=r) for r in (lab.scale.low_rank, 8, lab.scale.high_rank)}
        found = {"of": 0, "counts": {name: [] for name in arms}}
        controls = ("full, as large as r = 8", "r = 8, as small as full", "random, as r = 8")
        found["counts"] |= {name: [] for name in controls}
        before = {}
        for name, W in spectra.matrices(base).items():
            before[name] = W, spectra.svd(W)[0]
        for seed in two_seeds(lab):
            changes = {}
            for name, arm in arms.items():
                changes[name] = spectra.changes(lab.tuned(arm, seed)[0], base)
            changes |= sized(changes, seed)
            for name, of_name in changes.items():
                found["counts"][name].append(count_intruders(before, of_name))
        some = next(iter(spectra.matrices(base).values()))
        found["of"] = len(spectra.matrices(base)) * min(spectra.LEADING, *some.shape)
        return found

    def means(self, found):
        return {name: statistics.fmean(counts) for name, counts in found["counts"].items()}

    def judge(self, found):
        means = self.means(found)
        texts = [f"{name} {count:.0f}" for name, count in means.items()]
        why = f"of {found['of']}: {', '.join(texts)}"
        lora, full = means["r = 8"], means["full"]
        if lora >= 0.05 * found["of"] and lora >= 5 * full:
            return Verdict(REPRODUCED, why)
        return Verdict(PARTLY if lora > full else NOT_REPRODUCED, why)

    def here(self, found):
        means = self.means(found)
        return f"r = 8 {means['r = 8']:.0f}, full {means['full']:.0f} of {found['of']}"

    def panel(self, found):
        series = {}
        for name, counts in found["counts"].items():
            s = spread(counts)
            series[name] = [(name, s["mean"], s["std"])]
        return Panel(f"intruders of {found['of']}", series)


def sized(changes, seed):
    """Controls: the changes {name: D} of full and of r = 8, each with the size of the other."""
    full, lora = changes["full"], changes["r = 8"]
    device = next(iter(full.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    grown, shrunk, random = {}, {}, {}
    for name in full:
        larger = lora[name].norm() / full[name].norm()
        grown[name] = full[name] * larger
        shrunk[name] = lora[name] / larger
        random[name] = spectra.random_update(lora[name], 8, generator)
    return {
        "full, as large as r = 8": grown, "r = 8, as small as full": shrunk,
        "random, as r = 8": random,
    }


def count_intruders(before, changes):
    """How many intruders all matrices have together, after changes {name: D}.

    before {name: (W, its left singular vectors)}
    """
    count = 0
    for name, (W, U) in before.items():
        U_tuned, _, _ = spectra.svd(W + changes[name])
        count += int(spectra.intruders(U, U_tuned).sum())
    return count


class SmallerIntruders(Claim):
    group = "The change ΔW"
    sentence = "Making the intruders smaller undoes forgetting, and costs no learning."
    source = f"{SHUTTLEWORTH}, Figure 8"
    paper = "λ = 0.7: up to 33% less forgetting, the same accuracy"
    read = NOTES
    threshold = (
        "with λ = 0.7, forgetting falls by 10% and learning by at most 2%, and more forgetting "
        "is undone for the same learning than by making all of ΔW smaller: reproduced; "
        "the first two: partly"
    )
    advice = "Shrink the intruders after training, to forget less."
    otherwise = "It is no free way to forget less here; compare it with scaling all of ΔW."
    differs = "In a small model ΔW is large relative to W, and the intruders carry the style."

    factors = (0.7, 0.3)

    def measure(self, lab):
        base, before = lab.weights(), lab.before()
        found = {"points": {}}
        for seed in two_seeds(lab):
            weights, _ = lab.tuned(Arm(), seed)
            scores = {"LoRA": lab.score_of(weights)}
            for factor in self.factors:
                changed = shrink_intruders(weights, base, factor)
                scores[f"intruders × {factor}"] = lab.score_of(changed)
            for factor in (0.9, 0.8, 0.7):
                smaller = {}
                for name, W in base.items():
                    smaller[name] = W + factor * (weights[name] - W)
                scores[f"ΔW × {factor}"] = lab.score_of(smaller)
            for name, score in scores.items():
                point = {
                    "learned": before["report"] - score["report"],
                    "forgotten": score["base"] - before["base"],
                }
                found["points"].setdefault(name, []).append(point)
        return found

    def means(self, found):
        """{name: (learned, forgotten)}, relative to LoRA as it is."""
        means = {}
        for name, points in found["points"].items():
            learned = statistics.fmean(point["learned"] for point in points)
            forgotten = statistics.fmean(point["forgotten"] for point in points)
            means[name] = learned, forgotten
        learned, forgotten = means["LoRA"]
        relative = {}
        for name, (its_learned, its_forgotten) in means.items():
            relative[name] = its_learned / learned, its_forgotten / forgotten
        return relative

    def judge(self, found):
        means = self.means(found)
        learned, forgotten = means["intruders × 0.7"]
        texts, is_better = [], True
        for name, (its_learned, its_forgotten) in means.items():
            texts.append(
                f"{name}: learned {percent(its_learned)}, forgotten {percent(its_forgotten)}"
            )
            if name.startswith("ΔW") and its_learned >= learned:
                is_better = is_better and forgotten < its_forgotten
        works = forgotten <= 0.9 and learned >= 0.98
        why = "; ".join(texts)
        if works and is_better:
            return Verdict(REPRODUCED, why)
        return Verdict(PARTLY if works else NOT_REPRODUCED, why)

    def here(self, found):
        learned, forgotten = self.means(found)["intruders × 0.7"]
        return f"λ = 0.7: {percent(learned)} learned, {percent(forgotten)} forgotten"

    def panel(self, found):
        series = {}
        for name, points in found["points"].items():
            learned = [point["learned"] for point in points]
            forgotten = spread([point["forgotten"] for point in points])
            x = statistics.fmean(learned)
            series[name] = [(x, forgotten["mean"], forgotten["std"])]
        return Panel("forgotten (bpb)", series, "learned (bpb)")


def shrink_intruders(weights, base, factor):
    """The weights with the singular values of all intruders multiplied by `factor`."""
    found = dict(weights)
    for name in weights:
        if not spectra.is_adapted(name):
            continue
        parts = 3 if name.endswith("c_attn.weight") else 1
        changed = []
        for W, tuned in zip(base[name].chunk(parts), weights[name].chunk(parts)):
            changed.append(spectra.without_intruders(W, tuned, factor))
        found[name] = torch.cat(changed)
    return found


def kind_of(name):
    """Which of a block's matrices a name stands for: 'q', 'k', 'v', 'o', 'fc' or 'proj'."""
    if name.endswith("attn.c_proj"):
        return "o"
    return name.rpartition(".")[2].removeprefix("c_")
