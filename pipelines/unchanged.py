"""Does a build have anything to do? What it would read is compared with what the last one read, unopened.

Looked at are the names, sizes and times of change of everything below the roots of the corpora, and of the
shards that versions among them name; the settings, the code, and the files of the version that came of it.
Losing the memory costs a build its time, nothing else.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipelines.atomic import write_atomically
from pipelines.corpora import dataset
from pipelines.facts import code_digest, stamp
from schemas.jobs import BuildConfig, CorpusConfig
from schemas.records import Record

# of what may lie below the roots; chosen by us: beyond, looking at it would cost more than it saves
MAX_ENTRIES = 50_000_000
PLACEMENT = {"num_workers", "cpus_per_task", "memory_per_task_mb", "object_store_mb"}


class Remembered(Record):
    """What the last finished build read, as a digest, and the version that it made."""

    inputs: str
    version: str
    files: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """`inputs` is the digest of what a build would read now; empty where that cannot be told."""

    path: Path
    inputs: str

    def version(self) -> str | None:
        """The version that a build would make, if it is whole as far as sizes and times tell."""
        try:
            known = Remembered.model_validate_json(self.path.read_bytes())
            same = bool(self.inputs) and known.inputs == self.inputs
            return known.version if same and _stamps(map(Path, known.files)) == known.files else None
        except (OSError, ValidationError):
            return None

    def remember(self, version: str, files: Iterable[Path]) -> None:
        """A build has made this version, which consists of these files."""
        if self.inputs:
            now = Remembered(inputs=self.inputs, version=version, files=_stamps(files))
            if not self.path.is_file() or self.path.read_bytes() != now.model_dump_json().encode():
                write_atomically(self.path, now.model_dump_json().encode(), durable=False)


def recall(corpora: Sequence[CorpusConfig], config: BuildConfig, path: Path, own: Path) -> Memory:
    """Look below the roots of the corpora; `own` is the folder that the build writes, and no part of them.

    Raises `CorpusError` where a version does not say which its shards are.
    """
    settings = [
        [corpus.model_dump(mode="json") for corpus in corpora],
        config.model_dump(mode="json", exclude=PLACEMENT),
        code_digest(),
    ]
    total = hashlib.sha256(json.dumps(settings).encode())
    try:
        for number, line in enumerate(_entries({Path(c.root).resolve() for c in corpora}, own.resolve())):
            if number >= MAX_ENTRIES:
                return Memory(path=path, inputs="")
            total.update(line)
        for shard in sorted({shard for c in corpora if c.format == "dataset" for shard in dataset.shards(c)}):
            at = stamp(str(shard)) if os.path.isfile(shard) else None
            total.update(os.fsencode(f"{shard} {at}\n"))
    except OSError:
        return Memory(path=path, inputs="")
    return Memory(path=path, inputs=total.hexdigest())


def _entries(roots: set[Path], own: Path) -> Iterator[bytes]:
    """A line for everything below the roots, folders too, in an order of its own names."""
    for root in sorted(roots):
        pending = [str(root)]
        while pending:
            folder = pending.pop()
            if folder == str(own):
                continue
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            for entry in entries:
                at = entry.stat(follow_symlinks=False)
                yield os.fsencode(f"{entry.path}\0{at.st_size}\0{at.st_mtime_ns}\0{at.st_ctime_ns}\n")
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def _stamps(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    return {str(file): stamp(str(file)) for file in files}
