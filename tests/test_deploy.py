"""The cluster files: Kubernetes, KubeRay and Ray would take them, and what they call exists.

The schemas in tests/schemas are extracts of the published ones; each says of what.
"""

import configparser
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from click.testing import CliRunner
from ray.scripts import scripts

from jobs.__main__ import _parser, _with_command
from jobs.schedule import STOP_S
from schemas.jobs import PretrainJob, RebuildJob, load

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "jobs" / "deploy"
KINDS = {
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "CronJob": "io.k8s.api.batch.v1.CronJob",
    "RayCluster": "RayCluster",
    "RayJob": "RayJob",
}
MANIFESTS = [
    document
    for path in sorted(DEPLOY.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    if "kind" in document
]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(DEPLOY.iterdir())}


def schema(kind: str) -> dict[str, Any]:
    definitions = {}
    for name in ("kubernetes", "kuberay"):
        text = (ROOT / "tests" / "schemas" / f"{name}.json").read_text(encoding="utf-8")
        definitions |= json.loads(text)["$defs"]
    return {"$ref": f"#/$defs/{KINDS[kind]}", "$defs": definitions}


def problems(document: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft7Validator(schema(document["kind"]))
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (document for document in MANIFESTS if document["kind"] == kind)
    return dict(found)


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """All containers of all pods of a manifest."""
    if isinstance(node, dict):
        yield from node.get("containers", [])
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from containers(inner)


@pytest.mark.parametrize(
    ("file", "document"), MANIFESTS, ids=lambda x: x if isinstance(x, str) else x["kind"]
)
def test_the_published_schema_takes_it(file: str, document: dict[str, Any]) -> None:
    assert problems(document) == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "says"),
    [
        ("RayCluster", ["spec", "workerGroupSpec"], [], "'workerGroupSpec' was unexpected"),
        ("RayCluster", ["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0, "is not of type 'string'"),
        ("RayCluster", ["spec", "authOptions", "mode"], "off", "is not one of ['disabled', 'token']"),
        ("RayCluster", ["spec", "headGroupSpec", "template", "spec", "volume"], [], "unexpected"),
        ("RayJob", ["spec", "schedule"], "0 3 * * *", "'schedule' was unexpected"),
        ("RayJob", ["spec", "backoffLimit"], "3", "is not of type 'integer'"),
        ("CronJob", ["spec", "timezone"], "UTC", "'timezone' was unexpected"),
    ],
)
def test_the_schema_notices_what_is_wrong(kind: str, path: list[str], value: Any, says: str) -> None:
    document = json.loads(json.dumps(manifest(kind)))
    *parents, last = path
    place = document
    for name in parents:
        place = place[name]
    place[last] = value
    assert any(says in problem for problem in problems(document))


def test_the_cron_job_keeps_the_times_of_the_job_file() -> None:
    spec, job = manifest("CronJob")["spec"], load(ROOT / "jobs" / "rebuild.yaml")
    assert isinstance(job, RebuildJob) and job.schedule is not None
    stated = (spec["schedule"], spec["timeZone"], spec["startingDeadlineSeconds"])
    assert stated == (job.schedule.cron, job.schedule.time_zone, job.schedule.grace_s)
    assert spec["concurrencyPolicy"] == "Forbid"


def test_every_ray_that_is_started_asks_for_a_token() -> None:
    assert all(manifest(kind)["spec"]["authOptions"] == {"mode": "token"} for kind in ["RayCluster"])
    assert manifest("RayJob")["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    (submit,) = containers(manifest("CronJob"))
    (token,) = (v["valueFrom"]["secretKeyRef"] for v in submit["env"] if v["name"] == "RAY_AUTH_TOKEN")
    assert token["name"] == manifest("RayCluster")["metadata"]["name"]  # the operator names it so
    for line in re.findall(r"ulimit[^\n]*\n?[^\n]*", TEXTS["ray-cluster.yaml"]):
        assert "RAY_AUTH_MODE=token" in line
    assert "export RAY_AUTH_MODE=token" in TEXTS["slurm.sh"]
    assert not [name for name, text in TEXTS.items() if re.search(r"AUTH_MODE\W{1,10}disabled", text)]


def test_a_training_on_kubernetes_finds_the_cpus_and_gpus_that_it_asks_for() -> None:
    job_spec = manifest("RayJob")["spec"]
    (file,) = re.findall(r"/app/(\S+\.yaml)", job_spec["entrypoint"])
    job = load(ROOT / file)
    assert isinstance(job, PretrainJob)
    (group,) = job_spec["rayClusterSpec"]["workerGroupSpecs"]
    (worker,) = containers(group)
    have = {
        name: int(n) * group["replicas"] for name, n in worker["resources"]["limits"].items() if n.isdigit()
    }
    assert job.train.num_workers <= have["nvidia.com/gpu"]
    assert job.train.num_workers * job.train.cpus_per_worker <= have["cpu"]


def test_every_job_file_that_is_named_is_there() -> None:
    named = {name for text in TEXTS.values() for name in re.findall(r"jobs/[\w/-]+\.yaml", text)}
    assert {"jobs/rebuild.yaml", "jobs/recipes/xdecoder.yaml"} <= named
    for name in named - {f"jobs/deploy/{path.name}" for path in DEPLOY.iterdir()}:
        load(ROOT / name)


# ------------------------------------------------------------------------------- launcher, Slurm, systemd


def test_the_launchers_own_schema_takes_the_cluster_file() -> None:
    published = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    document = yaml.safe_load(TEXTS["ray-cluster.yaml"])
    jsonschema.validate(document, published)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"setup_command": []}, published)
    for command in document["head_start_ray_commands"] + document["worker_start_ray_commands"]:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def options(*command: str) -> set[str]:
    """The long options that a ray command knows."""
    help_text = CliRunner().invoke(scripts.cli, [*command, "--help"]).output
    return set(re.findall(r"--[a-z][a-z-]+", help_text))


