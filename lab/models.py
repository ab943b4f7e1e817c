"""
A model directory and its tokenizer, together: load, save, sample from, merge an adapter into.
"""
from functools import partial
from pathlib import Path

import torch

from data import HELDOUT, is_url, read_text, tokenize
from gpt import GPT
from lab import files
from lab.adapters import Adapters
from lab.chunked_loss import chunked_loss
from lab.console import WIDTH, say, shell_quoted, side_by_side
from lab.files import name_of, sha256_of
from lab.gpt2_files import fingerprint, model_dir, read_model, write_model
from lab.nf4 import LAYERS, HasNF4Weight, lora_classes
from lab.parallel import check_equal, from_first, together
from lab.runs import MAY, open_run, read_record
from lab.settings import UsageError, default_loss_chunk, pick_device
from lab.tokenizer_files import load_tokenizer, save_tokenizer
from lora_minimal import apply_lora, find_targets, merge_lora, remove_lora, save_lora

PROMPT = "The old lighthouse"
LONGEST_PROMPT = 2**16      # characters that are encoded at a time
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
A GPT-2 of {n:,} parameters. Load it with `transformers.GPT2LMHeadModel.from_pretrained(dir)`.
"""


def load_model(base, device, dropout=0.0, dtype="float32", compute_dtype="float32"):
    """Load a base model: a directory, or the name of a GPT-2.

    dtype           of the weights: "float32", "bfloat16", "float16", or "nf4" for the matrices
                    of the blocks in four bits (lab/nf4.py)
    compute_dtype   with nf4, the dtype of the embeddings, norms and biases

    Returns the model in eval mode on its device, its tokenizer, and the name of the
    text that it was trained on last, or None. Its loss is computed in chunks, so
    evaluation needs little memory. Raises ValueError if the tokenizer and the model
    do not belong together.
    """
    dir = model_dir(base)
    nf4 = dtype == "nf4"
    float_dtype = getattr(torch, compute_dtype if nf4 else dtype)
    model = read_model(GPT, dir, dropout, device, float_dtype, nf4)
    encoding = load_tokenizer(dir)
    if encoding.n_vocab > model.config.vocab_size:
        raise ValueError(
            f"{dir}: the tokenizer has {encoding.n_vocab} entries, the model "
            f"{model.config.vocab_size}; they do not belong together"
        )
    model.loss = partial(chunked_loss, chunk=default_loss_chunk(device, head_trains=False))
    trained_on = read_record(dir).get("asked", {}).get("data")
    return model.eval(), encoding, trained_on


def load_corpus(data, encoding, cache_dir, block_size, refresh=False):
    """The Corpus of a text; token files and downloads are kept below cache_dir."""
    text = read_text(data, HELDOUT, Path(cache_dir, files.DOWNLOADS), refresh)
    return tokenize(text, encoding, Path(cache_dir, files.TOKENS), block_size)


def text_of_base(base, base_data, cache_dir):
    """The text to measure forgetting on: base_data or, if that is None, what the base learned.

    All processes call this before they train, so that a text that is missing or has
    changed is an error now and not after the training. Raises ValueError.
    """
    text, digest = together(find_text_of_base, base, base_data, cache_dir)
    check_equal(digest, "texts to measure forgetting on")
    return text


def find_text_of_base(base, base_data, cache_dir):
    """text_of_base() for one process: the text, and the digest of its Corpus.

    Raises ValueError if the base names a URL: a downloaded base must not decide what is fetched.
    """
    asked = read_record(model_dir(base)).get("asked", {})
    text = base_data or asked.get("data") or "tales"
    if not isinstance(text, str | Path):
        raise ValueError(
            f"the training.json of {base} does not name a text, but {text!r}; give one "
            "with --base-data"
        )
    if base_data is None and is_url(text):
        raise ValueError(
            f"the base was trained on {text}; give that, or another text, with "
            "--base-data"
        )
    corpus = load_corpus(text, load_tokenizer(model_dir(base)), cache_dir, block_size=1)
    if base_data is None and asked.get("corpus") not in (None, corpus.digest):
        raise ValueError(
            f"the text {corpus.name} is not the one that {base} was trained on: it, "
            "or how it is split, has changed since. Give a text to measure "
            "forgetting on with --base-data"
        )
    return text, corpus.digest


def check_texts(sources, base_text, cache_dir):
    """Read each of several texts {name: text}, so that one that is missing is an error now.

    Raises UsageError if one has the name of the base's text but is another.
    """
    name = name_of(base_text)
    if name in sources and str(sources[name]) != str(base_text):
        same_file = Path(sources[name]).resolve() == Path(base_text).resolve()
        if not same_file:
            raise UsageError(
                f"--data has a text called {name!r}, and so is the text of the base; "
                "rename the file"
            )
    for source in sources.values():
        read_text(source, HELDOUT, Path(cache_dir, files.DOWNLOADS))


def add_lora(model, lora):
    """apply_lora(model, **lora). Raises UsageError if it cannot be done."""
    try:
        for path in find_targets(model, lora["target_modules"], lora_classes()):
            shape = shape_of_weight(model.get_submodule(path))
            if shape is not None and lora["r"] > min(shape):
                raise ValueError(
                    f"--r {lora['r']} exceeds the smaller side of {path}, "
                    f"{shape}; choose a smaller rank"
                )
        apply_lora(model, **lora, layers=LAYERS)
    except ValueError as error:
        raise UsageError(error) from error


def shape_of_weight(module):
    """The shape of a module's weight, or None if it has none."""
    if isinstance(module, HasNF4Weight):
        return (module.out_features, module.in_features)
    weight = getattr(module, "weight", None)
    return None if weight is None else tuple(weight.shape)


