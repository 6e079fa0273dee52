"""The cluster files: Kubernetes, KubeRay and Ray would take them; what they call, and their page says, holds.

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
import torch
import yaml
from click.testing import CliRunner
from ray.runtime_env import RuntimeEnv
from ray.scripts import scripts

from jobs.__main__ import _parser, _with_command
from jobs.schedule import STOP_S
from schemas.jobs import PretrainJob, RebuildJob, load
from xdecoder.model import size
from xdecoder.model.files import unfetched
from xdecoder.model.xdecoder import XDecoder

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


@pytest.mark.parametrize("document", MANIFESTS, ids=lambda document: str(document["kind"]))
def test_the_published_schema_takes_it(document: dict[str, Any]) -> None:
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
    cpus, gpus = (
        int(worker["resources"]["limits"][name]) * group["replicas"] for name in ("cpu", "nvidia.com/gpu")
    )
    assert job.train.num_workers <= gpus
    assert job.train.num_workers * job.train.cpus_per_worker <= cpus


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


# ------------------------------------------------------------------------------------- the page for clusters

PAGE = TEXTS["README.md"]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def snippets(folder: Path) -> list[PretrainJob]:
    """The job files that the page shows."""
    jobs = []
    for text in (text for language, text in BLOCKS if language == "yaml"):
        path = folder / "snippet.yaml"
        path.write_text(text.replace("extends: ", f"extends: {ROOT}/"), encoding="utf-8")
        job = load(path)
        assert isinstance(job, PretrainJob)
        jobs.append(job)
    return jobs


def row(start: str) -> list[str]:
    """The cells of the one row of the page's tables that starts so."""
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_page_names_all_files_and_no_others() -> None:
    named = set(re.findall(r"^\| `([\w.-]+)` \|", PAGE, re.MULTILINE)) | {"README.md", "runtime-env.yaml"}
    assert named == set(TEXTS)


def test_what_is_to_be_set_for_8_64_and_512_gpus_can_be_set(tmp_path: Path) -> None:
    jobs = [job.train for job in snippets(tmp_path)]
    gpus = [train.num_workers for train in jobs]
    assert gpus == [8, 64, 512]
    shares = [
        f"{t.batch.segmentation // n}, {t.batch.image_text // n}" for t, n in zip(jobs, gpus, strict=True)
    ]
    assert shares == row("pictures, pairs a GPU")
    seen = [f"{train.steps * train.batch.segmentation:,}".replace(",", " ") for train in jobs]
    assert seen == row("pictures seen")
    paper = load(ROOT / "jobs" / "recipes" / "xdecoder.yaml")
    assert isinstance(paper, PretrainJob)
    for train in jobs:
        scale = train.batch.segmentation / paper.train.batch.segmentation
        assert train.optim.lr == pytest.approx(paper.train.optim.lr * scale**0.5, rel=0.02)


def test_memory_and_volumes_are_those_of_the_recipes(tmp_path: Path) -> None:
    """Of the memory one figure, as the others took the same way and a second each."""
    jobs = snippets(tmp_path)
    first = size.measure(jobs[0].model, jobs[0].train)
    assert row("memory of a GPU")[0] == f"{(first.weights_bytes + first.activations_bytes) / 2**30:.1f} GiB"
    for recipe in ("xdecoder", "xdecoder_focal_l", "mask2former"):
        job = load(ROOT / "jobs" / "recipes" / f"{recipe}.yaml")
        assert isinstance(job, PretrainJob)
        with torch.device("meta"):
            count = sum(p.numel() for p in XDecoder(unfetched(job.model)).parameters())
        (line,) = (line for line in PAGE.splitlines() if f"`recipes/{recipe}.yaml`" in line and "GB" in line)
        # gradients are sent twice, in parts: reduced, then gathered; AdamW keeps two moments of a weight
        volumes = [f"{count * factor / 1e9:.2f} GB" for factor in (8, 12, 4)]
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [f"{count / 1e6:.2f} M", *volumes]
    checkpoints = [-(-job.train.steps // job.train.checkpoint_every) for job in jobs]
    assert list(map(str, checkpoints)) == row("checkpoints of a training")
    assert [f"{n * first.total * 12 / 1e9:.0f} GB" for n in checkpoints] == row("written in all")
    assert row("kept at the end") == [f"{first.total * 28 / 1e9:.1f} GB"] * 3


def test_a_checkpoint_holds_twelve_bytes_a_parameter(tmp_path: Path) -> None:
    from tiny import VOCABULARY, model, samples, train_config

    from xdecoder.training import checkpoint
    from xdecoder.training.trainer import Trainer

    config = model(width=128, ffn=1024).config
    trainer = Trainer(config, train_config(), VOCABULARY)
    batches = [trainer.make_batch(stream)(samples(4), list(range(4))) for stream in trainer.streams]
    trainer.train_step(tuple(batches))
    checkpoint.save(trainer, tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    parameters = sum(p.numel() for p in trainer.model.parameters())
    assert written == pytest.approx(12 * parameters, rel=0.05)


def test_ray_takes_what_is_typed_to_submit() -> None:
    lines = [
        line.partition("  #")[0]
        for language, text in BLOCKS
        if language == "sh"
        for line in text.splitlines()
    ]
    typed = "\n".join(lines)
    assert used("ray job submit", typed) <= options("job", "submit")
    assert used("ray get-auth-token", typed) <= options("get-auth-token")
    for line in lines:
        if line.startswith("ray job submit"):
            load(ROOT / shlex.split(line)[-1])
    environment = yaml.safe_load(TEXTS["runtime-env.yaml"])
    assert RuntimeEnv(pip=environment["pip"])["pip"]["packages"] == environment["pip"]["packages"]
    assert set(environment) == {"working_dir", "pip"}
