"""The two parallel steps of a build, as Ray Data graphs: inspect every file, write every shard.

The caller has started Ray. Results come in any order, so nothing here may depend on it.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, TaskPoolStrategy
from ray.exceptions import RayError

from pipelines.curate import Files
from pipelines.inspection import Facts, facts_by_file, inspect_table
from pipelines.shards import Receipt, ShardError, ShardPlan, from_ipc, to_ipc, write

log = logging.getLogger(__name__)

_CHUNK = 256  # files an inspecting task sees at most: about a second of decoding, for even progress
_REPORT_EVERY_S = 5.0
_OUTCOME = pa.schema({"fault": pa.string(), "receipt": pa.string(), "written": pa.bool_()})


class WorkerError(RuntimeError):
    """A task failed, or its worker died for good; the message says why."""


def inspect_files(wanted: Sequence[tuple[str, str]], max_pixels: int, num_workers: int) -> Files:
    """Facts of every (kind, path). Raises `WorkerError`."""
    if not wanted:
        return {}
    chunk = max(1, min(_CHUNK, len(wanted) // (4 * num_workers)))
    num_blocks = -(-len(wanted) // chunk)
    dataset = _dataset([{"kind": kind, "path": path} for kind, path in wanted], num_blocks)
    inspected = dataset.map_batches(
        partial(inspect_table, max_pixels=max_pixels),
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(min(num_workers, num_blocks)),
    )
    progress = _Progress("inspected", "files", len(wanted))
    files: dict[tuple[str, str], Facts] = {}
    for table in _results(inspected):
        files |= facts_by_file(table)
        progress.add(len(table))
    return files


def write_shards(
    plans: Sequence[ShardPlan], folder: Path, num_workers: int
) -> tuple[dict[str, Receipt], frozenset[str]]:
    """Receipts by shard, and the names of those that were not there yet. One row is one shard.

    Raises `WorkerError`.
    """
    dataset = _dataset([{"shard": s.name, "entries": to_ipc(s.entries)} for s in plans], len(plans))
    receipts: dict[str, Receipt] = {}
    written = set()
    progress = _Progress("stored", "samples", sum(len(shard.entries) for shard in plans))
    mapped = dataset.map_batches(
        partial(_write_table, folder=str(folder)),
        batch_size=1,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(min(num_workers, len(plans))),
    )
    for table in _results(mapped):
        for row in table.to_pylist():
            if row["fault"]:
                raise WorkerError(row["fault"])
            receipt = Receipt.model_validate_json(row["receipt"])
            receipts[receipt.shard] = receipt
            if row["written"]:
                written.add(receipt.shard)
            progress.add(len(receipt.members))
    return receipts, frozenset(written)


def _write_table(plans: pa.Table, folder: str) -> pa.Table:
    return pa.Table.from_pylist([_write_row(row, Path(folder)) for row in plans.to_pylist()], schema=_OUTCOME)


def _write_row(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        receipt, written = write(row["shard"], from_ipc(row["entries"]), folder)
    except (
        OSError,
        ShardError,
    ) as error:  # as a row, because of what a task raises Ray keeps only the stack trace
        return {"fault": f"shard {row['shard']}: {error}", "receipt": "", "written": False}
    return {"fault": "", "receipt": receipt.model_dump_json(), "written": written}


def _dataset(items: list[dict[str, Any]], num_blocks: int) -> ray.data.Dataset:
    context = DataContext.get_current()
    context.enable_progress_bars = (
        False  # `_Progress` says it in samples, and also where there is no terminal
    )
    context.print_on_execution_start = False
    return ray.data.from_items(items, override_num_blocks=num_blocks)


def _results(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        first = (str(cause).strip().splitlines() or ["no message"])[0]
        raise WorkerError(f"{type(cause).__name__}: {first}; its log says more") from error


class _Progress:
    """A line with rate and remaining time every few seconds, and one at the end."""

    def __init__(self, verb: str, unit: str, total: int) -> None:
        self.verb, self.unit, self.total, self.done = verb, unit, total, 0
        self.started = self.reported = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.done < self.total and now - self.reported < _REPORT_EVERY_S:
            return
        self.reported = now
        rate = self.done / max(now - self.started, 1e-3)
        left = (self.total - self.done) / rate
        log.info(
            "%s %d of %d %s, %.0f/s, %.0f s left", self.verb, self.done, self.total, self.unit, rate, left
        )
