"""Where the checkpoints of a run lie: in a folder, or elsewhere, as in an object store.

A checkpoint is files under a name, `step-00000400`. It is there when its manifest is, which comes last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

MANIFEST = "checkpoint.json"
DAMAGE = (FileNotFoundError, ValueError, KeyError)  # what is raised about files that are not what was written


class Place(Protocol):
    """What can be done with checkpoints, wherever they lie."""

    def names(self) -> list[str]:
        """Of those that are there, oldest first."""

    def manifest(self, name: str) -> dict[str, Any]:
        """Raises one of `DAMAGE` where it is not what was written."""

    def take(self, part: Path, name: str, digest: str) -> None:
        """A file of a checkpoint to be. Raises `ValueError` where something else arrived."""

    def finish(self, unfinished: Path, name: str) -> None:
        """Every part was taken and the folder has the manifest: now the checkpoint is there."""

    def bring(self, name: str, files: Mapping[str, str], scratch: Path) -> Path:
        """The folder where these files lie, by their digests. Raises one of `DAMAGE` where one is another."""

    def keep(self, names: Collection[str]) -> None:
        """Remove all but these."""


class Folder:
    """A folder that all ranks see. A checkpoint takes its name when all of it is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step-*"))

    def manifest(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / MANIFEST).read_text(encoding="utf-8")))

    def take(self, part: Path, name: str, digest: str) -> None:
        """It lies there already."""

    def finish(self, unfinished: Path, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)  # a damaged one, which is made again
        _sync(unfinished)
        unfinished.rename(self.folder / name)
        _sync(self.folder)

    def bring(self, name: str, files: Mapping[str, str], scratch: Path) -> Path:
        for file, digest in files.items():
            _compare(file, sha256(self.folder / name / file), digest)
        return self.folder / name

    def keep(self, names: Collection[str]) -> None:
        for name in set(self.names()) - set(names):
            shutil.rmtree(self.folder / name, ignore_errors=True)


class Files(Protocol):
    """Files that lie elsewhere, by names with slashes; `pipelines.remote.Remote` is one such place.

    upload, download    return the SHA-256 of what passed
    """

    def upload(self, path: Path, name: str) -> str: ...

    def download(self, name: str, path: Path) -> str: ...

    def read(self, name: str) -> bytes: ...

    def list(self) -> Collection[str]: ...

    def delete(self, name: str) -> None: ...


class Elsewhere:
    """Files in folders that only their manifests show to be whole."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __str__(self) -> str:
        return str(self.files)

    def names(self) -> list[str]:
        whole = (name for name in self.files.list() if name.endswith(f"/{MANIFEST}"))
        return sorted(name.partition("/")[0] for name in whole)

    def manifest(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.files.read(f"{name}/{MANIFEST}")))

    def take(self, part: Path, name: str, digest: str) -> None:
        _compare(part.name, self.files.upload(part, f"{name}/{part.name}"), digest)

    def finish(self, unfinished: Path, name: str) -> None:
        self.files.upload(unfinished / MANIFEST, f"{name}/{MANIFEST}")

    def bring(self, name: str, files: Mapping[str, str], scratch: Path) -> Path:
        shutil.rmtree(scratch, ignore_errors=True)  # of a rank that was killed
        scratch.mkdir()
        for file, digest in files.items():
            _compare(file, self.files.download(f"{name}/{file}", scratch / file), digest)
        return scratch

    def keep(self, names: Collection[str]) -> None:
        """What never got its manifest goes, too; of the others the manifest goes first."""
        for file in sorted(self.files.list(), key=lambda file: not file.endswith(MANIFEST)):
            if file.partition("/")[0] not in names:
                self.files.delete(file)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(file: str, found: str, digest: str) -> None:
    if found != digest:
        raise ValueError(f"not what was written: {file}")


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut; a rename alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
