"""Files that are whole or absent, files that grow by whole lines, and folders that one process at a time may write."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .text_files import parse_json, read_text


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary_path)`, forces the file to disk, renames it to `path`, and forces that to disk too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file, none if it does not exist; a last line that a kill cut off is no row."""
    text = read_text(path) if path.is_file() else ""
    return [parse_json(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n")[:-1], start=1)]


def append_lines(path: Path, rows: list[dict]) -> None:
    """Appends rows to a JSONL file, durably, in place of a last line that a kill cut off. One process a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


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
