"""
What the papers say of LoRA, tested: each claim was written down before the run.

    python bench/claims.py --plan             what would run, and for how long
    python bench/claims.py --device cuda --limit-minutes 8
                                              stops in time; the same command continues
    python bench/claims.py --mini --out out/mini.json
                                              all of it on a CPU, tiny: for the tests

Every claim that is finished is written to bench/results/claims.json at once, and is not
run again; bases and single runs are kept in --cache. bench/claims_page.py makes
docs/claims.md from the results. A claim is a class with its sentence, source, threshold,
experiment and judge in one place: see bench/papers/.
"""
import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.papers.all_claims import CLAIMS
from bench.papers.arms import FULL_SIZE, MINI
from bench.papers.claim import NOT_TESTABLE, Verdict
from bench.papers.laboratory import Laboratory, OutOfTime
from bench.papers.page import RESULTS
from bench.papers.plan import plan
from lab.console import aligned, bullet, device_name, prepare_streams, say
from lab.files import read_json, write_json
from lab.settings import pick_device

CACHE = Path(__file__).resolve().parents[1] / "out" / "claims"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--mini", action="store_true", help="tiny models; the numbers mean nothing")
    add("--plan", action="store_true", help="only print what would run")
    add("--only", nargs="+", metavar="CLAIM", help="only these; --plan prints the names")
    add("--again", action="store_true", help="test finished claims again, with the same runs")
    add("--limit-minutes", type=float, default=float("inf"),
        help="begin no run after this time; default: no limit")
    add("--out", type=Path, default=RESULTS, help="default: bench/results/claims.json")
    add("--cache", type=Path, default=CACHE, help="of bases and runs; default: out/claims")
    args = parser.parse_args(argv)
    names = [claim.id for claim in CLAIMS]
    for name in args.only or ():
        if name not in names:
            parser.error(f"unknown claim {name!r}; choose from {', '.join(names)}")
    if args.mini and args.out == RESULTS and not args.plan:
        parser.error("--mini needs an --out of its own: its numbers mean nothing")
    return args


def chosen(args):
    """The claims to test, in order."""
    return [claim for claim in CLAIMS if not args.only or claim.id in args.only]


def print_plan(args):
    """Print each claim with its new runs and the seconds that they should take."""
    scale = MINI if args.mini else FULL_SIZE
    rows = [("claim", "new runs", "seconds")]
    total_runs, total_seconds = 0, 0.0
    for claim, runs, seconds in plan(chosen(args), scale):
        rows.append((claim.id, str(runs), f"{seconds:.0f}"))
        total_runs += runs
        total_seconds += seconds
    rows.append(("all", str(total_runs), f"{total_seconds:.0f}"))
    say(aligned(rows))
    say("Estimated for one H100. Pretraining counts where a base is first needed.")


def test(claim, lab):
    """Test a claim. Returns its entry in the results."""
    start, runs = time.monotonic(), lab.made
    reason = claim.why_not_testable(lab)
    if reason is None:
        found = claim.measure(lab)
        verdict, here = claim.judge(found), claim.here(found)
    else:
        found, verdict, here = None, Verdict(NOT_TESTABLE, reason), ""
    return {
        "sentence": claim.sentence, "source": claim.source, "paper": claim.paper,
        "threshold": claim.threshold, "verdict": verdict.word, "why": verdict.why,
        "here": here, "found": found, "runs": lab.made - runs,
        "seconds": round(time.monotonic() - start, 1),
        "device": device_name(lab.device), "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def read_results(path, scale):
    """The results so far. Raises ValueError if they are of another scale."""
    if not path.exists():
        return {"scale": scale.name, "claims": {}}
    results = read_json(path)
    if results["scale"] != scale.name:
        raise ValueError(
            f"{path} has results of the scale {results['scale']!r}, and this run is "
            f"{scale.name!r}; choose another --out"
        )
    return results


def run(args):
    """Test the claims that are not finished. Returns the exit code."""
    scale = MINI if args.mini else FULL_SIZE
    device = pick_device("cpu" if args.mini and args.device is None else args.device)
    if args.mini:
        torch.set_num_threads(1)            # small products gain nothing from threads
    results = read_results(args.out, scale)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.limit_minutes
    lab = Laboratory(args.cache, scale, device, deadline)
    failed = []
    for claim in chosen(args):
        if claim.id in results["claims"] and not args.again:
            continue
        try:
            entry = test(claim, lab)
        except OutOfTime:
            say(f"Stopped in time, within {claim.id}; the same command continues.")
            break
        except Exception:                   # the other claims can still be tested
            say(f"{claim.id} failed:\n{traceback.format_exc()}")
            failed.append(claim.id)
            continue
        finally:
            lab.save()
        results["claims"][claim.id] = entry
        write_json(args.out, results)
        say(f"{entry['verdict'].upper()} ({claim.id}, {entry['runs']} runs, "
            f"{entry['seconds']:.0f} s): {claim.sentence}")
        bullet(entry["why"])
    done = [claim for claim in chosen(args) if claim.id in results["claims"]]
    say(f"{len(done)} of {len(chosen(args))} claims are in {args.out}; {lab.made} runs.")
    if failed:
        say(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


def main(argv=None):
    args = parse_args(argv)
    if args.plan:
        print_plan(args)
        return 0
    return run(args)


if __name__ == "__main__":
    prepare_streams()
    sys.exit(main())
