"""Laws of the catalog: a version is whole or absent, damage is noticed, and rolling back can be undone."""

import base64
import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import SMALL_SHARDS

from pipelines.build import build
from pipelines.catalog import Catalog, CatalogError, DatasetVersion, content_id
from pipelines.export import export
from pipelines.sheet import figure, write_sheet
from pipelines.stream import read_samples
from schemas.jobs import DemoConfig, RebuildJob, load
from schemas.records import MANIFEST, PARTS, REJECTS, SAMPLES, Question, Split
from schemas.tasks import Stream
from schemas.taxonomy import Category, Taxonomy


@pytest.fixture
def catalog(demo_dataset: DatasetVersion, tmp_path: Path) -> Catalog:
    """A catalog of one's own with the demo version in it."""
    shutil.copytree(demo_dataset.shards_root.parents[2], tmp_path / "store")
    return Catalog(tmp_path / "store", "demo")


def publish_changed(catalog: Catalog, answer: str) -> str:
    """Publish a version that differs from the current one in its answers, and forgets its first sample."""
    base = catalog.open()
    samples = base.samples.slice(1)
    card = base.card.model_copy(update={"answers": (answer,)})
    card = card.model_copy(update={"version": content_id(card, base.manifest, samples, base.rejects)})
    assert catalog.publish(card, base.manifest, samples, base.rejects)
    return card.version


def test_what_was_published_is_opened(catalog: Catalog, demo_dataset: DatasetVersion) -> None:
    assert catalog.versions() == (demo_dataset.id,)
    assert catalog.current() == demo_dataset.id
    for opened in (catalog.open(), catalog.open(demo_dataset.id)):
        assert opened.card == demo_dataset.card
        assert opened.samples.equals(demo_dataset.samples)
        assert opened.samples["key"].to_pylist() == sorted(opened.samples["key"].to_pylist())
    for split in get_args(Split):
        part, whole = catalog.open(split=split).samples, demo_dataset.samples
        assert {*SAMPLES.names} - {*part.column_names} == {f"{name}_hash" for name in PARTS}
        expected = whole.filter(pc.equal(whole["split"], split)).select(part.column_names)
        assert part.equals(expected) and len(expected)


def test_a_whole_version_verifies(demo_dataset: DatasetVersion) -> None:
    assert demo_dataset.verify() == sum(p.stat().st_size for p in demo_dataset.shards_root.glob("*.tar"))


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_flipped_bit_is_found_in_every_file(catalog: Catalog, place: float) -> None:
    version = catalog.open()
    shards = [catalog.shards_root / name for name in version.manifest["shard"].to_pylist()]
    for path in [shards[1], *catalog.files(version.id)]:
        whole = path.read_bytes()
        at = min(int(place * len(whole)), len(whole) - 1)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CatalogError, match=path.name):
            version.verify()
        path.write_bytes(whole)
    version.verify()


@pytest.mark.parametrize("column", ["offset", "size_bytes", "sha256"])
def test_a_sample_that_is_not_where_the_table_says_is_found(catalog: Catalog, column: str) -> None:
    """Though the table is the one that was published."""
    base = catalog.open()
    at, row = SAMPLES.get_field_index(column), base.samples.slice(3, 1).to_pylist()[0]
    values = base.samples[column].to_pylist()
    values[3] = values[3][::-1] if column == "sha256" else values[3] ^ 1
    samples = base.samples.set_column(at, SAMPLES.field(at), pa.array(values, SAMPLES.field(at).type))
    card = base.card.model_copy(
        update={"version": content_id(base.card, base.manifest, samples, base.rejects)}
    )
    catalog.publish(card, base.manifest, samples, base.rejects)
    with pytest.raises(CatalogError, match=rf"{row['shard']}: sample {row['key']} is not the \d+ bytes"):
        catalog.open().verify()


def test_a_file_that_nobody_wrote_is_found(catalog: Catalog) -> None:
    version = catalog.open()
    (version.folder / "more.parquet").write_bytes(b"")
    with pytest.raises(CatalogError, match=r"more\.parquet: not one of the files that were written"):
        version.verify()


def test_every_missing_shard_is_named(catalog: Catalog) -> None:
    names = catalog.open().manifest["shard"].to_pylist()[:2]
    for name in names:
        (catalog.shards_root / name).unlink()
    with pytest.raises(CatalogError, match=f"(?s){names[0]}.*{names[1]}"):
        catalog.open().verify()


def test_damage_is_told_where_nothing_can_be_written(catalog: Catalog) -> None:
    """Then what is remembered of the shards cannot be forgotten, and the message says what to do."""
    (shard, *_) = catalog.shards_root.glob("*.tar")
    shard.write_bytes(shard.read_bytes()[::-1])
    (catalog.cache / "inputs.json").unlink()
    (catalog.cache / "inputs.json").mkdir()
    with pytest.raises(
        CatalogError, match=f"(?s)delete {catalog.cache} and rebuild to repair it.*{shard.name}"
    ):
        catalog.open().verify()


