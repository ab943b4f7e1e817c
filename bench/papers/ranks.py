"""
Claims about the rank, and about what LoRA can hold.
"""
from dataclasses import replace

from bench.papers.arms import Arm
from bench.papers.claim import (
    NOT_REPRODUCED,
    NOTES,
    SECOND_HAND,
    Claim,
    Panel,
    ShareClaim,
    Verdict,
    at_least,
    bpb,
    diverged,
    diverged_runs,
    edge_note,
    is_above,
    of_all,
    part,
    percent,
    settled,
    share,
    shares,
    spread,
)
from bench.papers.rates import FULL, SCHULMAN

HU = "Hu et al. 2021 (LoRA, arXiv 2106.09685)"
FROZEN = Arm(method="full", embeddings=False)
BITS_PER_PARAMETER = 2      # Allen-Zhu and Li 2024
EMBEDDING_RATE = 1 / 16     # of the rate of A and B: about what full fine-tuning takes


def learned(lab, arms):
    """{name: the share of what full fine-tuning learns, "at_edge"} of {name: Arm}."""
    before, full = lab.before()["report"], lab.final(FULL)
    found = {}
    for name, arm in arms.items():
        found[name] = shares(before, lab.final(arm), full)
        found[name]["at_edge"] = lab.sweep(arm).at_edge
    return found


class AsMuchAsFull(ShareClaim):
    group = "Rank and capacity"
    sentence = "With a sufficient rank, LoRA on all layers learns as much as full fine-tuning."
    source = SCHULMAN
    paper = "the same final loss"
    read = SECOND_HAND
    threshold = "99% of what full learns, with the highest rank: reproduced; 97%: partly"
    advice = "Use LoRA with a rank of 16 or more wherever you would have tuned all weights."
    otherwise = "LoRA loses a little; measure how much where every percent counts."
    differs = (
        "Here the embeddings are a large part of the model, and LoRA leaves them frozen; "
        "a large model has relatively fewer."
    )

    def measure(self, lab):
        arms = {f"r = {r}": Arm(r=r) for r in lab.scale.ranks}
        return learned(lab, {**arms, "full, embeddings frozen": FROZEN})

    def highest(self, found):
        return [s for name, s in found.items() if name.startswith("r = ")][-1]

    def judge(self, found):
        best = self.highest(found)
        texts = [f"{name} {share(s)}" for name, s in found.items()]
        why = ", ".join(texts) + edge_note(*found.values())
        return at_least(best["mean"], 0.99, 0.97, why)

    def here(self, found):
        return share(self.highest(found))


class RankOneSuffices(ShareClaim):
    group = "Rank and capacity"
    sentence = "A rank of 1 on all layers learns as much as a high rank."
    source = f"{HU}, Table 6 (where only Wq and Wv are adapted)"
    paper = "73.4% with r = 1, 73.5% with r = 64 (WikiSQL)"
    read = NOTES
    threshold = "99% of what the highest rank learns: reproduced; 97%: partly"
    advice = "A rank of 1 is enough for a style; raise it if the text is long."
    otherwise = (
        "Begin with r = 8 or 16; lower it only if the size of the file matters, and then "
        "search for the learning rate again: one seed may stand a rate that another does not."
    )
    differs = "GPT-3 is ten thousand times as large, and needs to learn less for its task."

    def measure(self, lab):
        names = (lab.scale.low_rank, lab.scale.high_rank)
        return learned(lab, {f"r = {r}": Arm(r=r) for r in names})

    def part(self, found):
        low, high = found.values()
        return part(low, high)

    def judge(self, found):
        texts = [f"{name} {share(s)} of full's" for name, s in found.items()]
        why = f"{percent(self.part(found))}: {', '.join(texts)}{edge_note(*found.values())}"
        return at_least(self.part(found), 0.99, 0.97, why)

    def here(self, found):
        return f"{percent(self.part(found))} of what the highest rank learns"


class QueryNeedsMoreRank(ShareClaim):
    group = "Rank and capacity"
    sentence = "A rank of 1 suffices if Wq and Wv are adapted, and not for Wq alone."
    source = f"{HU}, Table 6"
    paper = "Wq, Wv: 73.4% of at most 73.8%; Wq: 68.8% of at most 70.5%"
    read = NOTES
    threshold = (
        "r = 1 learns 99% of what r = 64 learns with Wq and Wv, and less than 99% with "
        "Wq alone: reproduced; one of the two: partly"
    )
    advice = "Fewer matrices need a higher rank, and still learn less: adapt them all."
    differs = "One matrix of a small model holds far less than one of GPT-3."

    def measure(self, lab):
        arms = {}
        for matrices in ("qv", "q"):
            for r in (lab.scale.low_rank, lab.scale.high_rank):
                arms[f"{matrices}, r = {r}"] = Arm(matrices=matrices, r=r)
        return learned(lab, arms)

    def parts(self, found):
        qv_low, qv_high, q_low, q_high = found.values()
        return part(qv_low, qv_high), part(q_low, q_high)

    def judge(self, found):
        qv, q = self.parts(found)
        why = f"of what the high rank learns, {percent(qv)} with both and {percent(q)} with Wq"
        return of_all([qv >= 0.99, q < 0.99], why + edge_note(*found.values()))

    def here(self, found):
        qv, q = self.parts(found)
        return f"{percent(qv)}; {percent(q)}"


