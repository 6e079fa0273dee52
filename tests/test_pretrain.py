"""The running thread, with real Ray and MLflow: train, interrupt, resume, register, evaluate, promote."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import SMALL_SHARDS
from tiny import MODEL

from jobs import console, dispatch, journal
from jobs.console import Outcome
from jobs.locks import Busy, training_lock
from jobs.tracking import TrackingError, connect
from pipelines.catalog import DatasetVersion
from schemas.jobs import CorpusConfig, load
from schemas.tasks import TASKS

JOBS = Path(__file__).resolve().parents[1] / "jobs"
TINY = [
    f"model={MODEL.model_dump_json()}",
    "train.batch={segmentation: 2, image_text: 2}",
    "train.augment={image_size: 32, image_text_size: 32}",
    "train.loss.points=64",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.max_failures=0",
]
STEPS = 10  # more than are done before a signal is heard
QUICK = ["evaluate={limit: 4, pictures: 1, max_caption_tokens: 6}"]


@pytest.fixture(scope="module")
def store(demo_dataset: DatasetVersion) -> Path:
    """The store that holds the small demo dataset."""
    return demo_dataset.shards_root.parents[2]


@pytest.fixture(autouse=True)
def _embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def pretrain(store: Path, *overrides: str) -> Outcome:
    job = load(JOBS / "pretrain.yaml", [*TINY, *QUICK, f"train.steps={STEPS}", *overrides])
    return dispatch.run(job, store, "jobs/pretrain.yaml")


def curve(store: Path, outcome: Outcome) -> list[tuple[int, float]]:
    rows = journal.read(store / "runs" / outcome.facts["run"] / "metrics.jsonl")
    return [(row.step, row.metrics["loss"]) for row in rows]


@pytest.fixture(scope="module")
def first(store: Path) -> Outcome:
    return pretrain(store)


def test_a_training_leaves_a_tracked_run_and_a_model_with_lineage(
    store: Path, first: Outcome, demo_dataset: DatasetVersion
) -> None:
    tracker = connect(store)
    version = tracker.version("demo", first.facts["version"])
    assert version.tags["dataset"] == f"demo@{demo_dataset.id}"
    assert version.tags["job_file"] == "jobs/pretrain.yaml" and version.tags["code_version"]
    run = tracker.client.get_run(version.run)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == str(STEPS)
    assert {"loss", "lr", "grad_norm", "samples_per_s", "val/panoptic/PQ"} <= run.data.metrics.keys()
    assert run.inputs.dataset_inputs[0].dataset.digest == demo_dataset.id
    history = tracker.client.get_metric_history(version.run, "loss")
    assert [(metric.step, metric.value) for metric in history] == curve(store, first)
    pictures = tracker.client.list_artifacts(version.run, "evaluation/pictures")
    assert {Path(p.path).name.partition("-")[0] for p in pictures} >= {"panoptic", "referring", "vqa"}


def test_every_task_has_results_with_examples(first: Outcome) -> None:
    results = first.tables["results"]
    assert {row["task"] for row in results} == set(TASKS)
    assert all(row["examples"] > 0 for row in results)


def test_the_same_job_again_trains_afresh_with_the_same_curve(store: Path, first: Outcome) -> None:
    """Also where it is watched more closely: neither validation nor a trace changes what is learned."""
    watched = f"train.validation={{every: {STEPS}, limit: 2, pictures: 1, metric: panoptic/PQ}}"
    again = pretrain(store, watched, "train.profile=[1, 2]")
    assert again.facts["run"] != first.facts["run"]
    assert again.facts["version"] != first.facts["version"]
    assert curve(store, again) == curve(store, first)
    folder, tracker = store / "runs" / again.facts["run"], connect(store)
    measured = journal.read(folder / "metrics.jsonl")[-1].metrics
    assert {"val/panoptic/PQ", "epoch/segmentation", "memory/process_gb", "rejects"} <= measured.keys()
    kept = json.loads((folder / "checkpoints" / f"step-{STEPS:08d}" / "checkpoint.json").read_text())
    assert kept["metric"] == measured["val/panoptic/PQ"]
    run = tracker.version("demo", again.facts["version"]).run
    pictures = tracker.client.list_artifacts(run, f"validation/step-{STEPS:08d}")
    traces = tracker.client.list_artifacts(run, "profile")
    assert pictures and [Path(trace.path).name for trace in traces] == ["steps-1-2.json.gz"]


@contextmanager
def meanwhile(due: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """`act` is called beside what the block does, once, as soon as it is due."""

    def wait() -> None:
        while not over.is_set():
            if due():
                act()
                return
            time.sleep(0.005)

    over = threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def terminated_when_training_begins(store: Path, name: str) -> AbstractContextManager[None]:
    """SIGTERM for this process, which is the driver, as soon as a worker is there."""
    runs = store / "runs"
    return meanwhile(
        lambda: any(runs.glob(f"{name}-*/checkpoints")), partial(os.kill, os.getpid(), signal.SIGTERM)
    )


def test_an_interrupted_training_goes_on_and_ends_as_if_nothing_had_happened(
    store: Path, first: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is taken away, with notice; then the driver dies after training, before anything is
    evaluated: the run is unfinished and goes on.
    """

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    name = "name=interrupted"
    stopped = pytest.raises(ValueError, match=r"stopped as asked, at step [1-9]; the same job")
    with terminated_when_training_begins(store, "interrupted"), stopped:
        pretrain(store, name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jobs.evaluate.measure", killed)
        pretrain(store, name)
    (folder,) = (store / "runs").glob("interrupted-*")
    before = (folder / "metrics.jsonl").read_bytes()
    outcome = pretrain(store, name)
    assert outcome.facts["run"] == folder.name
    assert (folder / "metrics.jsonl").read_bytes() == before, "no step was trained twice"
    assert curve(store, outcome) == curve(store, first)
    assert [row.step for row in journal.rows(folder / "metrics.jsonl")] == [*range(1, STEPS + 1)]


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost_or_doubled(
    store: Path, first: Outcome
) -> None:
    def rows() -> int:
        return sum(len(journal.rows(path)) for path in (store / "runs").glob("killed-*/metrics.jsonl"))

    killed: list[int] = []

    def kill() -> None:
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)

    with meanwhile(lambda: rows() >= 5, kill):
        outcome = pretrain(store, "name=killed", "train.max_failures=1")
    assert killed and curve(store, outcome) == curve(store, first)
    tracker = connect(store)
    run = tracker.version("demo", outcome.facts["version"]).run
    delivered = [metric.step for metric in tracker.client.get_metric_history(run, "loss")]
    assert delivered == [*range(1, STEPS + 1)]


