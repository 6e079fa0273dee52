"""The candidate against the champion, by the written rules: the alias moves, or a refusal says why."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs import cluster, evaluate
from jobs.console import Outcome
from jobs.locks import promotion_lock
from jobs.store import catalog_of
from jobs.tracking import ModelVersion, Tracker, connect
from pipelines.catalog import DatasetVersion
from schemas.jobs import PromoteConfig, PromoteJob, Rule
from schemas.tasks import Task
from xdecoder.inference.evaluator import Evaluation, Result

log = logging.getLogger(__name__)
SEED = 0  # of the bootstrap: the same evaluations always give the same decision
Gains = Callable[[Task, str], np.ndarray[Any, np.dtype[np.float64]]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one rule says. `gain` is candidate minus champion, in the metric's unit."""

    rule: Rule
    candidate: float | None
    champion: float | None
    gain: float | None
    objections: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The champion's results on the same data, and the bootstrap of the gains over it on the same images."""

    results: Sequence[Result]
    gains: Gains


def run(job: PromoteJob, store: Path, source: str) -> Outcome:
    """Evaluate whatever of the two is not evaluated yet, decide, move the alias or not, and record why."""
    if not job.promote.rules:
        raise ValueError(
            f"{source}: promote.rules is empty, so nothing could be decided; jobs/promote.yaml has some"
        )
    tracker = connect(store)
    data = catalog_of(store, job.dataset.name).open(job.dataset.version)
    with promotion_lock(store, job.registered_model):
        candidate = tracker.version(job.registered_model, job.promote.candidate)
        champion = tracker.champion(job.registered_model)
        if champion is not None and champion.version == candidate.version:
            return _nothing_to_do(champion)
        verdicts = _compare(job, store, data, tracker, candidate, champion)
        objections = [objection for verdict in verdicts for objection in verdict.objections]
        if not objections:
            tracker.crown(candidate)
        _record(tracker, candidate, champion, job, data, objections)
    return _outcome(job, candidate, champion, verdicts, objections)


def judge(
    rules: Sequence[Rule], candidate: Sequence[Result], champion: Comparison | None, confidence: float
) -> tuple[Verdict, ...]:
    """Every rule's verdict. The candidate is promoted where no verdict has an objection.

    Without a champion only the floors and the number of examples count.
    """
    return tuple(_judge(rule, candidate, champion, confidence) for rule in rules)


def _judge(
    rule: Rule, candidate: Sequence[Result], champion: Comparison | None, confidence: float
) -> Verdict:
    found = _find(candidate, rule)
    if found is None:
        measured = sorted(f"{result.task} {result.metric}" for result in candidate)
        return _verdict(
            rule, None, None, [f"{_name(rule)} was not measured; measured: {', '.join(measured)}"]
        )
    objections = _absolute(rule, found)
    rival = _find(champion.results, rule) if champion else None
    if champion is None or rival is None or not math.isfinite(rival.value) or not math.isfinite(found.value):
        return _verdict(rule, found, rival, objections)
    objections += _fallen_behind(rule, found.value - rival.value)
    if rule.must_improve:
        objections += _not_better(rule, champion.gains(rule.task, rule.metric), confidence)
    return _verdict(rule, found, rival, objections)


def _absolute(rule: Rule, found: Result) -> list[str]:
    """Objections that need no champion."""
    if not math.isfinite(found.value):
        return [f"{_name(rule)} is {found.value}, not a number"]
    objections = []
    if found.examples < rule.min_examples:
        objections.append(
            f"{_name(rule)} rests on {found.examples} examples, the rule asks for {rule.min_examples}"
        )
    if rule.floor is not None and _sign(rule) * (found.value - rule.floor) < 0:
        side = "below" if rule.direction == "higher" else "above"
        objections.append(f"{_name(rule)} {found.value:.2f} is {side} the floor {rule.floor:g}")
    return objections


