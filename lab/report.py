"""
What is found, in tables and sentences: full fine-tuning beside LoRA, several voices.

A report is the content of comparison.json or voices.json.
"""
from functools import partial

from lab.console import aligned, bulleted, say, size, wrapped
from lab.nf4 import parameter_count

METHODS = {"full": "full fine-tuning", "lora": "LoRA"}


# ---- full fine-tuning and LoRA -----------------------------------------------------

def headline_numbers(report):
    """LoRA's advantage in one number for speed and one for memory: like for like, by default."""
    rows = [("LoRA's advantage", "speed", "memory")]
    for label, key in (("like for like", "like_for_like"), ("each by default", "defaults")):
        ratios = report[key]
        rows.append((label, as_times(ratios["speed"]), as_times(ratios["memory"])))
    return f"{aligned(rows)}\n\n{wrapped(what_is_alike(report))}"


def as_times(ratio):
    return f"{ratio:.2f} x"


def what_is_alike(report):
    """How the two headline numbers differ, in a sentence or two."""
    alike = report["like_for_like"]
    text = (
        "Speed is the time of a full step ÷ that of a LoRA step; memory is the peak of a "
        "full step ÷ that of a LoRA step. Like for like means that both methods have "
        f"{loss_and_base(alike)}. "
    )
    default = report["config"]["settings"]["lora"]
    if loss_and_base(default) == loss_and_base(alike):
        return text + "That is also the default of both here."
    return text + (
        f"By default LoRA has {loss_and_base(default)}, and this default is what the tables "
        "below show."
    )


def loss_and_base(settings):
    """The loss and the base of settings, a dict, in words."""
    loss = "the plain loss"
    if settings["loss_chunk"]:
        loss = f"the loss in chunks of {settings['loss_chunk']:,} logits"
    return f"{loss}, and the base in {settings['base_dtype']}"


def table(report, style, base_name):
    """What was measured of both methods, and how many times better LoRA is."""
    full, lora = (report["methods"][method] for method in METHODS)
    rows = [("", "full", "LoRA", "LoRA's advantage")]

    def row(label, path, show, better="less"):
        """A row of the value at `path`, "memory.peak" for example, in both methods.

        better is "less", "more", or None for a row without a ratio.
        """
        a, b = value_at(full, path), value_at(lora, path)
        rows.append((label, show(a), show(b), advantage(a, b, better)))

    row("parameters trained", "trainable_params", "{:,}".format)
    row("parameters in total", "total_params", "{:,}".format)
    row("size on disk", "checkpoint_bytes", size)
    for kind in ("weights", "gradients", "optimizer", "activations"):
        row(f"memory: {kind}", f"memory.{kind}", size)
    row("memory: peak of a step", "memory.peak", size)
    rows += process_rows(report)
    for phase in ("forward", "backward", "optimizer"):
        row(f"time: {phase}", f"time.{phase}_ms", as_ms)
    if not all_add_up(report["methods"]):
        rows.append((DIFFERENCE, *differences(report["methods"]), ""))
    row("time: a whole step", "time.step_ms", as_ms)
    row("tokens per second", "tokens_per_s", "{:,.0f}".format, better="more")
    row(f"{style} held out, before", "style_bpb_before", as_bpb, better=None)
    row(f"{style} held out, after", "style_bpb_after", as_bpb)
    before = as_bpb(report["base"]["bpb"])
    rows.append((f"{base_name} held out, before", before, before, ""))
    row(f"{base_name} held out, after", "base_bpb_after", as_bpb)
    row("steps trained", "steps", str, better=None)
    row("training time to the best", "seconds_to_best", "{:.1f} s".format)
    return "\n".join([aligned(rows), "", *map(bulleted, notes_on_table(report))])


def advantage(full, lora, better):
    """How many times better LoRA's value is; above 1, LoRA is better."""
    if better == "more":
        full, lora = lora, full
    if better is None or not lora:
        return ""
    return f"{full / lora:.2f}"


