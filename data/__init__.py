"""
From a text to tokens on disk.

    text = read_text("pirate", dir)              a built-in name, a file or a URL -> the stories, some of them held out
    encoding = train_bpe(text.all_train)         data/bpe.py; or load_tokenizer(the base model's directory)
    corpus = tokenize(text, encoding, dir)       .train and .heldout: memory-mapped token files, made once
    x, y = Batches(corpus.train, batch_size=32, block_size=256, seed=0)[step]
"""
import hashlib
import random
import re
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import torch
from tqdm import tqdm

from data.bpe import EOT
from gpt import replacing

BUILT_IN = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.txt"))}      # tales, pirate, bard, noir
SPLIT_SEED = 1337           # which stories are held out; not --seed, so that every run keeps the same ones unseen
DOWNLOAD_MOST = 2**31       # bytes
HELDOUT_MOST = 2**19        # bytes to hold out at most: enough to measure by, and quick to read again and again


@dataclass
class Text:
    """Stories to learn from and stories held out. A piece is (text, whether a story ends with it)."""
    name: str
    train: list
    heldout: list
    digest: str             # of the text and the split

    @property
    def all_train(self):
        return "\n".join(piece for piece, _ in self.train)

    @property
    def heldout_bytes(self):
        return sum(len(piece.encode()) for piece, _ in self.heldout)