def test_what_the_cluster_cannot_place_is_refused_at_once(store: Path) -> None:
    before = sorted((store / "runs").glob("*"))
    with pytest.raises(ValueError, match="4 worker.*4 CPUs of 2"):
        pretrain(store, "train.num_workers=4", "train.batch={segmentation: 4, image_text: 4}")
    with pytest.raises(ValueError, match="1 GPUs of 0"):
        pretrain(store, "train.use_gpu=true")
    assert sorted((store / "runs").glob("*")) == before


def test_a_training_that_is_under_way_is_not_begun_a_second_time(store: Path, first: Outcome) -> None:
    name = first.facts["run"].rpartition("-")[0]
    with training_lock(store, name), pytest.raises(Busy, match=rf"{name}' is under way .*{os.getpid()}\)"):
        pretrain(store)


def test_mlflow_that_does_not_answer_stops_a_training_before_it_starts(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9"):
        pretrain(store, "name=untracked")
    assert not list((store / "runs").glob("untracked-*"))


def test_evaluation_is_computed_once_and_promotion_follows_the_rules(store: Path, first: Outcome) -> None:
    evaluated = dispatch.run(load(JOBS / "evaluate.yaml", [*QUICK, "version=1"]), store, "jobs/evaluate.yaml")
    assert evaluated.tables["results"] == first.tables["results"]

    lenient = "promote.rules=[{task: panoptic, metric: PQ, tolerance: 100}]"
    strict = "promote.rules=[{task: panoptic, metric: PQ, must_improve: true}]"
    kept = sorted((store / "evaluations").iterdir())
    outcomes = [
        dispatch.run(load(JOBS / "promote.yaml", [*QUICK, *overrides]), store, "jobs/promote.yaml")
        for overrides in (
            ["promote.candidate=1", lenient],
            ["promote.candidate=2", strict],
            ["promote.candidate=2", strict, "promote.require=true"],
            ["promote.candidate=2", lenient],
            ["promote.candidate=2", lenient],
        )
    ]
    decisions = [outcome.facts["decision"].partition(":")[0] for outcome in outcomes]
    assert decisions == ["promoted", "refused", "refused", "promoted", "nothing to decide"]
    assert [outcome.refused for outcome in outcomes] == [False, False, True, False, False]
    assert sorted((store / "evaluations").iterdir()) == kept
    tracker = connect(store)
    champion = tracker.champion("demo")
    assert champion is not None and champion.version == 2 and champion.tags["decision"] == "promoted"
    assert tracker.rollback("demo")[1].version == 1


def test_what_follows_a_version_runs_once_and_a_failure_is_tried_again(
    store: Path, first: Outcome, demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    def write(name: str, **document: object) -> None:
        (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")

    def rebuild() -> Outcome:
        return dispatch.run(load(tmp_path / "rebuild.yaml"), store, str(tmp_path / "rebuild.yaml"))

    corpora = [corpus.model_dump(mode="json") for corpus in demo_corpora]
    follows = {"kind": "rebuild", "corpora": corpora, "build": SMALL_SHARDS.model_dump()}
    quick = {"limit": 4, "pictures": 1, "max_caption_tokens": 6}
    write("evaluate.yaml", extends=str(JOBS / "evaluate.yaml"), version=1, evaluate=quick)
    write("promote.yaml", extends=str(JOBS / "promote.yaml"), registered_model="absent", evaluate=quick)

    write("rebuild.yaml", **follows, on_success=["rebuild.yaml"])
    with pytest.raises(ValueError, match="is a rebuild itself"):
        rebuild()
    write("rebuild.yaml", **follows, on_success=["evaluate.yaml", "promote.yaml"])
    with pytest.raises(ValueError, match=r"is published, but .*promote\.yaml, which follows, failed"):
        rebuild()
    candidate = {"candidate": 1, "rules": [{"task": "panoptic", "metric": "PQ", "tolerance": 100}]}
    write("promote.yaml", extends=str(JOBS / "promote.yaml"), promote=candidate, evaluate=quick)
    assert json.loads((store / "rebuilds" / "demo.json").read_text())["done"] == ["evaluate.yaml"]
    second, third = rebuild(), rebuild()
    assert not second.facts["new"]  # the version is served; what follows it was left undone
    assert second.facts["followed by"] == third.facts["followed by"] == ["evaluate.yaml", "promote.yaml"]
    assert not third.tables


def test_an_outcome_can_be_printed_both_ways(first: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    console.report(first, as_json=True)
    assert json.loads(capsys.readouterr().out)["results"] == first.tables["results"]
    console.report(first, as_json=False)
    assert "panoptic" in capsys.readouterr().out
