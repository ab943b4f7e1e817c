"""
Where the runs are made and kept: texts, bases, single runs, sweeps over the learning rate.

The held-out text is cut into two halves, story by story. Learning rates, and the step at
which a run is best, are chosen on the half "choose"; what is reported is measured on the
half "report", with other seeds.
"""
import copy
import hashlib
import json
import math
import statistics
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from bench.papers.arms import Arm
from bench.papers.machine import Machine, choose_parameters, settings_of_arm
from data import HELDOUT, Batches, read_text, tokenize
from data.bpe import train_bpe
from gpt import GPT, GPTConfig
from lab.console import device_name
from lab.files import MODEL_CONFIG, TOKENS, read_json, write_json
from lab.gpt2_files import fingerprint
from lab.models import load_model, save_model
from lab.runs import MAY, open_run
from lab.settings import settings_for
from lora_minimal import find_lora_layers
from train import evaluate, train

BASE_TEXT = "tales"
VOCABULARY = 2048       # entries of the tokenizer that data/bpe.py trains
MACHINES = 6            # are kept, each with the memory of its captured step
WINDOWS = 64            # of text that are evaluated at once
FIRST_RATE = 1e-3       # rates are this times powers of two


class OutOfTime(Exception):
    """The time limit is reached; what is finished is kept."""


@dataclass
class Sweep:
    """A sweep over the rates FIRST_RATE · 2^k with one seed.

    scores {k: bits per byte of the half "choose"}, best the k with the lowest, at_edge
    whether that is the smallest or the largest rate tried.
    """

    scores: dict
    best: int
    at_edge: bool


def rate(k):
    """The learning rate of a whole or fractional k."""
    return FIRST_RATE * 2.0**k


def half(score):
    """A run that diverged has no number: it counts as infinitely bad."""
    return math.inf if score is None else score


def chosen_point(result):
    """The point of a run {"points": [...]} that is best on the half "choose"."""
    return min(result["points"], key=lambda point: half(point["choose"]))


def vertex(scores):
    """Where a parabola through the lowest of scores {k: value} and its neighbours is lowest."""
    best = min(scores, key=scores.get)
    neighbours = [scores.get(best - 1), scores[best], scores.get(best + 1)]
    if None in neighbours or not all(map(math.isfinite, neighbours)):
        return float(best)
    low, middle, high = neighbours
    curvature = low - 2 * middle + high
    if curvature <= 0:
        return float(best)
    return best + 0.5 * (low - high) / curvature


def first_guess(arm, scale):
    """The k in the middle of a sweep: what a small search found for r = 8 and 384 channels.

    A base half as wide takes twice the rate, and an update of a quarter the size does.
    """
    k = -2.0 if arm.method == "full" else 2.0
    k += math.log2(384 / (arm.width or scale.width))
    if arm.method == "lora":
        plain = Arm(r=arm.r).factor
        k += 0.5 * math.log2(plain / arm.factor)
    return round(k)


