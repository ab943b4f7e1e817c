"""
What is tuned and how: an Arm. How large everything is: a Scale.
"""
from dataclasses import dataclass

ATTENTION = ("c_attn", "attn.c_proj")
MLP = ("c_fc", "mlp.c_proj")
SLICES = "qkv"          # the parts of c_attn, in the order in which its rows have them


@dataclass(frozen=True)
class Arm:
    """Everything that a run depends on, except its learning rate and its seed."""

    text: str = "pirate"
    width: int = 0                  # of the base, in channels; 0: that of Scale.width
    method: str = "lora"            # or "full"
    r: int = 8
    scaling: float = 2.0            # the factor of B A at r = 8 ...
    power: float = 1.0              # ... which goes with r to the minus this power
    matrices: str = "all"           # "all", "attention", "mlp", or letters of "qkvo"
    random: str = "A"               # the factor that begins random; the other one begins at zero
    frozen: str = ""                # the factor that does not train: "A", "B" or neither
    embeddings: bool | None = None  # whether they train; None: with "full" only
    b_rate: float = 1.0             # times the learning rate, for B
    embedding_rate: float = 1.0     # times the learning rate, for the embeddings
    base_dtype: str = ""            # of the frozen base; "": that of the recipe
    steps: int = 0                  # 0: Scale.steps
    batch_size: int = 0             # windows in a step; 0: Scale.batch_size

    @property
    def factor(self):
        """What B A is multiplied by."""
        return self.scaling * (8 / self.r)**self.power

    @property
    def trains_embeddings(self):
        return self.method == "full" if self.embeddings is None else self.embeddings

    @property
    def targets(self):
        """{rank: names of layers} for apply_lora.

        The slices of c_attn have adapters of their own: A has r rows for each of them.
        """
        names = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}
        if self.matrices in names:
            return {self.r: names[self.matrices]}
        found = {}
        if self.slices:
            found[self.r * len(self.slices)] = ("c_attn",)
        if "o" in self.matrices:
            found[self.r] = found.get(self.r, ()) + ("attn.c_proj",)
        return found

    @property
    def slices(self):
        """The parts of c_attn that have adapters of their own, as letters of "qkv"."""
        if self.matrices in ("all", "attention", "mlp"):
            return ""
        return "".join(letter for letter in SLICES if letter in self.matrices)


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    name: str
    width: int                      # of the base that most claims are tested on
    widths: tuple                   # of all bases
    head: int                       # channels of an attention head
    n_layer: int
    block_size: int
    pretrain_steps: int
    pretrain_batch: int
    steps: int                      # of a tuning run
    batch_size: int
    short: int                      # steps of a short run
    batches: tuple                  # batch sizes, at equal epochs
    ranks: tuple
    rates: int                      # learning rates in a sweep; each is twice the one before
    extensions: int                 # how often a sweep that ends at its edge is extended
    sweep_seeds: tuple              # the first one chooses rates, all of them show their spread
    seeds: tuple                    # of the runs whose results are reported
    texts: tuple = ("pirate", "bard", "noir")
    early: int = 10                 # steps whose training losses are kept
    forgetting_bytes: int = 2**15   # of the base's text, to measure forgetting on
    heldout_bytes: int = 2**17      # of a tuned text, at most
    stories: int = 2**20            # of the base's text that the base learns from, at most

    @property
    def low_rank(self):
        return self.ranks[0]

    @property
    def high_rank(self):
        return self.ranks[-1]


FULL_SIZE = Scale(
    "full", width=384, widths=(64, 128, 192, 384, 768), head=64, n_layer=6, block_size=256,
    pretrain_steps=600, pretrain_batch=64, steps=120, batch_size=32, short=40,
    batches=(8, 32, 128), ranks=(1, 4, 8, 16, 64), rates=5, extensions=4,
    sweep_seeds=(0, 6, 7), seeds=(1, 2, 3, 4, 5),
)

# Everything runs, on a CPU, in seconds. The numbers mean nothing.
MINI = Scale(
    "mini", width=32, widths=(16, 32), head=16, n_layer=1, block_size=16,
    pretrain_steps=4, pretrain_batch=2, steps=2, batch_size=2, short=1,
    batches=(1, 2), ranks=(1, 2, 8), rates=2, extensions=0, sweep_seeds=(0,), seeds=(1, 2),
    texts=("pirate", "noir"), early=2, forgetting_bytes=2**9, heldout_bytes=2**9, stories=40,
)
