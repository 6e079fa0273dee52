"""The embedded scheduler: `python -m jobs schedule FILE.yaml ...` runs job files when their `schedule` says.

APScheduler keeps the times, in `<store>/schedule/jobs.db`; each run is a process of its own, `python -m jobs
FILE.yaml`, so that no crash of a rebuild ends the scheduler. What became of it is a JSON document beside its
log in `<store>/schedule/runs/`. That two rebuilds of a dataset never run at a time is the lock of the rebuild
itself, which holds whoever started it; the scheduler merely does not try.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from apscheduler.events import (
    EVENT_JOB_MAX_INSTANCES,
    EVENT_JOB_MISSED,
    JobExecutionEvent,
    JobSubmissionEvent,
)
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from sqlalchemy import inspect

from jobs import console
from jobs.locks import Busy, scheduler_lock
from jobs.store import read_json, resolve, write_json
from schemas import cron
from schemas.jobs import RebuildJob, ScheduleConfig, load

log = logging.getLogger(__name__)
KEPT_RUNS = 50  # of each dataset; chosen by us: a month and a half of nightly rebuilds
STOP_S = 60.0  # how long a rebuild may take to end itself (Ray's processes end within seconds)
TAIL_BYTES = 4000

# APScheduler calls `fire` by its name, so what its threads share is the module's.
_lock = threading.Lock()
_stopping = threading.Event()
_running: list[subprocess.Popen[bytes]] = []

Status = Literal["running", "done", "failed", "skipped", "missed", "stopped", "lost"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job file that has a schedule. Both paths are absolute; relative ones in the file are `folder`'s."""

    dataset: str
    file: str
    folder: str
    schedule: ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of a run; times in seconds since the epoch.

    status      lost: the scheduler was killed meanwhile, and nobody saw the end; skipped: another process was
                at this dataset; missed: nobody was there to start it, for longer than the grace time
    exit_code   of the process, negative for a signal; None where there is none yet
    log         of the process; empty where none was started
    """

    dataset: str
    file: str
    started: float
    ended: float | None
    status: Status
    exit_code: int | None
    pid: int
    message: str
    log: str


def serve(store: Path, files: Sequence[Path]) -> None:
    """Keep the schedule of these job files, or of those of last time, until SIGTERM or SIGINT.

    What was missed meanwhile is made up by one run, unless older than `grace_s`. Raises `ValueError` for a
    file without a schedule, `Busy` where this store has a scheduler already.
    """
    plans = _plans(store, files)
    with scheduler_lock(store):
        _close_lost_runs(store)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        scheduler = BackgroundScheduler(jobstores={"default": _job_store(store)}, timezone=UTC)
        scheduler.start(paused=True)
        scheduler.add_listener(
            lambda event: _not_started(store, event), EVENT_JOB_MISSED | EVENT_JOB_MAX_INSTANCES
        )
        if plans:
            _enlist(scheduler, store, plans)
        if not scheduler.get_jobs():
            raise ValueError(f"no schedule in {store}; name a job file that has one, e.g. jobs/rebuild.yaml")
        for job in scheduler.get_jobs():
            log.info("%s: %s runs next at %s", job.id, job.args[1], job.next_run_time)
        scheduler.resume()
        stop.wait()
        log.info("stopping: no new runs; those under way are ended")
        scheduler.pause()
        # APScheduler 3.11 looks for due jobs once more while it shuts down, and forgets those that it finds
        scheduler.remove_jobstore("default")
        _stop_runs()
        scheduler.shutdown(wait=True)


def listing(store: Path) -> list[dict[str, Any]]:
    """A row a scheduled job file: when it runs next and what became of its last run. Starts nothing."""
    if not _database(store).is_file():
        return []
    jobs = _job_store(store)
    if not inspect(jobs.engine).has_table(jobs.jobs_t.name):  # a scheduler is about to make it
        return []
    jobs.start(BackgroundScheduler(timezone=UTC), "default")  # of which nothing is started
    return [_row(job, history(store, job.id)) for job in jobs.get_all_jobs()]


def history(store: Path, dataset: str) -> list[Run]:
    """The runs of a dataset that are still known, oldest first."""
    return [Run(**read_json(path)) for path in _run_files(store, dataset)]


def fire(dataset: str, file: str, folder: str, store: str) -> None:
    """One run, from start to end, in a thread of the scheduler."""
    started = time.time()
    path = _runs(Path(store)) / f"{dataset}-{_stamp(started)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    run = Run(
        dataset=dataset,
        file=file,
        started=started,
        ended=None,
        status="running",
        exit_code=None,
        pid=0,
        message="",
        log=str(path.with_suffix(".log")),
    )
    try:
        process = _start([sys.executable, "-m", "jobs", file], folder, store, Path(run.log))
    except OSError as error:
        status: Status = "stopped" if _stopping.is_set() else "failed"
        _record(Path(store), path, replace(run, ended=time.time(), status=status, message=str(error)))
        return
    run = replace(run, pid=process.pid)
    write_json(path, asdict(run))
    log.info("%s: %s begins as process %d, written to %s", dataset, file, process.pid, run.log)
    code = process.wait()
    with _lock:
        _running.remove(process)
        status = "stopped" if _stopping.is_set() else _status(code)
    last = _last_line(Path(run.log))
    _record(Path(store), path, replace(run, ended=time.time(), status=status, exit_code=code, message=last))


def _start(command: list[str], folder: str, store: str, output: Path) -> subprocess.Popen[bytes]:
    """The process of a run. Raises `OSError` where it cannot start, or is to start no more."""
    with _lock, output.open("wb") as file:
        if _stopping.is_set():
            raise InterruptedError("the scheduler is stopping")
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"XDECODER_STORE": store},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for the scheduler, which then ends its runs
        )
        _running.append(process)
        return process


def _plans(store: Path, files: Sequence[Path]) -> dict[str, Plan]:
    """By dataset. Raises `ValueError` for what cannot be scheduled."""
    plans: dict[str, Plan] = {}
    for file in files:
        job = load(file)
        if not isinstance(job, RebuildJob) or job.schedule is None:
            raise ValueError(
                f"{file}: no schedule; a rebuild file may have one, e.g. schedule: {{cron: 0 3 * * *}}"
            )
        if resolve(job.store) != store:
            raise ValueError(
                f"{file} has its store at {resolve(job.store)}, this schedule at {store}: give one --store"
            )
        for name in job.on_success:
            load(file.parent / name)
        if job.dataset in plans:
            raise ValueError(
                f"{file} and {plans[job.dataset].file} both rebuild {job.dataset!r}: schedule one of them"
            )
        plans[job.dataset] = Plan(
            dataset=job.dataset, file=str(file.resolve()), folder=str(Path.cwd()), schedule=job.schedule
        )
    return plans


def _job_store(store: Path) -> SQLAlchemyJobStore:
    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # what it warns of we say ourselves
    path = _database(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    return SQLAlchemyJobStore(url=f"sqlite:///{path}")


def _enlist(scheduler: BackgroundScheduler, store: Path, plans: dict[str, Plan]) -> None:
    """Exactly these plans. One whose times have not changed keeps its next run, also where that is past."""
    for job in scheduler.get_jobs():
        if job.id not in plans:
            log.info("%s: no longer scheduled", job.id)
            job.remove()
    for plan in plans.values():
        trigger = _trigger(plan.schedule)
        settings = {
            "args": (plan.dataset, plan.file, plan.folder, str(store)),
            "misfire_grace_time": plan.schedule.grace_s,
            "coalesce": True,
            "max_instances": 1,
        }
        known = scheduler.get_job(plan.dataset)
        if known is not None and repr(known.trigger) == repr(trigger):
            known.modify(**settings)
        else:
            scheduler.add_job(
                "jobs.schedule:fire", trigger, id=plan.dataset, replace_existing=True, **settings
            )


def _trigger(schedule: ScheduleConfig) -> CronTrigger:
    """Every field is given, because APScheduler takes the least value for those behind the last one given."""
    fields = asdict(cron.parse(schedule.cron))
    days = ",".join(cron.WEEKDAYS[day] for day in fields.pop("weekday"))
    return CronTrigger(
        **{name: ",".join(map(str, values)) for name, values in fields.items()},
        day_of_week=days,
        timezone=schedule.time_zone,
    )


def _not_started(store: Path, event: JobExecutionEvent | JobSubmissionEvent) -> None:
    """Record a time at which nothing was started, and why."""
    status: Status = "missed" if event.code == EVENT_JOB_MISSED else "skipped"
    why = "too late to be made up" if status == "missed" else "the run before has not ended"
    now = time.time()
    run = Run(
        dataset=event.job_id,
        file="",
        started=now,
        ended=now,
        status=status,
        exit_code=None,
        pid=0,
        message=why,
        log="",
    )
    _record(store, _runs(store) / f"{event.job_id}-{_stamp(now)}.json", run)


def _record(store: Path, path: Path, run: Run) -> None:
    write_json(path, asdict(run))
    took = console.duration((run.ended or run.started) - run.started)
    level = logging.ERROR if run.status == "failed" else logging.INFO
    log.log(level, "%s: %s after %s: %s", run.dataset, run.status, took, run.message)
    for old in _run_files(store, run.dataset)[:-KEPT_RUNS]:
        old.with_suffix(".log").unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def _close_lost_runs(store: Path) -> None:
    """Runs of a scheduler that was killed: they may go on, and their lock keeps others out until they end."""
    for path in _runs(store).glob("*.json"):
        run = Run(**read_json(path))
        if run.ended is None:
            log.warning(
                "%s: nobody saw how the run of process %d ended; see %s", run.dataset, run.pid, run.log
            )
            write_json(path, asdict(replace(run, status="lost", ended=time.time())))


def _stop_runs() -> None:
    """SIGTERM for all runs; those that go on for STOP_S are killed with all their processes."""
    with _lock:
        _stopping.set()
        running = list(_running)
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_S
    for process in running:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _status(code: int) -> Status:
    known: dict[int, Status] = {0: "done", Busy.exit_status: "skipped"}
    return known.get(code, "failed")


def _row(job: Any, runs: Sequence[Run]) -> dict[str, Any]:
    last = runs[-1] if runs else None
    return {
        "dataset": job.id,
        "file": job.args[1],
        "next run": f"{job.next_run_time:%Y-%m-%d %H:%M:%S %Z}",
        "last run": f"{datetime.fromtimestamp(last.started, UTC):%Y-%m-%d %H:%M:%S} UTC" if last else "",
        "result": last.status if last else "",
        "took": console.duration(last.ended - last.started) if last and last.ended else "",
        "message": last.message if last else "",
    }


def _last_line(path: Path) -> str:
    """What a process said last."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _database(store: Path) -> Path:
    return store / "schedule" / "jobs.db"


def _runs(store: Path) -> Path:
    return store / "schedule" / "runs"


def _run_files(store: Path, dataset: str) -> list[Path]:
    stamp = "[0-9]" * 8 + "T" + "[0-9]" * 12
    return sorted(_runs(store).glob(f"{dataset}-{stamp}.json"))


def _stamp(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y%m%dT%H%M%S%f}"
