"""
What a way of fine-tuning costs, measured: memory by kind, time by phase; as a table, as JSON and as a picture.

Memory of one training step, at its fullest:
    weights        everything the model holds, trained or frozen
    gradients      one number for each trained one
    optimizer      AdamW keeps two numbers for each trained one
    activations    what the forward pass keeps for the backward pass
Of these LoRA shrinks the second and the third to almost nothing, the fourth hardly, and the first where the frozen base is
stored in bfloat16.
"""
import itertools
import statistics
import textwrap
import time
import weakref

import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_minimal import LoRALinear


# ---- memory ----------------------------------------------------------------------------------------------------------

def bytes_of(tensors):
    """Bytes of memory behind the tensors; memory that several of them share counts once."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors if t is not None)}
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes(tensors) as live:` every tensor made by any operation, in forward, backward or optimizer,
    is counted from its birth to its death, beginning with `tensors`: live.now and live.peak, in bytes.

    It sees whole tensors, not what a kernel allocates for itself meanwhile."""

    def __init__(self, tensors):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}
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
    """Run one training step on x, y (B, T) after a warm-up step, and measure it:

    -> {"weights", "gradients", "optimizer", "activations", "peak"} in bytes. On CUDA activations and peak are the
    allocator's; elsewhere activations are the tensors that autograd saves in the forward pass and the peak is that of
    the live tensors. The peak can be less than the sum: activations are freed while gradients are made."""
    step(x, y)
    x, y = (t[:len(t) // step.settings.accumulate] for t in (x, y))         # one of the parts that a batch is computed in
    weights = [*step.model.parameters(), *step.model.buffers()]
    moments = [t for o in step.optimizers for state in o.state.values() for t in state.values() if torch.is_tensor(t)]
    trained = [p for p in weights if p.requires_grad]
    if x.is_cuda:
        torch.cuda.synchronize()
        others = torch.cuda.memory_allocated() - bytes_of(weights + moments + [x, y])      # not this step's
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = step.forward(x, y)
        activations = torch.cuda.memory_allocated() - before
        step.backward(loss)
        gradients = bytes_of(p.grad for p in trained)
        step.update()
        peak = torch.cuda.max_memory_allocated() - others
    else:
        own = {p.untyped_storage().data_ptr() for p in weights}
        saved = []

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                saved.append(tensor)
            return tensor

        with LiveBytes(weights + moments + [x, y]) as live:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = step.forward(x, y)
            activations = bytes_of(saved)
            saved.clear()
            step.backward(loss)
            gradients = bytes_of(p.grad for p in trained)
            step.update()
        peak = live.peak
    return {"weights": bytes_of(weights), "gradients": gradients, "optimizer": bytes_of(moments),
            "activations": activations, "peak": peak}


# ---- time ------------------------------------------------------------------------------------------------------------

def clock(device):
    """Seconds on a clock, once the device has done all that was asked of it."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()
    return time.perf_counter()


def measure_time(steps, x, y, rounds=10, warmup=3):
    """Time one training step of each of `steps` {name: step}, in turn, round by round, so that a machine that slows
    down meanwhile slows all of them; the device is waited for, and the warm-up rounds are discarded.

    -> {name: {"forward_ms", "backward_ms", "optimizer_ms", "step_ms"}}, medians. step_ms is timed without a stop
    between the phases, so on a GPU it can be less than their sum."""
    times = {name: {"forward_ms": [], "backward_ms": [], "optimizer_ms": [], "step_ms": []} for name in steps}
    for round in range(warmup + rounds):
        for name, step in steps.items():
            phases = [0.0, 0.0]
            for part_x, part_y in zip(x.chunk(step.settings.accumulate), y.chunk(step.settings.accumulate)):
                t0 = clock(x.device)
                loss = step.forward(part_x, part_y)
                t1 = clock(x.device)
                step.backward(loss)
                t2 = clock(x.device)
                phases = [phases[0] + t1 - t0, phases[1] + t2 - t1]
            step.update()
            t3 = clock(x.device)
            del loss            # with it dies the graph of this backward, which a capture on another stream must not meet
            step(x, y)
            t4 = clock(x.device)
            if round >= warmup:
                for key, seconds in zip(times[name], (*phases, t3 - t2, t4 - t3)):
                    times[name][key].append(seconds * 1000)
    return {name: {key: statistics.median(values) for key, values in of.items()} for name, of in times.items()}


# ---- prediction ------------------------------------------------------------------------------------------------------

def predict(step, x):
    """What arithmetic says of a step on x (B, T) -> ({kind: bytes}, {part: floating-point operations}).

    Operations: a product with a matrix of n numbers takes 2 n for every token, forward; as many again for the gradient of
    its input, and as many again for that of the matrix, which a frozen one does not need (so LoRA saves up to a third). A
    and B add thin products, of r × (in + out): u = x Aᵀ, v = g B and the gradients of A and B, and adding both to the
    outputs, or folding them into W, which costs less than it looks here.
    Bytes: numbers are counted where they are made and kept, in 2 or 4 bytes each."""
    model, settings, tokens, T = step.model, step.settings, x.numel(), x.size(1)
    c, C = model.config, model.config.n_embd
    parameters, trained = list(model.parameters()), list(step.trained.values())
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    adapted = [m for m in linears if isinstance(m, LoRALinear)]
    at_once = tokens // settings.accumulate
    low = 2 if settings.dtype == "bfloat16" else 4          # bytes of a number that a product reads or writes
    stream = parameters[0].element_size()                   # and of one in the residual stream

    # Per token and block: the inputs of both layer norms, in the stream; their outputs (C each), q, k and v (3 C), what
    # attention gives (C), the MLP's hidden numbers before and after the GELU (8 C); float32 statistics of norms and softmax.
    block = stream * C if settings.recompute else 2 * stream * C + 14 * low * C + 16 + 4 * c.n_head
    if settings.dropout and not settings.recompute:
        block += 2 * C                                      # which numbers were dropped, a byte each
    head = stream * C + 8                                   # the last norm's input
    if settings.loss_chunk or model.lm_head.weight.requires_grad:
        head += low * C                                     # what the head reads, or already the gradient of it
    if not settings.loss_chunk:
        head += 4 * c.vocab_size                            # log-probabilities
    activations = at_once * (c.n_layer * block + head + low * sum(m.r for m in adapted) * (not settings.recompute))
    if not (model.transformer.wte.weight.requires_grad or settings.recompute):
        activations -= at_once * stream * C                       # nothing before the first block needs a gradient
    if settings.loss_chunk and model.lm_head.weight.requires_grad:
        activations += 4 * c.vocab_size * C                 # the head's gradient, made together with the loss
    if low < stream:                                        # autocast's copies of the weights that autograd multiplies by
        activations += low * sum(m.weight.numel() for m in linears if m not in adapted and m is not model.lm_head)
    memory = {"weights": sum(p.nbytes for p in parameters), "gradients": sum(p.nbytes for p in trained),
              "optimizer": 2 * sum(p.nbytes for p in trained), "activations": activations}

    products = 2 * tokens * sum(m.weight.numel() for m in linears)
    attention = 2 * tokens * c.n_layer * C * T              # q kᵀ and p v, each over half of the T tokens on average
    operations = {"forward": products + attention, "backward, inputs": products + 2 * attention,
                  "backward, weights": 2 * tokens * sum(m.weight.numel() for m in linears if m.weight.requires_grad),
                  "thin products": 6 * tokens * sum(m.r * (m.in_features + m.out_features) for m in adapted),
                  "forward again": settings.recompute * (products + attention)}
    return memory, operations


def ledgers(report, predicted):
    """Predicted beside measured, as lines of text: `predicted` {method: predict(…)}, report as for table()."""
    methods = [(report["methods"][m], *predicted[m]) for m in ("full", "lora")]
    rows = [("one step", "full: predicted", "measured", "LoRA: predicted", "measured")]
    for kind in ("weights", "gradients", "optimizer", "activations"):
        rows.append((f"memory: {kind}", *(size(n) for m, memory, _ in methods for n in (memory[kind], m["memory"][kind]))))
    for part in methods[0][2]:
        if any(operations[part] for _, _, operations in methods):
            rows.append((part, *(cell for m, _, operations in methods for cell in (
                f"{operations[part] / 1e9:,.1f} GFLOP", f"{m['time']['forward_ms']:.1f} ms" if part == "forward" else ""))))
    rows.append(("backward, all of it", *(cell for m, _, operations in methods for cell in (
        f"{(sum(operations.values()) - operations['forward']) / 1e9:,.1f} GFLOP", f"{m['time']['backward_ms']:.1f} ms"))))
    limit = sum(methods[0][2].values()) / sum(methods[1][2].values())
    speed = methods[0][0]["time"]["step_ms"] / methods[1][0]["time"]["step_ms"]
    return aligned(rows) + (f"\n\nIf all operations took equally long, a LoRA step would be {limit:.2f} times as fast as a full "
                            f"one; it was {speed:.2f} times.")


def aligned(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:])) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def measure(steps, x, y):
    """All of the above for each of `steps` {name: step} on one batch -> {name: the measured part of comparison.json}."""
    memory = {name: measure_memory(step, x, y) for name, step in steps.items()}
    times = measure_time(steps, x, y)
    return {name: {"trainable_params": sum(p.numel() for p in step.trained.values()),
                   "total_params": sum(p.numel() for p in step.model.parameters()),
                   "memory": memory[name], "time": times[name],
                   "tokens_per_s": x.numel() / times[name]["step_ms"] * 1000} for name, step in steps.items()}


# ---- reports ---------------------------------------------------------------------------------------------------------

def size(n):
    """Bytes in readable units: size(4_353_024) -> '4.35 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000


def table(report, style, base_name):
    """The comparison (the content of comparison.json) as lines of text in aligned columns."""
    full, lora = report["methods"]["full"], report["methods"]["lora"]
    rows = [("", "full", "LoRA", "full ÷ LoRA")]

    def row(label, key, show, ratio=True):
        a, b = full, lora
        for part in key.split("."):
            a, b = a[part], b[part]
        rows.append((label, show(a), show(b), f"{a / b:.2f}" if ratio and b else ""))

    def ms(value):
        return f"{value:.1f} ms"

    def bpb(value):
        return f"{value:.3f} bpb"

    row("parameters trained", "trainable_params", "{:,}".format)
    row("parameters in all", "total_params", "{:,}".format)
    row("to keep on disk per style", "checkpoint_bytes", size)
    for kind in ("weights", "gradients", "optimizer", "activations", "peak"):
        row(f"memory: {kind}" + (" of a step" if kind == "peak" else ""), f"memory.{kind}", size)
    for phase in ("forward", "backward", "optimizer"):
        row(f"time: {phase}", f"time.{phase}_ms", ms)
    row("time: a whole step", "time.step_ms", ms)
    row("tokens per second", "tokens_per_s", "{:,.0f}".format)
    row(f"{style} held out, before", "style_bpb_before", bpb, ratio=False)
    row(f"{style} held out, after", "style_bpb_after", bpb)
    rows.append((f"{base_name} held out, before", bpb(report["base"]["bpb"]), bpb(report["base"]["bpb"]), ""))
    row(f"{base_name} held out, after", "base_bpb_after", bpb)
    row("steps trained", "steps", str, ratio=False)
    row("training time to the best", "seconds_to_best", "{:.1f} s".format)
    return aligned(rows)


def findings(report, curves):
    """What the numbers say, in sentences: each claim made for LoRA, and the condition under which it holds; and where a
    training diverged. curves {method: the points of its training}."""
    full, lora = report["methods"]["full"], report["methods"]["lora"]
    fm, lm = full["memory"], lora["memory"]
    saved = fm["gradients"] + fm["optimizer"] - lm["gradients"] - lm["optimizer"]
    speed = full["time"]["step_ms"] / lora["time"]["step_ms"]
    gap = lora["style_bpb_after"] / full["style_bpb_after"] - 1
    return [
        f"Memory: the peak is {fm['peak'] / lm['peak']:.2f} times smaller with LoRA. It saves {size(saved)} of gradients and "
        f"optimizer state; the activations, {lm['activations'] / lm['peak']:.0%} of LoRA's peak here, both methods need. "
        "The larger the model against the batch, the more the saving counts.",
        f"Speed: a LoRA step takes {1 / speed:.2f} times as long as a full one. It skips the gradients of the frozen "
        "weights and pays for the thin products with A and B instead"
        + (", and here the first outweighs the second." if speed > 1 else
           "; at this size, one product after another, these cost more than is saved."),
        f"Disk: a style costs {size(lora['checkpoint_bytes'])}, not {size(full['checkpoint_bytes'])}: "
        f"{full['checkpoint_bytes'] / lora['checkpoint_bytes']:.0f} adapters fit into the space of one full copy.",
        f"Quality: LoRA's best is {abs(gap):.1%} {'above' if gap > 0 else 'below'} full fine-tuning's in bits per byte "
        "(lower is better).",
    ] + [f"Diverged: {name} ended at {curve[-1]['bpb']:.3f} bits per byte, worse than the {curve[0]['bpb']:.3f} where it "
         "began; the best weights on the way were kept. Its learning rate is too high, or its steps are too many."
         for name, curve in (("full fine-tuning", curves["full"]), ("LoRA", curves["lora"]))
         if not curve[-1]["bpb"] <= curve[0]["bpb"]]


def plot(report, curves, style, path):
    """Draw memory by kind, time by phase, and held-out loss against training time; curves {method: [record, …]}."""
    names = {"full": "full fine-tuning", "lora": "LoRA"}
    methods = {names[m]: report["methods"][m] for m in names}
    fig = Figure(figsize=(13, 4), layout="constrained")      # not pyplot's: it would want a screen, or take a notebook's
    axes = fig.subplots(1, 3)
    for ax, key, kinds, scale, unit in (
            (axes[0], "memory", ("weights", "gradients", "optimizer", "activations"), 1e6, "MB"),
            (axes[1], "time", ("forward_ms", "backward_ms", "optimizer_ms"), 1, "ms per step")):
        bottom = [0.0, 0.0]
        for kind, colour, hatch in zip(kinds, ("#0072B2", "#E69F00", "#009E73", "#CCCCCC"), ("", "//", "..", "")):
            values = [m[key][kind] / scale for m in methods.values()]
            ax.bar(list(methods), values, bottom=bottom, width=0.6, label=kind.removesuffix("_ms"), color=colour,
                   hatch=hatch, edgecolor="white")
            bottom = [b + v for b, v in zip(bottom, values)]
        ax.set(ylabel=f"{key} ({unit})", title=f"{key.capitalize()} of a training step", ylim=(0, 1.35 * max(bottom)))
        ax.legend(loc="upper center", ncols=2, fontsize="small", frameon=False)
    for (method, curve), colour, line in zip(curves.items(), ("#D55E00", "#0072B2"), ("--", "-")):
        axes[2].plot([point["seconds"] for point in curve], [point["bpb"] for point in curve], line, marker="o",
                     markersize=3, color=colour, label=names[method])
    axes[2].set(xlabel="training time (s)", ylabel="bits per byte", title=f"Held-out {style}")
    axes[2].legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=120, format="png")


def voices(sizes, bpb):
    """What many adapters over one base cost, and that each is best at its own text: sizes {"base": bytes, "voices": {name:
    bytes}}, bpb {model: {text: bits per byte}}, models and texts in the same order, the base first."""
    base, copies, every = sizes["base"], len(sizes["voices"]), sum(sizes["voices"].values())
    rows = [("to keep on disk", "bytes", "of the base"), ("the base", size(base), "")]
    rows += [(f"+ {name}", size(n), f"{n / base:.1%}") for name, n in sizes["voices"].items()]
    rows += [(f"the {copies} adapters", size(every), f"{every / base:.1%}"),
             (f"{copies} full copies instead", size(copies * base), f"{copies:.0%}")]
    texts = list(next(iter(bpb.values())))
    best = {text: min(bpb, key=lambda model: bpb[model][text]) for text in texts}
    own = dict(zip(texts, bpb))
    matrix = [("bits per byte of", *texts)] + [
        (model, *(f"{of[text]:.3f}{'*' if best[text] == model else ' '}" for text in texts)) for model, of in bpb.items()]
    lost = [text for text in texts if best[text] != own[text]]
    return "\n\n".join((aligned(rows), aligned(matrix), "* the best for this text. " + (
        f"Not by its own model: {', '.join(lost)}." if lost else "Each text is told best by the model that learnt from it.")))


def side_by_side(texts, width):
    """{title: text} as columns that together are `width` characters wide; one below the other where they would be narrow."""
    column = (width - 2 * (len(texts) - 1)) // len(texts)
    if column < 24:
        return "\n\n".join(f"--- {title}\n{text}" for title, text in texts.items())
    columns = [[*textwrap.wrap(title, column), "-" * column,
                *(line for part in text.splitlines() for line in textwrap.wrap(part, column) or [""])]
               for title, text in texts.items()]
    return "\n".join("  ".join(f"{cell:<{column}}" for cell in row).rstrip()
                     for row in itertools.zip_longest(*columns, fillvalue=""))
