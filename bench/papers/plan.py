"""
What the claims would run, and how long that should take, without running it.
"""
import torch

from bench.papers.laboratory import Laboratory, config_of, first_guess
from bench.papers.machine import settings_of_arm
from gpt import GPT

# Seconds on an H100. A captured step is launched in 1 ms and computes at 200 TFLOP/s; a step
# of pretraining with Muon that is not captured waits 20 ms for the CPU.
LAUNCH, MUON, FLOPS = 1e-3, 20e-3, 2e14
EVALUATION = 0.03       # of both halves, once
MACHINE = 0.5           # to copy a base and to capture a step
ANALYSIS = 0.5          # of the weights after a run


class PlanLaboratory(Laboratory):
    """A Laboratory that makes no run, and adds up what the runs would take.

    Results are made up: a parabola over the learning rate, best in the middle of the sweep.
    """

    def __init__(self, scale):
        super().__init__("nowhere", scale, "cpu")
        self.results = {}
        self.seconds = 0.0
        self.known = set()

    def save(self):
        """Keep nothing."""

    def base_and_fingerprint(self, width):
        if width not in self.bases:
            tokens = self.scale.pretrain_batch * self.scale.block_size
            step = MUON + self.compute(width, tokens)
            self.seconds += self.scale.pretrain_steps * step
            self.bases[width] = "nowhere", "plan"
        return self.bases[width]

    def compute(self, width, tokens):
        """The seconds of the products of a training step: 6 operations a parameter and token."""
        C = width or self.scale.width
        n = 12 * self.scale.n_layer * C * C + 2048 * C
        return 6 * n * tokens / FLOPS

    def make_run(self, arm, k, seed, rich):
        settings = settings_of_arm(arm, self.scale, self.device)
        tokens = settings.batch_size * self.scale.block_size
        parts = 6 if rich else 3
        self.seconds += settings.steps * (LAUNCH + self.compute(arm.width, tokens))
        self.seconds += parts * EVALUATION * (2 if rich else 1)
        self.machine(arm)
        off = k - first_guess(arm, self.scale)
        wiggle = 0.001 * ((7 * seed + 3 * arm.r) % 5)
        score = 1.7 + 0.01 * off * off + wiggle
        point = {"step": settings.steps, "choose": score, "report": score, "base": 1.5}
        losses = [3.0 - 0.01 * n for n in range(self.scale.early)]
        return {"points": [point], "losses": losses, "train": score - 0.1}

    def machine(self, arm):
        key = (arm.width, arm.r, arm.method, arm.matrices, arm.random, arm.frozen, arm.power)
        if key not in self.known:
            self.known.add(key)
            self.seconds += MACHINE

    def before(self, text="pirate", width=0):
        return {"choose": 2.5, "report": 2.5, "base": 1.3, "train": 2.5}

    def corpora(self, text):
        return {"train": PlannedCorpus()}

    def tuned(self, arm, seed):
        self.run(arm, self.sweep(arm).best, 100 + seed)
        self.seconds += ANALYSIS
        return self.weights(seed=seed), {}

    def weights(self, width=0, seed=0):
        torch.manual_seed(seed)
        model = GPT(config_of(16, self.scale))
        return {name: p.detach() for name, p in model.named_parameters()}

    def score_of(self, weights, text="pirate"):
        self.seconds += 2 * EVALUATION
        return {"report": 1.7, "base": 1.5}


class PlannedCorpus:
    heldout_bytes = 144_000


def plan(claims, scale):
    """[(claim, new runs, seconds)] in the order of the claims; what is shared counts once."""
    lab = PlanLaboratory(scale)
    rows = []
    for claim in claims:
        runs, seconds = len(lab.results), lab.seconds
        if claim.why_not_testable(lab) is None:
            claim.measure(lab)
        rows.append((claim, len(lab.results) - runs, lab.seconds - seconds))
    return rows
