"""What many records of a corpus say of one image, brought together: bytes, not an object a record."""

from array import array
from collections.abc import Iterator

import numpy as np

from pipelines.spool import hash64


class Gathered:
    """Texts without the character NUL, by the name of their image; 16 bytes a record beside their UTF-8."""

    def __init__(self) -> None:
        self._records = bytearray()
        self._ends = array("Q")
        self._hashes = array("Q")  # of the names

    def add(self, name: str, *said: str) -> None:
        record = "\0".join([name, *said]).encode("utf-8", "surrogateescape")  # as names of files are read
        self._records += record
        self._ends.append(len(self._records))
        self._hashes.append(hash64(record.partition(b"\0")[0]))

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        """Every image with all that was said of it, in the order in which they were first named."""
        if not self._hashes:
            return
        hashes, ends = np.frombuffer(self._hashes, np.uint64), np.frombuffer(self._ends, np.uint64)
        order = np.argsort(hashes, kind="stable")
        new = np.ones(len(order), dtype=bool)
        new[1:] = hashes[order[1:]] != hashes[order[:-1]]
        starts = np.flatnonzero(new)
        stops = np.append(starts[1:], len(order))
        for run in np.argsort(order[starts]):
            found: dict[str, list[str]] = {}  # by name: two may have one hash
            for row in order[starts[run] : stops[run]]:
                record = self._records[ends[row - 1] if row else 0 : ends[row]]
                name, *said = record.decode("utf-8", "surrogateescape").split("\0")
                found.setdefault(name, []).extend(said)
            yield from found.items()
