"""
What is found, in tables and sentences: full fine-tuning beside LoRA, several voices.

A report is the content of comparison.json or voices.json.
"""
from lab.console import aligned, say, size
from lab.nf4 import parameter_count

METHODS = {"full": "full fine-tuning", "lora": "LoRA"}


# ---- full fine-tuning and LoRA -----------------------------------------------------

def table(report, style, base_name):
    """What was measured of both methods, and their ratio."""
    full, lora = (report["methods"][method] for method in METHODS)
    rows = [("", "full", "LoRA", "full ÷ LoRA")]

    def row(label, path, show, ratio=True):
        """A row of the value at `path`, "memory.peak" for example, in both methods."""
        a, b = value_at(full, path), value_at(lora, path)
        rows.append((label, show(a), show(b), f"{a / b:.2f}" if ratio and b else ""))

    row("parameters trained", "trainable_params", "{:,}".format)
    row("parameters in total", "total_params", "{:,}".format)
    row("disk space per style", "checkpoint_bytes", size)
    for kind in ("weights", "gradients", "optimizer", "activations"):
        row(f"memory: {kind}", f"memory.{kind}", size)
    row("memory: peak of a step", "memory.peak", size)
    for phase in ("forward", "backward", "optimizer"):
        row(f"time: {phase}", f"time.{phase}_ms", as_ms)
    row("time: a whole step", "time.step_ms", as_ms)
    row("tokens per second", "tokens_per_s", "{:,.0f}".format)
    row(f"{style} held out, before", "style_bpb_before", as_bpb, ratio=False)
    row(f"{style} held out, after", "style_bpb_after", as_bpb)
    before = as_bpb(report["base"]["bpb"])
    rows.append((f"{base_name} held out, before", before, before, ""))
    row(f"{base_name} held out, after", "base_bpb_after", as_bpb)
    row("steps trained", "steps", str, ratio=False)
    row("training time to the best", "seconds_to_best", "{:.1f} s".format)
    return aligned(rows)


def value_at(nested, path):
    """value_at({"a": {"b": 1}}, "a.b") -> 1"""
    for key in path.split("."):
        nested = nested[key]
    return nested


def as_ms(milliseconds):
    return f"{milliseconds:.1f} ms"


def as_bpb(bits_per_byte):
    return f"{bits_per_byte:.3f} bpb"


def as_gflop(operations):
    return f"{operations / 1e9:,.1f} GFLOP"


def ledgers(report, predicted):
    """What a step should cost beside what it was measured to cost.

    predicted {method: lab.predict.predict(...)}.
    """
    measured = report["methods"]
    rows = [("one step", "full: predicted", "measured", "LoRA: predicted", "measured")]
    for kind in ("weights", "gradients", "optimizer", "activations"):
        cells = [f"memory: {kind}"]
        for method in METHODS:
            memory, _ = predicted[method]
            cells += [size(memory[kind]), size(measured[method]["memory"][kind])]
        rows.append(cells)
    operations = {method: predicted[method][1] for method in METHODS}
    for part in operations["full"]:
        if any(operations[method][part] for method in METHODS):
            rows.append(operation_row(part, operations, measured))
    rows.append(backward_row(operations, measured))
    return f"{aligned(rows)}\n\n{speed_sentence(operations, report)}"


def operation_row(part, operations, measured):
    """A row of the operations of one part. Only the forward pass is also measured."""
    cells = [part]
    for method in METHODS:
        forward = as_ms(measured[method]["time"]["forward_ms"])
        cells += [as_gflop(operations[method][part]), forward if part == "forward" else ""]
    return cells


def backward_row(operations, measured):
    """A row of everything but the forward pass."""
    cells = ["backward, all of it"]
    for method in METHODS:
        backward = sum(operations[method].values()) - operations[method]["forward"]
        cells += [as_gflop(backward), as_ms(measured[method]["time"]["backward_ms"])]
    return cells


def speed_sentence(operations, report):
    expected = sum(operations["full"].values()) / sum(operations["lora"].values())
    return (
        f"By the count of operations a LoRA step should be {expected:.2f} times as "
        f"fast as a full step; measured: {speedup(report):.2f} times."
    )


def speedup(report):
    """How many times faster a LoRA step is than a full one."""
    full, lora = (report["methods"][method]["time"]["step_ms"] for method in METHODS)
    return full / lora


def findings(report, curves):
    """What the numbers say, in sentences: each claim made for LoRA, and its condition.

    curves {method: the points of its training}.
    """
    sentences = [
        memory_finding(report), speed_finding(report), disk_finding(report),
        quality_finding(report),
    ]
    for method, name in METHODS.items():
        first, last = curves[method][0]["bpb"], curves[method][-1]["bpb"]
        if not last <= first:               # also if it is NaN
            sentences.append(
                f"Diverged: {name} ended at {last:.3f} bits per byte, worse than the "
                f"{first:.3f} where it began; the best weights on the way were kept. "
                "Its learning rate is too high, or it takes too many steps."
            )
    return sentences


