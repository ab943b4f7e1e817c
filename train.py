"""
The command line: pretrain a GPT, tune it to a style by full fine-tuning or by LoRA, compare the two, and sample.

    python train.py                                                      the whole story, on the built-in corpora
    python train.py pretrain --data my_book.txt --out out/base           a base model of your own
    python train.py tune --method lora --base out/base --data pirate --out out/pirate
    python train.py compare --base out/base --data bard --out out/compare
    python train.py voices                                               pirate, bard and noir over one base
    python train.py sample --base out/base --adapter out/pirate --adapter out/bard --prompt "The old lighthouse"
    python train.py merge --base out/base --adapter out/pirate --out out/merged

`python train.py COMMAND --help` lists the flags. One function, train(), does every kind of training; they differ in
which parameters train. Held-out text is measured in bits per byte (bpb): how many bits the model needs to write down
one byte of text that it has never seen. It does not depend on the tokenizer, so it compares across models.
"""
import argparse
import contextlib
import gc
import hashlib
import math
import os
import platform
import shutil
import signal
import sys
import textwrap
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from tqdm import tqdm

import compare
from data import Batches, read_text, tokenize
from data.bpe import load_tokenizer, save_tokenizer, train_bpe
from data.runs import close_run, open_run, read_checkpoint, read_record, write_checkpoint, write_json
from gpt import GPT, PRESETS, GPTConfig, pretrained_dir, replacing, weight_files
from lora_minimal import apply_lora, load_lora, lora_parameters, merge_lora, remove_lora, save_lora, use_lora


# ---- settings --------------------------------------------------------------------------------------------------------

def flag(help, **default):
    return field(metadata={"help": help}, **default)


@dataclass
class Settings:
    """How a model is trained. Each field is a flag; RECIPES has what a device and a kind of training set."""
    steps: int = flag("optimizer steps")
    batch_size: int = flag("windows of text in a step")
    block_size: int = flag("tokens in a window")
    lr: float = flag("AdamW's learning rate at its highest")
    muon_lr: float = flag("Muon's, for the matrices of the blocks; 0 is AdamW for all", default=0.0)
    weight_decay: float = flag("share of a matrix to take away per step, times the learning rate", default=0.1)
    dropout: float = flag("share of the activations to drop while training", default=0.0)
    warmup: float = flag("share of the steps in which the learning rate rises", default=0.05)
    grad_clip: float = flag("a longer gradient is scaled down to this length; 0 is never", default=1.0)
    eval_every: int = flag("steps between looks at the held-out text", default=50)
    seed: int = flag("of the weights, the batches and dropout", default=1337)
    dtype: str = flag("of the matrix products: float32, or bfloat16 by autocast", default="float32")
    base_dtype: str = flag("how the frozen base is stored while LoRA trains: float32 or bfloat16", default="float32")
    loss_chunk: int = flag("logits that the loss computes at a time; 0 is all at once", default=0)
    recompute: bool = flag("keep no activations inside the blocks, compute them again (checkpointing)", default=False)
    compile: bool = flag("torch.compile the model (needs a compiler)", default=False)
    graph: bool = flag("on CUDA, capture the whole step in a graph and replay it", default=True)
    accumulate: int = flag("parts that a batch is computed in, one after the other, to need less memory", default=1)
    fsdp: bool = flag("with torchrun and LoRA: share the frozen base out among the processes", default=False)

    def __post_init__(self):
        least = dict(steps=1, batch_size=1, block_size=1, eval_every=1, accumulate=1) | dict.fromkeys(
            ("lr", "muon_lr", "weight_decay", "dropout", "warmup", "grad_clip", "seed", "loss_chunk"), 0)
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be a number from {low} up")
        if self.dropout >= 1 or self.warmup >= 1:
            raise ValueError(f"--dropout ({self.dropout}) and --warmup ({self.warmup}) are shares; they must be below 1")
        if self.fsdp and WORLD == 1:
            raise ValueError("--fsdp shares the base out among processes; start several with torchrun --nproc-per-node")
        if self.batch_size % (self.accumulate * WORLD):
            raise ValueError(f"--batch-size {self.batch_size} cannot be parted among {WORLD} processes, each in --accumulate "
                             f"{self.accumulate} parts; choose a multiple of {self.accumulate * WORLD}")
        for name in ("dtype", "base_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}; it must be float32 or bfloat16")


