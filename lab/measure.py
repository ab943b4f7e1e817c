"""
What a training step costs, measured: memory by kind, time by phase.

    weights        everything the model holds, trained or frozen
    gradients      one number for each trained parameter
    optimizer      AdamW keeps two numbers for each trained parameter
    activations    what the forward pass keeps for the backward pass

    forward        from a batch to its loss
    backward       from the loss to the gradients
    optimizer      from the gradients to new weights

The chunked loss does a part of the backward pass in the forward pass: it makes the
gradients of the hidden states and of the head while it has the logits. That time is
counted as backward, and the gradient of the head is no activation.

LoRA nearly eliminates gradients and optimizer state. It hardly changes the
activations, and it shrinks the weights only if the frozen base is stored in fewer bits.
"""
import contextlib
import statistics
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from tqdm import tqdm

from lab.capture import WARMUP, capture_each, captured
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
    live tensors. Activations do not include bytes_made_ahead(), which are among
    the gradients. The peak can be less than the sum: activations are freed while
    gradients are made.
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


def bytes_of_gradients(step):
    return bytes_of(p.grad for p in step.trained.values())


def bytes_made_ahead(loss):
    """Bytes of the gradient of the head, if the chunked loss has made it in the forward pass."""
    return getattr(loss.grad_fn, "head_gradient_bytes", 0)


def run_on_cuda(step, x, y, weights, states):
    """Run a step. Returns the allocator's bytes of gradients, activations and peak."""
    torch.cuda.synchronize()
    unrelated = torch.cuda.memory_allocated() - bytes_of(weights + states + [x, y])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = step.forward(x, y)
    activations = torch.cuda.memory_allocated() - before - bytes_made_ahead(loss)
    step.backward(loss)
    gradients = bytes_of_gradients(step)
    step.update()
    peak = torch.cuda.max_memory_allocated() - unrelated
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
        activations = bytes_of(saved) - bytes_made_ahead(loss)
        saved.clear()
        step.backward(loss)
        gradients = bytes_of_gradients(step)
        step.update()
    return gradients, activations, live.peak


def process_peak(device):
    """The most memory that this process has held so far, everything included.

    Returns {"resident": bytes of main memory} and, on CUDA, "cuda": the bytes that
    torch's allocator reserved on the GPU since measure_memory() last ran, if it did.
    """
    peak = {"resident": resident_peak()}
    if torch.device(device).type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_reserved(device)
    return peak


def resident_peak():
    """The most bytes of main memory that this process has held so far."""
    if sys.platform == "win32":
        import psutil
        return psutil.Process().memory_info().peak_wset
    # Linux. (Its getrusage() would also count the process that started this one.)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak    # macOS: bytes, others: kB


# ---- time --------------------------------------------------------------------------
# Samplers, functions that measure once, are called in turn (round_robin). A step has up
# to four of them: its phases one by one; the loss with and without gradients, whose
# difference is what the loss computes ahead; and, except on a CPU, the step as a whole.

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
    """Time one training step of each of `steps` {name: train.Step} on x, y (B, T), in turn.

    Returns {name: {"forward_ms", "backward_ms", "optimizer_ms", "step_ms", "ahead_ms",
    "captured"}}, with typical times in milliseconds:

    step_ms         a whole step. A CPU does nothing between two phases, so there a step
                    is its phases; elsewhere it is timed on its own, without a stop
    backward_ms     includes ahead_ms, the part that the loss does in the forward pass
    captured        whether the step, and each phase, was replayed as a CUDA graph
    """
    kinds = {
        "phases": phase_sampler,
        "loss": partial(loss_sampler, with_gradients=True),
        "value of the loss": partial(loss_sampler, with_gradients=False),
    }
    if x.device.type != "cpu":
        kinds["step"] = step_sampler
    samplers = {}
    for kind, make in kinds.items():
        for name, step in steps.items():
            samplers[name, kind] = make(step, x, y)
    samples = round_robin(samplers, rounds, warmup)
    times = {}
    for name, step in steps.items():
        phases = typical(samples[name, "phases"])
        loss = statistics.median(samples[name, "loss"])
        value = statistics.median(samples[name, "value of the loss"])
        ahead = max(0.0, loss - value)      # only noise can make it negative
        whole = sum(phases.values())
        if (name, "step") in samples:
            whole = statistics.median(samples[name, "step"])
        times[name] = {
            "forward_ms": 1000 * (phases["forward"] - ahead),
            "backward_ms": 1000 * (phases["backward"] + ahead),
            "optimizer_ms": 1000 * phases["optimizer"],
            "step_ms": 1000 * whole,
            "ahead_ms": 1000 * ahead,
            "captured": step.can_be_captured,
        }
    return times


