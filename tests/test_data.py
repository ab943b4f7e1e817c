"""data/: the tokenizer against a naive reference and transformers, token files, splits and batches."""
import json
import random
from collections import Counter

import numpy as np
import pytest
import regex
import torch
from transformers import AutoTokenizer

from data import BUILT_IN, Batches, read_text, tokenize
from data.bpe import CHAR_TO_BYTE, EOT, PATTERN, load_tokenizer, save_tokenizer, train_bpe

TEXT = BUILT_IN["pirate"].read_text(encoding="utf-8").replace(EOT, "\n")[:60_000]


@pytest.fixture(scope="module")
def encoding():
    return train_bpe(TEXT, vocab_size=600)


def naive_bpe(text, vocab_size):
    """Count all pairs anew for every merge."""
    words = Counter(tuple(bytes([b]) for b in word.encode()) for word in regex.findall(PATTERN, text))
    vocab = [bytes([b]) for b in range(256)]
    while len(vocab) < vocab_size - 1:
        counts = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += n
        a, b = min(counts, key=lambda p: (-counts[p], vocab.index(p[0]), vocab.index(p[1])))
        vocab.append(a + b)
        joined = Counter()
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                both = word[i:i + 2] == (a, b)
                out.append(a + b if both else word[i])
                i += 1 + both
            joined[tuple(out)] += n
        words = joined
    return vocab


@pytest.mark.parametrize("text", [TEXT[:8000], "aaaa aaaaa aaab " * 9, "ababab abab bababa äöäö 🏴‍☠️🏴‍☠️ " * 5])
def test_incremental_counts_learn_what_naive_counting_learns(text):
    encoding = train_bpe(text, vocab_size=300)
    learnt = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    assert learnt[256:] == naive_bpe(text, len(learnt) + 1)[256:]


def test_any_text_and_any_bytes_survive_encoding(encoding):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x20, 0xD800), rng.randrange(0x10000, 0x11000))))
                       for _ in range(rng.randrange(40)))
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.decode_bytes(list(range(256))) == bytes(range(256))


def test_training_is_deterministic_and_makes_the_size_asked_for(encoding):
    assert encoding.n_vocab == 600 and encoding.eot_token == 599
    again = train_bpe(TEXT, vocab_size=600)
    assert again._mergeable_ranks == encoding._mergeable_ranks


def test_a_text_with_too_few_pairs_makes_a_smaller_vocabulary():
    assert train_bpe("abcdefg", vocab_size=2048).n_vocab == 257


