"""Image-text pairs in tables: TSV, CSV, Parquet or Arrow, with the path of each image or its very bytes.

CC3M, CC12M and SBU in the forms people keep them, Hugging Face's Parquet files, and the ViLT layout of the
original X-Decoder (Arrow with `image` bytes and a list of texts as `caption`). `annotations` is one file or a
pattern; the columns are `image_column` and `caption_column` ("image.bytes" leads into a struct), others are
ignored. Texts are UTF-8; a TSV has no quoting, a CSV has RFC 4180's. Settings used: `images`, `annotations`,
`image_column`, `caption_column`.
"""

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import places
from pipelines.corpora.files import data_file, matching, text
from pipelines.corpora.gathering import Gathered
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source

# how a reject names it; its image, as a path or found already, or why there is none; its caption
Record = tuple[str, Any, Any]
Found = tuple[str, str, str]  # place, image id, and the file below the root that holds it


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image: those in cells as they come, those at paths at the end, because a path may stand on
    several lines; one reject an unusable record. Raises `CorpusError`.
    """
    if not corpus.annotations:
        raise CorpusError(
            f"corpus {corpus.name!r} (captions_table): set `annotations` to a file or a pattern"
        )
    root, captions = os.path.realpath(corpus.root), Gathered()
    for path in matching(corpus, corpus.annotations):
        if path.suffix not in KINDS:
            raise CorpusError(f"{path}: a table ends in one of {', '.join(KINDS)}")
        for name, image, said in KINDS[path.suffix](corpus, path):
            try:
                if isinstance(image, Refusal):
                    raise image
                sentences = [text(sentence) for sentence in _sentences(said)]
                if isinstance(image, tuple):
                    yield _row(corpus, image, sentences)
                else:
                    captions.add(_file(corpus, image), *sentences)
            except Refusal as refusal:
                yield refuse(corpus, name, refusal)
    for file, sentences in captions:
        yield _row(corpus, (os.path.join(root, file), file, file), sentences)


def _row(corpus: CorpusConfig, found: Found, captions: list[str]) -> Row:
    place, image_id, file = found
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=image_id,
        image_path=place,
        height=None,
        width=None,
        captions=tuple(captions),
        # no ids: line numbers would change with every line inserted above
        source=Source(corpus=corpus.name, files=(file,), licence=corpus.licence),
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
    reader = csv.reader(_lines(path), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        first = 1
        try:
            for cells in reader:
                yield first, cells
                first = reader.line_num + 1
        except csv.Error as error:
            raise CorpusError(
                f"{path}: line {first} and those behind it cannot be told apart ({error}); mend its quotes"
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
    for number, cells in lines:
        if cells in ([], [""]):
            continue
        name = f"{path.name} line {number}"
        if len(cells) != len(header):
            yield name, Refusal("record", f"{len(cells)} cells, the header has {len(header)}"), None
        else:
            yield name, cells[at[0]], cells[at[1]]


def _parquet(corpus: CorpusConfig, path: Path) -> Iterator[Record]:
    try:
        file = places.open_parquet(str(path))
        image, columns = _columns(corpus, path, file.schema_arrow)
        batches = file.iter_batches(columns=columns)
        yield from _rows(corpus, path, image, batches)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: cannot be read to its end: {error!s:.300}; is it whole?") from None


def _arrow(corpus: CorpusConfig, path: Path) -> Iterator[Record]:
    try:
        table = places.open_arrow(str(path))
    except OSError as error:
        raise CorpusError(f"{error}; is it whole?") from None
    image, columns = _columns(corpus, path, table.schema)
    yield from _rows(corpus, path, image, iter(table.select(columns).to_batches()))


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
    named = [caption, *(name for name in ("image_id",) if name in schema.names)]
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return (image, named) if binary else ("", [image, *named])


def _type(schema: pa.Schema, column: str) -> pa.DataType | None:
    name, _, inner = column.partition(".")
    if name not in schema.names:
        return None
    kind = schema.field(name).type
    while inner:
        name, _, inner = inner.partition(".")
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _rows(
    corpus: CorpusConfig, path: Path, image: str, batches: Iterator[pa.RecordBatch]
) -> Iterator[Record]:
    """`image` is the column whose cells are the places; empty where paths stand in `image_column`."""
    file = path.relative_to(Path(corpus.root).resolve()).as_posix()
    number = 0
    for batch in batches:
        for record in _listed(batch):
            name = f"{path.name} row {number}"
            said = record.get(corpus.caption_column)
            if image:
                known = record.get("image_id")
                own = number if known is None else f"{known:.200}" if isinstance(known, str) else known
                yield name, (places.cell(str(path), number, image), f"{file}#{own}", file), said
            else:
                yield name, record.get(corpus.image_column), said
            number += 1


def _listed(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # Parquet promises UTF-8 and does not check it
        return [_record(batch, i) for i in range(len(batch))]


def _record(batch: pa.RecordBatch, row: int) -> dict[str, Any]:
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