def typical(samples):
    """The mean of each key of the samples [{key: number}, ...], over the middle half of them.

    The quarters with the smallest and the largest sums are left out, so that a
    disturbance counts as little as in a median. Unlike medians, the result adds up:
    its sum is that of a typical sample.
    """
    ordered = sorted(samples, key=lambda sample: sum(sample.values()))
    quarter = len(ordered) // 4
    middle = ordered[quarter:len(ordered) - quarter]
    means = {}
    for key in middle[0]:
        means[key] = statistics.fmean(sample[key] for sample in middle)
    return means


# Each of these makes a sampler for round_robin, which returns seconds.

def step_sampler(step, x, y):
    """Times a whole step, without a stop between its phases."""
    return timed(partial(captured(step), x, y), x.device)


def phase_sampler(step, x, y):
    """Times the phases of a step one by one: {"forward", "backward", "optimizer"}."""
    names, functions = zip(*phases_of(step, x, y))
    functions = as_in_the_step(step, functions)

    def sample():
        seconds = dict.fromkeys(names, 0.0)
        for name, function in zip(names, functions):
            start = clock(x.device)
            function()
            seconds[name] += clock(x.device) - start
        return seconds
    return sample


def loss_sampler(step, x, y, with_gradients):
    """Times the loss of a batch: its value, and what is computed ahead with_gradients.

    The plain loss computes nothing ahead, and is not timed.
    """
    if not step.settings.loss_chunk:
        return lambda: 0.0
    functions = []
    for part_x, part_y in step.micro_batches(x, y):
        functions.append(loss_again(step, part_x, part_y, with_gradients))
    functions = as_in_the_step(step, functions)

    def compute():
        for function in functions:
            function()
    return timed(compute, x.device)


def as_in_the_step(step, functions):
    """The functions as CUDA graphs if the step is captured in one, else as they are."""
    if not step.can_be_captured:
        return functions
    for _ in range(WARMUP):
        for function in functions:
            function()
    return capture_each(functions)


def phases_of(step, x, y):
    """The phases of step(x, y) in their order: [(name, function), ...].

    A micro-batch has a forward and a backward phase of its own.
    """
    parts = step.micro_batches(x, y)
    losses = []             # forward leaves a loss here, and backward takes it

    def forward(x, y, is_last):
        with step.averaging.micro_batch(is_last):
            losses.append(step.forward(x, y) / len(parts))

    def backward(is_last):
        with step.averaging.micro_batch(is_last):
            step.backward(losses.pop())

    phases = []
    for i, (part_x, part_y) in enumerate(parts):
        is_last = i == len(parts) - 1
        phases.append(("forward", partial(forward, part_x, part_y, is_last)))
        phases.append(("backward", partial(backward, is_last)))
    phases.append(("optimizer", step.update))
    return phases


def loss_again(step, x, y, with_gradients):
    """A function that computes the loss of a micro-batch x, y again, from its hidden states."""
    hidden, head, targets, autocast = what_the_loss_gets(step, x, y)
    hidden.requires_grad_()

    def compute():
        with autocast(), torch.set_grad_enabled(with_gradients):
            step.model.loss(hidden, head, targets)
    return compute


def what_the_loss_gets(step, x, y):
    """What the model calls its loss with for x, y: hidden states, head, targets, and autocast."""
    loss, seen = step.model.loss, []

    def note(hidden, head, targets):
        device_type = hidden.device.type
        enabled = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type)
        autocast = partial(torch.autocast, device_type, dtype, enabled)
        seen.append((hidden.detach(), head, targets, autocast))
        return loss(hidden, head, targets)

    eager = contextlib.nullcontext()
    if step.settings.compile:
        eager = torch.compiler.set_stance("force_eager")
    step.model.loss = note
    try:
        with torch.no_grad(), eager:
            step.forward(x, y)
    finally:
        step.model.loss = loss
    return seen[0]