def used(command: str, text: str) -> set[str]:
    """The long options with which a command is called; a call ends with its line or at a lone `--`."""
    text = text.replace("\\\n", " ")
    calls = re.findall(rf"^[^#\n]*\b{command}\b([^\n]*)", text, re.MULTILINE)
    assert calls, f"{command} is not called"
    return {option for call in calls for option in re.findall(r"--[a-z][a-z-]+", call.split(" -- ")[0])}


def test_ray_knows_every_option_that_is_used() -> None:
    document = yaml.safe_load(TEXTS["ray-cluster.yaml"])
    starts = "\n".join(document["head_start_ray_commands"] + document["worker_start_ray_commands"])
    assert used("ray start", starts) <= options("start")
    # symmetric-run hands on what it does not know
    assert used("ray symmetric-run", TEXTS["slurm.sh"]) <= options("symmetric-run") | options("start")
    (submit,) = containers(manifest("CronJob"))
    assert used("ray job submit", shlex.join(submit["command"])) <= options("job", "submit")
    assert "--generate" in options("get-auth-token")


def test_the_slurm_script_is_a_script() -> None:
    assert os.access(DEPLOY / "slurm.sh", os.X_OK)
    checked = subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    # without a job file nothing starts
    asked = subprocess.run([DEPLOY / "slurm.sh"], capture_output=True, text=True)
    assert asked.returncode != 0 and "name a job file" in asked.stderr


def test_the_service_starts_the_scheduler_and_gives_it_time_to_stop() -> None:
    unit = configparser.ConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(TEXTS["xdecoder-schedule.service"])
    service = unit["Service"]
    words = shlex.split(service["ExecStart"])
    arguments = _parser().parse_args(_with_command(words[words.index("jobs") + 1 :]))
    assert [load(ROOT / file) for file in arguments.files]
    assert service["KillMode"] == "mixed" and float(service["TimeoutStopSec"]) > STOP_S
