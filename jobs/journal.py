"""The journal of a training: rank 0 appends a line a logged interval, the driver follows the file.

So no training thread ever waits for a tracker: the file is the buffer, also while MLflow is away, and it
stays as the loss curve of the run. It lies in the store, which all machines share.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)
POLL_S = 1.0
RETRY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """Metrics at one step; `time` in seconds since the epoch."""

    step: int
    time: float
    metrics: dict[str, float]


class Writer:
    """Adds rows to a journal. What a full disk refuses is written with the next row there is room for."""

    def __init__(self, path: Path) -> None:
        self.path, self.unwritten = path, ""

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Add one row; readers see whole lines only. Values that are not finite are left out: JSON has no
        NaN.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.unwritten += json.dumps({"step": step, "time": time.time(), "metrics": finite}) + "\n"
        try:
            self._write()
        except OSError as error:  # it must not end the training
            log.warning("the metrics of step %d wait for room: %s", step, error)
        else:
            self.unwritten = ""

    def _write(self) -> None:
        with self.path.open("a+b") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # a kill or a full disk cut the last line
            file.write(self.unwritten.encode())


def read(path: Path) -> tuple[MetricRow, ...]:
    """The curve, one row a step, in order. A step that was done again after an interruption counts once."""
    latest: dict[int, MetricRow] = {}
    for row in rows(path):  # a validation's row joins that of its step
        before = latest[row.step].metrics if row.step in latest else {}
        latest[row.step] = MetricRow(step=row.step, time=row.time, metrics=before | row.metrics)
    return tuple(latest[step] for step in sorted(latest))


def rows(path: Path) -> list[MetricRow]:
    """Everything that was written, as it was written."""
    return _read_from(path, 0)[0]


class Follower:
    """Follows a journal from threads of its own while the block runs.

    show     called with every row that is written meanwhile
    deliver  called with all rows, also those of before an interruption (delivering twice must do no harm);
             where it raises, the rows are kept and tried again. It may take its time: rows are shown
             meanwhile
    """

    def __init__(
        self,
        path: Path,
        *,
        show: Callable[[MetricRow], None],
        deliver: Callable[[Sequence[MetricRow]], None],
    ) -> None:
        self.path, self.show, self.deliver = path, show, deliver
        self.pending: list[MetricRow] = []
        self.lock = threading.Lock()
        self.seen: set[object] = set()
        self.offset = 0
        self.retry_at = 0.0
        self.stopped = threading.Event()
        self.threads = [
            threading.Thread(target=self._repeat, args=(action,), name=f"journal {name}", daemon=True)
            for name, action in (("reader", self._read), ("deliverer", self._deliver))
        ]

    def __enter__(self) -> Self:
        rows, self.offset = _read_from(self.path, 0)
        self.pending = self._new(rows)
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Read to the end and make a last try; what is left undelivered is said, not raised."""
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        self.retry_at = 0.0
        self._read()
        self._deliver()
        if self.pending:
            log.error("%d rows of %s were never delivered; the file has them", len(self.pending), self.path)

    def _repeat(self, action: Callable[[], None]) -> None:
        while not self.stopped.wait(POLL_S):
            action()

    def _read(self) -> None:
        rows, self.offset = _read_from(self.path, self.offset)
        new = self._new(rows)
        with self.lock:
            self.pending += new
        for row in new:
            self.show(row)

    def _new(self, rows: Sequence[MetricRow]) -> list[MetricRow]:
        """Without steps that were done again after an interruption: rounding apart, they are the rows that
        were delivered before. (Those after a rewind, of other samples, say `rewound`.)
        """
        found = []
        for row in rows:
            same = (row.step, frozenset(row.metrics))
            if same not in self.seen:
                self.seen.add(same)
                found.append(row)
        return found

    def _deliver(self) -> None:
        with self.lock:
            rows = list(self.pending)
        if not rows or time.monotonic() < self.retry_at:
            return
        try:
            self.deliver(rows)
        except Exception as error:  # whatever it is, it must not end the training
            self.retry_at = time.monotonic() + RETRY_S
            log.warning("training goes on; %d rows wait to be delivered: %s", len(rows), error)
        else:
            with self.lock:
                del self.pending[: len(rows)]


def _read_from(path: Path, offset: int) -> tuple[list[MetricRow], int]:
    """The whole lines after `offset` bytes, and the offset after them."""
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        whole = file.read().rpartition(b"\n")[0]
    rows = [row for row in map(_row, whole.splitlines()) if row is not None]
    return rows, offset + (len(whole) + 1 if whole else 0)


def _row(line: bytes) -> MetricRow | None:
    try:
        return MetricRow(**json.loads(line))
    except (ValueError, TypeError):
        log.warning("a line of the journal was cut, by a kill presumably: %r", line[:80])
        return None
