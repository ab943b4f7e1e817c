"""
A GPT on disk: the directory that transformers writes for a GPT-2.

Two things differ from the model in memory. The files keep the four matrices of a
block as (in, out), where nn.Linear has (out, in), so they are transposed. And the
head is not stored: it is the embedding ("tied").
"""
from pathlib import Path

import torch

from gpt import GPT, GPTConfig
from lab import files
from lab.files import (
    advice_on_pickles,
    first_line,
    open_tensors,
    read_json,
    read_tensor,
    sha256_of,
    some,
    write_weights,
)
from lab.nf4 import quantize, quantize_linears

# What gpt.py implements, in the terms of transformers: the values that config.json
# may have. The first is what is written.
IMPLEMENTED = {
    "model_type": ["gpt2"],
    "architectures": [["GPT2LMHeadModel"], ["GPT2Model"]],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "tie_word_embeddings": [True],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


# ---- writing -----------------------------------------------------------------------

def write_model(model, dir, eos_token_id=None):
    """Write config.json and model.safetensors as transformers' GPT2LMHeadModel reads them.

    eos_token_id is the token that ends a text; by default the last of the vocabulary.
    Raises ValueError, and writes nothing, if the model has tensors that GPT-2 does
    not have.
    """
    shapes = file_shapes(model.config)
    state = {name: p.detach() for name, p in model.state_dict().items() if name != HEAD}
    unknown = state.keys() - shapes.keys()
    if unknown:
        raise ValueError(
            "cannot save: the model has tensors that GPT-2 does not have "
            f"({some(unknown)}). If it has LoRA, save the adapter with save_lora, or "
            "call merge_lora and remove_lora first"
        )
    tensors = {}
    for name, shape in shapes.items():
        # GPT-2 always has biases; those of a model without biases are zeros.
        tensor = state[name] if name in state else torch.zeros(shape)
        tensors[name] = (tensor.t() if is_transposed(name) else tensor).contiguous()
    config = config_json(model, eos_token_id)
    write_weights(dir, files.MODEL, tensors, files.MODEL_CONFIG, config)


def config_json(model, eos_token_id=None):
    """The content of config.json. Special tokens that the model was read with are kept."""
    config = model.config
    if eos_token_id is None:
        eos_token_id = config.vocab_size - 1
    special = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    special |= getattr(model, "special_tokens", {})
    content = {key: values[0] for key, values in IMPLEMENTED.items()}
    return {
        **content,
        "n_inner": None,                        # 4 * n_embd
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,             # what other programs read
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "bias": config.bias,
        **special,
        **dict.fromkeys(DROPOUTS, config.dropout),
    }


def file_shapes(config):
    """{name: shape} of a model's tensors in memory, with biases. Allocates no memory.

    Raises ValueError if they are too large to exist.
    """
    try:
        with torch.device("meta"):
            model = GPT(GPTConfig(**{**vars(config), "bias": True}))
    except RuntimeError as error:
        raise ValueError(f"a model of this shape cannot exist: {first_line(error)}") from error
    # named_parameters() yields the tied tensor once, as the embedding.
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def is_transposed(name):
    """Whether a tensor is stored as (in, out). The shape of a square one cannot tell."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


# ---- reading -----------------------------------------------------------------------

def read_model(cls, name_or_dir, dropout=None, device="cpu", dtype=torch.float32, nf4=False):
    """GPT.from_pretrained, on a device and with weights of a float dtype.

    With nf4 the matrices of the blocks are kept in four bits (lab/nf4.py), and the model
    is frozen. Holds one tensor of the files at a time, beside the model.
    """
    dir = model_dir(name_or_dir)
    config = read_config(dir / files.MODEL_CONFIG, dropout)
    stored = find_tensors(dir)
    if EMBEDDING not in stored and HEAD in stored:      # saved under one name
        stored[EMBEDDING] = stored[HEAD]
    head = stored.pop(HEAD, None)
    if config.n_layer > len(stored):        # before making so many layers
        raise ValueError(
            f"{dir}: config.json has {config.n_layer} layers, but there are only "
            f"{len(stored)} tensors"
        )
    check_shapes(dir, config, stored)
    with torch.device("meta"):
        model = cls(config)                 # takes no memory, and no time to initialize
    model.to(dtype)
    if nf4:
        quantize_linears(model)             # layers without content yet, like the others
    model.to_empty(device=device)
    model.lm_head.weight = model.transformer.wte.weight         # to_empty has untied them
    own = dict(model.named_parameters())
    for name, tensor in stored.items():
        if name in own:
            fill(dir, name, own[name], tensor)
        elif tensor.read().float().any():
            raise ValueError(f"{dir}: config.json says bias=false, but {name} is not zero")
    raw = read_json(dir / files.MODEL_CONFIG)
    model.special_tokens = {key: raw[key] for key in SPECIAL_TOKENS if key in raw}
    if head is not None and not equal_tensors(head, stored[EMBEDDING]):
        raise ValueError(f"{dir} has a head of its own; in GPT-2 it is the embedding (tied)")
    return model


def equal_tensors(stored, other):
    """Whether two StoredTensors have the same content."""
    return torch.equal(stored.read().float(), other.read().float())


class StoredTensor:
    """Where a tensor is: its file, its name in the file, and its shape there."""

    def __init__(self, path, name, shape):
        self.path = path
        self.name = name
        self.shape = shape

    def read(self):
        return read_tensor(self.path, self.name)


def find_tensors(dir):
    """{GPT-2's full name: StoredTensor} of all the weight files of a directory."""
    stored = {}
    for path in weight_files(dir):
        with open_tensors(path) as file:
            names = file.keys()
            for name in names:
                if name.endswith((".attn.bias", ".attn.masked_bias")):
                    continue                # the causal masks, which old files contain
                if full_name(name) in stored:
                    raise ValueError(f"{dir} has two tensors for {full_name(name)}")
                shape = tuple(file.get_slice(name).get_shape())
                stored[full_name(name)] = StoredTensor(path, name, shape)
    return stored


def full_name(name):
    """Old files leave out the prefix: "wte.weight" -> "transformer.wte.weight"."""
    if name.startswith(("transformer.", "lm_head.")):
        return name
    return f"transformer.{name}"


def check_shapes(dir, config, stored):
    """Raises ValueError if the stored tensors are not those of a GPT of this config."""
    expected = {}
    for name, shape in file_shapes(config).items():
        expected[name] = shape[::-1] if is_transposed(name) else shape
    missing = expected.keys() - stored.keys()
    unknown = stored.keys() - expected.keys()
    known = expected.keys() & stored.keys()
    misshapen = {name for name in known if stored[name].shape != expected[name]}
    problems = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"{dir}: the weights do not fit config.json; {problem}: {some(names)}"
            )


@torch.no_grad()
def fill(dir, name, p, stored):
    """Copy a stored tensor into the parameter p, whatever dtype it is stored in."""
    tensor = stored.read()
    if not tensor.is_floating_point():
        raise ValueError(f"{dir}: {name} is {tensor.dtype}; expected a float type")
    tensor = tensor.to(p.device)
    if not tensor.isfinite().all():
        raise ValueError(
            f"{dir}: {name} contains NaN or infinity; the file is damaged, or its "
            "training diverged"
        )
    tensor = tensor.t() if is_transposed(name) else tensor
    if p.is_floating_point():
        p.copy_(tensor)
    else:
        p.copy_(quantize(tensor))
    if p.is_floating_point() and not p.isfinite().all():
        raise ValueError(
            f"{dir}: {name} has numbers too large for {p.dtype}; choose another "
            "--base-dtype"
        )


def read_config(path, dropout=None):
    """Returns the GPTConfig in a config.json; `dropout` replaces the stored one.

    Raises FileNotFoundError if there is none, ValueError if it describes another kind of model.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a model directory holds config.json and "
            "model.safetensors, and the names of models to download are "
            f"{', '.join(HUB_NAMES)}"
        )
    raw = read_json(path)
    try:
        refuse_other_models(raw)
        return GPTConfig(
            vocab_size=raw["vocab_size"],
            block_size=raw["n_positions"],
            n_layer=raw["n_layer"],
            n_head=raw["n_head"],
            n_embd=raw["n_embd"],
            dropout=raw.get("resid_pdrop", 0.0) if dropout is None else dropout,
            bias=raw.get("bias", True),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; the config of a GPT-2 has it") from error


def refuse_other_models(raw):
    """Raises ValueError if config.json asks for what gpt.py does not implement."""
    allowed = {**IMPLEMENTED, "n_inner": [None, 4 * raw["n_embd"]]}
    refused = []
    for key, values in allowed.items():
        if key in raw and raw[key] not in values:
            refused.append(f"{key}={raw[key]!r} (expected {values[0]!r})")
    if refused:
        raise ValueError(f"not the GPT-2 that gpt.py implements: {some(refused)}")


def weight_files(dir):
    """The safetensors files of a model directory: a single one, or those that an
    index lists.

    Raises FileNotFoundError if one is missing, ValueError if the index is damaged.
    """
    index = Path(dir, files.MODEL_INDEX)
    names = {files.MODEL}
    if index.is_file() and not Path(dir, files.MODEL).is_file():
        names = names_in_index(index)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it")
        if not Path(dir, name).is_file():
            raise FileNotFoundError(
                f"{Path(dir, name)} does not exist; a model directory holds "
                f"config.json and {name}"
                + advice_on_pickles(dir)
            )
    return sorted(Path(dir, name) for name in names)


def names_in_index(index):
    try:
        return set(read_json(index)["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weight files: {error!r}") from error


def model_dir(name_or_dir):
    """The directory of a model; "gpt2", ..., "gpt2-xl" are downloaded if they are not there yet.

    Everything else, and a directory with such a name, is taken as a path. Raises
    OSError if the download fails.
    """
    name = str(name_or_dir)
    if name in HUB_NAMES and not Path(name).is_dir():
        return downloaded(name)
    return Path(name_or_dir)


def downloaded(name):
    """The directory where huggingface_hub keeps the model of this name."""
    try:
        from huggingface_hub import snapshot_download  # optional: only needed here
    except ImportError as error:
        raise OSError(
            f"{name} is downloaded with huggingface_hub, which is not installed: pip "
            "install huggingface_hub, or give a directory"
        ) from error
    wanted = [files.MODEL_CONFIG, files.MODEL, files.TOKENIZER]
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=wanted))
    except Exception as error:      # HTTP errors, a full disk: no common base class
        raise OSError(
            f"{name} is not in the cache of huggingface_hub and cannot be downloaded "
            f"({type(error).__name__}: {first_line(error)}); check the network, or "
            "give a directory"
        ) from error


def fingerprint(name_or_dir):
    """A hash of a model's weights, 16 hexadecimal digits."""
    return sha256_of(*weight_files(model_dir(name_or_dir)))[:16]
