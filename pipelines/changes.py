"""What changed from one version of a dataset to another, sample by sample, and why. Tables in, rows out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.curate import sample_key
from schemas.records import PARTS

What = Literal["added", "removed", "changed"]


class Tables(Protocol):
    """The tables of a version: schemas.records.MANIFEST, SAMPLES and REJECTS."""

    @property
    def manifest(self) -> pa.Table: ...
    @property
    def samples(self) -> pa.Table: ...
    @property
    def rejects(self) -> pa.Table: ...


@dataclass(frozen=True, kw_only=True)
class Change:
    """One sample that came, went or changed. `why` names what is different of it, or where it came from."""

    key: str
    what: What
    why: str


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What changes from one version to another: samples by key, names of shards."""

    changes: tuple[Change, ...]
    shards_added: tuple[str, ...]
    shards_removed: tuple[str, ...]

    def keys(self, what: What) -> tuple[str, ...]:
        """Of the samples to which this happened, sorted."""
        return tuple(change.key for change in self.changes if change.what == what)


def compare(old: Tables, new: Tables) -> Diff:
    """From `old` to `new`."""
    before, after = (set(version.manifest["shard"].to_pylist()) for version in (old, new))
    found = [*_changed(old, new), *_moved(old, new, "added"), *_moved(new, old, "removed")]
    return Diff(
        changes=tuple(sorted(found, key=lambda change: change.key)),
        shards_added=tuple(sorted(after - before)),
        shards_removed=tuple(sorted(before - after)),
    )


def _changed(old: Tables, new: Tables) -> Iterator[Change]:
    """Samples of both versions that differ: the parts of them that do."""
    place = pc.index_in(new.samples["key"], value_set=old.samples["key"].combine_chunks())
    here = np.flatnonzero(place.is_valid().to_numpy())
    after = new.samples.take(pa.array(here))
    before = old.samples.take(place.drop_null())
    differs = np.flatnonzero(pc.not_equal(before["sha256"], after["sha256"]).to_numpy())
    after, before = after.take(pa.array(differs)), before.take(pa.array(differs))
    parts = {part: pc.not_equal(before[f"{part}_hash"], after[f"{part}_hash"]).to_pylist() for part in PARTS}
    for i, key in enumerate(after["key"].to_pylist()):
        why = [part for part in PARTS if parts[part][i]]
        yield Change(key=key, what="changed", why=", ".join(why) or "only how it is written")


def _moved(without: Tables, having: Tables, what: What) -> Iterator[Change]:
    """Samples that only `having` has: known there by another key, rejected there, or not at all."""
    absent = pc.invert(pc.is_in(having.samples["key"], value_set=without.samples["key"].combine_chunks()))
    rows = having.samples.filter(absent).select(["key", "pixels_hash"]).to_pylist()
    if not rows:
        return
    refused = {
        sample_key(row["corpus"], row["record"].removeprefix("image ")): f"{row['reason']}: {row['detail']}"
        for row in without.rejects.to_pylist()
        if row["record"].startswith("image ")
    }
    pixels = pa.array([row["pixels_hash"] for row in rows], pa.uint64())
    elsewhere = pc.index_in(pixels, value_set=without.samples["pixels_hash"].combine_chunks()).to_pylist()
    tense = {"added": ("was", "was rejected", "new in the corpora")}
    tense |= {"removed": ("is now", "is rejected", "no longer in the corpora")}
    known, rejected, gone = tense[what]
    for row, other in zip(rows, elsewhere, strict=True):
        if other is not None:
            why = f"the same image {known} {without.samples['key'][other].as_py()}"
        else:
            why = f"{rejected}, {refused[row['key']]}" if row["key"] in refused else gone
        yield Change(key=row["key"], what=what, why=why)
