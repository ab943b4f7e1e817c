"""
What a training step costs, measured: memory by kind, time by phase.

    weights        everything the model holds, trained or frozen
    gradients      one number for each trained one
    optimizer      AdamW keeps two numbers for each trained one
    activations    what the forward pass keeps for the backward pass

LoRA nearly eliminates gradients and optimizer state. It hardly changes the
activations, and it shrinks the weights only if the frozen base is stored in bfloat16.
"""
import statistics
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from tqdm import tqdm

from lab.capture import WARMUP, captured
from lab.nf4 import parameter_count


def measure(steps, x, y):
    """Measure each of `steps` {name: train.Step} on one batch x, y (B, T).

    Returns {name: {"trainable_params", "total_params", "memory", "time",
    "tokens_per_s"}}.
    """
    memory = {name: measure_memory(step, x, y) for name, step in steps.items()}
    times = measure_time(steps, x, y)
    results = {}
    for name, step in steps.items():
        results[name] = {
            "trainable_params": sum(p.numel() for p in step.trained.values()),
            "total_params": parameter_count(step.model),
            "memory": memory[name],
            "time": times[name],
            "tokens_per_s": x.numel() / times[name]["step_ms"] * 1000,
        }
    return results


# ---- memory ------------------------------------------------------------------------

def bytes_of(tensors):
    """Bytes of memory behind the tensors; memory that several of them share counts once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes(tensors) as live:` count the bytes of all tensors that exist.

    Every tensor that an operation makes, in forward, backward or optimizer, counts
    from its allocation until it is freed, and `tensors` count from the beginning:
    live.now and live.peak. What a kernel allocates for itself is not seen.
    """

    def __init__(self, tensors):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.sizes = {}             # {address of a storage: bytes}
        for tensor in tensors:
            self.count(tensor)

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return out


def measure_memory(step, x, y):
    """Measure the memory of one training step on x, y (B, T), after a warm-up step.

    Returns {"weights", "gradients", "optimizer", "activations", "peak"} in bytes. On
    CUDA, activations and peak are those of the allocator. Elsewhere, activations are
    the tensors that autograd saves in the forward pass, and the peak is that of all
    live tensors. It can be less than the sum: activations are freed while gradients
    are made.
    """
    step(x, y)
    x, y = step.micro_batches(x, y)[0]
    weights = [*step.model.parameters(), *step.model.buffers()]
    states = optimizer_states(step)
    run = run_on_cuda if x.is_cuda else run_counting_tensors
    gradients, activations, peak = run(step, x, y, weights, states)
    return {
        "weights": bytes_of(weights),
        "gradients": gradients,
        "optimizer": bytes_of(states),
        "activations": activations,
        "peak": peak,
    }


def optimizer_states(step):
    """All tensors that the optimizers of a step keep."""
    tensors = []
    for optimizer in step.optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    return tensors


def gradients_of(step):
    return bytes_of(p.grad for p in step.trained.values())


def run_on_cuda(step, x, y, weights, states):
    """Run a step. Returns the allocator's bytes of gradients, activations and peak."""
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - bytes_of(weights + states + [x, y])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = step.forward(x, y)
    activations = torch.cuda.memory_allocated() - before
    step.backward(loss)
    gradients = gradients_of(step)
    step.update()
    peak = torch.cuda.max_memory_allocated() - others
    return gradients, activations, peak


def run_counting_tensors(step, x, y, weights, states):
    """Run a step. Returns the bytes of gradients, activations and peak, all counted."""
    own = {p.untyped_storage().data_ptr() for p in weights}
    saved = []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    with LiveBytes(weights + states + [x, y]) as live:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = step.forward(x, y)
        activations = bytes_of(saved)
        saved.clear()
        step.backward(loss)
        gradients = gradients_of(step)
        step.update()
    return gradients, activations, live.peak


# ---- time --------------------------------------------------------------------------

def clock(device):
    """Seconds, read after the device has finished all that it was asked to do."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()
    return time.perf_counter()


def round_robin(samplers, rounds, warmup=0, title=None):
    """Call each of `samplers` {name: function} in turn, round after round.

    A machine that slows down meanwhile then slows all of them. The results of the
    first `warmup` rounds are discarded. Returns {name: [what the function returned in
    each round]}.
    """
    results = {name: [] for name in samplers}
    disable = None if title else True
    for i in tqdm(range(warmup + rounds), title, disable=disable, leave=False):
        for name, sample in samplers.items():
            result = sample()
            if i >= warmup:
                results[name].append(result)
    return results


def timed(function, device, repeat=1):
    """A sampler for round_robin: calls function() `repeat` times; returns the seconds of a call."""
    def sample():
        start = clock(device)
        for _ in range(repeat):
            function()
        return (clock(device) - start) / repeat
    return sample


def measure_time(steps, x, y, rounds=10, warmup=WARMUP + 1):
    """Time one training step of each of `steps` {name: train.Step}, in turn.

    Returns {name: {"forward_ms", "backward_ms", "optimizer_ms", "step_ms"}}, medians.
    step_ms is timed without a stop between the phases, and captured if the step can
    be: on a GPU it is less than their sum.
    """
    samplers = {name: phase_sampler(step, x, y) for name, step in steps.items()}
    medians = {}
    for name, samples in round_robin(samplers, rounds, warmup).items():
        medians[name] = {}
        for phase in samples[0]:
            values = [sample[phase] for sample in samples]
            medians[name][phase] = statistics.median(values)
    return medians


def phase_sampler(step, x, y):
    """A sampler for round_robin that returns the milliseconds of each phase, and of a step."""
    whole_step = captured(step)

    def sample():
        forward = backward = 0.0
        for part_x, part_y in step.micro_batches(x, y):
            t0 = clock(x.device)
            loss = step.forward(part_x, part_y)
            t1 = clock(x.device)
            step.backward(loss)
            t2 = clock(x.device)
            forward += t1 - t0
            backward += t2 - t1
        step.update()
        t3 = clock(x.device)
        del loss            # free the autograd graph before a capture on another stream
        whole_step(x, y)
        t4 = clock(x.device)
        return {
            "forward_ms": 1000 * forward,
            "backward_ms": 1000 * backward,
            "optimizer_ms": 1000 * (t3 - t2),
            "step_ms": 1000 * (t4 - t3),
        }
    return sample
