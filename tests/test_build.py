"""Laws of the build: equal in, equal bytes; small changes stay small; in = kept + rejected; all or none."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import webdataset as wds
from assembled import curated
from PIL import Image

from pipelines.build import BuildError, BuildReport, build
from pipelines.catalog import Catalog, CatalogError
from pipelines.corpora.rows import CorpusError, Row
from pipelines.curate import sample_key
from pipelines.facts import stamp
from pipelines.inspection import Facts, inspect
from pipelines.labels import Region, regions_of, runs_of
from pipelines.planning import Plan, plan
from pipelines.remote import Remote
from pipelines.stream import read_samples
from schemas.jobs import BuildConfig, CorpusConfig
from schemas.records import SampleMeta, Segment, Source

SHARED = Path(__file__).resolve().parents[2] / "shared"
# one worker needs no Ray, so that most laws are cheap to test; what is true of several is said of several
CONFIG = BuildConfig(shard_samples=8, num_workers=1)
SEVERAL = CONFIG.model_copy(update={"num_workers": 4})


@pytest.fixture
def world(demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path) -> tuple[CorpusConfig, ...]:
    """The demo corpora in a place of their own, to be changed."""
    shutil.copytree(demo_corpora[0].root, tmp_path / "world")
    return tuple(c.model_copy(update={"root": str(tmp_path / "world")}) for c in demo_corpora)


def pick(corpora: tuple[CorpusConfig, ...], file_format: str, split: str = "train") -> CorpusConfig:
    (corpus,) = (c for c in corpora if c.format == file_format and c.split == split)
    return corpus


def hashes(catalog: Catalog) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in catalog.shards_root.glob("*.tar")}


def stamps(catalog: Catalog) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in catalog.root.rglob("*") if p.name != "build.lock"}


def reasons(catalog: Catalog) -> dict[str, str]:
    """Reason and detail of every reject, by record."""
    return {r["record"]: f"{r['reason']}: {r['detail']}" for r in catalog.open().rejects.to_pylist()}


# ------------------------------------------------------------------------------------------ same in, same out


def shuffle(corpus: CorpusConfig, chance: random.Random) -> None:
    """Put the records of an annotation file into another order."""
    path = Path(corpus.root) / corpus.annotations
    if corpus.format == "captions_table":
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join([header, *chance.sample(lines, len(lines))]) + "\n", encoding="utf-8")
    elif corpus.format == "refcoco":
        refs = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(chance.sample(refs, len(refs)), protocol=2))
    else:
        for name in filter(None, (corpus.annotations, corpus.questions)):
            document = json.loads((Path(corpus.root) / name).read_text())
            for section in {"images", "annotations", "questions"} & document.keys():
                chance.shuffle(document[section])
            for annotation in document.get("annotations", []):
                chance.shuffle(annotation.get("segments_info", []))
            (Path(corpus.root) / name).write_text(json.dumps(document))


@pytest.mark.usefixtures("ray_session")
def test_the_bytes_do_not_depend_on_workers_place_time_or_the_order_of_records(
    demo_corpora: tuple[CorpusConfig, ...], world: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    one, four = Catalog(tmp_path / "one", "demo"), Catalog(tmp_path / "four", "demo")
    first = build(demo_corpora, CONFIG, one)
    for corpus in world:
        shuffle(corpus, random.Random(7))
    second = build(world, SEVERAL, four)
    assert first.version == second.version
    assert hashes(one) == hashes(four) != {}
    assert first.num_shards == len(hashes(one))


def test_a_rebuild_with_nothing_changed_writes_nothing(
    demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    catalog = Catalog(tmp_path, "demo")
    first = build(demo_corpora, CONFIG, catalog)
    before = stamps(catalog)
    again = build(demo_corpora, CONFIG, catalog)
    assert first.new and first.shards_written == first.num_shards and first.bytes_written > 0
    assert not again.new and again.shards_written == again.bytes_written == again.inspected == 0
    assert again.version == first.version and stamps(catalog) == before
    shutil.rmtree(catalog.cache)  # it may be lost
    third = build(demo_corpora, CONFIG, catalog)
    assert third.inspected == first.inspected > 0 and third.shards_written == 0 and not third.new
    assert {p: t for p, t in stamps(catalog).items() if p.is_file() and "cache" not in p.parts} == {
        p: t for p, t in before.items() if p.is_file() and "cache" not in p.parts
    }


def test_one_changed_caption_rewrites_one_shard(world: tuple[CorpusConfig, ...], tmp_path: Path) -> None:
    catalog = Catalog(tmp_path, "demo")
    first = build(world, CONFIG, catalog)
    corpus = pick(world, "captions_table")
    table = Path(corpus.root) / corpus.annotations
    lines = table.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1].split("\t")[0] + "\tsomething else entirely"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    second = build(world, CONFIG, catalog)
    assert second.new and second.shards_written == 1 and second.inspected == 0
    diff = catalog.diff(first.version, second.version)
    assert [(change.what, change.why) for change in diff.changes] == [("changed", "captions")]
    assert len(diff.shards_added) == len(diff.shards_removed) == 1


def picture(seed: int) -> bytes:
    sink = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 48)).save(sink, "JPEG")
    return sink.getvalue()


@pytest.mark.parametrize("named", [False, True])
def test_the_rows_of_a_table_with_images_have_no_order(tmp_path: Path, named: bool) -> None:
    """Whether the images have names or not; also of an image that stands in it three times."""
    said = [*((i, f"a {i}") for i in range(32)), (5, "again"), (5, "and again")]
    rows = [
        {"image": {"bytes": picture(i), "path": f"{i}.jpg" if named else None}, "caption": caption}
        for i, caption in said
    ]
    corpus = CorpusConfig(
        name="c", format="captions_table", split="train", root=str(tmp_path / "t"), annotations="t.parquet"
    )
    (tmp_path / "t").mkdir()
    catalog, found = Catalog(tmp_path / "store", "d"), []
    for table in (rows, random.Random(1).sample(rows, len(rows)), rows[::-1], rows[1:]):
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "t/t.parquet")
        found.append(build([corpus], CONFIG, catalog))
    first, *shuffled, less = found
    assert [(one.version, one.shards_written) for one in shuffled] == [(first.version, 0)] * 2
    assert first.num_samples == 32 and less.num_samples == 31 and less.shards_written <= 1
    diff = catalog.diff(first.version, less.version)
    assert [change.what for change in diff.changes] == ["removed"]
    assert named == ("c-t_parquet_7_jpg" in " ".join(catalog.open().samples["key"].to_pylist()))


def test_a_damaged_shard_is_repaired_by_a_rebuild(
    demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    catalog = Catalog(tmp_path, "demo")
    build(demo_corpora, CONFIG, catalog)
    whole = hashes(catalog)
    shard = catalog.shards_root / sorted(whole)[0]
    shard.write_bytes(shard.read_bytes()[:-600])
    report = build(demo_corpora, CONFIG, catalog)
    assert report.shards_written == 1 and not report.new
    assert hashes(catalog) == whole
    catalog.open().verify()


def rot(path: Path, catalog: Catalog) -> None:
    """Flip a bit; what is remembered of the file becomes what it is now, as if its times had not changed."""
    whole, before = path.read_bytes(), stamp(str(path))
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    for memory in catalog.cache.glob("*.json"):
        text = memory.read_text()
        for then, now in zip(before, stamp(str(path)), strict=True):
            text = text.replace(str(then), str(now))
        memory.write_text(text)


@pytest.mark.parametrize("name", ["*.tar", "manifest.parquet", "samples.parquet"])
def test_what_rotted_unseen_is_not_sent_and_repaired_by_the_next_build(
    demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path, name: str
) -> None:
    remote = Remote.at(f"file://{tmp_path}/there")
    catalog = Catalog(tmp_path / "here", "demo", remote)
    build(demo_corpora, CONFIG, catalog)
    rot(sorted(catalog.root.rglob(name))[0], catalog)
    for lost in remote.list():
        if lost != "current.json":
            remote.delete(lost)
    with pytest.raises(CatalogError, match="rebuild to repair it"):
        build(demo_corpora, CONFIG, catalog)
    build(demo_corpora, CONFIG, catalog)
    catalog.open().verify()


@pytest.mark.parametrize("name", ["*.tar", "samples.parquet", "dataset.json"])
def test_what_rots_unseen_is_repaired_by_a_rebuild_once_it_is_found(
    demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path, name: str
) -> None:
    """Bytes change, sizes and times do not."""
    catalog = Catalog(tmp_path, "demo")
    first = build(demo_corpora, CONFIG, catalog)
    path = sorted(catalog.root.rglob(name))[0]
    whole = path.read_bytes()
    rot(path, catalog)
    there = catalog.root / "versions" / first.version
    shutil.copytree(there, there.with_name(f".{first.version}.damaged.tmp"))  # as a killed repair leaves it
    with pytest.raises(CatalogError, match="rebuild to repair it"):
        catalog.open().verify()
    report = build(demo_corpora, CONFIG, catalog)
    assert (report.version, report.new, report.shards_written) == (
        first.version,
        False,
        path.suffix == ".tar",
    )
    assert path.read_bytes() == whole
    catalog.open().verify()


@pytest.mark.parametrize("field", ["key", "offset", "size_bytes", "sha256"])
@pytest.mark.parametrize("stamped", [True, False])
def test_a_receipt_that_changed_is_not_repeated(
    demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path, field: str, stamped: bool
) -> None:
    """Its shard is written again, whether or not the memory of shards is there."""
    catalog = Catalog(tmp_path, "demo")
    first = build(demo_corpora, CONFIG, catalog)
    receipt = sorted(catalog.shards_root.glob("*.tar.json"))[0]
    whole = receipt.read_bytes()
    said = json.loads(whole)
    member = said["members"][2]
    member[field] = member[field] + 512 if isinstance(member[field], int) else member[field][::-1]
    receipt.write_text(json.dumps(said))
    if not stamped:
        (catalog.cache / "shards.json").unlink()
    again = build(demo_corpora, CONFIG, catalog)
    assert (again.version, again.shards_written) == (first.version, 1)
    assert receipt.read_bytes() == whole
    catalog.open().verify()


@pytest.mark.usefixtures("ray_session")
def test_a_killed_build_leaves_the_previous_version_and_the_next_one_finishes(
    world: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    catalog = Catalog(tmp_path / "store", "demo")
    served = build(world[:2], CONFIG, catalog).version
    before = set(hashes(catalog))
    address = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            KILLED,
            address,
            str(tmp_path / "store"),
            *(c.model_dump_json() for c in world),
        ],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while set(hashes(catalog)) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the build ended before it could be killed"
    assert set(hashes(catalog)) > before, "the build was killed before it wrote"
    assert catalog.versions() == (served,) and catalog.current() == served
    catalog.open().verify()
    finished = build(world, SEVERAL, catalog)
    assert finished.new and catalog.current() == finished.version
    assert finished.version == build(world, CONFIG, Catalog(tmp_path / "clean", "demo")).version
    catalog.open().verify()
    assert build(world, CONFIG, catalog).shards_written == 0
    assert not list(catalog.root.rglob("*.tmp"))


KILLED = """
import sys
from pathlib import Path
import ray
from pipelines.build import build
from pipelines.catalog import Catalog
from schemas.jobs import BuildConfig, CorpusConfig
corpora = [CorpusConfig.model_validate_json(text) for text in sys.argv[3:]]
ray.init(address=sys.argv[1], log_to_driver=False)
build(corpora, BuildConfig(shard_samples=2, num_workers=2), Catalog(Path(sys.argv[2]), "demo"))
"""


# --------------------------------------------------------------------------------------- what any reader sees


def test_plain_webdataset_reads_every_shard(demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path) -> None:
    catalog = Catalog(tmp_path, "demo")
    build(demo_corpora, CONFIG, catalog)
    version = catalog.open()
    urls = [str(catalog.shards_root / name) for name in version.manifest["shard"].to_pylist()]
    found = {}
    for sample in wds.WebDataset(urls, shardshuffle=False, empty_check=False):
        meta = SampleMeta.model_validate_json(sample["json"])
        assert meta.key == sample["__key__"] and hashlib.sha256(sample["jpg"]).hexdigest() == meta.sha256
        assert ("segments.png" in sample) == (meta.segments is not None)
        found[meta.key] = meta
    assert sorted(found) == version.samples["key"].to_pylist()
    assert version.card.counts["train"].samples == sum(m.split == "train" for m in found.values())


def test_corpora_over_the_same_images_are_joined(
    demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    catalog = Catalog(tmp_path, "demo")
    report = build(demo_corpora, CONFIG, catalog)
    assert report.num_samples < report.num_read == report.num_kept
    joined = [
        s.meta for s in read_samples(catalog.open(), split="val", stream="segmentation") if s.meta.referring
    ]
    assert joined and all(
        m.segments and {s.corpus for s in m.sources} == {"demo-scenes", "demo-refs"} for m in joined
    )


def test_the_answers_are_those_of_training_most_frequent_first(
    demo_corpora: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    catalog = Catalog(tmp_path, "demo")
    build(demo_corpora, CONFIG, catalog)
    given: dict[str, int] = {}
    for sample in read_samples(catalog.open(), split="train", stream="image_text"):
        for answer in (a for q in sample.meta.questions for a in q.answers):
            given[answer] = given.get(answer, 0) + 1
    answers = catalog.open().card.answers
    assert set(answers) == set(given)
    assert [given[a] for a in answers] == sorted(given.values(), reverse=True)


# -------------------------------------------------------------------------------------------- what is refused


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def replace_by_text(path: Path) -> None:
    path.write_text("<html>502 Bad Gateway</html>")


def resize(path: Path) -> None:
    with Image.open(path) as image:
        image.resize((80, 40)).save(path)


def other_format(path: Path) -> None:
    with Image.open(path) as image:
        image.save(path, "GIF")


def paint(path: Path) -> None:
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[:3, :3] = (1, 2, 3)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("folder", "damage", "reason"),
    [
        ("images", truncate, "corrupt: "),
        ("images", replace_by_text, "corrupt: "),
        ("images", other_format, "corrupt: "),
        ("images", resize, "size: annotated as height, width (64, 64), the file is (40, 80)"),
        ("images", Path.unlink, "no-image: "),
        ("labels", replace_by_text, "corrupt: "),
        ("labels", resize, "size: "),
        ("labels", paint, "segments: "),
        ("labels", Path.unlink, "no-labels: "),
    ],
)
def test_a_bad_file_is_a_reject_with_the_reason(
    world: tuple[CorpusConfig, ...], tmp_path: Path, folder: str, damage: Callable[[Path], None], reason: str
) -> None:
    corpus = pick(world, "coco_panoptic")
    victim = sorted((Path(corpus.root) / getattr(corpus, folder)).iterdir())[0]
    damage(victim)
    catalog = Catalog(tmp_path, "demo")
    report = build([corpus], CONFIG, catalog)
    assert report.num_read == 24 == report.num_kept + 1 and sum(report.rejects.values()) == 1
    (why,) = reasons(catalog).values()
    assert why.startswith(reason)
    assert victim.name in why or "size" in reason
    assert report.num_samples == len(catalog.open().samples) == 23


def encode_again(image: Path, copy: Path) -> None:
    with Image.open(image) as opened:
        small = opened.crop((3, 0, 64, 61)).resize((48, 48)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        small.save(copy, "JPEG", quality=60)


@pytest.mark.parametrize(("duplicate", "how"), [(shutil.copy, "is this image"), (encode_again, "a copy of")])
def test_an_image_of_the_validation_split_never_reaches_training(
    world: tuple[CorpusConfig, ...],
    tmp_path: Path,
    duplicate: Callable[[Path, Path], None],
    how: str,
) -> None:
    """Also under another name, and through another corpus, and cropped, shrunk, mirrored and encoded anew."""
    scenes, captions = pick(world, "coco_panoptic", "val"), pick(world, "captions_table")
    image = sorted((Path(scenes.root) / scenes.images).iterdir())[0]
    first = (Path(captions.root) / captions.annotations).read_text().splitlines()[1].split("\t")[0]
    duplicate(image, Path(captions.root) / captions.images / first)
    catalog = Catalog(tmp_path, "demo")
    report = build([captions, scenes], CONFIG, catalog)
    (why,) = reasons(catalog).values()
    assert report.rejects == {"leakage": 1} and "demo-scenes image" in why and "val" in why and how in why
    splits: dict[str, set[str]] = {"train": set(), "val": set()}
    for split, stream in (("train", "image_text"), ("val", "segmentation")):
        splits[split] = {s.meta.sha256 for s in read_samples(catalog.open(), split=split, stream=stream)}  # type: ignore[arg-type]
    assert splits["train"] and splits["val"] and not splits["train"] & splits["val"]


def test_too_many_rejects_publish_nothing_and_say_why(
    world: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    corpus = pick(world, "coco_panoptic")
    for victim in sorted((Path(corpus.root) / corpus.images).iterdir())[:3]:
        truncate(victim)
    catalog = Catalog(tmp_path / "store", "demo")
    with pytest.raises(
        BuildError, match=r"(?s)3 of 24 .*max_reject_share 0.05.*corrupt: 3, e\.g\. demo-scenes"
    ):
        build([corpus], CONFIG, catalog)
    assert catalog.versions() == () and catalog.current() is None and not hashes(catalog)
    lenient = CONFIG.model_copy(update={"max_reject_share": 0.2})
    assert build([corpus], lenient, catalog).rejects == {"corrupt": 3}


def test_regions_are_compared_with_regions_and_images_with_images(tmp_path: Path) -> None:
    """Both of one corpus of 4 images with 10 regions each."""
    root = tmp_path / "vg"
    (root / "VG_100K").mkdir(parents=True)
    for i in range(1, 5):
        (root / f"VG_100K/{i}.jpg").write_bytes(picture(i))
    corpus = CorpusConfig(
        name="vg", format="visual_genome", split="train", root=str(root), annotations="regions.json"
    )

    def outcome(num_bad: int) -> BuildReport:
        said = ["" if i < num_bad else f"a dog {i}" for i in range(40)]
        regions = [{"region_id": i, "phrase": phrase} for i, phrase in enumerate(said)]
        images = [{"id": i + 1, "regions": regions[10 * i : 10 * i + 10]} for i in range(4)]
        (root / "regions.json").write_text(json.dumps(images))
        return build([corpus], CONFIG, Catalog(tmp_path / "store", "d"))

    assert outcome(2).rejects == {"text": 2}
    with pytest.raises(BuildError, match=r"(?s)^3 of 40 annotations were rejected, .* region 0 of image 1"):
        outcome(3)
    (root / "VG_100K/1.jpg").unlink()
    with pytest.raises(BuildError, match=r"^1 of 4 images were rejected"):
        outcome(0)


def test_leaks_however_many_are_no_fault_of_their_corpus(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / f"c/{i}.jpg").write_bytes(picture(i))
    corpora = []
    for split, count in (("train", 10), ("val", 6)):
        lines = "".join(f"{i}.jpg\ta dog\n" for i in range(count))
        (tmp_path / f"c/{split}.tsv").write_text("image\tcaption\n" + lines)
        corpora.append(
            CorpusConfig(
                name="c",
                format="captions_table",
                split=split,  # type: ignore[arg-type]
                root=str(tmp_path / "c"),
                annotations=f"{split}.tsv",
            )
        )
    report = build(corpora, CONFIG, Catalog(tmp_path / "store", "d"))
    assert report.rejects == {"leakage": 6} and report.num_kept == 10


def test_a_corpus_of_which_nothing_is_left_stops_the_build(
    world: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    tiny = CONFIG.model_copy(update={"max_pixels": 100, "max_reject_share": 1.0})
    with pytest.raises(BuildError, match=r"(?s)demo-scenes \(train\).*pixels: 24"):
        build([pick(world, "coco_panoptic")], tiny, Catalog(tmp_path, "demo"))


def test_of_two_corpora_with_maps_of_the_same_images_the_first_decides(
    world: tuple[CorpusConfig, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scenes = pick(world, "coco_panoptic")
    other = scenes.model_copy(update={"name": "other"})
    for first, second in ((scenes, other), (other, scenes)):
        catalog = Catalog(tmp_path / first.name, "d")
        report = build([first, second], CONFIG, catalog)
        assert report.rejects == {"duplicate-labels": 24} and report.num_kept == 24
        samples = read_samples(catalog.open(), split="train", stream="segmentation")
        assert {sample.meta.taxonomy for sample in samples} == {first.name}
        assert f"nothing of {second.name} (train) was kept" in caplog.text


def test_an_unreadable_corpus_is_one_error_and_leaves_nothing(
    world: tuple[CorpusConfig, ...], tmp_path: Path
) -> None:
    corpus = pick(world, "coco_panoptic").model_copy(update={"annotations": "nowhere.json"})
    catalog = Catalog(tmp_path / "store", "demo")
    with pytest.raises(CorpusError, match=r"nowhere\.json"):
        build([corpus], CONFIG, catalog)
    assert catalog.versions() == () and catalog.current() is None


def test_nothing_to_build_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no corpora"):
        build([], CONFIG, Catalog(tmp_path / "store", "demo"))
    assert not (tmp_path / "store").exists()


def test_a_class_cannot_be_a_thing_and_stuff(world: tuple[CorpusConfig, ...], tmp_path: Path) -> None:
    corpus = pick(world, "coco_panoptic")
    path = Path(corpus.root) / corpus.annotations
    document = json.loads(path.read_text())
    document["categories"][0]["isthing"] = 1 - document["categories"][0]["isthing"]
    (path.parent / "other.json").write_text(json.dumps(document))
    other = corpus.model_copy(
        update={"name": "other", "annotations": f"{Path(corpus.annotations).parent}/other.json"}
    )
    with pytest.raises(BuildError, match="is a thing in one of 'demo-scenes', 'other'"):
        build([corpus, other], CONFIG, Catalog(tmp_path, "demo"))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("config", [CONFIG, SEVERAL])
def test_a_failing_worker_is_one_error_and_leaves_nothing(
    world: tuple[CorpusConfig, ...], tmp_path: Path, config: BuildConfig
) -> None:
    catalog = Catalog(tmp_path / "store", "demo")
    build([pick(world, "coco_panoptic", "val")], CONFIG, catalog)
    served = catalog.current()
    # the name of a shard to come is taken by a folder, so that its rename fails
    entries = build_plan(world, tmp_path)
    (catalog.shards_root / entries[0]).mkdir()
    with pytest.raises(BuildError, match="a worker failed and nothing was published: .*directory"):
        build([pick(world, "coco_panoptic")], config, catalog)
    assert catalog.versions() == (served,) and catalog.current() == served
    assert not list(catalog.root.rglob("*.tmp"))


def build_plan(world: tuple[CorpusConfig, ...], tmp_path: Path) -> list[str]:
    """The names of the shards that the training scenes become."""
    catalog = Catalog(tmp_path / "trial", "demo")
    build([pick(world, "coco_panoptic")], CONFIG, catalog)
    return sorted(hashes(catalog))


# -------------------------------------------------------------------------------------------- the parts alone


@dataclass(frozen=True)
class Planned:
    """A sample as the plan sees it."""

    key: str
    size_bytes: int = 1
    said: str = "a"


def planned(samples: list[Planned], max_samples: int = 20, max_bytes: int = 10**9) -> Plan:
    digests = [hashlib.sha256(f"{s.key} {s.said}".encode()).digest() for s in samples]
    keys = [s.key for s in samples]
    return plan(
        kind=np.zeros(len(samples), dtype=np.int8),
        bits=np.array([int(hashlib.sha256(k.encode()).hexdigest()[:16], 16) for k in keys], dtype=np.uint64),
        rank=np.argsort(np.argsort(keys)),
        source_bytes=np.array([s.size_bytes for s in samples]),
        digest=np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32),
        max_samples=max_samples,
        max_bytes=max_bytes,
    )


def names(samples: list[Planned]) -> set[str]:
    return set(planned(samples).digests)


def test_shards_are_bounded_and_hold_every_sample_once() -> None:
    samples = [Planned(f"k-{i}", size_bytes=i % 7 + 1) for i in range(500)]
    for max_samples, max_bytes in [(20, 10**9), (500, 60), (1, 1)]:
        found = planned(samples, max_samples, max_bytes)
        shards = [[samples[i] for i in shard] for shard in np.split(found.order, found.starts[1:-1])]
        for shard in shards:
            assert 1 <= len(shard) <= max_samples
            assert sum(s.size_bytes for s in shard) <= max_bytes or len(shard) == 1
            assert [s.key for s in shard] == sorted(s.key for s in shard)
        assert sorted(found.order.tolist()) == list(range(500))
        assert len(set(found.digests)) == len(shards) == len(found.digests)
    assert names(samples) == names(samples[::-1]), "the plan depends on the order of the samples"


def test_a_change_of_one_sample_touches_only_its_shard() -> None:
    """Or the two that it splits into where it overflows, or the two that fit into one again."""
    samples = [Planned(f"k-{i}") for i in range(500)]
    before = names(samples)
    for i in range(0, 500, 7):
        rest = samples[:i] + samples[i + 1 :]
        changed = names([*rest, Planned(f"k-{i}", said="b")])
        assert len(before - changed) == len(changed - before) == 1
        removed, added = names(rest), names([*samples, Planned(f"new-{i}")])
        assert len(before - removed) <= 2 and len(removed - before) <= 1
        assert len(before - added) == 1 and len(added - before) <= 2


def test_keys_are_stable_distinct_and_have_no_dots() -> None:
    ids = ["12", "a.b", "a_b", "a/b", "ü", "x" * 300, "x" * 299 + "y", "_" * 300]
    keys = [sample_key("coco", i) for i in ids]
    assert keys[0] == "coco-12" and len(set(keys)) == len(ids)
    assert all(len(k) <= 70 and set(k) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_") for k in keys)


def row(image_id: str, **fields: object) -> Row:
    base: dict[str, object] = {
        "corpus": "c",
        "split": "train",
        "image_path": image_id,
        "height": 2,
        "width": 2,
    }
    source = Source(corpus="c", files=(image_id,))
    return Row(**(base | {"image_id": image_id, "source": source} | fields))  # type: ignore[arg-type]


def facts(sha256: str) -> Facts:
    return Facts(
        sha256=sha256, size_bytes=1, height=2, width=2, regions={7: Region(area=3, bbox=(0, 0, 2, 2))}
    )


SEGMENT = Segment(id=7, category="x", isthing=True, area=99, bbox=(9, 9, 9, 9))


def test_duplicates_are_joined_and_a_second_label_map_is_refused() -> None:
    rows = [
        row("1", captions=("one", "two")),
        row("2", captions=("two", "three")),
        row("3", segments=(SEGMENT,), labels_path="l"),
        row("4", segments=(SEGMENT,), labels_path="l"),
        row("5"),
        row("6", segments=(), labels_path="l"),
    ]
    files = {("image", r.image_path): facts("5a" * 32) for r in rows} | {("labels", "l"): facts("labels")}
    for order in (rows, rows[::-1]):
        found = curated(order, files)
        (joined,) = found.entries
        assert joined.meta.captions == ("one", "two", "three")
        assert [s.files for s in joined.meta.sources] == [("1",), ("2",), ("3",)]
        assert joined.meta.segments == (SEGMENT.model_copy(update={"area": 3, "bbox": (0, 0, 2, 2)}),)
        why = {reject.record: reject.reason for reject in found.rejects}
        assert why == {"image 4": "duplicate-labels", "image 5": "unannotated", "image 6": "segments"}
        assert found.num_kept + len(found.rejects) == len(rows)


def test_two_images_of_one_id_get_two_keys() -> None:
    """Also where an id was made to look like one with a hash behind it."""
    rows = [
        row("1", captions=("a",)),
        row("1", captions=("b",), split="val", image_path="val/1"),
        row("1-bbbbbbbb", captions=("c",), image_path="x"),
    ]
    places = {"1": "aaaa", "val/1": "bbbb", "x": "cccc"}
    files = {("image", place): facts(start + "b" * 60) for place, start in places.items()}
    assert [e.meta.key for e in curated(rows[:2], files).entries] == ["c-1", "c-1-bbbbbbbb"]
    assert len({e.meta.key for e in curated(rows, files).entries}) == 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 17)])
def test_regions_equal_the_plain_way(shape: tuple[int, int]) -> None:
    ids = np.random.default_rng(0).integers(0, 4, shape) * 70000
    found = regions_of(runs_of(ids))
    assert found.keys() == set(np.unique(ids).tolist()) - {0}
    for value, region in found.items():
        rows, cols = np.nonzero(ids == value)
        x, y = cols.min(), rows.min()
        assert region == Region(area=len(rows), bbox=(x, y, cols.max() - x + 1, rows.max() - y + 1))


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(path)
    started = time.monotonic()
    for limit in (1000, 10**12):
        assert inspect("image", str(path), limit)[0].fault == "pixels"
    assert time.monotonic() - started < 1


# -------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not (SHARED / "data/coco").is_dir(), reason="needs the shared COCO photographs")
def test_real_photographs_become_a_dataset(tmp_path: Path) -> None:
    coco: dict[str, str] = {"root": str(SHARED / "data/coco"), "images": "images", "split": "train"}
    corpora = [
        CorpusConfig(
            name="coco",
            format="coco_panoptic",
            annotations="annotations/panoptic_things_derived.json",
            labels="panoptic_things_derived",
            **coco,  # type: ignore[arg-type]
        ),
        CorpusConfig(name="words", format="coco_captions", annotations="annotations/captions.json", **coco),  # type: ignore[arg-type]
    ]
    catalog = Catalog(tmp_path, "coco")
    report: BuildReport = build(corpora, CONFIG.model_copy(update={"max_reject_share": 0.5}), catalog)
    version = catalog.open()
    version.verify()
    counts = version.card.counts["train"]
    assert report.num_read == report.num_kept + sum(report.rejects.values())
    assert counts.captions >= 5 * 100 and counts.segments > 900
    both = [s for s in read_samples(version, split="train", stream="image_text") if s.meta.segments]
    assert len(both) > 50 and all(s.labels is not None for s in both)
