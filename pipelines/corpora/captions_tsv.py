"""Image-text pairs in a TSV: a header with the columns `image` and `caption`, then a line a pair.

UTF-8, no quoting, other columns are ignored. An image may stand on several lines.
Settings used: `images`, `annotations`.
"""

from collections.abc import Iterator
from pathlib import Path

from pipelines.corpora.files import annotation_file, data_file, text
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source

COLUMNS = ("image", "caption")


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image, in order of appearance, after one reject an unusable line. Raises `CorpusError`."""
    path = annotation_file(corpus, "annotations")
    header, *lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    columns = _columns(header, path)
    captions: dict[tuple[str, str], list[str]] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        try:
            name, caption = _pair(line, columns)
            file = data_file(corpus, corpus.images, name, "no-image")
            sentence = text(caption)
            captions.setdefault(file, []).append(sentence)
        except Refusal as refusal:
            yield refuse(corpus, f"line {number}", refusal)
    for file in captions:
        yield _row(corpus, file, tuple(captions[file]))


def _columns(header: bytes, path: Path) -> list[str]:
    names = header.decode("utf-8", errors="replace").rstrip("\r").split("\t")
    if not set(COLUMNS) <= set(names):
        raise CorpusError(
            f"{path}: the first line must name the columns image<TAB>caption; it is {names!r:.120}"
        )
    return names


def _pair(line: bytes, columns: list[str]) -> tuple[str, str]:
    try:
        cells = line.rstrip(b"\r").decode("utf-8").split("\t")
    except UnicodeDecodeError as error:
        raise Refusal("text", f"not UTF-8: {error}") from None
    if len(cells) != len(columns):
        raise Refusal("record", f"{len(cells)} cells, the header has {len(columns)}")
    named = dict(zip(columns, cells, strict=True))
    return named["image"], named["caption"]


def _row(corpus: CorpusConfig, file: tuple[str, str], captions: tuple[str, ...]) -> Row:
    path, relative = file
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=relative,
        image_path=path,
        height=None,
        width=None,
        captions=captions,
        # no ids: line numbers would change with every line inserted above
        source=Source(corpus=corpus.name, files=(relative,), licence=corpus.licence),
    )