def _fallen_behind(rule: Rule, gain: float) -> list[str]:
    if _sign(rule) * gain >= -rule.tolerance:
        return []
    return [
        f"{_name(rule)} is worse than the champion's by {abs(gain):.2f}, tolerated are {rule.tolerance:g}"
    ]


def _not_better(rule: Rule, gains: np.ndarray[Any, np.dtype[np.float64]], confidence: float) -> list[str]:
    """A gain counts where at least `confidence` of the resampled image sets show it."""
    share = float(np.mean(_sign(rule) * gains > 0))
    if share >= confidence:
        return []
    low, high = np.quantile(gains, [0.025, 0.975])
    return [
        f"{_name(rule)} is not surely better: {share:.1%} of the resamples show a gain, asked for are "
        f"{confidence:.1%} (95 % of them lie in {low:+.2f} .. {high:+.2f})"
    ]


def _compare(
    job: PromoteJob,
    store: Path,
    data: DatasetVersion,
    tracker: Tracker,
    candidate: ModelVersion,
    champion: ModelVersion | None,
) -> tuple[Verdict, ...]:
    contenders = [candidate] if champion is None else [candidate, champion]
    models = [tracker.fetch(version, store / "models") for version in contenders]
    with cluster.session():
        kept = [evaluate.measure(model, store, job.dataset.name, data, job.evaluate) for model in models]
    ours, *others = [Evaluation.load(folder) for folder in kept]
    comparison = _comparison(ours, others[0], job.promote) if others else None
    return judge(job.promote.rules, ours.results, comparison, job.promote.confidence)


def _comparison(ours: Evaluation, theirs: Evaluation, config: PromoteConfig) -> Comparison:
    def gains(task: Task, metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return ours.gains(theirs, task, metric, config.resamples, SEED)

    return Comparison(results=theirs.results, gains=gains)


def _record(
    tracker: Tracker,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    job: PromoteJob,
    data: DatasetVersion,
    objections: Sequence[str],
) -> None:
    """The decision as tags of the candidate; the last one stays."""
    decision: Mapping[str, str] = {
        "decision": "refused" if objections else "promoted",
        "decision_reasons": json.dumps(list(objections))[:4000],
        "decision_against": str(champion.version) if champion else "none",
        "decision_dataset": f"{job.dataset.name}@{data.id}",
    }
    tracker.tag(candidate, decision)


def _nothing_to_do(champion: ModelVersion) -> Outcome:
    decision = "nothing to decide: the candidate is the champion"
    return Outcome(facts={"model": champion.model, "candidate": champion.version, "decision": decision})


def _outcome(
    job: PromoteJob,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    verdicts: Sequence[Verdict],
    objections: Sequence[str],
) -> Outcome:
    facts = {
        "model": candidate.model,
        "candidate": candidate.version,
        "champion": champion.version if champion else None,
        "decision": "refused" if objections else "promoted",
        "reasons": list(objections) or (["first champion"] if champion is None else ["every rule holds"]),
    }
    rows = [
        {
            "rule": _name(verdict.rule),
            "candidate": verdict.candidate,
            "champion": verdict.champion,
            "gain": verdict.gain,
            "holds": "no" if verdict.objections else "yes",
        }
        for verdict in verdicts
    ]
    return Outcome(facts=facts, tables={"rules": rows}, refused=bool(objections) and job.promote.require)


def _verdict(rule: Rule, found: Result | None, rival: Result | None, objections: Sequence[str]) -> Verdict:
    return Verdict(
        rule=rule,
        candidate=found.value if found else None,
        champion=rival.value if rival else None,
        gain=found.value - rival.value if found and rival else None,
        objections=tuple(objections),
    )


def _find(results: Sequence[Result], rule: Rule) -> Result | None:
    return next((r for r in results if (r.task, r.metric) == (rule.task, rule.metric)), None)


def _name(rule: Rule) -> str:
    return f"{rule.task} {rule.metric}"


def _sign(rule: Rule) -> int:
    return 1 if rule.direction == "higher" else -1
