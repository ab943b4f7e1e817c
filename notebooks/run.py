"""
Run notebooks whole, from top to bottom in a fresh kernel, and save them with their outputs.

    python notebooks/run.py             all, one after the other
    python notebooks/run.py 03 05       only these
    python notebooks/run.py --fresh     all, after deleting out/notebooks, so that all models
                                        are trained again

A notebook is saved when it has finished; one that fails stays as it was, and the others
run all the same. Prints the seconds that each took. Exits with 1 if one failed, or if a
statement that it checks does not hold.
"""
import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "notebooks"
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
OUT = ROOT / "out" / "notebooks"


def execute(path, place, **environment):
    """The notebook after a run in the directory `place`. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", record_timing=False,
        coalesce_streams=True, resources={"metadata": {"path": str(place)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    return notebook


def failed_checks(notebook):
    """The lines that notebooks/checks.py printed for statements that do not hold."""
    lines = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            printed = output.get("text", "").splitlines()
            lines += [line for line in printed if line.startswith("✗")]
    return lines


def save(notebook, path):
    """Write beside `path`, and move into place."""
    temporary = path.with_suffix(".part")
    nbformat.write(notebook, temporary)
    temporary.replace(path)


def cpu_seconds():
    """Seconds of CPU time that the kernels until now have used (0 on Windows)."""
    return os.times().children_user + os.times().children_system


def run(path):
    """Run a notebook and save it. Returns whether it ran, and all its checks hold."""
    start = time.perf_counter()
    before = cpu_seconds()
    try:
        notebook = execute(path, HERE)
    except CellExecutionError as error:
        print(f"{path.name}: failed, and is unchanged\n{error}", flush=True)
        return False
    save(notebook, path)
    seconds = time.perf_counter() - start
    cpu = cpu_seconds() - before        # on a busy machine, the number to compare
    print(f"{path.name}: {seconds:.0f} seconds, {cpu:.0f} of CPU time", flush=True)
    failed = failed_checks(notebook)
    for line in failed:
        print(f"    {line}", flush=True)
    return not failed


def main(argv=None):
    parser = argparse.ArgumentParser(description="Run notebooks whole and save their outputs.")
    parser.add_argument("number", nargs="*", help="01, 02, ...; by default all")
    parser.add_argument("--fresh", action="store_true", help="delete out/notebooks first")
    arguments = parser.parse_args(argv)
    by_number = {path.name[:2]: path for path in NOTEBOOKS}
    unknown = set(arguments.number) - by_number.keys()
    if unknown:
        names = ", ".join(sorted(unknown))
        parser.error(f"no notebook {names}; choose from {', '.join(by_number)}")
    if arguments.fresh:
        shutil.rmtree(OUT, ignore_errors=True)
    failed = []
    for number in arguments.number or by_number:
        if not run(by_number[number]):
            failed.append(number)
    if failed:
        print(f"When they are mended: python notebooks/run.py {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
