"""One part of a build's rows: look up or find out the facts of their files, refuse the bad ones."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from pipelines.corpora.rows import Row
from pipelines.curate import files_of, refusal, sample_key
from pipelines.facts import Files, facts_of
from pipelines.inspection import Facts
from pipelines.reading import ROW
from pipelines.spool import CHECKED, mapped, save, within
from schemas.records import REJECTS, Record

FACTS_OF_ROW: TypeAdapter[list[tuple[str, str, Facts]]] = TypeAdapter(list[tuple[str, str, Facts]])


class CheckOrder(Record):
    """Which part to look after, by the leading bits of its hashes, and where."""

    part: int
    prefix: str
    work: str
    facts: str
    max_pixels: int


class CheckReport(Record):
    """`checked-<part>.arrow` and `refused-<part>.arrow` are written."""

    part: int
    num_rows: int
    num_files: int
    num_inspected: int


def check(order: CheckOrder) -> CheckReport:
    """Rows of a part -> checked rows and rejects, on disk. Raises `OSError` where they cannot be written."""
    work = Path(order.work)
    rows = [(corpus, ROW.validate_json(document), document) for corpus, document in _rows(work, order.prefix)]
    wanted = dict.fromkeys(file for _, row, _ in rows for file in files_of(row))
    files, num_inspected = facts_of(wanted, Path(order.facts), order.prefix, order.max_pixels)
    checked, refused = [], []
    for corpus, row, document in rows:
        reject = refusal(row, files)
        if reject is None:
            checked.append(_checked(corpus, row, document, files))
        else:
            refused.append(reject.model_dump())
    save(work / f"checked-{order.part:04d}.arrow", pa.Table.from_pylist(checked, schema=CHECKED))
    save(work / f"refused-{order.part:04d}.arrow", pa.Table.from_pylist(refused, schema=REJECTS))
    return CheckReport(part=order.part, num_rows=len(rows), num_files=len(files), num_inspected=num_inspected)


def facts_in(document: bytes) -> Files:
    """The facts that stand beside a checked row."""
    return {(kind, place): facts for kind, place, facts in FACTS_OF_ROW.validate_json(document)}


def _rows(work: Path, prefix: str) -> Iterator[tuple[int, bytes]]:
    """The part's slice of every run."""
    for path in sorted(work.glob("run-*.arrow")):
        run = mapped(path)
        chosen = within(prefix, run["hash"].to_numpy())
        part = run.slice(chosen.start, chosen.stop - chosen.start)
        yield from zip(part["corpus"].to_pylist(), part["document"].to_pylist(), strict=True)


def _checked(corpus: int, row: Row, document: bytes, files: Files) -> dict[str, Any]:
    sha256 = files["image", row.image_path].sha256
    return {
        "corpus": corpus,
        "held_out": row.split == "val",
        "image_high": int(sha256[:16], 16),
        "image_low": int(sha256[16:32], 16),
        "tie": int.from_bytes(hashlib.sha256(document).digest()[:8]),
        "labelled": row.segments is not None,
        "key": sample_key(row.corpus, row.image_id),
        "document": document,
        "facts": FACTS_OF_ROW.dump_json([(*file, files[file]) for file in files_of(row)]),
    }