def save_model(model, encoding, dir):
    """Write a model, its tokenizer and a short card. Replaces a model that was there.

    transformers can open the directory.
    """
    Path(dir).mkdir(parents=True, exist_ok=True)
    files.clear_model(dir)
    save_tokenizer(encoding, dir)
    n = sum(p.numel() for p in model.parameters())
    files.write_card(dir, CARD.format(n=n))
    write_model(model, dir, eos_token_id=encoding.eot_token)


def save_adapter(model, dir, base):
    """Write the adapter of a model. Replaces an adapter or a model that was there."""
    Path(dir).mkdir(parents=True, exist_ok=True)
    files.clear_model(dir)
    save_lora(model, dir, base_model_name_or_path=str(base))


def load_voices(model, base, voices):
    """Load adapters {name: directory} for a model. Returns Adapters.

    Says so if one was trained on another base than `base`.
    """
    adapters = Adapters(model)
    own_hash = fingerprint(base) if voices else None
    for name, dir in voices.items():
        adapters.load(dir, name)
        base_hash = read_record(dir).get("asked", {}).get("base")
        if base_hash not in (None, own_hash):
            say(f"note: {dir} was trained on another base than {base}")
    return adapters


def continue_text(model, encoding, prompt, max_new_tokens, seed, temperature=0.7, top_k=40,
                  top_p=None, rows=1):
    """Continue the prompt, read as the beginning of a story. Returns one text for each row.

    Sets torch's global seed.
    """
    torch.manual_seed(seed)
    tokens = [encoding.eot_token]
    for start in range(0, len(prompt), LONGEST_PROMPT):     # tiktoken cannot take any length
        part = prompt[start:start + LONGEST_PROMPT]
        tokens += encoding.encode(part, allowed_special="all")
    idx = torch.tensor([tokens] * rows, device=next(model.parameters()).device)    # (rows, T)
    idx = model.generate(
        idx, max_new_tokens, temperature, top_k, top_p, stop_token=encoding.eot_token
    )
    texts = []
    for row in idx.tolist():
        # <|endoftext|> is the last token. A model may have more, to pad its vocabulary.
        texts.append(encoding.decode([token for token in row if token < encoding.eot_token]))
    return texts


def sample_line(model, encoding, prompt):
    """A short continuation of the prompt on one line, for the log of a training."""
    try:
        [written] = continue_text(model, encoding, prompt, 30, seed=0)
    except ArithmeticError:
        return "(no sample: the logits are not finite)"
    return written.replace("\n", " ")


def sample(base, adapter=(), prompt=PROMPT, merge=False, max_new_tokens=150, temperature=0.7,
           top_k=40, top_p=None, seed=0, device=None):
    """Continue a prompt with the base and with each adapter, and print them side by side.

    adapter     a directory, or several
    merge       merge each adapter into the weights, and run them one after another; otherwise
                all are rows of one batch

    Returns {directory: text}.
    """
    dirs = as_list(adapter)
    if not 0 <= seed < 2**64:
        raise UsageError(f"--seed is {seed}; expected a number from 0 and below 2^64")
    if top_k == 0:
        top_k = None                    # no limit, as elsewhere
    model, encoding, _ = load_model(base, pick_device(device))
    adapters = load_voices(model, base, {dir: dir for dir in dirs})
    sampling = {
        "prompt": prompt, "max_new_tokens": max_new_tokens, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "seed": seed,
    }
    voices = [None, *dirs]
    if merge:
        texts = []
        for voice in voices:
            adapters.use(voice)
            if voice is not None:
                merge_lora(model)
            texts += continue_text(model, encoding, **sampling)
    else:
        adapters.use(voices)
        texts = continue_text(model, encoding, **sampling, rows=len(voices))
    titled = dict(zip([str(base), *dirs], texts))
    say(side_by_side(titled, WIDTH))
    return titled


def as_list(paths):
    """A path, or several, as a list of strings."""
    if isinstance(paths, (str, Path)):
        paths = [paths]
    return [str(path) for path in paths]


def merge(base, adapter, out, fresh=False):
    """Merge an adapter into its base: write a plain model directory. Returns the record.

    The sum is computed and stored in float32, whatever dtype the base trained in. An
    adapter that was tuned on the base in four bits is added to the base's own weights,
    too, so it meets slightly other weights than it was tuned with.
    """
    if not isinstance(adapter, (str, Path)):
        [adapter] = adapter
    keep_apart(out, base, adapter)
    model, encoding, trained_on = load_model(base, "cpu")
    load_voices(model, base, {"voice": adapter})
    settings = read_record(adapter).get("asked", {}).get("settings", {})
    if settings.get("base_dtype") == "nf4":
        say(f"note: {adapter} was tuned on the base in four bits, and is added to the base's "
            "own weights; its bits per byte may differ slightly from those in training")
    adapter_files = (Path(adapter, files.ADAPTER), Path(adapter, files.ADAPTER_CONFIG))
    asked = {
        "data": trained_on, "base": fingerprint(base), "adapter": str(adapter),
        "adapter_hash": sha256_of(*adapter_files)[:16],
    }
    with open_run(out, asked, resume=MAY, fresh=fresh) as run:
        merge_lora(model)
        remove_lora(model)
        from_first(save_model, model, encoding, out)
        record = run.finish(curve=[])
    say(f"Written: {out}, a model like any other. Now try:\n"
        f'  python train.py sample --base {shell_quoted(out)} --prompt "Once"')
    return record


def keep_apart(out, *inputs):
    """Raises ValueError if the directory to write is also one of those to read."""
    for other in inputs:
        if Path(out).resolve() == model_dir(other).resolve():
            raise ValueError(
                f"{out} would be overwritten while it is read; choose another "
                "directory for --out"
            )