def test_a_version_that_nobody_finished_is_none(catalog: Catalog) -> None:
    folder = catalog.open().folder
    shutil.copytree(folder, folder.with_name(".0123456789abcdef.tmp"))
    assert catalog.versions() == (folder.name,)


def test_tables_that_were_edited_are_found(demo_dataset: DatasetVersion) -> None:
    shorter = replace(demo_dataset, samples=demo_dataset.samples.slice(1))
    card = demo_dataset.card.model_copy(update={"answers": ("yes",)})
    for edited in (shorter, replace(demo_dataset, card=card)):
        with pytest.raises(CatalogError, match="not those that were published"):
            edited.verify()


def test_a_rollback_serves_the_version_before_and_can_be_undone(catalog: Catalog) -> None:
    old = catalog.current()
    new = publish_changed(catalog, "blue")
    assert catalog.versions() == (old, new)
    assert catalog.current() == new
    assert catalog.rollback() == old == catalog.current()
    assert catalog.rollback() == new == catalog.current()


def test_publishing_what_is_served_changes_nothing(catalog: Catalog) -> None:
    base = catalog.open()
    before = {p: p.stat().st_mtime_ns for p in catalog.root.rglob("*")}
    assert not catalog.publish(base.card, base.manifest, base.samples, base.rejects)
    assert {p: p.stat().st_mtime_ns for p in catalog.root.rglob("*")} == before


def test_a_diff_names_samples_and_shards(catalog: Catalog) -> None:
    base = catalog.open()
    new = publish_changed(catalog, "blue")
    diff = catalog.diff(base.id, "current")
    assert diff.keys("removed") == (base.samples["key"][0].as_py(),)
    assert diff.keys("added") == diff.keys("changed") == diff.shards_added == diff.shards_removed == ()
    assert catalog.diff(new, base.id).keys("added") == diff.keys("removed")


def test_pruning_keeps_what_is_needed(catalog: Catalog) -> None:
    """The served version, the one before it, what is needed outside, and what is open; shards with them."""
    versions = [str(catalog.current()), *(publish_changed(catalog, answer) for answer in "abcd")]
    unused = catalog.shards_root / "train-segmentation-0123456789abcdef.tar"
    unused.write_bytes(b"left by a version of long ago")
    opened = catalog.open(versions[1])
    rows = catalog.prunable({versions[0]: "model m version 1"}, keep=1)
    assert [row.version for row in rows] == versions
    assert [row.kept_because for row in rows] == [
        "model m version 1",
        "a process has it open",
        "",
        "rollback leads to it",
        "it is served",
    ]
    assert unused.exists() and catalog.versions() == tuple(versions), "asking must not remove anything"
    assert catalog.prune({versions[0]: "model m version 1"}, keep=1) == 29
    assert catalog.versions() == tuple(v for v in versions if v != versions[2]) and not unused.exists()
    opened.verify()
    del opened
    catalog.prune({}, keep=1)
    assert catalog.versions() == tuple(versions[-2:])
    assert catalog.rollback() == versions[-2]
    catalog.open().verify()


def test_what_is_absent_is_said_with_what_to_do(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="no dataset 'demo'.*rebuild"):
        Catalog(tmp_path / "elsewhere", "demo").open()
    with pytest.raises(CatalogError, match=f"no version 'latest'; it has .*{catalog.current()}"):
        catalog.open("latest")
    with pytest.raises(CatalogError, match="no previous version"):
        catalog.rollback()
    assert not (tmp_path / "elsewhere").exists(), "asking must not create anything"


@pytest.mark.parametrize("file", ["dataset.json", "samples.parquet", "../../current.json"])
def test_a_damaged_file_of_the_catalog_is_an_error_that_names_it(catalog: Catalog, file: str) -> None:
    path = (catalog.root / "versions" / str(catalog.current()) / file).resolve()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CatalogError, match=str(path if "current" in file else path.parent)):
        catalog.open()


@pytest.mark.parametrize(
    "old, new", [(b"copy_of", b"c\xffpy_of"), (b"copy_of", b"cope_of"), (b"demo", b"d\xffmo")]
)
def test_texts_and_names_that_changed_in_a_table_are_an_error_that_names_it(
    catalog: Catalog, old: bytes, new: bytes
) -> None:
    """Parquet reads them; "demo" is the beginning of keys."""
    path = catalog.root / "versions" / str(catalog.current()) / "samples.parquet"
    pq.write_table(pq.read_table(path), path, compression="none")
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(CatalogError, match=str(path)):
        catalog.open()


def test_a_half_published_version_is_no_version(catalog: Catalog) -> None:
    """What a build that was killed between its files leaves."""
    left = catalog.root / "versions" / ".0123456789abcdef.tmp"
    left.mkdir()
    shutil.copy(catalog.root / "versions" / str(catalog.current()) / "samples.parquet", left)
    assert catalog.versions() == (catalog.current(),)


def test_two_builds_of_a_dataset_do_not_overlap(catalog: Catalog) -> None:
    with catalog.building():
        with pytest.raises(CatalogError, match="being built by another process"), catalog.building():
            pass
        with Catalog(catalog.root.parents[1], "other").building():
            pass
    with catalog.building():
        pass


