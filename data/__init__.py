"""
From a text to batches of tokens.

    text = read_text("pirate", heldout=0.1, download_dir="out/downloads")
    encoding = train_bpe(text.all_train)        # data/bpe.py, or a base's tokenizer
    corpus = tokenize(text, encoding, "out/tokens", block_size=128)
    batches = Batches(corpus.train, batch_size=16, block_size=128, seed=0)
    x, y = batches[0]                           # y is x shifted left by one token

Letters in the shape comments: B windows in a batch, T tokens in a window.
"""
import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.bpe import EOT
from data.sources import BUILT_IN, decode, find_text, is_url
from lab.files import replacing, sha256_of, without_password

__all__ = [
    "BUILT_IN", "HELDOUT", "Batches", "Corpus", "Text", "is_url", "read_text", "tokenize"
]

SPLIT_SEED = 1337           # of the held-out stories: the same whatever the --seed
LARGEST_HELDOUT = 2**17     # bytes: cap the held-out text so that evaluation stays fast
LONGEST_STORY = 2**14       # characters: a longer one is cut into passages
HELDOUT = 0.1               # the share of a text to hold out, in every command


# ---- from a text to stories --------------------------------------------------------

class Piece(NamedTuple):
    """A story, or a passage of a long one."""

    text: str
    ends_story: bool        # whether a story ends with it

    @property
    def size(self):
        """Bytes in UTF-8."""
        return len(self.text.encode())


@dataclass
class Text:
    """The pieces of a text to train on, and those held out."""

    name: str
    train: list
    heldout: list
    digest: str             # a hash of the text and the split
    download: Path | None   # the file, if the text comes from a URL

    @property
    def all_train(self):
        """The training pieces as one string."""
        return "\n".join(piece.text for piece in self.train)

    @property
    def heldout_bytes(self):
        """The size of the held-out pieces in UTF-8."""
        return sum(piece.size for piece in self.heldout)


def read_text(source, heldout, download_dir, refresh=False):
    """Read a text, and hold out a share of it. Returns a Text.

    source      the name of a built-in text, the path of a UTF-8 file, or an http(s) URL,
                which is kept in download_dir
    heldout     the share of the pieces to hold out, between 0 and 1 (at least one piece).
                A larger share includes all that a smaller one holds out
    refresh     download a URL again

    <|endoftext|> separates stories. Long stories, and all stories of a text with
    fewer than 20, are cut into passages: see cut_into_passages. Raises
    FileNotFoundError, or ValueError if the text is empty, binary, not UTF-8 or too
    short, or heldout is out of range.
    """
    if not 0 < heldout < 1:
        raise ValueError(f"heldout is {heldout}; expected a share between 0 and 1")
    path = find_text(str(source), download_dir, refresh)
    try:
        pieces = cut_into_pieces(decode(path), path)
    except ValueError:
        if is_url(source):
            path.unlink()               # so that the next run downloads it again
        raise
    heldout_indices = choose_heldout(pieces, heldout)
    digest = hashlib.sha256(repr(sorted(heldout_indices)).encode())
    for piece in pieces:
        digest.update(piece.text.encode() + (b"\0" if piece.ends_story else b"\1"))
    return Text(
        name=without_password(str(source)),
        train=[piece for i, piece in enumerate(pieces) if i not in heldout_indices],
        heldout=[piece for i, piece in enumerate(pieces) if i in heldout_indices],
        digest=digest.hexdigest(),
        download=path if is_url(source) else None,
    )


def cut_into_pieces(content, path):
    """The stories of a text, or the passages of a text with few stories, as Pieces."""
    stories = [story.strip("\n") for story in content.split(EOT) if story.strip()]
    if not stories:
        raise ValueError(f"{path} is empty; expected a text to learn from")
    pieces = []
    for story in stories:
        passages = [story]
        if len(stories) < 20 or len(story) > LONGEST_STORY:
            passages = cut_into_passages(story)
        *first, last = passages
        pieces += [Piece(passage, ends_story=False) for passage in first]
        pieces.append(Piece(last, ends_story=True))
    if len(pieces) < 2:
        raise ValueError(
            f"{path} is too short: it is a single passage, and one must be held out. "
            "Give at least a few thousand characters"
        )
    return pieces


PASSAGE = re.compile(
    r".{1000,3000}?\n[^\S\n]{0,99}\n"   # 1,000 characters, and on to the end of a paragraph;
    r"|.{1000,4000}?\n"                 # if there is none within 3,000, to the end of a line;
    r"|.{1000,4000}?\s"                 # or to a space;
    r"|.{1,4000}",                      # or 4,000 characters, or what remains
    re.DOTALL,
)


def cut_into_passages(story):
    """Cut a story into passages of about 1,000 to 4,000 characters, and lose nothing."""
    return PASSAGE.findall(story)


def choose_heldout(pieces, share):
    """The indices (a set) of the pieces to hold out, at most LARGEST_HELDOUT bytes.

    The pieces are drawn in a fixed random order, so a larger share holds out the same
    pieces as a smaller one, and more. All commands hold out the same share, so what one
    of them holds out, no other trains on.
    """
    indices = range(len(pieces))
    rng = random.Random(SPLIT_SEED)
    order = rng.sample(indices, max(1, round(HELDOUT * len(pieces))))   # what commands use
    order += rng.sample(indices, len(pieces))                           # then all others
    order = list(dict.fromkeys(order))                                  # each piece once
    wanted = min(max(1, round(share * len(pieces))), len(pieces) - 1)
    chosen = set()
    size = 0
    for i in order[:wanted]:
        if size + pieces[i].size <= LARGEST_HELDOUT:
            chosen.add(i)
            size += pieces[i].size
    return chosen


