"""What the command line shows of the registry, and changes by hand. Promotion by rules is jobs/promote.py."""

from pathlib import Path
from typing import Any

from jobs.console import Outcome
from jobs.locks import promotion_lock
from jobs.tracking import ModelVersion, connect


def listing(store: Path, model: str | None) -> list[dict[str, Any]]:
    """A row for each version of each model, or of one."""
    return [_row(version) for version in connect(store).versions(model)]


def promote(store: Path, model: str, version: str) -> Outcome:
    """Make a version the champion by hand, past the rules; the decision is recorded as such."""
    tracker = connect(store)
    with promotion_lock(store, model):
        chosen = tracker.version(model, version)
        previous = tracker.crown(chosen)
        tracker.tag(chosen, {"decision": "promoted", "decision_reasons": "by hand"})
    before = previous.version if previous else None
    return Outcome(facts={"model": model, "champion": chosen.version, "before": before})


def rollback(store: Path, model: str) -> Outcome:
    """Give `champion` back to the version that held it before."""
    tracker = connect(store)
    with promotion_lock(store, model):
        deposed, restored = tracker.rollback(model)
    return Outcome(facts={"model": model, "champion": restored.version, "before": deposed.version})


def _row(version: ModelVersion) -> dict[str, Any]:
    tags = version.tags
    return {
        "model": version.model,
        "version": version.version,
        "aliases": list(version.aliases),
        "decision": tags.get("decision", "not yet"),
        "dataset": tags.get("dataset", ""),
        "run": tags.get("run", ""),
    }
