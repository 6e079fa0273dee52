"""Rebuilds by the clock: what a schedule may say; a scheduler that is killed comes back and never doubles."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from apscheduler.schedulers.background import BackgroundScheduler
from PIL import Image

from jobs import schedule
from jobs.__main__ import main
from jobs.locks import Busy, rebuild_lock
from pipelines.catalog import Catalog
from schemas import cron
from schemas.jobs import JobFileError, ScheduleConfig, load

ROOT = Path(__file__).resolve().parents[1]
REBUILD = ROOT / "jobs" / "rebuild.yaml"
Scheduler = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDECODER_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "store"


@pytest.fixture
def scheduler(store: Path, tmp_path: Path) -> Iterator[Scheduler]:
    """Starts schedulers, and ends those that a failing test leaves."""
    started = []

    def start(*files: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "jobs", "schedule", *map(str, files)]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def job_file(folder: Path, dataset: str = "mine", **changes: Any) -> Path:
    """One captioned picture, due every second."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), (10, 200, 30)).save(folder / "images" / "a.png")
    (folder / "captions.tsv").write_text("image\tcaption\na.png\tgrass\n", encoding="utf-8")
    corpus = {"name": "a", "format": "captions_table", "split": "train", "root": str(folder)}
    document = {
        "kind": "rebuild",
        "dataset": dataset,
        "schedule": {"cron": "* * * * * *"},
        "corpora": [corpus | {"images": "images", "annotations": "captions.tsv"}],
        "build": {"num_workers": 1},
    }
    path = folder / f"{dataset}.yaml"
    path.write_text(json.dumps(document | changes), encoding="utf-8")
    return path


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 120) -> Any:
    """What the condition gives once it is true, while the process lives."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def runs(store: Path, *statuses: str, dataset: str = "mine") -> list[schedule.Run]:
    return [run for run in schedule.history(store, dataset) if run.status in statuses]


# ----------------------------------------------------------------------------------------- what may be said


@pytest.mark.parametrize(
    ("expression", "first"),
    [
        ("0 3 * * *", "2026-02-28 03:00:00"),
        ("*/20 * * * *", "2026-02-27 12:20:00"),
        ("0 9-17/4 * * *", "2026-02-27 13:00:00"),
        ("30 4 1,15 * *", "2026-03-01 04:30:00"),
        ("0 0 29 feb *", "2028-02-29 00:00:00"),
        ("0 0 * * 0", "2026-03-01 00:00:00"),  # cron's Sunday, not the library's Monday
        ("0 0 * * 7", "2026-03-01 00:00:00"),
        ("0 0 * * MON-wed", "2026-03-02 00:00:00"),
        ("0 0 * * 5-7", "2026-02-28 00:00:00"),
        ("*/7 * * * * *", "2026-02-27 12:00:07"),
    ],
)
def test_an_expression_is_read_as_cron_reads_it(expression: str, first: str) -> None:
    noon = datetime(2026, 2, 27, 12, 0, 1, tzinfo=UTC)  # a Friday
    trigger = schedule._trigger(ScheduleConfig(cron=expression))
    assert f"{trigger.get_next_fire_time(None, noon):%Y-%m-%d %H:%M:%S}" == first


def test_the_hour_is_that_of_the_time_zone_also_when_summer_time_begins() -> None:
    trigger = schedule._trigger(ScheduleConfig(cron="0 3 * * *", time_zone="Europe/Berlin"))
    before, after = (
        trigger.get_next_fire_time(None, datetime(2026, 3, day, 12, tzinfo=UTC)).astimezone(UTC).hour
        for day in (27, 29)
    )
    assert (before, after) == (2, 1)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cron=0 3 * *", "has 4 fields; write five, minute hour day month weekday"),
        ("cron=60 3 * * *", "minute '60': it is 0 to 59"),
        (
            "cron=0 3 * * mno",
            "weekday 'mno': it is 0 to 7, or sun, mon, tue, wed, thu, fri, sat; did you mean",
        ),
        ("cron=0 3 5-1 * *", "day '5-1': the range ends before it begins"),
        ("cron=0 3 5/2 * *", "a step needs a range, e.g. 5-31/2"),
        ("cron='*/0 3 * * *'", "the step is '0'"),
        ("cron=0 3 31 2,4 *", "no such month has a day 31"),
        ("cron=0 3 1 * 1", "names days and weekdays"),
        ("time_zone=Europe/Berln", "did you mean 'Europe/Berlin'?"),
        ("time_zone=new_york", "did you mean 'America/New_York'?"),
        ("grace_s=0", "grace_s: Input should be greater than 0"),
        ("crn=x", "did you mean 'cron'?"),
    ],
)
def test_what_is_wrong_is_refused_with_what_would_be_right(override: str, says: str) -> None:
    with pytest.raises(JobFileError) as refused:
        load(REBUILD, [f"schedule.{override}"])
    assert says in str(refused.value)


def test_seven_days_are_any_day() -> None:
    assert cron.parse("0 0 1 * 0-6").day == (1,)
    assert cron.parse("0 0 1-31 * 1").weekday == (1,)


def test_what_cannot_be_scheduled_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = job_file(tmp_path)
    (tmp_path / "again.yaml").write_text(mine.read_text(encoding="utf-8"), encoding="utf-8")
    for files, says in [
        ([], "no schedule in"),
        ([ROOT / "jobs" / "pretrain.yaml"], "no schedule; a rebuild file may have one"),
        ([job_file(tmp_path, "plain", schedule=None)], "no schedule; a rebuild file may have one"),
        ([mine, tmp_path / "again.yaml"], "both rebuild 'mine'"),
        ([job_file(tmp_path, "lost", on_success=["none.yaml"])], "none.yaml: no such job file"),
    ]:
        assert main(["schedule", *map(str, files)]) == 2
        assert says in capsys.readouterr().err
    assert main(["schedule", "--list"]) == 0
    assert "start one: python -m jobs schedule" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- what keeps running


def test_a_killed_scheduler_makes_up_for_what_was_missed_once(
    store: Path, tmp_path: Path, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs end in failure within seconds (the file is broken meanwhile), which the scheduler survives."""
    file = job_file(tmp_path, schedule={"cron": "*/2 * * * * *"})
    first = scheduler(file)
    until(lambda: runs(store, "running"), first)
    file.write_text("kind: nothing\n", encoding="utf-8")
    failed = until(lambda: runs(store, "failed"), first)
    assert failed[0].exit_code == 2 and "kind is 'nothing'" in failed[0].message

    started = len(runs(store, "running", "failed", "done"))
    until(lambda: len(runs(store, "running", "failed", "done")) > started, first)
    first.kill()
    first.wait()
    known = len(runs(store, "running", "failed", "done", "lost"))
    time.sleep(5)  # two runs are missed

    second = scheduler()  # without files: those of last time
    until(lambda: len(runs(store, "running", "failed", "done", "lost")) > known, second)
    assert not runs(store, "missed")
    assert len(runs(store, "running")) <= 1
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=60) == 0
    assert not runs(store, "running")

    assert main(["schedule", "--list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["dataset"] == "mine" and row["file"] == str(file) and row["next run"].endswith("UTC")


def test_many_missed_runs_are_made_up_by_one_and_old_ones_by_none(
    store: Path, tmp_path: Path, scheduler: Scheduler
) -> None:
    """What a machine leaves that was off for five hours: the next run of each file lies in the past."""
    now = datetime.now(UTC)
    hourly = f"{(now.minute + 30) % 60} * * * *"  # not while this runs
    fresh = job_file(tmp_path, "fresh", schedule={"cron": hourly})
    stale = job_file(tmp_path, "stale", schedule={"cron": "0 0 1 1 *", "grace_s": 60})
    off = BackgroundScheduler(jobstores={"default": schedule._job_store(store)}, timezone=UTC)
    off.start(paused=True)
    schedule._enlist(off, store, schedule._plans(store, [fresh, stale]))
    off.modify_job("fresh", next_run_time=now - timedelta(hours=5))
    off.modify_job("stale", next_run_time=datetime(now.year, 1, 1, tzinfo=UTC))
    off.remove_jobstore("default")
    off.shutdown()
    for file in (fresh, stale):
        file.write_text("kind: nothing\n", encoding="utf-8")  # so that a run is short

    process = scheduler()
    until(lambda: runs(store, "failed", dataset="fresh"), process)
    until(lambda: runs(store, "missed", dataset="stale"), process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert len(schedule.history(store, "fresh")) == len(schedule.history(store, "stale")) == 1


def test_a_second_scheduler_of_a_store_is_refused(
    store: Path, tmp_path: Path, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    process = scheduler(job_file(tmp_path, schedule={"cron": "0 0 1 1 *"}))
    until(lambda: (store / "locks" / "schedule").is_file() and schedule.listing(store), process)
    assert main(["schedule"]) == Busy.exit_status
    assert f" {process.pid})" in capsys.readouterr().err


def test_two_rebuilds_of_a_dataset_never_run_at_a_time(
    store: Path,
    tmp_path: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    file = job_file(tmp_path)
    with rebuild_lock(store, "mine"):
        assert main([str(file)]) == Busy.exit_status
        assert "is being rebuilt by another process" in capsys.readouterr().err
        schedule.fire("mine", str(file), str(tmp_path), str(store))
    with Catalog(store, "mine").building():  # by something that is no job file
        assert main([str(file)]) == Busy.exit_status
    assert Catalog(store, "mine").current() is None
    schedule.fire("mine", str(file), str(tmp_path), str(store))
    assert [(run.status, run.exit_code) for run in schedule.history(store, "mine")] == [
        ("skipped", Busy.exit_status),
        ("done", 0),
    ]
    assert Catalog(store, "mine").current() is not None
