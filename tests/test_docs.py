"""README.md and docs/: what they quote, link, measure and tell people to type is right."""
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from helpers_lora import fill_lora

import train
from conftest import last_of_each, make_gpt
from data.bpe import train_bpe
from lab import cli
from lab.tokenizer_files import save_tokenizer
from lora_minimal import apply_lora, save_lora

ROOT = Path(train.__file__).parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "data" / "README.md"]
README = PAGES[0].read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MINI = ["--steps", "1", "--batch-size", "1", "--block-size", "16", "--eval-every", "1",
        "--device", "cpu"]

# Minutes in miniature; test_commands.py runs them.
TOO_LONG = {"python train.py", "python train.py voices"}


def name_of(page):
    return str(page.relative_to(ROOT))


def load_writer():
    """docs/write.py as a module."""
    spec = importlib.util.spec_from_file_location("write", ROOT / "docs" / "write.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what they say -------------------------------------------------------------------------------

def test_the_readme_quotes_the_layer_exactly():
    source = (ROOT / "lora_minimal.py").read_text(encoding="utf-8")
    quotes = [code for language, code in BLOCK.findall(README) if "self." in code]
    assert len(quotes) == 2, "the two lines of A and B, and definition()"
    for code in quotes:
        assert code in source


def test_the_readme_is_short():
    prose = BLOCK.sub("", README)
    prose = re.sub(r"^(\||<).*$", "", prose, flags=re.MULTILINE)
    assert len(prose.split()) <= 1100


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    for target in targets:
        if not target.startswith("https://"):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), target


def test_measured_numbers_are_those_of_the_results():
    writer = load_writer()
    for page in writer.pages():
        assert page.read_text(encoding="utf-8") == writer.filled(page), page.name


def test_the_reading_times_are_a_minute_for_ten_lines():
    rows = re.findall(r"^\| `(\S+)` \|.*\| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for name, minutes in rows:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert int(minutes) == pytest.approx(lines / 10, abs=5), name


# ---- what they tell people to type ---------------------------------------------------------------

def commands():
    """[(page, command)] of all shell blocks, comments removed."""
    found = []
    for page in PAGES:
        for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language != "bash":
                continue
            for line in code.splitlines():
                for command in re.split(r"\s+#", line)[0].split(" && "):
                    found.append((name_of(page), command.strip()))
    return found


def of_kind(beginning):
    return [command for _, command in commands() if command.startswith(beginning)]


def test_every_command_is_of_a_kind_that_is_tested_here():
    kinds = ("python train.py", "torchrun", "python bench/", "python docs/", "pip install",
             "pytest", "ruff check", "jupyter")
    for page, command in commands():
        assert command.startswith(kinds), f"{page}: {command}"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with the texts and models that the pages speak of, in miniature."""
    monkeypatch.chdir(tmp_path)
    stories = []
    for place in ("sea", "hill", "town", "wood", "moor", "lake", "road", "farm", "mill", "well"):
        stories.append(f"The old man went to the {place}, and it was wide.\n" * 12)
    text = "<|endoftext|>\n".join(stories)
    for name in ("my_book.txt", "my_library.txt"):
        Path(name).write_text(text, encoding="utf-8")
    for name in ("gpt2", "gpt2-xl", "out/base"):
        model = make_gpt(vocab_size=300, block_size=32, n_embd=16, n_head=2)
        model.save_pretrained(name)
        save_tokenizer(train_bpe("\n".join(stories), 300), name)
    apply_lora(model)
    fill_lora(model)
    save_lora(model, "out/pirate")
    return tmp_path


def in_miniature(argv):
    """A command line with the settings of MINI where it has a command that trains."""
    command = argv[0]
    if command == "sample":
        return [*argv, "--max-new-tokens", "4", "--device", "cpu"]
    if command == "merge":
        return argv
    if command == "compare":
        return last_of_each([*argv, *MINI, "--base-data", "my_book.txt"])
    mini = list(MINI)
    if "--accumulate" in argv:          # the batch must have as many rows
        rows = argv[argv.index("--accumulate") + 1]
        mini[mini.index("--batch-size") + 1] = rows
    return last_of_each([*argv, *mini])


def test_the_commands_run(desk):
    for command in of_kind("python train.py"):
        if command in TOO_LONG:
            continue
        argv = shlex.split(command)[2:]
        if argv == ["--help"]:
            continue
        if "--resume" in argv:
            argv.remove("--resume")     # there is nothing to resume: the run has finished
            argv.append("--fresh")
        out = argv[argv.index("--out") + 1] if "--out" in argv else None
        fresh = ["--fresh"] if out and Path(out).exists() and "--fresh" not in argv else []
        assert train.main([*in_miniature(argv), *fresh]) == 0, command


def test_the_commands_for_several_processes_have_valid_flags():
    found = of_kind("torchrun")
    assert found
    for command in found:
        words = shlex.split(command)
        assert words[:2] == ["torchrun", "--nproc-per-node"]
        options = cli.make_parser().parse_args(words[words.index("train.py") + 1:])
        assert options.command == "tune"


def test_the_scripts_and_the_flags_they_are_given_exist():
    for command in of_kind("python bench/") + of_kind("python docs/"):
        script, *argv = shlex.split(command)[1:]
        source = (ROOT / script).read_text(encoding="utf-8")
        for flag in argv:
            if flag.startswith("--"):
                assert f'"{flag}"' in source, command


def test_what_is_installed_is_a_file_of_this_project_or_explained():
    requirements = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    for command in of_kind("pip install"):
        words = shlex.split(command)[2:]
        if words[0] == "-r":
            assert (ROOT / words[1]).is_file()
        else:
            for name in words:
                assert name in ("huggingface_hub", "jupyterlab") or name in requirements
