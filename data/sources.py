"""
Where a text comes from: a built-in one, a file, or a URL.
"""
import hashlib
from pathlib import Path
from urllib.parse import urlsplit

from lab.files import download

BUILT_IN = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.txt"))}


def is_url(source):
    """Whether a text is to be downloaded."""
    return urlsplit(str(source)).scheme in ("http", "https")


def find_text(source, download_dir, refresh=False):
    """The file of a built-in name, a path or a URL. Raises FileNotFoundError."""
    if source in BUILT_IN:
        return BUILT_IN[source]
    path = Path(source)
    if is_url(source):
        name = hashlib.sha256(source.encode()).hexdigest()[:16] + ".txt"
        path = Path(download_dir, name)
        if refresh or not path.exists():
            download(source, path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no text {source!r}: give a file, a URL, or one of "
            f"{', '.join(BUILT_IN)}"
        )
    return path


def decode(path):
    """The content of a UTF-8 file, without a byte order mark, with "\\n" for "\\r\\n".

    Raises ValueError if it is binary or not UTF-8.
    """
    raw = path.read_bytes()
    if b"\0" in raw:
        raise ValueError(f"{path} is a binary file (it has zero bytes); expected UTF-8 text")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {raw[error.start]:#04x}); "
            "save it as UTF-8"
        ) from error
