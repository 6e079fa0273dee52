"""Opening what a corpus names, and distrusting all of it: paths, layouts, types and texts.

Two kinds of failure: `CorpusError` where a whole file is unusable, `Refusal` where one record is.
"""

import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.corpora.rows import CorpusError, Reason, Refusal
from schemas.jobs import CorpusConfig

IMAGES = (".jpg", ".jpeg", ".png")
CONTAINERS = (".tar", ".parquet", ".arrow")  # files that may hold the images themselves
MAX_TEXT = 10_000  # characters; chosen by us, far beyond any caption, so that one record cannot fill a memory

# the bound also makes pydantic refuse what cannot be encoded, which neither Arrow nor JSON would carry
Text = Annotated[str, Field(max_length=2**20)]
MAX_ID = 2**64  # a pickle holds integers of any length, which Python refuses to write out
Id = Annotated[int, Field(gt=-MAX_ID, lt=MAX_ID)] | Text
Pixels = Annotated[int, Field(gt=0, lt=2**31)]


class Entry(BaseModel):
    """Base of the records inside annotation files: unused fields are ignored, used ones typed."""

    model_config = ConfigDict(frozen=True, extra="ignore")


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def annotation_file(corpus: CorpusConfig, setting: Literal["annotations", "instances", "questions"]) -> Path:
    """The file that a setting of the corpus names. Raises `CorpusError`: unset, outside, missing."""
    path = _named(corpus, setting)
    if not path.is_file():
        raise CorpusError(f"{_where(corpus)}: {setting}: no file {path}; correct `root` or `{setting}`")
    return path


def data_folder(corpus: CorpusConfig, setting: Literal["images", "labels", "instances"]) -> Path:
    """The folder that a setting of the corpus names. Raises `CorpusError`: unset, outside, missing."""
    path = _named(corpus, setting)
    if not path.is_dir():
        raise CorpusError(f"{_where(corpus)}: {setting}: no folder {path}; correct `root` or `{setting}`")
    return path


