"""
A tokenizer on disk: tokenizer.json, in the format of transformers and its tokenizers
library.

JSON contains text and tokens are bytes, so GPT-2 writes each byte as one printable
character. The printable characters of Latin-1 stand for themselves, and the other
bytes for the characters from number 256 on, in order: a space is "Ġ".
"""
from pathlib import Path

from data.bpe import EOT, encoding_from_ranks
from lab import files
from lab.files import read_json, some, write_json


def _byte_to_char():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(printable))
    return table


BYTE_TO_CHAR = _byte_to_char()
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}


def save_tokenizer(encoding, dir):
    """Write a tiktoken.Encoding as the two files that AutoTokenizer reads."""
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    vocab = {as_text(token): rank for token, rank in ranks.items()}
    merges = []
    for token in ranks:
        if len(token) > 1:
            left, right = halves(token, ranks)
            merges.append([as_text(left), as_text(right)])
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
        "use_regex": True,
    }
    end_of_text = {
        "id": encoding.eot_token, "content": EOT, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": True,
    }
    model = {
        "type": "BPE", "dropout": None, "unk_token": None,
        "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False,
        "vocab": {**vocab, EOT: encoding.eot_token}, "merges": merges,
    }
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [end_of_text], "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level, "model": model,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT,
        "unk_token": EOT, "clean_up_tokenization_spaces": False,
    }
    Path(dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(dir, files.TOKENIZER), tokenizer, indent=None)
    write_json(Path(dir, files.TOKENIZER_CONFIG), config, indent=None)


def as_text(token):
    """The printable form of a token: as_text(b" the") -> 'Ġthe'."""
    return "".join(BYTE_TO_CHAR[b] for b in token)


def as_bytes(text):
    """The token of a printable form. Raises KeyError if a character stands for no byte."""
    return bytes(CHAR_TO_BYTE[char] for char in text)


def halves(token, ranks):
    """The two tokens that were merged into `token`: encode it with the merges before its own."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        merged = [left + right for left, right in zip(parts, parts[1:])]
        best = min(range(len(merged)), key=lambda i: ranks.get(merged[i], len(ranks)))
        parts[best:best + 2] = [merged[best]]
    return parts


def load_tokenizer(dir):
    """Read a tokenizer.json that save_tokenizer, or transformers for a GPT-2, has written.

    Returns a tiktoken.Encoding. Raises FileNotFoundError if there is none, ValueError
    if it is damaged, or would be read differently here than by transformers.
    """
    path = Path(dir, files.TOKENIZER)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a base model needs its tokenizer")
    raw = read_json(path)
    try:
        refuse_other_tokenizers(raw)
        refuse_other_configs(dir)
        ranks = read_ranks(raw["model"]["vocab"])
        check_merges(raw["model"]["merges"], ranks)
        return encoding_from_ranks(ranks)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a tokenizer like GPT-2's, a byte-level BPE ({error})"
        ) from error


def refuse_other_tokenizers(raw):
    """Raises ValueError unless tokenizer.json is a byte-level BPE with GPT-2's pattern."""
    refuse_other_models(raw["model"])
    pre_tokenizer = raw["pre_tokenizer"]
    if pre_tokenizer["type"] != "ByteLevel":
        raise ValueError(f"its pre-tokenizer is {pre_tokenizer['type']!r}")
    if pre_tokenizer["add_prefix_space"] or not pre_tokenizer.get("use_regex", True):
        raise ValueError("its pre-tokenizer has add_prefix_space, or no use_regex")
    if raw["normalizer"]:
        raise ValueError("it has a normalizer")
    if adds_tokens(raw.get("post_processor")):
        raise ValueError("its post-processor adds tokens")
    refuse_added_tokens([token["content"] for token in raw.get("added_tokens", ())])
    for token in raw.get("added_tokens", ()):
        if token["id"] != raw["model"]["vocab"].get(EOT, token["id"]):
            raise ValueError(f"{EOT} has two ids")


def adds_tokens(post_processor):
    """Whether the post-processor of tokenizer.json adds tokens to a text."""
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return False
    if post_processor["type"] != "TemplateProcessing":
        return True
    return any("Sequence" not in part for part in post_processor["single"])


def refuse_added_tokens(tokens):
    added = [token for token in tokens if token not in (EOT, None)]
    if added:
        raise ValueError(f"it has added tokens: {some(added)}")


def refuse_other_configs(dir):
    """Raises ValueError if a file beside tokenizer.json changes what a text is encoded to."""
    if Path(dir, "added_tokens.json").is_file():
        refuse_added_tokens(read_json(Path(dir, "added_tokens.json")))
    if not Path(dir, files.TOKENIZER_CONFIG).is_file():
        return
    config = read_json(Path(dir, files.TOKENIZER_CONFIG))
    if config.get("add_prefix_space"):
        raise ValueError("tokenizer_config.json has add_prefix_space")
    decoder = config.get("added_tokens_decoder") or {}
    tokens = [config.get("pad_token"), *(config.get("additional_special_tokens") or ())]
    tokens += decoder.values()
    refuse_added_tokens([t.get("content") if isinstance(t, dict) else t for t in tokens])


def refuse_other_models(model):
    """Raises ValueError unless the "model" of tokenizer.json is a plain BPE."""
    if model.get("type", "BPE") != "BPE":               # old files leave it out
        raise ValueError(f"its model is {model['type']!r}")
    for option in ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix",
                   "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"its model has {option}")


def read_ranks(vocab):
    """{printable form: id} -> {token: id}, without <|endoftext|>."""
    ranks = {as_bytes(text): rank for text, rank in vocab.items() if text != EOT}
    if vocab.get(EOT, len(ranks)) != len(ranks):
        raise ValueError(f"{EOT} has the id {vocab[EOT]}; expected {len(ranks)}")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("the token ids do not run from 0 without a gap")
    if not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError("the vocabulary does not contain every byte")
    return ranks


def check_merges(merges, ranks):
    """Raises ValueError unless the merges make the tokens in the order of their ids.

    tiktoken merges in the order of the ids and does not see the merges.
    """
    made = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.append(ranks[as_bytes(left) + as_bytes(right)])
    if made != sorted(rank for token, rank in ranks.items() if len(token) > 1):
        raise ValueError("its merges are not in the order of the token ids")
