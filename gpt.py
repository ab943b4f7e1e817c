"""
GPT-2 in one file (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners").

A GPT reads T tokens. At each position it outputs one score (a logit) for every entry
of its vocabulary: how likely that entry is to be the next token.

    x = wte[token] + wpe[position]         embed what each token is and where it stands
    x = x + Attention(LayerNorm(x))        gather information from earlier tokens  } n_layer
    x = x + MLP(LayerNorm(x))              process it, each position on its own    } times
    logits = LayerNorm(x) @ wte.T          compare with every embedding (a "tied" head)

x is called the residual stream: every block reads it, and adds to it. Read the file
from the top: the configuration, attention, the MLP, a block, the model, sampling.

    model = GPT(GPTConfig.preset("tiny"))
    logits, loss = model(idx, targets)                  # forward pass of a training step
    idx = model.generate(idx, max_new_tokens=50)        # continue a prompt

The parameters have GPT-2's own names, so its weights and adapters fit. wte and wpe
are the embeddings of tokens and of positions; h are the blocks; c_attn makes q, k and
v; c_proj projects back to the residual stream; c_fc is the first layer of the MLP;
ln_ are layer norms. (c_ because GPT-2 wrote these layers as convolutions of width 1.)

Letters in the shape comments: B batch, T time (tokens), C channels (n_embd), H heads,
D = C / H channels of a head, V vocabulary entries, S tokens so far (cached ones
included).
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PRESET_FIELDS = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
PRESETS = {
    "tiny":        (2048,        128,       4,      4,    128),     # 1.1M parameters, for a CPU
    "small":       (2048,        256,       6,      6,    384),     # 11.5M, for a GPU
    "gpt2":        (50257,      1024,      12,     12,    768),     # 124M
    "gpt2-medium": (50257,      1024,      24,     16,   1024),     # 355M
    "gpt2-large":  (50257,      1024,      36,     20,   1280),     # 774M
    "gpt2-xl":     (50257,      1024,      48,     25,   1600),     # 1.56B
}


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError if the shape is invalid."""

    vocab_size: int         # V
    block_size: int         # the longest context, in tokens
    n_layer: int
    n_head: int             # H
    n_embd: int             # C, a multiple of n_head
    dropout: float = 0.0    # of the embeddings, attention weights, and both outputs of a block
    bias: bool = True       # in linear layers and layer norms; GPT-2 has them

    def __post_init__(self):
        for name in PRESET_FIELDS:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{name} is {value!r}; expected an integer from 1 to 2^31 - 1")
        if self.n_embd % self.n_head != 0:
            raise ValueError(
                f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}): "
                "the channels are divided among the heads"
            )
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; expected a number in [0, 1)")
        if type(self.bias) is not bool:
            raise ValueError(f"bias is {self.bias!r}; expected True or False")

    @classmethod
    def preset(cls, name, **changes):
        """The preset of this name; `changes` override fields: preset("tiny", n_layer=2).

        Raises ValueError if there is none.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        shape = dict(zip(PRESET_FIELDS, PRESETS[name]))
        return cls(**(shape | changes))


class CausalSelfAttention(nn.Module):
    """Each token gathers information from itself and from earlier tokens.

    y = softmax(q kᵀ / √D) v for every head; a mask hides later tokens (Vaswani et al.
    2017, §3.2).
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)     # q, k and v
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.attn_dropout = config.dropout                      # a probability
        self.n_head = config.n_head

    def forward(self, x, past=None):
        """x (B, T, C) -> y (B, T, C), and the KV cache (k, v), each (B, H, S, D).

        The KV cache holds the keys and values of all tokens so far. During generation
        it is passed as `past`, so that each step computes only those of the one new
        token (T = 1). In training `past` is None, and the returned cache is ignored.
        """
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)                # (B, T, C) each
        q = q.view(B, T, H, D).transpose(1, 2)                  # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)                  # (B, H, T, D)
        v = v.view(B, T, H, D).transpose(1, 2)                  # (B, H, T, D)
        if past is not None:
            past_k, past_v = past
            k = torch.cat((past_k, k), dim=2)                   # (B, H, S, D)
            v = torch.cat((past_v, v), dim=2)                   # (B, H, S, D)
        y = F.scaled_dot_product_attention(
            q, k, v,
            is_causal=past is None,     # a single new token may attend to all before it
            dropout_p=self.attn_dropout if self.training else 0.0,
        )                                                       # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)                  # the heads side by side
        return self.resid_dropout(self.c_proj(y)), (k, v)