def test_transformers_reads_the_tokenizer_and_gives_the_same_ids(tmp_path, encoding):
    save_tokenizer(encoding, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, f"a story{EOT}another  one\n\n", "ünï¢ødé 🏴‍☠️ \x00\x7f\t ¡!"):
        ids = encoding.encode(text, allowed_special="all")
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_the_saved_tokenizer_is_read_back_the_same(tmp_path, encoding):
    save_tokenizer(encoding, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode_ordinary(TEXT) == encoding.encode_ordinary(TEXT) and again.eot_token == encoding.eot_token


def test_a_tokenizer_as_gpt2_has_it_on_the_hub_is_read(tmp_path, encoding):
    save_tokenizer(encoding, tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    chars = sorted(CHAR_TO_BYTE, key=ord)       # GPT-2 numbers the bytes by their characters, "!" is 0, and names no type
    raw["model"]["vocab"] |= {char: i for i, char in enumerate(chars)}
    raw["model"]["merges"] = [" ".join(halves) for halves in raw["model"]["merges"]]
    path.write_text(json.dumps({**raw, "model": {key: v for key, v in raw["model"].items() if key != "type"}}), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    assert ours.encode("!") == [0] and ours.encode_ordinary(TEXT) == AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]


@pytest.mark.parametrize("change", [
    lambda s: s[:-40], lambda s: "{}", lambda s: s.replace('"add_prefix_space": false', '"add_prefix_space": true'),
    lambda s: "[]", lambda s: s.replace('"BPE"', '"WordPiece"'),
    lambda s: s.replace(': 300,', ': 9999,', 1), lambda s: s.replace('"A": 65', '"AAAA": 65')])
def test_a_damaged_tokenizer_is_refused(tmp_path, encoding, change):
    save_tokenizer(encoding, tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(tmp_path)


# ---- corpora ---------------------------------------------------------------------------------------------------------

def write(tmp_path, content, name="text.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name, share", [("tales", 0.05), ("pirate", 0.1), ("bard", 0.1), ("noir", 0.1)])
def test_built_in_corpora_hold_out_whole_stories(tmp_path, name, share):
    text = read_text(name, share, tmp_path)
    whole = {story.strip("\n") for story in BUILT_IN[name].read_text(encoding="utf-8").split(EOT) if story.strip()}
    train, heldout = [[story for story, ends in part if ends] for part in (text.train, text.heldout)]
    assert len(train) == len(text.train) and len(heldout) == len(text.heldout) == round(share * (len(train) + len(heldout)))
    assert set(train) | set(heldout) == whole and not set(train) & set(heldout)


def test_a_text_without_separators_is_cut_into_passages_that_lose_nothing(tmp_path):
    for content in ("Line one.\nLine two, longer.\n\n" * 900, "no-space-at-all" * 2000, "words " * 6000, "äöü\n" * 9000):
        path = write(tmp_path, content)
        text = read_text(path, 0.1, tmp_path)
        pieces = [piece for piece, _ in text.train + text.heldout]
        assert sorted("".join(pieces)) == sorted(content.strip("\n"))
        assert all(piece in content for piece in pieces) and len(text.heldout) >= 1
        assert max(map(len, pieces)) <= 4001


def test_tokens_decode_to_the_stories_with_a_separator_after_each(tmp_path, encoding):
    stories = [f"Story number {i}.\nIt ends." for i in range(40)]
    text = read_text(write(tmp_path, f"\n{EOT}\n".join(stories)), 0.1, tmp_path)
    corpus = tokenize(text, encoding, tmp_path / "tokens", block_size=8)
    for part, pieces in ((corpus.train, text.train), (corpus.heldout, text.heldout)):
        assert isinstance(part, np.memmap)
        assert encoding.decode(part.tolist()) == EOT + "".join(story + EOT for story, _ in pieces)
    assert corpus.heldout_bytes == sum(len(story) for story, _ in text.heldout) and len(text.heldout) == 4


def test_a_changed_text_or_tokenizer_is_never_read_from_an_old_file(tmp_path, encoding):
    first = tokenize(read_text(write(tmp_path, "One day. " * 2000), 0.1, tmp_path), encoding, tmp_path / "t", 8)
    again = tokenize(read_text(write(tmp_path, "One day. " * 2000), 0.1, tmp_path), encoding, tmp_path / "t", 8)
    other = tokenize(read_text(write(tmp_path, "Two day. " * 2000), 0.1, tmp_path), encoding, tmp_path / "t", 8)
    coarser = tokenize(read_text(write(tmp_path, "Two day. " * 2000), 0.1, tmp_path), train_bpe(TEXT, 300), tmp_path / "t", 8)
    assert first.digest == again.digest and len({first.digest, other.digest, coarser.digest}) == 3
    assert encoding.decode(other.train[:4].tolist()).startswith(EOT + "Two")


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    a = read_text(write(tmp_path, "A line.\nAnother.\n\n" * 500, "a"), 0.1, tmp_path)
    b = read_text(write(tmp_path, b"\xef\xbb\xbf" + b"A line.\r\nAnother.\r\n\r\n" * 500, "b"), 0.1, tmp_path)
    assert a.digest == b.digest


@pytest.mark.parametrize("content, says", [
    (b"", "empty"), (b" \n\n", "empty"), (b"text\0more" * 99, "binary"), (b"caf\xe9 " * 999, "UTF-8"),
    (b"Too short.", "too short")])
def test_a_text_that_is_no_corpus_is_refused(tmp_path, content, says):
    with pytest.raises(ValueError, match=says):
        read_text(write(tmp_path, content), 0.1, tmp_path)


def test_fewer_tokens_than_a_few_blocks_are_refused(tmp_path, encoding):
    with pytest.raises(ValueError, match="at least 4000"):
        tokenize(read_text(write(tmp_path, "A word or two. " * 300), 0.1, tmp_path), encoding, tmp_path, 1000)


def test_a_missing_text_names_the_built_in_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="bard, noir, pirate, tales"):
        read_text("nothing.txt", 0.1, tmp_path)


def test_targets_are_inputs_moved_on_by_one():
    x, y = Batches(np.arange(1000, dtype=np.uint16), batch_size=4, block_size=16, seed=0)[3]
    assert x.shape == y.shape == (4, 16) and x.dtype == torch.int64 and torch.equal(x + 1, y)


def test_a_batch_depends_on_its_number_alone_and_an_epoch_sees_every_block_once():
    tokens = np.arange(1000, dtype=np.uint16)
    forward, backward = Batches(tokens, 4, 16, seed=0), Batches(tokens, 4, 16, seed=0)
    order = [forward[n][0] for n in range(30)]
    assert all(torch.equal(order[n], backward[n][0]) for n in reversed(range(30)))
    first_epoch = torch.cat(order)[:forward.blocks]
    assert len(first_epoch.flatten().unique()) == forward.blocks * 16
    assert not torch.equal(order[0], Batches(tokens, 4, 16, seed=1)[0][0])
