"""The claims of papers: judges on planted results, the laboratory, and all of it in mini."""
import copy
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.papers import spectra
from bench.papers.all_claims import CLAIMS
from bench.papers.arms import MINI, Arm
from bench.papers.claim import NOT_REPRODUCED, NOT_TESTABLE, PARTLY, REPRODUCED, spread
from bench.papers.forgetting import base_at
from bench.papers.laboratory import (
    FIRST_RATE,
    Laboratory,
    OutOfTime,
    first_guess,
    read_limited,
    vertex,
)
from bench.papers.machine import settings_of_arm
from bench.papers.page import RESULTS, RULES, advice_of, page, verdict_of, write_page
from bench.papers.plan import PlanLaboratory, plan
from lora_minimal import find_lora_layers, lora_layers
from train import train

ROOT = Path(__file__).resolve().parents[1]


def command(name="claims"):
    """The module bench/<name>.py."""
    path = ROOT / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_command", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """The results of all claims in mini, and the directory of bases and runs."""
    dir = tmp_path_factory.mktemp("claims")
    out = dir / "claims.json"
    assert command().main(["--mini", "--out", str(out), "--cache", str(dir / "cache")]) == 0
    return json.loads(out.read_text(encoding="utf-8")), dir


@pytest.fixture
def lab(mini):
    """A laboratory that has the bases and the runs of mini."""
    _, dir = mini
    return Laboratory(dir / "cache", MINI, "cpu")


# ---- judges ----------------------------------------------------------------------------

def near(mean, noise=0.001):
    """A spread of two values around a mean, of a sweep that ended inside."""
    return {**spread([mean - noise, mean + noise]), "at_edge": False}


def best(*rates):
    return {"rates": list(rates), "mean": rates[0], "at_edge": False}


def ratio(mean):
    return {"ratios": [mean, mean], "mean": mean, "at_edge": False}


def means(**values):
    return {name.replace("_", " "): near(value) for name, value in values.items()}


def bits(low, high, full):
    """What LowRanksRunOut finds, for ranks of 1,000 and 64,000 parameters."""
    parameters = {"r = 1": 1_000, "r = 64": 64_000, "full": 10_000_000}
    saved = {"r = 1": low, "r = 64": high, "full": full}
    return {name: {**near(saved[name]), "parameters": n} for name, n in parameters.items()}


def forgetting(lora_style, full_style, lora_base, full_base):
    full = {"style": near(full_style), "base": near(full_base), "at_edge": False}
    lora = {"style": near(lora_style), "base": near(lora_base), "at_edge": False}
    return {"full": full, "LoRA": lora, "before": {"style": 2.5, "base": 1.3}}


def kept(at_eight):
    ranks = {str(rank): [1.0] for rank in (0, 1, 2, 4, 8, 16, 32, 64)}
    return {"kept": {**ranks, "8": [at_eight]}, "lora": {"8": [0.99]}}


def energies(rank):
    return {"ranks": {"q": [rank]}, "base": {"q": [200]}, "full rank": 384}


def low_rate(plain, root):
    """Gains from the first rank to the last with α/r and with α/√r."""
    return {
        "ranks": [4, 64], "α/r": [near(1.8), near(1.8 - plain)],
        "α/√r": [near(1.8), near(1.8 - root)],
    }


def exponents(*three):
    """Best rates that go with the rank to these powers, for α/r, α/√r and α."""
    found = {"ranks": [4, 64], "best": {}}
    for power, exponent in zip(("1.0", "0.5", "0.0"), three):
        found["best"][power] = [best(4.0**exponent), best(64.0**exponent)]
    return found


def batches(low_growth, high_growth):
    return {
        "batches": [8, 128], "edges": [], "full": [near(1.6), near(1.6)],
        "r = 8": [near(1.65), near(1.65 + low_growth)],
        "r = 64": [near(1.65), near(1.65 + high_growth)],
    }


def gaps(pirate, noir):
    """Gaps of the smallest and the largest base on two texts."""
    named = {"pirate": pirate, "noir": noir}
    found = {name: [near(gap) for gap in of_text] for name, of_text in named.items()}
    return {"sizes": [1e6, 1e7], "edges": [], "gaps": found}


def widths(exponent):
    return {"widths": [64, 768], "ratios": [ratio(64**exponent), ratio(768**exponent)]}


def early(apart):
    """Losses that fall by 1 nat in two steps, and then are this far apart."""
    return {"losses": {"1": [3, 2 + apart / 2], "64": [3, 2 - apart / 2]}}


def overlaps(one, eight):
    overlap = {"1": [one], "2": [0.3], "4": [0.3], "8": [eight]}
    return {"overlap": overlap, "chance": dict.fromkeys(overlap, 0.01)}


def intruders(lora, full):
    return {"of": 360, "counts": {"full": [full], "r = 8": [lora]}}


def shrunk(learned, forgotten, control):
    """Learned and forgotten with intruders × 0.7, and forgotten with ΔW × 0.9 (learned 1)."""
    points = {"LoRA": (1, 1), "intruders × 0.7": (learned, forgotten), "ΔW × 0.9": (1, control)}
    found = {}
    for name, (a, b) in points.items():
        found[name] = [{"learned": a, "forgotten": b}]
    return {"points": found}


def with_lead(first, second, a, b):
    return {first: near(a), second: near(b)}


def random_first(a, b):
    return {"A": {**near(a), "k": 2}, "B": {**near(b), "k": 1}}


def gap_explained(frozen, trained):
    """A gap of 0.1 bpb, of which two experiments explain these parts."""
    found = means(full=1.6, LoRA=1.7)
    found["full, embeddings frozen"] = near(1.6 + 0.1 * frozen)
    found["LoRA, embeddings trained"] = near(1.7 - 0.1 * trained)
    return found


def table_5(q, k, v, qv):
    return means(q=q, k=k, v=v, qv=qv)


def as_full(share):
    return {"r = 64": near(share, 0.0), "full, embeddings frozen": near(0.99)}


def short_and_long(short, long):
    return {"steps": {"short": 40, "long": 120}, "short": ratio(short), "long": ratio(long)}


def rank_one(low):
    return {"r = 1": near(low, 0.0), "r = 64": near(1.0, 0.0)}


def table_6(qv, q):
    low = {"qv, r = 1": near(qv, 0.0), "qv, r = 64": near(1.0, 0.0)}
    return {**low, "q, r = 1": near(q, 0.0), "q, r = 64": near(1.0, 0.0)}


def dtypes(name, lost):
    names = ("float32", "bfloat16") if name == "bfloat16" else ("bfloat16", "nf4")
    return with_lead(*names, 0.99, 0.99 - lost)


PLANTED = {
    # id: (found, verdict) ...
    "ten-times": [
        ({"ratio": ratio(10)}, REPRODUCED), ({"ratio": ratio(20)}, REPRODUCED),
        ({"ratio": ratio(20.01)}, PARTLY), ({"ratio": ratio(1)}, NOT_REPRODUCED),
    ],
    "same-rate-for-all-ranks": [
        ({"1": best(9), "4": best(1), "64": best(2)}, REPRODUCED),
        ({"1": best(1), "4": best(1), "64": best(3)}, PARTLY),
        ({"1": best(1), "4": best(1), "64": best(5)}, NOT_REPRODUCED),
    ],
    "larger-in-short-runs": [
        (short_and_long(10, 8), REPRODUCED), (short_and_long(9, 8), PARTLY),
        (short_and_long(8, 9), NOT_REPRODUCED),
    ],
    "same-beginning": [
        (early(0.0625 / 2), REPRODUCED), (early(0.0625), PARTLY), (early(0.25), NOT_REPRODUCED),
        ({"losses": {"1": [2, 3], "64": [2, 3.1]}}, NOT_REPRODUCED),
    ],
    "rate-against-rank": [
        (exponents(0, -0.25, -0.5), REPRODUCED), (exponents(0, -1, -1), PARTLY),
        (exponents(1, 1, 1), NOT_REPRODUCED),
    ],
    "low-rate-needs-root": [
        (low_rate(0.01, 0.1), REPRODUCED), (low_rate(0.09, 0.1), PARTLY),
        (low_rate(0.1, 0.0), NOT_REPRODUCED), (low_rate(-0.1, 0.0), NOT_REPRODUCED),
    ],
    "variants-are-equal": [
        (means(a=1.0, b=1.0), REPRODUCED), (means(a=1.0, b=1.03), PARTLY),
        (means(a=1.0, b=1.05), NOT_REPRODUCED),
    ],
    "faster-b": [
        (with_lead("LoRA+", "one rate", 0.99, 0.97), REPRODUCED),
        (with_lead("LoRA+", "one rate", 0.975, 0.97), PARTLY),
        (with_lead("LoRA+", "one rate", 0.97, 0.97), NOT_REPRODUCED),
    ],
    "random-a-is-better": [
        (random_first(0.97, 0.9), REPRODUCED), (random_first(0.97, 0.97), PARTLY),
        (random_first(0.9, 0.97), NOT_REPRODUCED),
    ],
    "rate-transfers-to-full": [
        ({"4": ratio(1), "64": ratio(2)}, REPRODUCED), ({"4": ratio(30), "64": ratio(2)}, PARTLY),
        ({"4": ratio(30), "64": ratio(3)}, NOT_REPRODUCED),
    ],
    "large-batches-hurt": [
        (batches(0.1, 0.1), REPRODUCED), (batches(0.1, 0.0), PARTLY),
        (batches(0.0, -0.1), NOT_REPRODUCED),
    ],
    "as-much-as-full": [
        (as_full(0.99), REPRODUCED), (as_full(0.985), PARTLY), (as_full(0.9), NOT_REPRODUCED),
    ],
    "rank-one-suffices": [
        (rank_one(0.99), REPRODUCED), (rank_one(0.97), PARTLY), (rank_one(0.93), NOT_REPRODUCED),
        ({"r = 1": near(-2.0), "r = 64": near(-1.0)}, NOT_REPRODUCED),
    ],
    "query-needs-more-rank": [
        (table_6(1.0, 0.8), REPRODUCED), (table_6(0.8, 0.8), PARTLY),
        (table_6(0.8, 1.0), NOT_REPRODUCED),
    ],
    "low-ranks-run-out": [
        (bits(80_000, 100_000, 110_000), REPRODUCED),
        (bits(99_000, 100_000, 110_000), NOT_REPRODUCED),
        (bits(1_000, 1_000, 1_000), REPRODUCED),
    ],
    "embeddings-are-the-gap": [
        (gap_explained(0.6, 0.6), REPRODUCED), (gap_explained(0.6, 0.1), PARTLY),
        (gap_explained(0.1, 0.1), NOT_REPRODUCED), (means(full=1.6, LoRA=1.6), NOT_REPRODUCED),
    ],
    "learns-less-forgets-less": [
        (forgetting(1.7, 1.6, 1.5, 1.6), REPRODUCED), (forgetting(1.7, 1.6, 1.6, 1.5), PARTLY),
        (forgetting(1.6, 1.7, 1.6, 1.5), NOT_REPRODUCED),
    ],
    "forgets-less-at-equal-learning": [
        ({"level": 1.8, "before": 1.3, **means(full=1.6, LoRA=1.5)}, REPRODUCED),
        ({"level": 1.8, "before": 1.3, **means(full=1.5, LoRA=1.5)}, PARTLY),
        ({"level": 1.8, "before": 1.3, **means(full=1.5, LoRA=1.6)}, NOT_REPRODUCED),
    ],
    "low-rank-does-the-work": [
        (kept(0.95), REPRODUCED), (kept(0.9), PARTLY), (kept(0.5), NOT_REPRODUCED),
    ],
    "change-of-high-rank": [
        (energies(80), REPRODUCED), (energies(79), PARTLY), (energies(8), NOT_REPRODUCED),
    ],
    "shared-first-direction": [
        (overlaps(0.5, 0.3), REPRODUCED), (overlaps(0.4, 0.3), PARTLY),
        (overlaps(0.4, 0.4), NOT_REPRODUCED),
    ],
    "amplifies-what-w-neglects": [
        ({"4": near(20), "64": near(1)}, REPRODUCED), ({"4": near(20), "64": near(19)}, PARTLY),
        ({"4": near(1), "64": near(1)}, NOT_REPRODUCED),
    ],
    "intruder-dimensions": [
        (intruders(165, 4), REPRODUCED), (intruders(10, 4), PARTLY),
        (intruders(4, 4), NOT_REPRODUCED),
    ],
    "smaller-intruders": [
        (shrunk(0.98, 0.9, 0.95), REPRODUCED), (shrunk(0.98, 0.9, 0.85), PARTLY),
        (shrunk(0.9, 0.9, 0.95), NOT_REPRODUCED),
    ],
    "attention-alone": [
        (with_lead("MLP", "attention", 0.98, 0.9), REPRODUCED),
        (with_lead("MLP", "attention", 0.905, 0.9), PARTLY),
        (with_lead("MLP", "attention", 0.9, 0.9), NOT_REPRODUCED),
    ],
    "attention-on-top": [
        (with_lead("MLP", "all", 0.95, 0.95), REPRODUCED),
        (with_lead("MLP", "all", 0.95, 0.965), PARTLY),
        (with_lead("MLP", "all", 0.95, 0.99), NOT_REPRODUCED),
    ],
    "many-matrices": [
        (table_5(0.6, 0.6, 0.8, 0.9), REPRODUCED), (table_5(0.6, 0.6, 0.9, 0.9), PARTLY),
        (table_5(0.9, 0.6, 0.6, 0.9), NOT_REPRODUCED),
    ],
    "random-a": [
        (with_lead("both", "B alone", 1.0, 0.9801), REPRODUCED),
        (with_lead("both", "B alone", 1.0, 0.96), PARTLY),
        (with_lead("both", "B alone", 1.0, 0.9), NOT_REPRODUCED),
        (with_lead("both", "B alone", -1.0, -2.0), NOT_REPRODUCED),
    ],
    "b-more-than-a": [
        (with_lead("B alone", "A alone", 0.96, 0.9), REPRODUCED),
        (with_lead("B alone", "A alone", 0.9, 0.9), PARTLY),
        (with_lead("B alone", "A alone", 0.9, 0.96), NOT_REPRODUCED),
    ],
    "b-with-twice-the-rank": [
        (with_lead("both", "B alone", 0.9, 0.96), REPRODUCED),
        (with_lead("both", "B alone", 0.96, 0.96), PARTLY),
        (with_lead("both", "B alone", 0.96, 0.9), NOT_REPRODUCED),
    ],
    "gap-shrinks-with-size": [
        (gaps((0.05, 0.01), (0.05, 0.01)), REPRODUCED), (gaps((0.05, 0.01), (0.01, 0.05)), PARTLY),
        (gaps((0.01, 0.05), (0.01, 0.05)), NOT_REPRODUCED),
    ],
    "ratio-against-width": [
        (widths(0.25 - 1e-9), REPRODUCED), (widths(0.5), NOT_REPRODUCED),
        (widths(-1), NOT_REPRODUCED),
        ({"widths": [64, 768], "ratios": [
            {**ratio(1), "ratios": [1, 1]}, {**ratio(2), "ratios": [1, 4]},
        ]}, PARTLY),
    ],
    "sixteen-bit-base": [
        (dtypes("bfloat16", 0.0), REPRODUCED), (dtypes("bfloat16", 0.008), PARTLY),
        (dtypes("bfloat16", 0.05), NOT_REPRODUCED),
    ],
    "four-bit-base": [
        (dtypes("nf4", 0.005), REPRODUCED), (dtypes("nf4", 0.02), PARTLY),
        (dtypes("nf4", 0.05), NOT_REPRODUCED),
    ],
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_judge_finds_what_was_planted(claim):
    words = set()
    for found, expected in PLANTED[claim.id]:
        verdict = claim.judge(found)
        assert verdict.word == expected, (found, verdict)
        words.add(expected)
    assert {REPRODUCED, NOT_REPRODUCED} <= words


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_claim_says_what_it_is(claim):
    texts = (claim.group, claim.sentence, claim.source, claim.paper, claim.read, claim.threshold,
             claim.advice, claim.differs)
    assert all(texts)
    assert not any("|" in text for text in texts)       # they stand in a table


def test_the_names_of_the_claims_are_unique():
    names = [claim.id for claim in CLAIMS]
    assert len(set(names)) == len(names) >= 30


# ---- the laboratory --------------------------------------------------------------------

class Planted(PlanLaboratory):
    """A laboratory whose runs are best at a given k, and end at abs(k - best)."""

    def __init__(self, best, **changes):
        super().__init__(replace(MINI, rates=5, extensions=2, **changes))
        self.planted = best

    def make_run(self, arm, k, seed, rich):
        score = (k - self.planted)**2
        return {"points": [{"step": 1, "choose": score, "report": score}]}


MIDDLE = first_guess(Arm(), MINI)       # of a sweep, with two rates on either side


def test_a_sweep_that_ends_at_its_edge_is_extended():
    for best_k in (MIDDLE - 3, MIDDLE + 3):
        sweep = Planted(best_k).sweep(Arm())
        assert sweep.best == best_k
        assert len(sweep.scores) == 7
        assert not sweep.at_edge


def test_a_sweep_says_that_it_ends_at_its_edge():
    sweep = Planted(MIDDLE + 100).sweep(Arm())
    assert sweep.at_edge
    assert sweep.best == max(sweep.scores) == MIDDLE + 4


def test_the_best_rate_lies_between_those_tried():
    found = Planted(MIDDLE + 0.25).best_rates(Arm())
    assert found["mean"] == pytest.approx(FIRST_RATE * 2**(MIDDLE + 0.25))


def test_the_vertex_of_a_parabola():
    assert vertex({k: (k - 0.3)**2 for k in range(-2, 3)}) == pytest.approx(0.3)
    assert vertex({0: 1.0, 1: 2.0}) == 0                    # at the edge
    assert vertex({-1: 2.0, 0: 1.0, 1: math.inf}) == 0      # beside a run that diverged


@pytest.mark.parametrize("arm", [
    Arm(), Arm(method="full"), Arm(matrices="qv", r=2), Arm(random="B", frozen="B"),
    Arm(embeddings=True, b_rate=4.0),
], ids=str)
def test_a_machine_used_again_gives_what_a_new_one_gives(lab, arm):
    batches = lab.batches_of(arm, seed=5)
    results = []
    for other_runs in (0, 1):
        lab.machines.clear()
        machine = lab.machine(arm)
        for _ in range(other_runs):
            machine.run(lab.batches_of(arm, seed=6), 0.1, 6, [], None)
        _, losses = machine.run(batches, 0.05, 5, [], None)
        trained = {name: p.detach().clone() for name, p in machine.step.trained.items()}
        results.append((losses, trained))
    (first_losses, first), (second_losses, second) = results
    assert torch.equal(first_losses, second_losses)
    for name, p in first.items():
        assert torch.equal(p, second[name]), name
    assert any((p - machine.start[name]).abs().max() > 0 for name, p in first.items())


@pytest.mark.parametrize("arm", [Arm(), Arm(method="full")], ids=lambda arm: arm.method)
def test_a_machine_trains_as_train_does(lab, arm, tmp_path):
    machine = lab.machine(arm)
    settings = replace(settings_of_arm(arm, MINI, "cpu"), lr=0.02, seed=4, eval_every=MINI.steps)
    machine.reset(0.02, 4, MINI.steps)
    model = copy.deepcopy(machine.model)            # at the beginning
    machine.run(lab.batches_of(arm, seed=4), 0.02, 4, [], None)
    curve = train(model, lab.corpora("pirate")["train"], settings, tmp_path)
    assert curve[-1]["bpb"] < curve[0]["bpb"]       # so the last weights are kept
    for name, p in model.named_parameters():
        assert torch.equal(p, machine.model.get_parameter(name)), name


def test_slices_have_adapters_of_their_own(lab):
    machine = lab.machine(Arm(matrices="qv", r=2))
    machine.run(lab.batches_of(Arm(), seed=1), 0.1, 1, [], None)
    [layer] = lora_layers(machine.model).values()
    q, k, v = layer.lora_B.detach().chunk(3)
    assert layer.lora_B.size(1) == 4
    assert q[:, :2].abs().max() > 0 and q[:, 2:].abs().max() == 0
    assert k.abs().max() == 0
    assert v[:, 2:].abs().max() > 0 and v[:, :2].abs().max() == 0


@pytest.mark.parametrize("arm, moved", [
    (Arm(frozen="A"), "B"), (Arm(frozen="B", random="B"), "A"),
])
def test_a_frozen_factor_stays(lab, arm, moved):
    machine = lab.machine(arm)
    assert {name[-1] for name in machine.step.trained} == {moved}
    machine.reset(0.1, 3, steps=2)
    before = {path: layer.lora_A.clone() for path, layer in find_lora_layers(machine.model).items()}
    machine.run(lab.batches_of(arm, seed=3), 0.1, 3, [], None)
    for path, layer in lora_layers(machine.model).items():
        assert torch.equal(layer.lora_A, before[path]) == (moved == "B")


def test_b_and_embeddings_have_rates_of_their_own(lab):
    machine = lab.machine(Arm(b_rate=16.0, embeddings=True, embedding_rate=0.5))
    machine.reset(0.01, 0, steps=2)
    [optimizer] = machine.step.optimizers
    rates = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rates[id(p)] = group["peak_lr"]
    for name, p in machine.step.trained.items():
        expected = {"lora_A": 0.01, "lora_B": 0.16, "weight": 0.005}[name.rpartition(".")[2]]
        assert rates.pop(id(p)) == pytest.approx(expected), name
    assert not rates


def test_merged_weights_are_those_of_the_tuned_model(lab):
    weights, _ = lab.tuned(Arm(r=2), seed=1)
    machine = lab.machine(Arm(r=2))
    dtype = machine.settings.dtype
    assert lab.score_of(weights)["report"] == pytest.approx(
        lab.bpb(machine.model, "pirate", "report", dtype), rel=1e-5
    )


def test_the_two_halves_share_no_story(tmp_path):
    text = read_limited("pirate", replace(MINI, heldout_bytes=2**17), tmp_path)
    choose, report = text.heldout[0::2], text.heldout[1::2]
    assert not {piece.text for piece in choose} & {piece.text for piece in report}
    assert {piece.text for piece in text.heldout}.isdisjoint(piece.text for piece in text.train)


def test_the_forgetting_at_a_level_is_read_between_two_points():
    curve = [(2.5, 1.3), (2.0, 1.4), (1.5, 1.6)]
    assert base_at(curve, 1.75) == pytest.approx(1.5)
    assert base_at(curve, 1.0) == 1.6                   # never reached: the end


def test_the_parameters_of_one_budget_are_equal(lab):
    from bench.papers.layers import ONE_BUDGET
    counts = {lab.parameters(arm) for arm in ONE_BUDGET.values()}
    assert len(counts) == 1


# ---- weights ---------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (7, 7)])
def test_the_svd_is_torchs(shape):
    torch.manual_seed(0)
    M = torch.randn(shape)
    U, S, Vh = spectra.svd(M)
    assert torch.allclose(S, torch.linalg.svdvals(M), atol=1e-5)
    assert torch.allclose((U * S) @ Vh, M, atol=1e-5)
    assert torch.allclose(U.t() @ U, torch.eye(7), atol=1e-5)


def test_the_svd_of_a_low_rank_has_no_nan():
    torch.manual_seed(0)
    M = torch.randn(12, 2) @ torch.randn(2, 7)
    U, S, Vh = spectra.svd(M)
    assert torch.allclose((U * S) @ Vh, M, atol=1e-5)
    assert spectra.rank_for_energy(M, 0.9999) == 2


def test_a_foreign_direction_is_an_intruder_and_can_be_removed():
    torch.manual_seed(0)
    n = 200
    W = torch.diag(torch.linspace(2, 1, n))
    u, v = torch.randn(n, 1), torch.randn(1, n)
    D = 10 * (u / u.norm()) @ (v / v.norm())
    U, _, _ = spectra.svd(W)
    assert spectra.intruders(U, spectra.svd(W + D)[0]).tolist() == [True] + 9 * [False]
    assert not spectra.intruders(U, U).any()
    removed = spectra.without_intruders(W, W + D, factor=0.0)
    assert (removed - W).norm() < 0.5 * D.norm()
    assert torch.allclose(spectra.without_intruders(W, W + D, factor=1.0), W + D, atol=1e-4)


def test_overlap_and_amplification_of_known_directions():
    eye = torch.eye(6)
    assert spectra.overlap(eye[:, :2], eye[:, :3]) == pytest.approx(1)
    assert spectra.overlap(eye[:, :2], eye[:, 3:]) == pytest.approx(0)
    W = torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5]))
    D = torch.zeros(6, 6)
    D[4, 4] = 3.0
    assert spectra.amplification(D, W, 1) == pytest.approx(3)


def test_a_change_that_is_not_cut_is_whole(lab):
    base = lab.weights()
    weights, _ = lab.tuned(Arm(method="full"), seed=1)
    factors = spectra.change_factors(weights, base)
    whole = spectra.truncated(weights, base, factors, 1000)
    for name, weight in weights.items():
        assert torch.allclose(whole[name], weight, atol=1e-5), name
    assert torch.equal(
        spectra.truncated(weights, base, factors, 0)["transformer.h.0.mlp.c_fc.weight"],
        base["transformer.h.0.mlp.c_fc.weight"],
    )


# ---- the command -----------------------------------------------------------------------

def test_every_claim_is_tested(mini):
    results, _ = mini
    assert list(results["claims"]) == [claim.id for claim in CLAIMS]
    for entry in results["claims"].values():
        assert entry["verdict"] in (REPRODUCED, PARTLY, NOT_REPRODUCED, NOT_TESTABLE)
        assert entry["device"] and entry["torch"] and entry["date"]


def test_a_verdict_follows_from_the_numbers_in_the_file(mini):
    results, _ = mini
    for claim in CLAIMS:
        entry = results["claims"][claim.id]
        verdict = verdict_of(claim, entry)
        assert (verdict.word, verdict.why) == (entry["verdict"], entry["why"])


def test_what_is_finished_is_not_run_again(mini, capsys):
    results, dir = mini
    arguments = ["--mini", "--out", str(dir / "claims.json"), "--cache", str(dir / "cache")]
    assert command().main(arguments) == 0
    assert " 0 runs." in capsys.readouterr().out
    assert json.loads((dir / "claims.json").read_text(encoding="utf-8")) == results


def test_runs_are_shared_between_calls(mini, capsys):
    _, dir = mini
    arguments = ["--mini", "--out", str(dir / "again.json"), "--cache", str(dir / "cache")]
    assert command().main([*arguments, "--only", "ten-times", "as-much-as-full"]) == 0
    assert " 0 runs." in capsys.readouterr().out


def test_a_run_stops_in_time_and_loses_nothing(lab, tmp_path, capsys):
    out, cache = tmp_path / "claims.json", tmp_path / "cache"
    arguments = ["--mini", "--out", str(out), "--cache", str(cache), "--limit-minutes", "0"]
    assert command().main(arguments) == 0
    assert "the same command continues" in capsys.readouterr().out
    assert not out.exists()
    lab.deadline = 0.0
    known = dict(lab.results)
    with pytest.raises(OutOfTime):
        lab.run(Arm(), 1, seed=99)
    assert lab.results == known


def test_mini_does_not_write_over_the_results(capsys):
    with pytest.raises(SystemExit):
        command().main(["--mini"])
    assert "--out" in capsys.readouterr().err


def test_results_of_another_scale_are_refused(mini):
    _, dir = mini
    with pytest.raises(ValueError, match="another --out"):
        command().main(["--out", str(dir / "claims.json"), "--device", "cpu"])


def test_the_plan_counts_the_runs_that_are_made(mini):
    results, _ = mini
    made = {id: entry["runs"] for id, entry in results["claims"].items()}
    planned = {claim.id: runs for claim, runs, _ in plan(CLAIMS, MINI)}
    assert planned == made


def test_the_page_has_every_claim(mini):
    results, _ = mini
    text = page(results)
    for claim in CLAIMS:
        assert f'<a id="{claim.id}"></a>' in text
        assert results["claims"][claim.id]["why"] in text


def test_the_page_is_written_with_its_pictures(mini, tmp_path):
    results, _ = mini
    some = ("ten-times", "low-rank-does-the-work", "gap-shrinks-with-size", "four-bit-base")
    some = {**results, "claims": {id: results["claims"][id] for id in some}}
    *pictures, written = write_page(some, tmp_path)
    assert len(pictures) == 3
    for path in pictures:
        assert f"({path.name})" in written.read_text(encoding="utf-8")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_readme_gets_the_rules_between_its_markers(mini):
    results, _ = mini
    with_rules = command("claims_page").with_rules
    name = "bench/claims_page.py"
    markers = f"<!-- made by {name} -->\n<!-- end of what {name} made -->"
    before = f"# A page\n\n{markers}\n\nMore.\n"
    after = with_rules(before, results)
    assert after.endswith("\n\nMore.\n")
    assert "(docs/claims.md#ten-times)" in after
    assert with_rules(after, results) == after
    assert after.startswith(before.split("<!-- made by bench/claims_page.py")[0])


def test_the_committed_texts_are_those_of_the_results(capsys):
    assert command("claims_page").main(["--check"]) == 0, capsys.readouterr().out


def test_the_committed_verdicts_follow_from_their_numbers():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["scale"] == "full"
    assert results["claims"].keys() == {claim.id for claim in CLAIMS}
    for claim in CLAIMS:
        entry = results["claims"][claim.id]
        assert verdict_of(claim, entry).word == entry["verdict"], claim.id


def test_advice_depends_on_the_verdict():
    [claim] = [claim for claim in CLAIMS if claim.id == "ten-times"]
    holds, fails = ({"found": {"ratio": ratio(mean)}} for mean in (10, 1))
    assert advice_of(claim, holds) == claim.advice != advice_of(claim, fails)


def test_the_rules_of_thumb_stand_on_claims():
    names = {claim.id for claim in CLAIMS}
    for _, claims in RULES.values():
        assert claims and set(claims) <= names
