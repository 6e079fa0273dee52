"""Files that appear whole or not at all: written under a temporary name, flushed to disk, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".tmp"


@contextmanager
def appearing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write; it takes its name when the block ends, and leaves no trace when the block raises.

    durable    survives a power cut; what a build can make again need not
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace the content of a file in one step: a reader sees the old bytes or the new, never a part."""
    with appearing(path, durable=durable) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut; a rename alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Delete what killed writers left. Only for whoever holds the lock of the folder."""
    for leftover in folder.glob(f".*{SUFFIX}"):
        leftover.unlink(missing_ok=True)
