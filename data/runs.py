"""
What a training run leaves in its directory, such that nothing is lost.

    checkpoint.safetensors    while it was interrupted: weights, best weights, optimizer state, where it stood
    training.json             once it is finished, written last: what was asked for, and the curve
"""
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpt import replacing


def open_run(dir, asked, resume, fresh):
    """Look at dir before a run that `asked` (a dictionary for JSON) describes -> (record, resuming).

    record is that of a finished run that did just this, or None; resuming says that a checkpoint waits. `resume` True
    demands a checkpoint, False refuses one, None takes what is there; `fresh` forgets both. Raises ValueError where dir
    holds something else, which the run would overwrite, and OSError where it cannot be written."""
    finished, checkpoint = Path(dir, "training.json"), Path(dir, "checkpoint.safetensors")
    if fresh:
        finished.unlink(missing_ok=True)
        checkpoint.unlink(missing_ok=True)
    elif finished.exists():
        record = read_json(finished)
        if record["asked"] != asked:
            raise ValueError(f"{dir} holds a finished run of other settings: {differences(record['asked'], asked)}. "
                             "Choose another --out, or start over with --fresh")
        return record, False
    elif checkpoint.exists():
        if resume is False:
            raise ValueError(f"{dir} holds an interrupted run; continue it with --resume, or start over with --fresh")
        return None, True
    elif resume:
        raise ValueError(f"--resume: {dir} holds no interrupted run; leave the flag out to start one")
    elif any(Path(dir, name).exists() for name in ("model.safetensors", "adapter_model.safetensors")):
        raise ValueError(f"{dir} holds a model that no training.json accounts for; choose another --out, "
                         "or replace it with --fresh")
    Path(dir).mkdir(parents=True, exist_ok=True)
    with replacing(Path(dir, "writable")) as probe:     # a dir that cannot be written fails now, not after the training
        probe.touch()
    Path(dir, "writable").unlink()
    return None, False


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
    about = {"step": n, "seconds": seconds, "curve": curve, "settings": asdict(step.settings)}
    with replacing(Path(dir, "checkpoint.safetensors")) as path:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"about": json.dumps(about)})


def read_checkpoint(dir, step):
    """Put a checkpoint's weights and optimizer state into step -> step number, seconds, curve, best weights."""
    path = Path(dir, "checkpoint.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); start over with --fresh") from error
    if about["settings"] != asdict(step.settings):
        raise ValueError(f"{path} was made with other settings: {differences(about['settings'], asdict(step.settings))}. "
                         "Give the same flags, or start over with --fresh")
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
    best = {name: tensors[f"best/{name}"] for name in step.trained if about["curve"]}
    return about["step"], about["seconds"], about["curve"], best


def differences(old, new):
    """differences({"steps": 100}, {"steps": 200}) -> 'steps 100 -> 200'; dictionaries inside are compared likewise."""
    return ", ".join(differences(old[key], new[key]) if isinstance(old.get(key), dict) and isinstance(new.get(key), dict)
                     else f"{key} {old.get(key)} -> {new.get(key)}"
                     for key in {**old, **new} if old.get(key) != new.get(key))


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); start over with --fresh") from error


def write_json(path, value):
    with replacing(Path(path)) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