RECIPES = {     # what a kind of device pretrains in minutes, and how
    "cpu": dict(preset="tiny",
                pretrain=dict(steps=1100, batch_size=16, block_size=128, lr=8e-3, muon_lr=0.04, eval_every=100),
                full=dict(steps=100, batch_size=64, block_size=128, lr=1e-3, eval_every=10),
                lora=dict(steps=100, batch_size=64, block_size=128, lr=1e-2, eval_every=10, weight_decay=0.0)),
    "gpu": dict(preset="small",
                pretrain=dict(steps=600, batch_size=64, block_size=256, lr=4e-3, muon_lr=0.04, dropout=0.2),
                full=dict(steps=250, batch_size=32, block_size=256, lr=2e-4, eval_every=10, dropout=0.1),
                lora=dict(steps=250, batch_size=32, block_size=256, lr=3e-3, eval_every=10, dropout=0.1, weight_decay=0.0)),
}


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def loss_chunk(kind, device):
    """How many logits the loss computes at a time. Few fit the cache of a CPU, or the memory of a GPU: a 124M LoRA step of
    8 × 1024 tokens on an H200 took 19.9, 19.0, 18.8 ms and 3.0, 3.3, 3.7 GB with 2^24, 2^25, 2^26. A head that trains adds
    up its gradient chunk by chunk, which costs a pass over the head each: full fine-tuning took 29.3 ms with 2^24, 25.7
    with 2^26, and 25.7 with the loss computed whole."""
    return {"cpu": 2**20, "cuda": 2**25 if kind == "lora" else 2**26}.get(torch.device(device).type, 2**22)


def recipe(device):
    return RECIPES["cpu" if torch.device(device).type == "cpu" else "gpu"]


def settings_for(kind, args):
    """The recipe of this kind of training ("pretrain", "full", "lora") on this device, changed by the flags given."""
    settings = dict(recipe(args.device)[kind], loss_chunk=loss_chunk(kind, args.device), graph=not args.compile)
    if torch.device(args.device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        # A compiled step is faster with a float32 base, whose folding the compiler fuses: 15.0 ms, not 16.9 (124M, H200).
        settings |= {"dtype": "bfloat16", "base_dtype": "float32" if args.compile else "bfloat16"}
    settings |= {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name) is not None}
    if kind != "lora":
        settings["base_dtype"] = "float32"      # weights that train lose small updates in bfloat16
    try:
        return Settings(**settings)
    except ValueError as error:
        raise UsageError(error) from error


class UsageError(ValueError):
    """A flag that cannot be: exit code 2."""


def pick_device(name):
    """None -> the best device here, of several under torchrun one's own; a name -> that device, or UsageError."""
    if name is None and WORLD > 1 and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


# ---- several processes -----------------------------------------------------------------------------------------------
# torchrun starts this program several times. Each process computes its part of every batch, the gradients are averaged
# (DistributedDataParallel), and all take the same step. The first alone prints and writes.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def from_first(function):
    """Call function in the first process alone. -> what it returned, or raises what it raised, in all of them."""
    result = [None]
    if RANK == 0:
        try:
            result = [(function(), None)]
        except Exception as error:
            result = [(None, error)]
    if WORLD > 1:
        torch.distributed.broadcast_object_list(result)
    value, error = result[0]
    if error:
        raise error
    return value


