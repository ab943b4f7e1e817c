"""
docs/claims.md and its figures, made from bench/results/claims.json.

    python bench/claims_page.py             write them
    python bench/claims_page.py --check     only compare: exit code 1 if the page differs
"""
import argparse
import difflib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.papers.page import page, write_page
from lab.files import read_json

ROOT = Path(__file__).resolve().parents[1]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="compare the page instead of writing it")
    add("--results", type=Path, default=ROOT / "bench" / "results" / "claims.json",
        help="default: bench/results/claims.json")
    add("--docs", type=Path, default=ROOT / "docs", help="default: docs")
    args = parser.parse_args(argv)
    results = read_json(args.results)
    if args.check:
        old = Path(args.docs, "claims.md").read_text(encoding="utf-8")
        old, new = (text.splitlines(keepends=True) for text in (old, page(results)))
        difference = difflib.unified_diff(old, new, "docs/claims.md", "the results")
        sys.stdout.writelines(difference)
        return 1 if old != new else 0
    args.docs.mkdir(parents=True, exist_ok=True)
    for path in write_page(results, args.docs):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