class LowRanksRunOut(Claim):
    group = "Rank and capacity"
    sentence = (
        "A rank falls behind when the text has more to learn than its parameters hold, at "
        "two bits each, and not before."
    )
    source = f"{SCHULMAN}; Allen-Zhu and Li 2024 (knowledge capacity)"
    paper = "2 bits a parameter; the loss falls behind beyond that"
    read = NOTES
    threshold = (
        "what full fine-tuning saves of the training text, in bits, is what there is to "
        "learn: ranks that hold less of it stay 5% below the highest rank, those that hold "
        "more do not: reproduced; some as predicted: partly"
    )
    advice = "Count: half the bits that the base does not know are the parameters you need."
    otherwise = "Two bits a parameter predict little here: try a higher rank instead."
    differs = "The bits saved on a text of 144 kB, in 24 epochs with dropout, are few."

    def measure(self, lab):
        before = lab.before()["train"]
        size = lab.corpora("pirate")["train"].heldout_bytes
        arms = {f"r = {r}": Arm(r=r) for r in lab.scale.ranks}
        found = {}
        for name, arm in {**arms, "full": FULL}.items():
            saved = [size * (before - result["train"]) for result in lab.reports(arm)]
            found[name] = {**spread(saved), "parameters": lab.parameters(arm)}
        return found

    def predictions(self, found):
        """{rank: (whether it should fall behind, whether it does)}, without the highest."""
        to_learn = found["full"]["mean"]
        ranks = [name for name in found if name != "full"]
        highest = found[ranks[-1]]["mean"]
        table = {}
        for name in ranks[:-1]:
            holds = BITS_PER_PARAMETER * found[name]["parameters"]
            table[name] = holds < to_learn, found[name]["mean"] < 0.95 * highest
        return table

    def judge(self, found):
        texts = []
        for name, s in found.items():
            density = s["mean"] / s["parameters"]
            text = f"{name} {s['mean'] / 1000:.0f} kbit, {density:.2g} a parameter"
            to_learn = found["full"]["mean"]
            if diverged(s, to_learn):
                text += f" ({diverged_runs(s, to_learn)})"
            texts.append(text)
        table = self.predictions(found)
        right = [name for name, (should, does) in table.items() if should == does]
        why = f"as predicted: {', '.join(right) or 'no rank'}; saved: {'; '.join(texts)}"
        return of_all((should == does for should, does in table.values()), why)

    def here(self, found):
        ends = [list(found.values())[0], found["full"]]
        bits = [f"{s['mean'] / 1000:.0f} kbit" for s in ends]
        density = ends[0]["mean"] / ends[0]["parameters"]
        return f"lowest rank {bits[0]} ({density:.2g} a parameter), full {bits[1]}"

    def panel(self, found):
        points = []
        for s in found.values():
            shown = settled(s, found["full"]["mean"])
            points.append((s["parameters"], shown["mean"] / 1000, shown["std"] / 1000))
        ylabel = "kbit saved of the training text"
        return Panel(ylabel, {"": points}, "parameters", log_x=True)


class EmbeddingsAreTheGap(Claim):
    group = "Rank and capacity"
    sentence = (
        "What LoRA lacks of full fine-tuning in a small model has to do with the frozen "
        "embeddings more than with the rank."
    )
    source = "the README of this project"
    paper = "in one run of the 1M model"
    read = "a claim of this project, tested here for the first time"
    threshold = (
        "full fine-tuning with frozen embeddings, and LoRA with trained ones, each explain "
        "half of the gap: reproduced; one of them: partly"
    )
    advice = "In a small model, let the embeddings train beside LoRA, at full's rate."
    otherwise = "Training the embeddings is not all that is missing; compare a higher rank."
    differs = "A large model has few embeddings for its size."

    def measure(self, lab):
        trained = Arm(
            r=lab.scale.high_rank, embeddings=True, embedding_rate=EMBEDDING_RATE
        )
        arms = {
            "full": FULL, "full, embeddings frozen": FROZEN,
            "LoRA": Arm(r=lab.scale.high_rank), "LoRA, embeddings trained": trained,
            "LoRA r = 8": Arm(),
            "LoRA r = 8, embeddings trained": replace(trained, r=8),
        }
        found = {}
        for name, arm in arms.items():
            found[name] = {**spread(lab.final(arm)), "at_edge": lab.sweep(arm).at_edge}
        return found

    def explained(self, found):
        """The parts of the gap at the highest rank that the two experiments explain."""
        full = found["full"]["mean"]
        lora = found["LoRA"]["mean"]
        gap = lora - full
        frozen = (found["full, embeddings frozen"]["mean"] - full) / gap
        trained = (lora - found["LoRA, embeddings trained"]["mean"]) / gap
        return frozen, trained

    def judge(self, found):
        if not is_above(found["LoRA"], found["full"]):
            return Verdict(NOT_REPRODUCED, "the highest rank has no gap to explain")
        frozen, trained = self.explained(found)
        texts = [f"{name} {bpb(s)}" for name, s in found.items()]
        why = (
            f"{percent(frozen)} and {percent(trained)} of the gap: {', '.join(texts)}"
            + edge_note(*found.values())
        )
        return of_all([frozen >= 0.5, trained >= 0.5], why)

    def here(self, found):
        return ", ".join(f"{name} {s['mean']:.3f}" for name, s in found.items())

    def panel(self, found):
        series = {name: [(name, s["mean"], s["std"])] for name, s in found.items()}
        return Panel("bpb", series)
