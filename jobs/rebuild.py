"""Corpora -> a new dataset version, with Ray Data, and what follows it (`on_success`).

With a `demo` section the corpora are written first. What follows runs once for every version: a list that
failed half way goes on at the next rebuild, also where that one finds nothing changed.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import cluster, dispatch
from jobs.console import Outcome
from jobs.locks import Busy, rebuild_lock
from jobs.store import catalog_of, code_version, pull, push, read_json, write_json
from pipelines import demo
from pipelines.build import BuildReport, build
from pipelines.catalog import BeingBuilt
from schemas.jobs import AnyJob, RebuildJob, load

log = logging.getLogger(__name__)


def run(job: RebuildJob, store: Path, source: str) -> Outcome:
    """Build, publish, follow up; a rebuild with nothing changed writes nothing but its lock.

    Raises `Busy` where another process rebuilds this dataset, `ValueError` for what can be mended.
    """
    following = _following(job, source)
    with rebuild_lock(store, job.dataset):
        report = _build(job, store)
        outcome = Outcome(facts={"dataset": job.dataset, **asdict(report)})
        return _follow(outcome, following, store, job.dataset, report.version) if following else outcome


def _following(job: RebuildJob, source: str) -> dict[Path, AnyJob]:
    """The job files of `on_success`, read now, so that a wrong one is refused before anything is built."""
    following = {Path(source).parent / name: load(Path(source).parent / name) for name in job.on_success}
    for path, job_that_follows in following.items():
        if isinstance(job_that_follows, RebuildJob):
            raise ValueError(
                f"{source}: on_success {path} is a rebuild itself; choose evaluate, pretrain or promote files"
            )
    return following


def _build(job: RebuildJob, store: Path) -> BuildReport:
    corpora = job.corpora
    if job.demo is not None:
        corpora = (*demo.write(job.demo, store / job.demo.root), *corpora)
    try:
        return build(
            corpora,
            job.build,
            catalog_of(store, job.dataset),
            code_version=code_version(),
            session=cluster.session,
        )
    except BeingBuilt as error:  # by a build that no job file started, which the lock of `run` would show
        raise Busy(str(error)) from error


def _follow(
    outcome: Outcome, following: dict[Path, AnyJob], store: Path, dataset: str, version: str
) -> Outcome:
    """Run what has not yet been run for this version. The first failure ends it, and names what is left."""
    state = store / "rebuilds" / f"{dataset}.json"
    known = read_json(pull(state))
    done: list[str] = known["done"] if known.get("version") == version else []
    tables: dict[str, list[dict[str, Any]]] = {}
    refused = False
    for path, job in following.items():
        if path.name in done:
            continue
        log.info("%s@%s: %s follows", dataset, version, path)
        try:
            result = dispatch.run(job, store, str(path))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{dataset}@{version} is published, but {path}, which follows, failed; "
                f"the next rebuild tries again: {error}"
            ) from error
        tables |= {f"{path.name}: {title}": rows for title, rows in result.tables.items()}
        refused = refused or result.refused
        done = [*done, path.name]
        write_json(state, {"version": version, "done": done})
        push(state)
    return Outcome(facts=outcome.facts | {"followed by": done}, tables=tables, refused=refused)