def memory_finding(report):
    full, lora = (report["methods"][method]["memory"] for method in METHODS)
    saved = full["gradients"] + full["optimizer"] - lora["gradients"] - lora["optimizer"]
    return (
        f"Memory: a full step peaks at {full['peak'] / lora['peak']:.2f} times the "
        f"memory of a LoRA step. LoRA saves {size(max(saved, 0))} of gradients and "
        "optimizer state. Both methods need the activations, which are "
        f"{lora['activations'] / lora['peak']:.0%} of LoRA's peak here. The larger "
        "the model is compared with the batch, the more the saving counts."
    )


def speed_finding(report):
    speed = speedup(report)
    outcome = "here it saves more than it pays"
    if speed <= 1:
        outcome = "at this size it pays more than it saves"
    return (
        f"Speed: a LoRA step is {speed:.2f} times as fast as a full step. It does "
        "not compute the gradients of the frozen weights, and computes thin products "
        f"with A and B instead; {outcome}."
    )


def disk_finding(report):
    full, lora = (report["methods"][method]["checkpoint_bytes"] for method in METHODS)
    return (
        f"Disk: a style takes {size(lora)} instead of {size(full)}. The space of one "
        f"full copy holds this many adapters: {full / lora:.0f}."
    )


def quality_finding(report):
    full, lora = (report["methods"][method]["style_bpb_after"] for method in METHODS)
    gap = lora / full - 1
    return (
        f"Quality: the best of LoRA is {abs(gap):.1%} "
        f"{'above' if gap > 0 else 'below'} the best of full fine-tuning, in bits "
        "per byte (lower is better)."
    )


# ---- voices ------------------------------------------------------------------------

def voices_table(sizes, bpb):
    """What several adapters for one base cost, and how well each predicts each text.

    sizes {"base": bytes, "voices": {name: bytes}}; bpb {model: {text: bits per
    byte}}, where the text of the base is the first, and the others have the names of
    their adapters.
    """
    legend = f"* the best for this text. {verdict(bpb)}"
    return "\n\n".join([disk_table(sizes), score_table(bpb), legend])


def disk_table(sizes):
    """What the base, the adapters and full copies take on disk."""
    base, voices = sizes["base"], sizes["voices"]
    together, copies = sum(voices.values()), len(voices)
    rows = [("disk space", "bytes", "of the base"), ("the base", size(base), "")]
    for name, n in voices.items():
        rows.append((f"+ {name}", size(n), f"{n / base:.1%}"))
    rows.append((f"the {copies} adapters", size(together), f"{together / base:.1%}"))
    rows.append((f"{copies} full copies instead", size(copies * base), f"{copies:.0%}"))
    return aligned(rows)


def score_table(bpb):
    """The bits per byte of every text with every model, the best of a column starred."""
    texts = list(next(iter(bpb.values())))
    rows = [("bits per byte of", *texts)]
    for model, scores in bpb.items():
        cells = [model]
        for text in texts:
            star = "*" if best_model(bpb, text) == model else " "
            cells.append(f"{scores[text]:.3f}{star}")
        rows.append(cells)
    return aligned(rows)


def best_model(bpb, text):
    """The model with the fewest bits per byte for a text."""
    return min(bpb, key=lambda model: bpb[model][text])


def verdict(bpb):
    """Whether every text is best predicted by its own model: an adapter, or the base."""
    base = next(iter(bpb))
    not_own = []
    for text in bpb[base]:
        own_model = text if text in bpb else base
        if best_model(bpb, text) != own_model:
            not_own.append(text)
    if not_own:
        return f"Not predicted best by their own adapter: {', '.join(not_own)}."
    return "Every text is best predicted by the adapter trained on it."


# ---- training ----------------------------------------------------------------------

def describe(point):
    """A point of a curve as a line of text."""
    return f"     step {point['step']:>4} {point['seconds']:>6.1f} s  {point['bpb']:.3f} bpb"


def say_point(point):
    say(describe(point))


def say_text(text, corpus, encoding):
    bytes_per_token = text.heldout_bytes / len(corpus.heldout)
    say(f"     {len(text.train):,} training stories, {len(text.heldout):,} held out; a vocabulary "
        f"of {encoding.n_vocab:,} tokens ({bytes_per_token:.2f} bytes per token)")


def say_model(model, settings):
    config = model.config
    n = sum(p.numel() for p in model.parameters())
    say(f"     {n:,} parameters: {config.n_layer} layers of width {config.n_embd}; "
        f"{describe_steps(settings)}. A sample after each evaluation:")


def say_trained(model, settings):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = parameter_count(model)
    say(f"     {trained:,} of {total:,} parameters train; {describe_steps(settings)}, learning "
        f"rate {settings.lr:.2g}")


def describe_steps(settings):
    return f"{settings.steps} steps of {settings.batch_size} × {settings.block_size} tokens"
