"""Image-text pairs in tables: TSV, CSV, Parquet or Arrow, with the path of each image or its very bytes.

CC3M, CC12M and SBU in the forms people keep them, Hugging Face's Parquet files, and the ViLT layout of the
original X-Decoder (Arrow with `image` bytes and a list of texts as `caption`). `annotations` is one file or a
pattern; the columns are `image_column` and `caption_column` ("image.bytes" leads into a struct), others are
ignored, but for `licence` or `license`. What an image in a cell is called: its `image_id`, else the `path`
beside its bytes, else what its bytes are, because rows move when others come and go. Texts are UTF-8; a TSV
has no quoting, a CSV has RFC 4180's. Settings used: `images`, `annotations`, `image_column`,
`caption_column`.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import places
from pipelines.corpora import licences
from pipelines.corpora.files import data_file, matching, texts
from pipelines.corpora.gathering import Gathered
from pipelines.corpora.rows import CorpusError, Refusal, Row, lost_captions, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source

_BEHIND_LICENCE = "\x1f"  # which Python takes for a space
MAX_FIELD = 2**24  # characters of a cell of a CSV; chosen by us, so that a quote left open fills no memory
# how a reject names it; its image, as a path or found already, or why there is none; its caption; its licence
Record = tuple[str, Any, Any, Any]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """An image. `file` is what holds it, below the root; `ids` what a column calls one in a cell."""

    place: str
    file: str
    image_id: str
    ids: tuple[str, ...] = ()
    unnamed: bool = False
    licence: str = ""


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image: those in cells as they come, those at paths at the end, because a path may stand on
    several lines; one reject an unusable record or caption. Raises `CorpusError`.
    """
    if not corpus.annotations:
        raise CorpusError(
            f"corpus {corpus.name!r} (captions_table): set `annotations` to a file or a pattern"
        )
    root, captions = os.path.realpath(corpus.root), Gathered()
    for path in matching(corpus, corpus.annotations):
        if path.suffix not in KINDS:
            raise CorpusError(f"{path}: a table ends in one of {', '.join(KINDS)}")
        for name, image, said, stated in KINDS[path.suffix](corpus, path):
            try:
                if isinstance(image, Refusal):
                    raise image
                sentences, unusable = texts(_sentences(said))
                yield from lost_captions(corpus, name, sentences, unusable)
                licence = licences.of_image(corpus, stated)
                if sentences and isinstance(image, _Found):
                    yield _row(corpus, replace(image, licence=licence), sentences.values())
                elif sentences:
                    captions.add(_named(_file(corpus, image), licence), *sentences.values())
            except Refusal as refusal:
                yield refuse(corpus, name, refusal)
    for name, gathered in captions:
        licence, _, file = name.partition(_BEHIND_LICENCE)
        found = _Found(place=os.path.join(root, file), file=file, image_id=file, licence=licence)
        yield _row(corpus, found, gathered)


def _named(file: str, licence: str) -> str:
    """Lines that state one licence of a file are gathered: of the licence every space is one blank."""
    return f"{' '.join(licence.split())}{_BEHIND_LICENCE}{file}"


def _row(corpus: CorpusConfig, found: _Found, captions: Iterable[str]) -> Row:
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=found.image_id,
        image_path=found.place,
        height=None,
        width=None,
        captions=tuple(captions),
        # line numbers are no ids: they would change with every line inserted above
        source=Source(corpus=corpus.name, files=(found.file,), ids=found.ids, licence=found.licence),
        unnamed=found.unnamed,
    )


