"""Laws of the connection to Ray."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cluster

ASKED_BY_A_WORKER = """
import os
from jobs import cluster

cluster.prepare()

def nodes():
    from ray.util.state import list_nodes
    return [node.node_id for node in list_nodes()]

with cluster.session(1):
    import ray
    print(cluster.call(nodes, cpus=1) == [node["NodeID"] for node in ray.nodes()])
print(os.environ["RAY_API_SERVER_ADDRESS"])
"""


@pytest.fixture
def beside_another_cluster() -> Iterator[dict[str, str]]:
    """The environment of a process that finds a cluster of `ray start`, with a dashboard, on its machine."""
    # the names of sockets may not be long
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"RAY_TMPDIR": folder}
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", "--head", "--block", "--port=0", "--dashboard-port=0", "--num-cpus=0"]
        other = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            while not list(Path(folder).glob("**/ray_current_cluster")):
                assert other.poll() is None, "it did not start"
                time.sleep(0.1)
            yield environment
        finally:
            os.killpg(other.pid, signal.SIGKILL)  # takes its processes along, and does not wait for them
            other.wait()


def test_workers_ask_their_own_cluster_also_beside_another(beside_another_cluster: dict[str, str]) -> None:
    """Ray Train takes a training down whose controller the asked cluster does not know."""
    command = [sys.executable, "-c", ASKED_BY_A_WORKER]
    root = Path(__file__).parents[1]
    environment = beside_another_cluster | {"RAY_API_SERVER_ADDRESS": "http://mine:1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["True", "http://mine:1"], done.stderr


def test_a_cluster_that_became_too_small_is_told_of(
    ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    def told(workers: int) -> list[str]:
        caplog.clear()
        with cluster.watched(workers=workers, cpus=1, gpus=0, every_s=0.02):
            time.sleep(0.3)
        return [record.getMessage() for record in caplog.records]

    assert told(workers=2) == []
    first, *again = told(workers=3)
    assert first.startswith("waiting for the cluster: 3 worker(s) need 3 CPUs of 2 in the cluster") and again
