"""
Files that are written whole or not at all, and read with a clear error if they are damaged.
"""
import base64
import hashlib
import json
import os
import uuid
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# The names of the files that are read and written: those of transformers and PEFT,
# and ours.
MODEL = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
MODEL_CONFIG = "config.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CARD = "README.md"
# What transformers and PEFT also read from a directory.
FOREIGN = {
    "generation_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
}
RECORD = "training.json"
CHECKPOINT = "checkpoint.safetensors"
COMPARISON = "comparison.json"
COMPARISON_PICTURE = "comparison.png"
VOICES = "voices.json"
TOKENS = "tokens"           # directories, below the cache_dir of a run
DOWNLOADS = "downloads"

PICKLES = (".bin", ".pt", ".pth", ".ckpt")      # weights that could run code when they are read
LARGEST_DOWNLOAD = 2**31                        # bytes

UMASK = os.umask(0)     # there is no way to read it without setting it
os.umask(UMASK)


# ---- writing -----------------------------------------------------------------------

@contextmanager
def replacing(path):
    """Atomic write: `with replacing(path) as temporary:` write `temporary`; it becomes `path`.

    The temporary file is flushed to disk and renamed over `path`, so that after a
    crash `path` is either the old file or the new one, never half of one. Raises
    OSError if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~UMASK)     # safetensors lets only the owner read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:            # what save_file raises when the disk is full
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(dir):
    """Delete the temporary files of writers that were killed."""
    for path in Path(dir).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def holds_model(dir):
    """The names of the files in `dir` that belong to a model, an adapter or a tokenizer."""
    weights = {".safetensors", ".gguf", ".h5", ".onnx", ".msgpack", *PICKLES}
    names = {MODEL_CONFIG, ADAPTER_CONFIG, TOKENIZER, TOKENIZER_CONFIG} | FOREIGN
    found = []
    for path in sorted(Path(dir).iterdir()):
        is_index = path.name.endswith(".index.json")
        is_ours = path.name == CHECKPOINT
        if (path.suffix in weights or path.name in names or is_index) and not is_ours:
            found.append(path.name)
    return found


def clear_model(dir):
    """Delete the files of a model, an adapter or a tokenizer, the configs first.

    Without its config a model is recognizably broken: after a crash in between, new
    weights are not read with an old config, and nothing of an old model stays beside
    a new one.
    """
    names = holds_model(dir)
    configs = [name for name in names if name in (MODEL_CONFIG, ADAPTER_CONFIG)]
    for name in [*configs, *names]:
        Path(dir, name).unlink(missing_ok=True)


def write_card(dir, content):
    """Write a model card, unless somebody else has written one."""
    path = Path(dir, CARD)
    if not path.exists() or path.read_bytes().startswith(b"---\nlibrary_name: "):
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")


def write_json(path, value, indent=2):
    """Write `value` as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def write_weights(dir, name, tensors, config_name, config):
    """Write a model or an adapter into `dir`: its tensors, and then its config.

    Without its config it is recognizably broken: after a crash between the two files,
    new tensors are not read with an old config.
    """
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    (dir / config_name).unlink(missing_ok=True)
    write_tensors(dir / name, tensors)
    write_json(dir / config_name, config)


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors, atomically, with `metadata` {str: str}."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


# ---- reading -----------------------------------------------------------------------

def check_regular(path):
    """Raises ValueError for a pipe, a device or a directory: reading it could wait forever."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is not a regular file")


def read_json(path):
    """Returns the JSON object (a dict) in a file.

    Raises FileNotFoundError, or ValueError if it does not contain a JSON object.
    """
    check_regular(path)
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:       # not UTF-8, not JSON, nested too deeply
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object, but a {type(value).__name__}")
    return value


@contextmanager
def open_tensors(path):
    """`with open_tensors(path) as file:` a safetensors file, opened lazily.

    Raises ValueError if the file is damaged, also if that shows only inside the block.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); fetch or write it again"
        ) from error


def read_all(file):
    """{name: tensor} of an open safetensors file.

    They are copies: a tensor of the file itself keeps it open, and Windows cannot
    replace an open file.
    """
    names = file.keys()
    return {name: file.get_tensor(name).clone() for name in names}


def read_tensor(path, name):
    """One tensor of a safetensors file, which is opened for it alone.

    An open file keeps in memory everything that was read from it.
    """
    with open_tensors(path) as file:
        return file.get_tensor(name)


def advice_on_pickles(dir):
    """The end of an error message if `dir` has weights in a format that is never read."""
    for path in sorted(Path(dir).glob("*")):
        if path.suffix in PICKLES:
            return (
                f". {path.name} is a pickle, which can run any code when it is read: "
                "open it with transformers or PEFT, and convert it with their "
                "save_pretrained(new_dir)"
            )
    return ""


def download(url, path):
    """Fetch `url` into the file `path`, whole or not at all. Shows progress.

    Raises OSError if it cannot be fetched, breaks off, is a web page instead of a text,
    or is larger than LARGEST_DOWNLOAD.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with connected(url) as response, replacing(path) as temporary:
        if response.headers.get_content_type() == "text/html":
            raise OSError(
                f"{without_password(url)} is a web page (text/html); expected the address "
                "of a plain text"
            )
        with open(temporary, "wb") as file:
            copy_response(response, file, without_password(url))


@contextmanager
def connected(url):
    """`with connected(url) as response:` an HTTP response; all errors name the URL."""
    try:
        with urlopen(request_for(url), timeout=60) as response:
            yield response
    except (HTTPException, OSError, ValueError) as error:
        shown = without_password(url)
        if shown in str(error):
            raise
        raise OSError(
            f"{shown} cannot be fetched ({error}); check the address and the network"
        ) from error


def request_for(url):
    """A request for a URL. A user and password in it are sent as urllib expects it."""
    request = Request(without_password(url))
    parts = urlsplit(url)
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        encoded = base64.b64encode(login.encode()).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


def copy_response(response, file, url):
    size = int(response.headers.get("Content-Length", -1))
    options = dict(unit="B", unit_scale=True, disable=None, leave=False)
    with tqdm(total=max(size, 0), desc=f"fetching {url}", **options) as bar:
        while chunk := response.read(2**20):
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > LARGEST_DOWNLOAD:
                raise OSError(
                    f"{url} is larger than {LARGEST_DOWNLOAD:,} bytes; download it "
                    "yourself, and give the file"
                )
    if size not in (-1, file.tell()):
        raise OSError(f"{url} broke off after {file.tell():,} of {size:,} bytes; try again")


def without_password(url):
    """A URL without the user and password in it; anything else as it is."""
    parts = urlsplit(url)
    if not parts.scheme or "@" not in parts.netloc:
        return url
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def name_of(source):
    """A short name for a text: the end of its path or URL, without the suffix."""
    return Path(without_password(str(source))).stem


def sha256_of(*paths):
    """A hash of the content of files, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def some(names, most=4):
    """The first few names, for a message: some("edcba") -> 'a, b, c, d and 1 more'."""
    names = sorted(names)
    text = ", ".join(names[:most]) or "none"
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def first_line(error):
    """The first line of an error's message, which may be empty."""
    return (str(error).splitlines() or [""])[0]
