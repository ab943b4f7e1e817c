"""
What `train.py compare` and `train.py voices` measure after the training, and how they
report it.

The training functions are handed in: nothing here imports train.
"""
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data import Batches
from lab import files
from lab.console import WIDTH, bullet, device_name, say, side_by_side
from lab.files import name_of, without_password
from lab.gpt2_files import model_dir, weight_files
from lab.measure import measure
from lab.models import as_list, continue_text, load_model
from lab.nf4 import LAYERS
from lab.parallel import from_first
from lab.plot import plot_comparison
from lab.predict import predict
from lab.progress import best_of
from lab.report import findings, headline_numbers, predicted_and_measured, table, voices_table
from lab.settings import UsageError, settings_of
from lora_minimal import apply_lora, load_lora

KEPT_FILES = {      # what a method leaves on disk for a style
    "full": (files.MODEL, files.MODEL_CONFIG),
    "lora": (files.ADAPTER, files.ADAPTER_CONFIG),
}

# The name of a LoRA step with the loss and the base of full fine-tuning.
LIKE_FOR_LIKE = "lora, like for like"

# Names that voices uses itself, beside the adapters.
TAKEN = {"", "base", "the base", files.TOKENS, files.DOWNLOADS, files.VOICES}


# ---- compare -----------------------------------------------------------------------

def measure_costs(steps, corpus):
    """Measure a training step of each of `steps` {name: train.Step}, and predict it.

    Returns {name: costs} as in comparison.json, and {name: lab.predict.predict(...)}.
    """
    settings, device = steps["lora"].settings, steps["lora"].device
    batches = Batches(corpus.train, settings.batch_size, settings.block_size, seed=0)
    x, y = (tensor.to(device) for tensor in batches[0])
    predicted = {name: predict(step, x) for name, step in steps.items()}
    return measure(steps, x, y), predicted


def measure_runs(records, base, device, corpus, make_step):
    """measure_costs() for a step of each run {method: record}, with the weights of the base.

    If the runs differ in their loss or base, there is a third step, LIKE_FOR_LIKE: that
    of LoRA, but with the loss and base of full fine-tuning. make_step is train.Step.
    """
    settings = {method: settings_of(record) for method, record in records.items()}
    loras = {method: record["asked"]["lora"] for method, record in records.items()}
    comparable = like_for_like(settings["full"], settings["lora"])
    if comparable != settings["lora"]:
        settings[LIKE_FOR_LIKE] = comparable
        loras[LIKE_FOR_LIKE] = loras["lora"]
    steps = {}
    for name, own in settings.items():
        model, _, _ = load_model(base, device, own.dropout, own.base_dtype, own.dtype)
        if loras[name] is not None:
            apply_lora(model, **loras[name], layers=LAYERS)
        steps[name] = make_step(model.train(), own)
    return measure_costs(steps, corpus)


def like_for_like(full, lora):
    """The Settings of LoRA with the loss and the dtypes of those of full fine-tuning."""
    return replace(
        lora, loss_chunk=full.loss_chunk, base_dtype=full.base_dtype, dtype=full.dtype
    )


def advantages(full, lora):
    """How many times better the costs of LoRA are: {"speed", "memory"}; above 1, LoRA's are."""
    return {
        "speed": full["time"]["step_ms"] / lora["time"]["step_ms"],
        "memory": full["memory"]["peak"] / lora["memory"]["peak"],
    }


def load_tuned(base, out, device):
    """The models that compare has written below `out`, as {method: model}.

    They are read from disk, so that what is judged is what the user has.
    """
    full, _, _ = load_model(Path(out, "full"), device)
    lora, _, _ = load_model(base, device)
    load_lora(lora, Path(out, "lora"))
    return {"full": full, "lora": lora}


def quality(base_model, tuned, records, out, bpb):
    """How good each of the models `tuned` {method: model} is, and what it takes on
    disk.

    bpb(model, text) returns the bits per byte of a model for the "style" or the
    "base" text.
    """
    before = bpb(base_model, "style")
    results = {}
    for method, model in tuned.items():
        record = records[method]
        results[method] = {
            "checkpoint_bytes": bytes_on_disk(Path(out, method), KEPT_FILES[method]),
            "style_bpb_before": before,
            "style_bpb_after": bpb(model, "style"),
            "base_bpb_after": bpb(model, "base"),
            "seconds_to_best": best_of(record["curve"])["seconds"],
            "steps": record["asked"]["settings"]["steps"],
        }
    return results


