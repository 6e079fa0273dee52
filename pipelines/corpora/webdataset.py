"""Tars of images and texts: the output of img2dataset, and any other WebDataset. Read in place, not unpacked.

Members of one key, the path up to the first dot of its name, are one sample: an image (.jpg, .jpeg, .png), a
caption (.txt), and a JSON object whose `caption_column` may hold a caption or several, and `license` or
`licence` a licence. Settings used: `annotations` (a pattern such as `*.tar`), `caption_column`. Compressed
tars cannot be read at a place: decompress them first.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipelines import places
from pipelines.corpora import licences
from pipelines.corpora.files import IMAGES, is_utf8, matching, texts
from pipelines.corpora.rows import CorpusError, Refusal, Row, lost_captions, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source

MAX_TEXT_BYTES = 2**20  # of a .txt or .json; chosen by us
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Members of one key by suffix: the offset and the size of their bytes; suffixes that stand twice."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row a sample, in the order of the tars; one reject an unusable one, or an empty or broken tar.

    Raises `CorpusError`, also where no tar holds a sample.
    """
    if not corpus.annotations:
        raise CorpusError(
            f"corpus {corpus.name!r} (webdataset): set `annotations` to a pattern such as *.tar"
        )
    root = Path(corpus.root).resolve()
    num_samples, broken = 0, []
    for path in matching(corpus, corpus.annotations):
        file = path.relative_to(root).as_posix()
        keys: set[str] = set()
        for item in _samples(path):
            if isinstance(item, Refusal):
                broken.append(f"{path}: {item.detail}")
                yield refuse(corpus, f"tar {file}", item)
                continue
            num_samples += 1
            name = f"{file} {ascii(item.key):.200}"
            try:
                if item.key in keys:
                    raise Refusal("duplicate-id", "the key stands again later in the tar")
                keys.add(item.key)
                _check(item)
                said = _json(path, item)
                licence = licences.of_image(corpus, licences.stated(said))
                found = (*_txt(path, item), *_captions(said, corpus.caption_column))
                captions, unusable = texts(dict.fromkeys(found))
                yield from lost_captions(corpus, name, captions, unusable)
                if captions or not unusable:
                    yield _row(corpus, path, file, item, captions.values(), licence)
            except Refusal as refusal:
                yield refuse(corpus, name, refusal)
    if not num_samples:
        raise CorpusError(f"{broken[0]}; none of {len(broken)} tars holds a whole sample: mend or fetch them")


def _samples(path: Path) -> Iterator[_Sample | Refusal]:
    """Neighbouring members of one key; a refusal where the tar breaks off.

    The sample before the break is refused with it, because it may lack members that were lost. Raises
    `CorpusError` where the file cannot be opened or read.
    """
    end = 0
    sample: _Sample | None = None
    link: str | None = None  # key of links, which a sample may begin with or hold
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(8).startswith(_COMPRESSED):
                raise tarfile.ReadError("it is compressed, decompress it")
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.isreg() or info.islnk() or info.issym():
                    key, suffix = _split(info.name)
                    if info.isreg() and not info.issparse():  # its bytes lie in one piece behind it
                        if sample is not None and key != sample.key:
                            yield sample
                            sample = None
                        if link not in (None, key):  # it parted no sample, and is none
                            yield _Sample(key=link)
                        link, sample = None, sample or _Sample(key=key)
                        if suffix in sample.members:
                            sample.twice.append(suffix)
                        sample.members[suffix] = (info.offset_data, info.size)
                    elif sample is None or key != sample.key:
                        if link not in (None, key):
                            yield _Sample(key=link)
                        link = key
                if tar.offset > size:  # where it looks for the next member, behind folders and links too
                    raise tarfile.ReadError(f"a member of {info.size} bytes goes beyond the end of the file")
                end = tar.offset
            _check_end(file, end)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error}); allow it, or move it away") from None
    except Exception as error:  # what `tarfile` raises on hostile bytes is anything
        lost = "all of it" if sample is None else f"sample {ascii(sample.key):.200} and what follows"
        yield Refusal("record", f"the tar is broken behind byte {end}: {error!s:.200}; {lost} is lost")
        return
    if sample is not None:
        yield sample
    if link is not None:
        yield _Sample(key=link)
    if sample is None and link is None:
        yield Refusal("record", "the tar is empty")


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the first dot of the last part of the path parts key and suffix."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def _check_end(file: BinaryIO, end: int) -> None:
    """Raises `tarfile.ReadError` where there are not two zero blocks at `end`, or not only zeros behind."""
    file.seek(end)
    mark = file.read(2 * tarfile.BLOCKSIZE)
    if mark != bytes(2 * tarfile.BLOCKSIZE):
        raise tarfile.ReadError("there is no end mark, so it was cut or damaged")
    while more := file.read(2**20):
        if more.count(0) != len(more):
            raise tarfile.ReadError("it goes on behind its end mark: damaged, or several tars in one file")


def _check(sample: _Sample) -> None:
    """Raises `Refusal` where it cannot be a sample."""
    if not is_utf8(sample.key):
        raise Refusal("path", "the key is not UTF-8, and no dataset could name it")
    if sample.twice:
        raise Refusal("duplicate-id", f"two images or texts of one key: {sample.twice[:5]!a}")
    images = _images(sample)
    if len(images) != 1:
        raise Refusal(
            "no-image", f"{len(images)} images (.jpg, .jpeg, .png) among {sorted(sample.members)!a:.200}"
        )


def _row(
    corpus: CorpusConfig, path: Path, file: str, sample: _Sample, captions: Iterable[str], licence: str
) -> Row:
    (image,) = _images(sample)
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=f"{file}#{sample.key}",
        image_path=places.member(str(path), *sample.members[image]),
        height=None,
        width=None,
        captions=tuple(dict.fromkeys(captions)),
        source=Source(corpus=corpus.name, files=(file,), ids=(sample.key,), licence=licence),
    )


def _images(sample: _Sample) -> list[str]:
    return [suffix for suffix in sample.members if f".{suffix}" in IMAGES]


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
