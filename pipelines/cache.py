"""Where the bytes of shards are read: on this machine, in a remote store, or by way of a cache of it.

`RemoteShards` asks the store for the byte range of each sample: what a training reads is fetched once by all
machines, a request a sample. `CachedShards` keeps whole shards on local disk, up to a size, the least
recently used go first: a request a shard, but every machine fetches every shard that its ranks read from.

Several processes of one machine share a cache without a server: whoever needs a shard first fetches it and
the others wait for it; a shard appears whole, after its hash was compared, or not at all; whatever kills a
process, the next one goes on. What is deleted while a process reads it stays readable for that process.
"""

import fcntl
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.remote import Remote, RemoteError, copy
from pipelines.shards import Member, file_sha256, misplaced

log = logging.getLogger(__name__)

_OPEN_FILES = 32
_TRIES = 2  # of a fetch whose bytes are wrong
_PART = ".part"  # of a shard that is being fetched; its lock, too


class CacheError(OSError):
    """A shard that cannot be had: which one, from where, and why."""


class Shards(Protocol):
    """Where a stream reads its shards, from several threads; goes to loader processes."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of a shard, fewer where it ends.

        Raises `RemoteError` where the place cannot be reached, any other `OSError` where it is the shard.
        """

    def mend(self, name: str) -> bool:
        """After bytes that are not those written: whether reading them again may give others."""


class LocalShards:
    """Shards that lie in a folder of this machine, or of a file system that is mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = _LastUsed()

    def read(self, name: str, offset: int, length: int) -> bytes:
        file: _File = self._open.get(name, lambda name: _File(self._descriptor(name)))
        return os.pread(file.descriptor, length, offset)

    def mend(self, name: str) -> bool:
        return False

    def _descriptor(self, name: str) -> int:
        return os.open(self.folder / name, os.O_RDONLY)

    def __str__(self) -> str:
        return str(self.folder)


class _File:
    """An open file, which closes when the last thread that reads from it has done so."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _LastUsed:
    """A few open files, for the threads of this process: what another process gets is empty."""

    def __init__(self) -> None:
        self.files: OrderedDict[str, Any] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, name: str, opened: Callable[[str], Any]) -> Any:
        file = self.files.get(name) or opened(name)
        with self.lock:
            self.files[name] = file
            self.files.move_to_end(name)
            while len(self.files) > _OPEN_FILES:
                self.files.popitem(last=False)
        return file

    def __reduce__(self) -> Any:
        return _LastUsed, ()


class RemoteShards:
    """Shards below a URI, asked for the range of each sample.

    names    what a shard is called there, where it has another name
    """

    def __init__(self, remote: Remote, names: Mapping[str, str] | None = None) -> None:
        self.remote, self.names = remote, dict(names or {})
        self._open = _LastUsed()

    def chunks(self, name: str) -> Iterator[bytes]:
        """All of a shard. Raises `OSError`."""
        return self.remote.chunks(self._there(name))

    def problem(self, name: str, digest: str, members: Sequence[Member]) -> str:
        """What is wrong with a shard that should have this SHA-256 and hold these samples, or nothing."""
        there = self._there(name)
        try:
            wrong = misplaced(self.remote.chunks(there), digest, members)
        except OSError as error:
            wrong = str(error)
        return wrong and f"{self}/{there}: {wrong}"

    def read(self, name: str, offset: int, length: int) -> bytes:
        there = self._there(name)
        file = self._open.get(name, lambda _: self.remote.open(there))
        with self.remote.explained("read", there):
            return bytes(file.read_at(length, offset))

    def mend(self, name: str) -> bool:
        return False

    def _there(self, name: str) -> str:
        return self.names.get(name, name)

    def __str__(self) -> str:
        return str(self.remote)


