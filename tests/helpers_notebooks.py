"""Execute all notebooks, one after the other: python helpers_notebooks.py DIR

Beside DIR/notebooks, where they run, each leaves its executed copy in DIR/done, or a
text with the error.
"""
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path, place):
    """The notebook after a run in the directory `place`."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3",
        resources={"metadata": {"path": str(place)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    return notebook


def main(dir):
    place = dir / "notebooks"
    place.mkdir()
    done = dir / "done"
    done.mkdir()
    for path in NOTEBOOKS:
        temporary = dir / path.name
        try:
            nbformat.write(execute(path, place), temporary)
        except Exception as error:
            temporary.write_text(f"error: {error}", encoding="utf-8")
        temporary.replace(done / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
