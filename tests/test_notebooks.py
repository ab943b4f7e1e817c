"""The notebooks run top to bottom, one after the other in one place, as a learner runs them; and are committed with outputs."""
import base64
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def trouble(notebook):
    return [output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Shared, since the notebooks share a base model, which the first to need it trains."""
    place = tmp_path_factory.mktemp("place") / "notebooks"
    place.mkdir()
    return place


@each
def test_a_notebook_runs_top_to_bottom_without_a_warning(place, path):
    notebook = nbformat.read(path, as_version=4)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(place)}})
    client.execute(env={**environment, "PYTHONPATH": str(ROOT)})
    assert not trouble(notebook)


@each
def test_a_notebook_is_committed_with_its_outputs_whole_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run from a fresh kernel, in order"
    assert not trouble(notebook) and any("image/png" in output.get("data", {}) for output in outputs(notebook))
    for output in outputs(notebook):
        assert len(base64.b64decode(output.get("data", {}).get("image/png", ""))) < 150_000
    assert not re.search(r"/home/|/root/|/tmp/|/work/|/Users/|site-packages", path.read_text(encoding="utf-8"))


def test_there_are_five_notebooks_in_order():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]
