"""Execute all notebooks, one after the other: python helpers_notebooks.py DIR

Beside DIR/notebooks, where they run with little training, each leaves its executed
copy in DIR/done, or a text with the error.
"""
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from notebooks.checks import SHORTENED  # noqa: E402
from notebooks.run import NOTEBOOKS, execute  # noqa: E402


def main(dir):
    place = dir / "notebooks"
    place.mkdir()
    done = dir / "done"
    done.mkdir()
    for path in NOTEBOOKS:
        temporary = dir / path.name
        try:
            nbformat.write(execute(path, place, **{SHORTENED: "1"}), temporary)
        except Exception as error:
            temporary.write_text(f"error: {error}", encoding="utf-8")
        temporary.replace(done / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
