"""Does a training come through what happens to clusters, and what does each fault cost?

    python -m benchmarks.faults_training [worker driver sigterm mlflow hung node ...] [--steps 40]

Real processes: `python -m jobs jobs/pretrain.yaml` with two Ray Train workers, in which a worker or the
driver is killed, a worker is frozen, the driver gets SIGTERM, a real MLflow server goes away for a while,
or, on a `ray.cluster_utils.Cluster` of several nodes, the node of a worker is removed. A fault is survived
when the loss of every step is that of the run without a fault, to the last bit, and the tracker has each
step once.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.resume import ROOT, TINY, build
from jobs import journal

WORKER = "RayTrainWorker"
PATIENCE_S = 1800.0
Job = subprocess.Popen[bytes]
Curve = tuple[tuple[int, float], ...]


@dataclass
class Trial:
    """One training as a user would start it."""

    name: str
    store: Path
    steps: int
    environment: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    process: Job | None = None

    def submit(self) -> Job:
        command = [sys.executable, "-m", "jobs", "jobs/pretrain.yaml", *TINY, f"name={self.name}"]
        command += [f"train.steps={self.steps}", "train.num_workers=2", "train.cpus_per_worker=1"]
        command += ["evaluate={tasks: [captioning], limit: 2, pictures: 0, max_caption_tokens: 4}"]
        self.log = (self.store / f"{self.name}.log").open("ab")
        self.process = subprocess.Popen(
            [*command, *self.overrides],
            cwd=ROOT,
            stdout=self.log,
            stderr=self.log,
            env={**os.environ, "XDECODER_STORE": str(self.store), **self.environment},
        )
        return self.process

    def end(self) -> None:
        """Leave nothing behind."""
        if self.process is not None and self.process.poll() is None:
            kill(self.process.pid)
            self.process.wait()

    @property
    def said(self) -> str:
        return (self.store / f"{self.name}.log").read_text(errors="replace")

    @property
    def path(self) -> Path:
        return next((self.store / "runs").glob(f"{self.name}-*/metrics.jsonl"), Path("/nowhere"))

    @property
    def curve(self) -> Curve:
        rows = journal.read(self.path) if self.path.is_file() else ()
        return tuple((row.step, row.metrics["loss"]) for row in rows if "loss" in row.metrics)

    def reach(self, step: int, process: Job) -> float:
        """Wait until this step is in the journal; returns the time at which it was seen."""
        return wait(lambda: bool(self.curve) and self.curve[-1][0] >= step, process, self)

    def first_after(self, moment: float) -> float:
        """The first journal row written after a moment, as a time."""
        rows = journal.rows(self.path)
        return min(row.time for row in rows if row.time > moment)

    def finish(self, process: Job) -> int:
        return process.wait(PATIENCE_S)


@dataclass
class Server:
    """A real MLflow server on a free port, over a SQLite file."""

    folder: Path
    port: int = 0
    process: Job | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        log = (self.folder / "mlflow.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)

    def stop(self) -> None:
        if self.process is not None:
            kill(self.process.pid)
            self.process.wait()
            self.process = None


@dataclass
class Stage:
    """What a fault is done to beside the job: an MLflow server, a cluster of several nodes."""

    server: Server
    cluster: Any = None
    nodes: list[Any] = field(default_factory=list)

    def set(self, name: str) -> dict[str, str]:
        """Start what a fault needs; returns the environment of its job."""
        if name == "mlflow":
            self.server.start()
            return {"MLFLOW_TRACKING_URI": self.server.uri}
        if name == "node":
            from ray.cluster_utils import Cluster

            self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
            self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
            return {"RAY_ADDRESS": self.cluster.address}
        return {}

    def clear(self) -> None:
        self.server.stop()
        if self.cluster is not None:
            self.cluster.shutdown()
            self.cluster = None


def wait(true: Callable[[], bool], process: Job, trial: Trial) -> float:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        if process.poll() is not None:
            raise SystemExit(
                f"{trial.name}: the job ended early with {process.returncode}:\n{trial.said[-2000:]}"
            )
        if time.monotonic() > deadline:
            raise SystemExit(f"{trial.name}: nothing happened in {PATIENCE_S:.0f} s:\n{trial.said[-2000:]}")
        time.sleep(0.05)
    return time.time()


def kill(root: int) -> None:
    """SIGKILL for a process and all below it."""
    first = psutil.Process(root)
    for process in [*first.children(recursive=True), first]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def workers(root: int) -> list[psutil.Process]:
    """The processes of Ray Train's workers below a process, oldest first."""
    found = [p for p in psutil.Process(root).children(recursive=True) if WORKER in " ".join(p.cmdline())]
    return sorted(found, key=lambda p: p.create_time())


