"""Which samples share a shard, decided on arrays by hashes of their keys alone.

Adding, removing or changing one sample touches only the shard that holds it, or the two that it splits into.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.spool import mapped
from schemas.masks import Array
from schemas.records import PARTS, Split
from schemas.tasks import Stream

FORMAT = 1  # of the bytes in a shard; part of every plan digest
TOLD = ("segments", "referring", "captions", "questions", "copy_of", *(f"{part}_hash" for part in PARTS))
_BITS = 64


@dataclass(frozen=True, kw_only=True)
class LightSamples:
    """What is planned by, of all N samples; `part`, `row` say where a sample's document lies.

    part, row       int32[N]
    kind            int[N], index into `kinds`: (split, stream)
    bits            uint64[N], of a hash of the key
    rank            int64[N], the place of the key among all keys
    source_bytes    int64[N]
    digest          uint8[N, 32], of what a shard holds of the sample
    key             string[N]
    told            the columns of samples.parquet that only repeat what the sample says
    """

    part: Array
    row: Array
    kind: Array
    kinds: tuple[tuple[Split, Stream], ...]
    bits: Array
    rank: Array
    source_bytes: Array
    digest: Array
    key: pa.Array
    told: pa.Table


@dataclass(frozen=True, kw_only=True)
class Plan:
    """S shards over N samples.

    order       int64[N], indices of the samples, shard after shard, in key order within each
    starts      int64[S + 1], where each shard begins in `order`
    digests     of what each shard will hold, 64 hex digits
    """

    order: Array
    starts: Array
    digests: tuple[str, ...]


def light_samples(files: Sequence[Path]) -> LightSamples:
    """The light columns of all samples; `files[i]` is part i."""
    tables = [mapped(path) for path in files]
    sizes = [len(table) for table in tables]
    whole = pa.concat_tables(tables)
    starts = np.cumsum([0, *sizes[:-1]])
    key = whole["key"].combine_chunks()
    kind, kinds = _kinds(whole)
    digest = whole["digest"].combine_chunks()
    return LightSamples(
        part=np.repeat(np.arange(len(files), dtype=np.int32), sizes),
        row=(np.arange(len(whole)) - np.repeat(starts, sizes)).astype(np.int32),
        kind=kind,
        kinds=kinds,
        bits=whole["bits"].to_numpy(),
        rank=pc.rank(key, tiebreaker="first").to_numpy().astype(np.int64) - 1,
        source_bytes=whole["source_bytes"].to_numpy(),
        digest=np.frombuffer(digest.buffers()[1], dtype=np.uint8)[: 32 * len(whole)].reshape(-1, 32),
        key=key,
        told=whole.select([name for name in whole.column_names if name in TOLD]),
    )


def plan(
    kind: Array,
    bits: Array,
    rank: Array,
    source_bytes: Array,
    digest: Array,
    *,
    max_samples: int,
    max_bytes: int,
) -> Plan:
    """Group samples by kind, then into shards within both bounds, of one sample at least.

    Samples of different kinds never share a shard; the arguments are those of `LightSamples`.
    The groups are the leaves of a binary trie over the bits, a leaf is split where it is over a bound; so the
    other leaves do not notice. Memory: about 60 bytes a sample beside the arguments.
    """
    order = np.lexsort((bits, kind))
    sorted_bits, total = bits[order], np.concatenate([[0], np.cumsum(source_bytes[order])])
    changes = (np.flatnonzero(np.diff(kind[order])) + 1).tolist()
    starts: list[int] = []
    for first, stop in zip([0, *changes], [*changes, len(order)], strict=True):
        starts += _leaves(sorted_bits, total, first, stop, max_samples, max_bytes)
    bounds = np.array([*starts, len(order)], dtype=np.int64)
    leaf = np.repeat(np.arange(len(starts)), np.diff(bounds))
    order = order[np.lexsort((rank[order], leaf))]
    names = [
        _name(digest[order[a:b]]) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]
    return Plan(order=order, starts=bounds, digests=tuple(names))


def _kinds(samples: pa.Table) -> tuple[Array, tuple[tuple[Split, Stream], ...]]:
    kinds = tuple((split, stream) for split in get_args(Split) for stream in get_args(Stream))
    kind = np.zeros(len(samples), dtype=np.int8)
    for number, (split, stream) in enumerate(kinds):
        here = pc.and_(pc.equal(samples["split"], split), pc.equal(samples["stream"], stream))
        kind[here.to_numpy()] = number
    return kind, kinds


def _leaves(bits: Array, total: Array, first: int, stop: int, max_samples: int, max_bytes: int) -> list[int]:
    """Where the leaves of one kind start; those without samples are none."""
    starts = []
    pending = [(first, stop, 0, 0)]  # first, stop, prefix, its length
    while pending:
        first, stop, prefix, depth = pending.pop()
        fits = stop - first <= max_samples and total[stop] - total[first] <= max_bytes
        if fits or stop - first == 1 or depth == _BITS:
            if stop > first:
                starts.append(first)
            continue
        upper = prefix | 1 << (_BITS - 1 - depth)
        middle = first + int(np.searchsorted(bits[first:stop], np.uint64(upper)))
        pending += [(middle, stop, upper, depth + 1), (first, middle, prefix, depth + 1)]
    return starts


def _name(digests: Array) -> str:
    listed = [row.tobytes().hex() for row in digests]
    return hashlib.sha256(json.dumps([FORMAT, *listed]).encode()).hexdigest()
