"""lab/files.py: files are written whole or not at all, and a damaged one is named."""
import pytest
import torch

from lab.files import (
    open_tensors,
    read_json,
    read_tensor,
    replacing,
    some,
    write_json,
    write_tensors,
)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, exception):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(exception), replacing(path) as temporary:
        temporary.write_text("half")
        raise exception
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_before_it_begins_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "file"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_write_replaces_the_old_file_only_at_its_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_that_cannot_be_written_are_an_oserror(tmp_path):
    with pytest.raises(OSError, match="missing"):
        write_tensors(tmp_path / "missing" / "file.safetensors", {"a": torch.ones(1)})


def test_a_value_that_json_cannot_express_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": torch.ones(1)})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_read_as_it_was_written(tmp_path, indent):
    value = {"text": "ünï¢ødé 🏴‍☠️ \x00", "numbers": [1, 2.5, None]}
    write_json(tmp_path / "file.json", value, indent)
    assert read_json(tmp_path / "file.json") == value


@pytest.mark.parametrize("content", [
    b"",
    b'{"a": 1',
    b"[1]",
    b'"text"',
    b"null",
    b'{"a": "caf\xe9"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": ' + b"1" * 5000 + b"}",
], ids=[
    "empty", "half", "list", "string", "null", "not UTF-8", "deep lists", "deep objects",
    "huge number",
])
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.json is not"):
        read_json(path)


def test_tensors_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "file.safetensors"
    a = torch.randn(3, 5)
    write_tensors(path, {"a": a}, metadata={"note": "text"})
    assert torch.equal(read_tensor(path, "a"), a)
    with open_tensors(path) as file:
        assert list(file.keys()) == ["a"]
        assert file.metadata() == {"format": "pt", "note": "text"}


@pytest.mark.parametrize("kept", [0, 5, 50, -1])
def test_a_damaged_file_of_tensors_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.randn(3, 5)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"file\.safetensors is not a whole safetensors file"):
        with open_tensors(path):
            pass


def test_a_tensor_that_is_missing_names_the_file(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.randn(3, 5)})
    with pytest.raises(ValueError, match=r"file\.safetensors"):
        read_tensor(path, "b")


def test_a_missing_file_is_an_oserror_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"file\.json"):
        read_json(tmp_path / "file.json")
    with pytest.raises(FileNotFoundError, match=r"file\.safetensors"):
        with open_tensors(tmp_path / "file.safetensors"):
            pass


def test_many_names_are_shortened():
    assert some([]) == "none"
    assert some("cba") == "a, b, c"
    assert some("edcba") == "a, b, c, d and 1 more"