def process_rows(report):
    """The peak of the whole process, which trained both methods."""
    names = {"resident": "memory: whole command", "cuda": "memory: whole command, GPU"}
    peak = report.get("process_peak", {})
    return [(names[kind], size(n), size(n), "") for kind, n in peak.items()]


# ---- whether the phases add up -----------------------------------------------------

DIFFERENCE = "time: step - phases"
TOLERANCE = 0.05


def difference(times):
    """The time of a step minus the sum of its phases, in milliseconds."""
    return times["step_ms"] - sum_of_phases(times)


def sum_of_phases(times):
    return times["forward_ms"] + times["backward_ms"] + times["optimizer_ms"]


def adds_up(times):
    """Whether the phases are a step, to 5%."""
    return abs(difference(times)) <= TOLERANCE * times["step_ms"]


def all_add_up(methods):
    return all(adds_up(methods[method]["time"]) for method in METHODS)


def differences(methods):
    """The cells of a row with the time of a step minus the sum of its phases."""
    return [as_ms(difference(methods[method]["time"])) for method in METHODS]


def notes_on_table(report):
    """How to read the table, in sentences."""
    full, lora = (report["methods"][method]["time"] for method in METHODS)
    notes = ["LoRA's advantage is how many times less LoRA takes, or how many times more "
             "tokens it trains on in a second. Above 1, LoRA is better."]
    if "process_peak" in report:
        notes.append(
            "The whole command is one process for both methods: Python and its libraries, "
            "loading, training (unless it was finished before), evaluation and sampling."
        )
    if full["ahead_ms"] or lora["ahead_ms"]:
        notes.append(
            "The loss in chunks makes a part of the gradients in the forward pass. That time, "
            f"{as_ms(full['ahead_ms'])} in full fine-tuning and {as_ms(lora['ahead_ms'])} in "
            "LoRA, counts as backward."
        )
    if not all_add_up(report["methods"]):
        notes.append(f"\"{DIFFERENCE}\" is the time of a step minus the sum of its phases. "
                     f"{why_different(full)}")
    return notes


def why_different(times):
    """Why the phases do not add up to the step."""
    if times["captured"]:
        return ("The step is replayed as one CUDA graph and each phase as a graph of its own, "
                "which the CPU launches and waits for one by one.")
    return ("The clock stops between the phases until the GPU has finished; in a whole step "
            "the CPU meanwhile launches the kernels of the next phase.")


# ---- what a step should cost -------------------------------------------------------

def value_at(nested, path):
    """value_at({"a": {"b": 1}}, "a.b") -> 1"""
    for key in path.split("."):
        nested = nested[key]
    return nested


def as_ms(milliseconds):
    return f"{milliseconds:.1f} ms"


def as_bpb(bits_per_byte):
    return f"{bits_per_byte:.3f} bpb"


def as_flop(operations):
    """Operations in readable units: as_flop(18_253_611_008) -> '18.3 GFLOP'."""
    n = operations / 1e6
    unit = "MFLOP"
    for larger in ("GFLOP", "TFLOP"):
        if n < 999.5:
            break
        n /= 1000
        unit = larger
    return f"{n:.3g} {unit}"


def predicted_and_measured(report, predicted):
    """What a step should cost beside what it was measured to cost.

    predicted {method: lab.predict.predict(...)}.
    """
    measured = {method: report["methods"][method] for method in METHODS}
    rows = [("one step", "full: predicted", "measured", "LoRA: predicted", "measured")]
    for kind in ("weights", "gradients", "optimizer", "activations"):
        cells = [f"memory: {kind}"]
        for method in METHODS:
            in_step = measured[method]["memory"][kind]
            cells += [size(predicted[method]["memory"][kind]), size(in_step)]
        rows.append(cells)
    rows += time_rows(predicted, measured)
    return f"{aligned(rows)}\n\n{wrapped(speed_sentence(report, predicted))}"


