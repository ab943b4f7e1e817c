"""lab/tokenizer_files.py: the tokenizer on disk, with transformers as a reference."""
import json

import pytest
from transformers import AutoTokenizer

from data import BUILT_IN
from data.bpe import EOT, train_bpe
from lab.tokenizer_files import CHAR_TO_BYTE, load_tokenizer, save_tokenizer

TEXT = BUILT_IN["pirate"].read_text(encoding="utf-8").replace(EOT, "\n")[:60_000]


@pytest.fixture(scope="module")
def encoding():
    return train_bpe(TEXT, vocab_size=600)


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
    assert again.encode_ordinary(TEXT) == encoding.encode_ordinary(TEXT)
    assert again.eot_token == encoding.eot_token


def test_a_tokenizer_as_gpt2_has_it_on_the_hub_is_read(tmp_path, encoding):
    """GPT-2 numbers the bytes by their characters: "!" is 0. It does not state the type."""
    save_tokenizer(encoding, tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    model = raw["model"]
    for i, char in enumerate(sorted(CHAR_TO_BYTE, key=ord)):
        model["vocab"][char] = i
    model["merges"] = [" ".join(halves) for halves in model["merges"]]
    del model["type"]
    path.write_text(json.dumps(raw), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("!") == [0]
    assert ours.encode_ordinary(TEXT) == theirs(TEXT)["input_ids"]


def replace(old, new):
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize("change", [
    lambda text: text[:-40],
    lambda text: "{}",
    lambda text: "[]",
    replace('"add_prefix_space": false', '"add_prefix_space": true'),
    replace('"BPE"', '"WordPiece"'),
    replace(": 300,", ": 9999,"),
    replace('"A": 65', '"AAAA": 65'),
])
def test_a_damaged_tokenizer_is_refused(tmp_path, encoding, change):
    save_tokenizer(encoding, tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    assert change(text) != text
    path.write_text(change(text), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(tmp_path)
