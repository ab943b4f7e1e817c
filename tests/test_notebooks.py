"""The notebooks run from top to bottom, and are committed with their outputs."""
import base64
import re
import time

import nbformat
import pytest
from helpers_notebooks import NOTEBOOKS

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Paths of one machine, which no output should show.
LOCAL_PATH = re.compile(r"/(home|root|tmp|Users|mnt)/|site-packages")


def executed(path, running):
    """The notebook after its run, which may still have to end."""
    process, dir = running
    copy = dir / "done" / path.name
    while not copy.exists() and process.poll() is None:
        time.sleep(0.2)
    content = copy.read_text(encoding="utf-8")
    assert not content.startswith("error: "), content
    return nbformat.reads(content, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    found = []
    for cell in code_cells(notebook):
        found += cell.outputs
    return found


def trouble(notebook):
    """The outputs that are errors or warnings."""
    found = []
    for output in outputs(notebook):
        if output.output_type == "error" or output.get("name") == "stderr":
            found.append(output)
    return found


def pictures(notebook):
    """The PNG pictures among the outputs, as bytes."""
    found = []
    for output in outputs(notebook):
        picture = output.get("data", {}).get("image/png")
        if picture is not None:
            found.append(base64.b64decode(picture))
    return found


@each
def test_a_notebook_runs_from_top_to_bottom_without_a_warning(running_notebooks, path):
    assert not trouble(executed(path, running_notebooks))


@each
def test_a_notebook_is_committed_with_its_outputs_and_they_are_small(path):
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run it in a fresh kernel, in order"
    assert not trouble(notebook)
    assert pictures(notebook)
    for picture in pictures(notebook):
        assert len(picture) < 150_000
    assert not LOCAL_PATH.search(path.read_text(encoding="utf-8"))


def test_the_numbers_of_the_notebooks_are_increasing_and_unique():
    assert NOTEBOOKS
    numbers = []
    for path in NOTEBOOKS:
        match = re.match(r"(\d\d)_", path.name)
        assert match, f"{path.name} should begin with a number, like 01_"
        numbers.append(int(match[1]))
    assert numbers == sorted(set(numbers))
