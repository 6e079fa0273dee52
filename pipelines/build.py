"""Corpora to a dataset version: the Ray Data graph that joins reading, inspection, curation and writing.

    annotation files -> rows -> [Ray: hash and decode every file] -> curate -> plan -> [Ray: write shards]
    -> publish

Equal inputs give equal bytes and the same version id, whatever the number of workers and the order in which
they finish. Nothing is visible before everything is written. The caller has started Ray.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pyarrow as pa

from pipelines.catalog import Catalog, Counts, DatasetCard, SourceCard, content_id
from pipelines.corpora import readers
from pipelines.corpora.rows import Row
from pipelines.curate import Curated, Files, curate
from pipelines.parallel import WorkerError, inspect_files, write_shards
from pipelines.shards import Receipt, ShardPlan, file_sha256, plan, sample_row
from schemas.jobs import BuildConfig, CorpusConfig
from schemas.records import MANIFEST, REJECTS, SAMPLES, SCHEMA_VERSION, Reject, SampleMeta, Split
from schemas.taxonomy import Taxonomy

log = logging.getLogger(__name__)

MAX_ANSWERS = 3129  # the answer list customary for VQA v2


class BuildError(ValueError):
    """A build that published nothing, and why."""


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The balance sheet: num_read = num_kept + sum(rejects), in rows; several rows may make one sample.

    new         whether this version did not exist before
    seconds     the whole build
    """

    version: str
    new: bool
    num_read: int
    num_kept: int
    rejects: dict[str, int]
    num_samples: int
    num_shards: int
    shards_written: int
    bytes_written: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Reading:
    rows: tuple[Row, ...]
    rejects: tuple[Reject, ...]
    taxonomies: dict[str, Taxonomy]
    sources: tuple[SourceCard, ...]


def build(
    corpora: Sequence[CorpusConfig], config: BuildConfig, catalog: Catalog, *, code_version: str = "unknown"
) -> BuildReport:
    """Build and publish a version of the catalog's dataset, or find that the current one is it.

    Raises `CorpusError` where a corpus cannot be read, `CatalogError` where another build runs,
    `BuildError` where too much was rejected, nothing is left, or a worker failed. Then nothing was
    published.
    """
    started = time.monotonic()
    if not corpora:
        raise BuildError("no corpora to build from; list some under `corpora`")
    with catalog.building(), _blaming_workers():
        reading = _read(corpora)
        curated = curate(reading.rows, _inspect(reading.rows, config), config.curate)
        rejects = sorted((*reading.rejects, *curated.rejects), key=lambda r: tuple(r.model_dump().values()))
        _check_balance(corpora, reading, curated, rejects, config.max_reject_share)
        plans = plan(curated.entries, config.shard_samples, config.shard_mb * 2**20)
        receipts, written = write_shards(plans, catalog.shards_root, config.num_workers)
        tables = _tables(plans, receipts, rejects)
        card = _card(catalog.dataset, code_version, reading, curated, rejects)
        card = card.model_copy(update={"version": content_id(card, *tables)})
        new = catalog.publish(card, *tables)
    report = BuildReport(
        version=card.version,
        new=new,
        num_read=card.num_read,
        num_kept=card.num_kept,
        rejects=card.rejects,
        num_samples=len(curated.entries),
        num_shards=len(plans),
        shards_written=len(written),
        bytes_written=sum(receipts[name].size_bytes for name in written),
        seconds=time.monotonic() - started,
    )
    log.info("dataset %s: %s", catalog.dataset, report)
    return report


def _read(corpora: Sequence[CorpusConfig]) -> _Reading:
    rows: list[Row] = []
    rejects: list[Reject] = []
    taxonomies: dict[str, Taxonomy] = {}
    for corpus in corpora:
        before = len(rows)
        for item in readers.read(corpus):
            (rejects if isinstance(item, Reject) else rows).append(item)  # type: ignore[arg-type]
        log.info("read %s (%s, %s): %d rows", corpus.name, corpus.format, corpus.split, len(rows) - before)
        taxonomy = readers.taxonomy(corpus)
        if taxonomy is not None and taxonomies.setdefault(taxonomy.name, taxonomy) != taxonomy:
            raise BuildError(
                f"the splits of corpus {corpus.name!r} list different categories; give them two names"
            )
    _check_kinds(taxonomies)
    return _Reading(
        rows=tuple(rows),
        rejects=tuple(rejects),
        taxonomies=taxonomies,
        sources=tuple(_source(corpus) for corpus in corpora),
    )


def _check_kinds(taxonomies: dict[str, Taxonomy]) -> None:
    """A class cannot be a thing in one corpus and stuff in another: predictions carry its name alone."""
    kinds: dict[str, tuple[bool, str]] = {}
    for corpus, taxonomy in taxonomies.items():
        for category in taxonomy.categories:
            isthing, other = kinds.setdefault(category.name, (category.isthing, corpus))
            if isthing != category.isthing:
                raise BuildError(
                    f"{category.name!r} is a thing in one of {other!r}, {corpus!r}, stuff in the other"
                )