def worker(trial: Trial, process: Job, stage: Stage) -> str:
    """SIGKILL for one of the two workers."""
    trial.reach(trial.steps // 2, process)
    killed = time.time()
    workers(process.pid)[-1].kill()
    status = trial.finish(process)
    return f"status {status}, trained again after {trial.first_after(killed + 0.5) - killed:.1f} s"


def driver(trial: Trial, process: Job, stage: Stage) -> str:
    """SIGKILL for the driver and all it started; the same job is submitted again."""
    trial.reach(trial.steps // 2, process)
    killed = time.time()
    kill(process.pid)
    process.wait()
    status = trial.finish(trial.submit())
    return f"status {status}, trained again after {trial.first_after(killed + 0.5) - killed:.1f} s"


def sigterm(trial: Trial, process: Job, stage: Stage) -> str:
    """SIGTERM for the driver, as at a pre-emption; then the same job again."""
    trial.reach(trial.steps // 2, process)
    asked = time.time()
    process.send_signal(signal.SIGTERM)
    status, took = trial.finish(process), time.time() - asked
    stopped = re.search(r"stopped as asked, at step (\d+)", trial.said)
    assert status == 2 and stopped, trial.said[-2000:]
    rows = len(journal.rows(trial.path))
    assert rows == int(stopped[1]), "a step was lost or doubled"
    status = trial.finish(trial.submit())
    again = len(journal.rows(trial.path)) - trial.steps
    return f"stopped {took:.1f} s after the signal, then status {status}, {again} steps trained twice"


def hung(trial: Trial, process: Job, stage: Stage) -> str:
    """One of the two workers is frozen: it neither answers nor ends."""
    trial.reach(trial.steps // 2, process)
    frozen = time.time()
    workers(process.pid)[-1].suspend()
    status = trial.finish(process)
    named = re.search(r"[Rr]anks? [\d, ]+ failed to pass", trial.said)
    took = trial.first_after(frozen + 2) - frozen
    return f"status {status}, trained again after {took:.1f} s; said: {named[0] if named else 'nothing'}"


def mlflow(trial: Trial, process: Job, stage: Stage) -> str:
    """The MLflow server is killed in the middle, and started again when the training is nearly over."""
    trial.reach(trial.steps // 3, process)
    stage.server.stop()
    away = time.time()
    trial.reach(2 * trial.steps // 3, process)
    gone = time.time() - away
    stage.server.start()
    status = trial.finish(process)
    from mlflow import MlflowClient

    client = MlflowClient(trial.environment["MLFLOW_TRACKING_URI"])
    run = client.search_runs([e.experiment_id for e in client.search_experiments()])[0]
    history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert tuple(history) == trial.curve, "MLflow lacks steps, or has some twice"
    return f"status {status}, away for {gone:.1f} s and {trial.steps // 3} steps, every step delivered once"


def node(trial: Trial, process: Job, stage: Stage) -> str:
    """The node of one of the two workers is removed, and another one joins."""
    trial.reach(trial.steps // 2, process)
    lost = time.time()
    stage.cluster.remove_node(stage.nodes[-1], allow_graceful=False)
    stage.cluster.add_node(num_cpus=1)
    status = trial.finish(process)
    return f"status {status}, trained again after {trial.first_after(lost + 0.5) - lost:.1f} s"


FAULTS: Mapping[str, Callable[[Trial, Job, Stage], str]] = {
    "worker": worker,
    "driver": driver,
    "sigterm": sigterm,
    "hung": hung,
    "mlflow": mlflow,
    "node": node,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="*", default=list(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--store", type=Path, help="has the dataset demo; else a small one is built")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.faults) - set(FAULTS))
    if unknown:
        parser.error(f"no fault is called {unknown}; choose from {list(FAULTS)}")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        store = arguments.store or build(Path(name))
        whole = Trial(name=f"whole{os.getpid()}", store=store, steps=arguments.steps)
        started = time.time()
        status = whole.finish(whole.submit())
        assert status == 0 and len(whole.curve) == arguments.steps, whole.said[-2000:]
        print(f"no fault: first step {whole.first_after(0) - started:.1f} s after the submission", flush=True)
        for fault in arguments.faults:
            stage = Stage(server=Server(store))
            trial = Trial(f"{fault}{os.getpid()}", store, arguments.steps)
            try:
                trial.environment = stage.set(fault)
                trial.overrides = ("train.collective_timeout_s=15",) if fault == "hung" else ()
                told = FAULTS[fault](trial, trial.submit(), stage)
                same = "the same curve" if trial.curve == whole.curve else "ANOTHER CURVE"
                print(f"{fault}: {told}; {len(trial.curve)} steps, {same}", flush=True)
            finally:
                trial.end()
                stage.clear()


if __name__ == "__main__":
    main()