class CachedShards(LocalShards):
    """Shards of `source` by way of `folder`.

    manifest      rows of schemas.records.MANIFEST: what size and hash each shard must have
    limit_bytes   the folder holds no more than this, what is being fetched included
    Raises `ValueError` where the largest shard does not fit.
    """

    def __init__(self, source: RemoteShards, folder: Path, limit_bytes: int, manifest: pa.Table) -> None:
        super().__init__(folder)
        largest = pc.max(manifest["size_bytes"]).as_py() or 0
        if largest > limit_bytes:
            raise ValueError(
                f"the cache may hold {limit_bytes} bytes, a shard has {largest}: raise train.cache_gb"
            )
        self.source, self.limit_bytes, self.manifest = source, limit_bytes, manifest
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()

    def _descriptor(self, name: str) -> int:
        while True:
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY)
                os.utime(descriptor)  # its age is the time of its last use
                return descriptor
            except FileNotFoundError:
                with self._fetching(name) as part:
                    if (self.folder / name).exists():  # another process brought it while this one waited
                        part.unlink()
                    else:
                        self._fetch(name, part)

    def mend(self, name: str) -> bool:
        path = self.folder / name
        try:
            if file_sha256(path) == self._wanted(name)[1]:
                return False
            log.warning("%s was damaged on this disk and is fetched again", path)
            path.unlink()
        except FileNotFoundError:
            log.debug("%s is gone already", path)
        self._open.files.pop(name, None)
        return True

    def _wanted(self, name: str) -> tuple[int, str]:
        """Size and hash."""
        (row,) = self.manifest.filter(pc.equal(self.manifest["shard"], name)).to_pylist()
        return row["size_bytes"], row["sha256"]

    @contextmanager
    def _fetching(self, name: str) -> Iterator[Path]:
        """The unfinished file of a shard, for one process at a time."""
        part = self.folder / f".{name}{_PART}"
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # whoever held it has renamed or deleted it by now: then this lock guards nothing
                if _is_at(descriptor, part):
                    os.truncate(descriptor, 0)
                    yield part
                    return
            finally:
                os.close(descriptor)

    def _fetch(self, name: str, part: Path) -> None:
        size, digest = self._wanted(name)
        self._reserve(part, size)
        source = f"{self.source}/{name}"
        try:
            for _ in range(_TRIES):
                if (found := self._copy(name, part)) == digest:
                    with _locked(self.folder / ".lock"):  # or one that counts meanwhile would see neither
                        part.rename(self.folder / name)
                    return
        except OSError as error:
            part.unlink(missing_ok=True)
            if isinstance(error, RemoteError):
                raise
            raise CacheError(f"{source} cannot be fetched: {error}") from None
        part.unlink(missing_ok=True)
        raise CacheError(f"{source} has the hash {found[:16]}.., {digest[:16]}.. was written")

    def _copy(self, name: str, part: Path) -> str:
        """Returns the hash of what was copied."""
        with part.open("r+b") as file:
            digest = copy(self.source.chunks(name), file)
            file.truncate()
        return digest

    def _reserve(self, part: Path, size: int) -> None:
        """Give the unfinished file its whole length, as soon as there is room for it."""
        while not self._make_room(part, size):
            # only what is being copied is waited for, which waits for nobody
            copied = next((p for p in self._unfinished() if p != part), None)
            if copied is not None:
                with _locked(copied):
                    log.debug("%s is fetched, or its process is gone", copied)

    def _make_room(self, part: Path, size: int) -> bool:
        """Delete what was not used for longest; reserve `size` bytes where that is enough."""
        with _locked(self.folder / ".lock"):
            for path in self._unfinished():
                with _locked(path, wait=False) as abandoned:
                    if abandoned:
                        path.unlink(missing_ok=True)
            held = [_age_and_size(path) for path in self.folder.iterdir()]
            room = self.limit_bytes - sum(taken for _, taken, _ in held)
            for _, freed, path in sorted(held):
                if room < size and not path.name.startswith("."):
                    path.unlink(missing_ok=True)
                    room += freed
            if room >= size:
                os.truncate(part, size)
            return room >= size

    def _unfinished(self) -> list[Path]:
        """Those that have their length; the others wait for room."""
        return [path for path in self.folder.glob(f".*{_PART}") if _age_and_size(path)[1]]

    def __str__(self) -> str:
        return str(self.source)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file; whether it is there, and was free where this does not wait."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _age_and_size(path: Path) -> tuple[int, int, Path]:
    """When it was last used and its bytes; nothing where another process deleted it since it was listed."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0, path
    return stat.st_mtime_ns, stat.st_size, path


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