def bytes_on_disk(dir, names):
    return sum(Path(dir, name).stat().st_size for name in names)


def comparison_report(config, base_bpb, records, costs, qualities, peak, device):
    """The content of comparison.json.

    config is that of the base, peak what lab.measure.process_peak() returned before the
    costs were measured.
    """
    settings = {method: record["asked"]["settings"] for method, record in records.items()}
    lora = records["lora"]["asked"]["lora"]
    comparable = costs.get(LIKE_FOR_LIKE, costs["lora"])
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "config": {**asdict(config), **lora, "settings": settings},
        "base": {"bpb": base_bpb},
        "process_peak": peak,
        "like_for_like": {
            **advantages(costs["full"], comparable),
            "loss_chunk": settings["full"]["loss_chunk"],
            "base_dtype": settings["full"]["base_dtype"],
            "lora": comparable,
        },
        "defaults": advantages(costs["full"], costs["lora"]),
        "methods": {method: {**costs[method], **qualities[method]} for method in qualities},
    }


def write_comparison(report, records, style, out):
    """Write the comparison as JSON and as a picture."""
    from_first(files.write_json, Path(out, files.COMPARISON), report)
    picture = Path(out, files.COMPARISON_PICTURE)
    from_first(plot_comparison, report, curves_of(records), style, picture)


def print_comparison(report, predicted, records, style, base_name):
    """Print the comparison as tables and sentences."""
    say(headline_numbers(report) + "\n")
    say(table(report, style, base_name) + "\n")
    say(predicted_and_measured(report, predicted) + "\n")
    for sentence in findings(report, curves_of(records)):
        bullet(sentence)


def curves_of(records):
    """{method: the points of its training}."""
    return {method: record["curve"] for method, record in records.items()}


def sample_each(models, encoding, prompt):
    """How each of `models` {title: model} continues the prompt, twice: [{title: text}, ...]."""
    rounds = []
    for seed in (0, 1):
        texts = {}
        for title, model in models.items():
            [texts[title]] = continue_text(model, encoding, prompt, 100, seed=seed)
        rounds.append(texts)
    return rounds


def print_samples(rounds):
    """Print what sample_each() returned, side by side."""
    for texts in rounds:
        say(side_by_side(texts, WIDTH) + "\n")


# ---- voices ------------------------------------------------------------------------

def name_voices(data):
    """{name: text} for several texts. Raises UsageError if two have the same name."""
    data = as_list(data)
    sources = {name_of(source): source for source in data}
    if len(sources) < len(data) or not data:
        shown = " ".join(map(without_password, data))
        raise UsageError(
            f"--data {shown}: adapters are named after the files, which must have "
            "different names; rename one"
        )
    for name in sources.keys() & TAKEN:
        raise UsageError(f"a text cannot be called {name!r} here; rename its file")
    return sources


def score_voices(adapters, names, corpora, bpb):
    """Evaluate every text with the base and with every adapter: {model: {text: bits per byte}}.

    corpora {name: Corpus}; bpb(corpus) returns the bits per byte with the adapter in use.
    """
    models = {"the base": None} | {name: name for name in names}
    scores = {}
    for title, name in models.items():
        adapters.use(name)
        scores[title] = {text: bpb(corpus) for text, corpus in corpora.items()}
    return scores


def voices_report(base, dirs, scores):
    """The content of voices.json. dirs {voice: directory of its adapter}."""
    base_bytes = sum(path.stat().st_size for path in weight_files(model_dir(base)))
    voices = {voice: bytes_on_disk(dir, KEPT_FILES["lora"]) for voice, dir in dirs.items()}
    return {"bytes": {"base": base_bytes, "voices": voices}, "bpb": scores}


def write_voices(report, out):
    """Write the report of voices as JSON."""
    from_first(files.write_json, Path(out, files.VOICES), report)


def print_voices(report):
    """Print the report of voices as tables."""
    say(voices_table(report["bytes"], report["bpb"]) + "\n")
