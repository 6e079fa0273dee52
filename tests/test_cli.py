"""The door: every mistake a user can make is one clear message and a status, and nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from jobs.__main__ import main
from jobs.predict import parse_classes
from schemas.jobs import DemoConfig, load
from schemas.taxonomy import shipped

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "jobs"
Refusal = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    monkeypatch.setenv("XDECODER_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "store"


@pytest.fixture
def refusal(home: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs a command that must fail; returns its message."""

    def run(*arguments: str | Path) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("error: ") == 1 and "Traceback" not in captured.err
        assert not captured.out
        return captured.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nobody trained."""
    from tiny import MODEL, VOCABULARY, train_config

    from xdecoder.training import checkpoint
    from xdecoder.training.trainer import Trainer

    folder = tmp_path_factory.mktemp("run") / "model"
    checkpoint.export(Trainer(MODEL, train_config(), VOCABULARY), folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    Image.new("RGB", (64, 48), (90, 120, 60)).save(path)
    return path


# ------------------------------------------------------------------------------------------------ job files


def test_a_missing_job_file(refusal: Refusal) -> None:
    assert "no such job file" in refusal("jobs/nothing.yaml")


def test_a_mistyped_command_is_a_missing_job_file_that_names_the_commands(refusal: Refusal) -> None:
    message = refusal("datsets", "list")
    assert "no such job file" in message and "'datasets'" in message


def test_a_mistyped_key_names_the_nearest(refusal: Refusal, home: Path) -> None:
    assert "did you mean 'steps'?" in refusal(JOBS / "pretrain.yaml", "train.setps=5")
    assert not home.exists()


def test_a_dry_run_prints_the_resolved_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(JOBS / "pretrain.yaml"), "train.steps=5", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 5" in printed and "weight_decay: 0.05" in printed
    path = home.parent / "resolved.yaml"
    path.write_text(printed, encoding="utf-8")
    assert load(path) == load(JOBS / "pretrain.yaml", ["train.steps=5"])
    for figure in ("# parameters: ", "# multiply-adds: ", "# memory of a GPU, estimated: "):
        assert figure in printed
    assert not home.exists()


# ------------------------------------------------------------------------------------------------ data


def test_an_empty_corpus(refusal: Refusal, home: Path, tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "captions.tsv").write_text("image\tcaption\n", encoding="utf-8")
    job = tmp_path / "job.yaml"
    corpus = {"name": "mine", "format": "captions_table", "split": "train", "annotations": "captions.tsv"}
    corpora = [corpus | {"root": str(tmp_path)}]
    job.write_text(json.dumps({"kind": "rebuild", "dataset": "mine", "corpora": corpora}), encoding="utf-8")
    assert "captions.tsv" in refusal(job)
    assert not list((home / "datasets" / "mine").glob("versions/*"))


def test_a_corpus_that_is_not_there(refusal: Refusal, tmp_path: Path, ray_session: None) -> None:
    corpora = [{"name": "mine", "format": "coco_captions", "split": "train", "annotations": "no.json"}]
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps({"kind": "rebuild", "corpora": corpora}), encoding="utf-8")
    assert "no.json" in refusal(job)


@pytest.mark.parametrize("job", ["pretrain.yaml", "evaluate.yaml", "promote.yaml"])
def test_a_dataset_that_was_never_built(refusal: Refusal, home: Path, job: str) -> None:
    assert "jobs/rebuild.yaml" in refusal(JOBS / job)
    assert not (home / "runs").exists() and not (home / "evaluations").exists()


def test_datasets_of_an_empty_store(refusal: Refusal, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["datasets", "list"]) == 0
    assert "jobs/rebuild.yaml" in capsys.readouterr().out
    assert main(["datasets", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    for action in (["show"], ["verify"], ["rollback"], ["view"], ["diff", "a", "b"]):
        assert "demo" in refusal("datasets", *action)


def test_the_demo_command_writes_corpora(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = DemoConfig(train_scenes=2, val_scenes=1, train_pairs=2, val_pairs=1)
    monkeypatch.setattr("schemas.jobs.DemoConfig", lambda: small)
    assert main(["demo", str(tmp_path / "world"), "--json"]) == 0
    corpora = json.loads(capsys.readouterr().out)
    assert {corpus["format"] for corpus in corpora} >= {
        "coco_panoptic",
        "refcoco",
        "captions_table",
        "vqa_v2",
    }


# ------------------------------------------------------------------------------------------------ MLflow


def test_mlflow_that_does_not_answer(
    refusal: Refusal, home: Path, monkeypatch: pytest.MonkeyPatch, photo: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for command in (["models", "list"], ["predict", photo]):
        message = refusal(*command)
        assert "http://127.0.0.1:9" in message and "unset MLFLOW_TRACKING_URI" in message
    assert not home.exists()


def test_a_registry_without_models_or_champion(
    refusal: Refusal, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "list"]) == 0
    assert "jobs/pretrain.yaml" in capsys.readouterr().out
    assert "no champion yet" in refusal("models", "rollback")
    assert "no model 'demo'" in refusal("models", "promote", "1")
    assert "no model 'demo'" in refusal("predict", photo)


# ------------------------------------------------------------------------------------------------ prediction


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "panoptik"], "unknown task 'panoptik'; did you mean 'panoptic'?"),
        (["--classes", "red squar"], "did you mean 'red square'?"),
        (["--classes", "lava"], "write 'lava:thing' or 'lava:stuff'"),
        (["--task", "referring"], "needs a phrase: give it with --text"),
        (["--task", "vqa", "--text", " "], "needs a question"),
        (["--task", "retrieval"], "needs a text to rank by"),
        (["--zeroshot", "gamma=0.1"], "zeroshot settings are of the task 'semantic', not of 'panoptic'"),
        (["--task", "semantic", "--zeroshot", "gama=0.1"], "did you mean 'gamma'?"),
    ],
)
def test_what_cannot_be_asked(
    refusal: Refusal, tmp_path: Path, model: Path, photo: Path, arguments: list[str], says: str
) -> None:
    out = tmp_path / "out"
    assert says in refusal("predict", photo, "--folder", model, "--out", out, *arguments)
    assert not out.exists()


def test_every_class_of_a_shipped_taxonomy_can_be_named() -> None:
    known = shipped("ade847")
    assert parse_classes("; ".join(known.names), known) == known.model_copy(update={"name": "prediction"})
    only = parse_classes("painting, picture;", known)
    assert only is not None and only.names == ("painting, picture",)
    new = parse_classes("wall; zebra, striped horse:thing", known)
    assert new is not None and [(c.name, c.isthing) for c in new.categories] == [
        ("wall", False),
        ("zebra, striped horse", True),
    ]
    with pytest.raises(
        ValueError, match="class 'painting' is not.*several names: write 'painting, picture;'"
    ):
        parse_classes("painting, picture", known)


def test_pictures_that_cannot_be_read(refusal: Refusal, tmp_path: Path, model: Path) -> None:
    assert "missing.jpg: no such picture" in refusal("predict", "missing.jpg", "--folder", model)
    (tmp_path / "text.jpg").write_text("no picture", encoding="utf-8")
    assert "cannot be read as a picture" in refusal("predict", tmp_path / "text.jpg", "--folder", model)
    assert "holds no model" in refusal("predict", "missing.jpg", "--folder", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["--task", "panoptic"], {"photo-panoptic.json", "photo-panoptic.png"}),
        (
            ["--task", "semantic", "--classes", "grass, lava:stuff"],
            {"photo-semantic.json", "photo-semantic.png"},
        ),
        (["--task", "instance", "--classes", "red square"], {"photo-instance.json", "photo-instance.png"}),
        (
            ["--task", "semantic", "--classes", "grass; lava, molten rock:stuff"],
            {"photo-semantic.json", "photo-semantic.png"},
        ),
        (["--task", "referring", "--text", "the circle"], {"photo-referring.json", "photo-referring.png"}),
        (["--task", "captioning"], {"photo-captioning.json", "photo-captioning.png"}),
        (["--task", "captioning", "--beams", "2"], {"photo-captioning.json", "photo-captioning.png"}),
        (["--task", "vqa", "--text", "how many?"], {"photo-vqa-1.json", "photo-vqa-1.png"}),
        (["--task", "retrieval", "--text", "grass"], {"retrieval.json"}),
    ],
)
def test_every_task_answers_with_pictures_and_json(
    home: Path,
    tmp_path: Path,
    model: Path,
    photo: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    written: set[str],
) -> None:
    out = tmp_path / "out"
    assert main(["predict", str(photo), "--folder", str(model), "--out", str(out), "--json", *arguments]) == 0
    assert {path.name for path in out.iterdir()} == written
    (document,) = json.loads(capsys.readouterr().out)
    assert {"name", *json.loads((out / min(written)).read_text(encoding="utf-8"))} == set(document)
    assert all(Image.open(out / name).size[0] >= 64 for name in written if name.endswith(".png"))


def test_zero_shot_settings_tell_classes_that_had_no_mask(
    home: Path, tmp_path: Path, model: Path, photo: Path
) -> None:
    """Calibration at its most leaves nothing to classes that the training had."""
    from tiny import TAXONOMY

    found = {}
    known = ", ".join(TAXONOMY.names)
    for gamma in ("0", "1"):
        out = tmp_path / gamma
        arguments = [
            "--task",
            "semantic",
            "--classes",
            f"{known}, lava:stuff",
            "--zeroshot",
            f"gamma={gamma}",
        ]
        assert main(["predict", str(photo), "--folder", str(model), "--out", str(out), *arguments]) == 0
        document = json.loads((out / "photo-semantic.json").read_text(encoding="utf-8"))
        found[gamma] = {entry["category"] for entry in document["classes"]}
    assert found["0"] & set(TAXONOMY.names) and found["1"] == {"lava"}


def test_pictures_of_one_name_do_not_overwrite_each_other(
    home: Path, tmp_path: Path, model: Path, photo: Path
) -> None:
    twin = tmp_path / "twin" / "photo.jpg"
    twin.parent.mkdir()
    twin.write_bytes(photo.read_bytes())
    out = tmp_path / "out"
    assert main(["predict", str(photo), str(twin), "--folder", str(model), "--out", str(out)]) == 0
    assert {path.stem for path in out.iterdir()} == {"photo-panoptic", "photo-panoptic-2"}