def read_text(source, heldout, download_dir):
    """Read a corpus: the name of a built-in one, the path of a UTF-8 file, or an http(s) URL (kept in download_dir).

    Stories may be parted by <|endoftext|>; a share of `heldout` of them, drawn by a fixed seed, is set aside. A text of
    fewer than twenty stories is cut at paragraph ends into passages of one to four thousand characters, and of these
    some are set aside. Raises FileNotFoundError, or ValueError for a text that is empty, binary, not UTF-8 or too short."""
    if source in BUILT_IN:
        path = BUILT_IN[source]
    elif urlsplit(str(source)).scheme in ("http", "https"):
        path = Path(download_dir, hashlib.sha256(str(source).encode()).hexdigest()[:16] + ".txt")
        if not path.exists():
            _download(str(source), path)
    else:
        path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no text {str(source)!r}: give a file, a URL, or one of {', '.join(BUILT_IN)}")
    raw = path.read_bytes()
    if b"\0" in raw:
        raise ValueError(f"{path} is a binary file (it holds zero bytes); a corpus is plain text in UTF-8")
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start} is {raw[error.start]:#04x}); save it as UTF-8") from error
    stories = [story.strip("\n") for story in text.split(EOT) if story.strip()]
    if not stories:
        raise ValueError(f"{path} is empty; a corpus needs text to learn from")
    if len(stories) >= 20:
        pieces = [(story, True) for story in stories]
    else:
        pieces = [(piece, i == len(cut) - 1) for cut in map(_passages, stories) for i, piece in enumerate(cut)]
    if len(pieces) < 2:
        raise ValueError(f"{path} is too short: {len(raw)} bytes are one passage, and one must be held out. "
                         "Give at least a few thousand characters")
    aside, size = set(), 0
    for i in random.Random(SPLIT_SEED).sample(range(len(pieces)), max(1, round(heldout * len(pieces)))):
        size += len(pieces[i][0].encode())
        if aside and size > HELDOUT_MOST:
            break
        aside.add(i)
    digest = hashlib.sha256(repr(sorted(aside)).encode())
    for piece, ends in pieces:
        digest.update(piece.encode() + (b"\0" if ends else b"\1"))
    return Text(str(source), [p for i, p in enumerate(pieces) if i not in aside],
                [p for i, p in enumerate(pieces) if i in aside], digest.hexdigest())


def _download(url, path):
    """Fetch url into path, whole or not at all. Raises OSError, also for what is larger than DOWNLOAD_MOST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urlopen(url, timeout=60) as response, replacing(path) as beside, open(beside, "wb") as file:
            size = int(response.headers.get("Content-Length", -1))
            with tqdm(total=max(size, 0), unit="B", unit_scale=True, desc=f"fetching {url}", disable=None, leave=False) as bar:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if file.tell() > DOWNLOAD_MOST:
                        raise OSError(f"{url} is larger than {DOWNLOAD_MOST:,} bytes; fetch it yourself and give the file")
            if size not in (-1, file.tell()):
                raise OSError(f"{url} broke off after {file.tell():,} of {size:,} bytes; try again")
    except HTTPException as error:
        raise OSError(f"{url} cannot be fetched: {error!r}") from error


def _passages(story):
    """Cut at a paragraph's end, else a line's, else a word's, else anywhere; joined, the passages are the story."""
    return re.findall(r"(?s).{1000,3000}?\n\s*\n|.{1000,4000}?\n|.{1000,4000}?\s|.{1,4000}", story)


@dataclass
class Corpus:
    """Tokens: (N,) integers, <|endoftext|> first and after every story. `heldout_bytes` counts the text alone."""
    name: str
    train: np.ndarray
    heldout: np.ndarray
    heldout_bytes: int
    digest: str             # of text, split and tokenizer: what the token files are called


def tokenize(text, encoding, cache_dir, block_size):
    """Encode a Text -> Corpus of memory-mapped arrays in cache_dir, encoded only if not there yet.

    The files are called by a hash of text, split and tokenizer: a changed text is never read from an old file.
    Raises ValueError when too little is left to train on in blocks of block_size."""
    tokens_of = repr(sorted(encoding._mergeable_ranks.items())).encode()
    digest = hashlib.sha256(text.digest.encode() + tokens_of).hexdigest()[:16]
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    parts = {}
    for part in ("train", "heldout"):
        path = Path(cache_dir, f"{digest}-{part}.npy")
        if not path.exists():
            pieces, stream = getattr(text, part), [np.array([encoding.eot_token], dtype)]
            for i in tqdm(range(0, len(pieces), 1024), desc=f"encoding {text.name}", disable=None, leave=False):
                some = pieces[i:i + 1024]
                for tokens, (_, ends) in zip(encoding.encode_ordinary_batch([piece for piece, _ in some]), some):
                    stream.append(np.array(tokens + [encoding.eot_token] * ends, dtype))
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside, open(beside, "wb") as file:
                np.save(file, np.concatenate(stream))
        parts[part] = np.load(path, mmap_mode="r")
    if len(parts["train"]) < 4 * block_size:
        raise ValueError(f"{text.name} is too short: {len(parts['train'])} tokens to train on, and blocks of "
                         f"{block_size} need at least {4 * block_size}. Give a longer text or a smaller --block-size")
    return Corpus(text.name, **parts, heldout_bytes=text.heldout_bytes, digest=digest)


class Batches:
    """Batches[n] -> x, y (B, T) int64: windows of a token stream, and the same moved on by one token.

    Every epoch cuts the stream into blocks at another offset and shuffles them. A batch is a function of the seed and
    its number alone, so a resumed run sees what an uninterrupted one would have seen."""

    def __init__(self, tokens, batch_size, block_size, seed):
        self.tokens, self.batch_size, self.block_size, self.seed = tokens, batch_size, block_size, seed
        self.blocks = len(tokens) // block_size - 1         # a block is lost to the offset
        self.epoch, self.starts = None, None

    def __getitem__(self, n):
        windows = []
        for i in range(n * self.batch_size, (n + 1) * self.batch_size):
            epoch, block = divmod(i, self.blocks)
            if epoch != self.epoch:
                rng = np.random.default_rng((self.seed, epoch))
                self.epoch = epoch
                self.starts = rng.permutation(self.blocks) * self.block_size + rng.integers(self.block_size)
            windows.append(self.tokens[self.starts[block]:][:self.block_size + 1])
        windows = torch.from_numpy(np.stack(windows).astype(np.int64))      # (B, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
