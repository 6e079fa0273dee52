"""Which rows become one sample, under which key, and which are refused for another's sake. Arrays only.

Rows of images with equal bytes are one sample. An image that an evaluation split holds never reaches
training. The order of files decides nothing: rows of one image stand in the order of the corpora, then of
their keys, then of what they say; the first one names the sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.spool import mapped
from schemas.masks import Array

LEAKAGE, DUPLICATE_LABELS = 0, 1
# the reason of the reject, and the detail: {} is the row for whose sake
REASONS = {
    LEAKAGE: ("leakage", "{} of the val split is this image"),
    DUPLICATE_LABELS: ("duplicate-labels", "{} has segments of this image"),
}
LIGHT = ("corpus", "held_out", "image_high", "image_low", "tie", "labelled", "key")


@dataclass(frozen=True, kw_only=True)
class LightRows:
    """What is decided by, of all N checked rows: `part`, `row` say where a row lies, the rest is CHECKED.

    part, row, corpus: int32[N]; held_out, labelled: bool[N]; image_high, image_low, tie: uint64[N]
    """

    part: Array
    row: Array
    corpus: Array
    held_out: Array
    image_high: Array
    image_low: Array
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
    refused     int64[R] indices of rows left out; `why` int8[R] one of the reasons above, and `because`
                int64[R] the row for whose sake
    """

    members: Array
    sample: Array
    home: Array
    key: pa.Array
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


def group(rows: LightRows) -> Groups:
    """Decide. Memory: about 200 bytes a row, beside the keys."""
    rank = pc.rank(rows.key, tiebreaker="dense").to_numpy()
    order = np.lexsort((rows.tie, rank, rows.corpus, ~rows.held_out, rows.image_low, rows.image_high))
    starts, image = _runs(rows.image_high[order], rows.image_low[order])
    held_out = rows.held_out[order]
    leaks = ~held_out & held_out[starts][image]
    labelled = np.flatnonzero(rows.labelled[order] & ~leaks)
    again = labelled[1:][image[labelled[1:]] == image[labelled[:-1]]]
    why = np.full(len(order), -1, dtype=np.int8)
    why[leaks], why[again] = LEAKAGE, DUPLICATE_LABELS
    refused = np.flatnonzero(why >= 0)
    first = order[starts]
    home = rows.part[first]
    by_home = np.argsort(home, kind="stable")
    number = np.empty(len(by_home), dtype=np.int64)
    number[by_home] = np.arange(len(by_home))
    kept = np.flatnonzero(why < 0)
    kept = kept[np.argsort(number[image[kept]], kind="stable")]
    return Groups(
        members=order[kept],
        sample=number[image[kept]],
        home=home[by_home],
        key=_distinct_keys(rows, first[by_home]),
        refused=order[refused],
        why=why[refused],
        because=first[image[refused]],
    )


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
