"""
Texts to train on and to measure with, for the notebooks.
"""
from dataclasses import replace
from pathlib import Path

from lab.models import load_corpus
from notebooks.checks import is_shortened

OUT = Path("../out/notebooks")


def load_text(name, encoding, block_size=128, heldout_tokens=5000):
    """A built-in text (tales, pirate, bard, noir) as a Corpus with a small held-out part.

    The held-out part is the beginning of that of the commands, so that measuring is
    quick.
    """
    if is_shortened():
        heldout_tokens = min(heldout_tokens, 1000)
    corpus = load_corpus(name, encoding, OUT, block_size)
    tokens = corpus.heldout[:heldout_tokens]
    words = [token for token in tokens.tolist() if token != encoding.eot_token]
    n_bytes = len(encoding.decode_bytes(words))
    return replace(corpus, heldout=tokens, heldout_bytes=n_bytes)
