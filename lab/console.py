"""
What the program prints, and how: lines above the progress bar, sizes, tables, columns
of text.
"""
import contextlib
import itertools
import os
import platform
import shlex
import shutil
import sys
import textwrap

import torch
from tqdm import tqdm

from lab import parallel

WIDTH = max(60, min(shutil.get_terminal_size((110, 40)).columns, 120))


def prepare_streams():
    """Make output that fails no fault of the run.

    What the console's code page does not have is printed as "?", and a closed stream
    is replaced by one that goes nowhere.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))       # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def say(text):
    """Print a line, above the progress bar if there is one. Only the first process prints.

    If nobody reads any more (`train.py | head`), the run goes on in silence.
    """
    if not parallel.is_first():
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except (OSError, ValueError):           # a broken pipe, a closed stream
        silence(sys.stdout)


def complain(text):
    """Print an error, if anybody still reads."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def silence(stream):
    """Let what is written to a stream go nowhere, also when Python flushes it at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def shell_quoted(path):
    """A path as one types it in a shell."""
    return shlex.quote(str(path))


def headline(text):
    """Print the title of the next part."""
    say(f"\n== {text}")


def bullet(text):
    """Print a paragraph as an item of a list."""
    say(bulleted(text))


def bulleted(text):
    """A paragraph as an item of a list, in lines of the console's width."""
    return textwrap.fill(
        text, WIDTH, initial_indent="  · ", subsequent_indent="    ", break_on_hyphens=False
    )


def wrapped(text):
    """A paragraph in lines of the console's width."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def size(n):
    """Bytes in readable units: size(4_353_024) -> '4.35 MB'."""
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if n < 999.5:
            break
        n /= 1000
        unit = larger
    return f"{n:.3g} {unit}"


def aligned(rows):
    """Rows of cells as lines of text in columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def side_by_side(texts, width):
    """{title: text} as columns, `width` characters in all; below one another if they are narrow."""
    column = (width - 2 * (len(texts) - 1)) // len(texts)
    if column < 24:
        return "\n\n".join(f"--- {title}\n{text}" for title, text in texts.items())
    columns = []
    for title, text in texts.items():
        lines = [*textwrap.wrap(title, column), "-" * column]
        for paragraph in text.splitlines():
            lines += textwrap.wrap(paragraph, column) or [""]
        columns.append(lines)
    rows = []
    for cells in itertools.zip_longest(*columns, fillvalue=""):
        rows.append("  ".join(f"{cell:<{column}}" for cell in cells).rstrip())
    return "\n".join(rows)


def device_name(device):
    """The device in words: 'NVIDIA H100 80GB HBM3', 'x86_64 CPU, 2 threads'."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind == "mps":
        return f"{platform.machine()} GPU (MPS)"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
