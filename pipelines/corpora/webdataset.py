"""Tars of images and texts: the output of img2dataset, and any other WebDataset. Read in place, not unpacked.

Members of one key, the path up to the first dot of its name, are one sample: an image (.jpg, .jpeg, .png), a
caption (.txt), and a JSON object whose `caption_column` may hold a caption or several, and `license` or
`licence` a licence. Settings used: `annotations` (a pattern such as `*.tar`), `caption_column`. Compressed
tars cannot be read at a place: decompress them first.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import places
from pipelines.corpora import licences
from pipelines.corpora.files import IMAGES, matching, text
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source

MAX_TEXT_BYTES = 2**20  # of a .txt or .json; chosen by us


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Members of one key by suffix: the offset and the size of their bytes; suffixes that stand twice."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row a sample, in the order of the tars; one reject an unusable one, or a tar that breaks off.

    Raises `CorpusError`.
    """
    if not corpus.annotations:
        raise CorpusError(
            f"corpus {corpus.name!r} (webdataset): set `annotations` to a pattern such as *.tar"
        )
    root = Path(corpus.root).resolve()
    for path in matching(corpus, corpus.annotations):
        file = path.relative_to(root).as_posix()
        keys: set[str] = set()
        for item in _samples(path):
            if isinstance(item, Refusal):
                yield refuse(corpus, f"tar {file}", item)
                continue
            try:
                if item.key in keys:
                    raise Refusal("duplicate-id", "the key stands again later in the tar")
                keys.add(item.key)
                yield _row(corpus, path, file, item)
            except Refusal as refusal:
                yield refuse(corpus, f"{file} {ascii(item.key):.200}", refusal)


def _samples(path: Path) -> Iterator[_Sample | Refusal]:
    """Neighbouring members of one key; a refusal where the tar breaks off.

    The sample before the break is refused with it, because it may lack members that were lost.
    """
    size, end = path.stat().st_size, 0
    sample: _Sample | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isreg() or info.issparse():
                    continue
                key, suffix = _split(info.name)
                if sample is not None and key != sample.key:
                    yield sample
                    sample = None
                sample = sample or _Sample(key=key)
                if suffix in sample.members:
                    sample.twice.append(suffix)
                sample.members[suffix] = (info.offset_data, info.size)
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"a member claims {info.size} bytes")
                end = info.offset_data + info.size
        if not _ends(path, end):
            raise tarfile.ReadError("there is no end mark, so it was cut")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if sample is None:
            raise CorpusError(
                f"{path}: not a plain tar ({error!s:.200}); decompress it, or fetch it again"
            ) from None
        lost = f"sample {ascii(sample.key):.200} and what follows are lost"
        yield Refusal("record", f"the tar is broken behind byte {end}: {error!s:.200}; {lost}")
        return
    if sample is None:
        raise CorpusError(f"{path}: a tar without members")
    yield sample


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the first dot of the last part of the path parts key and suffix."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def _ends(path: Path, end: int) -> bool:
    """Whether a tar has the two zero blocks that close it."""
    with path.open("rb") as file:
        file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        return file.read(2 * tarfile.BLOCKSIZE) == bytes(2 * tarfile.BLOCKSIZE)


def _row(corpus: CorpusConfig, path: Path, file: str, sample: _Sample) -> Row:
    if sample.twice:
        raise Refusal("duplicate-id", f"two images or texts of one key: {sample.twice[:5]!a}")
    images = [suffix for suffix in sample.members if f".{suffix}" in IMAGES]
    if len(images) != 1:
        raise Refusal(
            "no-image", f"{len(images)} images (.jpg, .jpeg, .png) among {sorted(sample.members)!a:.200}"
        )
    said = _json(path, sample)
    captions = (*_txt(path, sample), *_captions(said, corpus.caption_column))
    licence = licences.of_image(corpus, licences.stated(said))
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=f"{file}#{sample.key}",
        image_path=places.member(str(path), *sample.members[images[0]]),
        height=None,
        width=None,
        captions=tuple(dict.fromkeys(text(caption) for caption in captions)),
        source=Source(corpus=corpus.name, files=(file,), ids=(sample.key,), licence=licence),
    )


def _txt(path: Path, sample: _Sample) -> tuple[str, ...]:
    data = _text_bytes(path, sample, "txt")
    return () if data is None else (data.decode("utf-8", errors="surrogateescape"),)


def _json(path: Path, sample: _Sample) -> dict[str, Any]:
    data = _text_bytes(path, sample, "json")
    if data is None:
        return {}
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal("record", f"its .json is malformed: {error!s:.200}") from None
    return said if isinstance(said, dict) else {}


def _captions(record: dict[str, Any], key: str) -> tuple[str, ...]:
    said = record.get(key)
    captions = said if isinstance(said, list) else [] if said is None else [said]
    if not all(isinstance(caption, str) for caption in captions):
        raise Refusal("record", f"{key!r} of its .json is {said!r:.80}, not a text or a list of texts")
    return tuple(captions)


def _text_bytes(path: Path, sample: _Sample, suffix: str) -> bytes | None:
    if suffix not in sample.members:
        return None
    offset, size = sample.members[suffix]
    if size > MAX_TEXT_BYTES:
        raise Refusal("text", f"its .{suffix} has {size} bytes, at most {MAX_TEXT_BYTES} are read")
    return places.read(places.member(str(path), offset, size))