# What the parts of lab.predict.predict_operations() are called, below their phase.
PARTS = {
    "forward, thin products": "thin products with A and B",
    "backward, inputs": "gradients of the inputs",
    "backward, weights": "gradients of the weights",
    "backward, thin products": "thin products with A and B",
    "backward, forward again": "the forward pass again",
}


def time_rows(predicted, measured):
    """The rows of the phases, in operations and milliseconds, and of their parts."""
    rows = []

    def row(label, operations, phase=None):
        """A row of operations(prediction) and, if the phase is measured, its time."""
        cells = [label]
        for method in METHODS:
            count, time = operations(predicted[method]), measured[method]["time"]
            cells.append("" if count is None else as_flop(count))
            cells.append("" if phase is None else as_ms(time[f"{phase}_ms"]))
        rows.append(cells)

    for phase in ("forward", "backward"):
        row(f"time: {phase}", partial(operations_of, phase), phase)
        for part, name in PARTS.items():
            counts = [predicted[method]["operations"][part] for method in METHODS]
            if part.startswith(phase) and any(counts):
                row(f"  {name}", partial(operations_of, part))
    if any(predicted[method]["ahead"] for method in METHODS):
        row("  computed ahead, with the loss", operations_ahead, "ahead")
    row("time: optimizer", not_counted, "optimizer")
    if not all_add_up(measured):
        of_full, of_lora = differences(measured)
        rows.append([DIFFERENCE, "", of_full, "", of_lora])
    row("time: a whole step", partial(operations_of, ""), "step")
    return rows


def operations_of(phase, prediction):
    """The operations of the parts whose names begin with `phase`."""
    operations = prediction["operations"]
    return sum(count for part, count in operations.items() if part.startswith(phase))


def operations_ahead(prediction):
    return prediction["ahead"]


def not_counted(prediction):
    """None: the optimizer does a few operations for each parameter, which are not counted."""
    return None


def speed_sentence(report, predicted):
    full, lora = (operations_of("", predicted[method]) for method in METHODS)
    return (
        f"By the count of operations a LoRA step should be {full / lora:.2f} times as "
        f"fast as a full step; measured, like for like: "
        f"{report['like_for_like']['speed']:.2f} times."
    )


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
        "Memory: like for like, a full step peaks at "
        f"{report['like_for_like']['memory']:.2f} times the memory of a LoRA step"
        f"{by_default(report, 'memory')}. LoRA saves {size(max(saved, 0))} of gradients and "
        "optimizer state. Both methods need the activations, which are "
        f"{lora['activations'] / lora['peak']:.0%} of LoRA's peak here. The "
        "saving matters more for larger models and smaller batches."
    )


def speed_finding(report):
    speed = report["like_for_like"]["speed"]
    outcome = "here that is a net gain"
    if speed <= 1:
        outcome = "at this size that is a net loss"
    return (
        f"Speed: like for like, a LoRA step is {speed:.2f} times as fast as a full step"
        f"{by_default(report, 'speed')}. It does "
        "not compute the gradients of the frozen weights, and computes thin products "
        f"with A and B instead; {outcome}."
    )


def by_default(report, key):
    """The advantage of the defaults in brackets, if it is another one."""
    default = report["defaults"][key]
    if default == report["like_for_like"][key]:
        return ""
    return f" ({default:.2f} times with the defaults of each)"


def disk_finding(report):
    full, lora = (report["methods"][method]["checkpoint_bytes"] for method in METHODS)
    return (
        f"Disk: the adapter takes {size(lora)}, the fully tuned model {size(full)}: "
        f"{full / lora:.0f} times as much."
    )


def quality_finding(report):
    full, lora = (report["methods"][method]["style_bpb_after"] for method in METHODS)
    gap = lora / full - 1
    higher_or_lower = "higher" if gap > 0 else "lower"
    return (
        f"Quality: LoRA's best loss is {abs(gap):.1%} {higher_or_lower} than that of full "
        "fine-tuning, in bits per byte of held-out text (lower is better)."
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
        return f"Not predicted best by their own model: {', '.join(not_own)}."
    return "Every text is predicted best by the model trained on it."


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
