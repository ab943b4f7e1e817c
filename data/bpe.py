"""
Byte-level BPE trained from scratch (Sennrich et al. 2016, §3.2; on bytes as in GPT-2, Radford et al. 2019, §2.2).

Begin with the 256 bytes as tokens. Count every pair of neighbouring tokens; join the most frequent pair into a new
token; repeat. "the the then" joins t+h, then th+e, and soon common words are one token each. Text is first cut into
words by GPT-2's pattern, so no token crosses from one word into the next.

Training is here; encoding and decoding is tiktoken's, and the file format is that of tokenizers and transformers.

    encoding = train_bpe(text, vocab_size=2048)
    encoding.encode("the cat")     -> [261, 782]         (the numbers depend on the text)
    save_tokenizer(encoding, dir); encoding = load_tokenizer(dir)
"""
import heapq
import json
from collections import Counter, defaultdict
from pathlib import Path

import regex
import tiktoken

from gpt import replacing

EOT = "<|endoftext|>"       # parts one story from the next
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""      # GPT-2's word pattern


def train_bpe(text, vocab_size=2048):
    """Learn vocab_size entries from text: 256 bytes, the merges in the order learnt, and <|endoftext|> as the last.

    Deterministic: of equally frequent pairs the one with the smaller token numbers is joined. Where no pair occurs
    twice any more the vocabulary stays smaller. The text must not contain <|endoftext|>; -> tiktoken.Encoding."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and {EOT} make at least 257")
    words = Counter(regex.findall(PATTERN, text))
    frequency = list(words.values())
    words = [list(word.encode()) for word in words]         # each word as a list of tokens
    counts, where = Counter(), defaultdict(set)             # how often a pair occurs; the words that it occurs in
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += frequency[w]
            where[pair].add(w)

    # Only words that hold the joined pair change, so only their pairs are counted again: 1 s for 2.4 MB, where
    # counting everything anew for each of 1,791 merges takes minutes. The heap may hold counts since outdated; those
    # are recognised when they come up, and dropped.
    vocab = [bytes([b]) for b in range(256)]
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while len(vocab) < vocab_size - 1 and heap:
        count, pair = heapq.heappop(heap)
        if counts[pair] != -count:
            continue
        if count > -2:
            break
        new, changed = len(vocab), set()
        vocab.append(vocab[pair[0]] + vocab[pair[1]])
        for w in where.pop(pair):
            word, joined, i = words[w], [], 0
            for old in zip(word, word[1:]):
                counts[old] -= frequency[w]
                changed.add(old)
            while i < len(word):
                both = tuple(word[i:i + 2]) == pair
                joined.append(new if both else word[i])
                i += 2 if both else 1
            words[w] = joined
            for fresh in zip(joined, joined[1:]):
                counts[fresh] += frequency[w]
                where[fresh].add(w)
                changed.add(fresh)
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))
    return _encoding({token: rank for rank, token in enumerate(vocab)})


def _encoding(ranks):
    """{token bytes: rank}, ranks 0 … n-1 -> tiktoken.Encoding with <|endoftext|> at n."""
    return tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


# ---- files -----------------------------------------------------------------------------------------------------------
# JSON holds text, tokens are bytes: GPT-2 writes each byte as one printable character. The printable Latin-1 characters
# stand for themselves, the other bytes for the characters from 256 on, in order.

_printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
BYTE_TO_CHAR = {b: chr(b) for b in _printable}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}


def save_tokenizer(encoding, dir):
    """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads them."""
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    text = {token: "".join(BYTE_TO_CHAR[b] for b in token) for token in ranks}
    merges = [[text[half] for half in _halves(token, ranks)] for token in ranks if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": encoding.eot_token, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "vocab": {text[token]: rank for token, rank in ranks.items()} | {EOT: encoding.eot_token}, "merges": merges}
    files = {
        "tokenizer.json": {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
                           "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
                           "decoder": byte_level, "model": model},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT,
                                  "clean_up_tokenization_spaces": False},
    }
    Path(dir).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replacing(Path(dir, name)) as path:
            path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _halves(token, ranks):
    """The two tokens that `token` was joined from: what the merges of lower rank leave of it."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def load_tokenizer(dir):
    """Read a tokenizer.json of save_tokenizer's, or of transformers for a GPT-2 -> tiktoken.Encoding.

    Raises FileNotFoundError without one, ValueError where it is damaged or no byte-level BPE of GPT-2's kind."""
    path = Path(dir, "tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a base model's directory holds its tokenizer")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        cut = raw["pre_tokenizer"]
        if raw["model"].get("type", "BPE") != "BPE" or cut["type"] != "ByteLevel" or cut["add_prefix_space"] or raw["normalizer"]:
            raise ValueError("not a byte-level BPE with GPT-2's word pattern")
        ranks = {bytes(CHAR_TO_BYTE[c] for c in text): rank for text, rank in raw["model"]["vocab"].items() if text != EOT}
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("its tokens lack a byte, or their numbers do not run from 0 without a gap")
        return _encoding(ranks)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer that can be read here: {error!r}") from error
