import os

os.environ["HF_HUB_OFFLINE"] = "1"          # the oracles must not look for anything on the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"         # such small products gain nothing from threads, and lose on a busy machine

import pytest       # noqa: E402
import torch        # noqa: E402

from gpt import GPT, GPTConfig      # noqa: E402


def make_gpt(seed=0, std=0.2, **changes):
    """A small GPT whose weights are N(0, std) and so large that mistakes show: logits of the order of one."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=64), **changes}))
    for name, p in model.named_parameters():
        if ".ln_" not in name:
            torch.nn.init.normal_(p, std=std)
        else:
            p.data += 0.1 * torch.randn_like(p)
    return model.eval()


@pytest.fixture
def model():
    return make_gpt()


@pytest.fixture
def idx():
    return torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))
