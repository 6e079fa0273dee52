"""Runs and the registry, with a real MLflow in the store; the journal that feeds it."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_catalog import publish_changed
from tiny import MODEL, VOCABULARY, files_of_at_most, train_config

from jobs import datasets, journal
from jobs.adopt import adopt
from jobs.journal import Follower, MetricRow
from jobs.store import write_json
from jobs.tracking import ModelVersion, Tracker, TrackingError, connect
from pipelines.catalog import Catalog, DatasetVersion
from xdecoder.inference.predictor import Predictor
from xdecoder.model.original import read
from xdecoder.training import checkpoint
from xdecoder.training.trainer import Trainer

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "xdecoder_seed0.pt"


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield connect(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nobody trained."""
    folder = tmp_path_factory.mktemp("run") / "model"
    checkpoint.export(Trainer(MODEL, train_config(), VOCABULARY), folder)
    return folder


@pytest.fixture(scope="module")
def three(tracker: Tracker, exported: Path) -> list[ModelVersion]:
    """Three versions of one model, of one run."""
    run = tracker.start("registry", "run", {}, {})
    return [tracker.register(run, "toy", exported, {"dataset": f"demo@{i}"}) for i in range(3)]


def test_a_run_keeps_what_was_asked_measured_and_read(tracker: Tracker) -> None:
    run = tracker.start(
        "runs", "first", {"train": {"optim": {"lr": 0.1}}, "tasks": ["a"]}, {"job_file": "x.yaml"}
    )
    tracker.log_dataset(run, name="demo", version="0123456789abcdef", profile={"train": {"samples": 3}})
    tracker.log_metrics(run, [MetricRow(step=1, time=1.0, metrics={"loss": 2.0, "loss/vqa": 1.0})])
    found = tracker.client.get_run(run)
    assert found.data.params == {"train.optim.lr": "0.1", "tasks": "['a']"}
    assert found.data.metrics == {"loss": 2.0, "loss/vqa": 1.0}
    assert found.data.tags["job_file"] == "x.yaml"
    (entry,) = found.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("demo", "0123456789abcdef")


def test_more_parameters_than_one_call_takes(tracker: Tracker) -> None:
    run = tracker.start("runs", "many", {f"p{i}": "x" * 9000 for i in range(250)}, {})
    assert len(tracker.client.get_run(run).data.params) == 250


def test_delivering_rows_twice_changes_nothing(tracker: Tracker) -> None:
    run = tracker.start("runs", "twice", {}, {})
    rows = [MetricRow(step=i, time=100.0 + i, metrics={"loss": 1 / i}) for i in (1, 2, 3)]
    tracker.log_metrics(run, rows)
    tracker.log_metrics(run, rows)
    history = tracker.client.get_metric_history(run, "loss")
    assert [(m.step, m.value) for m in history] == [(row.step, row.metrics["loss"]) for row in rows]


def test_a_run_ends_as_its_block_does(tracker: Tracker) -> None:
    good, bad = (tracker.start("runs", name, {}, {}) for name in ("good", "bad"))
    with tracker.running(good):
        pass
    with pytest.raises(RuntimeError, match="as it was"), tracker.running(bad):
        raise RuntimeError("as it was")
    assert tracker.client.get_run(good).info.status == "FINISHED"
    assert tracker.client.get_run(bad).info.status == "FAILED"
    assert tracker.resume(bad)
    assert tracker.client.get_run(bad).info.status == "RUNNING"


def test_a_run_that_this_mlflow_does_not_have_is_not_resumed(tracker: Tracker) -> None:
    assert not tracker.resume("0" * 32)


# ------------------------------------------------------------------------------------------- the registry


def test_versions_are_found_by_number_alias_and_latest(tracker: Tracker, three: list[ModelVersion]) -> None:
    assert [version.version for version in tracker.versions("toy")] == [1, 2, 3]
    assert tracker.version("toy", "2") == three[1]
    assert tracker.version("toy", "latest").tags["dataset"] == "demo@2"


def test_what_is_not_there_is_said_with_the_choices(tracker: Tracker, three: list[ModelVersion]) -> None:
    with pytest.raises(TrackingError, match=r"no version '9'; choose 'latest' or one of \['1', '2', '3'"):
        tracker.version("toy", "9")
    with pytest.raises(TrackingError, match="no model 'other'.*pretrain.yaml"):
        tracker.version("other", "latest")


