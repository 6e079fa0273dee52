"""Does a training come through what happens to clusters, and what does each fault cost?

    python -m benchmarks.faults_training [worker driver submitter sigterm hung full mlflow node elastic ...]

Real processes: `python -m jobs jobs/pretrain.yaml` with two Ray Train workers, to which one of these happens:

worker      SIGKILL for one of the two
driver      SIGKILL for the driver with its Ray and its workers; the same job is submitted again
submitter   SIGKILL for the driver alone, on a cluster that stays; the same job is submitted again at once
sigterm     SIGTERM for the driver, as before a pre-emption; then the same job again
hung        SIGSTOP for one worker: it neither answers nor ends
full        no room for checkpoints any more; the job stops, and is submitted again when there is room
mlflow      the MLflow server (a real one) is away for a while
node        a node of a `ray.cluster_utils.Cluster` is lost with its worker, and another one joins
elastic     a node is lost, training goes on with one worker; a node joins, and it goes on with two

Survived is a fault where every step is in the journal and, once, in MLflow, with the place in the epoch and
the loss that the undisturbed training has, and where the weights are the same, all to the last bit. Where the
number of workers changes, losses are compared to 1e-4: nothing is drawn by chance there and next to nothing
learned, so a sample that is lost or comes twice shows in the second digit. `elastic` takes five minutes, as
Ray Train looks for new nodes once a minute; the others take one.
"""

import argparse
import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.resume import ROOT, TINY, build
from jobs import cluster, journal
from jobs.journal import MetricRow
from jobs.store import read_json

WORKER = "RayTrainWorker"
PATIENCE_S = 600.0
SMALL_BYTES = 100_000  # less than a checkpoint of the tiny model, more than a log
# Where the number of workers changes: nothing is drawn by chance and next to nothing learned, as rounding
# grows with what is learned. So the loss of a step tells of its samples alone.
UNCHANCED = (
    "train.loss.points=0",
    "train.optim.lr=0.00000001",
    "train.checkpoint_every=20",
    "train.batch={segmentation: 16, image_text: 16}",
)
LIKE = 1e-4  # in the middle, steps beside each other differ by 2e-2
Job = subprocess.Popen[bytes]


