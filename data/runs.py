"""
What a training run leaves in its directory, such that nothing is lost.

    training.json             what was asked for, written first; with the curve, written last, the run is finished
    checkpoint.safetensors    if it was interrupted: weights, best weights, optimizer state, where it stood
"""
import hashlib
import json
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpt import replacing


@contextmanager
def open_run(dir, asked, resume, fresh):
    """`with open_run(…) as (record, resuming):` look at dir before a run that `asked` (a dictionary for JSON) describes, note
    it there, and keep other processes from beginning one in dir until the block ends.

    record is that of a finished run that did just this, or None; resuming says that a checkpoint waits. `resume` True
    demands a checkpoint, False refuses one, None takes what is there; `fresh` forgets both. Raises ValueError where dir
    holds something else, which the run would overwrite, and OSError where it cannot be written, or another run is at it."""
    Path(dir).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(dir, ".lock"), is_singleton=True)      # the system lets it go when the process dies, however it dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"another run is writing into {dir}; wait for it, or choose another --out") from None
    try:
        yield _look(dir, asked, resume, fresh)
    finally:
        lock.release()


def _look(dir, asked, resume, fresh):
    path, checkpoint = Path(dir, "training.json"), Path(dir, "checkpoint.safetensors")
    record = {} if fresh else read_record(dir)
    finished, interrupted = "curve" in record, checkpoint.exists() and not fresh
    if (finished or interrupted) and record.get("asked") != asked:
        raise ValueError(f"{dir} holds {'a finished' if finished else 'an interrupted'} run of other settings: "
                         f"{differences(record.get('asked') or {}, asked)}. Choose another --out, or start over with --fresh")
    if finished:
        return record, False
    if interrupted and resume is False:
        raise ValueError(f"{dir} holds an interrupted run; continue it with --resume, or start over with --fresh")
    if resume and not interrupted:
        raise ValueError(f"--resume: {dir} holds no interrupted run; leave the flag out to start one")
    if not (record or fresh) and any(Path(dir, name).exists() for name in ("model.safetensors", "adapter_model.safetensors")):
        raise ValueError(f"{dir} holds a model that no training.json accounts for; choose another --out, "
                         "or replace it with --fresh")
    if not interrupted:
        checkpoint.unlink(missing_ok=True)      # first, or a death here would leave it to be taken for one of this run
        write_json(path, {"asked": asked})
    return None, interrupted


def close_run(dir, asked, curve):
    """Write the record of a finished run, and drop its checkpoint."""
    write_json(Path(dir, "training.json"), {"asked": asked, "curve": curve, "finished": time.strftime("%Y-%m-%d %H:%M")})
    Path(dir, "checkpoint.safetensors").unlink(missing_ok=True)


def write_checkpoint(dir, step, n, seconds, curve, best):
    """Keep all that training needs to go on before step n, in one file; the batches follow from seed and step."""
    tensors = {f"now/{name}": p.detach() for name, p in step.trained.items()}
    tensors |= {f"best/{name}": p for name, p in best.items()}
    for i, optimizer in enumerate(step.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{j}/{key}": tensor for key, tensor in state.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {"step": n, "seconds": seconds, "curve": curve}
    with replacing(Path(dir, "checkpoint.safetensors")) as path:
        save_file(tensors, path, metadata={"about": json.dumps(about), "sha256": _digest(tensors, about)})


def _digest(tensors, about):
    """A hash of all that a checkpoint holds: a flipped bit is found before training goes on with it."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_checkpoint(dir, step):
    """Put a checkpoint's weights and optimizer state into step -> step number, seconds, curve, best weights."""
    path = Path(dir, "checkpoint.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            if file.metadata()["sha256"] != _digest(tensors, about):
                raise ValueError("its content is not what was written")
        best = {name: tensors[f"best/{name}"] for name in step.trained if about["curve"]}
        with torch.no_grad():
            for name, p in step.trained.items():
                p.copy_(tensors[f"now/{name}"])
        for i, optimizer in enumerate(step.optimizers):
            state = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer/{i}/"):
                    j, key = name.split("/")[2:]
                    state.setdefault(int(j), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (SafetensorError, TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:     # also a RecursionError
        raise ValueError(f"{path} is damaged ({error!r}); start over with --fresh") from error
    return about["step"], about["seconds"], about["curve"], best


def differences(old, new):
    """differences({"steps": 100}, {"steps": 200}) -> 'steps 100 -> 200'; dictionaries inside are compared likewise."""
    return ", ".join(differences(old[key], new[key]) if isinstance(old.get(key), dict) and isinstance(new.get(key), dict)
                     else f"{key} {old.get(key)} -> {new.get(key)}"
                     for key in {**old, **new} if old.get(key) != new.get(key))


def read_record(dir):
    """The content of dir/training.json, {} without one. Raises ValueError where it is damaged."""
    path = Path(dir, "training.json")
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["asked"], dict) or "curve" in record and not (_curve(record["curve"]), record["finished"]):
            raise ValueError("not the record of a run")
        return record
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); move it away, or start over with --fresh") from error


def _curve(points):
    """Points of a training curve as they are, if that is what they are."""
    for point in points:
        if not {"step", "seconds", "loss", "bpb", "skipped"} <= point.keys() or not float(point["bpb"]) + point["step"] >= 0:
            raise ValueError("not a training curve")
    return points


def write_json(path, value):
    with replacing(Path(path)) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
