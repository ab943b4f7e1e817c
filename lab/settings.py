"""
How a model is trained: the settings, and the recipes that choose them for a device.
"""
import sys
from dataclasses import MISSING, dataclass, field, fields, replace

import torch

from gpt import GPTConfig
from lab import parallel
from lab.files import first_line


class UsageError(ValueError):
    """An invalid setting or command-line flag: the exit code is then 2."""


def setting(help, default=MISSING):
    """A field of Settings, with the text that --help shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """How a model is trained. Each field is also a flag of the command line.

    Raises ValueError if a value is out of range.
    """

    steps: int = setting("optimizer steps")
    batch_size: int = setting("windows of text in a step")
    block_size: int = setting("tokens in a window")
    lr: float = setting("peak learning rate of AdamW")
    muon_lr: float = setting("peak learning rate of Muon; 0: AdamW trains everything", 0.0)
    weight_decay: float = setting("weight decay", 0.1)
    dropout: float = setting("dropout probability while training", 0.0)
    warmup: float = setting("share of the steps in which the learning rate rises", 0.05)
    grad_clip: float = setting("clip the gradient norm to this; 0: no clipping", 1.0)
    eval_every: int = setting("steps between evaluations on the held-out text", 50)
    seed: int = setting("random seed for initialization, batch order and dropout", 1337)
    dtype: str = setting("dtype of matrix products: float32, bfloat16 or float16", "float32")
    base_dtype: str = setting(
        "dtype of the frozen base: float32, bfloat16, float16, or nf4 (four bits)", "float32"
    )
    loss_chunk: int = setting("logits that the loss computes at once; 0: all", 0)
    recompute: bool = setting("gradient checkpointing: recompute the blocks", False)
    compile: bool = setting("torch.compile the model (needs a compiler)", False)
    graph: bool = setting("on CUDA, capture the whole step in a graph", True)
    accumulate: int = setting("micro-batches in a batch, to save memory", 1)
    fsdp: bool = setting("divide the frozen base among processes", False)

    def __post_init__(self):
        for f in fields(self):
            check_type(f, getattr(self, f.name))
        for name in ("steps", "batch_size", "block_size", "eval_every", "accumulate"):
            self.check_range(name, least=1)
        for name in ("lr", "muon_lr", "weight_decay", "grad_clip", "loss_chunk"):
            self.check_range(name, least=0)
        for name in ("dropout", "warmup"):
            self.check_range(name, least=0, below=1)
        self.check_range("seed", least=0, below=2**40)
        self.check_dtypes()
        tokens = self.batch_size * self.block_size
        if tokens > 2**24:
            raise ValueError(
                f"--batch-size {self.batch_size} times --block-size "
                f"{self.block_size} make {tokens:,} tokens in a step; expected at "
                "most 2^24"
            )

    def check_dtypes(self):
        """Raises ValueError if a dtype is unknown, or the two do not go together."""
        for name, choices in DTYPES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{flag(name)} is {value!r}; expected {' or '.join(choices)}")
        pair = {self.dtype, self.base_dtype}
        if pair == {"bfloat16", "float16"} or self.base_dtype == "float16" != self.dtype:
            raise ValueError(
                f"--base-dtype {self.base_dtype} does not go with --dtype {self.dtype}; a "
                "base in 16 bits computes in its own dtype, so give both the same"
            )
        if self.base_dtype == "nf4" and self.fsdp:
            raise ValueError(
                "--base-dtype nf4 cannot be divided by --fsdp; leave out --fsdp: four bits "
                "take a quarter of the memory of bfloat16 in each process"
            )

    def check_range(self, name, least, below=sys.float_info.max):
        """Raises ValueError unless least <= value < below."""
        value = getattr(self, name)
        if not least <= value < below:
            limit = f" and below {below}" if below < sys.float_info.max else " up"
            raise ValueError(
                f"{flag(name)} is {value}; expected a number from {least}{limit}"
            )

    def check_processes(self):
        """Raises ValueError if these settings do not fit the number of processes."""
        if self.fsdp and parallel.world() == 1:
            raise ValueError(
                "--fsdp divides the base among processes; start several with torchrun "
                "--nproc-per-node"
            )
        parts = self.accumulate * parallel.world()
        if self.batch_size % parts != 0:
            raise ValueError(
                f"--batch-size {self.batch_size} must be a multiple of {parts}: "
                f"{parallel.world()} processes times --accumulate {self.accumulate}"
            )


DTYPES = {
    "dtype": ("float32", "bfloat16", "float16"),
    "base_dtype": ("float32", "bfloat16", "float16", "nf4"),
}


def flag(name):
    """The command-line flag of a field: flag("batch_size") -> '--batch-size'."""
    return "--" + name.replace("_", "-")


def check_type(f, value):
    """Raises ValueError if `value` is not of the type of the dataclass field f."""
    allowed = (int, float) if f.type is float else (f.type,)
    if type(value) not in allowed:
        kind = "a number" if f.type is float else f"of type {f.type.__name__}"
        raise ValueError(f"{flag(f.name)} is {value!r}; expected it to be {kind}")


# For each kind of device, a model and settings that train in minutes. The learning rates
# were found by sweeps.
RECIPES = {
    "cpu": {
        "preset": "tiny",
        "pretrain": dict(
            steps=1100, batch_size=16, block_size=128, lr=8e-3, muon_lr=0.04, eval_every=100
        ),
        # Many small batches: at this size LoRA learns more from them than from few large
        # ones with the same tokens.
        "full": dict(steps=800, batch_size=8, block_size=128, lr=5e-4, eval_every=80),
        "lora": dict(
            steps=800, batch_size=8, block_size=128, lr=3e-3, eval_every=80, weight_decay=0.0
        ),
    },
    "gpu": {
        "preset": "small",
        "pretrain": dict(
            steps=600, batch_size=64, block_size=256, lr=4e-3, muon_lr=0.04, dropout=0.2
        ),
        "full": dict(
            steps=250, batch_size=32, block_size=256, lr=2e-4, eval_every=10, dropout=0.1
        ),
        "lora": dict(
            steps=250, batch_size=32, block_size=256, lr=3e-3, eval_every=10, dropout=0.1,
            weight_decay=0.0,
        ),
    },
}


def recipe(device):
    """The recipe for a device: "preset" names a shape; the others are dicts of settings."""
    return RECIPES["cpu" if torch.device(device).type == "cpu" else "gpu"]


def settings_for(kind, device, **changes):
    """The Settings of the recipe of `kind` ("pretrain", "full" or "lora"), with changes.

    A change of None keeps the recipe's value. Raises UsageError for an unknown
    setting or a value out of range.
    """
    unknown = changes.keys() - {f.name for f in fields(Settings)}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UsageError(f"unknown setting {names}; see train.py --help")
    changes = {name: value for name, value in changes.items() if value is not None}
    values = dict(recipe(device)[kind])
    values["loss_chunk"] = default_loss_chunk(
        device, head_trains=kind != "lora", compile=changes.get("compile", False)
    )
    dtype = changes.get("dtype") or default_dtype(device, changes.get("base_dtype"))
    values["dtype"] = dtype
    if dtype in fast_dtypes(device):
        values["base_dtype"] = dtype
    if kind != "lora":
        values["base_dtype"] = "float32"    # 16 bits would lose small updates
        check_no_frozen_base(changes.get("base_dtype"))
    values |= changes
    try:
        settings = Settings(**values)
        settings.check_processes()
    except ValueError as error:
        raise UsageError(error) from error
    return settings


def check_no_frozen_base(base_dtype):
    """Raises UsageError if weights that all train shall be stored in less than float32."""
    if base_dtype not in (None, "float32"):
        raise UsageError(
            f"--base-dtype {base_dtype} is how a frozen base is stored, so it needs --method "
            "lora; what trains all weights keeps them in float32"
        )


def fit_to_base(settings, config, device, chosen):
    """Adapt block_size and lr to the base, unless they were chosen. Returns Settings.

    A base wider than that of the recipe gets a smaller learning rate, in proportion
    to its width: a heuristic after μP (Yang et al. 2022, arXiv 2203.03466), which
    derives 1 / width for the hidden matrices of a model that Adam trains from scratch.
    """
    if settings.block_size > config.block_size:
        if chosen.get("block_size") is not None:
            raise UsageError(
                f"--block-size {settings.block_size} exceeds the base model's "
                f"{config.block_size}; use at most that"
            )
        settings = replace(settings, block_size=config.block_size)
    if chosen.get("lr") is None:
        width_of_recipe = GPTConfig.preset(recipe(device)["preset"]).n_embd
        width_ratio = min(1.0, width_of_recipe / config.n_embd)
        settings = replace(settings, lr=settings.lr * width_ratio)
    return settings


def settings_of(record):
    """The Settings of a finished run."""
    return Settings(**record["asked"]["settings"])


def default_dtype(device, base_dtype=None):
    """The dtype of products on a device, with a base of a dtype, or None for the usual one."""
    if base_dtype == "float16":
        return "float16"
    return "bfloat16" if has_bfloat16(device) else "float32"


def fast_dtypes(device):
    """The dtypes of 16 bits in which a device computes faster than in float32."""
    if torch.device(device).type != "cuda":
        return ()
    return ("bfloat16", "float16") if has_bfloat16(device) else ("float16",)


def has_bfloat16(device):
    """Whether the device is a GPU that computes in bfloat16."""
    is_cuda = torch.device(device).type == "cuda"
    return is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)


def default_loss_chunk(device, head_trains, compile=False):
    """How many logits the loss computes at a time.

    Small chunks fit in a CPU's cache and save GPU memory: a LoRA step of 8 × 1024
    tokens with 124M parameters on an H200 took 17.1, 16.7, 16.1 ms and 2.79, 2.85,
    2.99 GB with 2^24, 2^25, 2^26. If the head trains, each chunk reads and writes the
    head's whole gradient: full fine-tuning took 24.9 ms with 2^25, and 23.4 with 2^26.
    A compiled step is for speed, so it has the larger chunks.
    """
    device_type = torch.device(device).type
    if device_type == "cpu":
        return 2**20
    if device_type == "cuda":
        return 2**26 if head_trains or compile else 2**25
    return 2**22


def pick_device(name=None):
    """The device of this name, or the best there is. Raises UsageError if it does not work.

    Under torchrun "cuda" is the GPU of this process.
    """
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if parallel.launched_by_torchrun():
        if name == "cuda":
            name = parallel.own_device()
        elif name != "cpu" and name != parallel.own_device():
            raise UsageError(f"--device {name}: several processes need --device cuda or cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} cannot be used: {first_line(error)}") from error
    return name
