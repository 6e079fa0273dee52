"""A training over several datasets: pinned, with the words of all, by way of a cache where one is named."""

import shutil
from itertools import islice
from pathlib import Path

import pytest
from test_foreign import tar

from jobs import mixing
from pipelines.catalog import Catalog, DatasetVersion
from schemas.jobs import JobFileError, PretrainJob, validate
from schemas.records import Sample
from schemas.taxonomy import Category, Taxonomy

MIXED = {
    "kind": "pretrain",
    "datasets": {"segmentation": [{"name": "demo", "weight": 3}, {"name": "more", "weight": 1}]},
}


def keys(samples: list[Sample], seeds: list[int]) -> list[str]:
    return [sample.key for sample in samples]


def job_of(**settings: object) -> PretrainJob:
    job = validate(MIXED | settings, "test")
    assert isinstance(job, PretrainJob)
    return job


def more(store: Path, demo: DatasetVersion, category: Category) -> DatasetVersion:
    """The demo's samples once again, as a dataset that has one class and one answer more."""
    catalog = Catalog(store, "more")
    shutil.copytree(demo.shards_root, catalog.shards_root, dirs_exist_ok=True)
    taxonomies = demo.card.taxonomies | {"more": Taxonomy(name="more", categories=(category,))}
    changed = {"dataset": "more", "version": "a" * 16, "taxonomies": taxonomies, "answers": ("perhaps",)}
    card = demo.card.model_copy(update=changed)
    catalog.publish(card, demo.manifest, demo.samples, demo.rejects)
    return catalog.open()


@pytest.fixture
def store(demo_dataset: DatasetVersion, tmp_path: Path) -> Path:
    shutil.copytree(demo_dataset.shards_root.parents[2], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_mixture_is_pinned_and_knows_the_words_of_all(store: Path) -> None:
    demo = Catalog(store, "demo").open()
    other = more(store, demo, Category(name="unicorn", isthing=True))
    job = mixing.pinned(job_of(), store)
    assert [ref.version for ref in job.datasets["segmentation"]] == [demo.id, other.id]
    whole = mixing.joined(job, store, demo)
    assert whole.taxonomy().names == (*demo.taxonomy().names, "unicorn")
    assert whole.card.answers == (*demo.card.answers, "perhaps")
    assert len(whole.samples) == 2 * len(demo.samples)
    assert mixing.joined(job_of(datasets={}), store, demo).taxonomy() == demo.taxonomy()


def test_a_class_of_two_kinds_is_refused(store: Path) -> None:
    demo = Catalog(store, "demo").open()
    thing = next(c for c in demo.taxonomy().categories if c.isthing)
    more(store, demo, thing.model_copy(update={"isthing": False}))
    with pytest.raises(ValueError, match=f"{thing.name!r} is a thing in one"):
        mixing.joined(job_of(), store, demo)


def test_each_stream_draws_from_its_own_datasets_through_the_cache(store: Path) -> None:
    demo = Catalog(store, "demo").open()
    other = more(store, demo, Category(name="unicorn", isthing=True))
    plain, cached = job_of(), job_of(train={"cache": str(store / "cache"), "cache_gb": 1})
    assert [(w.version.id, w.weight) for w in mixing.sources(plain, store, demo, "segmentation")] == [
        (demo.id, 3),
        (other.id, 1),
    ]
    assert [w.version.id for w in mixing.sources(plain, store, demo, "image_text")] == [demo.id]

    def drawn(job: PretrainJob) -> list[list[str]]:
        stream = mixing.open_stream(
            job, store, demo, "segmentation", rank=0, world_size=1, position=0, make_batch=keys
        )
        return [batch for batch, _ in islice(stream, 6)]

    assert drawn(plain) == drawn(cached)
    assert list((store / "cache").glob("*.tar"))
    with pytest.raises(ValueError, match="raise train.cache_gb"):
        mixing.sources(job_of(train={"cache": str(store), "cache_gb": 1e-9}), store, demo, "segmentation")


def test_tars_of_others_take_the_place_of_a_dataset(
    store: Path, demo_dataset: DatasetVersion, caplog: pytest.LogCaptureFixture
) -> None:
    tar(store / "theirs.tar", ["a", "b", "c"])
    job = job_of(train={"tars": {"image_text": "their*.tar"}, "batch": {"image_text": 2}})
    stream = mixing.open_stream(
        job, store, demo_dataset, "image_text", rank=0, world_size=1, position=4, make_batch=keys
    )
    assert {key for batch, _ in islice(stream, 3) for key in batch} == {"a", "b", "c"}
    assert "without an index" in caplog.text


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(JobFileError, match="only image_text"):
        job_of(train={"tars": {"segmentation": "*.tar"}})
    with pytest.raises(JobFileError, match="greater than 0"):
        job_of(datasets={"image_text": [{"name": "demo", "weight": 0}]})
    with pytest.raises(JobFileError, match="at least 1"):
        job_of(datasets={"image_text": []})