@dataclass
class Trial:
    """One training as a user would start it."""

    name: str
    store: Path
    steps: int
    environment: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    process: Job | None = None

    def submit(self) -> Job:
        command = [sys.executable, "-m", "jobs", "jobs/pretrain.yaml", *TINY, f"name={self.name}"]
        command += [f"train.steps={self.steps}", "train.num_workers=2", "train.cpus_per_worker=1"]
        command += ["evaluate={tasks: [captioning], limit: 2, pictures: 0, max_caption_tokens: 4}"]
        with (self.store / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.overrides],
                cwd=ROOT,
                stdout=log,
                stderr=log,
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
    def folder(self) -> Path:
        return next((self.store / "runs").glob(f"{self.name}-*"), Path("/nowhere"))

    @property
    def rows(self) -> list[MetricRow]:
        """Of the journal, as they were written."""
        return journal.rows(self.folder / "metrics.jsonl")

    @property
    def learned(self) -> dict[int, dict[str, float]]:
        """What each step says of its samples and of the weights."""
        told = ("loss", "grad", "lr", "epoch", "rejects")
        curve = journal.read(self.folder / "metrics.jsonl")
        return {r.step: {n: v for n, v in r.metrics.items() if n.startswith(told)} for r in curve}

    @property
    def weights(self) -> bytes:
        return (self.folder / "model" / "model.safetensors").read_bytes()

    @property
    def tracked(self) -> Counter[int]:
        """How often MLflow has the loss of each step."""
        from mlflow import MlflowClient

        uri = self.environment.get("MLFLOW_TRACKING_URI", f"sqlite:///{self.store}/mlflow.db")
        run = read_json(self.folder / "run.json")["mlflow_run"]
        return Counter(metric.step for metric in MlflowClient(uri).get_metric_history(run, "loss"))

    def reach(self, step: int, process: Job) -> None:
        """Wait until this step is in the journal."""
        self.wait(lambda: bool(self.rows) and self.rows[-1].step >= step, process)

    def wait(self, true: Callable[[], bool], process: Job) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            if process.poll() is not None:
                raise SystemExit(
                    f"{self.name}: the job ended early, status {process.returncode}:\n{self.said[-3000:]}"
                )
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name}: nothing happened in {PATIENCE_S:.0f} s:\n{self.said[-3000:]}")
            time.sleep(0.05)

    def back(self, fault: float) -> float:
        """Seconds from the fault to the next step, which ends the longest silence since."""
        times = [fault, *(row.time for row in self.rows if row.time > fault)]
        silences = [(later - earlier, later) for earlier, later in zip(times, times[1:], strict=False)]
        return max(silences)[1] - fault

    def finish(self, process: Job, status: int = 0) -> None:
        found = process.wait(PATIENCE_S)
        if found != status:
            raise SystemExit(f"{self.name}: status {found} instead of {status}:\n{self.said[-3000:]}")


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
            self.port = cluster.free_port()
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow-server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "mlflow.log").open("ab") as log:
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
    """What a fault is done to beside the job: an MLflow server, a cluster of two nodes and a head."""

    server: Server
    cluster: Any = None
    nodes: list[Any] = field(default_factory=list)

    def serve(self) -> dict[str, str]:
        """Returns the environment of a job that uses it, as `gather` does."""
        self.server.start()
        return {"MLFLOW_TRACKING_URI": self.server.uri}

    def gather(self) -> dict[str, str]:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        return {"RAY_ADDRESS": self.cluster.address}

    def lose(self) -> None:
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def join(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def clear(self) -> None:
        self.server.stop()
        if self.cluster is not None:
            self.cluster.shutdown()
            self.cluster = None


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
    trial.reach(trial.steps // 2, process)
    killed = time.time()
    workers(process.pid)[-1].kill()
    trial.finish(process)
    return f"the next step after {trial.back(killed):.1f} s"


def driver(trial: Trial, process: Job, stage: Stage, *, alone: bool = False) -> str:
    """`alone`: without what it started."""
    trial.reach(trial.steps // 2, process)
    killed = time.time()
    process.kill() if alone else kill(process.pid)
    process.wait()
    trial.finish(trial.submit())
    return f"the next step after {trial.back(killed):.1f} s"


def sigterm(trial: Trial, process: Job, stage: Stage) -> str:
    trial.reach(trial.steps // 2, process)
    asked = time.time()
    process.send_signal(signal.SIGTERM)
    trial.finish(process, status=2)
    took = time.time() - asked
    stopped = re.search(r"stopped as asked, at step (\d+)", trial.said)
    assert stopped and len(trial.rows) == int(stopped[1]), "a step was lost or doubled"
    trial.finish(trial.submit())
    assert len(trial.rows) == trial.steps, "a step was trained twice"
    return f"stopped {took:.1f} s after it with a checkpoint of that step"


def hung(trial: Trial, process: Job, stage: Stage) -> str:
    trial.reach(trial.steps // 2, process)
    frozen = time.time()
    workers(process.pid)[-1].suspend()
    trial.finish(process)
    named = re.search(r"a rank does not come: .*[Rr]anks? \d", trial.said)
    assert named, f"the rank is not named:\n{trial.said[-3000:]}"
    return f"the rank was named, the next step after {trial.back(frozen):.1f} s, 15 of them patience"


def full(trial: Trial, process: Job, stage: Stage) -> str:
    trial.reach(trial.steps // 2, process)
    for one in workers(process.pid):
        one.rlimit(psutil.RLIMIT_FSIZE, (SMALL_BYTES, psutil.RLIM_INFINITY))
    trial.finish(process, status=2)
    reason = re.search(r"checkpoints could not be written .* twice in a row: .*;", trial.said)
    assert reason, f"no reason is given:\n{trial.said[-3000:]}"
    trial.finish(trial.submit())
    return "stopped with the reason after the second checkpoint that failed, then went on"


def mlflow(trial: Trial, process: Job, stage: Stage) -> str:
    trial.reach(trial.steps // 4, process)
    stage.server.stop()
    away = time.time()
    trial.reach(3 * trial.steps // 4, process)
    gone = time.time() - away
    stage.server.start()
    trial.finish(process)
    return f"away for {gone:.1f} s and {trial.steps // 2} steps, which came later"


def node(trial: Trial, process: Job, stage: Stage) -> str:
    trial.reach(trial.steps // 2, process)
    lost = time.time()
    stage.lose()
    stage.join()
    trial.finish(process)
    return f"the next step after {trial.back(lost):.1f} s"


def elastic(trial: Trial, process: Job, stage: Stage) -> str:
    trial.reach(10, process)
    lost = time.time()
    stage.lose()
    trial.wait(lambda: "rank 0 of 1 goes on" in trial.said, process)
    before = trial.rows[-1].step
    trial.reach(before + 3, process)
    fewer = trial.back(lost)
    joined = time.time()
    stage.join()
    trial.wait(lambda: trial.said.count("rank 0 of 2 goes on") == 2, process)
    trial.finish(process)
    again = trial.back(joined)
    return f"one worker's next step after {fewer:.1f} s; two workers' {again:.1f} s after a node joined"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done to a job, what it is done on, and settings of the job."""

    act: Callable[[Trial, Job, Stage], str]
    stage: Callable[[Stage], dict[str, str]] = lambda stage: {}
    overrides: Sequence[str] = ()
    exact: bool = True


FAULTS = {
    "worker": Fault(act=worker),
    "driver": Fault(act=driver),
    "submitter": Fault(act=partial(driver, alone=True), stage=Stage.gather),
    "sigterm": Fault(act=sigterm),
    "hung": Fault(act=hung, overrides=["train.collective_timeout_s=15"]),
    "full": Fault(act=full, overrides=["train.max_failures=0"]),
    "mlflow": Fault(act=mlflow, stage=Stage.serve),
    "node": Fault(act=node, stage=Stage.gather),
    "elastic": Fault(
        act=elastic, stage=Stage.gather, overrides=["train.min_workers=1", *UNCHANCED], exact=False
    ),
}


def differences(trial: Trial, whole: Trial, *, exact: bool) -> list[str]:
    """What a survived training has other than the undisturbed one."""
    found, expected = trial.learned, whole.learned
    wrong = [f"steps {sorted(found.keys() ^ expected.keys())}"] if found.keys() != expected.keys() else []
    if dict.fromkeys(expected, 1) != trial.tracked:
        wrong.append(f"MLflow has {trial.tracked.total()} losses of {len(expected)} steps")
    for step in found.keys() & expected.keys():
        for name, value in expected[step].items():
            if not exact and name.startswith(("loss/", "grad")):
                continue  # rounding moves a ReLU, or a cell of masked attention, across its threshold
            tolerance = LIKE if name == "loss" and not exact else 0.0
            if not math.isclose(found[step].get(name, math.nan), value, rel_tol=tolerance):
                wrong.append(f"{name} of step {step}: {found[step].get(name)} instead of {value}")
    if exact and trial.weights != whole.weights:
        wrong.append("the weights")
    return wrong


def undisturbed(store: Path, steps: int, overrides: Sequence[str] = ()) -> Trial:
    whole = Trial(name=f"whole{os.getpid()}-{len(overrides)}", store=store, steps=steps, overrides=overrides)
    started = time.time()
    whole.finish(whole.submit())
    assert list(whole.learned) == [*range(1, steps + 1)], whole.said[-3000:]
    print(f"no fault: the first step {whole.rows[0].time - started:.1f} s after the submission", flush=True)
    return whole


def survives(name: str, store: Path, whole: Trial) -> bool:
    fault, stage = FAULTS[name], Stage(server=Server(store))
    trial = Trial(f"{name}{os.getpid()}", store, whole.steps)
    try:
        trial.environment, trial.overrides = fault.stage(stage), fault.overrides
        told = fault.act(trial, trial.submit(), stage)
        wrong = differences(trial, whole, exact=fault.exact)
        last = trial.rows[-1]
        place = f"{last.step} steps ({len(trial.rows) - trial.steps} done again), "
        place += f"{last.metrics['epoch/segmentation']:.2f} epochs"
        verdict = f"NOT THE SAME: {wrong[:4]}" if wrong else "the same"
        print(f"{name}: {told}; {place}: {verdict}", flush=True)
        return not wrong
    finally:
        trial.end()
        stage.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="*", default=list(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--elastic-steps", type=int, default=400, help="so many that a minute passes with one worker"
    )
    parser.add_argument("--store", type=Path, help="has the dataset demo; else a small one is built")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.faults) - set(FAULTS))
    if unknown:
        parser.error(f"no fault is called {unknown}; choose from {list(FAULTS)}")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        store = arguments.store or build(Path(folder))
        exact = [name for name in arguments.faults if FAULTS[name].exact]
        others = [name for name in arguments.faults if not FAULTS[name].exact]
        survived = []
        if exact:
            whole = undisturbed(store, arguments.steps)
            survived += [survives(name, store, whole) for name in exact]
        if others:
            whole = undisturbed(store, arguments.elastic_steps, UNCHANCED)
            survived += [survives(name, store, whole) for name in others]
    if not all(survived):
        raise SystemExit("a fault was not survived")


if __name__ == "__main__":
    main()