# ---- from stories to tokens --------------------------------------------------------

@dataclass
class Corpus:
    """A text as token numbers.

    train and heldout are (N,), uint16 or, for more than 65,536 tokens, uint32:
    <|endoftext|>, then each story followed by another <|endoftext|>. heldout_bytes
    counts the held-out text only.
    """

    name: str
    train: np.ndarray
    heldout: np.ndarray
    heldout_bytes: int
    digest: str             # a hash of the text, the split and the tokenizer

    def heldout_windows(self, block_size, at_once):
        """Yields the held-out text in batches x, y (B, T) int64; y is x shifted by one.

        T = block_size and B <= at_once. If tokens remain, the last batch is one
        shorter row. No window sees the text before it: its first tokens have little
        context, so what is measured is a little worse than what the model can do.
        """
        tokens = torch.from_numpy(self.heldout.astype(np.int64))
        whole = (len(tokens) - 1) // block_size * block_size    # tokens in whole windows
        x = tokens[:whole].view(-1, block_size)
        y = tokens[1:whole + 1].view(-1, block_size)
        if whole > 0:
            yield from zip(x.split(at_once), y.split(at_once))
        if whole < len(tokens) - 1:
            yield tokens[None, whole:-1], tokens[None, whole + 1:]


def tokenize(text, encoding, cache_dir, block_size):
    """Encode a Text. Returns a Corpus of memory-mapped arrays, cached in files.

    The names of the files contain a hash of the text, the split and the tokenizer, so
    a changed text is never read from an old file; a damaged file is made again.
    Raises ValueError if the training text is shorter than four blocks of block_size
    tokens.
    """
    vocabulary = repr(sorted(encoding._mergeable_ranks.items())).encode()
    digest = hashlib.sha256(text.digest.encode() + vocabulary).hexdigest()[:16]
    arrays = {}
    for part, pieces in (("train", text.train), ("heldout", text.heldout)):
        path = Path(cache_dir, f"{digest}-{part}.npy")
        if not is_intact(path):
            tokens = encode(pieces, encoding, text.name)
            write_array(path, tokens)
        arrays[part] = np.load(path, mmap_mode="r")
    n_train, least = len(arrays["train"]), 4 * block_size
    if n_train < least:
        if text.download is not None:
            text.download.unlink(missing_ok=True)
        raise ValueError(
            f"{text.name} is too short: it has {n_train} tokens to train on, and "
            f"blocks of {block_size} need at least {least}. Give a longer text or a "
            "smaller --block-size"
        )
    return Corpus(text.name, **arrays, heldout_bytes=text.heldout_bytes, digest=digest)


def write_array(path, array):
    """Write an array (.npy), and its hash into a file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
    with replacing(path.with_suffix(".sha256")) as temporary:
        temporary.write_text(sha256_of(path), encoding="ascii")


def is_intact(path):
    """Whether a file is unchanged since write_array."""
    hash_path = path.with_suffix(".sha256")
    if not path.is_file() or not hash_path.is_file():
        return False
    return hash_path.read_bytes() == sha256_of(path).encode()


def encode(pieces, encoding, name):
    """The tokens (N,) of pieces, as a Corpus has them. Shows progress."""
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    stream = [np.array([encoding.eot_token], dtype)]
    starts = range(0, len(pieces), 1024)
    for start in tqdm(starts, f"encoding {name}", disable=None, leave=False):
        batch = pieces[start:start + 1024]
        encoded = encoding.encode_ordinary_batch([piece.text for piece in batch])
        for tokens, piece in zip(encoded, batch):
            if piece.ends_story:
                tokens.append(encoding.eot_token)
            stream.append(np.array(tokens, dtype))
    return np.concatenate(stream)


# ---- from tokens to batches --------------------------------------------------------

class Batches:
    """batches[n] -> x, y (B, T) int64: windows of tokens; y is shifted left by one.

    Every epoch cuts the stream into windows from a new random offset, and shuffles
    them. A batch depends only on the seed and on its number, so a resumed run sees
    the same batches. There is no last batch: index it, do not iterate over it. Raises
    ValueError if the stream is shorter than two windows.
    """

    def __init__(self, tokens, batch_size, block_size, seed):
        self.tokens = tokens
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.n_windows = len(tokens) // block_size - 1      # one fewer, for the offset
        self.epoch = None
        self.starts = None                                  # (n_windows,)
        if self.n_windows < 1:
            raise ValueError(
                f"{len(tokens)} tokens are fewer than two windows of {block_size}; "
                "give a longer text or a smaller block_size"
            )

    def __getitem__(self, n):
        windows = []
        for i in range(n * self.batch_size, (n + 1) * self.batch_size):
            epoch, window = divmod(i, self.n_windows)
            if epoch != self.epoch:
                self.shuffle(epoch)
            start = self.starts[window]
            windows.append(self.tokens[start:start + self.block_size + 1])
        windows = torch.from_numpy(np.stack(windows).astype(np.int64))      # (B, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def shuffle(self, epoch):
        """Choose the offset and the order of the windows of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.n_windows)
        self.starts = order * self.block_size + rng.integers(self.block_size)
        self.epoch = epoch
