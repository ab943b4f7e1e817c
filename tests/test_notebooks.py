"""The notebooks run from top to bottom, follow one template, and are saved with their outputs."""
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from helpers_notebooks import NOTEBOOKS

from notebooks.run import failed_checks

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Paths of one machine, which no output should show.
LOCAL_PATH = re.compile(r"/(home|root|tmp|Users|mnt)/|site-packages")
LONGEST = 90            # seconds, on two cores


def executed(path, running):
    """The notebook after its shortened run, which may still have to end."""
    process, dir = running
    copy = dir / "done" / path.name
    while not copy.exists() and process.poll() is None:
        time.sleep(0.2)
    content = copy.read_text(encoding="utf-8")
    assert not content.startswith("error: "), content
    return nbformat.reads(content, as_version=4)


def read(path):
    return nbformat.read(path, as_version=4)


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


def pictures_of(cell):
    """The PNG pictures among the outputs of a cell, as bytes."""
    found = []
    for output in cell.get("outputs", ()):
        picture = output.get("data", {}).get("image/png")
        if picture is not None:
            found.append(base64.b64decode(picture))
    return found


def printed(notebook):
    return "".join(output.get("text", "") for output in outputs(notebook))


# ---- they run ----------------------------------------------------------------------

@each
def test_a_notebook_runs_from_top_to_bottom_and_its_checks_hold(running_notebooks, path):
    notebook = executed(path, running_notebooks)
    assert not trouble(notebook)
    assert not failed_checks(notebook)


# ---- they are saved ----------------------------------------------------------------

@each
def test_a_notebook_is_saved_with_the_outputs_of_one_whole_run(path):
    notebook = read(path)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run it with notebooks/run.py"
    assert not trouble(notebook)
    assert not failed_checks(notebook)
    assert "shortened run" not in printed(notebook)


@each
def test_the_outputs_of_a_notebook_are_small_and_show_no_local_path(path):
    notebook = read(path)
    pictures = []
    for cell in notebook.cells:
        pictures += pictures_of(cell)
    assert pictures
    for picture in pictures:
        assert len(picture) < 150_000
    assert not LOCAL_PATH.search(path.read_text(encoding="utf-8"))


@each
def test_a_saved_run_took_no_longer_than_its_notebook_says(path):
    """The smaller of both times counts: the clock if the cores were free, else CPU time."""
    run = re.search(r"This run took (\d+) seconds \((\d+) of CPU time", printed(read(path)))
    assert f"less than {LONGEST} seconds" in read(path).cells[0].source
    assert min(int(run[1]), int(run[2])) < LONGEST


# ---- they follow one template ------------------------------------------------------

def test_the_numbers_of_the_notebooks_are_increasing_and_unique():
    assert NOTEBOOKS
    numbers = []
    for path in NOTEBOOKS:
        match = re.match(r"(\d\d)_", path.name)
        assert match, f"{path.name} should begin with a number, like 01_"
        numbers.append(int(match[1]))
    assert numbers == sorted(set(numbers))


@each
def test_a_notebook_begins_with_its_number_its_aims_its_minutes_and_what_one_needs(path):
    opening = read(path).cells[0].source
    assert opening.startswith(f"# {int(path.name[:2])}. ")
    parts = ["## What you will be able to do", "**Minutes**", "**What you need**"]
    places = [opening.index(part) for part in parts]
    assert places == sorted(places)


@each
def test_a_notebook_ends_with_exercises_answers_that_run_and_its_time(path):
    cells = read(path).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    questions = text[text.index("\n## Exercises"):text.index("\n## Answers")]
    numbers = re.findall(r"^\*\*(\d)\. ", questions, re.MULTILINE)
    assert numbers
    answers = [cell for cell in cells if cell["id"].startswith("answer-")]
    runnable = {cell["id"].split("-")[1] for cell in answers if cell.cell_type == "code"}
    assert runnable == set(numbers)
    assert cells[-1].source == "say_time()"


@each
def test_the_reading_time_is_that_of_the_words_and_the_code(path):
    """200 words or ten lines of code a minute, to within a quarter."""
    words = lines = 0
    for cell in read(path).cells[2:] + read(path).cells[:1]:
        if cell.cell_type == "markdown":
            words += len(cell.source.split())
        else:
            lines += sum(1 for line in cell.source.splitlines() if line.strip())
    stated = int(re.search(r"\*\*Minutes\*\* (\d+) to read", read(path).cells[0].source)[1])
    assert stated == pytest.approx(words / 200 + lines / 10, rel=0.25)


