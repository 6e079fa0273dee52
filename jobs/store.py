"""Where all state lives: which folder that is, its other side at a URI, files that change at once."""

import functools
import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from pydantic import BaseModel

if TYPE_CHECKING:  # both bring pyarrow, which a command line that is refused need not wait for
    from pipelines.catalog import Catalog
    from pipelines.remote import Remote

log = logging.getLogger(__name__)
HOME = Path("~/.local/share/xdecoder")
# Ray unpacks what `ray job submit --working-dir` uploads under such a path, and deletes it after the job.
UPLOADED = "/runtime_resources/working_dir_files/"
ESCAPE = ","  # instead of the %, which other programs would decode
PACKAGES = ("schemas", "pipelines", "xdecoder", "jobs")


def resolve(setting: str) -> Path:
    """The store's absolute folder: XDECODER_STORE, else the job file's, relative to the working directory.

    Of a store at a URI it is this machine's side of it, in XDECODER_WORK (default `~/.local/share/xdecoder`),
    named after the URI so that whoever has the folder finds the other side. There, too, goes a relative store
    of a working directory that Ray uploaded, and will delete. Raises `ValueError` for a URI with a secret.
    """
    chosen = os.environ.get("XDECODER_STORE") or setting
    home = Path(os.environ.get("XDECODER_WORK") or HOME).expanduser()
    if "://" in chosen:
        if "@" in chosen:
            raise ValueError("a store's address holds no key: set AWS_ACCESS_KEY_ID and the like instead")
        return (home / _named_after(chosen.rstrip("/"))).resolve()
    path = Path(chosen).expanduser()
    if not path.is_absolute() and UPLOADED in f"{Path.cwd().as_posix()}/":
        path = home / path
        log.info(
            "the working directory is a temporary upload, so the store is %s (XDECODER_STORE changes it)",
            path,
        )
    return path.resolve()


def remote(path: Path) -> "Remote | None":
    """The other side of a store's folder, or of a folder in it; None where all of it is on this side."""
    for store in (path, *path.parents):
        uri = unquote(store.name.replace(ESCAPE, "%"))
        if "://" in uri and _named_after(uri) == store.name:
            there = _opened(uri)
            return there / path.relative_to(store).as_posix() if path != store else there
    return None


def catalog_of(store: Path, dataset: str) -> "Catalog":
    """The versions of a dataset, on the side that everybody sees."""
    from pipelines.catalog import Catalog

    return Catalog(store, dataset, remote(store / "datasets" / dataset))


def names_in(folder: Path) -> list[str]:
    """What lies in a folder of a store, on the side that everybody sees."""
    there = remote(folder)
    found = there.list(deep=False) if there else (path.name for path in folder.glob("*"))
    return sorted(found)


def push(path: Path) -> None:
    """Make a file the same on the store's other side, where it has one."""
    if there := remote(path.parent):
        there.upload(path, path.name)


def pull(path: Path) -> Path:
    """The reverse; a file that is only on this side, or on neither, is left alone. Returns the path."""
    if there := remote(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            there.download(path.name, path)
    return path


def _named_after(uri: str) -> str:
    return quote(uri, safe="").replace("%", ESCAPE)


@functools.cache
def _opened(uri: str) -> "Remote":
    from pipelines.remote import Remote

    return Remote.at(uri)


def digest(*parts: Any) -> str:
    """16 hex digits of pydantic models or plain JSON values; equal content, equal digest."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def digest_files(folder: Path, pattern: str = "*") -> str:
    """16 hex digits of the names and bytes of the files under a folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]


def code_version() -> str:
    """16 hex digits of the source of our packages, the same in a checkout, an upload and an installation."""
    root = Path(__file__).resolve().parents[1]
    return digest([digest_files(root / package, "*.py") for package in PACKAGES])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON document, or {} where there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_json(path: Path, document: Any) -> None:
    """Replace a JSON file in one step: readers see the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
