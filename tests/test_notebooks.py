"""The notebooks run top to bottom, and are committed with their outputs."""
import base64
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from train import main

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def trouble(notebook):
    return [output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """{path: a promise of the notebook after its run}: two run at a time, each on one core."""
    place = tmp_path_factory.mktemp("place") / "notebooks"
    place.mkdir()
    base = place.parent / "out" / "notebooks" / "base"          # which they share, and any of them would make
    assert main(["pretrain", "--data", "tales", "--out", str(base), "--steps", "300", "--eval-every", "100",
                 "--device", "cpu"]) == 0

    def execute(path):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute(
            env={**os.environ, "PYTHONPATH": str(ROOT)})
        return notebook

    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(execute, path) for path in NOTEBOOKS}


@each
def test_a_notebook_runs_top_to_bottom_without_a_warning(executed, path):
    assert not trouble(executed[path].result())


@each
def test_a_notebook_is_committed_with_its_outputs_whole_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run from a fresh kernel, in order"
    assert not trouble(notebook) and any("image/png" in output.get("data", {}) for output in outputs(notebook))
    for output in outputs(notebook):
        assert len(base64.b64decode(output.get("data", {}).get("image/png", ""))) < 150_000
    assert not re.search(r"/(home|root|tmp|Users|mnt)/|site-packages", path.read_text(encoding="utf-8"))


def test_there_are_five_notebooks_in_order():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]
