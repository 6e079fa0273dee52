"""Files below a URI: in an object store, on a disk, wherever pyarrow can open them.

A file appears whole: an object store shows an object when its last byte is there, elsewhere it takes its name
at the end. What may be replaced is for the callers to decide.
"""

import hashlib
import posixpath
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from pipelines.atomic import SUFFIX, appearing

T = TypeVar("T")
_CHUNK = 2**22  # bytes; chosen by us
_RENAMING = ("local", "hdfs")  # pyarrow's names of file systems that show what is half written


class RemoteError(OSError):
    """A place that cannot be reached, read or written: which one, why, and what to look at."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A folder of a file system; messages call it by its `uri`. Goes to other processes.

    Names are relative to it, with slashes. What cannot be done raises `RemoteError`, a file that is not there
    `FileNotFoundError`.
    """

    files: fs.FileSystem
    root: str
    uri: str

    @staticmethod
    def at(uri: str) -> "Remote":
        """A URI, or the path of a folder. Nothing is asked of an object store yet, but its region."""
        try:
            files, root = fs.FileSystem.from_uri(uri)
        except (OSError, pa.ArrowException) as error:
            raise _refused("open", uri, error) from error
        return Remote(files=files, root=root, uri=uri.partition("?")[0].rstrip("/"))

    def __truediv__(self, name: str) -> "Remote":
        return Remote(files=self.files, root=f"{self.root}/{name}", uri=f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    def open(self, name: str) -> Any:
        """A pyarrow file, whose `read_at` serves several threads."""
        with self.explained("read", name):
            return self.files.open_input_file(f"{self.root}/{name}")

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, a few megabytes at a time."""
        with self.explained("read", name), self.files.open_input_stream(f"{self.root}/{name}") as file:
            while data := file.read(_CHUNK):
                yield data

    def read(self, name: str) -> bytes:
        return b"".join(self.chunks(name))

    def sha256(self, name: str) -> str:
        return copy(self.chunks(name))

    def download(self, name: str, path: Path, *, durable: bool = True) -> str:
        """Returns the SHA-256 of what came. The file takes its name when all of it is there."""
        with appearing(path, durable=durable) as file:
            return copy(self.chunks(name), file)

    def upload(self, path: Path, name: str) -> str:
        """Returns the SHA-256 of what went."""
        with path.open("rb") as local, self._written(name) as file:
            return copy(iter(lambda: local.read(_CHUNK), b""), file)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file in one step."""
        with self._written(name) as file:
            file.write(data)

    def delete(self, name: str) -> None:
        with self.explained("delete", name):
            self.files.delete_file(f"{self.root}/{name}")

    def list(self, folder: str = "", *, deep: bool = True) -> dict[str, fs.FileInfo]:
        """All files below a folder, by their names in it; or else what lies in it, folders too.

        Nothing where there is no such folder, an error where there is no such bucket.
        """
        where = f"{self.root}/{folder}".rstrip("/")
        with self.explained("list", folder):
            found = self.files.get_file_info(fs.FileSelector(where, recursive=deep, allow_not_found=True))
            bucket = self.root.partition("/")[0]  # empty on a disk
            if not found and bucket and self.files.get_file_info(bucket).type == fs.FileType.NotFound:
                raise OSError(f"there is no bucket {bucket!r}")
        return {
            info.path[len(where) + 1 :]: info
            for info in found
            if not (deep and info.type == fs.FileType.Directory) and not info.path.endswith(SUFFIX)
        }

    @contextmanager
    def _written(self, name: str) -> Iterator[Any]:
        path = f"{self.root}/{name}"
        with self.explained("write", name):
            if self.files.type_name not in _RENAMING:
                with self.files.open_output_stream(path) as file:
                    yield file
                return
            folder, last = posixpath.split(path)
            self.files.create_dir(folder)
            temporary = f"{folder}/.{last}.{secrets.token_hex(4)}{SUFFIX}"
            with self.files.open_output_stream(temporary) as file:
                yield file
            self.files.move(temporary, path)

    @contextmanager
    def explained(self, doing: str, name: str) -> Iterator[None]:
        """Inside, what pyarrow raises becomes a `RemoteError` about this file."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise _refused(doing, f"{self.uri}/{name}", error) from error


def at_once(number: int, work: Callable[[T], object], items: Iterable[T]) -> Iterator[None]:
    """Do the work on every item, so many at a time; yields whenever the next one is done.

    Raises what the first that failed did, and then begins no other.
    """
    pool = ThreadPoolExecutor(max_workers=number)
    try:
        for _ in pool.map(work, items):
            yield
    finally:
        pool.shutdown(cancel_futures=True)


def copy(chunks: Iterable[bytes], file: Any = None) -> str:
    """Returns the SHA-256 of what passed."""
    whole = hashlib.sha256()
    for data in chunks:
        whole.update(data)
        if file is not None:
            file.write(data)
    return whole.hexdigest()


def _refused(doing: str, uri: str, error: Exception) -> RemoteError:
    why = str(error).splitlines()[0].partition(" (Request ID")[0]
    return RemoteError(
        f"cannot {doing} {uri}: {why}; look at the address, the credentials (for s3:// those of the AWS "
        "command line: AWS_ACCESS_KEY_ID or AWS_PROFILE, AWS_ENDPOINT_URL for a server of one's own) and "
        "the network"
    )
