"""What the command line shows of the built datasets."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from jobs.console import Outcome
from jobs.store import catalog_of, names_in, pull, read_json, remote
from pipelines import export as public
from pipelines.catalog import CatalogError
from pipelines.changes import What
from pipelines.sheet import write_sheet

GRACE_S = 7 * 86400  # chosen by us: longer than any upload of a version to a URI takes


def listing(store: Path) -> list[dict[str, Any]]:
    """A row for each version of each dataset; `*` marks the current one."""
    rows = []
    for name in names_in(store / "datasets"):
        catalog = catalog_of(store, name)
        current = catalog.current()
        for version in catalog.versions():
            counts = catalog.open(version).card.counts
            samples = {split: count.samples for split, count in counts.items()}
            mark = "*" if version == current else ""
            rows.append({"dataset": name, "version": version, "current": mark, "samples": samples})
    return rows


def show(store: Path, dataset: str, version: str) -> Outcome:
    """A version's card: counts, sources, rejects by reason, classes."""
    data = catalog_of(store, dataset).open(version)
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
    """Read every byte again. Raises `CatalogError` that names the damaged files."""
    data = catalog_of(store, dataset).open(version)
    return Outcome(facts={"dataset": dataset, "version": data.id, "verified_bytes": data.verify()})


def diff(store: Path, dataset: str, before: str, after: str) -> Outcome:
    """Which samples came, went and changed between two versions, and why."""
    found = catalog_of(store, dataset).diff(before, after)
    facts: dict[str, Any] = {"dataset": dataset, "from": before, "to": after}
    facts |= {what: len(found.keys(what)) for what in get_args(What)}
    facts |= {"shards added": len(found.shards_added), "shards removed": len(found.shards_removed)}
    return Outcome(facts=facts, tables={"changes": [asdict(change) for change in found.changes]})


def rollback(store: Path, dataset: str) -> Outcome:
    """Serve the version before the current one."""
    return Outcome(facts={"dataset": dataset, "current": catalog_of(store, dataset).rollback()})


def view(store: Path, dataset: str, version: str, out: Path, limit: int) -> Outcome:
    """Write a contact sheet, one HTML file, and log it to MLflow with the version."""
    from jobs.tracking import connect  # here, because most of these commands need no MLflow

    if out.is_dir():
        raise CatalogError(f"{out} is a folder; name the HTML file to write")
    data = catalog_of(store, dataset).open(version)
    num_shown = write_sheet(data, out, limit)
    tracker = connect(store)
    run = tracker.start(f"{dataset} data", f"{dataset}@{data.id}", {"limit": limit}, {"dataset": data.id})
    tracker.log_dataset(run, name=dataset, version=data.id, profile=data.profile(), context="view")
    tracker.log_file(run, out)
    tracker.end(run)
    return Outcome(facts={"sheet": str(out), "samples": num_shown, "mlflow run": run})


def export(store: Path, dataset: str, version: str, folder: Path) -> Outcome:
    """Write a version in public forms, with the job file that reads them again."""
    corpora = public.export(catalog_of(store, dataset).open(version), folder.absolute())
    rows = [{"corpus": c.name, "format": c.format, "split": c.split} for c in corpora]
    again = f"python -m jobs {folder / 'rebuild.yaml'}"
    return Outcome(facts={"folder": str(folder), "read it again": again}, tables={"corpora": rows})


def prune(store: Path, dataset: str, keep: int, *, yes: bool) -> Outcome:
    """Remove versions and shards that nothing needs; without `yes` only say which."""
    catalog = catalog_of(store, dataset)
    needed = _needed(store, dataset)
    rows = [row.model_dump() for row in catalog.prunable(needed, keep)]
    going = sum(not row["kept_because"] for row in rows)
    facts: dict[str, Any] = {"dataset": dataset, "versions that go": going}
    if yes:
        facts["freed bytes of shards"] = catalog.prune(needed, keep, time.time() - GRACE_S)
    else:
        facts["nothing was removed"] = "add --yes to remove them, and the shards that only they hold"
    return Outcome(facts=facts, tables={"versions": rows})


def _needed(store: Path, dataset: str) -> dict[str, str]:
    """Versions that registered models or unfinished trainings need. Raises where that cannot be told."""
    from jobs.tracking import connect

    if remote(store) and "MLFLOW_TRACKING_URI" not in os.environ:
        raise CatalogError(
            "what models registered from other machines need cannot be told: set MLFLOW_TRACKING_URI to the "
            "server that all share"
        )
    uses = [
        (version.tags.get("dataset", ""), f"model {version.model} version {version.version}")
        for version in connect(store).versions()
    ]
    for name in names_in(store / "runs"):
        path = pull(store / "runs" / name / "run.json")
        run = read_json(path)
        if path.is_file() and not run.get("finished"):
            if "dataset" not in run:
                raise CatalogError(
                    f"{path} does not say which version it trains on; finish or delete that run"
                )
            uses.append((run["dataset"], f"unfinished run {path.parent.name}"))
    return {used.partition("@")[2]: by for used, by in uses if used.partition("@")[0] == dataset}
