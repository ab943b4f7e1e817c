"""
docs/claims.md with its figures, and the README's rules of thumb, made from
bench/results/claims.json.

    python bench/claims_page.py             write them
    python bench/claims_page.py --check     only compare: exit code 1 if a text differs
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.papers.page import RESULTS, page, rules, write_page
from bench.parts import differences, with_part
from lab.files import read_json

ROOT = Path(__file__).resolve().parents[1]


def with_rules(readme, results):
    """The README with the rules of thumb between the two markers."""
    return with_part(readme, "bench/claims_page.py", rules(results, "docs/claims.md") + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="compare the texts instead of writing them")
    add("--results", type=Path, default=RESULTS, help="default: bench/results/claims.json")
    add("--docs", type=Path, default=ROOT / "docs", help="default: docs")
    add("--readme", type=Path, default=ROOT / "README.md", help="default: README.md")
    args = parser.parse_args(argv)
    results = read_json(args.results)
    readme = args.readme.read_text(encoding="utf-8")
    if args.check:
        old = Path(args.docs, "claims.md").read_text(encoding="utf-8")
        found = differences(old, page(results), "docs/claims.md")
        found += differences(readme, with_rules(readme, results), "README.md")
        sys.stdout.writelines(found)
        return 1 if found else 0
    args.docs.mkdir(parents=True, exist_ok=True)
    for path in write_page(results, args.docs):
        print(path)
    args.readme.write_text(with_rules(readme, results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