def _file(corpus: CorpusConfig, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise Refusal("record", f"the image is {name!r:.80}, not a path")
    return data_file(corpus, corpus.images, name, "no-image")[1]


def _sentences(said: Any) -> list[str]:
    sentences = said if isinstance(said, list) else [said]
    if not sentences or not all(isinstance(sentence, str) for sentence in sentences):
        raise Refusal("record", f"the caption is {said!r:.80}, not a text or a list of texts")
    return sentences


def _tsv(corpus: CorpusConfig, path: Path) -> Iterator[Record]:
    lines = (line.rstrip("\n").rstrip("\r").split("\t") for line in _lines(path))
    return _delimited(corpus, path, ((number, cells) for number, cells in enumerate(lines, 1)))


def _csv(corpus: CorpusConfig, path: Path) -> Iterator[Record]:
    csv.field_size_limit(MAX_FIELD)  # of all readers of the process; Python's own would be 131 072
    # a carriage return within a line is a space, as in a TSV; csv would give up at it
    lines = (line.rstrip("\r\n").replace("\r", " ") + "\n" for line in _lines(path))
    reader = csv.reader(lines, strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        first = 1
        try:
            for cells in reader:
                yield first, cells
                first = reader.line_num + 1
        except csv.Error as error:
            raise CorpusError(
                f"{path}: line {first} and those behind it cannot be told apart ({error}); mend its quotes: "
                "one that opens a cell closes it, and one within it stands twice"
            ) from None

    return _delimited(corpus, path, numbered())


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends; what is not UTF-8 becomes surrogates, which `text` refuses."""
    with path.open("r", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        yield from file


def _delimited(corpus: CorpusConfig, path: Path, lines: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    wanted = (corpus.image_column, corpus.caption_column)
    _, header = next(lines, (1, []))
    if not set(wanted) <= set(header):
        raise CorpusError(
            f"{path}: the first line must name the columns {wanted[0]!r} and {wanted[1]!r} (`image_column`, "
            f"`caption_column`); it is {ascii(header):.120}"
        )
    at = [header.index(column) for column in wanted]
    named = [header.index(column) for column in licences.COLUMNS if column in header]
    for number, cells in lines:
        if cells in ([], [""]):
            continue
        name = f"{path.name} line {number}"
        if len(cells) != len(header):
            yield name, Refusal("record", f"{len(cells)} cells, the header has {len(header)}"), None, None
        else:
            yield name, cells[at[0]], cells[at[1]], next((cells[i] for i in named if cells[i]), "")


def _parquet(corpus: CorpusConfig, path: Path) -> Iterator[Record]:
    try:
        file = places.open_parquet(str(path))
        image, columns = _columns(corpus, path, file.schema_arrow)
        yield from _rows(corpus, path, image, columns, file.iter_batches(columns=columns))
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: cannot be read to its end: {error!s:.300}; is it whole?") from None


def _arrow(corpus: CorpusConfig, path: Path) -> Iterator[Record]:
    try:
        table = places.open_arrow(str(path))
    except OSError as error:
        raise CorpusError(f"{error}; is it whole?") from None
    image, columns = _columns(corpus, path, table.schema)
    outer = table.select(list(dict.fromkeys(column.partition(".")[0] for column in columns)))
    yield from _rows(corpus, path, image, columns, iter(outer.to_batches()))


def _columns(corpus: CorpusConfig, path: Path, schema: pa.Schema) -> tuple[str, list[str]]:
    """The column of the image's bytes, empty where it holds paths; and the columns to be read now."""
    image, caption = corpus.image_column, corpus.caption_column
    kind = _type(schema, image)
    if kind is None or _type(schema, caption) is None:
        raise CorpusError(
            f"{path}: no columns {image!r} and {caption!r} (`image_column`, `caption_column`); it has "
            f"{schema.names[:20]}"
        )
    if pa.types.is_struct(kind) and _type(schema, f"{image}.bytes") is not None:
        image = f"{image}.bytes"  # as Hugging Face stores images
        kind = _type(schema, image)
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    others = [name for name in (*_names(image), *licences.COLUMNS) if _type(schema, name) is not None]
    return (image, [caption, *others]) if binary else ("", [image, caption, *others])


def _names(image: str) -> tuple[str, str]:
    """Columns that say what an image is called; the second is Hugging Face's, beside its bytes."""
    return "image_id", f"{image.rpartition('.')[0]}.path"


def _type(schema: pa.Schema, column: str) -> pa.DataType | None:
    name, _, inner = column.partition(".")
    if schema.names.count(name) != 1:
        return None
    kind = schema.field(name).type
    while inner:
        name, _, inner = inner.partition(".")
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _rows(
    corpus: CorpusConfig, path: Path, image: str, columns: list[str], batches: Iterator[pa.RecordBatch]
) -> Iterator[Record]:
    """`image` is the column whose cells are the places; empty where paths stand in `image_column`."""
    file = path.relative_to(Path(corpus.root).resolve()).as_posix()
    number = 0
    for batch in batches:
        table = pa.Table.from_batches([batch])
        for record in _listed(pa.table({name: places.column_of(table, name) for name in columns})):
            found = record.get(corpus.image_column)
            if image:
                place = places.cell(str(path), number, image)
                found = _in_cell(place, file, number, [record.get(column) for column in _names(image)])
            said = record[corpus.caption_column]
            yield f"{path.name} row {number}", found, said, licences.stated(record)
            number += 1


def _in_cell(place: str, file: str, number: int, known: list[Any]) -> _Found:
    """Called by the first of what is known of it."""
    ids = tuple(str(own)[-200:] for own in known if own not in (None, ""))[:1]
    own = ids[0] if ids else number
    return _Found(place=place, file=file, image_id=f"{file}#{own}", ids=ids, unnamed=not ids)


def _listed(batch: pa.Table) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # Parquet promises UTF-8 and does not check it
        return [_record(batch, i) for i in range(len(batch))]


def _record(batch: pa.Table, row: int) -> dict[str, Any]:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return dict.fromkeys(batch.schema.names, "\udcff")  # refused as broken UTF-8


KINDS: dict[str, Callable[[CorpusConfig, Path], Iterator[Record]]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
