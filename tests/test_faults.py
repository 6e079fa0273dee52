"""Builds killed or refused at random moments; benchmarks/faults.py has more kinds, and more of them."""

from benchmarks.faults import run


def test_killed_builds_lose_nothing() -> None:
    assert run(["driver"], trials=3, seed=1) == {"driver": 3}


def test_a_store_that_cannot_be_written_loses_nothing() -> None:
    assert run(["denied"], trials=1, seed=0) == {"denied": 1}
