"""Corpora to a dataset version: the flow that joins reading, inspection, curation and writing.

    [read corpora] -> rows -> [check every file] -> group -> [join] -> plan -> [write shards] -> publish

What stands in brackets runs in Ray tasks on parts of the rows; groups and plan are decided here on arrays,
and the rows themselves stay on disk. Equal inputs give equal bytes and the same version id, in whatever order
the lines of an annotation file stand, whatever the number of workers and the order in which they finish.
Nothing is visible before everything is written.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.card import BuildError, by_reason, check_balance, examples, make_card, taxonomies
from pipelines.catalog import INPUTS, Catalog, DatasetVersion, content_id
from pipelines.checking import CheckOrder, CheckReport, check
from pipelines.curate import name, reject
from pipelines.facts import forget_others, inspection_digest
from pipelines.grouping import (
    DUPLICATE_LABELS,
    REASONS,
    Groups,
    LightRows,
    StoredThumbnails,
    group,
    light_rows,
)
from pipelines.joining import JoinOrder, JoinReport, join
from pipelines.mirror import mirrored
from pipelines.parallel import WorkerError, each
from pipelines.planning import LightSamples, Plan, light_samples, plan
from pipelines.reading import ROW, Harvest, HarvestOrder, harvest
from pipelines.spool import gather, mapped, prefixes, save
from pipelines.storing import Shelf, manifest_table, samples_table
from pipelines.unchanged import Memory, recall
from schemas.jobs import BuildConfig, CorpusConfig
from schemas.records import REJECTS

log = logging.getLogger(__name__)

ROWS_A_PART = 512  # chosen by us: about two seconds of decoding, for even progress and small tasks


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The balance sheet: num_read = num_kept + sum(rejects), in rows; several rows may make one sample.

    new         whether this version did not exist before
    inspected   files that were read and decoded, because nothing was known of them
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
    inspected: int
    seconds: float


def build(
    corpora: Sequence[CorpusConfig],
    config: BuildConfig,
    catalog: Catalog,
    *,
    code_version: str = "unknown",
    session: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> BuildReport:
    """Build and publish a version of the catalog's dataset, or find that the current one is it.

    session    opens Ray, and is not called where nothing changed or one worker does it all; without it the
               caller has started Ray
    Corpora at a URI are copied beside it first. Raises `CorpusError` where a corpus cannot be read,
    `CatalogError` where another build runs, `BuildError` where too much was rejected, nothing is left, or a
    worker failed. Then nothing was published.
    """
    started = time.monotonic()
    if not corpora:
        raise BuildError("no corpora to build from; list some under `corpora`")
    with catalog.building(), _blaming_workers():
        corpora = mirrored(corpora, catalog.cache / "corpora")
        memory = recall(corpora, config, catalog.cache / INPUTS, catalog.root)
        version = memory.version()
        if version is not None:
            catalog.serve(version)
            report = _unchanged(catalog.open(version), time.monotonic() - started)
        else:
            ray = session() if config.num_workers > 1 else nullcontext()
            with ray, catalog.workspace() as work:
                steps = _Steps(corpora=corpora, config=config, catalog=catalog, work=work)
                report = steps.build(memory, code_version, started)
    log.info("dataset %s: %s", catalog.dataset, report)
    return report


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """One build, step by step. What a step makes lies in `work`, one file a part."""

    corpora: Sequence[CorpusConfig]
    config: BuildConfig
    catalog: Catalog
    work: Path

    def build(self, memory: Memory, code_version: str, started: float) -> BuildReport:
        harvests = self._read()
        checks = self._check(sum(report.num_rows for report in harvests))
        files = self._files("checked", len(checks))
        rows = light_rows(files)
        groups = group(
            rows, StoredThumbnails(rows, files), near_duplicates=self.config.curate.near_duplicates
        )
        rejects = self._rejects(rows, groups)
        num_read = sum(report.num_rows + report.num_rejects for report in harvests)
        self._check_all_gave(rows, groups, rejects)
        num_said = sum(report.num_said for report in harvests)
        check_balance(num_read, len(groups.members), num_said, rejects, self.config.max_reject_share)
        joined = self._join(rows, groups, len(checks))
        samples, planned = self._plan(len(checks))
        shelf = Shelf(folder=self.catalog.shards_root, stamps=self.catalog.cache / "shards.json")
        stored = shelf.store(samples, planned, self.work, len(checks), self.config)
        tables = (manifest_table(stored), samples_table(samples, planned, stored), rejects)
        card = make_card(self.catalog.dataset, code_version, harvests, joined, rejects, len(groups.members))
        card = card.model_copy(update={"version": content_id(card, *tables)})
        new = self.catalog.publish(card, *tables)
        memory.remember(card.version, [*shelf.files(stored), *self.catalog.files(card.version)])
        return BuildReport(
            version=card.version,
            new=new,
            num_read=num_read,
            num_kept=card.num_kept,
            rejects=by_reason(rejects),
            num_samples=len(samples.key),
            num_shards=len(stored),
            shards_written=sum(shard.written for shard in stored),
            bytes_written=sum(shard.receipt.size_bytes for shard in stored if shard.written),
            inspected=sum(report.num_inspected for report in checks),
            seconds=time.monotonic() - started,
        )

    def _files(self, kind: str, num_parts: int) -> list[Path]:
        return [self.work / f"{kind}-{part:04d}.arrow" for part in range(num_parts)]

    def _read(self) -> list[Harvest]:
        """In the order of the corpora."""
        orders = [
            HarvestOrder(corpus=corpus, curate=self.config.curate, number=number, work=str(self.work))
            for number, corpus in enumerate(self.corpora)
        ]
        reports = each(harvest, orders, Harvest, self.config, what="read corpora")
        found = sorted(reports, key=lambda report: report.number)
        for corpus, report in zip(self.corpora, found, strict=True):
            log.info("read %s (%s, %s): %d rows", corpus.name, corpus.format, corpus.split, report.num_rows)
        taxonomies(found)  # two that contradict each other are found before hours of decoding
        return found

    def _check(self, num_rows: int) -> list[CheckReport]:
        parts = prefixes(num_rows, ROWS_A_PART)
        facts = self.catalog.cache / f"facts-{inspection_digest(self.config.max_pixels)}"
        facts.mkdir(parents=True, exist_ok=True)
        shared: dict[str, Any] = {"work": str(self.work), "facts": str(facts)}
        shared["max_pixels"] = self.config.max_pixels
        orders = [CheckOrder(part=part, prefix=prefix, **shared) for part, prefix in enumerate(parts)]
        reports = each(
            check,
            orders,
            CheckReport,
            self.config,
            what="checked rows",
            weigh=lambda report: report.num_rows,
            total=num_rows,
        )
        checked = sorted(reports, key=lambda report: report.part)
        forget_others(self.catalog.cache, facts, parts)
        return checked

    def _rejects(self, rows: LightRows, groups: Groups) -> pa.Table:
        """Of the readers, of the checks and of the grouping, in an order that only they decide."""
        paths = [*sorted(self.work.glob("unread-*.arrow")), *sorted(self.work.glob("refused-*.arrow"))]
        for_others = pa.Table.from_pylist(list(self._refused(rows, groups)), schema=REJECTS)
        table = pa.concat_tables([*map(mapped, paths), for_others])
        return table.sort_by([(column, "ascending") for column in REJECTS.names]).combine_chunks()

    def _refused(self, rows: LightRows, groups: Groups) -> Iterator[dict[str, str]]:
        if not len(groups.refused):
            return
        files = sorted(self.work.glob("checked-*.arrow"))
        refused, because = (
            gather(files, rows.part[chosen], rows.row[chosen], ["document"])["document"].to_pylist()
            for chosen in (groups.refused, groups.because)
        )
        for one, other, why in zip(refused, because, groups.why.tolist(), strict=True):
            reason, detail = REASONS[why]
            detail = detail.format(name(ROW.validate_json(other)))
            yield reject(ROW.validate_json(one), reason, detail).model_dump()

    def _check_all_gave(self, rows: LightRows, groups: Groups, rejects: pa.Table) -> None:
        """Every corpus gave something, or could have, had it been named before others."""
        second = groups.refused[groups.why == DUPLICATE_LABELS]
        gave, mapped_before = (
            {(self.corpora[i].name, self.corpora[i].split) for i in np.unique(rows.corpus[chosen]).tolist()}
            for chosen in (groups.members, second)
        )
        barren = []
        for corpus in self.corpora:
            named = f"{corpus.name} ({corpus.split})"
            if (corpus.name, corpus.split) in mapped_before - gave:
                log.warning(
                    "nothing of %s was kept: an image has one label map, and corpora named before it have "
                    "one of each of its images; name it before them, or leave it out",
                    named,
                )
            elif (corpus.name, corpus.split) not in gave:
                barren.append(named)
        if barren:
            raise BuildError(
                f"nothing of {', '.join(barren)} could be kept; nothing was published:{examples(rejects)}"
            )

    def _join(self, rows: LightRows, groups: Groups, num_parts: int) -> list[JoinReport]:
        members = pa.table(
            {
                "part": rows.part[groups.members],
                "row": rows.row[groups.members],
                "sample": groups.sample,
                "key": groups.key.take(pa.array(groups.sample)),
                "copy_of": groups.copy_of.take(pa.array(groups.sample)),
            }
        )
        save(self.work / "members.arrow", members)
        edges = np.searchsorted(groups.home[groups.sample], np.arange(num_parts + 1)).tolist()
        shared: dict[str, Any] = {"work": str(self.work), "num_parts": num_parts}
        orders = [
            JoinOrder(part=part, first=edges[part], stop=edges[part + 1], **shared)
            for part in range(num_parts)
        ]
        reports = each(
            join,
            orders,
            JoinReport,
            self.config,
            what="joined samples",
            weigh=lambda report: sum(count.samples for count in report.counts.values()),
            total=len(groups.home),
        )
        return sorted(reports, key=lambda report: report.part)

    def _plan(self, num_parts: int) -> tuple[LightSamples, Plan]:
        samples = light_samples(self._files("entries", num_parts))
        planned = plan(
            samples.kind,
            samples.bits,
            samples.rank,
            samples.source_bytes,
            samples.digest,
            max_samples=self.config.shard_samples,
            max_bytes=self.config.shard_mb * 2**20,
        )
        places = {"part": samples.part[planned.order], "row": samples.row[planned.order]}
        save(self.work / "plan.arrow", pa.table(places))
        return samples, planned


def _unchanged(version: DatasetVersion, seconds: float) -> BuildReport:
    card = version.card
    return BuildReport(
        version=version.id,
        new=False,
        num_read=card.num_read,
        num_kept=card.num_kept,
        rejects=card.rejects,
        num_samples=sum(count.samples for count in card.counts.values()),
        num_shards=len(version.manifest),
        shards_written=0,
        bytes_written=0,
        inspected=0,
        seconds=seconds,
    )


@contextmanager
def _blaming_workers() -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        raise BuildError(f"a worker failed and nothing was published: {error}") from error
