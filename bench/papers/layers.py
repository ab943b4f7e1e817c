"""
Claims about which matrices to adapt, and which of A and B to train.
"""
from bench.papers.arms import Arm
from bench.papers.claim import (
    NOT_REPRODUCED,
    NOTES,
    PARTLY,
    REPRODUCED,
    SECOND_HAND,
    ShareClaim,
    Verdict,
    at_least,
    edge_note,
    is_above,
    noise,
    part,
    percent,
    texts_of,
)
from bench.papers.ranks import HU, learned
from bench.papers.rates import SCHULMAN

ZHU = "Zhu et al. 2024, Asymmetry in Low-Rank Adapters (arXiv 2402.16842)"

# One budget: with C channels, rank 1 costs 6 C parameters a block in attention, 10 C in the
# MLP, 16 C in both.
ONE_BUDGET = {
    "attention": Arm(matrices="attention", r=40),
    "MLP": Arm(matrices="mlp", r=24),
    "all": Arm(r=15),
}


class AttentionAlone(ShareClaim):
    group = "Layers"
    sentence = "At one budget of parameters, adapting attention alone is worse than the MLP alone."
    source = f"{SCHULMAN}; Biderman et al. 2024, Figure 7"
    paper = "attention with r = 256 is worse than the MLP with r = 128"
    read = SECOND_HAND
    threshold = "the MLP learns 1% more of what full learns, and more than noise; less: partly"
    advice = "Adapt all linear layers; if you must choose, choose the MLP."
    otherwise = "Compare the two at your budget: neither is clearly better."
    differs = "The text is a new style; a task that asks for other attention may differ."

    def measure(self, lab):
        return learned(lab, {name: ONE_BUDGET[name] for name in ("attention", "MLP")})

    def judge(self, found):
        attention, mlp = found["attention"], found["MLP"]
        why = texts_of(found) + edge_note(attention, mlp)
        if not is_above(mlp, attention):
            return Verdict(NOT_REPRODUCED, why)
        return Verdict(REPRODUCED if mlp["mean"] - attention["mean"] >= 0.01 else PARTLY, why)


class AttentionOnTop(ShareClaim):
    group = "Layers"
    sentence = "Adapting attention as well as the MLP adds nothing, with one budget."
    source = f"{SCHULMAN} (Dettmers et al. 2023, Figure 2, find that all layers are needed)"
    paper = "the MLP alone is as good as all"
    read = SECOND_HAND
    threshold = "all layers learn at most 1% more of what full learns: reproduced; 2%: partly"
    advice = "It does no harm either: all layers with one rank is the simple choice."
    otherwise = "Adapt all linear layers."
    differs = "The budget is equal here; in the paper the rank is."

    def measure(self, lab):
        return learned(lab, {name: ONE_BUDGET[name] for name in ("MLP", "all")})

    def judge(self, found):
        gain = found["all"]["mean"] - found["MLP"]["mean"]
        why = texts_of(found) + edge_note(*found.values())
        return at_least(-gain, -0.01, -0.02, why)


class ManyMatrices(ShareClaim):
    group = "Layers"
    sentence = "With one budget, many matrices with a small rank beat one with a large rank."
    source = f"{HU}, Table 5"
    paper = "Wq, Wv 73.7%; Wv 73.0%; Wq 70.4%; Wk 70.0% (WikiSQL)"
    read = NOTES
    threshold = (
        "q and v with r = 4 beat q and k alone with r = 8, and v alone, by more than noise: "
        "reproduced; they beat q and k, but not v: partly"
    )
    advice = "Spread a budget over all matrices before you raise the rank."
    otherwise = "Which matrices you adapt matters more than how many."
    differs = "q, k and v are slices of one matrix here, with adapters of their own."

    def measure(self, lab):
        ranks = {"q": 8, "k": 8, "v": 8, "o": 8, "qk": 4, "qv": 4, "qkvo": 2}
        return learned(lab, {name: Arm(matrices=name, r=r) for name, r in ranks.items()})

    def judge(self, found):
        why = texts_of(found) + edge_note(*found.values())
        beats = {name: is_above(found["qv"], found[name]) for name in ("q", "k", "v")}
        if all(beats.values()):
            return Verdict(REPRODUCED, why)
        return Verdict(PARTLY if beats["q"] and beats["k"] else NOT_REPRODUCED, why)

    def here(self, found):
        return ", ".join(f"{name} {100 * s['mean']:.0f}%" for name, s in found.items())


class RandomA(ShareClaim):
    group = "A and B"
    sentence = "With A random and frozen, training B alone is nearly as good as training both."
    source = ZHU
    paper = "nearly as well; 0.1 to 0.5 points of GLUE"
    read = "the abstract was read; the points are " + NOTES
    threshold = "B alone learns 98% of what both learn: reproduced; 95%: partly"
    advice = "It halves gradients and optimizer state of an adapter, which are small anyway."
    otherwise = "Train both."
    differs = "A starts from U(±1/√in) here, in the paper partly orthogonal."

    def measure(self, lab):
        return learned(lab, {"both": Arm(), "B alone": Arm(frozen="A")})

    def part(self, found):
        return part(found["B alone"], found["both"])

    def judge(self, found):
        why = f"{percent(self.part(found))}: {texts_of(found)}" + edge_note(*found.values())
        return at_least(self.part(found), 0.98, 0.95, why)

    def here(self, found):
        return percent(self.part(found))


class BMoreThanA(ShareClaim):
    group = "A and B"
    sentence = "Training B alone is better than training A alone."
    source = ZHU
    paper = "better; by 2.3 points of GLUE on average"
    read = "the abstract was read; the points are " + NOTES
    threshold = "by more than noise: reproduced; within noise: partly"
    advice = "If one of the two is to be frozen, freeze A."
    otherwise = "Neither is clearly the one to freeze."
    differs = "The frozen factor is drawn from U(±1/√fan-in), whichever it is."

    def measure(self, lab):
        arms = {"B alone": Arm(frozen="A"), "A alone": Arm(random="B", frozen="B")}
        return learned(lab, arms)

    def judge(self, found):
        b, a = found["B alone"], found["A alone"]
        why = texts_of(found) + edge_note(a, b)
        if is_above(b, a):
            return Verdict(REPRODUCED, why)
        return Verdict(NOT_REPRODUCED if is_above(a, b) else PARTLY, why)


class BWithTwiceTheRank(ShareClaim):
    group = "A and B"
    sentence = "With as many parameters, B alone with twice the rank beats both."
    source = ZHU
    paper = "on GLUE; not on summarization"
    read = NOTES
    threshold = "by more than noise: reproduced; as good within noise: partly"
    advice = "With a fixed budget, freeze A and double the rank."
    otherwise = "There is no reason to leave the usual way."
    differs = "With fused q, k and v, B is larger than A: twice the rank has 1.2 times as much."

    def measure(self, lab):
        arms = {"both, r = 8": Arm(), "B alone, r = 16": Arm(r=16, frozen="A")}
        found = learned(lab, arms)
        for name, arm in arms.items():
            found[name]["parameters"] = lab.parameters(arm)
        return found

    def judge(self, found):
        both, alone = found.values()
        why = texts_of(found) + edge_note(both, alone)
        if is_above(alone, both):
            return Verdict(REPRODUCED, why)
        within = abs(alone["mean"] - both["mean"]) <= 2 * noise(alone, both)
        return Verdict(PARTLY if within else NOT_REPRODUCED, why)
