"""data/: the tokenizer, the split of a text, token files and batches."""
import random

import numpy as np
import pytest
import torch

from data import BUILT_IN, Batches, Corpus, read_text, tokenize
from data.bpe import EOT, naive_bpe, naive_encode, train_bpe

TEXT = BUILT_IN["pirate"].read_text(encoding="utf-8").replace(EOT, "\n")[:60_000]


@pytest.fixture(scope="module")
def encoding():
    return train_bpe(TEXT, vocab_size=600)


# ---- the tokenizer -------------------------------------------------------------------------------

def test_naive_counting_learns_what_the_textbook_example_learns():
    """The example of Wikipedia's "Byte-pair encoding": aa, then ab, then the two together."""
    learned = [b"aa", b"ab", b"aaab"]
    assert naive_bpe("aaabdaaabac", n_merges=1) == learned[:1]
    assert naive_bpe("aaabdaaabac", n_merges=3) == learned
    assert naive_bpe("aaabdaaabac", n_merges=10) == learned, "then no pair occurs twice"


@pytest.mark.parametrize("text", [
    TEXT[:8000],
    "aaaa aaaaa aaab " * 9,
    "ababab abab bababa äöäö 🏴‍☠️🏴‍☠️ " * 5,
])
def test_incremental_counts_learn_what_naive_counting_learns(text):
    encoding = train_bpe(text, vocab_size=300)
    learned = [encoding.decode_single_token_bytes(i) for i in range(256, encoding.eot_token)]
    assert learned == naive_bpe(text, n_merges=300 - 257)


def test_naive_encoding_is_what_tiktoken_does():
    text = BUILT_IN["noir"].read_text(encoding="utf-8").replace(EOT, "")[:20_000]
    encoding = train_bpe(text, vocab_size=400)
    learned = [encoding.decode_single_token_bytes(rank) for rank in range(256, 399)]
    assert naive_encode(text[-2000:], learned) == encoding.encode_ordinary(text[-2000:])


def random_text(rng):
    """Up to 39 characters: ASCII, other alphabets, and some beyond 16 bits."""
    ranges = ((32, 127), (0x20, 0xD800), (0x10000, 0x11000))
    chars = []
    for _ in range(rng.randrange(40)):
        first, end = rng.choice(ranges)
        chars.append(chr(rng.randrange(first, end)))
    return "".join(chars)


def test_any_text_and_any_bytes_survive_encoding(encoding):
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng)
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.decode_bytes(list(range(256))) == bytes(range(256))


def test_training_is_deterministic_and_makes_the_size_asked_for(encoding):
    assert encoding.n_vocab == 600
    assert encoding.eot_token == 599
    again = train_bpe(TEXT, vocab_size=600)
    assert again._mergeable_ranks == encoding._mergeable_ranks


def test_a_text_with_too_few_pairs_makes_a_smaller_vocabulary():
    assert train_bpe("abcdefg", vocab_size=2048).n_vocab == 257


# ---- corpora -------------------------------------------------------------------------------------

