"""
Train a small GPT, then tune it to a style: fully, and with LoRA. The commands:

    python train.py                  pretrain a base, tune it both ways, compare them
    python train.py pretrain --data my_books.txt --out out/base
    python train.py tune --base out/base --data pirate --out out/mine       LoRA, or --method full
    python train.py compare --base out/base --data bard --out out/compare
                                     tune both ways; compare quality, memory and time
    python train.py voices           pretrain a base, tune three adapters for it
    python train.py sample --base out/base --adapter out/mine --prompt "The old lighthouse"
    python train.py merge --base out/base --adapter out/mine --out out/merged
                                     write base and adapter as one model

`python train.py COMMAND --help` lists the flags. Each command is also a function:
from Python, call pretrain("tales", "out/base", steps=300). (sample and merge are in
lab/models.py.) Pretraining, full fine-tuning and LoRA are the same loop, train();
they differ in which parameters train. Reduced to its core, the loop is

    for n in range(steps):
        x, y = batches[n]
        logits, loss = model(x, y)                                  # forward
        loss.backward()                                             # backward
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)     # update
        optimizer.step()
        optimizer.zero_grad()

Step, below, does the last five lines. It can also split the batch into parts, run in
several processes, and be captured in a CUDA graph.

The held-out text is measured in bits per byte (bpb): how many bits the model needs,
on average, to encode one byte of text that it was not trained on. Lower is better,
and models with different tokenizers can be compared. The held-out text also selects
the best weights, so it is a validation set.
"""
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from data import HELDOUT, Batches, read_text, tokenize
from data.bpe import train_bpe
from gpt import GPT, PRESETS, GPTConfig, plain_loss
from lab import cli, comparison, console, files, models, parallel, report
from lab.capture import captured
from lab.chunked_loss import chunked_loss
from lab.console import headline, say
from lab.gpt2_files import fingerprint
from lab.loss_scale import LossScale
from lab.measure import process_peak
from lab.models import PROMPT
from lab.optimizers import make_optimizers, scale_learning_rates, step_unless
from lab.parallel import from_first, together
from lab.progress import Progress
from lab.runs import MAY, NEVER, open_run, refuse_foreign_model
from lab.settings import UsageError, fit_to_base, pick_device, recipe, settings_for, settings_of
from lora_minimal import lora_parameters

TARGETS = ("c_attn", "c_proj", "c_fc")      # all linear layers of a block


# ---- training ----------------------------------------------------------------------

def train(model, corpus, settings, dir, resume=False, watch=None, save_every=0):
    """Train every parameter with requires_grad, and keep the best weights.

    Checkpoints go to `dir` every save_every steps (0: never), and `resume` continues
    from one. Returns the curve: a point for each evaluation, {"step", "seconds", "loss",
    "bpb", "skipped"}, where seconds are those of training so far, the loss is in nats
    per token, and skipped counts the steps skipped so far. `watch(point)` is called for
    each. Raises lab.progress.Stopped after Ctrl-C, and ArithmeticError if the gradients
    of several steps in a row are not finite.
    """
    step = Step(model, settings)
    take_step = captured(step)              # as a CUDA graph if possible, else step itself
    batches = Batches(corpus.train, settings.batch_size, settings.block_size, settings.seed)
    measure_bpb = partial(evaluate_as_trained, model, corpus, settings)
    model.train()
    with Progress(step, corpus.name, dir, measure_bpb, watch, save_every) as progress:
        if resume:
            progress.resume()
        for n in range(progress.start, settings.steps):
            progress.before_step(n)         # evaluate, save or stop, if it is time
            # Dropout differs in every step and process.
            torch.manual_seed(parallel.seed_of_step(settings.seed, n))
            x, y = parallel.share_of(batches[n])        # the rows of this process: usually all
            step.set_learning_rate(n)
            loss = take_step(x.to(step.device), y.to(step.device))
            progress.after_step(n, loss)
        progress.finish()                   # evaluate, and restore the best weights
    model.eval()
    return progress.curve


