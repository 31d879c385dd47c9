"""Files that are whole or absent, files that grow by whole lines, and folders that one process at a time may write."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .text_files import json_object, parse_json, read_text

# What the system says of a full disk, and of one on which this user may write no more; the last is torch's.
NO_SPACE = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "unexpected pos")
LINE_SHA256 = "line_sha256"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """
    Calls `write(temporary_path)`, forces the file to disk, renames it to `path`, and forces that to disk too. Makes the
    folder if there is none.

    Raises:
        OSError: if the disk is full; the message names the folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with full_disk_named(path.parent):
            write(temporary)
            sync_file(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: str | Path, content: dict | list) -> None:
    """[`write_atomically`] of JSON."""
    write_atomically(Path(path), lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def sync(path: Path) -> None:
    """Forces a file or a folder's list of files to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_file(path: Path) -> None:
    """Forces a file to disk, with the mode that the umask asks for: safetensors gives its files 0600."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    sync(path)


def sync_folder(folder: Path) -> None:
    """Forces a folder to disk with all that is in it; the files get the mode that the umask asks for."""
    for path in folder.rglob("*"):
        (sync if path.is_dir() else sync_file)(path)
    sync(folder)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which takes the place of `folder` once all is written and on the disk."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with full_disk_named(folder.parent):
        yield aside
        sync_folder(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    sync(folder.parent)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """
    Names the folder in which a write fails for lack of space, which libraries that write do not.

    Raises:
        OSError: if the disk is full.
    """
    try:
        yield
    except Exception as error:
        if says_full(error) or is_full(folder):
            raise OSError(f"no space left in {folder}: make room, and run the same command again.") from error
        raise


def says_full(error: Exception) -> bool:
    return any(words in str(error) for words in NO_SPACE)


def is_full(folder: Path) -> bool:
    """Whether a folder does not take another 64 KB."""
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        probe.write_bytes(bytes(2**16))
        return False
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    finally:
        with suppress(OSError):
            probe.unlink()


def json_sha256(content: dict | list) -> str:
    """A checksum of what JSON says, however it is written."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_run_json(path: Path, advice: str) -> dict:
    """
    Reads a JSON object that a run wrote.

    Args:
        path (`Path`)
        advice (`str`): what to do if the file is damaged, a sentence.

    Raises:
        ValueError: if the file holds none.
    """
    try:
        return json_object(parse_json(read_text(path), path.name), path.name)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error} {advice}") from error


def differences(there: dict, wanted: dict) -> str:
    """Names the entries of `wanted` that `there` has not, and what it has instead; empty if it has all."""
    return "; ".join(
        f"{name}: there {there.get(name)!r}, wanted {value!r}"
        for name, value in wanted.items()
        if there.get(name) != value
    )


def read_lines(path: Path) -> list[dict]:
    """
    The rows of a JSONL file, none if it does not exist; a last line that a kill cut off is no row.

    Raises:
        ValueError: if a line is damaged; the message names it.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            whole = row.pop(LINE_SHA256, None) in (None, json_sha256(row))
        except (ValueError, AttributeError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{path}, line {number} is damaged: remove the line, and run the same command again.")
        rows.append(row)
    return rows


def append_lines(path: Path, rows: list[dict]) -> None:
    """
    Appends rows to a JSONL file, durably and each with a checksum, in place of a last line that a kill cut off. One
    process a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row | {LINE_SHA256: json_sha256(row)}, ensure_ascii=False) + "\n" for row in rows]
    with full_disk_named(path.parent), open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file with a checksum of each tensor in its metadata."""
    checksums = {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, checksums))


def tensor_sha256(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class CheckedTensors:
    """
    Reads the tensors of a safetensors file by name. Those of a file from [`save_tensors`] are compared with their
    checksums.

    Args:
        path (`Path`)
        advice (`str`): what to do if the file is damaged, a sentence.

    Raises:
        ValueError: if it is.
    """

    def __init__(self, path: Path, advice: str):
        self.path, self.advice = path, advice
        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, FileNotFoundError) as error:
            raise self.damaged(str(error)) from error
        self.checksums = dict(self.file.metadata() or {})
        self.checksums.pop("format", None)
        self.names = list(self.file.keys())
        if self.checksums and {*self.names} != {*self.checksums}:
            raise self.damaged("it holds other tensors than were saved")

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.file.get_tensor(name)
        # Once: what is read in every epoch is not summed up in every epoch.
        if name in self.checksums and self.checksums[name] != tensor_sha256(tensor):
            raise self.damaged(f"{name} has a wrong checksum")
        self.checksums.pop(name, None)
        return tensor

    def damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {reason}. {self.advice}")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """
    Holds a lock file for this process. The lock goes with its process, even a killed one.

    Raises:
        ValueError: if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process is at work in {path.parent}; wait for it, or use another folder.") from error
    try:
        yield
    finally:
        held.release()