class Laboratory:
    """Makes runs, and keeps their results in runs.json.

    dir         for bases, tokens and results
    deadline    when time.monotonic() is beyond it, the next run raises OutOfTime
    """

    def __init__(self, dir, scale, device, deadline=math.inf):
        self.dir, self.scale, self.device = Path(dir), scale, device
        self.device_name = device_name(device)
        self.deadline = deadline
        self.machines = OrderedDict()       # {Arm: Machine}, the one used last at the end
        self.texts = {}
        self.batches = {}
        self.kept_weights = {}
        self.path = self.dir / "runs.json"
        self.results = read_json(self.path) if self.path.exists() else {}
        self.made = 0                       # runs in this process
        self.encoding = None
        self.bases = {}                     # {width: its directory and fingerprint}
        self.models = {}                    # {(width, dropout, dtype): a base as it was loaded}

    def save(self):
        """Write the results of all runs."""
        self.dir.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results, indent=None)

    def check_time(self):
        """Raises OutOfTime if the time is up."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    # ---- texts and bases -----------------------------------------------------------

    def base(self, width=0):
        """The directory of the base of a width, which is pretrained if it is missing."""
        dir, _ = self.base_and_fingerprint(width or self.scale.width)
        return dir

    def base_and_fingerprint(self, width):
        if width not in self.bases:
            dir = self.dir / "bases" / f"{self.scale.name}-{width}"
            if not (dir / MODEL_CONFIG).exists():
                self.check_time()
            pretrain(dir, width, self.scale, self.device, self.dir)
            self.bases[width] = dir, fingerprint(dir)
        return self.bases[width]

    def model(self, width=0, dropout=0.0, dtype="float32"):
        """A copy of a base model, on the device."""
        key = (width or self.scale.width, dropout, dtype)
        if key not in self.models:
            self.models[key], _, _ = load_model(self.base(width), self.device, dropout, dtype)
        return copy.deepcopy(self.models[key])

    def corpora(self, text):
        """The Corpus of each part of a text, which holds that part out, for evaluate().

        {"choose", "report": the halves of the held-out text, "train", "forgetting": both
        halves}
        """
        if text not in self.texts:
            if self.encoding is None:
                _, self.encoding, _ = load_model(self.base(), "cpu")
            self.texts[text] = cut(text, self.encoding, self.scale, self.dir)
        return self.texts[text]

    def batches_of(self, arm, seed):
        """All batches of a run, x and y (steps, B, T) on the device."""
        settings = settings_of_arm(arm, self.scale, self.device)
        key = (arm.text, settings.batch_size, settings.steps, seed)
        if key not in self.batches:
            while len(self.batches) >= 16:
                self.batches.pop(next(iter(self.batches)))
            corpus = self.corpora(arm.text)["train"]
            batches = Batches(corpus.train, settings.batch_size, settings.block_size, seed)
            pairs = [batches[n] for n in range(settings.steps)]
            x = torch.stack([x for x, _ in pairs]).to(self.device)
            y = torch.stack([y for _, y in pairs]).to(self.device)
            self.batches[key] = x, y
        return self.batches[key]

    def bpb(self, model, text, part, dtype):
        """Bits per byte of a part of a text, or None if they are not finite."""
        corpus = self.corpora(text)[part]
        value = evaluate(model, corpus, self.scale.block_size, dtype, WINDOWS)
        return value if math.isfinite(value) else None

    # ---- runs ----------------------------------------------------------------------

    def run(self, arm, k, seed, rich=False):
        """One run with the rate of k. Returns its result, from the cache if it is there.

        {"points": [{"step", "choose", "report"}, ...], "losses" of the first steps}. If
        rich, each point also has "base", the bits per byte of the base's text, there are
        more points, and the result has "train", those of the training text.
        """
        key = self.key(arm, k, seed)
        if key not in self.results or (rich and "train" not in self.results[key]):
            self.check_time()
            self.results[key] = self.make_run(arm, k, seed, rich)
            self.made += 1
        return self.results[key]

    def key(self, arm, k, seed):
        """The name of a run in the cache: all that its result depends on.

        That is what differs from Arm(), the rate, the seed, a hash of the settings, the
        device, and the weights of the base.
        """
        changed = {}
        for f in fields(Arm):
            if getattr(arm, f.name) != f.default:
                changed[f.name] = getattr(arm, f.name)
        settings = repr(settings_of_arm(arm, self.scale, self.device))
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        _, base = self.base_and_fingerprint(arm.width or self.scale.width)
        return json.dumps([changed, k, seed, digest, self.device_name, base])

    def make_run(self, arm, k, seed, rich):
        machine = self.machine(arm)
        batches = self.batches_of(arm, seed)
        dtype = machine.settings.dtype
        steps = len(batches[0])
        parts = 6 if rich else 3
        points = sorted({max(1, round(steps * i / parts)) for i in range(1, parts + 1)})

        def measure():
            scores = {}
            for part in ("choose", "report"):
                scores[part] = self.bpb(machine.model, arm.text, part, dtype)
            if rich:
                scores["base"] = self.bpb(machine.model, BASE_TEXT, "forgetting", dtype)
            return scores

        found, losses = machine.run(batches, rate(k), seed, points, measure)
        result = {"points": []}
        for step, scores in zip(points, found):
            result["points"].append({"step": step, **scores})
        early = losses[:self.scale.early].tolist()
        result["losses"] = [loss if math.isfinite(loss) else None for loss in early]
        if rich:
            result["train"] = self.bpb(machine.model, arm.text, "train", dtype)
        return result

    def machine(self, arm):
        """The Machine of an arm, shared with arms that differ only in text and steps."""
        key = replace(arm, text="", steps=0)
        if key in self.machines:
            self.machines.move_to_end(key)
        else:
            while len(self.machines) >= MACHINES:
                self.machines.popitem(last=False)
            settings = settings_of_arm(arm, self.scale, self.device)
            model = self.model(arm.width, settings.dropout, settings.base_dtype)
            self.machines[key] = Machine(arm, model, settings)
        return self.machines[key]

    def before(self, text="pirate", width=0):
        """The bits per byte of a base before tuning: {"choose", "report", "base", "train"}."""
        key = json.dumps(["before", text, self.key(Arm(width=width), 0, 0)])
        if key not in self.results:
            self.check_time()
            settings = settings_of_arm(Arm(method="full"), self.scale, self.device)
            model = self.model(width)
            scores = {}
            for part in ("choose", "report", "train"):
                scores[part] = self.bpb(model, text, part, settings.dtype)
            scores["base"] = self.bpb(model, BASE_TEXT, "forgetting", settings.dtype)
            self.results[key] = scores
        return self.results[key]

    def parameters(self, arm):
        """How many parameters an arm trains."""
        with torch.device("meta"):              # no memory
            model = GPT(config_of(arm.width or self.scale.width, self.scale))
        choose_parameters(model, arm)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    # ---- sweeps and seeds ----------------------------------------------------------

    def sweep(self, arm):
        """Find the best rate of an arm with one seed, on the half "choose". Returns a Sweep.

        A sweep whose best rate is the smallest or the largest is extended, up to
        Scale.extensions times.
        """
        seed = self.scale.sweep_seeds[0]
        middle = first_guess(arm, self.scale)
        lowest = middle - (self.scale.rates - 1) // 2
        scores = {}
        for k in range(lowest, lowest + self.scale.rates):
            scores[k] = self.score(arm, k, seed, "choose")
        for _ in range(self.scale.extensions):
            best = min(scores, key=scores.get)
            if best == min(scores):
                k = best - 1
            elif best == max(scores):
                k = best + 1
            else:
                break
            scores[k] = self.score(arm, k, seed, "choose")
        best = min(scores, key=scores.get)
        return Sweep(scores, best, best in (min(scores), max(scores)))

    def score(self, arm, k, seed, part):
        """The bits per byte of a run on a half, where it is best on the half "choose"."""
        return half(chosen_point(self.run(arm, k, seed))[part])

    def best_rates(self, arm):
        """The best rate of an arm, between those of the sweep, on the half "report".

        Returns {"rates": one for each of Scale.sweep_seeds, "mean": geometric, "at_edge"}.
        """
        sweep = self.sweep(arm)
        rates = []
        for seed in self.scale.sweep_seeds:
            scores = {k: self.score(arm, k, seed, "report") for k in sorted(sweep.scores)}
            rates.append(rate(vertex(scores)))
        return {
            "rates": rates, "mean": statistics.geometric_mean(rates), "at_edge": sweep.at_edge,
        }

    def reports(self, arm, k=None):
        """The results of an arm with each of Scale.seeds, at its best rate or that of k."""
        if k is None:
            k = self.sweep(arm).best
        rich = is_plain(arm)
        return [self.run(arm, k, seed, rich) for seed in self.scale.seeds]

    def final(self, arm, k=None):
        """The bits per byte of an arm on the half "report": a list, one for each seed."""
        return [half(chosen_point(result)["report"]) for result in self.reports(arm, k)]

    # ---- weights -------------------------------------------------------------------

    def tuned(self, arm, seed):
        """What a run at the best rate ends with: its weights, and its factors.

        The weights are {name in the base: float32 tensor}, with the adapters merged; the
        factors are {path: (A, B)}, empty for full fine-tuning.
        """
        key = (arm, seed)
        if key not in self.kept_weights:
            k = self.sweep(arm).best
            self.check_time()
            machine = self.machine(arm)
            machine.run(self.batches_of(arm, seed), rate(k), seed, [], None)
            self.made += 1
            weights = merged_weights(machine.model, self.weights(arm.width))
            factors = {}
            for path, layer in find_lora_layers(machine.model).items():
                factors[path] = (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
            self.kept_weights[key] = weights, factors
        return self.kept_weights[key]

    def weights(self, width=0):
        """The weights of a base, as {name: float32 tensor}."""
        key = ("base", width or self.scale.width)
        if key not in self.kept_weights:
            model = self.model(width)
            self.kept_weights[key] = {name: p.detach() for name, p in model.named_parameters()}
        return self.kept_weights[key]

    @torch.no_grad()
    def score_of(self, weights, text="pirate"):
        """The bits per byte of a model with these weights: {"report", "base"}."""
        self.check_time()
        settings = settings_of_arm(Arm(method="full"), self.scale, self.device)
        model = self.model()
        for name, p in model.named_parameters():
            p.copy_(weights[name])
        return {
            "report": self.bpb(model, text, "report", settings.dtype),
            "base": self.bpb(model, BASE_TEXT, "forgetting", settings.dtype),
        }


def is_plain(arm):
    """Whether several claims use the runs of an arm, so that everything is measured in them."""
    arm = replace(arm, r=8)
    frozen_embeddings = Arm(method="full", embeddings=False)
    return arm in (Arm(), Arm(method="full"), frozen_embeddings)


@torch.no_grad()
def merged_weights(model, base):
    """{name in the base: float32 tensor} of a tuned model, with its adapters merged."""
    found = {}
    adapted = find_lora_layers(model)
    own = dict(model.named_parameters())
    for name, weight in base.items():
        path, _, kind = name.rpartition(".")
        if path in adapted and kind == "weight":
            found[name] = weight + adapted[path].delta_weight()
        elif own[name].requires_grad:
            found[name] = own[name].detach().float().clone()
        else:
            found[name] = weight
    return found


# ---- texts and bases ---------------------------------------------------------------

def read_limited(name, scale, dir):
    """The Text of a name, as large as the scale allows."""
    text = read_text(name, HELDOUT, dir)
    limits = {BASE_TEXT: scale.forgetting_bytes}
    heldout = first_bytes(text.heldout, limits.get(name, scale.heldout_bytes))
    train = text.train[:scale.stories]
    digest = text.digest + repr((len(train), len(heldout)))
    return replace(text, train=train, heldout=heldout, digest=digest)


def first_bytes(pieces, limit):
    """The first pieces, at least two, with about `limit` bytes in all."""
    chosen, size = [], 0
    for piece in pieces:
        if size >= limit and len(chosen) >= 2:
            break
        chosen.append(piece)
        size += piece.size
    return chosen


def cut(name, encoding, scale, dir):
    """The parts of a text, {name of the part: Corpus that holds it out}."""
    text = read_limited(name, scale, dir)
    parts = {
        "choose": text.heldout[0::2], "report": text.heldout[1::2], "train": text.train,
        "forgetting": text.heldout,
    }
    corpora = {}
    for part, pieces in parts.items():
        digest = hashlib.sha256(f"{text.digest} {part}".encode()).hexdigest()
        text_of_part = replace(text, heldout=pieces, digest=digest)
        cache = Path(dir, TOKENS)
        corpora[part] = tokenize(text_of_part, encoding, cache, scale.block_size)
    return corpora


def config_of(width, scale, dropout=0.0):
    """The GPTConfig of a base of a width."""
    return GPTConfig(
        VOCABULARY, scale.block_size, scale.n_layer, n_head=max(2, width // scale.head),
        n_embd=width, dropout=dropout,
    )


def pretrain(dir, width, scale, device, cache):
    """Pretrain a base of a width on tales into `dir`, unless it is there.

    The recipe is train.py's; as in fit_to_base, a base that is wider than the recipe's
    takes a smaller rate. Bases narrower than 384 channels do not overfit, and take no
    dropout.
    """
    settings = settings_for(
        "pretrain", device, steps=scale.pretrain_steps, batch_size=scale.pretrain_batch,
        block_size=scale.block_size, eval_every=max(1, scale.pretrain_steps // 4),
        dropout=0.0 if width < 384 else 0.2,
    )
    settings = replace(settings, lr=settings.lr * min(1.0, 384 / width))
    text = read_limited(BASE_TEXT, scale, cache)
    asked = {"data": BASE_TEXT, "corpus": text.digest, "width": width, "settings": asdict(settings)}
    with open_run(dir, asked, resume=MAY) as run:
        if run.record is not None:
            return
        encoding = train_bpe(text.all_train[:2**24])
        corpus = tokenize(text, encoding, Path(cache, TOKENS), scale.block_size)
        torch.manual_seed(settings.seed)
        model = GPT(config_of(width, scale, settings.dropout)).to(device)
        curve = train(model, corpus, settings, dir, run.resuming)
        save_model(model, encoding, dir)
        run.finish(curve)
