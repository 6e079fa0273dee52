"""Corpora -> a new dataset version, with Ray Data. With a `demo` section the corpora are written first."""

from dataclasses import asdict
from pathlib import Path

from jobs import cluster
from jobs.console import Outcome
from jobs.store import code_version
from pipelines import demo
from pipelines.build import build
from pipelines.catalog import Catalog
from schemas.jobs import RebuildJob


def run(job: RebuildJob, store: Path, source: str) -> Outcome:
    """Build and publish; a rebuild with nothing changed writes nothing."""
    corpora = job.corpora
    if job.demo is not None:
        corpora = (*demo.write(job.demo, store / job.demo.root), *corpora)
    report = build(
        corpora,
        job.build,
        Catalog(store, job.dataset),
        code_version=code_version(),
        session=cluster.session,
    )
    return Outcome(facts={"dataset": job.dataset, **asdict(report)})
