"""
Claims about the factor of B A, how A and B begin, their rates, and the batch.
"""
from dataclasses import replace

from bench.papers.arms import Arm
from bench.papers.claim import (
    ABSTRACT,
    NOT_REPRODUCED,
    NOTES,
    PARTLY,
    REPRODUCED,
    SECOND_HAND,
    Claim,
    Panel,
    ShareClaim,
    Verdict,
    bpb,
    edge_note,
    is_above,
    noise,
    of_all,
    percent,
    share,
    share_panel,
    shares,
    spread,
)
from bench.papers.laboratory import first_guess
from bench.papers.rates import CHEN, FULL, SCHULMAN, bars, ratio_of

LEE = "Lee et al. 2026 (arXiv 2602.04998), abstract"
B_RATE = 16         # the rate of B, relative to that of A, in LoRA+


class LowRateNeedsRoot(Claim):
    group = "Variants"
    sentence = "At one low rate, a larger rank helps only if B A is multiplied by α/√r."
    source = "Kalajdzievski 2023 (rsLoRA, arXiv 2312.03732), Figure 2"
    paper = "α/r: no gain from r = 4 to 2048; α/√r: gains throughout"
    read = NOTES
    threshold = (
        "from the second-lowest to the highest rank, α/√r gains at least three times what α/r "
        "gains, and more than noise: reproduced; it gains more, but less than that: partly"
    )
    advice = "If a larger rank does not help, search for the rate again before you doubt the rank."
    differs = "The two rules are made equal at r = 8; an eighth of the usual rate counts as low."

    def measure(self, lab):
        ranks = lab.scale.ranks[1:]
        k = first_guess(Arm(), lab.scale) - 3
        found = {"ranks": ranks, "k": k}
        for name, power in (("α/r", 1.0), ("α/√r", 0.5)):
            arms = [Arm(r=r, power=power) for r in ranks]
            found[name] = [spread(lab.final(arm, k)) for arm in arms]
        return found

    def gains(self, found):
        return {name: found[name][0]["mean"] - found[name][-1]["mean"] for name in ("α/r", "α/√r")}

    def judge(self, found):
        gains = self.gains(found)
        why = f"gains of {gains['α/√r']:+.3f} with α/√r, {gains['α/r']:+.3f} bpb with α/r"
        is_gain = is_above(found["α/√r"][0], found["α/√r"][-1])
        if is_gain and gains["α/√r"] >= 3 * gains["α/r"]:
            return Verdict(REPRODUCED, why)
        if is_gain and gains["α/√r"] > gains["α/r"]:
            return Verdict(PARTLY, why)
        return Verdict(NOT_REPRODUCED, why)

    def here(self, found):
        gains = self.gains(found)
        return f"gain of {gains['α/√r']:+.3f} with α/√r, {gains['α/r']:+.3f} bpb with α/r"

    def panel(self, found):
        series = {}
        for name in ("α/r", "α/√r"):
            points = []
            for r, s in zip(found["ranks"], found[name]):
                points.append((r, s["mean"], s["std"]))
            series[name] = points
        return Panel("bpb at one low rate", series, "rank", log_x=True)


class VariantsAreEqual(Claim):
    group = "Variants"
    sentence = "At its own best rate, each variant of LoRA ends as good as the others."
    source = LEE
    paper = "within 1 to 2%"
    read = ABSTRACT
    threshold = "all within 2% in bits per byte: reproduced; within 4%: partly"
    advice = "Spend the search on the learning rate, and not on the variant."
    otherwise = "A variant can matter: compare them on your text, each at its best rate."
    differs = "The paper has other variants, and tasks; here are four ways to scale and begin."

    def measure(self, lab):
        r = lab.scale.high_rank
        arms = {
            "α/r": Arm(r=r), "α/√r": Arm(r=r, power=0.5),
            "LoRA+": Arm(r=r, b_rate=B_RATE), "B random": Arm(r=r, random="B"),
        }
        found = {}
        for name, arm in arms.items():
            found[name] = {**spread(lab.final(arm)), "at_edge": lab.sweep(arm).at_edge}
        return found

    def range(self, found):
        """How much the worst mean exceeds the best, as a part of the best."""
        means = [s["mean"] for s in found.values()]
        return max(means) / min(means) - 1

    def judge(self, found):
        apart = self.range(found)
        texts = [f"{name} {bpb(s)}" for name, s in found.items()]
        why = f"{percent(apart)} apart: {', '.join(texts)}" + edge_note(*found.values())
        if apart <= 0.02:
            return Verdict(REPRODUCED, why)
        return Verdict(PARTLY if apart <= 0.04 else NOT_REPRODUCED, why)

    def here(self, found):
        return f"within {percent(self.range(found))}"

    def panel(self, found):
        return Panel("bpb at the best rate", {
            name: [(name, s["mean"], s["std"])] for name, s in found.items()
        })


