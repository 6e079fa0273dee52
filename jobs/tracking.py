"""The one place that speaks to MLflow: runs with their metrics and files, the registry and its champion.

MLFLOW_TRACKING_URI names the server; without it the store holds an embedded SQLite one. Whatever MLflow
refuses leaves here as a `TrackingError`, one sentence. No call of this file belongs on a training thread.
"""

import functools
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlparse

# Before mlflow is imported. By default a server that is down holds every call for four minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

import mlflow  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models import Model, ModelSignature  # noqa: E402
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: E402
from mlflow.types import ColSpec, Schema  # noqa: E402

from jobs.journal import MetricRow  # noqa: E402
from jobs.store import remote  # noqa: E402

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])

CHAMPION = "champion"
PREVIOUS = "previous_champion"
PARAMS_PER_CALL = 100  # MLflow's limit of a batch
PARAM_LENGTH = 6000  # MLflow's limit of a value
# What a logged model needs beside MLflow; the versions at hand are written into it.
SERVED = ["torch", "torchvision", "timm", "open_clip_torch", "numpy", "scipy", "pillow", "pydantic", "pyyaml"]
SERVED += ["safetensors", "pyarrow", "pycocotools"]


class TrackingError(ValueError):
    """MLflow that cannot be reached, or something it does not have."""


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version of a registered model, with what is known about it."""

    model: str
    version: int
    run: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


def _explained(method: F) -> F:
    """MLflow's exceptions become one sentence that says which MLflow."""

    @functools.wraps(method)
    def wrapper(self: "Tracker", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except MlflowException as error:
            raise TrackingError(f"MLflow at {self.uri}: {_first_sentence(error)}") from error

    return wrapper  # type: ignore[return-value]


class Tracker:
    """MLflow at one address."""

    def __init__(self, uri: str, artifacts: str | None) -> None:
        self.uri, self.artifacts = uri, artifacts
        said = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(uri)
        if said is None:  # MLflow writes the variable: the next store would be taken for this one
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        self.client = mlflow.MlflowClient(uri)

    @_explained
    def reach(self) -> None:
        """Ask for the smallest thing there is."""
        self.client.search_experiments(max_results=1)

    # -------------------------------------------------------------------------------------------- runs

    @_explained
    def start(self, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Begin a run and return its id. Nested parameters become dotted ones."""
        known = self.client.get_experiment_by_name(experiment)
        home = known.experiment_id if known else self.client.create_experiment(experiment, self.artifacts)
        run = self.client.create_run(home, run_name=name, tags=dict(tags)).info.run_id
        flat = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in _flatten(params)]
        for start in range(0, len(flat), PARAMS_PER_CALL):
            self.client.log_batch(run, params=flat[start : start + PARAMS_PER_CALL])
        return str(run)

    def resume(self, run: str) -> bool:
        """Reopen a run; false where this MLflow does not have it."""
        try:
            self.client.update_run(run, status="RUNNING")
        except MlflowException as error:
            log.warning("run %s cannot be continued, a new one begins: %s", run, _first_sentence(error))
            return False
        return True

    @_explained
    def log_dataset(
        self, run: str, *, name: str, version: str, profile: Mapping[str, Any], context: str = "training"
    ) -> None:
        """Enter a dataset version as the run's input; `profile` is its counts."""
        dataset = Dataset(
            name=name,
            digest=version,
            source_type="local",
            source=json.dumps({"uri": f"{name}@{version}"}),
            profile=json.dumps(dict(profile), default=str),
        )
        tags = [InputTag("mlflow.data.context", context)]
        self.client.log_inputs(run, datasets=[DatasetInput(dataset, tags)])

    @_explained
    def log_metrics(self, run: str, rows: Sequence[MetricRow]) -> None:
        """Log rows of metrics in one call a row."""
        for row in rows:
            stamp = int(row.time * 1000)
            metrics = [Metric(name, value, stamp, row.step) for name, value in row.metrics.items()]
            self.client.log_batch(run, metrics=metrics)

    @_explained
    def log_files(self, run: str, folder: Path, name: str) -> None:
        """Store the files under a folder with the run, as the folder `name`."""
        self.client.log_artifacts(run, str(folder), artifact_path=name)

    @_explained
    def log_file(self, run: str, path: Path) -> None:
        """Store one file with the run."""
        self.client.log_artifact(run, str(path))

    @_explained
    def end(self, run: str) -> None:
        """Mark a run as finished."""
        self.client.set_terminated(run, "FINISHED")

    @contextmanager
    def running(self, run: str) -> Iterator[None]:
        """The run ends with the block, finished or failed; meanwhile it samples the load of this machine."""
        monitor = SystemMetricsMonitor(run, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        status = "FAILED"
        try:
            yield
            status = "FINISHED"
        finally:
            monitor.finish()
            self._end(run, status)

    def _end(self, run: str, status: str) -> None:
        try:
            self.client.set_terminated(run, status)
        except MlflowException as error:  # must not hide why the block ended
            log.warning("run %s could not be marked as %s: %s", run, status, _first_sentence(error))

    # -------------------------------------------------------------------------------------------- registry

    @_explained
    def register(self, run: str, model: str, folder: Path, tags: Mapping[str, str]) -> ModelVersion:
        """Log an exported model with the run, in the pyfunc flavour, and make it the model's next version.

        The model carries our code and no pickle: it is loaded by `jobs.serving` from the files of `folder`.
        """
        root = Path(__file__).resolve().parents[1]
        with mlflow.start_run(run_id=run), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it asks for an example; the signature says enough
            logged = mlflow.pyfunc.log_model(
                name="model",
                loader_module="jobs.serving",
                data_path=str(folder),
                code_paths=[str(root / package) for package in ("schemas", "xdecoder", "jobs")],
                signature=_signature(),
                pip_requirements=[f"{name}=={installed(name).partition('+')[0]}" for name in SERVED],
            )
        if not self.client.search_registered_models(f"name='{model}'"):
            self.client.create_registered_model(model)
        made = self.client.create_model_version(
            model, logged.model_uri, run_id=run, tags=dict(tags), model_id=logged.model_id
        )
        return self.version(model, made.version)

    @_explained
    def versions(self, model: str | None = None) -> tuple[ModelVersion, ...]:
        """All versions of one model, or of all, newest last."""
        found = []
        for entry in self.client.search_registered_models(f"name='{model}'" if model else None):
            aliases = dict(entry.aliases)
            for version in self.client.search_model_versions(f"name='{entry.name}'"):
                found.append(
                    _model_version(version, [a for a, v in aliases.items() if int(v) == int(version.version)])
                )
        return tuple(sorted(found, key=lambda v: (v.model, v.version)))

    def version(self, model: str, which: str | int) -> ModelVersion:
        """A version by number, by alias, or the 'latest'. Raises `TrackingError` naming those that exist."""
        known = self.versions(model)
        if not known:
            raise TrackingError(
                f"no model {model!r} at {self.uri}; train one: python -m jobs jobs/pretrain.yaml"
            )
        if which == "latest":
            return known[-1]
        for version in known:
            if str(which) == str(version.version) or which in version.aliases:
                return version
        choices = [str(v.version) for v in known] + sorted(a for v in known for a in v.aliases)
        hint = "; promote one: python -m jobs jobs/promote.yaml" if which == CHAMPION else ""
        raise TrackingError(
            f"model {model!r} has no version {which!r}; choose 'latest' or one of {choices}{hint}"
        )

    @_explained
    def champion(self, model: str) -> ModelVersion | None:
        """The version that holds the alias `champion`, or None while there is none."""
        try:
            holder = self.client.get_model_version_by_alias(model, CHAMPION)
        except MlflowException as error:
            # MLflow 3.17 answers a missing alias with INVALID_PARAMETER_VALUE, a missing model with the other
            if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
                return None
            raise
        return self.version(model, holder.version)

    @_explained
    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_model_version_tag(version.model, str(version.version), key, value)

    @_explained
    def crown(self, version: ModelVersion) -> ModelVersion | None:
        """Move the alias `champion` to this version and return the one that held it.

        The version remembers it for `rollback`. MLflow has no compare-and-swap: hold the promotion lock.
        """
        previous = self.champion(version.model)
        if previous is not None and previous.version != version.version:
            self.tag(version, {PREVIOUS: str(previous.version)})
        self.client.set_registered_model_alias(version.model, CHAMPION, str(version.version))
        return previous

    @_explained
    def rollback(self, model: str) -> tuple[ModelVersion, ModelVersion]:
        """Give `champion` back to the version that held it before; returns (deposed, restored)."""
        deposed = self.champion(model)
        if deposed is None:
            raise TrackingError(
                f"model {model!r} has no champion yet; promote one: python -m jobs jobs/promote.yaml"
            )
        if PREVIOUS not in deposed.tags:
            raise TrackingError(
                f"version {deposed.version} of model {model!r} is its first champion: nothing to go back to"
            )
        restored = self.version(model, deposed.tags[PREVIOUS])
        self.client.set_registered_model_alias(model, CHAMPION, str(restored.version))
        return deposed, restored

    @_explained
    def fetch(self, version: ModelVersion, cache: Path) -> Path:
        """The exported model of a version: where it lies, if on this disk, else copied into `cache`."""
        home = urlparse(self.client.get_model_version_download_uri(version.model, str(version.version)))
        if home.scheme in ("", "file"):
            folder = Path(unquote(home.path))
        else:
            folder = cache / f"{version.model}-{version.run}-{version.version}"
            if not folder.is_dir():
                _download(f"models:/{version.model}/{version.version}", folder)
        data = Model.load(str(folder)).flavors["python_function"]["data"]
        return folder / data


def connect(store: Path) -> Tracker:
    """MLflow at MLFLOW_TRACKING_URI, else inside the store. Raises `TrackingError` where none answers."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        tracker = Tracker(uri, artifacts=None)
    else:
        store.mkdir(parents=True, exist_ok=True)
        if remote(store):
            log.warning("runs and models stay on this machine; MLFLOW_TRACKING_URI names a server for all")
        tracker = Tracker(f"sqlite:///{store / 'mlflow.db'}", artifacts=(store / "mlartifacts").as_uri())
    try:
        tracker.reach()
    except TrackingError as error:
        hint = (
            "start that server, or unset MLFLOW_TRACKING_URI to use the one inside the store"
            if uri
            else "see above"
        )
        raise TrackingError(f"{error}\nNothing was started; {hint}") from error
    return tracker


def _model_version(version: Any, aliases: Sequence[str]) -> ModelVersion:
    return ModelVersion(
        model=version.name,
        version=int(version.version),
        run=version.run_id,
        aliases=tuple(sorted(aliases)),
        tags=dict(version.tags),
    )


def _flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_sentence(error: MlflowException) -> str:
    """The start of MLflow's message; what follows is a chain of wrapped exceptions."""
    text = " ".join(str(error.message).split())
    return re.split(r" \(Caused by|\(Background on", text)[0][:300]


def _signature() -> ModelSignature:
    text = functools.partial(ColSpec, "string")
    optional = [text(name, required=False) for name in ("text", "classes")]
    return ModelSignature(inputs=Schema([text("image"), text("task"), *optional]), outputs=Schema([text()]))


def _download(uri: str, folder: Path) -> None:
    """Copy artifacts into a folder that exists only when it is complete."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True, exist_ok=True)
    mlflow.artifacts.download_artifacts(uri, dst_path=str(unfinished))
    unfinished.rename(folder)