def test_the_crown_moves_and_goes_back(tracker: Tracker, three: list[ModelVersion]) -> None:
    assert tracker.champion("toy") is None
    assert tracker.champion("other") is None
    with pytest.raises(TrackingError, match="no champion yet"):
        tracker.rollback("toy")
    with pytest.raises(TrackingError, match="no version 'champion'.*promote.yaml"):
        tracker.version("toy", "champion")
    assert tracker.crown(three[0]) is None
    with pytest.raises(TrackingError, match="first champion"):
        tracker.rollback("toy")
    previous = tracker.crown(three[2])
    assert previous is not None and previous.version == 1
    assert tracker.version("toy", "champion").version == 3
    deposed, restored = tracker.rollback("toy")
    assert (deposed.version, restored.version) == (3, 1)
    champion = tracker.champion("toy")
    assert champion is not None and champion.version == 1


def test_a_registered_model_is_the_exported_one(
    tracker: Tracker, three: list[ModelVersion], exported: Path, tmp_path: Path
) -> None:
    folder = tracker.fetch(three[0], tmp_path)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in exported.iterdir()
    }


def test_a_registered_model_answers_without_a_pickle(
    tracker: Tracker, three: list[ModelVersion], tmp_path: Path
) -> None:
    import mlflow.pyfunc
    from PIL import Image

    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    served = mlflow.pyfunc.load_model("models:/toy/1")
    rows = pd.DataFrame({"image": [str(tmp_path / "grey.png")], "task": ["vqa"], "text": ["is it grey?"]})
    (answer,) = served.predict(rows)
    assert json.loads(answer)["answer"] in VOCABULARY.answers


# ------------------------------------------------------------------------------------------------ reaching it


def test_a_server_that_is_down_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    before = time.monotonic()
    with pytest.raises(TrackingError, match="http://127.0.0.1:9") as refused:
        connect(tmp_path)
    assert time.monotonic() - before < 30
    assert "unset MLFLOW_TRACKING_URI" in str(refused.value)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ the journal


def test_a_follower_delivers_everything_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal.Writer(path).append(1, {"loss": 3.0})
    shown: list[int] = []
    delivered: list[MetricRow] = []
    with Follower(path, show=lambda row: shown.append(row.step), deliver=delivered.extend):
        journal.Writer(path).append(2, {"loss": 2.0})
        journal.Writer(path).append(3, {"loss": 1.0})
    assert [row.step for row in delivered] == [1, 2, 3]
    assert shown == [2, 3]


def test_rows_wait_while_mlflow_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "POLL_S", 0.01)
    monkeypatch.setattr(journal, "RETRY_S", 0.01)
    path, attempts, delivered = tmp_path / "metrics.jsonl", [], []

    def deliver(rows: Sequence[MetricRow]) -> None:
        attempts.append(len(rows))
        if len(attempts) < 3:
            raise TrackingError("away")
        delivered.extend(rows)

    with Follower(path, show=lambda row: None, deliver=deliver):
        for step in (1, 2):
            journal.Writer(path).append(step, {"loss": 1.0})
            time.sleep(0.05)
    assert [row.step for row in delivered] == [1, 2]


def test_a_step_that_was_done_again_is_delivered_once(tmp_path: Path) -> None:
    """Also where rounding differs (fewer ranks), and to a driver that begins anew. A step after a rewind,
    which has other samples, is delivered again.
    """
    path = tmp_path / "metrics.jsonl"
    written = journal.Writer(path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.5), (2, 2.0), (3, 1.4999)):
        written.append(step, {"loss": loss, "step_s": time.monotonic()})
    written.append(3, {"loss": 1.25, "step_s": 0.1, "rewound": 4.0})
    written.append(3, {"val/vqa/accuracy": 50.0})
    for _ in range(2):
        delivered: list[MetricRow] = []
        with Follower(path, show=lambda row: None, deliver=delivered.extend):
            pass
        assert [(row.step, row.metrics.get("loss")) for row in delivered] == [
            (1, 3.0),
            (2, 2.0),
            (3, 1.5),
            (3, 1.25),
            (3, None),
        ]
    assert len(journal.rows(path)) == 7
    last = journal.read(path)[-1].metrics
    assert (last["loss"], last["val/vqa/accuracy"]) == (1.25, 50.0)