class MLP(nn.Module):
    """A small network applied at each position: expand to 4C, apply GELU, back to C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        h = F.gelu(self.c_fc(x), approximate="tanh")            # (B, T, 4C), as in GPT-2
        return self.dropout(self.c_proj(h))


class Block(nn.Module):
    """Attention and an MLP; each adds its output to the residual stream x."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        """x (B, T, C) -> x (B, T, C) and the updated KV cache of this block."""
        y, present = self.attn(self.ln_1(x), past)
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return x, present


def plain_loss(x, head, targets):
    """The logits, and their mean cross-entropy in nats.

    x (B, T, C) are hidden states, head is the linear layer C -> V, and targets is
    (B, T) int64, where -100 is ignored. Returns logits (B, T, V) and the loss ().
    """
    logits = head(x)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    return logits, loss


class GPT(nn.Module):
    """GPT-2: embeddings, blocks, a final layer norm, and a head tied to the embedding.

    Two attributes may be set from outside:

    loss        a function like plain_loss
    recompute   if True, training keeps only the input of each block, and recomputes the rest
                in the backward pass ("gradient checkpointing"). That saves memory, and costs
                a second forward pass.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.loss = plain_loss
        self.recompute = False
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight       # tied (Press & Wolf 2017)
        self.init_weights()

    def init_weights(self):
        """Weights from N(0, 0.02²), biases zero.

        Each block adds to the residual stream twice. The weights of these 2 n_layer
        projections are divided by √(2 n_layer), so that all of them together add the
        same variance, however many there are (§2.3).
        """
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, V) and the loss () against targets (B, T).

        Without targets the loss is None. The chunked loss never holds all logits, so
        with it the logits are None. Raises ValueError if T exceeds the block size.
        """
        x = self.hidden(idx)                                    # (B, T, C)
        if targets is None:
            return self.lm_head(x), None
        return self.loss(x, self.lm_head, targets)

    def hidden(self, idx, cache=None):
        """idx (B, T) -> the hidden states (B, T, C) that the head turns into logits.

        `cache` has one entry for each block: its KV cache (k, v) or, at first, None.
        The list is updated in place. If it is filled, idx must be a single new token
        (B, 1).
        """
        T = idx.size(1)
        start = 0                                               # tokens in the cache
        if cache is not None and cache[0] is not None:
            k, _ = cache[0]
            start = k.size(2)
            if T != 1:
                raise ValueError(f"{T} tokens with a filled cache; pass a single one")
        if start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} tokens exceed the block size; pass at most "
                f"{self.config.block_size}"
            )
        pos = torch.arange(start, start + T, device=idx.device)[None]       # (1, T)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)           # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if cache is not None:
                x, cache[i] = block(x, cache[i])
            elif self.recompute and torch.is_grad_enabled():
                x, _ = checkpoint(block, x, use_reentrant=False)
            else:
                x, _ = block(x)
        return self.transformer.ln_f(x)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 stop_token=None):
        """Continue each row by up to max_new_tokens tokens, in eval mode.

        idx (B, T) int64 -> (B, T + n) int64, the prompt included. For temperature,
        top_k and top_p see sample(). After its first stop_token a row is filled with
        stop_token; when all rows are done, generation ends.

        Raises ValueError if an argument is out of range, ArithmeticError if the
        logits are not finite.
        """
        if idx.dim() != 2 or idx.size(1) < 1:
            raise ValueError(
                f"idx has shape {tuple(idx.shape)}; expected (B, T) with at least "
                "one token a row"
            )
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        # Every module gets its own mode back: a user may have set some to eval.
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return self.continue_rows(idx, max_new_tokens, temperature, top_k, top_p, stop_token)
        finally:
            for module, was_training in modes:
                module.training = was_training

    def continue_rows(self, idx, max_new_tokens, temperature, top_k, top_p, stop_token):
        """The loop of generate(): logits, sample, append.

        While the text fits the block size, each step reads only the new token and
        uses the KV cache. Once it is longer, the context is the last block_size
        tokens. Their positions shift at every step, so the cache cannot be reused.
        """
        block_size = self.config.block_size
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        cache = None
        for n in range(max_new_tokens):
            context = idx[:, -1:]                               # (B, 1)
            if cache is None or idx.size(1) > block_size:
                context = idx[:, -block_size:]                  # (B, block_size or less)
                cache = [None] * self.config.n_layer
            x = self.hidden(context, cache)                     # (B, 1 or more, C)
            logits = self.lm_head(x[:, -1])                     # (B, V)
            if n == 0 or idx.device.type == "cpu":      # a GPU would wait for each check
                check_finite(logits)
            token = sample(logits, temperature, top_k, top_p)   # (B, 1)
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            idx = torch.cat((idx, token), dim=1)
            if stop_token is not None and done.all():
                break
        return idx

    def save_pretrained(self, dir):
        """Write config.json and model.safetensors into `dir`, as transformers reads them.

        Raises ValueError, and writes nothing, if the model is not a plain GPT (has LoRA).
        """
        from lab import gpt2_files
        gpt2_files.write_model(self, dir)

    @classmethod
    def from_pretrained(cls, name_or_dir, dropout=None):
        """Read a directory of save_pretrained or transformers, or download "gpt2" etc.

        `dropout` replaces the stored one. Returns a GPT with float32 weights on the
        CPU. Raises OSError if a file is missing or cannot be downloaded, ValueError
        if one is damaged or describes another kind of model.
        """
        from lab import gpt2_files
        return gpt2_files.read_model(cls, name_or_dir, dropout)


def check_finite(logits):
    """Raises ArithmeticError if a logit is NaN or infinite."""
    if not logits.isfinite().all():
        raise ArithmeticError(
            "the model's logits are not finite: its weights are damaged, or its "
            "training diverged"
        )


def check_sampling(max_new_tokens, temperature, top_k, top_p):
    """Raises ValueError if an argument of generate() or sample() is out of range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a finite number from 0 up")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ValueError(f"top_k is {top_k}; expected an integer from 1 up, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a number in (0, 1], or None for no limit")


def sample(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw one token for each row: logits (B, V) -> (B, 1) int64.

    temperature divides the logits; 0 is greedy, the most likely token. top_k keeps
    the k most likely tokens, top_p the smallest set of tokens whose probabilities sum
    to at least p (Holtzman et al. 2020, §3.1). Draws with torch's global generator.
    """
    if temperature < 1e-6:                      # practically greedy; avoids dividing by 0
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]      # (B, 1)
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)                           # (B, V) each
        p = ordered.softmax(dim=-1)
        p_before = p.cumsum(dim=-1) - p         # the probability of all more likely tokens
        beyond = p_before >= top_p
        beyond[:, 0] = False                    # the most likely token always stays
        ordered = ordered.masked_fill(beyond, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(1, order, ordered)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)             # (B, 1)