class FasterB(ShareClaim):
    group = "Variants"
    sentence = "LoRA+, a larger rate for B than for A, gives a better result."
    source = "Hayou et al. 2024 (LoRA+, arXiv 2402.12354), abstract"
    paper = "1 to 2% better, up to twice as fast"
    read = ABSTRACT
    threshold = (
        "B at 16 times the rate of A learns 1% more of what full fine-tuning learns, and more "
        "than noise: reproduced; more than noise: partly"
    )
    advice = "Give B a larger rate than A."
    otherwise = "Keep one rate for A and B."
    differs = "The argument is for very wide models; these have 384 channels."

    def measure(self, lab):
        before, full = lab.before()["report"], lab.final(FULL)
        found = {}
        for name, arm in (("one rate", Arm()), ("LoRA+", Arm(b_rate=B_RATE))):
            found[name] = shares(before, lab.final(arm), full)
            found[name]["at_edge"] = lab.sweep(arm).at_edge
        return found

    def judge(self, found):
        plus, one = found["LoRA+"], found["one rate"]
        gain = plus["mean"] - one["mean"]
        why = (
            f"it learns {share(plus)} instead of {share(one)} of what full fine-tuning learns"
            + edge_note(plus, one)
        )
        if not is_above(plus, one):
            return Verdict(NOT_REPRODUCED, why)
        return Verdict(REPRODUCED if gain >= 0.01 else PARTLY, why)

    def here(self, found):
        return f"{share(found['LoRA+'])} instead of {share(found['one rate'])}"


class RandomAIsBetter(Claim):
    group = "Variants"
    sentence = "LoRA learns more if A begins random and B at zero than the other way round."
    source = "Hayou et al. 2024, initialization (arXiv 2406.08447), abstract"
    paper = "better on average, with a larger best rate"
    read = ABSTRACT
    threshold = "more than noise: reproduced; within noise: partly"
    advice = "Keep the usual way, A random and B zero."
    otherwise = "Either way works; the usual one has A random."
    differs = "The factors start in the same range here, U(±1/√fan-in), whichever is random."

    def measure(self, lab):
        before, full = lab.before()["report"], lab.final(FULL)
        found = {}
        for name in ("A", "B"):
            arm = Arm(random=name)
            sweep = lab.sweep(arm)
            found[name] = shares(before, lab.final(arm), full)
            found[name] |= {"k": sweep.best, "at_edge": sweep.at_edge}
        return found

    def judge(self, found):
        a, b = found["A"], found["B"]
        why = (
            f"A random learns {share(a)}, B random {share(b)}; the best rate of A random is "
            f"{2.0**(a['k'] - b['k']):.3g} times that of B random" + edge_note(a, b)
        )
        if is_above(a, b):
            return Verdict(REPRODUCED, why)
        return Verdict(NOT_REPRODUCED if is_above(b, a) else PARTLY, why)

    def here(self, found):
        return f"{share(found['A'])} against {share(found['B'])}"

    def panel(self, found):
        return share_panel({f"{name} random": found[name] for name in found})


