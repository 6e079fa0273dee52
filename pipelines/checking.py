"""One part of a build's rows: look up or find out the facts of their files, refuse the bad ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from pipelines.corpora.rows import Row
from pipelines.curate import files_of, refusal, sample_key
from pipelines.facts import Files, facts_of
from pipelines.inspection import Facts
from pipelines.reading import Rows
from pipelines.spool import CHECKED, hash64, mapped, save, within
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
    documents, rows = list(_documents(work, order.prefix)), Rows(work)
    found = [rows.row(*document) for document in documents]
    wanted = dict.fromkeys(file for row in found for file in files_of(row))
    files, num_inspected = facts_of(wanted, Path(order.facts), order.prefix, order.max_pixels)
    checked, refused = [], []
    for (corpus, rule, document), row in zip(documents, found, strict=True):
        reject = refusal(row, files)
        if reject is None:
            checked.append(decided_by(corpus, rule, row, document, files))
        else:
            refused.append(reject.model_dump())
    save(work / f"checked-{order.part:04d}.arrow", pa.Table.from_pylist(checked, schema=CHECKED))
    save(work / f"refused-{order.part:04d}.arrow", pa.Table.from_pylist(refused, schema=REJECTS))
    return CheckReport(
        part=order.part, num_rows=len(found), num_files=len(files), num_inspected=num_inspected
    )


def facts_in(document: bytes) -> Files:
    """The facts that stand beside a checked row."""
    return {(kind, place): facts for kind, place, facts in FACTS_OF_ROW.validate_json(document)}


def _documents(work: Path, prefix: str) -> Iterator[tuple[int, int, bytes]]:
    """The part's slice of every run: corpus, rule, document."""
    for path in sorted(work.glob("run-*.arrow")):
        run = mapped(path)
        chosen = within(prefix, run["hash"].to_numpy())
        part = run.slice(chosen.start, chosen.stop - chosen.start)
        columns = (part[name].to_pylist() for name in ("corpus", "rule", "document"))
        yield from zip(*columns, strict=True)


def decided_by(corpus: int, rule: int, row: Row, document: bytes, files: Files) -> dict[str, Any]:
    """A row of CHECKED."""
    image = files["image", row.image_path]
    sha256 = image.sha256
    told = [(*file, replace(files[file], thumbnail=b"")) for file in files_of(row)]
    return {
        "corpus": corpus,
        "rule": rule,
        "held_out": row.split == "val",
        "image_high": int(sha256[:16], 16),
        "image_low": int(sha256[16:32], 16),
        "number": hash64(row.image_number.encode()) if row.image_number else 0,
        "look": image.hash,
        "worth": 0 if row.labels_path is not None else 1 if row.referring else 2,
        "pixels": image.height * image.width,
        "tie": hash64(document),
        "labelled": row.labels_path is not None,
        "key": sample_key(row.corpus, row.image_id),
        "thumbnail": image.thumbnail,
        "document": document,
        "facts": FACTS_OF_ROW.dump_json(told),
    }
