"""
Several processes that train one model, started by torchrun, one for each GPU.

Each process computes its share of every batch. The gradients are averaged, so all
processes take the same step (data parallelism). With --fsdp each process also stores
only its share of the frozen weights. The first process alone prints and writes files.
"""
import contextlib
import gc
import os
import sys
import warnings
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

# ---- the processes -----------------------------------------------------------------

def rank():
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world():
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first():
    """Whether this is the process that prints and writes."""
    return rank() == 0


def launched_by_torchrun():
    """Whether torchrun has started several processes, even if they are not connected yet."""
    return number_from("WORLD_SIZE", default=1) > 1


def number_from(name, default):
    """The number in an environment variable of torchrun. Raises ValueError if it is none."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(
            f"the environment variable {name} is {value!r}; torchrun sets it to a number. "
            "Unset it to train in a single process"
        )
    return int(value)


def own_device():
    """The GPU of this process under torchrun."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def name_of_process():
    """What error messages begin with: "[process 1] ", or "" in the first process."""
    number = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") == "1" or number == "0":
        return ""
    return f"[process {number}] "


@contextlib.contextmanager
def processes(device):
    """`with processes(device):` connect the processes that torchrun has started, if any."""
    if not launched_by_torchrun():
        yield
        return
    number_from("RANK", default=0)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    use_nccl = on_gpu and distributed.is_nccl_available()       # Windows has no NCCL
    # Wait only a minute for all processes to appear, but half an hour for a slow one.
    store, own_rank, size = next(rendezvous("env://", timeout=timedelta(seconds=60)))
    store.set_timeout(timedelta(minutes=30))
    backend = "nccl" if use_nccl else "gloo"
    distributed.init_process_group(backend, store=store, rank=own_rank, world_size=size)
    try:
        yield
    finally:
        gc.collect()        # free what uses the group before the group itself
        distributed.destroy_process_group()


def leave(code):
    """End the process with an exit code. Nothing after this runs.

    One of several processes ends without Python's own cleanup: a thread of gloo may
    still be freeing tensors, and would abort the process if that cleanup has begun.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class FirstFailed(Exception):
    """Raised in all processes but the one that failed: that one reports the error."""


def from_first(function, *args, **options):
    """Call a function in the first process. All processes return its result.

    If it raises, so do all: the first with its own error, the others with FirstFailed.
    """
    result = error = None
    if is_first():
        try:
            result = function(*args, **options)
        except Exception as failure:
            error = failure
    if world() > 1:
        outcome = [(result, error is not None)]
        distributed.broadcast_object_list(outcome)
        result, failed = outcome[0]
        if failed and not is_first():
            raise FirstFailed
    if error is not None:
        raise error
    return result


def together(function, *args, **options):
    """Call a function in every process; each returns its own result.

    If it raises in some, all raise: the first of those its error, the others FirstFailed.
    """
    result = error = None
    try:
        result = function(*args, **options)
    except Exception as failure:
        error = failure
    failed = [number for number, failed in enumerate(gathered(error is not None)) if failed]
    if not failed:
        return result
    if rank() == failed[0]:
        raise error
    raise FirstFailed


def check_equal(value, what):
    """Raises ValueError if `value` is not the same in all processes; in others FirstFailed."""
    values = gathered(value)
    if len(set(values)) > 1:
        if not is_first():
            raise FirstFailed
        raise ValueError(f"the processes have different {what}: {', '.join(map(str, values))}")


def gathered(value):
    """[the value of each process]. Every process must call this."""
    if world() == 1:
        return [value]
    values = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def any_of(flag, device):
    """Whether `flag` is true in any process. Every process must call this."""
    if world() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    distributed.all_reduce(flags)
    return bool(flags)


def share_of(batch):
    """This process's rows of the tensors (B, ...) of a batch."""
    share = []
    for tensor in batch:
        start = rank() * len(tensor) // world()
        end = (rank() + 1) * len(tensor) // world()
        share.append(tensor[start:end])
    return share


def seed_of_step(seed, n):
    """The seed of dropout in step n: different in every step and every process."""
    return (seed * 1_000_003 + n) * world() + rank()


# ---- gradients and weights ---------------------------------------------------------

class Averaging:
    """Averages the gradients of a model over the processes. A single process does nothing.

    `call` is what to call instead of the model, and `bytes_sent` the size of the
    gradients that this process sent to be averaged in the last step.
    """

    def __init__(self, model, trained, fsdp):
        self.trained = trained
        self.call = model
        self.uses_ddp = world() > 1 and not fsdp
        self.uses_fsdp = world() > 1 and fsdp
        self.bytes_sent = 0
        if self.uses_ddp:
            self.call = DistributedDataParallel(model)
            # DDP passes its first argument, self, to the hook.
            self.call.register_comm_hook(self, Averaging.count_and_average)

    def count_and_average(self, bucket):
        """DDP's own way of averaging, with a count of the bytes."""
        self.bytes_sent += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(None, bucket)

    def micro_batch(self, is_last):
        """`with averaging.micro_batch(is_last):` forward and backward of a micro-batch.

        DDP averages the gradients once, in the backward pass of the last one.
        """
        self.bytes_sent = 0
        if self.uses_ddp and not is_last:
            return self.call.no_sync()
        return contextlib.nullcontext()

    def finish(self):
        """Average the gradients under FSDP, which ignores the trained tensors."""
        if not self.uses_fsdp:
            return
        flat = torch.cat([p.grad.flatten() for p in self.trained])
        distributed.all_reduce(flat)
        self.bytes_sent = flat.nbytes
        means = (flat / world()).split([p.numel() for p in self.trained])
        for p, mean in zip(self.trained, means):
            p.grad.copy_(mean.view_as(p))


def shard(model, trained, device):
    """Divide the frozen parameters of a GPT among the processes (FSDP; Zhao et al. 2023,
    here as torch's fully_shard).

    Each process keeps its share of every block, and gathers the rest while it
    computes with the block. What trains, A and B, is small: every process has all of
    it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The warning is about the keys and values of attention, which are views; nobody
    # writes them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(torch.device(device).type, (world(),))
    for p in trained:
        p.data = p.data.to(device)
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=mesh, ignored_params=set(trained))
