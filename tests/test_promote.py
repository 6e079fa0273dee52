"""The rules of promotion, as a table of cases: what each of them lets through and what it stops."""

import numpy as np
import pytest

from jobs.promote import Comparison, judge
from schemas.jobs import Rule
from schemas.tasks import Task
from xdecoder.inference.evaluator import Result

NAN = float("nan")
SURE = np.linspace(1.0, 3.0, 1000)  # every resample shows a gain
NOISE = np.linspace(-1.0, 1.2, 1000)  # 45 % of them show none


def result(value: float, examples: int = 100, task: Task = "panoptic", metric: str = "pq") -> Result:
    return Result(task=task, metric=metric, value=value, chance=None, examples=examples)


def champion(value: float, gains: np.ndarray = SURE) -> Comparison:
    return Comparison(results=[result(value)], gains=lambda task, metric: gains)


def rule(**settings: object) -> Rule:
    return Rule.model_validate({"task": "panoptic", "metric": "pq", **settings})


@pytest.mark.parametrize(
    ("the_rule", "candidate", "against", "objection"),
    [
        # the first champion needs only the floors
        (rule(), result(1.0), None, None),
        (rule(must_improve=True), result(1.0), None, None),
        (rule(floor=50), result(50.0), None, None),
        (rule(floor=50), result(49.9), None, "below the floor 50"),
        (rule(floor=2, direction="lower"), result(2.1), None, "above the floor 2"),
        (rule(floor=2, direction="lower"), result(1.9), None, None),
        # nothing is promoted on no evidence
        (rule(), result(NAN), None, "is nan, not a number"),
        (rule(), result(float("inf")), None, "is inf, not a number"),
        (rule(min_examples=101), result(90.0), None, "rests on 100 examples, the rule asks for 101"),
        (rule(metric="pqq"), result(90.0), None, "was not measured; measured: panoptic pq"),
        # against a champion
        (rule(), result(61.0), champion(60.0), None),
        (rule(), result(60.0), champion(60.0), None),
        (rule(), result(59.9), champion(60.0), "worse than the champion's by 0.10"),
        (rule(tolerance=0.5), result(59.6), champion(60.0), None),
        (rule(tolerance=0.5), result(59.4), champion(60.0), "worse than the champion's by 0.60"),
        (rule(direction="lower"), result(3.0), champion(2.0), "worse than the champion's by 1.00"),
        (rule(direction="lower"), result(1.0), champion(2.0), None),
        (rule(floor=70), result(65.0), champion(60.0), "below the floor 70"),
        (rule(), result(NAN), champion(60.0), "is nan, not a number"),
        # an improvement has to be more than noise
        (rule(must_improve=True), result(62.0), champion(60.0, SURE), None),
        (rule(must_improve=True), result(60.1), champion(60.0, NOISE), "is not surely better"),
        (rule(must_improve=True), result(60.0), champion(60.0, np.zeros(1000)), "is not surely better"),
        (rule(must_improve=True, direction="lower"), result(1.0), champion(2.0, -SURE), None),
        (
            rule(must_improve=True, direction="lower"),
            result(1.0),
            champion(2.0, SURE),
            "is not surely better",
        ),
        # a champion without a figure cannot defend itself with it
        (rule(must_improve=True), result(60.0), champion(NAN), None),
    ],
)
def test_rules(the_rule: Rule, candidate: Result, against: Comparison | None, objection: str | None) -> None:
    (verdict,) = judge([the_rule], [candidate], against, confidence=0.95)
    if objection is None:
        assert verdict.objections == ()
    else:
        assert len(verdict.objections) == 1
        assert objection in verdict.objections[0]
        assert verdict.objections[0].startswith("panoptic pq")


def test_one_objection_among_many_rules_is_enough() -> None:
    rules = [rule(), rule(floor=99), rule(tolerance=5)]
    verdicts = judge(rules, [result(60.0)], champion(60.0), confidence=0.95)
    assert [len(verdict.objections) for verdict in verdicts] == [0, 1, 0]


def test_several_objections_of_one_rule_are_all_said() -> None:
    strict = rule(floor=99, min_examples=1000, must_improve=True)
    (verdict,) = judge([strict], [result(50.0)], champion(60.0, NOISE), confidence=0.95)
    assert len(verdict.objections) == 4


def test_the_asked_confidence_decides() -> None:
    gains = np.concatenate([np.full(90, 1.0), np.full(10, -1.0)])
    wanted = [rule(must_improve=True)]
    assert not judge(wanted, [result(61.0)], champion(60.0, gains), confidence=0.9)[0].objections
    assert judge(wanted, [result(61.0)], champion(60.0, gains), confidence=0.91)[0].objections
