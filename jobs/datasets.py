"""What the command line shows of the built datasets."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.console import Outcome
from pipelines.catalog import Catalog, CatalogError
from pipelines.sheet import write_sheet


def listing(store: Path) -> list[dict[str, Any]]:
    """A row for each version of each dataset; `*` marks the current one."""
    rows = []
    for folder in sorted((store / "datasets").glob("*")):
        catalog = Catalog(store, folder.name)
        current = catalog.current()
        for version in catalog.versions():
            counts = catalog.open(version).card.counts
            samples = {split: count.samples for split, count in counts.items()}
            mark = "*" if version == current else ""
            rows.append({"dataset": folder.name, "version": version, "current": mark, "samples": samples})
    return rows


def show(store: Path, dataset: str, version: str) -> Outcome:
    """A version's card: counts, sources, rejects by reason, classes."""
    data = Catalog(store, dataset).open(version)
    card = data.card
    facts = {
        "dataset": dataset,
        "version": data.id,
        "code version": card.code_version,
        "records read": card.num_read,
        "records kept": card.num_kept,
        "rejects": card.rejects or "none",
        "shards": data.manifest.num_rows,
        "size_bytes": sum(data.manifest["size_bytes"].to_pylist()),
        "answers": len(card.answers),
    }
    counts = [{"split": split, **count.model_dump()} for split, count in card.counts.items()]
    sources = [source.model_dump(exclude={"files"}) for source in card.sources]
    classes = [
        {"taxonomy": taxonomy.name, **category.model_dump()}
        for taxonomy in card.taxonomies.values()
        for category in taxonomy.categories
    ]
    return Outcome(facts=facts, tables={"counts": counts, "sources": sources, "classes": classes})


def verify(store: Path, dataset: str, version: str) -> Outcome:
    """Hash every shard again. Raises `CatalogError` that names the damaged ones."""
    data = Catalog(store, dataset).open(version)
    return Outcome(facts={"dataset": dataset, "version": data.id, "verified_bytes": data.verify()})


def diff(store: Path, dataset: str, before: str, after: str) -> Outcome:
    """Which samples and shards differ between two versions."""
    changes = asdict(Catalog(store, dataset).diff(before, after))
    facts: dict[str, Any] = {"dataset": dataset, "from": before, "to": after}
    facts |= {what: len(names) for what, names in changes.items()}
    rows = [{"change": what, "name": name} for what, names in changes.items() for name in names]
    return Outcome(facts=facts, tables={"changes": rows})


def rollback(store: Path, dataset: str) -> Outcome:
    """Serve the version before the current one."""
    return Outcome(facts={"dataset": dataset, "current": Catalog(store, dataset).rollback()})


def view(store: Path, dataset: str, version: str, out: Path, limit: int) -> Outcome:
    """Write a contact sheet, one HTML file."""
    if out.is_dir():
        raise CatalogError(f"{out} is a folder; name the HTML file to write")
    write_sheet(Catalog(store, dataset).open(version), out, limit)
    return Outcome(facts={"sheet": str(out)})
