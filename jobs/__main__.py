"""The door: `python -m jobs`. It reads the command line, calls, prints; nothing is decided here.

    python -m jobs FILE.yaml [a.b=value ...] [--dry-run]   run a job file, as `ray job submit FILE.yaml` does
    python -m jobs schedule [FILE.yaml ...] [--list]       run job files when their `schedule` says
    python -m jobs demo DIR | datasets ... | models ... | predict ... | import CHECKPOINT | story

What a user can mend is one message on stderr and exit status 2; XDECODER_TRACEBACK=1 shows where it came
from. A promotion that was required and refused is status 1, what another process is already at is 75.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs import cluster, console, dispatch, locks, store
from schemas.jobs import AnyJob, EvaluateJob, PretrainJob, load
from schemas.tasks import TASKS

Commands = Any  # argparse does not name the type of its subparsers
RAW = argparse.RawDescriptionHelpFormatter
# Ray, torch and MLflow are imported by the commands that need them, so that a wrong file is refused at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    console.configure()
    cluster.prepare()
    arguments = _parser().parse_args(_with_command(list(sys.argv[1:] if argv is None else argv)))
    try:
        status: int = arguments.command(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("XDECODER_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status if isinstance(error, locks.Busy) else 2
    return status


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.file.is_file():
        raise ValueError(f"{arguments.file}: no such job file; other commands are {list(COMMANDS[1:])}")
    job = load(arguments.file, arguments.overrides)
    if arguments.dry_run:
        console.say("\n".join([_resolved(job), *_size(job)]))
        return 0
    outcome = dispatch.run(job, store.resolve(job.store), str(arguments.file))
    console.report(outcome, as_json=arguments.json)
    return 1 if outcome.refused else 0


def _schedule(arguments: argparse.Namespace) -> int:
    from jobs import schedule

    root = store.resolve(arguments.store)
    if arguments.list:
        empty = f"no schedule in {root}; start one: python -m jobs schedule jobs/rebuild.yaml"
        console.show(schedule.listing(root), as_json=arguments.json, empty=empty)
    else:
        schedule.serve(root, arguments.files)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from pipelines import demo
    from schemas.jobs import DemoConfig

    corpora = demo.write(DemoConfig(), arguments.folder.resolve())
    rows = [{"corpus": c.name, "format": c.format, "split": c.split, "root": c.root} for c in corpora]
    console.show(rows, as_json=arguments.json)
    return 0


def _story(arguments: argparse.Namespace) -> int:
    from jobs import story

    story.run(store.resolve(arguments.store))
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from jobs.predict import Request, predict, write
    from jobs.tracking import connect
    from xdecoder.inference.predictor import Predictor

    settings = [f"evaluate.zeroshot.{setting}" for setting in arguments.zeroshot]
    asked = load(Path(__file__).with_name("evaluate.yaml"), settings)
    assert isinstance(asked, EvaluateJob)
    folder = arguments.folder
    if folder is None:
        root = store.resolve(arguments.store)
        tracker = connect(root)
        folder = tracker.fetch(tracker.version(arguments.model, arguments.version), root / "models")
    request = Request(
        images=tuple(arguments.images),
        task=arguments.task,
        texts=tuple(arguments.text),
        classes=arguments.classes,
        beams=arguments.beams,
        zeroshot=asked.evaluate.zeroshot,
    )
    answers = predict(Predictor.load(folder), request)
    paths = write(answers, arguments.out)
    if arguments.json:
        console.dump([{"name": answer.name, **answer.document} for answer in answers])
    else:
        console.say("\n".join(map(str, paths)))
    return 0


def _datasets(arguments: argparse.Namespace) -> int:
    from jobs import datasets

    root, name = store.resolve(arguments.store), arguments.dataset
    match arguments.action:
        case "list":
            empty = f"no datasets in {root}; build one: python -m jobs jobs/rebuild.yaml"
            console.show(datasets.listing(root), as_json=arguments.json, empty=empty)
            return 0
        case "show":
            outcome = datasets.show(root, name, arguments.version)
        case "verify":
            outcome = datasets.verify(root, name, arguments.version)
        case "diff":
            outcome = datasets.diff(root, name, arguments.before, arguments.after)
        case "rollback":
            outcome = datasets.rollback(root, name)
        case "view":
            outcome = datasets.view(root, name, arguments.version, arguments.out, arguments.limit)
        case "export":
            outcome = datasets.export(root, name, arguments.version, arguments.folder)
        case "prune":
            outcome = datasets.prune(root, name, arguments.keep, yes=arguments.yes)
    console.report(outcome, as_json=arguments.json)
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from jobs import models

    root = store.resolve(arguments.store)
    match arguments.action:
        case "list":
            empty = "no models yet; train one: python -m jobs jobs/pretrain.yaml"
            console.show(models.listing(root, arguments.model), as_json=arguments.json, empty=empty)
            return 0
        case "promote":
            outcome = models.promote(root, arguments.model, arguments.version)
        case "rollback":
            outcome = models.rollback(root, arguments.model)
    console.report(outcome, as_json=arguments.json)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from jobs.adopt import adopt

    outcome = adopt(
        arguments.checkpoint,
        arguments.out or Path(arguments.checkpoint.stem),
        heads=arguments.heads,
        text_heads=arguments.text_heads,
        registered_model=arguments.model,
        store=store.resolve(arguments.store),
    )
    console.report(outcome, as_json=arguments.json)
    return 0


def _resolved(job: AnyJob) -> str:
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, default_flow_style=None).rstrip()


def _size(job: AnyJob) -> list[str]:
    """What a training would need, as comments behind its file; other jobs make no model."""
    if not isinstance(job, PretrainJob):
        return []
    from xdecoder.model import size

    return size.lines(size.measure(job.model, job.train))


COMMANDS = ("run", "schedule", "demo", "datasets", "models", "predict", "import", "story")


def _with_command(argv: list[str]) -> list[str]:
    """`FILE ...` is short for `run FILE ...`."""
    return argv if not argv or argv[0] in COMMANDS or argv[0].startswith("-") else ["run", *argv]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs", description=__doc__, formatter_class=RAW)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "run", _run, "run a job file; the word 'run' may be left out")
    command.add_argument("file", type=Path)
    command.add_argument("overrides", nargs="*", metavar="a.b=value")
    command.add_argument("--dry-run", action="store_true", help="print the resolved file and its size")

    command = _stored(_command(commands, "schedule", _schedule, "run job files when their schedule says"))
    command.add_argument("files", nargs="*", type=Path, metavar="FILE", help="by default those of last time")
    command.add_argument("--list", action="store_true", help="next runs and last results; starts nothing")

    command = _command(commands, "demo", _demo, "write the demo corpora in their public formats")
    command.add_argument("folder", type=Path, metavar="DIR")

    _add_datasets(commands)
    _add_models(commands)
    _add_predict(commands)
    _add_import(commands)

    _stored(_command(commands, "story", _story, "everything from corpora to a promoted model: `make demo`"))
    return parser


def _add_datasets(commands: Commands) -> None:
    parser = commands.add_parser("datasets", help="versions of the built datasets")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, does in {
        "list": "all versions of all datasets",
        "show": "the card of a version",
        "verify": "read every byte again",
        "diff": "which samples came, went and changed between two versions, and why",
        "rollback": "serve the version before the current one",
        "view": "write a contact sheet (HTML) and log it to MLflow",
        "export": "write a version in public forms (COCO, RefCOCO, VQA v2)",
        "prune": "remove versions and shards that nothing needs",
    }.items():
        action = _stored(_command(actions, name, _datasets, does))
        action.add_argument("--dataset", default="demo")
        if name == "export":
            action.add_argument("folder", type=Path, metavar="DIR")
        if name in ("show", "verify", "view", "export"):
            action.add_argument("version", nargs="?", default="current")
        if name == "diff":
            action.add_argument("before")
            action.add_argument("after", nargs="?", default="current")
        if name == "view":
            action.add_argument("--out", type=Path, default=Path("sheet.html"))
            action.add_argument("--limit", type=int, default=100, help="samples shown of a split and stream")
        if name == "prune":
            action.add_argument("--keep", type=int, default=3, help="so many of the newest stay in any case")
            action.add_argument("--yes", action="store_true", help="remove; without it they are only listed")


def _add_models(commands: Commands) -> None:
    parser = commands.add_parser("models", help="the registry")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _stored(_command(actions, "list", _models, "all versions")).add_argument("--model", default=None)
    action = _stored(_command(actions, "promote", _models, "make a version champion by hand, past the rules"))
    action.add_argument("version", help="a version number or 'latest'")
    action.add_argument("--model", default="demo")
    action = _stored(_command(actions, "rollback", _models, "give 'champion' back to the version before"))
    action.add_argument("--model", default="demo")


def _add_predict(commands: Commands) -> None:
    command = _stored(_command(commands, "predict", _predict, "ask a model about pictures"))
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument("--task", default="panoptic", help=", ".join(TASKS))
    command.add_argument(
        "--text", action="append", default=[], help="a phrase, question or text; may be repeated"
    )
    command.add_argument(
        "--classes",
        default="",
        help='"red circle, grass"; new ones as "lava:stuff"; '
        'with semicolons a class may have synonyms: "painting, picture; floor"',
    )
    command.add_argument("--beams", type=int, default=1, help="captions followed at a time; 1 is greedy")
    command.add_argument(
        "--zeroshot",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as evaluate.zeroshot of a job file, for --task semantic: gamma=0.1, regions=cropmask ...",
    )
    command.add_argument("--out", type=Path, default=Path("out"))
    command.add_argument("--model", default="demo")
    command.add_argument("--version", default="champion", help="a number, an alias or 'latest'")
    command.add_argument("--folder", help="an exported model, or its URI, instead of the registry's")


def _add_import(commands: Commands) -> None:
    command = _stored(_command(commands, "import", _import, "weights of the original X-Decoder into ours"))
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    command.add_argument("--out", type=Path, help="the model's folder; by default named after the checkpoint")
    command.add_argument("--model", help="register it under this name, too")
    command.add_argument("--heads", type=int, help="of attention, which no shape tells; 64 channels each")
    command.add_argument("--text-heads", type=int, help="of the text encoder, likewise")


def _command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int], does: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=does, description=does)
    command.set_defaults(command=function)
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _stored(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument(
        "--store", default="store", help="folder or URI of all state; XDECODER_STORE overrides it"
    )
    return command


if __name__ == "__main__":
    sys.exit(main())
