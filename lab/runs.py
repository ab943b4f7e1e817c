"""
What a training run writes into its directory, and how a killed run can continue.

    training.json             what was asked for, written first. With the curve, which is written
                              last, the run is finished
    checkpoint.safetensors    only if the run was interrupted (lab/checkpoints.py)
    .lock                     held while a process trains into the directory

A directory with a model or an adapter that no training.json accounts for is never overwritten.
"""
import errno
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lab import files
from lab.console import say
from lab.files import holds_model, read_json, remove_leftovers, some, write_json
from lab.parallel import from_first

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}

# What to do about an interrupted run in the directory.
MUST = "must"       # continue it; it is an error if there is none
MAY = "may"         # continue it if there is one
NEVER = "never"     # it is an error if there is one

SPELLINGS = {"data", "adapter"}     # how a text or an adapter was named; hashes say which it is
POINT = {"step", "seconds", "loss", "bpb", "skipped"}      # the keys of a point of a curve


@dataclass
class Run:
    """A claim on a directory. `record` is that of a finished run that did the same, or None."""

    dir: Path
    asked: dict         # what was asked for, JSON values only
    record: dict | None
    resuming: bool      # whether a checkpoint is to be continued

    def finish(self, curve):
        """Write the record of the finished run, and delete its checkpoint.

        Returns the record {"asked", "curve", "finished"}.
        """
        finished = time.strftime("%Y-%m-%d %H:%M")
        record = {"asked": self.asked, "curve": curve, "finished": finished}
        from_first(self.write, record)
        return record

    def write(self, record):
        write_json(self.dir / files.RECORD, record)
        (self.dir / files.CHECKPOINT).unlink(missing_ok=True)


@contextmanager
def open_run(dir, asked, resume=NEVER, fresh=False):
    """`with open_run(dir, asked) as run:` claim a directory for a run, until the block ends.

    `resume` is MUST, MAY or NEVER; `fresh` discards what is there. Raises ValueError
    if the directory holds something else, which the run would overwrite, and OSError
    if it is not writable or another run is using it.
    """
    if resume not in (MUST, MAY, NEVER):
        raise ValueError(f"resume is {resume!r}; expected {MUST!r}, {MAY!r} or {NEVER!r}")
    dir = Path(dir)
    lock = FileLock(dir / ".lock")      # the system frees it if the process dies

    def claim():
        dir.mkdir(parents=True, exist_ok=True)
        acquire(lock, dir)
        record, resuming = decide(dir, asked, resume, fresh)
        if record is None:
            for place in (dir, dir / files.TOKENS, dir / files.DOWNLOADS):
                remove_leftovers(place)
            if not resuming:
                begin(dir, asked)
        return record, resuming

    try:
        record, resuming = from_first(claim)
        if record is not None:
            say(f"     {dir} was finished on {record['finished']} and is reused "
                "(--fresh starts over)")
        elif resuming:
            say(f"     {dir} was interrupted and is resumed (--fresh starts over)")
        yield Run(dir, asked, record, resuming)
    finally:
        lock.release()


def acquire(lock, dir):
    """Take the lock of a directory. Raises OSError if another run has it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(
            f"another run is writing to {dir}; wait for it, or choose another --out"
        ) from None
    except (OSError, NotImplementedError) as error:
        if not isinstance(error, NotImplementedError) and error.errno not in NO_LOCKS:
            raise
        raise OSError(
            f"the disk of {dir} has no file locks, which keep two runs apart; choose "
            "an --out on another disk"
        ) from error


def decide(dir, asked, resume, fresh):
    """What to do in a directory: (record of a finished run to reuse or None, whether to resume).

    Raises ValueError if the directory holds a run with other settings, a foreign
    model, or an interrupted run that `resume` does not allow, or none that it
    demands.
    """
    if fresh:
        return None, False
    record = read_record(dir)
    finished = "curve" in record
    interrupted = (dir / files.CHECKPOINT).exists()
    if finished or interrupted:
        refuse_other_settings(dir, record, asked)
    if finished:
        return record, False
    if interrupted and resume == NEVER:
        raise ValueError(
            f"{dir} holds an interrupted run; continue it with --resume, or start "
            "over with --fresh"
        )
    if resume == MUST and not interrupted:
        raise ValueError(
            f"--resume: {dir} holds no interrupted run; leave out the flag to start one"
        )
    refuse_foreign_model(dir)
    return None, interrupted


def begin(dir, asked):
    """Write down what is asked for. Replaces what was asked for before.

    The checkpoint goes first: after a crash between the two, an old one must not be
    taken for that of the new run.
    """
    (dir / files.CHECKPOINT).unlink(missing_ok=True)
    write_json(dir / files.RECORD, {"asked": asked})


def refuse_other_settings(dir, record, asked):
    if not record:
        raise ValueError(f"{dir} has a checkpoint but no training.json; start over with --fresh")
    if without_spellings(record["asked"]) != without_spellings(asked):
        state = "a finished" if "curve" in record else "an interrupted"
        raise ValueError(
            f"{dir} holds {state} run with other settings: "
            f"{differences(record['asked'], asked)}. Choose another --out, or start "
            "over with --fresh"
        )


def without_spellings(asked):
    return {key: value for key, value in asked.items() if key not in SPELLINGS}


def refuse_foreign_model(dir):
    """Raises ValueError if a directory holds a model that is not a run's, and would be lost."""
    if not Path(dir).is_dir() or Path(dir, files.RECORD).exists():
        return
    foreign = holds_model(dir)
    if foreign:
        raise ValueError(
            f"{dir} holds files of a model or tokenizer ({some(foreign)}) that no "
            "training.json accounts for; choose another --out, or replace it with "
            "--fresh"
        )


def differences(old, new):
    """differences({"steps": 100}, {"steps": 200}) -> 'steps 100 -> 200'; the same inside dicts."""
    found = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found.append(differences(before, after))
        else:
            found.append(f"{key} {before} -> {after}")
    return ", ".join(found)


def read_record(dir):
    """The content of training.json, or {} if there is none. Raises ValueError if it is damaged."""
    path = Path(dir, files.RECORD)
    if not path.exists():
        return {}
    try:
        record = read_json(path)
        check_record(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); move it away, or start over with --fresh"
        ) from error
    return record


def check_record(record):
    """Raises an error if this is not the record of a run."""
    if not isinstance(record["asked"], dict):
        raise ValueError("what was asked for is missing")
    if "curve" not in record:
        return
    if not isinstance(record["finished"], str):
        raise ValueError("the time when it finished is missing")
    for point in record["curve"]:
        if not point.keys() >= POINT:
            raise ValueError("a point of the curve is incomplete")
        if type(point["step"]) is not int or point["step"] < 0:
            raise ValueError("a step of the curve is not a number")
        # A run that diverged has NaN or infinity here.
        bpb = point["bpb"]
        if type(bpb) not in (int, float) or (math.isfinite(bpb) and bpb < 0):
            raise ValueError("a value of the curve is not a number")
