"""Which rows become one sample, under which key, and which are refused for another's sake. Arrays only.

Rows of images with equal bytes are one sample. An image that an evaluation split holds never reaches
training: not by its bytes, not by its number in a list of images, not as a copy that looks the same. Of
training images that look the same all but one are marked, or refused; they are not joined, because masks and
words like "left" need not fit a copy.

The order of files decides nothing: rows of one image stand in the order of the corpora, then of their keys,
then of what they say; the first one names the sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.duplicates import THUMBNAIL_BYTES, Thumbnails, find_copies
from pipelines.spool import mapped
from schemas.masks import Array

LEAKAGE, LEAKED_NUMBER, LEAKED_COPY, DUPLICATE_LABELS, NEAR_DUPLICATE = range(5)
# the reason of the reject, and the detail: {} is the row for whose sake
REASONS = {
    LEAKAGE: ("leakage", "{} of the val split is this image"),
    LEAKED_NUMBER: ("leakage", "{} of the val split has its number"),
    LEAKED_COPY: ("leakage", "a copy of {}, which the val split holds"),
    DUPLICATE_LABELS: ("duplicate-labels", "{} has segments of this image"),
    NEAR_DUPLICATE: ("near-duplicate", "a copy of {}, which is kept"),
}
_DECISIVE = ("image_high", "image_low", "number", "look", "worth", "pixels", "tie", "labelled")
LIGHT = ("corpus", "held_out", *_DECISIVE, "key")


@dataclass(frozen=True, kw_only=True)
class LightRows:
    """What is decided by, of all N checked rows: `part`, `row` say where a row lies, the rest is CHECKED.

    part, row, corpus: int32[N]; held_out, labelled: bool[N]; worth: int8[N]; pixels: int64[N]; image_high,
    image_low, number, look, tie: uint64[N]
    """

    part: Array
    row: Array
    corpus: Array
    held_out: Array
    image_high: Array
    image_low: Array
    number: Array
    look: Array
    worth: Array
    pixels: Array
    tie: Array
    labelled: Array
    key: pa.Array


@dataclass(frozen=True, kw_only=True)
class Groups:
    """G samples of K rows, sorted by the part in which a sample's first row lies.

    members     int64[K] indices into the light rows, the rows of a sample side by side
    sample      int64[K], the sample of each member, ascending
    home        int32[G], the part of each sample's first row, ascending
    key         string[G], all different
    copy_of     string[G], the key of the sample that it is a copy of, or empty
    refused     int64[R] indices of rows left out; `why` int8[R] one of the reasons above, and `because`
                int64[R] the row for whose sake
    """

    members: Array
    sample: Array
    home: Array
    key: pa.Array
    copy_of: pa.Array
    refused: Array
    why: Array
    because: Array


def light_rows(files: Sequence[Path]) -> LightRows:
    """The light columns of the checked rows; `files[i]` is part i."""
    tables = [mapped(path).select(LIGHT) for path in files]
    sizes = [len(table) for table in tables]
    whole = pa.concat_tables(tables)
    columns = {name: whole[name].to_numpy() for name in LIGHT if name != "key"}
    starts = np.cumsum([0, *sizes[:-1]])
    return LightRows(
        part=np.repeat(np.arange(len(files), dtype=np.int32), sizes),
        row=(np.arange(len(whole)) - np.repeat(starts, sizes)).astype(np.int32),
        key=whole["key"].combine_chunks(),
        **columns,
    )


class StoredThumbnails:
    """uint8[n, 1152] of any light rows; they stay on disk until then."""

    def __init__(self, rows: LightRows, files: Sequence[Path]) -> None:
        self._rows = rows
        self._mapped = [mapped(path)["thumbnail"] for path in files]

    def __getitem__(self, chosen: Array) -> Array:
        """int64[n] -> the thumbnails of these rows, which all have one (`look` is not 0)."""
        places = zip(self._rows.part[chosen].tolist(), self._rows.row[chosen].tolist(), strict=True)
        found = b"".join([self._mapped[part].chunk(0)[row].as_buffer() for part, row in places])
        return np.frombuffer(found, np.uint8).reshape(-1, THUMBNAIL_BYTES)


def group(rows: LightRows, thumbnails: Thumbnails, *, near_duplicates: Literal["keep", "reject"]) -> Groups:
    """Decide. Memory: about 250 bytes a row, beside the keys."""
    rank = pc.rank(rows.key, tiebreaker="dense").to_numpy()
    order = np.lexsort((rows.tie, rank, rows.corpus, ~rows.held_out, rows.image_low, rows.image_high))
    starts, image = _runs(rows.image_high[order], rows.image_low[order])
    first, train = order[starts], ~rows.held_out[order]
    why, because = np.full(len(order), -1, dtype=np.int8), first[image]
    why[train & rows.held_out[first][image]] = LEAKAGE
    numbered = _by_number(rows)[order]
    taken = np.full(len(first), -1, dtype=np.int64)  # the held-out row that has an image's number
    np.maximum.at(taken, image, np.where(train, numbered, -1))
    by_number = (taken >= 0) & ~rows.held_out[first]
    copy_of = _copies(rows, order, starts, rows.held_out[first] | by_number, thumbnails)
    leaked = (copy_of >= 0) & (rows.held_out[first] | by_number)[copy_of]
    near = (copy_of >= 0) & ~leaked
    for images, reason, others in (
        (by_number, LEAKED_NUMBER, taken),
        (leaked, LEAKED_COPY, first[copy_of]),
        (near & (near_duplicates == "reject"), NEAR_DUPLICATE, first[copy_of]),
    ):
        chosen = images[image] & (why < 0)
        why[chosen], because[chosen] = reason, others[image[chosen]]
    labelled = np.flatnonzero(rows.labelled[order] & (why < 0))
    why[labelled[1:][image[labelled[1:]] == image[labelled[:-1]]]] = DUPLICATE_LABELS
    refused, kept = np.flatnonzero(why >= 0), np.flatnonzero(why < 0)
    alive = np.unique(image[kept])
    by_home = alive[np.argsort(rows.part[first[alive]], kind="stable")]
    number = np.full(len(first), -1, dtype=np.int64)
    number[by_home] = np.arange(len(by_home))
    kept = kept[np.argsort(number[image[kept]], kind="stable")]
    keys = _distinct_keys(rows, first[by_home])
    origin = np.where(near, number[copy_of], -1)[by_home]
    return Groups(
        members=order[kept],
        sample=number[image[kept]],
        home=rows.part[first[by_home]],
        key=keys,
        copy_of=pc.fill_null(keys.take(pa.array(origin, mask=origin < 0)), ""),
        refused=order[refused],
        why=why[refused],
        because=because[refused],
    )


def _by_number(rows: LightRows) -> Array:
    """int64[N], the first held-out row that has the number of the row's image; -1 where none has."""
    held = np.flatnonzero(rows.held_out & (rows.number != 0))
    held = held[np.lexsort((rows.tie[held], rows.corpus[held], rows.number[held]))]
    if not len(held):
        return np.full(len(rows.number), -1, dtype=np.int64)
    place = np.searchsorted(rows.number[held], rows.number).clip(max=len(held) - 1)
    return np.where(rows.number[held[place]] == rows.number, held[place], -1)