class Step:
    """One training step: step(x, y) runs forward, backward and update, and returns the loss.

    Each of the three is a method of its own, so that it can be measured. The
    parameters that require a gradient train; all others stay as they are.
    """

    def __init__(self, model, settings):
        self.model = model
        self.settings = settings
        self.device = next(model.parameters()).device
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        callable_model = prepare(model, settings)
        # On one device averaging.call just calls the model, and its other methods do
        # nothing. With several, it averages their gradients (lab/parallel.py).
        trained = list(self.trained.values())
        self.averaging = parallel.Averaging(callable_model, trained, settings.fsdp)
        self.can_be_captured = can_be_captured(settings, self.device)
        self.optimizers = make_optimizers(self.trained, settings, self.can_be_captured)
        self.loss_scale = LossScale(settings.dtype == "float16", self.device)
        # Counted on the device, so that no step waits for the number: see update().
        self.skipped = torch.zeros((), device=self.device)
        self.skipped_in_a_row = torch.zeros((), device=self.device)

    def __call__(self, x, y):
        """x, y (B, T) int64 -> the mean loss () in nats per token. Changes the weights."""
        total = 0.0
        micro_batches = self.micro_batches(x, y)
        for i, (part_x, part_y) in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with self.averaging.micro_batch(is_last):   # processes exchange gradients once
                loss = self.forward(part_x, part_y) / len(micro_batches)
                self.backward(loss)
            total = total + loss.detach()
        self.update()
        return total

    def micro_batches(self, x, y):
        """The parts [(x, y), ...] in which a batch is computed, one after the other."""
        parts = self.settings.accumulate
        return list(zip(x.chunk(parts), y.chunk(parts)))

    def forward(self, x, y):
        """The mean loss of a micro-batch."""
        with autocast(self.model, self.settings.dtype):
            _, loss = self.averaging.call(x, y)
        return loss

    def backward(self, loss):
        """Add the gradients of the loss to those of the trained parameters."""
        self.loss_scale.scaled(loss).backward()

    def update(self):
        """Clip the gradients and move the weights.

        If a gradient is infinite or NaN, the weights stay as they are, and the step
        is counted in `skipped`.
        """
        self.averaging.finish()
        self.loss_scale.unscale(self.trained.values())
        limit = self.settings.grad_clip or math.inf             # 0: no clipping
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), limit)
        bad = ~norm.isfinite()      # a tensor: an `if` would make the CPU wait for the GPU
        self.skipped += bad
        # In float16 a bad step counts only if the scale of the loss cannot be lowered.
        counts = bad & self.loss_scale.is_at_its_smallest()
        self.skipped_in_a_row += counts
        self.skipped_in_a_row *= bad            # back to 0 after a good step
        self.loss_scale.update(bad)
        for optimizer in self.optimizers:
            step_unless(bad, optimizer)
            optimizer.zero_grad()

    def set_learning_rate(self, n):
        """Linear warmup to the peak, then linear decay towards zero, for step n."""
        done = (n + 1) / (self.settings.steps + 1)      # the share of the training, 0 to 1
        warmup = self.settings.warmup                   # also a share
        if done < warmup:
            factor = done / warmup
        else:
            factor = (1 - done) / (1 - warmup)
        scale_learning_rates(self.optimizers, factor)


def prepare(model, settings):
    """Choose the loss of a model, and whether its blocks are recomputed.

    Returns the model to call: the compiled one with settings.compile.
    """
    model.recompute = settings.recompute
    model.loss = plain_loss
    if settings.loss_chunk:
        model.loss = partial(chunked_loss, chunk=settings.loss_chunk, compile=settings.compile)
    return torch.compile(model) if settings.compile else model


def can_be_captured(settings, device):
    """Whether a step can be a CUDA graph: see lab/capture.py."""
    if device.type != "cuda" or not settings.graph:
        return False
    # A graph replays the work of the GPU alone. With several processes there is also a
    # Python function in each step, which counts the bytes that are sent.
    return parallel.world() == 1


def autocast(model, dtype):
    """A context in which a float32 model computes matrix products in `dtype`.

    dtype is "float32", "bfloat16" or "float16". A model stored in 16 bits needs no
    autocast.
    """
    weight = next(model.parameters())
    dtype = getattr(torch, dtype)
    if dtype == torch.float32 or weight.dtype != torch.float32:
        return torch.autocast(weight.device.type, enabled=False)
    return torch.autocast(weight.device.type, dtype)


