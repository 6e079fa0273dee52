"""One part of a build's rows: look up or find out the facts of their files, refuse the bad ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from pipelines import labels, places
from pipelines.atomic import appearing
from pipelines.corpora.rows import Row
from pipelines.curate import files_of, judge, sample_key
from pipelines.facts import Files, Known
from pipelines.inspection import Facts
from pipelines.reading import ROW, Rows
from pipelines.spool import CHECKED, hash64, mapped, save, within
from schemas.records import REJECTS, Record, Reject

FACTS_OF_ROW: TypeAdapter[list[tuple[str, str, Facts]]] = TypeAdapter(list[tuple[str, str, Facts]])


class CheckOrder(Record):
    """Which part to look after, by the leading bits of its hashes, and where."""

    part: int
    prefix: str
    work: str
    facts: str
    max_pixels: int


class CheckReport(Record):
    """`checked-<part>.arrow`, `refused-<part>.arrow` and `maps-<part>.bin`, index maps, are written."""

    part: int
    num_rows: int
    num_inspected: int


def check(order: CheckOrder) -> CheckReport:
    """Rows of a part -> checked rows and rejects, on disk. Raises `OSError` where they cannot be written."""
    work = Path(order.work)
    rows, known = Rows(work), Known(Path(order.facts), order.prefix, order.max_pixels)
    checked, refused = [], []
    maps = work / f"maps-{order.part:04d}.bin"
    with appearing(maps, durable=False) as file:
        for corpus, rule, document in _documents(work, order.prefix):
            row = rows.row(corpus, rule, document)
            runs = [known.ask(*wanted) for wanted in files_of(row)][-1]  # of the label map, which is last
            judged = judge(row, known.files)
            if isinstance(judged, Reject):
                refused.append(judged.model_dump())
                continue
            if row.unnamed:
                own = known.files["image", row.image_path].sha256[:32]
                row = replace(row, image_id=f"{row.source.files[0]}#{own}", unnamed=False)
                document = ROW.dump_json(row, exclude={"rule"})
            place = ""
            if runs is not None:  # made now: decoding the label map again would cost more than all else
                data = labels.index_map(runs, [segment.id for segment in judged])
                place = places.member(str(maps.absolute()), file.tell(), len(data))
                file.write(data)
            checked.append(decided_by(corpus, rule, row, document, known.files) | {"index_map": place})
    known.save()
    save(work / f"checked-{order.part:04d}.arrow", pa.Table.from_pylist(checked, schema=CHECKED))
    save(work / f"refused-{order.part:04d}.arrow", pa.Table.from_pylist(refused, schema=REJECTS))
    return CheckReport(
        part=order.part, num_rows=len(checked) + len(refused), num_inspected=known.num_inspected
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
    """A row of CHECKED, less its index map."""
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
        "tie": hash64(ROW.dump_json(row, exclude={"rule", "image_path"})),  # what is said, not where it lies
        "labelled": row.labels_path is not None,
        "key": sample_key(row.corpus, row.image_id),
        "thumbnail": image.thumbnail,
        "document": document,
        "facts": FACTS_OF_ROW.dump_json(told),
    }
