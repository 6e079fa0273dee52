"""`make demo`: the README's story end to end, with the committed job files, in one Ray session.

corpora -> dataset version -> pretraining -> evaluation -> promotion by the rules -> pictures -> one table.
"""

import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from jobs import cluster, console, dispatch
from jobs.console import Outcome
from jobs.predict import Answer, Request, predict, write
from jobs.store import catalog_of, write_json
from jobs.tracking import connect
from pipelines.stream import read_samples
from schemas.jobs import PretrainJob, load
from schemas.records import Sample
from schemas.tasks import Stream, Task
from xdecoder.inference.predictor import Predictor

CHAPTERS = {
    "rebuild": "corpora -> dataset version",
    "pretrain": "pretraining",
    "evaluate": "evaluation of the registered model",
    "promote": "promotion by the rules",
}
GALLERY = 12  # pictures that the retrieval example ranks


def run(store: Path) -> None:
    """Everything, into `store`; the table goes to stdout and to `<store>/demo/results.json`."""
    started = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with cluster.session():
        for number, (name, title) in enumerate(CHAPTERS.items(), start=1):
            console.say(f"\n=== {number}/5 {title}: python -m jobs jobs/{name}.yaml")
            outcomes[name] = dispatch.run(load(_file(name)), store, f"jobs/{name}.yaml")
            if name != "evaluate":  # its table ends the story
                console.report(Outcome(facts=outcomes[name].facts), as_json=False)
    console.say("\n=== 5/5 predictions: python -m jobs predict IMAGE --task TASK")
    paths = _predictions(store)
    took = f"{console.duration(time.monotonic() - started)}, of which training "
    took += outcomes["pretrain"].facts["training took"]
    _end(store, outcomes["evaluate"].tables["results"], paths, took)


def _end(store: Path, results: list[dict[str, Any]], paths: list[Path], took: str) -> None:
    path = store / "demo" / "results.json"
    write_json(path, results)
    mlflow = Path(sys.executable).parent / "mlflow"
    console.say(f"\n{console.table(results)}")
    console.say("\npictures\n" + "\n".join(f"  {p}" for p in paths if p.suffix == ".png"))
    console.say(f"\nthe table as JSON     {path}")
    console.say(f"MLflow's pages        {mlflow} ui --backend-store-uri {connect(store).uri}")
    console.say(f"all this took         {took}")


def _file(name: str) -> Path:
    return Path(__file__).parent / f"{name}.yaml"


def _predictions(store: Path) -> list[Path]:
    """Every task asked once about held-out scenes, with the model that was just trained."""
    job = load(_file("pretrain"))
    assert isinstance(job, PretrainJob)
    tracker = connect(store)
    predictor = Predictor.load(
        tracker.fetch(tracker.version(job.registered_model, "latest"), store / "models")
    )
    scenes, pairs = (_samples(store, job, stream) for stream in ("segmentation", "image_text"))
    scene = next(sample for sample in scenes if sample.meta.referring)
    pair = next(sample for sample in pairs if sample.meta.questions)
    asked: list[tuple[Task, list[Sample], list[str]]] = [
        ("panoptic", [scene], []),
        ("semantic", [scene], []),
        ("instance", [scene], []),
        ("referring", [scene], [referring.sentences[0] for referring in scene.meta.referring]),
        ("captioning", [pair], []),
        ("vqa", [pair], [question.question for question in pair.meta.questions]),
        ("retrieval", pairs, [pairs[0].meta.captions[0]]),
    ]
    answers: list[Answer] = []
    for task, samples, texts in asked:
        images = tuple(sample.image for sample in samples)
        answers += predict(predictor, Request(images=images, task=task, texts=tuple(texts)))
    return write(answers, store / "demo" / "pictures")


def _samples(store: Path, job: PretrainJob, stream: Stream) -> list[Sample]:
    """The first held-out samples of a stream."""
    data = catalog_of(store, job.dataset.name).open(job.dataset.version)
    return list(islice(read_samples(data, split="val", stream=stream), GALLERY))
