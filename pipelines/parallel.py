"""The parallel steps of a build as Ray Data graphs: a row is an order for one task, its answer a report.

Orders and reports are small documents; what they speak of lies in files. Reports come in any order, so
nothing may depend on it; a task may run twice, so it replaces whole files. One worker is the calling process,
without Ray; for more the caller has started it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import pyarrow as pa
import ray
from ray.data import DataContext, TaskPoolStrategy
from ray.exceptions import RayError

from pipelines.corpora.rows import CorpusError
from pipelines.memory import keep_freed_memory
from pipelines.shards import ShardError
from schemas.jobs import BuildConfig
from schemas.records import Record

log = logging.getLogger(__name__)
Order = TypeVar("Order", bound=Record)
Report = TypeVar("Report", bound=Record)

_REPORT_EVERY_S = 5.0
_ANSWER = pa.schema({"report": pa.string(), "corpus_fault": pa.string(), "fault": pa.string()})


class WorkerError(RuntimeError):
    """A task failed, or its worker died for good; the message says why."""


def each(
    work: Callable[[Order], Report],
    orders: Sequence[Order],
    report_type: type[Report],
    config: BuildConfig,
    *,
    what: str,
    weigh: Callable[[Report], int] = lambda report: 1,
    total: int | None = None,
) -> Iterator[Report]:
    """Carry out every order, `config.num_workers` at a time.

    what, weigh, total    for the progress that is logged: "checked rows", how many a report stands for, of
                          how many
    Raises `WorkerError`, and `CorpusError` where a task did.
    """
    if not orders:
        return
    progress = Progress(what, len(orders) if total is None else total)
    one = config.num_workers == 1
    for answer in map(partial(_answer, work), orders) if one else _in_ray(work, orders, config):
        if fault := answer.get("corpus_fault"):
            raise CorpusError(fault)
        if fault := answer.get("fault"):
            raise WorkerError(fault)
        report = report_type.model_validate_json(answer["report"])
        progress.add(weigh(report))
        yield report


def _in_ray(
    work: Callable[[Order], Report], orders: Sequence[Order], config: BuildConfig
) -> Iterator[dict[str, str]]:
    carried_out = _dataset(orders, config).map_batches(
        partial(_answers, work, type(orders[0])),
        batch_size=1,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(min(config.num_workers, len(orders))),
        num_cpus=config.cpus_per_task,
        memory=config.memory_per_task_mb * 2**20 or None,
    )
    for table in _results(carried_out):
        yield from table.to_pylist()


def _answers(work: Callable[[Order], Report], order_type: type[Order], orders: pa.Table) -> pa.Table:
    keep_freed_memory()
    documents = orders["order"].to_pylist()
    answers = [_answer(work, order_type.model_validate_json(document)) for document in documents]
    return pa.Table.from_pylist(answers, schema=_ANSWER)


def _answer(work: Callable[[Order], Report], order: Order) -> dict[str, str]:
    """What was raised as a row, because of what a task raises Ray keeps only the stack trace."""
    try:
        return {"report": work(order).model_dump_json()}
    except CorpusError as error:
        return {"corpus_fault": str(error)}
    except (OSError, ShardError) as error:
        return {"fault": str(error)}


def _dataset(orders: Sequence[Record], config: BuildConfig) -> ray.data.Dataset:
    context = DataContext.get_current()
    context.enable_progress_bars = False  # `Progress` speaks also where there is no terminal
    context.print_on_execution_start = False
    if config.object_store_mb:
        limits = context.execution_options.resource_limits
        context.execution_options.resource_limits = limits.copy(
            object_store_memory=config.object_store_mb * 2**20
        )
    rows = [{"order": order.model_dump_json()} for order in orders]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _results(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        first = (str(cause).strip().splitlines() or ["no message"])[0]
        raise WorkerError(f"{type(cause).__name__}: {first}; its log says more") from error


class Progress:
    """A line with rate and remaining time every few seconds, and one at the end."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.started = self.reported = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.done < self.total and now - self.reported < _REPORT_EVERY_S:
            return
        self.reported = now
        rate = self.done / max(now - self.started, 1e-3)
        left = (self.total - self.done) / max(rate, 1e-3)
        log.info("%s: %d of %d, %.0f/s, %.0f s left", self.what, self.done, self.total, rate, left)
