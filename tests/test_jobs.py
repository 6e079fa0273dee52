"""Job files: those that ship load, those that are wrong are refused with the place and the nearest key."""

import json
import os
from pathlib import Path

import pytest
import yaml

from jobs import store
from schemas.jobs import JobFileError, PretrainJob, RebuildJob, json_schema, load

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted([*(ROOT / "jobs").glob("*.yaml"), *(ROOT / "jobs" / "recipes").glob("*.yaml")])
PRETRAIN = ROOT / "jobs" / "pretrain.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_files_load_and_can_be_executed(path: Path) -> None:
    load(path)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env -S python -m jobs\n")
    assert os.access(path, os.X_OK)


def test_the_four_jobs_speak_of_the_same_dataset_model_and_measurement() -> None:
    rebuild, pretrain, evaluate, promote = (
        load(ROOT / "jobs" / f"{kind}.yaml") for kind in ("rebuild", "pretrain", "evaluate", "promote")
    )
    assert rebuild.dataset == pretrain.dataset.name == evaluate.dataset.name == promote.dataset.name  # type: ignore[union-attr]
    assert pretrain.registered_model == evaluate.registered_model == promote.registered_model  # type: ignore[union-attr]
    assert pretrain.evaluate == evaluate.evaluate == promote.evaluate  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.step=50", "train.step: unknown key; did you mean 'steps'?"),
        ("trian.steps=50", "trian: unknown key; did you mean 'train'?"),
        ("train.optim.learning_rate=1", "train.optim.learning_rate: unknown key"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.steps=0", "train.steps: Input should be greater than 0"),
        ("train.optim.lr=.nan", "train.optim.lr"),
        ("train.precision=fp8", "train.precision: Input should be 'fp32' or 'bf16'"),
        ("train.tasks=[panoptik]", "train.tasks"),
        ("train.tasks=[]", "tasks is empty"),
        ("train.num_workers=3", "cannot be divided by 3 workers"),
        ("train.task_sampling=[0.5, 0.5, 0.5]", "must sum to 1"),
        ("model.heads=7", "cannot be divided by heads 7"),
        ("model.width=[1]", "model.width"),
        ("model.mask_pooling=false", "region_ce needs model.mask_pooling=true"),
        ("train.loss.mask_focal=20", "mask_bce and mask_focal are alternatives"),
        ("train.loss.matching=fixed", "leave instance and panoptic out"),
        ("model.output=pixels", "train.tasks: this model (model.output 'pixels'"),
        ("model.text=null", "text: null needs classes"),
        ("model.prompts=[a photo]", "must hold {} once"),
        ("kind=pretrian", "did you mean 'pretrain'?"),
        ("name=a/b", "name: String should match pattern"),
        ("train.steps", "write it as a.b=value"),
        ("train.steps={", "not valid YAML"),
        ("train.steps.more=1", "steps is a value, not a section"),
    ],
)
def test_wrong_values_are_refused_with_their_place(override: str, says: str) -> None:
    with pytest.raises(JobFileError) as refused:
        load(PRETRAIN, [override])
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("zegformer", ["evaluate.zeroshot.encoder=''"], "no image embedding of its own; name a CLIP"),
        (
            "per_pixel",
            ["evaluate.zeroshot.regions=crop"],
            "needs model.output masks and classes told by names",
        ),
        ("maskformer_swin_l", ["train.loss.matching=fixed"], "a latent for each of model.classes 150"),
        ("mask2former", ["train.tasks=[panoptic, referring]"], "cannot do ['referring']"),
        ("zegformer", ["evaluate.tasks=[captioning]"], "cannot do ['captioning']"),
        ("oneformer", ["train.tasks=[panoptic, referring]"], "closed class list) cannot do ['referring']"),
        ("per_pixel", ["train.tasks=[panoptic]"], "cannot do ['panoptic']"),
    ],
)
def test_what_the_parts_of_a_recipe_cannot_do_is_refused(
    recipe: str, overrides: list[str], says: str
) -> None:
    with pytest.raises(JobFileError) as refused:
        load(ROOT / "jobs" / "recipes" / f"{recipe}.yaml", overrides)
    assert says in str(refused.value)


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(JobFileError, match="2 problem") as refused:
        load(PRETRAIN, ["train.stepz=1", "model.width=x"])
    assert "train.stepz" in str(refused.value) and "model.width" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "a job file is a mapping, this is list"),
        ("kind: [", "not valid YAML"),
        ("kind: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("kind: rebuild\n", "nothing to build"),
        ("extends: missing.yaml\n", "no such job file"),
        ("extends: job.yaml\n", "extends itself"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(JobFileError) as refused:
        load(path)
    assert says in str(refused.value)


def test_an_extending_file_states_the_differences(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: {PRETRAIN}\ntrain: {{optim: {{lr: 0.5}}}}\nname: mine\n", encoding="utf-8")
    base, mine = load(PRETRAIN), load(path)
    assert isinstance(base, PretrainJob) and isinstance(mine, PretrainJob)
    assert mine.train.optim.lr == 0.5 and mine.name == "mine"
    assert mine.train.optim.warmup_steps == base.train.optim.warmup_steps
    assert mine.model == base.model


def test_overrides_win_and_are_yaml() -> None:
    job = load(PRETRAIN, ["train.steps=7", "train.tasks=[panoptic, vqa]", "model.task_tokens=false"])
    assert isinstance(job, PretrainJob)
    assert job.train.steps == 7
    assert job.train.tasks == ("panoptic", "vqa")
    assert job.model.task_tokens is False


def test_a_resolved_file_is_a_job_file_again(tmp_path: Path) -> None:
    job = load(PRETRAIN, ["train.steps=7"])
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    assert load(path) == job


def test_the_schema_for_editors_knows_every_job() -> None:
    text = json.dumps(json_schema())
    assert all(kind in text for kind in ("RebuildJob", "PretrainJob", "EvaluateJob", "PromoteJob"))


def test_two_corpora_cannot_be_the_same() -> None:
    corpus = {"name": "a", "format": "refcoco", "split": "train", "annotations": "x.p"}
    with pytest.raises(ValueError, match="two corpora have the same name"):
        RebuildJob.model_validate({"kind": "rebuild", "corpora": [corpus, corpus]})


# ------------------------------------------------------------------------------------------------ the store


def test_the_store_is_absolute_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDECODER_STORE", raising=False)
    assert store.resolve("store") == tmp_path / "store"
    monkeypatch.setenv("XDECODER_STORE", str(tmp_path / "other"))
    assert store.resolve("store") == tmp_path / "other"


def test_an_uploaded_working_directory_is_no_place_for_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    uploaded.mkdir(parents=True)
    monkeypatch.chdir(uploaded)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDECODER_STORE", raising=False)
    assert store.resolve("store") == tmp_path / "home" / ".local" / "share" / "xdecoder" / "store"
    assert store.resolve(str(tmp_path / "kept")) == tmp_path / "kept"


def test_the_folder_of_a_store_at_a_uri_knows_the_other_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDECODER_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("XDECODER_STORE", f"file://{tmp_path}/far,%20away/")
    folder = store.resolve("store")
    assert folder.parent == tmp_path / "work"
    for path, there in ((folder, ""), (folder / "runs" / "a-1", "/runs/a-1")):
        assert store.remote(path).root == f"{tmp_path}/far, away{there}"  # type: ignore[union-attr]
    assert store.remote(tmp_path / "a, b" / "runs") is None
    monkeypatch.setenv("XDECODER_STORE", str(folder))
    assert store.resolve("store") == folder
    monkeypatch.setenv("XDECODER_STORE", "s3://key:secret@bucket/store")
    with pytest.raises(ValueError, match="holds no key"):
        store.resolve("store")


def test_a_replaced_document_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "state.json"
    store.write_json(path, {"a": 1})
    store.write_json(path, {"a": 2})
    assert store.read_json(path) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["state.json"]
    assert store.read_json(path.with_name("absent.json")) == {}


def test_a_digest_follows_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    first = store.digest_files(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = store.digest_files(tmp_path)
    (tmp_path / "b").write_bytes(b"2")
    assert len({first, renamed, store.digest_files(tmp_path)}) == 3