def test_classes_without_a_training_mask_are_unseen(demo_dataset: DatasetVersion) -> None:
    everything, seen = demo_dataset.taxonomy(), demo_dataset.taxonomy(seen_only=True)
    unseen = set(DemoConfig().unseen)
    assert unseen <= {c.name for c in everything.categories if not c.seen}
    assert not unseen & set(seen.names)
    trained = {
        segment.category
        for sample in read_samples(demo_dataset, split="train", stream="segmentation")
        for segment in sample.meta.segments or ()
    }
    assert set(seen.names) == trained


def test_the_taxonomies_of_several_corpora_are_joined_in_order(demo_dataset: DatasetVersion) -> None:
    cat, dog, sky = (Category(name=n, isthing=n != "sky", seen=n != "sky") for n in ("cat", "dog", "sky"))
    first = Taxonomy(name="a", categories=(dog, sky))
    second = Taxonomy(name="b", categories=(cat, dog, sky.model_copy(update={"seen": True})))
    card = demo_dataset.card.model_copy(update={"taxonomies": {"a": first, "b": second}})
    joined = replace(demo_dataset, card=card).taxonomy()
    assert joined.names == ("dog", "sky", "cat")
    assert joined.seen().names == joined.names
    with pytest.raises(CatalogError, match="no classes"):
        replace(demo_dataset, card=card.model_copy(update={"taxonomies": {}})).taxonomy()


def test_the_contact_sheet_shows_every_kind_of_annotation(
    demo_dataset: DatasetVersion, tmp_path: Path
) -> None:
    num_shown = write_sheet(demo_dataset, tmp_path / "sheet.html", limit=2)
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert num_shown == page.count("<figure ") == 8
    assert "refers: " in page and "caption: " in page and "data:image/png;base64" in page
    for name in ("split", "annotation", "class", "reject"):
        assert page.count(f"<select name='{name}'>") == 1 and page.count(f" data-{name}=") == 8


def test_the_contact_sheet_runs_its_own_script_and_nothing_else(
    demo_dataset: DatasetVersion, tmp_path: Path
) -> None:
    refused = {
        "corpus": "c",
        "record": "<b>1",
        "split": "val",
        "reason": "<script>x",
        "detail": "<img src=x>",
    }
    rejects = pa.Table.from_pylist([refused] * 30, schema=REJECTS)
    write_sheet(replace(demo_dataset, rejects=rejects), tmp_path / "sheet.html", limit=1)
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in page
    )
    assert not re.search(r"https?:|<img src=x|<link|<iframe| on\w+=", page.replace("http-equiv", ""))
    assert page.count("<figure class='reject'") == 20 and "&lt;img src=x&gt;" in page


def test_the_contact_sheet_does_not_run_what_a_corpus_says(demo_dataset: DatasetVersion) -> None:
    sample = next(read_samples(demo_dataset, split="val", stream="image_text"))
    hostile = "<script>alert(1)</script>"
    asked = Question(question=hostile, answers=(hostile,), kind=hostile)
    page = figure(
        replace(sample, meta=sample.meta.model_copy(update={"captions": (hostile,), "questions": (asked,)}))
    )
    assert "<script" not in page and page.count("&lt;script&gt;") == 3


def test_the_tables_have_their_schemas(demo_dataset: DatasetVersion) -> None:
    tables = (demo_dataset.manifest, demo_dataset.samples, demo_dataset.rejects)
    for table, schema in zip(tables, (MANIFEST, SAMPLES, REJECTS), strict=True):
        assert isinstance(table, pa.Table) and table.schema.equals(schema)


def test_what_is_exported_and_read_again_is_the_same(demo_dataset: DatasetVersion, tmp_path: Path) -> None:
    """All but keys and sources: those are of the new corpora."""
    corpora = export(demo_dataset, tmp_path / "public")
    job = load(tmp_path / "public" / "rebuild.yaml")
    assert isinstance(job, RebuildJob) and job.corpora == corpora
    again = Catalog(tmp_path / "store", "again")
    report = build(corpora, SMALL_SHARDS, again)
    assert report.rejects == {} and report.num_samples == len(demo_dataset.samples)
    assert said(again.open()) == said(demo_dataset)
    assert again.open().card.answers == demo_dataset.card.answers
    with pytest.raises(CatalogError, match="public exists; name a new folder"):
        export(demo_dataset, tmp_path / "public")


def said(version: DatasetVersion) -> dict[str, object]:
    """Everything that the samples of a version say, by the sha256 of the image and split."""
    found: dict[str, object] = {}
    for split in get_args(Split):
        for stream in get_args(Stream):
            for sample in read_samples(version, split=split, stream=stream):
                meta = sample.meta.model_copy(update={"key": "", "sources": (), "taxonomy": None})
                labels = None if sample.labels is None else sample.labels.tobytes()
                found[f"{split} {meta.sha256}"] = (meta, labels)
    return found