def below_root(corpus: CorpusConfig, name: str) -> Path:
    """A file below the root. Raises `CorpusError` where the name leads outside."""
    try:
        return Path(_inside(corpus, name)[1])
    except ValueError as error:
        raise CorpusError(f"{_where(corpus)}: {name!r} {error}; move it below the root") from None


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Files of a folder and of those within, relative to it, sorted; see `linked_folders`.

    Raises `CorpusError` where a folder cannot be read.
    """
    found = []
    for base, _, names in _walk(folder):
        inner = Path(base).relative_to(folder)
        found += [(inner / name).as_posix() for name in names if name.lower().endswith(suffixes)]
    return sorted(found)


def linked_folders(folder: Path) -> list[str]:
    """Links to folders in a folder and in those within, relative to it, sorted: they are not followed."""
    links = (Path(base, name) for base, names, _ in _walk(folder) for name in names)
    return sorted(link.relative_to(folder).as_posix() for link in links if link.is_symlink())


def matching(corpus: CorpusConfig, pattern: str) -> list[Path]:
    """The files below the root that a name or a pattern with `*` means, sorted. Raises `CorpusError`."""
    where = _where(corpus)
    if pattern.startswith("/") or ".." in Path(pattern).parts:
        raise CorpusError(f"{where}: {pattern!r} leaves its root {corpus.root!r}; move it below the root")
    root = Path(corpus.root).resolve()
    named = [root / pattern] if (root / pattern).is_file() else root.glob(pattern)  # a name may hold [ or ]
    found = sorted(path.resolve() for path in named if path.is_file())
    if not found:
        raise CorpusError(f"{where}: no file {root / pattern}; correct `root` or the pattern")
    if broken := [path for path in found if not is_utf8(str(path))]:
        raise CorpusError(f"{where}: the name {str(broken[0])!r} is not UTF-8; rename it")
    if outside := [path for path in found if not path.is_relative_to(root)]:
        raise CorpusError(f"{where}: {outside[0]} lies outside the root {root}; copy it there")
    return found


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CorpusError` where the file holds anything else."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(
            f"{path}: cannot be read as JSON ({error}); is it whole, and the right file?"
        ) from None
    if not isinstance(document, dict):
        raise CorpusError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def section(document: dict[str, Any], name: str, path: Path) -> list[Any]:
    """A list of an annotation file. Raises `CorpusError` that says which sections there are."""
    value = document.get(name)
    if not isinstance(value, list):
        found = f"only {sorted(document)[:12]}" if value is None else type(value).__name__
        raise CorpusError(f"{path}: expected a list {name!r}, found {found}; is it the right kind of file?")
    return value


def of_parts(records: list[Any], corpus: CorpusConfig, path: Path) -> list[Any]:
    """The records whose `split` is one of `parts`, else the corpus's split.

    Raises `CorpusError` where a part has none.
    """
    wanted = corpus.parts or (corpus.split,)
    # a record without a readable split belongs to all of them: it is refused, and so it is counted
    splits = [record.get("split") if isinstance(record, dict) else None for record in records]
    there = {split for split in splits if isinstance(split, str)}
    if missing := [part for part in wanted if part not in there]:
        raise CorpusError(
            f"{path}: no record of split {missing[0]!r}; there are {sorted(there)}: choose with `parts`"
        )
    pairs = zip(records, splits, strict=True)
    return [record for record, split in pairs if not isinstance(split, str) or split in wanted]


def parse(model: type[AnyEntry], record: Any) -> AnyEntry:
    """One record, typed. Raises `Refusal` that names the fields at fault."""
    try:
        return model.model_validate(record)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)[:3]
        lines = [f"{'.'.join(map(str, p['loc'])) or 'record'}: {p['msg']}" for p in problems]
        raise Refusal("record", "; ".join(lines)) from None


def label(what: str, record: Any, key: str, position: int) -> str:
    """How the rejects table names a record: by its id, or by its place where it has none."""
    found = id_of(record, key)
    return f"{what} at position {position}" if found is None else f"{what} {found:.80}"


def id_of(record: Any, key: str = "id") -> str | None:
    """The id of a record as text, so that 12 and 12.0 find "12"; None where it has none that could be one."""
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, str):
        return value if value.isprintable() else None  # a lone surrogate, for one, could not be encoded
    if not isinstance(value, (int, float)) or not -MAX_ID < value < MAX_ID or value != int(value):
        return None
    return str(int(value))


def index(records: Iterable[Any], key: str = "id") -> dict[str, list[Any]]:
    """Records by their id; records without one are left out, see `without_id`."""
    found: dict[str, list[Any]] = {}
    for record in records:
        record_id = id_of(record, key)
        if record_id is not None:
            found.setdefault(record_id, []).append(record)
    return found


def without_id(records: Iterable[Any], key: str = "id") -> Iterator[tuple[int, Refusal]]:
    """The positions of the records that `index` leaves out, each with the reason."""
    for position, record in enumerate(records):
        if id_of(record, key) is None:
            yield position, Refusal("record", f"it has no {key!r} that is a whole number or a text")


def only(indexed: dict[str, list[Any]], key: Id, what: str, missing: Reason) -> Any:
    """The record of an id. Raises `Refusal` where there is none, or several that differ."""
    records = indexed.get(str(key), [])
    if not records:
        raise Refusal(missing, f"no {what} with id {key!r}")
    if any(record != records[0] for record in records):
        raise Refusal("duplicate-id", f"{len(records)} different {what}s have the id {key!r}")
    return records[0]


def data_file(corpus: CorpusConfig, folder: str, name: str, missing: Reason) -> tuple[str, str]:
    """An image or a label map: its absolute path, and the path below the root that provenance records.

    Raises `Refusal`: "path" where links or dots lead out of the corpus root or a name is not UTF-8, `missing`
    where no file is.
    """
    try:
        root, path = _inside(corpus, folder, name)
        found = Path(path).is_file()
    except (ValueError, OSError) as error:
        raise Refusal("path", f"{name!r:.200} {error}") from None
    if not found:
        raise Refusal(missing, f"no file {path}")
    return path, os.path.relpath(path, root)


def text(value: str) -> str:
    """A sentence with single spaces. Raises `Refusal` where it is empty, endless or has control codes."""
    sentence = " ".join(value.split())
    if not sentence:
        raise Refusal("text", "the text is empty")
    if len(sentence) > MAX_TEXT:
        raise Refusal("text", f"the text has {len(sentence)} characters, at most {MAX_TEXT} are read")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in sentence):
        raise Refusal("text", f"the text holds control characters or broken UTF-8: {sentence!a:.80}")
    return sentence


def texts(values: Iterable[str]) -> tuple[dict[int, str], list[Refusal]]:
    """Of the texts of one record the sentences, by their place, and why each of the others is none."""
    found: dict[int, str] = {}
    unusable = []
    listed = list(values)
    for place, value in enumerate(listed):
        try:
            found[place] = text(value)
        except Refusal as refusal:
            which = f"{place + 1} of {len(listed)}: " if len(listed) > 1 else ""
            unusable.append(Refusal(refusal.reason, f"{which}{refusal.detail}"))
    return found, unusable


def is_utf8(name: str) -> bool:
    """Whether a shard or a table could hold it: what a file system names otherwise comes with surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    def fail(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read ({error}); allow it, or move it away") from None

    return os.walk(folder, onerror=fail)


def _where(corpus: CorpusConfig) -> str:
    return f"corpus {corpus.name!r} ({corpus.format}, {corpus.split})"


def _named(corpus: CorpusConfig, setting: str) -> Path:
    name = getattr(corpus, setting)
    if not name:
        raise CorpusError(f"{_where(corpus)}: set `{setting}` to a place below its root {corpus.root!r}")
    try:
        return Path(_inside(corpus, name)[1])
    except ValueError as error:
        raise CorpusError(f"{_where(corpus)}: {setting} {name!r} {error}; move it below the root") from None


def _inside(corpus: CorpusConfig, *parts: str) -> tuple[str, str]:
    """The root and what lies below it, links followed; `ValueError` where that leads outside or is not UTF-8.

    As texts: with `Path` it would cost more, and it is asked for every file.
    """
    root = os.path.realpath(corpus.root)
    path = os.path.realpath(os.path.join(root, *parts))
    if not is_utf8("".join((*parts, path))):
        raise ValueError("is not UTF-8, and no dataset could name it")
    if os.path.islink(path):
        raise ValueError("is a loop of links")
    if not f"{path}/".startswith(os.path.join(root, "")):
        raise ValueError(f"leaves the corpus root {root}")
    return root, path
