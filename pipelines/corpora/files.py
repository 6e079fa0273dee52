"""Opening what a corpus names, and distrusting all of it: paths, layouts, types and texts.

Two kinds of failure: `CorpusError` where a whole file is unusable, `Refusal` where one record is.
"""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.corpora.rows import CorpusError, Reason, Refusal
from schemas.jobs import CorpusConfig

CONTAINERS = (".tar", ".parquet", ".arrow")  # files that may hold the images themselves
MAX_TEXT = 10_000  # characters; chosen by us, far beyond any caption, so that one record cannot fill a memory

# the bound also makes pydantic refuse what cannot be encoded, which neither Arrow nor JSON would carry
Text = Annotated[str, Field(max_length=2**20)]
Id = int | Text
Pixels = Annotated[int, Field(gt=0, lt=2**31)]


class Entry(BaseModel):
    """Base of the records inside annotation files: unused fields are ignored, used ones typed."""

    model_config = ConfigDict(frozen=True, extra="ignore")


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def annotation_file(corpus: CorpusConfig, setting: Literal["annotations", "instances", "questions"]) -> Path:
    """The file that a setting of the corpus names. Raises `CorpusError`: unset, outside, missing."""
    name = getattr(corpus, setting)
    where = f"corpus {corpus.name!r} ({corpus.format}, {corpus.split})"
    if not name:
        raise CorpusError(f"{where}: set `{setting}` to a file below its root {corpus.root!r}")
    try:
        path = _inside(corpus, name)
    except ValueError as error:
        raise CorpusError(f"{where}: {setting} {name!r} {error}; move it below the root") from None
    if not path.is_file():
        raise CorpusError(f"{where}: {setting}: no file {path}; correct `root` or `{setting}`")
    return path


def matching(corpus: CorpusConfig, pattern: str) -> list[Path]:
    """The files below the root that a name or a pattern with `*` means, sorted. Raises `CorpusError`."""
    where = f"corpus {corpus.name!r} ({corpus.format}, {corpus.split})"
    if pattern.startswith("/") or ".." in Path(pattern).parts:
        raise CorpusError(f"{where}: {pattern!r} leaves its root {corpus.root!r}; move it below the root")
    root = Path(corpus.root).resolve()
    found = sorted(path.resolve() for path in root.glob(pattern) if path.is_file())
    if not found:
        raise CorpusError(f"{where}: no file {root / pattern}; correct `root` or the pattern")
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
    """The id of a record as text, so that 12 finds "12"; None where it has none that could be one."""
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, str):
        return value if value.isprintable() else None  # a lone surrogate, for one, could not be encoded
    return str(value) if isinstance(value, int) else None


def index(records: Iterable[Any], key: str = "id") -> dict[str, list[Any]]:
    """Records by their id; records without one are left out."""
    found: dict[str, list[Any]] = {}
    for record in records:
        record_id = id_of(record, key)
        if record_id is not None:
            found.setdefault(record_id, []).append(record)
    return found


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

    Raises `Refusal`: "path" where links or dots lead out of the corpus root, `missing` where no file is.
    """
    try:
        path = _inside(corpus, folder, name)
        found = path.is_file()
    except (ValueError, OSError) as error:
        raise Refusal("path", f"{name!r:.200} {error}") from None
    if not found:
        raise Refusal(missing, f"no file {path}")
    return str(path), path.relative_to(Path(corpus.root).resolve()).as_posix()


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


def _inside(corpus: CorpusConfig, *parts: str) -> Path:
    """Resolve below the root, following links; `ValueError` where that leads outside."""
    root = Path(corpus.root).resolve()
    try:
        path = root.joinpath(*parts).resolve()
    except RuntimeError:  # Python 3.11 and 3.12 say so of a loop of links
        raise ValueError("is a loop of links") from None
    if not path.is_relative_to(root):
        raise ValueError(f"leaves the corpus root {root}")
    return path
