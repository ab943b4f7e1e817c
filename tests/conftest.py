import os

os.environ["HF_HUB_OFFLINE"] = "1"          # the oracles must not use the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"         # small products gain nothing from threads

import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from gpt import GPT, GPTConfig  # noqa: E402


def pytest_configure():
    """Let the tests of signals work in the background and under nohup.

    A shell starts processes in the background with SIGINT ignored, and nohup with SIGHUP
    ignored. Their child processes inherit that.
    """
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)            # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def is_of_notebooks(item):
    return item.path.name == "test_notebooks.py"


def pytest_collection_modifyitems(items):
    """The tests of the notebooks come last: they wait for running_notebooks."""
    items.sort(key=is_of_notebooks)


@pytest.fixture(scope="session", autouse=True)
def running_notebooks(request, tmp_path_factory):
    """Execute the notebooks on another core while the other tests run.

    Returns the process, and the directory that it fills (helpers_notebooks.py); or None if
    no test needs them.
    """
    if not any(map(is_of_notebooks, request.session.items)):
        yield None
        return
    dir = tmp_path_factory.mktemp("notebooks")
    script = Path(__file__).with_name("helpers_notebooks.py")
    process = subprocess.Popen([sys.executable, script, dir], stderr=subprocess.DEVNULL)
    yield process, dir
    process.kill()      # nbclient would answer SIGTERM by ending one kernel, and go on
    process.wait()


def make_gpt(seed=0, std=0.2, **changes):
    """A small GPT with weights from N(0, std), so large that mistakes show in the logits."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=64)
    model = GPT(GPTConfig(**(shape | changes)))
    for name, p in model.named_parameters():
        if ".ln_" not in name:
            torch.nn.init.normal_(p, std=std)
        else:
            p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def last_of_each(argv):
    """A command line without the flags that come again later, with other values.

    The tests add flags to those that they have in common; a user may not repeat one.
    """
    groups = []
    for word in map(str, argv):
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    kept = []
    for i, group in enumerate(groups):
        later = [other[0] for other in groups[i + 1:]]
        if group[0] not in later or group[0] == "--adapter":
            kept += group
    return kept


def run(capsys, *argv):
    """Run a command line. Returns (exit code, what it printed, its errors)."""
    try:
        code = train.main(last_of_each(argv))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def model():
    return make_gpt()


@pytest.fixture
def idx():
    return torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))
