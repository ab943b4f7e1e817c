"""
What all notebooks share besides their figures: how they check what they say, how the
test suite shortens their training, and how long they ran.
"""
import os
import time
import warnings

SHORTENED = "LORA_NOTEBOOKS_SHORTENED"      # set by the test suite: train a fraction of the steps
FRACTION = 5

# tqdm says so when transformers is imported in a kernel without ipywidgets.
warnings.filterwarnings("ignore", message="IProgress not found")

started = time.perf_counter()


def is_shortened():
    """Whether the test suite runs the notebook, with less training."""
    return os.environ.get(SHORTENED, "") != ""


def steps(n):
    """n training steps, or a fraction of them in the test suite."""
    return max(2, n // FRACTION) if is_shortened() else n


def check(statement, holds):
    """Print a statement and whether it holds. For what must hold with any settings."""
    if holds:
        print(f"✓ {statement}")
    else:
        print(f"✗ does not hold: {statement}")


def expect(statement, holds):
    """Like check(), for what was measured, and need not hold with other settings.

    A shortened run measures something else: there the statement is not judged.
    """
    if is_shortened():
        print(f"– not judged in a shortened run: {statement}")
    elif holds:
        print(f"✓ {statement}")
    else:
        print(f"✗ not so in this run: {statement}")


def refuses(action):
    """Call action(), which should raise ValueError. Prints its message; returns whether it did."""
    try:
        action()
    except ValueError as error:
        print(f"ValueError: {error}")
        return True
    return False


def say_time():
    """Print how long the notebook took, from its imports to here."""
    print(f"This run took {time.perf_counter() - started:.0f} seconds.")
