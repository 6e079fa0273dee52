"""Corpora at a URI: what is new or changed over there is copied beside the build, which then reads files.

A copy has the size and the time of change of what it was copied from, as rsync does it, so nothing else is
remembered and losing the folder costs time only. A version of our own comes with the shards that it names.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.catalog import names_there
from pipelines.corpora.rows import CorpusError
from pipelines.parallel import Progress
from pipelines.remote import Remote, RemoteError, at_once
from schemas.jobs import CorpusConfig

log = logging.getLogger(__name__)
_DOWNLOADS = 16  # at a time; chosen by us
_Wanted = dict[str, tuple[str, fs.FileInfo]]  # by names here, names and facts over there


def mirrored(corpora: Sequence[CorpusConfig], folder: Path) -> list[CorpusConfig]:
    """The same corpora with their roots on this machine; those at a URI are brought up to date in `folder`.

    What no corpus needs any more is deleted there. Raises `CorpusError` where a URI holds nothing or what
    cannot be copied, `RemoteError` where it cannot be read.
    """
    homes: dict[Path, tuple[Remote, _Wanted]] = {}
    found = []
    for corpus in corpora:
        if "://" not in corpus.root:
            found.append(corpus)
            continue
        address, below = _place(corpus)
        home = folder / hashlib.sha256(address.encode()).hexdigest()[:16]
        if home not in homes:
            there = Remote.at(address)
            homes[home] = there, {} if below else {name: (name, file) for name, file in there.list().items()}
        there, wanted = homes[home]
        if below:
            wanted |= _of_version(there, below)
        found.append(corpus.model_copy(update={"root": str(home / below)}))
    for path in folder.glob("*"):
        if path not in homes:
            shutil.rmtree(path)
    for home, (there, wanted) in homes.items():
        _bring(there, wanted, home)
    return found


def _place(corpus: CorpusConfig) -> tuple[str, str]:
    """The root's URI; of a version its dataset's, and where it lies below that."""
    if "@" in corpus.root:
        raise CorpusError(f"{corpus.name}: a root's address holds no key: set AWS_ACCESS_KEY_ID and the like")
    if corpus.format != "dataset":
        return corpus.root, ""
    place, mark, options = corpus.root.partition("?")
    dataset, _, version = place.rstrip("/").rpartition("/versions/")
    if not dataset or "/" in version:
        raise CorpusError(f"{place}: `root` is the place of a version, .../datasets/<name>/versions/<id>")
    return f"{dataset}{mark}{options}", f"versions/{version}"


def _of_version(there: Remote, version: str) -> _Wanted:
    """Its tables and its shards; one that is not there costs the samples that it held."""
    tables = {f"{version}/{name}": file for name, file in there.list(version).items()}
    if f"{version}/manifest.parquet" not in tables:
        raise CorpusError(f"{there}/{version} is no version of a dataset")
    manifest = pq.read_table(pa.BufferReader(there.read(f"{version}/manifest.parquet")))
    shards = there.list("shards")
    named = {f"shards/{here}": name for here, name in names_there(manifest).items() if name in shards}
    wanted = {name: (name, file) for name, file in tables.items()}
    return wanted | {here: (f"shards/{name}", shards[name]) for here, name in named.items()}


def _bring(there: Remote, wanted: _Wanted, home: Path) -> None:
    """Copy what differs, delete what is not wanted."""
    if not wanted:
        raise CorpusError(f"{there} holds no files")
    for name in wanted:
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise CorpusError(f"{there}/{name}: a name that leads elsewhere cannot be copied")
    for path in sorted(home.rglob("*"), reverse=True):  # what lies in a folder before the folder
        if path.is_dir():
            with suppress(OSError):  # it is not empty
                path.rmdir()
        elif path.relative_to(home).as_posix() not in wanted:
            path.unlink()
    changed = {name: one for name, one in wanted.items() if not _same(home / name, one[1])}
    if not changed:
        return
    log.info("%d of %d files of %s are new or changed", len(changed), len(wanted), there)
    progress = Progress("copied files", len(changed))
    for _ in at_once(_DOWNLOADS, partial(_copy, there, home), changed.items()):
        progress.add(1)


def _copy(there: Remote, home: Path, one: tuple[str, tuple[str, fs.FileInfo]]) -> None:
    name, (source, file) = one
    path = home / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there.download(source, path, durable=False)
        os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
    except RemoteError:
        raise
    except OSError as error:
        raise CorpusError(f"cannot copy {there}/{source} to {path}: {error.strerror or error}") from error


def _same(path: Path, file: fs.FileInfo) -> bool:
    try:
        here = path.stat()
    except OSError:
        return False
    return (here.st_size, here.st_mtime_ns) == (file.size, file.mtime_ns)
