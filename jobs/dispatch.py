"""A job -> what runs it. Ray, torch and MLflow are imported by then and not before."""

from pathlib import Path

from jobs.console import Outcome
from schemas.jobs import AnyJob, EvaluateJob, PretrainJob, RebuildJob


def run(job: AnyJob, store: Path, source: str) -> Outcome:
    """Run a job in a store; `source` is the file it came from."""
    if isinstance(job, RebuildJob):
        from jobs import rebuild

        return rebuild.run(job, store, source)
    if isinstance(job, PretrainJob):
        from jobs import pretrain

        return pretrain.run(job, store, source)
    if isinstance(job, EvaluateJob):
        from jobs import evaluate

        return evaluate.run(job, store, source)
    from jobs import promote

    return promote.run(job, store, source)