def shard(model, trained, device):
    """Share the frozen parameters out among the processes (FSDP): each keeps its part of a block and gathers the rest for
    the time that it computes with it. What trains, A and B, is small, and every process has it whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")      # k and v; nobody changes them
    mesh = init_device_mesh(torch.device(device).type, (WORLD,))
    for p in trained:
        p.data = p.data.to(device)
    for part in (*model.transformer.h, model):
        fully_shard(part, mesh=mesh, ignored_params=set(trained))


# ---- training --------------------------------------------------------------------------------------------------------

class Step:
    """One training step: step(x, y) is forward, backward and update, which can be called one by one, to be measured.

    AdamW trains whatever requires a gradient. Where the settings ask for it, Muon (Jordan et al. 2024) trains the
    matrices of the blocks instead: it makes every update of a matrix near-orthogonal."""

    def __init__(self, model, settings):
        self.model, self.settings = model, settings
        self.device = next(model.parameters()).device
        model.loss_chunk, model.recompute = settings.loss_chunk, settings.recompute
        self.call = torch.compile(model) if settings.compile else model
        self.parallel = WORLD > 1 and not settings.fsdp
        if self.parallel:
            self.call = torch.nn.parallel.DistributedDataParallel(self.call)
            self.call.register_comm_hook(self, Step.exchange)
        self.exchanged = 0              # bytes of gradients that the last step sent to be averaged
        self.skipped, self.skipped_in_a_row = torch.zeros(2, device=self.device).unbind()       # steps, see update()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        muon = [name for name, p in self.trained.items() if settings.muon_lr and ".h." in name and p.dim() == 2]
        decayed = [p for name, p in self.trained.items() if name not in muon and p.dim() == 2]
        others = [p for p in self.trained.values() if p.dim() < 2]      # biases and layer norms do not decay
        self.captures = settings.graph and self.device.type == "cuda" and not muon and WORLD == 1   # nor Muon
        self.graph, self.calls = None, 0
        self.optimizers = [torch.optim.AdamW(
            [dict(params=decayed, weight_decay=settings.weight_decay), dict(params=others, weight_decay=0.0)],
            lr=torch.tensor(settings.lr, device=self.device) if self.captures else settings.lr, betas=(0.9, 0.95),
            fused=True, capturable=self.captures)]
        if muon:
            self.optimizers.append(torch.optim.Muon([self.trained[name] for name in muon], lr=settings.muon_lr,
                                                    weight_decay=settings.weight_decay))
        for group in self.groups():
            group["initial_lr"] = float(group["lr"])

    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def schedule(self, n):
        """Set the learning rates for step n: up to the highest along a line, then down to zero along another."""
        done, rise = (n + 1) / (self.settings.steps + 1), self.settings.warmup
        for group in self.groups():
            lr = group["initial_lr"] * (done / rise if done < rise else (1 - done) / (1 - rise))
            if self.captures:
                group["lr"].fill_(lr)       # a captured step reads this very tensor
            else:
                group["lr"] = lr

    def forward(self, x, y):
        with autocast(self.model, self.settings):
            return self.call(x, y)[1]

    def backward(self, loss):
        loss.backward()

    def update(self):
        """Change the weights; but where a gradient is not finite, leave them as they are, and count that."""
        if self.settings.fsdp:
            self.average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.settings.grad_clip or math.inf)
        bad = ~norm.isfinite()
        self.skipped.add_(bad)
        self.skipped_in_a_row.add_(1).mul_(bad)
        for optimizer in self.optimizers:
            if optimizer.defaults.get("fused"):
                optimizer.found_inf = bad.float()       # a fused AdamW looks at this on the device, and waits for nothing
                optimizer.step()
            elif not bad:
                optimizer.step()
            optimizer.zero_grad()

    def eager(self, x, y):
        parts, loss, self.exchanged = self.settings.accumulate, 0.0, 0
        for i, (part_x, part_y) in enumerate(zip(x.chunk(parts), y.chunk(parts)), start=1):
            with self.call.no_sync() if self.parallel and i < parts else contextlib.nullcontext():
                part = self.forward(part_x, part_y) / parts
                self.backward(part)
            loss = loss + part.detach()
        self.update()
        return loss

    def exchange(self, bucket):
        """DistributedDataParallel's own way to average gradients, counted."""
        self.exchanged += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(None, bucket)

    def average_gradients(self):
        flat = torch.cat([p.grad.flatten() for p in self.trained.values()])
        torch.distributed.all_reduce(flat)
        self.exchanged = flat.nbytes
        for p, mean in zip(self.trained.values(), (flat / WORLD).split([p.numel() for p in self.trained.values()])):
            p.grad.copy_(mean.view_as(p))

    def __call__(self, x, y):
        """On CUDA the fourth step is captured, and from there on replayed with new batches copied in: one launch in the
        place of a thousand, which is what small models spend their time on. x, y must keep their shape."""
        self.calls += 1
        if not self.captures or self.calls <= 3:
            return self.eager(x, y)
        if self.graph is None:
            self.batch, self.graph = (x.clone(), y.clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.eager(*self.batch)
        for held, new in zip(self.batch, (x, y)):
            held.copy_(new)
        self.graph.replay()
        return self.loss.clone()


def autocast(model, settings):
    """bfloat16 products for float32 weights; a base stored in bfloat16 computes in it without being asked."""
    weight = next(model.parameters())
    return torch.autocast(weight.device.type, dtype=torch.bfloat16,
                          enabled=settings.dtype == "bfloat16" and weight.dtype == torch.float32)


@torch.no_grad()
def evaluate(model, corpus, settings):
    """Bits per byte of the held-out text, read in windows of block_size. The end of a story costs bits but is no byte."""
    device, was_training, T = next(model.parameters()).device, model.training, settings.block_size
    model.eval()
    tokens = torch.from_numpy(corpus.heldout.astype("int64"))
    whole, nats = (len(tokens) - 1) // T * T, 0.0
    windows = [*zip(tokens[:whole].view(-1, T).split(32), tokens[1:whole + 1].view(-1, T).split(32))] if whole else []  # (≤32, T)
    if whole < len(tokens) - 1:
        windows.append((tokens[None, whole:-1], tokens[None, whole + 1:]))
    for x, y in windows:
        with autocast(model, settings):
            logits, _ = model(x.to(device))
        nats += F.cross_entropy(logits.float().flatten(0, 1), y.to(device).flatten(), reduction="sum").item()
    model.train(was_training)
    return nats / math.log(2) / corpus.heldout_bytes


def train(model, corpus, settings, dir, resume=False, watch=None, save_every=0):
    """Train the parameters of model that require a gradient; leave it with the weights that were best on held-out text.

    -> the curve, a list of {"step", "seconds" of training alone, "loss" in nats per token, "bpb", "skipped" steps until
    then}. `watch(point)` is called at every look at the held-out text. Every save_every steps (0: never), and on Ctrl-C or
    SIGTERM, which raise KeyboardInterrupt, dir/checkpoint.safetensors is written; with `resume` that file is continued.
    Raises ArithmeticError when several steps in a row have gradients that are not finite."""
    step, batches = Step(model, settings), Batches(corpus.train, settings.batch_size, settings.block_size, settings.seed)
    start, seconds, curve, best = read_checkpoint(dir, step) if resume else (0, 0.0, [], {})
    step.skipped += curve[-1]["skipped"] if curve else 0
    mine = slice(RANK * settings.batch_size // WORLD, (RANK + 1) * settings.batch_size // WORLD)     # this process's rows
    model.train()
    with _stop_between_steps() as stop, tqdm(total=settings.steps, initial=start, disable=RANK > 0 or None, leave=False,
                                             unit=" steps", dynamic_ncols=True) as bar:

        def save():
            if RANK == 0:
                write_checkpoint(dir, step, n, seconds + time.perf_counter() - clock, curve, best)

        clock, loss = time.perf_counter(), None
        for n in range(start, settings.steps + 1):
            if (n % settings.eval_every == 0 or n == settings.steps) and not any(point["step"] == n for point in curve):
                loss = None if loss is None else loss.item()        # waits for the device, so the clock is right
                seconds += time.perf_counter() - clock
                curve.append({"step": n, "seconds": seconds, "loss": loss, "bpb": evaluate(model, corpus, settings),
                              "skipped": int(step.skipped.item())})
                if not math.isfinite(curve[0]["bpb"]):
                    raise ArithmeticError(f"before any training the model gives {corpus.name} {curve[0]['bpb']} bits per byte; "
                                          "its weights are damaged")
                if curve[-1] is best_of(curve):
                    best = {name: p.detach().to("cpu", copy=True) for name, p in step.trained.items()}
                if watch:
                    watch(curve[-1])
                clock = time.perf_counter()
            if n == settings.steps:
                break
            if any_of(stop, step.device):
                save()
                raise KeyboardInterrupt(f"stopped at step {n} of {settings.steps}, which {dir} keeps")
            if save_every and n % save_every == 0 and n > start:
                save()
            if (step.device.type == "cpu" or n % 10 == 0) and step.skipped_in_a_row >= PATIENCE:
                save()
                raise ArithmeticError(
                    f"{step.skipped_in_a_row.item():.0f} steps in a row, the last of them step {n}, had gradients that are not "
                    f"finite, and were skipped. Likely the learning rate is too high (--lr {settings.lr:.2g}, --muon-lr "
                    f"{settings.muon_lr:.2g}). The weights from before them are kept in {dir}; start over with --fresh")
            torch.manual_seed((settings.seed * 1_000_003 + n) * WORLD + RANK)      # dropout, too, depends on seed and step alone
            step.schedule(n)
            loss = step(*(tokens[mine].to(step.device) for tokens in batches[n]))
            bar.update()
            if n % 10 == 9 and not bar.disable:
                rate = settings.batch_size * settings.block_size * (bar.n - start) / bar.format_dict["elapsed"]
                bar.set_postfix_str(f"loss {loss.item():.3f}, {rate:,.0f} tokens/s")
    with torch.no_grad():
        for name, p in step.trained.items():
            p.copy_(best[name])
    model.eval()
    if curve[-1]["skipped"]:
        say(f"     {curve[-1]['skipped']} steps had gradients that are not finite, and were skipped")
    if WORLD > 1:
        everything = 4 * sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
        say(f"     each of {WORLD} processes sent {compare.size(step.exchanged)} of gradients a step to be averaged; the "
            f"gradients of the whole model, as in full fine-tuning, are {compare.size(everything)}")
    return curve


PATIENCE = 5        # steps in a row that are skipped before training gives up


def best_of(curve):
    return min(curve, key=lambda point: point["bpb"] if math.isfinite(point["bpb"]) else math.inf)


def any_of(stop, device):
    """Whether any of the processes was told to stop; all must do so at the same step."""
    if WORLD == 1:
        return bool(stop)
    told = torch.tensor(float(bool(stop)), device=device)
    torch.distributed.all_reduce(told)
    return bool(told)


@contextlib.contextmanager
def _stop_between_steps():
    """Ctrl-C and SIGTERM only fill the list that this yields, so that no step is left half done; twice means now."""
    stop, old = [], {}

    def note(number, frame):
        stop.append(number)
        signal.signal(number, old[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):       # only the main thread may, and only it gets Ctrl-C
            old[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---- commands --------------------------------------------------------------------------------------------------------

def load_model(base, device, dropout=0.0, dtype="float32"):
    """-> the model on its device, its tokenizer, and the name of the corpus it learnt from (None where not known)."""
    dir = pretrained_dir(base)
    model, encoding = GPT.from_pretrained(dir, dropout=dropout), load_tokenizer(dir)
    if encoding.n_vocab > model.config.vocab_size:
        raise ValueError(f"{dir}: the tokenizer has {encoding.n_vocab} entries, the model {model.config.vocab_size}; "
                         "they do not belong together")
    learnt_from = read_record(dir).get("asked", {}).get("data")
    return model.to(device, getattr(torch, dtype)).eval(), encoding, learnt_from


def fingerprint(base):
    """A hash of a model directory's weights."""
    digest = hashlib.sha256()
    for path in weight_files(pretrained_dir(base)):
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


def load_voices(model, base, voices):
    """Load the adapters {name: directory}; say so where one was tuned on another base than this."""
    for name, dir in voices.items():
        load_lora(model, dir, name)
        tuned_on = read_record(dir).get("asked", {}).get("base")
        if tuned_on not in (None, fingerprint(base)):
            say(f"note: {dir} was tuned on another base than {base}")


def base_text(args, learnt_from):
    """The text to measure forgetting on: what the base learnt from, unless another is asked for."""
    return read_text(args.base_data or learnt_from or "tales", 0.05, Path(args.out, "downloads"))


def keep_apart(dir, *inputs):
    """Raises ValueError where a directory to write into is one of those to be read."""
    for other in inputs:
        if Path(dir).resolve() == pretrained_dir(other).resolve():
            raise ValueError(f"{dir} would be overwritten while it is read; choose another directory for --out")


@contextlib.contextmanager
def begin(dir, asked, args):
    """`with begin(…) as (curve, resume):` claims dir for this run. curve is that of a finished run which did just what is
    asked, or None; resume, whether an interrupted one is to be continued."""
    with contextlib.ExitStack() as claim:
        record, resuming = from_first(lambda: claim.enter_context(open_run(dir, asked, args.resume, args.fresh)))
        if record:
            say(f"     {dir} was finished on {record['finished']} and is reused (--fresh starts over)")
        elif resuming:
            say(f"     {dir} was interrupted and is resumed (--fresh starts over)")
        yield record and record["curve"], resuming


def pretrain(args, source, dir):
    """Train a tokenizer and a GPT from nothing on a corpus, into dir."""
    settings, preset = settings_for("pretrain", args), args.preset or recipe(args.device)["preset"]
    if preset not in PRESETS:
        raise UsageError(f"no preset is called {preset!r}; there are {', '.join(PRESETS)}")
    text = read_text(source, 0.05, Path(args.out, "downloads"))
    clock = time.perf_counter()
    encoding = train_bpe(text.all_train[:2**24])        # enough to know its words by
    corpus = tokenize(text, encoding, Path(args.out, "tokens"), settings.block_size)
    say(f"     {len(text.train):,} pieces of text to learn from, {len(text.heldout):,} held out; {encoding.n_vocab:,} tokens "
        f"learnt in {time.perf_counter() - clock:.1f} s, {text.heldout_bytes / len(corpus.heldout):.2f} bytes each")
    config = GPTConfig.preset(preset, vocab_size=encoding.n_vocab, block_size=settings.block_size, dropout=settings.dropout)
    asked = {"data": str(source), "corpus": corpus.digest, "shape": asdict(config), "settings": asdict(settings)}
    with begin(dir, asked, args) as (curve, resume):
        if curve:
            return
        torch.manual_seed(settings.seed)
        model = GPT(config).to(args.device)
        say(f"     {sum(p.numel() for p in model.parameters()):,} parameters, {config.n_layer} layers of width {config.n_embd}; "
            f"{settings.steps} steps of {settings.batch_size} × {settings.block_size} tokens. What it writes as it learns:")

        def watch(point):
            words = continue_text(model, encoding, args.prompt, 30, seed=0)[0].replace("\n", " ")
            say(f"     step {point['step']:>4} {point['seconds']:>6.1f} s  {point['bpb']:.3f} bpb  " + words[:WIDTH - 36])

        curve = train(model, corpus, settings, dir, resume, watch, args.save_every)
        from_first(lambda: save_model(dir, model, encoding, asked, curve))


def save_model(dir, model, encoding, asked, curve):
    save_tokenizer(encoding, dir)
    model.save_pretrained(dir)
    close_run(dir, asked, curve)


def tune(args, method, source, dir):
    """Tune the base model to a corpus, all of it ("full") or by LoRA ("lora"), into dir.

    A base wider than the one the recipe is for gets a smaller learning rate, in proportion (Yang et al. 2021, "Tensor
    Programs V", §4), unless --lr is given: the recipes' own 1e-2 for 128 and 3e-3 for 384 channels keep to it.
    -> settings, corpus, curve, and the arguments of apply_lora."""
    keep_apart(dir, args.base)
    settings = settings_for(method, args)
    if settings.fsdp and method == "full":
        raise UsageError("--fsdp shares a frozen base out; it goes with --method lora")
    model, encoding, _ = load_model(args.base, "cpu" if settings.fsdp else args.device, settings.dropout, settings.base_dtype)
    if settings.block_size > model.config.block_size:
        if args.block_size:
            raise UsageError(f"--block-size {args.block_size} exceeds the base model's {model.config.block_size}")
        settings = replace(settings, block_size=model.config.block_size)
    if args.lr is None:
        narrow = PRESETS[recipe(args.device)["preset"]]["n_embd"] / model.config.n_embd
        settings = replace(settings, lr=settings.lr * min(1.0, narrow))
    text = read_text(source, 0.1, Path(args.out, "downloads"))
    corpus = tokenize(text, encoding, Path(args.out, "tokens"), settings.block_size)
    torch.manual_seed(settings.seed)
    lora = {"r": args.r, "alpha": args.alpha, "target_modules": args.target_modules} if method == "lora" else None
    if lora:
        try:
            names = apply_lora(model, **lora)
        except ValueError as error:
            raise UsageError(error) from error
        for name in names:
            shape = tuple(model.get_submodule(name).weight.shape)
            if args.r > min(shape):
                raise UsageError(f"--r {args.r} exceeds the smaller side of {name}, {shape}; choose a smaller rank")
    asked = {"data": str(source), "corpus": corpus.digest, "base": fingerprint(args.base), "lora": lora,
             "settings": asdict(settings)}
    with begin(dir, asked, args) as (curve, resume):
        if not curve:
            counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
            say(f"     {counts[0]:,} of {counts[1]:,} parameters train; {settings.steps} steps of {settings.batch_size} × "
                f"{settings.block_size} tokens, learning rate {settings.lr:.2g}")
            if settings.fsdp:
                shard(model, lora_parameters(model), args.device)
            curve = train(model, corpus, settings, dir, resume, lambda point: say(
                f"     step {point['step']:>4} {point['seconds']:>6.1f} s  {point['bpb']:.3f} bpb"), args.save_every)
            from_first(lambda: save_model(dir, model, encoding, asked, curve) if not lora else (
                save_lora(model, dir, base_model_name_or_path=str(args.base)), close_run(dir, asked, curve)))
    return SimpleNamespace(settings=settings, corpus=corpus, curve=curve, lora=lora)


def compare_methods(args, source, out):
    """Tune by both methods, measure both, and report: a table, out/comparison.json and out/comparison.png."""
    style, runs, steps = Path(source).stem, {}, {}
    base, encoding, learnt_from = load_model(args.base, args.device)
    text = base_text(args, learnt_from)         # if it is not there, say so before training
    for method, title in (("full", "Full fine-tuning on"), ("lora", "LoRA on")):
        headline(f"{title} {style}")
        runs[method] = run = tune(args, method, source, Path(out, method))
        run.model = load_model(args.base if run.lora else Path(out, method), args.device)[0]     # what is judged is what
        if run.lora:                                                                             # was saved
            load_lora(run.model, Path(out, method))

    headline("The comparison (measuring memory and time, the two methods in turn …)")
    for method, run in runs.items():
        model = load_model(args.base, args.device, run.settings.dropout, run.settings.base_dtype)[0]
        if run.lora:
            apply_lora(model, **run.lora)
        steps[method] = Step(model.train(), run.settings)
    settings, corpus = run.settings, run.corpus
    x, y = (t.to(args.device) for t in Batches(corpus.train, settings.batch_size, settings.block_size, seed=0)[0])
    predicted = {method: compare.predict(step, x) for method, step in steps.items()}
    measured = compare.measure(steps, x, y)
    base_corpus = tokenize(text, encoding, Path(out, "tokens"), settings.block_size)
    style_before = evaluate(base, corpus, settings)
    for method, run in runs.items():
        kept = ("model.safetensors", "config.json") if method == "full" else ADAPTER_FILES
        measured[method] |= {
            "checkpoint_bytes": sum(Path(out, method, name).stat().st_size for name in kept),
            "style_bpb_before": style_before, "style_bpb_after": evaluate(run.model, corpus, settings),
            "base_bpb_after": evaluate(run.model, base_corpus, settings),
            "seconds_to_best": best_of(run.curve)["seconds"], "steps": settings.steps}
    report = {"device": device_name(args.device), "torch": torch.__version__,
              "config": {**asdict(base.config), "r": args.r, "alpha": args.alpha, "target_modules": args.target_modules,
                         "settings": {method: asdict(run.settings) for method, run in runs.items()}},
              "base": {"bpb": evaluate(base, base_corpus, settings)}, "methods": measured}
    curves = {method: run.curve for method, run in runs.items()}
    from_first(lambda: write_report(Path(out), report, curves, style))
    say(compare.table(report, style, Path(text.name).stem) + "\n")
    say(compare.ledgers(report, predicted) + "\n")
    for sentence in compare.findings(report, curves):
        say(textwrap.fill(sentence, WIDTH, initial_indent="  · ", subsequent_indent="    "))

    headline("One prompt, three models")
    models = {"the base model": base, "after full fine-tuning": runs["full"].model, "after LoRA": runs["lora"].model}
    for seed in (0, 1):
        say(compare.side_by_side({title: continue_text(model, encoding, args.prompt, 100, seed=seed)[0]
                                  for title, model in models.items()}, WIDTH) + "\n")
    say(f"Written: {Path(out, 'comparison.json')} and {Path(out, 'comparison.png')}. Now try:\n"
        f'  python train.py sample --base {args.base} --adapter {Path(out, "lora")} --prompt "Once"')


def write_report(out, report, curves, style):
    write_json(out / "comparison.json", report)
    with replacing(out / "comparison.png") as path:
        compare.plot(report, curves, style, path)


def pretrain_base(args):
    """The base of the whole story and of the voices, unless one is given: tales, into out/base."""
    args.resume = args.resume or None
    say(f"LoRA from first principles, on {device_name(args.device)} with torch {torch.__version__}. "
        f"Everything is written into {args.out}.")
    if args.base is None:
        headline("Pretraining a GPT from nothing on tales")
        pretrain(args, "tales", Path(args.out, "base"))
        args.base = Path(args.out, "base")


def run_story(args):
    args.base = args.base_data = None
    pretrain_base(args)
    compare_methods(args, "pirate", args.out)


def run_voices(args):
    """Tune an adapter to each of several texts over one base, and judge every text under every adapter."""
    sources = {Path(source).stem: source for source in args.data}
    if len(sources) < len(args.data):
        raise ValueError(f"--data: two of {', '.join(args.data)} have the same name, and adapters are called by it")
    pretrain_base(args)
    corpora = {}
    for voice, source in sources.items():
        headline(f"LoRA on {voice}")
        corpora[voice] = tune(args, "lora", source, Path(args.out, voice)).corpus
    headline("One base, many voices")
    model, encoding, learnt_from = load_model(args.base, args.device)
    text, settings = base_text(args, learnt_from), settings_for("lora", args)
    settings = replace(settings, block_size=min(settings.block_size, model.config.block_size))
    corpora = {Path(text.name).stem: tokenize(text, encoding, Path(args.out, "tokens"), settings.block_size), **corpora}
    load_voices(model, args.base, {voice: Path(args.out, voice) for voice in sources})
    bpb = {}
    for title, voice in [("the base", None), *zip(sources, sources)]:
        use_lora(model, voice)
        bpb[title] = {name: evaluate(model, corpus, settings) for name, corpus in corpora.items()}
    sizes = {"base": sum(path.stat().st_size for path in weight_files(pretrained_dir(args.base))),
             "voices": {voice: sum(Path(args.out, voice, name).stat().st_size for name in ADAPTER_FILES) for voice in sources}}
    from_first(lambda: write_json(Path(args.out, "voices.json"), {"bytes": sizes, "bpb": bpb}))
    say(compare.voices(sizes, bpb) + "\n")
    say("One prompt, one batch, a row for each:\n")
    use_lora(model, [None, *sources])
    say(compare.side_by_side(dict(zip(bpb, continue_text(model, encoding, args.prompt, 100, seed=0, rows=len(bpb)))), WIDTH))
    adapters = " ".join(f"--adapter {Path(args.out, voice)}" for voice in sources)
    say(f'\nWritten: {Path(args.out, "voices.json")}. Now try:\n'
        f'  python train.py sample --base {args.base} {adapters} --prompt "Once"')


def run_pretrain(args):
    pretrain(args, args.data, args.out)
    say(f'Written: {args.out}. Now try:\n  python train.py sample --base {args.out} --prompt "Once"')


def run_tune(args):
    run = tune(args, args.method, args.data, args.out)
    best, where = best_of(run.curve), f"--base {args.base} --adapter {args.out}"
    say(f"{args.data}, held out: {run.curve[0]['bpb']:.3f} bpb before, {best['bpb']:.3f} after (best at step {best['step']}). "
        f"Written: {args.out}. Now try:\n  python train.py sample "
        f'{where if args.method == "lora" else f"--base {args.out}"} --prompt "Once"')


def run_compare(args):
    args.resume = args.resume or None
    compare_methods(args, args.data, args.out)


def run_sample(args):
    model, encoding, _ = load_model(args.base, args.device)
    voices = {str(args.base): None} | {dir: dir for dir in args.adapter}
    load_voices(model, args.base, {dir: dir for dir in args.adapter})
    texts = []
    for which in [list(voices.values())] if not args.merge else voices.values():      # one batch, or one merged model a time
        if args.adapter:
            use_lora(model, which)
            if args.merge:
                merge_lora(model)
        texts += continue_text(model, encoding, args.prompt, args.max_new_tokens, args.seed, args.temperature, args.top_k,
                               args.top_p, rows=1 if args.merge else len(which))
    say(compare.side_by_side(dict(zip(voices, texts)), WIDTH))


def run_merge(args):
    keep_apart(args.out, args.base, *args.adapter)
    args.resume = None
    model, encoding, learnt_from = load_model(args.base, "cpu")         # in float32, whatever it was in for training
    load_voices(model, args.base, {"voice": args.adapter[0]})
    asked = {"data": learnt_from, "base": fingerprint(args.base), "adapter": args.adapter[0]}
    merge_lora(model)
    remove_lora(model)
    with begin(args.out, asked, args):
        save_model(args.out, model, encoding, asked, curve=[])
    say(f"Written: {args.out}, a model like any other. Now try:\n"
        f'  python train.py sample --base {args.out} --prompt "Once"')


# ---- what is printed -------------------------------------------------------------------------------------------------

WIDTH = max(60, min(shutil.get_terminal_size((110, 40)).columns, 120))


def say(text):
    if RANK == 0:
        tqdm.write(text)        # above the progress bar, if there is one
        sys.stdout.flush()


def headline(text):
    say(f"\n== {text}")


def continue_text(model, encoding, prompt, max_new_tokens, seed, temperature=0.7, top_k=40, top_p=None, rows=1):
    """The prompt, read as the beginning of a story, and what the model makes of it, as many times as there are rows."""
    torch.manual_seed(seed)
    idx = torch.tensor([[encoding.eot_token, *encoding.encode(prompt, allowed_special="all")]] * rows)      # (rows, T)
    idx = model.generate(idx.to(next(model.parameters()).device), max_new_tokens, temperature, top_k, top_p,
                         stop_token=encoding.eot_token)
    # <|endoftext|> is the last token; what a model has beyond is padding of its vocabulary, and stands for nothing.
    return [encoding.decode([token for token in row if token < encoding.eot_token]) for row in idx.tolist()]


def device_name(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "mps":
        return f"{platform.machine()} GPU (MPS)"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


# ---- the command line ------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")


def number(kind, above):
    """A type for argparse: a finite number of this kind above a limit."""
    def parse(text):
        value = kind(text)
        if not above < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number above {above}")
        return value
    parse.__name__ = kind.__name__
    return parse


def make_parser():
    def group(*flags):
        parent = Parser(add_help=False)
        for name, options in flags:
            parent.add_argument(name, **options)
        return parent

    out = group(("--out", dict(required=True, help="the directory to write into")))
    data = group(("--data", dict(required=True, help="a UTF-8 text file, a URL, or tales, pirate, bard, noir")))
    base = group(("--base", dict(required=True, help="a base model: a directory, or gpt2, gpt2-medium, gpt2-large, gpt2-xl")))
    shape = group(("--preset", dict(help="the model's shape: tiny, small, gpt2, …; if not given, what suits the device")))
    common = group(("--device", dict(help="cpu, cuda, cuda:1, mps; if not given, the best there is")),
                   ("--prompt", dict(default="The old lighthouse", help="what samples begin with")),
                   ("--debug", dict(action="store_true", help="show the traceback of an error")))
    training = group(("--resume", dict(action="store_true", help="continue the interrupted run in --out")),
                     ("--fresh", dict(action="store_true", help="start over, replacing the run in --out")),
                     ("--save-every", dict(type=number(int, -1), default=200, help="steps between checkpoints; 0: none")),
                     *((f"--{f.name.replace('_', '-')}", dict(help=f.metadata["help"], **(
                         dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type))))
                       for f in fields(Settings)))
    lora = group(("--r", dict(type=number(int, 0), default=8, help="the adapter's rank")),
                 ("--alpha", dict(type=number(float, 0), default=16.0, help="the update is scaled by alpha / r")),
                 ("--target-modules", dict(nargs="+", default=["c_attn", "c_proj", "c_fc"], help="the layers to adapt")))
    method = group(("--method", dict(choices=("lora", "full"), default="lora", help="adapters train, or everything")))
    forgetting = group(("--base-data", dict(help="what to measure forgetting on, if not what the base learnt from")))
    adapters = group(("--adapter", dict(action="append", default=[], help="an adapter's directory; more than one may be given")))
    adapter = group(("--adapter", dict(nargs=1, required=True, help="the adapter's directory")),
                    ("--fresh", dict(action="store_true", help="replace what is in --out")))
    many = group(("--data", dict(nargs="+", default=["pirate", "bard", "noir"], help="the texts, as for tune")),
                 ("--base", dict(help="the base model; if not given, one is trained on tales")),
                 ("--out", dict(default="out", help="the directory to write into (default: out)")))
    sampling = group(("--merge", dict(action="store_true", help="fold the adapter into the weights first")),
                     ("--max-new-tokens", dict(type=int, default=150)), ("--temperature", dict(type=float, default=0.7)),
                     ("--top-k", dict(type=int, default=40)), ("--top-p", dict(type=float)),
                     ("--seed", dict(type=int, default=0)))

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[common, training, shape, lora])
    parser.add_argument("--out", default="out", help="the directory to write into (default: out)")
    parser.set_defaults(run=run_story)
    commands = parser.add_subparsers(metavar="COMMAND", help="if not given: the whole story on the built-in corpora")
    for name, run, help, *parents in (
            ("pretrain", run_pretrain, "train a base model from nothing", training, shape, data, out),
            ("tune", run_tune, "tune a base model to a text", training, method, lora, base, data, out),
            ("compare", run_compare, "tune by both methods and measure both", training, lora, base, data, forgetting, out),
            ("voices", run_voices, "tune several adapters over one base", training, shape, lora, many, forgetting),
            ("sample", run_sample, "continue a prompt, by the base and every adapter", base, adapters, sampling),
            ("merge", run_merge, "fold an adapter into its base: a plain model directory", base, adapter, out)):
        commands.add_parser(name, help=help, description=help, parents=[common, *parents]).set_defaults(run=run)
    return parser


def main(argv=None):
    """-> the exit code: 0, 1 for a fault, 2 for flags that cannot be, 130 when stopped."""
    args = make_parser().parse_args(argv)
    try:
        args.device = pick_device(args.device)
        if WORLD > 1:
            torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
            if args.device.startswith("cuda"):
                torch.cuda.set_device(args.device)
        args.run(args)
        return 0
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}; the same command with --resume goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        known = isinstance(error, (ValueError, OSError, ArithmeticError))
        what = " ".join(str(error).split()) if known else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, torch.OutOfMemoryError):
            what += "; a smaller --batch-size, --accumulate or --recompute needs less memory"
        if RANK == 0:
            print(f"error: {what}" + ("" if known else " (--debug shows where)"), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        if torch.distributed.is_initialized():
            gc.collect()            # what still hangs on the group must go first, or the interpreter may abort at its end
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
