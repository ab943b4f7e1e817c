"""
What all notebooks share, apart from figures: how they check what they say, how the
test suite shortens their training, and how long they ran.
"""
import logging
import os
import time
import warnings

SHORTENED = "LORA_NOTEBOOKS_SHORTENED"      # set by the test suite: train a fraction of the steps
FRACTION = 10

# What other libraries say when they are imported: tqdm in a kernel without ipywidgets, and
# bitsandbytes, which peft imports if it is installed, on a machine without a GPU.
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

started = time.perf_counter()


def is_shortened():
    """Whether the test suite runs the notebook, with less training."""
    return os.environ.get(SHORTENED, "") != ""


def steps(n):
    """n training steps, or rounds of a measurement; a fraction of them in the test suite."""
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


def is_refused(action):
    """Whether action() raises ValueError. Prints its message."""
    try:
        action()
    except ValueError as error:
        print(f"ValueError: {error}")
        return True
    return False


def say_time():
    """Print how long the notebook took, from its imports to here.

    On a busy machine, or with several threads, CPU time differs from the time on a clock.
    """
    seconds = time.perf_counter() - started
    print(f"This run took {seconds:.0f} seconds ({time.process_time():.0f} of CPU time).")