def _copies(rows: LightRows, order: Array, starts: Array, held_out: Array, thumbnails: Thumbnails) -> Array:
    """int64[G], the image that each image is a copy of, or -1.

    Of two that look the same the better annotated is the origin, then the larger, then the lower sha256.
    """
    first = order[starts]
    copy_of = np.full(len(first), -1, dtype=np.int64)
    if not len(first):
        return copy_of
    worth = np.minimum.reduceat(rows.worth[order], starts)
    high, low = rows.image_high[first], rows.image_low[first]
    ranked = np.lexsort((low, high, -rows.pixels[first], worth, ~held_out))
    ranked = ranked[rows.look[first[ranked]] != 0]
    chosen = first[ranked]
    found = find_copies(rows.look[chosen], _Chosen(thumbnails, chosen), held_out[ranked])
    copy_of[ranked[found >= 0]] = ranked[found[found >= 0]]
    return copy_of


class _Chosen:
    def __init__(self, thumbnails: Thumbnails, rows: Array) -> None:
        self._thumbnails, self._rows = thumbnails, rows

    def __getitem__(self, chosen: Array) -> Array:
        return self._thumbnails[self._rows[chosen]]


def _runs(*columns: Array) -> tuple[Array, Array]:
    """Of sorted columns: where a run of equal values starts, and the run of each place."""
    if not len(columns[0]):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    new = np.ones(len(columns[0]), dtype=bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(new), np.cumsum(new) - 1


def _distinct_keys(rows: LightRows, first: Array) -> pa.Array:
    """The key of each sample's first row; where several images have it, all but one get a hash behind it.

    Say, two splits of a corpus that each count from 1. The one of the corpus named first keeps it.
    """
    keys = rows.key.take(pa.array(first))
    for digits in (8, 16):  # the longer one for keys that were made to look like one with a hash
        rank = pc.rank(keys, tiebreaker="dense").to_numpy()
        order = np.lexsort((rows.image_low[first], rows.image_high[first], rows.corpus[first], rank))
        starts, _ = _runs(rank[order])
        later = np.ones(len(order), dtype=bool)
        later[starts] = False
        changed = np.sort(order[later])
        if not len(changed):
            break
        hashes = [f"{value:016x}"[:digits] for value in rows.image_high[first[changed]].tolist()]
        plain = keys.take(pa.array(changed)).to_pylist()
        mask = np.zeros(len(keys), dtype=bool)
        mask[changed] = True
        suffixed = pa.array([f"{k}-{h}" for k, h in zip(plain, hashes, strict=True)], pa.string())
        keys = pc.replace_with_mask(keys, pa.array(mask), suffixed)
    return keys