def test_a_tracker_that_takes_its_time_does_not_hold_up_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "POLL_S", 0.01)
    path, shown, free = tmp_path / "metrics.jsonl", threading.Event(), threading.Event()
    journal.Writer(path).append(1, {"loss": 1.0})
    with Follower(path, show=lambda row: shown.set(), deliver=lambda rows: free.wait(20) and None):  # type: ignore[func-returns-value]
        time.sleep(0.1)  # the delivery is under way
        journal.Writer(path).append(2, {"loss": 1.0})
        assert shown.wait(10), "nothing was shown while the tracker was busy"
        free.set()


def test_the_curve_counts_a_repeated_step_once_and_survives_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, loss in ((1, 9.0), (2, 8.0), (2, 7.0), (3, float("nan"))):
        journal.Writer(path).append(step, {"loss": loss})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "ti\n{"step": 5')
    journal.Writer(path).append(6, {})  # by the attempt after the one that was killed
    curve = [(row.step, row.metrics) for row in journal.read(path)]
    assert curve == [(1, {"loss": 9.0}), (2, {"loss": 7.0}), (3, {}), (6, {})]


def test_rows_that_a_full_disk_refuses_are_written_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    written = journal.Writer(path)
    written.append(1, {"loss": 3.0})
    before = path.stat().st_size
    with files_of_at_most(before + 20):
        for step in (2, 3):
            written.append(step, {"loss": 2.0})
    assert "the metrics of step 3 wait for room" in caplog.text
    assert path.stat().st_size == before + 20, "a part of a row was written"
    written.append(4, {"loss": 1.0})
    assert [row.step for row in journal.read(path)] == [1, 2, 3, 4]


def test_each_store_keeps_its_own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow exports the address of the first store to the environment; the second must not follow it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first, second = connect(tmp_path / "a"), connect(tmp_path / "b")
    assert first.uri != second.uri
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.skipif(not GOLDEN.is_file(), reason="needs ../shared/golden")
def test_weights_of_the_original_become_a_version(tracker: Tracker, tmp_path: Path) -> None:
    torch.save(read(GOLDEN)["state_dict"], tmp_path / "original.pt")
    store = Path(tracker.uri.removeprefix("sqlite:///")).parent
    sizes = {"heads": 4, "text_heads": 4}
    adopt(tmp_path / "original.pt", tmp_path / "model", registered_model="original", store=store, **sizes)
    version = tracker.version("original", "latest")
    assert (version.version, version.tags["source"]) == (1, "original.pt")
    model = Predictor.load(tracker.fetch(version, tmp_path / "cache")).model
    assert model.config.backbone.name == "focal_dw" and model.config.quirks.masked_image_query


def test_a_contact_sheet_is_logged_and_pruning_asks_the_registry(
    tracker: Tracker, demo_dataset: DatasetVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Path(tracker.uri.removeprefix("sqlite:///")).parent
    shutil.copytree(demo_dataset.shards_root.parents[1], store / "datasets")
    catalog = Catalog(store, "demo")
    versions = [demo_dataset.id, *(publish_changed(catalog, answer) for answer in "abcd")]

    shown = datasets.view(store, "demo", versions[0], tmp_path / "sheet.html", limit=1)
    (entry,) = tracker.client.list_artifacts(shown.facts["mlflow run"])
    assert entry.path == "sheet.html"

    tracker.client.create_registered_model("kept")
    tracker.client.create_model_version("kept", str(tmp_path), tags={"dataset": f"demo@{versions[0]}"})
    write_json(store / "runs" / "r-1" / "run.json", {"dataset": f"demo@{versions[1]}", "finished": False})
    write_json(store / "runs" / "r-2" / "run.json", {"dataset": f"demo@{versions[2]}", "finished": True})
    rows = datasets.prune(store, "demo", 1, yes=False).tables["versions"]
    assert [row["kept_because"] for row in rows] == [
        "model kept version 1",
        "unfinished run r-1",
        "",
        "rollback leads to it",
        "it is served",
    ]
    assert catalog.versions() == tuple(versions), "without --yes nothing may go"
    datasets.prune(store, "demo", 1, yes=True)
    assert catalog.versions() == (*versions[:2], *versions[3:])
    write_json(store / "runs" / "r-3" / "run.json", {"finished": False})
    with pytest.raises(ValueError, match="r-3.*does not say"):
        datasets.prune(store, "demo", 1, yes=True)
