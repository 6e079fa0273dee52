"""The connection to Ray: join the cluster of RAY_ADDRESS, else start one here and always stop it."""

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
DASHBOARD = "RAY_API_SERVER_ADDRESS"  # where Ray's own processes ask about the cluster


class ClusterError(ValueError):
    """A cluster that cannot be reached or cannot do what is asked."""


def prepare() -> None:
    """Settle what Ray reads from the environment when it is imported; call it before anything imports Ray.

    Ray 2.60 arms authentication by default and leaves a token in ~/.ray, which breaks the next
    `ray job submit` of this account (401). A cluster of our own gets a token from the environment instead,
    which ends with this process.
    """
    if not os.environ.get("RAY_ADDRESS"):
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # nobody takes this machine away, and the watcher logs an error that is none
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # the pace at which Ray Train takes reports; a second one inside it would hold the training up
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # how long workers of a lost node are waited for before those that are left are counted
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")


@contextmanager
def session(num_cpus: int | None = None) -> Iterator[None]:
    """Ray, connected. `num_cpus` bounds a local cluster. A session inside a session is the outer one.

    Raises `ClusterError` where RAY_ADDRESS does not answer, or Ray does not start here.
    """
    import ray  # here, because of `prepare`

    if ray.is_initialized():
        yield
        return
    before = os.environ.get(DASHBOARD)
    try:
        _connect(os.environ.get("RAY_ADDRESS"), num_cpus)
        yield
    finally:
        ray.shutdown()
        os.environ.pop(DASHBOARD, None)
        if before is not None:
            os.environ[DASHBOARD] = before


def require(*, workers: int, cpus: float, gpus: float) -> None:
    """Refuse what the cluster can never place: Ray would wait for it without end.

    Raises `ClusterError` that names what is asked and what there is.
    """
    have = resources()
    asked = {"CPU": workers * cpus, "GPU": workers * gpus}
    short = [f"{n:g} {name}s of {have.get(name, 0):g}" for name, n in asked.items() if n > have.get(name, 0)]
    if short:
        raise ClusterError(
            f"{workers} worker(s) need {' and '.join(short)} in the cluster; "
            "lower train.num_workers or train.cpus_per_worker, or add nodes"
        )


@contextmanager
def watched(*, workers: int, cpus: float, gpus: float, every_s: float = 60.0) -> Iterator[None]:
    """Inside, a warning whenever the cluster has become too small for these workers: Ray waits silently."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(every_s):
            try:
                require(workers=workers, cpus=cpus, gpus=gpus)
            except ClusterError as error:
                log.warning("waiting for the cluster: %s", error)
            except Exception as error:  # a head that is away; what is wrong, the training itself says
                log.debug("the cluster does not answer: %s", error)

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join(5)  # no longer: a head that is away answers late, or never


def resources() -> dict[str, float]:
    """What the whole cluster has, e.g. {"CPU": 2.0}."""
    import ray

    return dict(ray.cluster_resources())


def call(function: Callable[..., T], *args: Any, cpus: float, gpus: float = 0) -> T:
    """Run a function as one Ray task and wait for it. What it raises is raised here as it was."""
    import ray

    task = ray.remote(num_cpus=cpus, num_gpus=gpus)(function)
    try:
        result: T = ray.get(task.remote(*args))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    return result


def _connect(address: str | None, num_cpus: int | None) -> None:
    import ray

    if address and address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS={address} is a job server: use `ray job submit`, or unset RAY_ADDRESS to run here"
        )
    settings: dict[str, Any] = {"logging_level": logging.WARNING}
    if not address:
        settings |= {"num_cpus": num_cpus, "dashboard_port": free_port()}
        # Ray Train asks there whether its controller lives, and where nobody says where to ask, asks another
        # cluster of this machine: that one does not know the controller, and the training is taken down
        os.environ[DASHBOARD] = f"http://127.0.0.1:{settings['dashboard_port']}"
    try:
        ray.init(address or "local", **settings)
    except ConnectionError as error:
        raise ClusterError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
    except Exception as error:  # whatever a node that did not come up in time raises
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError(
            f"Ray did not start on this machine: {first}\nIt may be overloaded, or out of memory or of room "
            "in RAY_TMPDIR (else /tmp): try again when it is quieter"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our builds speak for themselves
    have = resources()
    log.info("Ray %s: %g CPUs, %g GPUs", address or "started here", have.get("CPU", 0), have.get("GPU", 0))


def free_port() -> int:
    """A port of this machine on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