@torch.no_grad()
def evaluate(model, corpus, block_size, dtype="float32", at_once=None):
    """Bits per byte of the held-out text of a corpus, read in windows of block_size tokens.

    at_once windows are read in a batch; by default 4,096 tokens. The <|endoftext|>
    after a story costs bits but is not counted as a byte.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = 0.0
    at_once = at_once or max(1, 4096 // block_size)
    for x, y in corpus.heldout_windows(block_size, at_once):
        with autocast(model, dtype):
            _, loss = model(x.to(device), y.to(device))
        nats += loss.item() * y.numel()
    model.train(was_training)
    return nats / math.log(2) / corpus.heldout_bytes


def evaluate_as_trained(model, corpus, settings):
    """evaluate() with no more windows at once than in a micro-batch of the training.

    The loss is chunked if training's is, so evaluation needs no more memory than a step.
    """
    rows = settings.batch_size // settings.accumulate // parallel.world()
    at_once = max(1, min(rows, 4096 // settings.block_size))
    return evaluate(model, corpus, settings.block_size, settings.dtype, at_once)


# ---- the commands ------------------------------------------------------------------
# Under torchrun every process runs these functions. together() lets all processes
# fail if one does, check_equal() makes sure that they read the same, and from_first()
# lets the first one write. A single process just calls the function.

def pretrain(data, out, preset=None, prompt=PROMPT, device=None, resume=NEVER, fresh=False,
             save_every=200, cache_dir=None, **chosen):
    """Train a tokenizer and a GPT from scratch on a text, and save them in `out`.

    data        a built-in text (tales, pirate, bard, noir), a UTF-8 file or a URL
    preset      the shape, a key of gpt.PRESETS; by default what suits the device
    resume      an interrupted run in `out`: lab.runs.MUST continues it, and raises an error
                if there is none; MAY continues it if there is one; NEVER raises an error
    fresh       start over, replacing the run in `out`
    cache_dir   for token files and downloads; by default `out`
    chosen      fields of lab.settings.Settings, which override the recipe's

    Returns the record written to training.json: {"asked", "curve", "finished"}.
    Raises UsageError for an invalid setting, ValueError if the text cannot be used or
    `out` holds something else.
    """
    device = pick_device(device)
    cache_dir = cache_dir or out
    if not fresh:
        refuse_foreign_model(out)
    settings = settings_for("pretrain", device, **chosen)
    preset = preset or recipe(device)["preset"]
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    text = together(read_text, data, HELDOUT, Path(cache_dir, files.DOWNLOADS), refresh=fresh)
    encoding = train_bpe(text.all_train[:2**24])        # 16M characters are enough
    corpus = tokenize(text, encoding, Path(cache_dir, files.TOKENS), settings.block_size)
    parallel.check_equal(corpus.digest, "texts")
    report.say_text(text, corpus, encoding)
    config = GPTConfig.preset(
        preset, vocab_size=encoding.n_vocab, block_size=settings.block_size,
        dropout=settings.dropout,
    )
    # This is saved in training.json. A later call for the same directory must ask for
    # the same.
    asked = {
        "data": files.without_password(str(data)), "corpus": corpus.digest,
        "shape": asdict(config), "settings": asdict(settings),
    }
    with open_run(out, asked, resume, fresh) as run:
        if run.record is not None:          # the same run has finished before: reuse it
            return run.record
        torch.manual_seed(settings.seed)
        model = GPT(config).to(device)
        report.say_model(model, settings)

        def watch(point):
            sampled = models.sample_line(model, encoding, prompt)
            say(f"{report.describe(point)}  {sampled}"[:console.WIDTH])

        curve = train(model, corpus, settings, out, run.resuming, watch, save_every)
        from_first(models.save_model, model, encoding, out)
        return run.finish(curve)


def tune(base, data, out, method="lora", r=8, alpha=16.0, target_modules=TARGETS, device=None,
         resume=NEVER, fresh=False, save_every=200, cache_dir=None, **chosen):
    """Tune a base model to a text, into the directory `out`.

    base        a model directory, or gpt2, gpt2-medium, gpt2-large, gpt2-xl
    method      "lora": train adapters only; "full": train all weights
    r, alpha, target_modules    as in lora_minimal.apply_lora

    The other arguments, what is returned and what is raised are those of pretrain().
    """
    models.keep_apart(out, base)
    device = pick_device(device)
    cache_dir = cache_dir or out
    if not fresh:
        refuse_foreign_model(out)
    settings = settings_for(method, device, **chosen)
    if settings.fsdp and method == "full":
        raise UsageError("--fsdp divides a frozen base; it needs --method lora")
    where = "cpu" if settings.fsdp else device          # shard() moves it to the GPUs
    model, encoding, _ = together(
        models.load_model, base, where, settings.dropout, settings.base_dtype, settings.dtype
    )
    settings = fit_to_base(settings, model.config, device, chosen)
    corpus = together(models.load_corpus, data, encoding, cache_dir, settings.block_size, fresh)
    parallel.check_equal(corpus.digest, "texts")
    parallel.check_equal(fingerprint(base), "base models")
    torch.manual_seed(settings.seed)
    lora = None
    if method == "lora":
        if isinstance(target_modules, tuple):
            target_modules = list(target_modules)       # JSON has no tuples
        lora = {"r": r, "alpha": alpha, "target_modules": target_modules}
        models.add_lora(model, lora)
    asked = {
        "data": files.without_password(str(data)), "corpus": corpus.digest,
        "base": fingerprint(base), "lora": lora, "settings": asdict(settings),
    }
    with open_run(out, asked, resume, fresh) as run:
        if run.record is not None:
            return run.record
        report.say_trained(model, settings)
        if settings.fsdp:
            parallel.shard(model, lora_parameters(model), device)
        curve = train(model, corpus, settings, out, run.resuming, report.say_point, save_every)
        if lora is None:
            from_first(models.save_model, model, encoding, out)
        else:
            from_first(models.save_adapter, model, out, base)
        return run.finish(curve)


def compare(base, data, out, base_data=None, prompt=PROMPT, device=None, **options):
    """Tune a base fully and with LoRA, and compare quality, memory and time.

    Prints the report, and writes it to comparison.json, with a picture.

    base_data   the text to measure forgetting on; by default what the base was trained on
    options     of tune(); a setting given here applies to both methods

    Parts that are finished are reused, and parts that were interrupted are resumed.
    Returns the report written to comparison.json.
    """
    device = pick_device(device)
    base_text = models.text_of_base(base, base_data, out)
    records = tune_both_ways(base, data, out, device, options)

    headline("The comparison (measuring memory and time, both methods in turn ...)")
    settings = settings_of(records["lora"])
    base_model, encoding, _ = models.load_model(base, device)
    corpora = {
        "style": models.load_corpus(data, encoding, out, settings.block_size),
        "base": models.load_corpus(base_text, encoding, out, settings.block_size),
    }

    def bpb(model, text):
        return evaluate_as_trained(model, corpora[text], settings)

    tuned = comparison.load_tuned(base, out, device)
    qualities = comparison.quality(base_model, tuned, records, out, bpb)
    base_bpb = bpb(base_model, "base")
    samples = comparison.sample_each({
        "the base model": base_model,
        "after full fine-tuning": tuned["full"],
        "after LoRA": tuned["lora"],
    }, encoding, prompt)
    peak = process_peak(device)             # now: the steps measured below would raise it
    config = base_model.config
    del base_model, tuned                   # they make room for those steps
    costs, predicted = comparison.measure_runs(
        records, base, device, corpora["style"], Step
    )
    result = comparison.comparison_report(
        config, base_bpb, records, costs, qualities, peak, device
    )
    style, base_name = files.name_of(data), files.name_of(base_text)
    comparison.write_comparison(result, records, style, out)
    comparison.print_comparison(result, predicted, records, style, base_name)

    headline("One prompt, three models")
    comparison.print_samples(samples)
    picture = Path(out, files.COMPARISON_PICTURE)
    say(f"Written: {Path(out, files.COMPARISON)} and {picture}. Now try:\n"
        f'  python train.py sample --base {console.shell_quoted(base)} --adapter '
        f'{console.shell_quoted(Path(out, "lora"))} --prompt "Once"')
    return result


def tune_both_ways(base, data, out, device, options):
    """Full fine-tuning into out/full, and LoRA into out/lora: {method: record}."""
    options = {**options, "device": device, "cache_dir": out, "resume": MAY}
    records = {}
    for method, name in report.METHODS.items():
        title = name[0].upper() + name[1:]          # capitalize() would write "Lora"
        headline(f"{title} on {files.name_of(data)}")
        own = without_base_dtype(options) if method == "full" else options
        records[method] = tune(base, data, Path(out, method), method, **own)
    return records


def without_base_dtype(options):
    """The options for a training that changes all weights: it has no frozen base."""
    return {**options, "base_dtype": None}


def voices(data=("pirate", "bard", "noir"), out="out", base=None, base_data=None, preset=None,
           prompt=PROMPT, device=None, r=8, alpha=16.0, target_modules=TARGETS, **options):
    """Tune an adapter to each of several texts, and evaluate every text with every adapter.

    data        the texts; their file names name the adapters
    base        the base model; by default one is pretrained on tales, into out/base
    base_data   the text that the base was trained on, by default what its record says
    options     of tune(); a setting given here applies to pretraining as well

    Returns the report written to voices.json: {"bytes", "bpb": {model: {text: bits per byte}}}.
    """
    sources = comparison.name_voices(data)
    device = pick_device(device)
    if base is None:
        together(models.check_texts, sources, base_data or "tales", out)
        base = pretrain_base(out, preset, prompt, device, **options)
        base_text = models.text_of_base(base, base_data, out)
    else:
        if preset is not None:
            raise UsageError("--preset is the shape of a new base; leave it out beside --base")
        base_text = models.text_of_base(base, base_data, out)
        together(models.check_texts, sources, base_text, out)
    lora = {"r": r, "alpha": alpha, "target_modules": target_modules}
    options = {**options, **lora, "device": device, "cache_dir": out, "resume": MAY}
    records = {}
    for voice, source in sources.items():
        headline(f"LoRA on {voice}")
        records[voice] = tune(base, source, Path(out, voice), **options)

    headline("One base, many voices")
    model, encoding, _ = models.load_model(base, device)
    settings = settings_of(next(iter(records.values())))
    corpora = {}
    for name, source in ({files.name_of(base_text): base_text} | sources).items():
        corpora[name] = models.load_corpus(source, encoding, out, settings.block_size)
    dirs = {voice: Path(out, voice) for voice in sources}
    adapters = models.load_voices(model, base, dirs)

    def bpb(corpus):
        return evaluate_as_trained(model, corpus, settings)

    scores = comparison.score_voices(adapters, list(dirs), corpora, bpb)
    result = comparison.voices_report(base, dirs, scores)
    comparison.write_voices(result, out)
    comparison.print_voices(result)

    say("One prompt, one batch, and a row for each:\n")
    adapters.use([None, *dirs])
    rows = models.continue_text(model, encoding, prompt, 100, seed=0, rows=1 + len(dirs))
    say(console.side_by_side(dict(zip(result["bpb"], rows)), console.WIDTH))
    flags = " ".join(f"--adapter {console.shell_quoted(dir)}" for dir in dirs.values())
    say(f'\nWritten: {Path(out, files.VOICES)}. Now try:\n'
        f'  python train.py sample --base {console.shell_quoted(base)} {flags} --prompt "Once"')
    return result


def story(out="out", preset=None, prompt=PROMPT, device=None, r=8, alpha=16.0,
          target_modules=TARGETS, **options):
    """The whole story: pretrain on tales, then compare full fine-tuning and LoRA on pirate.

    options     of tune(); a setting given here applies to pretraining and to both methods

    Returns the report written to comparison.json.
    """
    device = pick_device(device)
    base = pretrain_base(out, preset, prompt, device, **options)
    lora = {"r": r, "alpha": alpha, "target_modules": target_modules}
    return compare(base, "pirate", out, "tales", prompt, device, **lora, **options)


def pretrain_base(out, preset, prompt, device, **options):
    """Pretrain a base on tales into out/base, or reuse it. Returns its directory."""
    say(f"LoRA from first principles, on {console.device_name(device)} with torch "
        f"{torch.__version__}. Everything is written to {out}.")
    headline("Pretraining a GPT from scratch on tales")
    base = Path(out, "base")
    options = {**without_base_dtype(options), "cache_dir": out, "resume": MAY}
    pretrain("tales", base, preset, prompt, device, **options)
    return base


COMMANDS = {
    "pretrain": pretrain, "tune": tune, "compare": compare, "voices": voices,
    "sample": models.sample, "merge": models.merge,
}


def main(argv=None):
    """Run a command line. Returns the exit code: see lab/cli.py."""
    return cli.run(story, COMMANDS, argv, description=__doc__)


if __name__ == "__main__":
    parallel.leave(main())
