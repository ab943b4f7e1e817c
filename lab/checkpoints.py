"""
Checkpoints: everything that training needs to continue, in one file.

    now/<name>                    the parameters that train
    best/<name>                   the same, as they were when the held-out loss was lowest
    optimizer/<i>/<j>/<key>       the state of optimizer i for its parameter j

The metadata has the step, the training seconds and the curve, and a checksum of
everything: a flipped bit is found before training continues with it. The state of the
random generators is not stored: every step sets the seed from the settings and its
number.
"""
import hashlib
import json
from pathlib import Path

import torch

from lab import files
from lab.files import open_tensors, read_all, write_tensors


def write_checkpoint(dir, about, trained, best, optimizers):
    """Write a checkpoint, atomically.

    about {"step", "seconds", "curve", "skipped"} is stored as JSON; trained and best
    are {name: tensor}.
    """
    tensors = {f"now/{name}": p for name, p in trained.items()}
    tensors |= {f"best/{name}": p for name, p in best.items()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            for key, tensor in state.items():
                tensors[f"optimizer/{i}/{j}/{key}"] = tensor
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"about": json.dumps(about), "sha256": checksum(tensors, about)}
    write_tensors(Path(dir, files.CHECKPOINT), tensors, metadata)


def checksum(tensors, about):
    """A hash of {name: tensor} and of the JSON value `about`."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_checkpoint(dir, trained, optimizers):
    """Put a checkpoint into the tensors `trained` {name: tensor} and into the optimizers.

    Returns about {"step", "seconds", "curve", "skipped"} and the best weights {name:
    tensor}. Raises ValueError if the file is damaged.
    """
    path = Path(dir, files.CHECKPOINT)
    try:
        with open_tensors(path) as file:
            metadata = file.metadata()
            tensors = read_all(file)
        about = json.loads(metadata["about"])
        if metadata["sha256"] != checksum(tensors, about):
            raise ValueError("its content is not what was written")
        best = {}
        if about["curve"]:
            best = {name: tensors[f"best/{name}"] for name in trained}
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(tensors[f"now/{name}"])
        for i, optimizer in enumerate(optimizers):
            load_optimizer(optimizer, tensors, prefix=f"optimizer/{i}/")
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}); start over with --fresh") from error
    return about, best


def load_optimizer(optimizer, tensors, prefix):
    """Put the tensors <prefix><number of the parameter>/<key> into the state of an optimizer."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            number, key = name.removeprefix(prefix).split("/")
            state.setdefault(int(number), {})[key] = tensor
    own = optimizer.state_dict()
    for number, values in own["state"].items():     # Muon has its state from the beginning
        missing = values.keys() - state.get(number, {}).keys()
        if missing:
            raise KeyError(f"{prefix}{number}/{missing.pop()}")
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