@each
def test_a_caption_under_every_figure_says_what_to_see(path):
    cells = read(path).cells
    for i, cell in enumerate(cells):
        if pictures_of(cell):
            following = [other for other in cells[i + 1:] if other.cell_type == "markdown"]
            assert following[0].source.startswith("**What to see.**"), cell["id"]


@each
def test_a_learner_who_changes_a_setting_meets_no_assertion(path):
    for cell in code_cells(read(path)):
        assert not re.search(r"^\s*assert\b", cell.source, re.MULTILINE), cell["id"]


@each
def test_checks_have_cells_of_their_own_and_plotting_code_is_in_one_module(path):
    for cell in code_cells(read(path))[1:]:
        assert "plt." not in cell.source and "matplotlib" not in cell.source
        if cell["id"].startswith("answer-"):
            continue
        has_checks = re.search(r"^\s*(check|expect)\(", cell.source, re.MULTILINE)
        assert bool(has_checks) == cell["id"].endswith("-check"), cell["id"]


def test_the_first_notebook_needs_numpy_alone_and_no_words_of_the_second():
    cells = read(NOTEBOOKS[0]).cells
    text = "\n".join(cell.source for cell in cells if cell["id"] != "setup").lower()
    for word in ("torch", "transformer", "attention", "mlp ", "layer norm", "muon"):
        assert word not in text


# ---- in Colab ----------------------------------------------------------------------

IN_COLAB = """
import sys, types, urllib.request
sys.modules["google.colab"] = types.ModuleType("google.colab")
"""


def setup_cell(path):
    cells = read(path).cells
    assert cells[1]["id"] == "setup"
    return cells[1].source


def run_as_if_in_colab(dir, before, cell, address=""):
    """Run a cell with IPython in the empty directory `dir`, twice. Returns the process."""
    script = dir / "cell.ipy"
    after = "\nfrom notebooks.checks import check\nprint('imported')"
    script.write_text(IN_COLAB + before + 2 * f"\n{cell}\n" + after, encoding="utf-8")
    command = [sys.executable, "-m", "IPython", "--no-banner", str(script)]
    environment = {**os.environ, "LORA_REPOSITORY": address}
    return subprocess.run(command, cwd=dir, env=environment, capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path):
    """A git repository with what the first cell of a notebook needs."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    path = tmp_path / "repository"
    (path / "notebooks").mkdir(parents=True)
    for name in ("gpt.py", "notebooks/checks.py"):
        shutil.copy(NOTEBOOKS[0].parents[1] / name, path / name)
    git = ["git", "-C", path, "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run(["git", "init", "--quiet", path], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "x"], check=True)
    return path


def test_all_notebooks_have_the_same_first_cell():
    assert len({setup_cell(path) for path in NOTEBOOKS}) == 1


def test_the_first_cell_downloads_the_repository_in_colab_once(tmp_path, repository):
    place = tmp_path / "content"
    place.mkdir()
    cell = setup_cell(NOTEBOOKS[0])
    done = run_as_if_in_colab(place, "", cell, f"file://{repository}")
    assert "imported" in done.stdout, done.stdout + done.stderr
    assert (place / "lora" / "gpt.py").exists()
    assert "already exists" not in done.stdout + done.stderr


def test_the_first_cell_finds_the_address_where_the_notebook_was_opened(tmp_path, repository):
    place = tmp_path / "content"
    place.mkdir()
    opened_from = "fileId=https%3A//github.com/someone/lora.py/blob/main/notebooks/03.ipynb"
    answer = json.dumps([{"path": opened_from}])
    before = f"""
import io
urllib.request.urlopen = lambda url, timeout: io.BytesIO(b'{answer}')
get_ipython().system = lambda command: print("ran:", get_ipython().user_ns["ADDRESS"])
"""
    done = run_as_if_in_colab(place, before, setup_cell(NOTEBOOKS[0]))
    assert "ran: https://github.com/someone/lora.py\n" in done.stdout


def test_the_first_cell_says_what_to_fill_in_if_the_address_is_not_known(tmp_path):
    before = """
def nothing(url, timeout):
    raise OSError("no such server")
urllib.request.urlopen = nothing
"""
    done = run_as_if_in_colab(tmp_path, before, setup_cell(NOTEBOOKS[0]))
    assert "Fill in its address in the line ADDRESS = " in done.stdout + done.stderr
    assert not (tmp_path / "lora").exists()