def _source(corpus: CorpusConfig) -> SourceCard:
    names = [name for name in (corpus.annotations, corpus.instances, corpus.questions) if name]
    return SourceCard(
        corpus=corpus.name,
        format=corpus.format,
        split=corpus.split,
        licence=corpus.licence,
        files={name: file_sha256(Path(corpus.root) / name) for name in names},
    )


def _inspect(rows: Sequence[Row], config: BuildConfig) -> Files:
    """Facts of every distinct file that a row names."""
    wanted = dict.fromkeys(("image", row.image_path) for row in rows)
    wanted |= dict.fromkeys(("labels", row.labels_path) for row in rows if row.labels_path is not None)
    return inspect_files(tuple(wanted), config.max_pixels, config.num_workers)


def _check_balance(
    corpora: Sequence[CorpusConfig],
    reading: _Reading,
    curated: Curated,
    rejects: Sequence[Reject],
    limit: float,
) -> None:
    """Every row read is kept or rejected, not too many are, and every corpus gave something."""
    num_read = len(reading.rows) + len(reading.rejects)
    assert num_read == curated.num_kept + len(rejects), (num_read, curated.num_kept, len(rejects))
    examples = {r.reason: f"{r.corpus} {r.split}, {r.record}: {r.detail}" for r in reversed(rejects)}
    listed = "".join(
        f"\n  {reason}: {count}, e.g. {examples[reason]}"
        for reason, count in Counter(r.reason for r in rejects).most_common()
    )
    kept = {(s.corpus, e.meta.split) for e in curated.entries for s in e.meta.sources}
    barren = [f"{c.name} ({c.split})" for c in corpora if (c.name, c.split) not in kept]
    if barren:
        raise BuildError(f"nothing of {', '.join(barren)} could be kept; nothing was published:{listed}")
    if len(rejects) > limit * num_read:
        share = f"{len(rejects)} of {num_read} records were rejected, more than max_reject_share {limit:g}"
        raise BuildError(f"{share}; mend the corpora or raise it; nothing was published:{listed}")


def _tables(
    plans: Sequence[ShardPlan], receipts: Mapping[str, Receipt], rejects: Sequence[Reject]
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """manifest, samples and rejects, each in an order that only their content decides."""
    shards, samples = [], []
    for shard in sorted(plans, key=lambda s: s.name):
        receipt = receipts[shard.name]
        shards.append(
            {
                "shard": shard.name,
                "split": shard.split,
                "stream": shard.stream,
                "samples": len(shard.entries),
                "size_bytes": receipt.size_bytes,
                "sha256": receipt.sha256,
            }
        )
        samples += [sample_row(m, e, shard) for m, e in zip(receipt.members, shard.entries, strict=True)]
    return (
        pa.Table.from_pylist(shards, schema=MANIFEST),
        pa.Table.from_pylist(sorted(samples, key=lambda row: row["key"]), schema=SAMPLES),
        pa.Table.from_pylist([r.model_dump() for r in rejects], schema=REJECTS),
    )


def _card(
    dataset: str, code_version: str, reading: _Reading, curated: Curated, rejects: Sequence[Reject]
) -> DatasetCard:
    metas = [entry.meta for entry in curated.entries]
    return DatasetCard(
        dataset=dataset,
        version="",
        schema_version=SCHEMA_VERSION,
        code_version=code_version,
        sources=reading.sources,
        num_read=len(reading.rows) + len(reading.rejects),
        num_kept=curated.num_kept,
        rejects=dict(sorted(Counter(r.reason for r in rejects).items())),
        counts={split: _counts([m for m in metas if m.split == split]) for split in get_args(Split)},
        taxonomies=_seen(reading.taxonomies, metas),
        answers=_answers(metas),
    )


def _counts(metas: Sequence[SampleMeta]) -> Counts:
    return Counts(
        samples=len(metas),
        segments=sum(len(m.segments or ()) for m in metas),
        referring=sum(len(r.sentences) for m in metas for r in m.referring),
        captions=sum(len(m.captions) for m in metas),
        questions=sum(len(m.questions) for m in metas),
    )


def _seen(taxonomies: Mapping[str, Taxonomy], metas: Sequence[SampleMeta]) -> dict[str, Taxonomy]:
    """Mark the classes that have a training mask, in taxonomies that have any."""
    masked: dict[str, set[str]] = {name: set() for name in taxonomies}
    for meta in metas:
        if meta.split == "train" and meta.taxonomy is not None:
            masked[meta.taxonomy] |= {segment.category for segment in meta.segments or ()}
    marked = {}
    for name, taxonomy in taxonomies.items():
        seen = masked[name] or set(taxonomy.names)
        categories = tuple(c.model_copy(update={"seen": c.name in seen}) for c in taxonomy.categories)
        marked[name] = Taxonomy(name=name, categories=categories)
    return marked


def _answers(metas: Sequence[SampleMeta]) -> tuple[str, ...]:
    given = Counter(a for m in metas if m.split == "train" for q in m.questions for a in q.answers)
    return tuple(sorted(given, key=lambda answer: (-given[answer], answer))[:MAX_ANSWERS])


@contextmanager
def _blaming_workers() -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        raise BuildError(f"a worker failed and nothing was published: {error}") from error
