"""Files: a full disk is named, and what a flipped bit damages too."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trainers.files import (
    CheckedTensors,
    append_lines,
    read_lines,
    read_run_json,
    save_tensors,
    write_atomically,
    written_aside,
)


def flipped(path, at):
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def fails_as_safetensors(path):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: Path("/dev/full").write_text("x"),
        fails_as_safetensors,
        lambda path: torch.save(torch.ones(9), "/dev/full"),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_a_full_disk_is_named(tmp_path, monkeypatch, write):
    if "torch" in str(write.__code__.co_names):
        # It does not say why it failed: whether the folder is full is tried.
        def full(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"^no space left in {tmp_path}: make room"):
        write_atomically(tmp_path / "file", write)
    with pytest.raises(OSError, match=f"^no space left in {tmp_path}"), written_aside(tmp_path / "folder") as folder:
        write(folder / "file")
    assert [path.name for path in tmp_path.iterdir()] == [".folder.tmp"]


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "file", lambda path: 1 / 0)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_there_when_it_is_whole(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), written_aside(folder) as aside:
        (aside / "config.json").write_text(str(1 / 0))
    assert not folder.exists()
    for names in (("a", "b"), ("a",)):
        with written_aside(folder) as aside:
            for name in names:
                save_file({"x": torch.ones(1)}, aside / name)
        assert sorted(path.name for path in folder.iterdir()) == list(names)
        assert (folder / "a").stat().st_mode & 0o777 == 0o644, "safetensors makes it 0600"


def test_lines_have_checksums(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "a", "token_ids": [1, 2]}, {"id": "ü", "token_ids": []}]
    append_lines(path, rows)
    assert read_lines(path) == rows
    flipped(path, path.read_bytes().index(b"1, 2"))
    with pytest.raises(ValueError, match="rows.jsonl, line 1 is damaged: remove the line"):
        read_lines(path)


@pytest.mark.parametrize("line", [b"{bad", b"[1]", b"7", b"\xff\xfe"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match="rows.jsonl, line 2 is damaged"):
        read_lines(path)
    path.write_bytes(b'{"id": "a"}\n' + line)
    assert read_lines(path) == [{"id": "a"}], "the last line was cut off by a kill"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_bad_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match="x.json is damaged: .*Do this."):
        read_run_json(tmp_path / "x.json", "Do this.")


def test_tensors_have_checksums(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    save_tensors(path, tensors)
    read = CheckedTensors(path, "Do this.")
    assert sorted(read.names) == ["a", "b"]
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        flipped(path, at)
        with pytest.raises(ValueError, match="x.safetensors is damaged: .*Do this."):
            [CheckedTensors(path, "Do this.")[name] for name in "ab"]
        path.write_bytes(whole)
    save_file(tensors, path)
    assert torch.equal(CheckedTensors(path, "")["a"], tensors["a"]), "files without checksums are taken as they are"
