"""
GPT-2 in one file (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", §2.3).

A GPT reads T tokens and gives, at each of them, a score for every vocabulary entry to be the next token:

    x = wte[token] + wpe[position]                what is said + where it is said
    x = x + Attention(LayerNorm(x))               look back at earlier tokens      } n_layer
    x = x + MLP(LayerNorm(x))                     think about what was found       } times
    logits = LayerNorm(x) @ wte.T                 the head is the embedding again ("tied")

Shapes in the comments: B batch, T time (tokens), C channels (n_embd), H heads, D = C / H head size, V vocabulary,
S tokens read so far. The modules carry GPT-2's own names, so its weights and its adapters fit.

    model = GPT(GPTConfig.preset("tiny"))
    logits, loss = model(idx, targets)            # one training step's forward
    model.generate(idx, max_new_tokens=50)        # write on
"""
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError for a shape that cannot be built."""
    vocab_size: int          # V
    block_size: int          # the longest context in tokens
    n_layer: int
    n_head: int              # H
    n_embd: int              # C, a multiple of n_head
    dropout: float = 0.0     # after the embedding, in the attention and on both residual branches
    bias: bool = True        # in linears and layer norms; GPT-2 has them

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name} is {value!r}; it must be a positive integer, below 2^31")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not divide into {self.n_head} heads; choose a multiple")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; it must be a number from 0 up to, not including, 1")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias is {self.bias!r}; it must be true or false")

    @classmethod
    def preset(cls, name, **changes):
        """A named shape; `changes` replace single fields: GPTConfig.preset("tiny", vocab_size=5000)."""
        if name not in PRESETS:
            raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


def _shape(vocab_size, block_size, n_layer, n_head, n_embd):
    return dict(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)


PRESETS = {
    "tiny": _shape(2048, 128, 4, 4, 128),                # 1.1M parameters: a laptop's CPU
    "small": _shape(2048, 256, 6, 6, 384),               # 11.5M: a GPU
    "gpt2": _shape(50257, 1024, 12, 12, 768),            # 124M
    "gpt2-medium": _shape(50257, 1024, 24, 16, 1024),    # 355M
    "gpt2-large": _shape(50257, 1024, 36, 20, 1280),     # 774M
    "gpt2-xl": _shape(50257, 1024, 48, 25, 1600),        # 1.56B
}


class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and the tokens before it: softmax(q kᵀ / √D) v (Vaswani et al. 2017, §3.2)."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)     # query, key, value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, past=None):
        """x (B, T, C) -> y (B, T, C), and (k, v), each (B, H, S, D): what later tokens need of these and earlier ones.

        `past` is the (k, v) of the tokens before x. With it x is one token (T = 1), which may look at everything,
        so there is nothing to mask."""
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))  # (B,H,T,D)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)                           # (B,H,S,D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None,
                                           dropout_p=self.dropout if self.training else 0.0)               # (B,H,T,D)
        y = y.transpose(1, 2).reshape(B, T, C)                                                              # heads side by side
        return self.resid_dropout(self.c_proj(y)), (k, v)


class MLP(nn.Module):
    """Each token on its own: widen to 4C, bend, narrow. GPT-2's GELU is the tanh approximation."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        y, present = self.attn(self.ln_1(x), past)
        x = x + y
        return x + self.mlp(self.ln_2(x)), present


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.loss_chunk = 0             # > 0: compute the loss for that many logits at a time (ChunkedLoss); 0: all at once
        self.recompute = False          # training keeps each block's input alone and computes the rest again (checkpointing)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight      # tied (Press & Wolf 2017)
        # GPT-2's initialisation: N(0, 0.02); the two linears that write into the residual stream start smaller by
        # √(number of such writes), so that the stream's variance does not grow with depth (§2.3 of the paper).
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, V), and the mean cross-entropy in nats against targets (B, T), or None.

        Targets of -100 do not count. With loss_chunk and targets the logits never exist whole: None in their place.
        Raises ValueError when T exceeds the block size."""
        x = self._read(idx)
        if targets is not None and self.loss_chunk:
            return None, ChunkedLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.loss_chunk)
        logits = self.lm_head(x)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    def _read(self, idx, cache=None):
        """idx (B, T) -> the hidden states (B, T, C) that the head reads. `cache`, a list with one entry per block, holds
        None or the (k, v) of the tokens before idx; it is brought up to date."""
        start = 0 if cache is None or cache[0] is None else cache[0][0].size(2)
        if start + idx.size(1) > self.config.block_size:
            raise ValueError(f"{start + idx.size(1)} tokens exceed the model's block size of {self.config.block_size}")
        pos = torch.arange(start, start + idx.size(1), device=idx.device)[None]            # (1, T)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))   # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            if cache is not None:
                x, cache[i] = block(x, cache[i])
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(lambda x, block=block: block(x)[0], x, use_reentrant=False)
            else:
                x, _ = block(x)
        return self.transformer.ln_f(x)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None):
        """Continue idx (B, T) int64, T >= 1, by up to max_new_tokens: (B, T + n) int64, the prompt included.

        temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the fewest that hold p of the
        probability. A row that has written stop_token is filled with it from there on; all rows done ends the loop.
        While the text fits the block size, keys and values are cached and each step reads one token. Beyond it the
        window slides over the last block_size tokens; every position then changes, so each step reads it anew.
        Draws from torch's global generator."""
        if idx.dim() != 2 or idx.size(1) < 1:
            raise ValueError(f"idx has the shape {tuple(idx.shape)}; expected (B, T) with at least one token a row")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a positive number")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1, or None to keep every token")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must lie in (0, 1], or be None to keep every token")
        was_training, block_size = self.training, self.config.block_size
        self.eval()
        cache, done = None, torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            fresh = cache is None or idx.size(1) > block_size
            cache = [None] * self.config.n_layer if fresh else cache
            x = self._read(idx[:, -block_size:] if fresh else idx[:, -1:], cache)          # (B, block_size or 1, C)
            logits = self.lm_head(x[:, -1])                                                # (B, V)
            if (fresh or not idx.is_cuda) and not logits.isfinite().all():                 # on a GPU it would wait every time
                raise ArithmeticError("the model's logits are not finite; its weights are damaged, or its training diverged")
            token = sample(logits, temperature, top_k, top_p)                              # (B, 1)
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            idx = torch.cat((idx, token), dim=1)
            if stop_token is not None and done.all():
                break
        self.train(was_training)
        return idx

    def save_pretrained(self, dir):
        """Write config.json and model.safetensors as transformers' GPT2LMHeadModel reads them (float32 as float32, …).

        Raises ValueError when the model is not a plain GPT (LoRA still on it, say): nothing is written then."""
        shapes = dict(_file_shapes(self.config))
        state = {name: p for name, p in self.state_dict().items() if name != "lm_head.weight"}   # tied: saved as wte
        if not state.keys() <= shapes.keys():
            raise ValueError(f"this model has tensors that GPT-2 has not: {_some(state.keys() - shapes.keys())}. "
                             "If it wears LoRA, save the adapter alone, or merge and remove it first")
        tensors = {}
        for name, shape in shapes.items():      # transformers' GPT-2 always has biases: without them they are zeros
            tensor = state[name].detach() if name in state else torch.zeros(shape)
            tensors[name] = (tensor.t() if _is_conv1d(name) else tensor).contiguous()
        Path(dir).mkdir(parents=True, exist_ok=True)
        with replacing(Path(dir, "model.safetensors")) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        c = self.config
        with replacing(Path(dir, "config.json")) as path:
            path.write_text(json.dumps({
                **FIXED, "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_layer": c.n_layer,
                "n_head": c.n_head, "n_embd": c.n_embd, "bias": c.bias, "bos_token_id": c.vocab_size - 1,
                "eos_token_id": c.vocab_size - 1, **{p: c.dropout for p in DROPOUTS}}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name_or_dir, dropout=None):
        """Read a directory written by save_pretrained, or by transformers for a GPT-2; or fetch "gpt2" … "gpt2-xl" through
        huggingface_hub. `dropout` replaces the stored one. Weights become float32.

        Raises OSError where a file is missing or cannot be fetched, ValueError where one is damaged or describes another
        model."""
        dir = pretrained_dir(name_or_dir)
        config = _read_config(dir / "config.json", dropout)
        try:
            found = {}                  # GPT-2's name for a tensor -> its file, the name in it, and its shape
            for path in weight_files(dir):
                with safe_open(path, framework="pt") as file:
                    found |= {_name_in_gpt2(name): (path, name, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
            found.pop(None, None)
            head = found.pop("lm_head.weight", None)
            if config.n_layer > len(found):         # before as many are made
                raise ValueError(f"{dir}: config.json has {config.n_layer} layers, and the weights are {len(found)} tensors")
            shapes = {name: shape[::-1] if _is_conv1d(name) else shape for name, shape in _file_shapes(config)}
            wrong = [name for name in shapes.keys() | found.keys() if found.get(name, (0, 0, 0))[2] != shapes.get(name)]
            if wrong:
                raise ValueError(f"{dir}: the weights do not fit config.json; missing, unknown or of another shape: "
                                 f"{_some(wrong)}")
            with torch.device("meta"):
                model = cls(config)             # takes no memory, and no time to initialise
            model.to_empty(device="cpu")
            model.lm_head.weight = model.transformer.wte.weight         # tied again
            with torch.no_grad():
                for name, p in model.named_parameters():
                    tensor = _read_tensor(*found[name])
                    p.copy_(tensor.t() if _is_conv1d(name) else tensor)
                    if not p.isfinite().all():
                        raise ValueError(f"{dir}: {name} holds NaN or infinite numbers; the file is damaged, or its training "
                                         "diverged")
            if head and not torch.equal(_read_tensor(*head).float(), model.lm_head.weight):
                raise ValueError(f"{dir} has a head of its own; in GPT-2 it is the embedding (tied)")
        except SafetensorError as error:
            raise ValueError(f"{dir}: a weight file is not a whole safetensors file ({error}); fetch or write it again"
                             ) from error
        return model


class ChunkedLoss(torch.autograd.Function):
    """The mean cross-entropy of x Wᵀ (N, V) against targets (N,), computed for about `chunk` logits at a time.

    Logits are the largest tensor of a training step: 8 × 1024 tokens × 50,257 entries are 1.6 GB in float32, and a plain
    loss makes several of that size. Here only one chunk exists at a time. Its gradient is known at once,
    softmax(x Wᵀ) - onehot(target), so it is turned into those of x and W on the spot, and the chunk is forgotten.
    A frozen W, as under LoRA, gets none.

    V is filled up to a multiple of 8 with rows of zeros that the softmax does not see: with GPT-2's 50,257 the matrix
    products, misaligned, took 15 of 39 ms of a 124M step on an H200."""

    @staticmethod
    def forward(ctx, x, W, targets, chunk):
        device, V = x.device.type, len(W)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            counts = targets != -100
            exact = torch.float32 if dtype.itemsize < 4 else dtype              # for sums and logarithms
            scale = (counts / counts.sum()).to(exact)                           # (N,): what a row adds to the mean
            x_, W_, targets = x.to(dtype), W.to(dtype), targets.clamp_min(0)[:, None]
            W_ = F.pad(W_, (0, 0, 0, -V % 8)) if V % 8 else W_
            dx, loss = torch.empty_like(x_), torch.zeros((), dtype=exact, device=x.device)
            dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
            rows = max(8, chunk // V // 8 * 8)
            for i in range(0, len(x), rows):
                part = slice(i, i + rows)
                logits = x_[part] @ W_.t()                                      # (rows, V filled up)
                log_p = logits[:, :V].log_softmax(dim=-1, dtype=exact)
                log_p_target = log_p.gather(1, targets[part])                   # (rows, 1)
                loss -= (log_p_target.squeeze(1) * scale[part]).sum()
                torch.exp(log_p, out=logits[:, :V])                             # softmax, where the logits were; the fill
                logits.scatter_(1, targets[part], (log_p_target.exp() - 1).to(dtype))       # is zero from the product
                torch.mm(logits, W_, out=dx[part])
                if dW is not None:
                    dW += (logits.t() @ (x_[part] * scale[part, None]).to(dtype))[:V]
            ctx.save_for_backward(dx * scale[:, None].to(dtype), dW)
            ctx.dtype = x.dtype
        return loss

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("ChunkedLoss has no second derivative; with loss_chunk = 0 the loss has one")
        dx, dW = ctx.saved_tensors
        return (dx * g).to(ctx.dtype), None if dW is None else dW * g, None, None


def sample(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw one token a row: logits (B, V) -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p          # the likelier tokens hold top_p already
        logits = torch.full_like(logits, -math.inf).scatter(1, order, ordered.masked_fill(beyond, -math.inf))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


# ---- files: transformers' layout on disk, ours in memory -------------------------------------------------------------

DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
FIXED = {   # what this file implements, in transformers' words: written as it stands, and demanded of what is read
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_inner": None,
    "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}


def pretrained_dir(name_or_dir):
    """"gpt2" … "gpt2-xl" -> the directory where huggingface_hub keeps that model and its tokenizer, fetched if not there
    yet; anything else, and a directory of such a name, is taken as it stands. Raises OSError where it cannot be fetched."""
    if Path(name_or_dir).is_dir() or name_or_dir not in PRESETS or not name_or_dir.startswith("gpt2"):
        return Path(name_or_dir)
    try:
        from huggingface_hub import snapshot_download       # optional: only this needs it
        return Path(snapshot_download(f"openai-community/{name_or_dir}",
                                      allow_patterns=["config.json", "model.safetensors", "tokenizer.json"]))
    except ImportError as error:
        raise OSError(f"{name_or_dir} is fetched by huggingface_hub, which is not installed: pip install huggingface_hub; "
                      "or give a directory") from error
    except Exception as error:      # its errors have no common ancestor: HTTP, time-outs, a full disk
        raise OSError(f"{name_or_dir} is not in huggingface_hub's cache and cannot be fetched ({type(error).__name__}: "
                      f"{str(error).splitlines()[0]}); check the network, or give a directory") from error


def weight_files(dir):
    """The safetensors files of a model directory: one, or those that an index lists. Raises FileNotFoundError, ValueError."""
    index = Path(dir, "model.safetensors.index.json")
    names = {"model.safetensors"}
    if index.is_file() and not Path(dir, "model.safetensors").is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is not an index of weight files: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it")
        if not Path(dir, name).is_file():
            pickled = [path.name for path in Path(dir).glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
            raise FileNotFoundError(f"{Path(dir, name)} does not exist; a model directory holds config.json and {name}" + (
                f". {pickled[0]} is a pickle, which can run any code when it is read: convert it with transformers, "
                "GPT2LMHeadModel.from_pretrained(dir).save_pretrained(new_dir)" if pickled else ""))
    return sorted(Path(dir, name) for name in names)


def _read_tensor(path, name, shape):
    """One tensor of a file, which is closed again: kept open, what has been read of it would stay in memory too."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _name_in_gpt2(name):
    """GPT-2's full name for a tensor of a file; None for the causal masks that old files carry."""
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _is_conv1d(name):
    """GPT-2's files keep the blocks' matrices as (in, out); nn.Linear is (out, in). One is square: shape cannot tell."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _file_shapes(config):
    """(name, shape) of every tensor of the file, before the transpose. Built on the meta device: no memory is used."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**vars(config), "bias": True}))
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]      # names a tied tensor once, as wte


def _read_config(path, dropout):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model directory holds config.json and model.safetensors")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        shape = {ours: raw[theirs] for ours, theirs in dict(vocab_size="vocab_size", block_size="n_positions",
                                                            n_layer="n_layer", n_head="n_head", n_embd="n_embd").items()}
        same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * shape["n_embd"], "architectures": ["GPT2Model"]}
        other = [f"{key}={raw[key]!r} (expected {value!r})" for key, value in FIXED.items()
                 if raw.get(key, value) not in (value, same.get(key, value))]       # `same` means the same here
        if other:
            raise ValueError(f"not the GPT-2 that gpt.py implements: {_some(other)}")
        dropout = raw.get("resid_pdrop", 0.0) if dropout is None else dropout
        return GPTConfig(**shape, dropout=dropout, bias=raw.get("bias", True))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:     # a JSON or UTF-8 error is a ValueError
        raise ValueError(f"{path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; a GPT-2 config names it") from error


def _some(names, most=4):
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def replacing(path):
    """`with replacing(path) as beside:` write `beside`, then it is flushed to disk and moved onto path in one step:
    whatever dies when, path is the old file or the new one, whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except SafetensorError as error:            # save_file's word for a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