class RateTransfersToFull(Claim):
    group = "Variants"
    sentence = (
        "With B random, A zero and B A multiplied by 1, LoRA's best rate is that of full "
        "fine-tuning."
    )
    source = CHEN
    paper = "one configuration lets the rate transfer to full fine-tuning"
    read = "the abstract was read; which configuration it is, " + NOTES
    threshold = "within a factor of 2 for every rank: reproduced; for some: partly"
    advice = "Find the rate for full fine-tuning with such a LoRA, which is cheaper."
    otherwise = "Do not count on it in a small model."
    differs = "The transfer is derived for the limit of wide models and large ranks."

    def measure(self, lab):
        full = lab.best_rates(FULL)
        found = {}
        for r in lab.scale.ranks[1::2] + lab.scale.ranks[-1:]:
            arm = Arm(r=r, random="B", scaling=1.0, power=0.0)
            found[str(r)] = ratio_of(lab.best_rates(arm), full)
        return found

    def judge(self, found):
        texts = [f"{ratio['mean']:.2f} for r = {r}" for r, ratio in found.items()]
        holds = [0.5 <= ratio["mean"] <= 2 for ratio in found.values()]
        return of_all(holds, "ratios of " + ", ".join(texts) + edge_note(*found.values()))

    def here(self, found):
        return ", ".join(f"{ratio['mean']:.1f} (r = {r})" for r, ratio in found.items())

    def panel(self, found):
        points = []
        for r, ratio in found.items():
            points.append((int(r), ratio["mean"], bars(ratio["ratios"], ratio["mean"])))
        return Panel(
            "LoRA's best rate / full's", {"B random, factor 1": points}, "rank", log_x=True,
            log_y=True, lines={"the same": 1.0},
        )


class LargeBatchesHurt(Claim):
    group = "Variants"
    sentence = "A large batch costs LoRA more than full fine-tuning, at any rank."
    source = f"{SCHULMAN}, Figure 3"
    paper = "the gap grows with the batch, whatever the rank"
    read = SECOND_HAND
    threshold = (
        "from the smallest to the largest batch, at equal epochs, the gap in bpb grows by more "
        "than noise for a low and a high rank: reproduced; for one of them: partly"
    )
    advice = "With LoRA, prefer more steps with small batches."
    otherwise = "The batch matters to LoRA about as much as to full fine-tuning."
    differs = "At equal epochs the largest batch has a quarter of the steps, 30 in all."

    def measure(self, lab):
        scale = lab.scale
        found = {"batches": scale.batches, "edges": []}
        arms = {"full": FULL, "r = 8": Arm()}
        arms[f"r = {scale.high_rank}"] = Arm(r=scale.high_rank)
        for name, arm in arms.items():
            found[name] = []
            for size in scale.batches:
                sized = replace(arm, steps=scale.steps * scale.batch_size // size, batch_size=size)
                if size == scale.batch_size:
                    sized = arm             # the usual one, whose runs exist
                found[name].append(spread(lab.final(sized)))
                if lab.sweep(sized).at_edge:
                    found["edges"].append(f"{name}, batch {size}")
        return found

    def growth(self, found):
        """{rank: by how much the gap to full grows, and the noise of that}"""
        grown = {}
        first, last = found["full"][0], found["full"][-1]
        for name in found:
            if name.startswith("r = "):
                low, high = found[name][0], found[name][-1]
                gap = (high["mean"] - last["mean"]) - (low["mean"] - first["mean"])
                grown[name] = gap, (noise(high, last)**2 + noise(low, first)**2)**0.5
        return grown

    def judge(self, found):
        grown = self.growth(found)
        texts = [f"{gap:+.3f} for {name}" for name, (gap, _) in grown.items()]
        why = f"the gap grows by {', '.join(texts)}"
        if found["edges"]:
            why += f"; sweeps end at their edge for {', '.join(found['edges'])}"
        return of_all((gap > 2 * error for gap, error in grown.values()), why)

    def here(self, found):
        return ", ".join(f"{gap:+.3f} ({name})" for name, (gap, _) in self.growth(found).items())

    def panel(self, found):
        series = {}
        for name in found:
            if name in ("batches", "edges"):
                continue
            points = []
            for size, s in zip(found["batches"], found[name]):
                points.append((size, s["mean"], s["std"]))
            series[name] = points
        return Panel("bpb", series, "windows in a batch", log_x=True)