def write(tmp_path, content, name="text.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(tmp_path, content, name="text.txt"):
    """The Text of a content, a tenth of it held out."""
    return read_text(write(tmp_path, content, name), 0.1, tmp_path)


@pytest.mark.parametrize("name, share", [
    ("tales", 0.05),
    ("pirate", 0.1),
    ("bard", 0.1),
    ("noir", 0.1),
])
def test_built_in_corpora_hold_out_whole_stories(tmp_path, name, share):
    content = BUILT_IN[name].read_text(encoding="utf-8")
    stories = {story.strip("\n") for story in content.split(EOT) if story.strip()}
    text = read_text(name, share, tmp_path)
    assert all(ends for _, ends in text.train + text.heldout)
    train = {story for story, _ in text.train}
    heldout = {story for story, _ in text.heldout}
    assert len(text.heldout) == round(share * (len(text.train) + len(text.heldout)))
    assert train | heldout == stories
    assert not train & heldout


@pytest.mark.parametrize("content", [
    "Line one.\nLine two, longer.\n\n" * 900,
    "no-space-at-all" * 2000,
    "words " * 6000,
    "äöü\n" * 9000,
], ids=["paragraphs", "one word", "words", "lines"])
def test_a_text_without_separators_is_cut_into_passages_that_lose_nothing(tmp_path, content):
    text = read(tmp_path, content)
    pieces = [piece for piece, _ in text.train + text.heldout]
    assert sorted("".join(pieces)) == sorted(content.strip("\n"))
    assert all(piece in content for piece in pieces)
    assert len(text.heldout) >= 1
    assert max(map(len, pieces)) <= 4001


def test_tokens_decode_to_the_stories_with_a_separator_after_each(tmp_path, encoding):
    stories = [f"Story number {i}.\nIt ends." for i in range(40)]
    text = read(tmp_path, f"\n{EOT}\n".join(stories))
    corpus = tokenize(text, encoding, tmp_path / "tokens", block_size=8)
    for tokens, pieces in ((corpus.train, text.train), (corpus.heldout, text.heldout)):
        assert isinstance(tokens, np.memmap)
        expected = EOT + "".join(story + EOT for story, _ in pieces)
        assert encoding.decode(tokens.tolist()) == expected
    assert corpus.heldout_bytes == sum(len(story) for story, _ in text.heldout)
    assert len(text.heldout) == 4


def test_a_changed_text_or_tokenizer_is_never_read_from_an_old_file(tmp_path, encoding):
    def corpus(content, encoding):
        return tokenize(read(tmp_path, content), encoding, tmp_path / "tokens", 8)

    first = corpus("One day. " * 2000, encoding)
    again = corpus("One day. " * 2000, encoding)
    other = corpus("Two day. " * 2000, encoding)
    coarser = corpus("Two day. " * 2000, train_bpe(TEXT, 300))
    assert first.digest == again.digest
    assert len({first.digest, other.digest, coarser.digest}) == 3
    assert encoding.decode(other.train[:4].tolist()).startswith(EOT + "Two")


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    a = read(tmp_path, "A line.\nAnother.\n\n" * 500, "a")
    b = read(tmp_path, b"\xef\xbb\xbf" + b"A line.\r\nAnother.\r\n\r\n" * 500, "b")
    assert a.digest == b.digest


@pytest.mark.parametrize("content, says", [
    (b"", "empty"),
    (b" \n\n", "empty"),
    (b"text\0more" * 99, "binary"),
    (b"caf\xe9 " * 999, "UTF-8"),
    (b"Too short.", "too short"),
])
def test_a_text_that_is_no_corpus_is_refused(tmp_path, content, says):
    with pytest.raises(ValueError, match=says):
        read(tmp_path, content)


def test_fewer_tokens_than_a_few_blocks_are_refused(tmp_path, encoding):
    text = read(tmp_path, "A word or two. " * 300)
    with pytest.raises(ValueError, match="at least 4000"):
        tokenize(text, encoding, tmp_path, 1000)


def test_a_missing_text_names_the_built_in_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="bard, noir, pirate, tales"):
        read_text("nothing.txt", 0.1, tmp_path)


# ---- batches -------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_tokens", [
    2,          # a single pair
    10,         # shorter than a window
    16,         # a window without its last target
    17,         # exactly one window
    18,         # and one token more
    16 * 6 + 1,
    16 * 7 + 9,
])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_heldout_windows_cover_every_token_once_and_in_order(n_tokens, at_once):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    corpus = Corpus("a text", tokens, tokens, heldout_bytes=n_tokens, digest="")
    windows = list(corpus.heldout_windows(block_size=16, at_once=at_once))
    for x, y in windows:
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape
        assert 1 <= len(x) <= at_once
        assert torch.equal(y, x + 1)
    for x, _ in windows[:-1]:
        assert x.size(1) == 16
    last, _ = windows[-1]
    assert 1 <= last.size(1) <= 16
    seen = torch.cat([x.flatten() for x, _ in windows])
    assert seen.tolist() == list(range(n_tokens - 1))


def test_targets_are_inputs_moved_on_by_one():
    batches = Batches(np.arange(1000, dtype=np.uint16), batch_size=4, block_size=16, seed=0)
    x, y = batches[3]
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == torch.int64
    assert torch.equal(x + 1, y)


def test_a_batch_depends_on_its_number_alone_and_an_epoch_sees_every_block_once():
    tokens = np.arange(1000, dtype=np.uint16)
    forward = Batches(tokens, 4, 16, seed=0)
    backward = Batches(tokens, 4, 16, seed=0)
    order = [forward[n][0] for n in range(30)]
    for n in reversed(range(30)):
        assert torch.equal(order[n], backward[n][0])
    first_epoch = torch.cat(order)[:forward.n_windows]
    assert len(first_epoch.flatten().unique()) == forward.n_windows * 16
    other_seed = Batches(tokens, 4, 16, seed=1)
    assert not torch.equal(order[0], other_seed[0][0])
