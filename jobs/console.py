"""What a person sees: log lines, tables, progress. Results go to stdout, everything else to stderr."""

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)
OURS = ("schemas", "pipelines", "xdecoder", "jobs")


def configure() -> None:
    """Our log lines from INFO on, other people's from WARNING on, to stderr. Also for worker processes."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(logging.WARNING)  # Ray has configured the root of its workers
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)


def show(rows: Sequence[Mapping[str, Any]], *, as_json: bool, empty: str = "nothing") -> None:
    """Print a listing: JSON for programs, else an aligned table, or the sentence `empty`."""
    if as_json:
        dump(rows)
    else:
        print(table(rows) if rows else empty)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job has to show: facts and, under a title each, tables. `refused` asks for a failing status."""

    facts: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refused: bool = False


def report(outcome: Outcome, *, as_json: bool) -> None:
    """Print an outcome: JSON for programs, else a line a fact and the tables."""
    if as_json:
        dump({**outcome.facts, **outcome.tables})
        return
    width = max(map(len, outcome.facts), default=0)
    for name, value in outcome.facts.items():
        lines = list(map(_cell, value)) if isinstance(value, list) else [_cell(value)]
        print(f"{name:<{width}}  " + f"\n{'':<{width}}  ".join(lines))
    for title, rows in outcome.tables.items():
        print(f"\n{title}\n{table(rows)}", flush=True)


def dump(document: Any) -> None:
    """Print JSON."""
    print(json.dumps(document, indent=2, default=str))


def say(text: str) -> None:
    """Print a line of a result."""
    print(text, flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys -> aligned columns; numbers to the right."""
    if not rows:
        return ""
    columns = [_column(name, [row[name] for row in rows]) for name in rows[0]]
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds -> "48 s", "8.4 min", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """How far a long work is: a bar on a terminal, elsewhere a line at most every `every_s` seconds.

    A line states what is done, the rate and the time left, both from what was done since the first update.
    """

    def __init__(self, what: str, total: int, *, unit: str, every_s: float = 5.0) -> None:
        self.what, self.total, self.unit, self.every_s = what, total, unit, every_s
        self.first: tuple[int, float] | None = None
        self.shown = -math.inf
        self.bar: tqdm[Any] | None = None

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` of the total are finished."""
        now = time.monotonic()
        if self.first is None:
            self._begin(done, now)
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.shown >= self.every_s or done >= self.total:
            self.shown = now
            log.info("%s", self._line(done, now, note))
        if done >= self.total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _begin(self, done: int, now: float) -> None:
        self.first = (done, now)
        if sys.stderr.isatty():
            self.bar = tqdm(
                desc=self.what, total=self.total, initial=done, unit=self.unit, dynamic_ncols=True
            )

    def _line(self, done: int, now: float, note: str) -> str:
        before, since = self.first or (done, now)
        parts = [f"{self.what} {done}/{self.total} {self.unit}"]
        if done > before:
            rate = (done - before) / max(now - since, 1e-3)
            parts += [f"{rate:.3g}/s", f"{duration((self.total - done) / rate)} left"]
        return ", ".join([*parts, note] if note else parts)


def _column(name: str, values: Sequence[Any]) -> list[str]:
    cells = [name, *map(_cell, values)]
    width = max(map(len, cells))
    numbers = all(isinstance(value, int | float | None) for value in values)
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in cells]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return ", ".join(map(_cell, value)) if isinstance(value, list | tuple) else str(value)
