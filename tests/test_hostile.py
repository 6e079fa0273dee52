"""Hostile corpora, a kind a test: each ends as a named reject or as one clear error, never as a crash.

All run on one small sound corpus of its format, of which the rest must survive; and one build reads a corpus
that holds everything at once.
"""

import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from assembled import Curated, assemble, stored
from PIL import Image

from pipelines.build import BuildError, build
from pipelines.catalog import Catalog
from pipelines.corpora.readers import READERS, read
from pipelines.corpora.rows import CorpusError, Row
from pipelines.reading import HarvestOrder, harvest
from pipelines.stream import read_samples
from schemas.jobs import USES, BuildConfig, CorpusConfig, CurateConfig
from schemas.masks import ids_to_rgb
from schemas.records import Reject

LIMIT = 10**6  # pixels of an image that a build may decode here
SIDE = 8
Document = dict[str, Any]


# ------------------------------------------------------------------------------------------ a sound corpus


def pixels(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (SIDE, 2 * SIDE, 3), dtype=np.uint8)


def jpeg(image: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(sink, "JPEG", **options)
    return sink.getvalue()


def png(image: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(sink, "PNG", **options)
    return sink.getvalue()


def label_map() -> Any:
    ids = np.zeros((SIDE, 2 * SIDE), dtype=np.int64)
    ids[:4, :4], ids[5:, :] = 65, 300
    return ids


def panoptic(first: int, count: int) -> Document:
    size = {"height": SIDE, "width": 2 * SIDE}
    thing = {"id": 65, "category_id": 7, "area": 16, "bbox": [0, 0, 4, 4]}
    stuff = {"id": 300, "category_id": 90, "area": 48, "bbox": [0, 5, 16, 3]}
    ids = range(first, first + count)
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", **size} for i in ids],
        "categories": [{"id": 90, "name": "grass", "isthing": 0}, {"id": 7, "name": "dog", "isthing": 1}],
        "annotations": [
            {"image_id": i, "file_name": f"{i}.png", "segments_info": [dict(thing), dict(stuff)]} for i in ids
        ],
    }


class World:
    """A COCO panoptic corpus of four images, of which a test breaks the first."""

    def __init__(self, root: Path, first: int = 1, count: int = 4) -> None:
        self.root, self.first = root, first
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            (root / f"images/{i}.jpg").write_bytes(jpeg(pixels(i)))
            (root / f"labels/{i}.png").write_bytes(png(ids_to_rgb(label_map())))
        self.image, self.map = root / f"images/{first}.jpg", root / f"labels/{first}.png"
        self.document = panoptic(first, count)
        self.annotation, self.record = self.document["annotations"][0], self.document["images"][0]
        self.segment = self.annotation["segments_info"][0]

    def config(self, **changed: Any) -> CorpusConfig:
        (self.root / "panoptic.json").write_text(json.dumps(self.document))
        base = {"name": "c", "format": "coco_panoptic", "split": "train", "root": str(self.root)}
        settings = {"images": "images", "labels": "labels", "annotations": "panoptic.json"} | changed
        used = (*USES[settings.get("format", "coco_panoptic")], "name", "format")
        return CorpusConfig.model_validate(base | {k: v for k, v in settings.items() if k in used})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a corpus that was read, inspected and curated as the build does it, without its workers."""

    num_read: int
    curated: Curated
    rejects: tuple[Reject, ...]

    @property
    def reasons(self) -> list[str]:
        return sorted(reject.reason for reject in self.rejects)


def outcome(config: CorpusConfig) -> Outcome:
    items = list(read(config))
    rows = [item for item in items if isinstance(item, Row)]
    curated = assemble(rows, LIMIT)
    rejects = tuple(item for item in items if isinstance(item, Reject)) + curated.rejects
    assert len(items) == curated.num_kept + len(rejects), "read = kept + rejected"
    assert all(reject.reason and reject.detail and len(reject.detail) <= 500 for reject in rejects)
    for reject in rejects:  # it can be stored
        pa.array([reject.detail, reject.record], pa.string()), reject.model_dump_json()
    return Outcome(num_read=len(items), curated=curated, rejects=rejects)


# ------------------------------------------------------------------------------------------ images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


BROKEN_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated JPEG": (lambda: jpeg(pixels(1))[:-40], "corrupt"),
    "truncated PNG": (lambda: png(pixels(1))[:-40], "corrupt"),
    "bit-flipped PNG": (lambda: flipped(png(pixels(1)), 60), "corrupt"),
    "JPEG with a broken table": (lambda: flipped(jpeg(pixels(1)), 5), "corrupt"),
    "empty file": (lambda: b"", "corrupt"),
    "web page": (lambda: b"<html>502 Bad Gateway</html>", "corrupt"),
    "GIF named .jpg": (lambda: b"GIF89a" + bytes(40), "corrupt"),
    "decompression bomb": (lambda: png(Image.new("1", (4000, 4000))), "pixels"),
    "claim of four billion pixels": (lambda: header_only(2**16, 2**16), "pixels"),
    "claim of 2^62 pixels": (lambda: header_only(2**31 - 1, 2**31 - 1), "pixels"),
    "zero width": (lambda: header_only(0, 8), "corrupt"),
    "zero size": (lambda: header_only(0, 0), "corrupt"),
    "other size than annotated": (lambda: jpeg(pixels(1).transpose(1, 0, 2)), "size"),
    "rotated by EXIF against the annotation": (lambda: jpeg(pixels(1), exif=exif(6)), "size"),
}


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_a_broken_image_is_a_reject(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path)
    make, reason = BROKEN_IMAGES[kind]
    world.image.write_bytes(make())
    found = outcome(world.config())
    assert found.reasons == [reason] and len(found.curated.entries) == 3


def sixteen_bits() -> bytes:
    return png(pixels(1)[..., 0].astype(np.uint16) * 257)


UNUSUAL_IMAGES: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: jpeg(Image.fromarray(pixels(1)).convert("CMYK")),
    "grey": lambda: jpeg(Image.fromarray(pixels(1)).convert("L")),
    "16 bits": sixteen_bits,
    "palette": lambda: png(Image.fromarray(pixels(1)).convert("P")),
    "palette with transparency": lambda: png(Image.fromarray(pixels(1)).convert("P"), transparency=0),
    "RGBA": lambda: png(Image.fromarray(pixels(1)).convert("RGBA")),
    "grey with alpha": lambda: png(Image.fromarray(pixels(1)).convert("LA")),
    "one bit": lambda: png(Image.fromarray(pixels(1)).convert("1")),
    "junk behind the end": lambda: jpeg(pixels(1)) + bytes(1000),
    "EXIF that is no EXIF": lambda: jpeg(pixels(1), exif=b"Exif\x00\x00" + b"\xff" * 20),
    "EXIF of an unknown orientation": lambda: jpeg(pixels(1), exif=exif(77)),
    "PNG named .jpg": lambda: png(pixels(1)),
}


@pytest.mark.parametrize("kind", UNUSUAL_IMAGES)
def test_an_unusual_image_is_kept_and_reaches_training_as_rgb(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path / "c")
    world.image.write_bytes(UNUSUAL_IMAGES[kind]())
    found = outcome(world.config())
    assert not found.rejects and len(found.curated.entries) == 4
    for sample in stored(found.curated.entries, tmp_path):
        assert sample.image.shape == (SIDE, 2 * SIDE, 3) and sample.image.dtype == np.uint8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_and_masks_agree_for_every_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """The camera's pixels lie turned in the file; masks are drawn on the picture that a viewer shows."""
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    world = World(tmp_path / "c")
    shown = np.repeat((label_map() == 65)[..., None] * np.uint8(255), 3, axis=2)
    in_file = np.ascontiguousarray(turned[orientation](shown))
    world.image.write_bytes(png(in_file, exif=exif(orientation)))
    found = outcome(world.config())
    assert not found.rejects
    sample = next(s for s in stored(found.curated.entries, tmp_path) if s.key == "c-1")
    assert sample.labels is not None
    thing = next(s.id for s in sample.meta.segments or () if s.category == "dog")
    assert np.array_equal(sample.image[..., 0] == 255, sample.labels == thing)


# ------------------------------------------------------------------------------------------ label maps


def repaint(world: World, change: Callable[[Any], Any]) -> None:
    world.map.write_bytes(png(ids_to_rgb(change(label_map()))))


def extra(ids: Any) -> Any:
    ids[4, 4] = 99
    return ids


BROKEN_MAPS: dict[str, tuple[Callable[[World], Any], str]] = {
    "id that the JSON does not list": (lambda w: repaint(w, extra), "segments"),
    "id without pixels": (lambda w: repaint(w, lambda ids: ids * (ids != 65)), "segments"),
    "void alone": (lambda w: repaint(w, lambda ids: ids * 0), "segments"),
    "truncated map": (lambda w: w.map.write_bytes(w.map.read_bytes()[:-20]), "corrupt"),
    "map of another size": (lambda w: repaint(w, lambda ids: ids[:, :-1]), "size"),
    "bomb as a map": (lambda w: w.map.write_bytes(header_only(2**16, 2**16)), "pixels"),
    "JPEG as a map": (lambda w: w.map.write_bytes(jpeg(ids_to_rgb(label_map()))), "corrupt"),
    "map that is not there": (lambda w: w.map.unlink(), "no-labels"),
    "map that is a folder": (lambda w: (w.map.unlink(), w.map.mkdir()), "no-labels"),
    "grey map where colours are expected": (
        lambda w: w.map.write_bytes(png((label_map() % 256).astype(np.uint8))),
        "segments",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_MAPS)
def test_a_broken_label_map_is_a_reject(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path)
    change, reason = BROKEN_MAPS[kind]
    change(world)
    found = outcome(world.config())
    assert found.reasons == [reason] and len(found.curated.entries) == 3


# ------------------------------------------------------------------------------------------ records


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


BROKEN_RECORDS: dict[str, tuple[Callable[[World], Any], str]] = {
    "segment id twice": (lambda w: w.segment.update(id=300), "segmentation"),
    "unknown category": (lambda w: w.segment.update(category_id=8), "category"),
    "NaN area": (lambda w: w.segment.update(area=float("nan")), "record"),
    "NaN box": (lambda w: w.segment.update(bbox=[0, 0, float("nan"), 4]), "record"),
    "infinite box": (lambda w: w.segment.update(bbox=[0, float("inf"), 4, 4]), "record"),
    "negative box": (lambda w: w.segment.update(bbox=[0, 0, -4, 4]), "record"),
    "box of three numbers": (lambda w: w.segment.update(bbox=[0, 0, 4]), "record"),
    "negative area": (lambda w: w.segment.update(area=-1), "record"),
    "id beyond 24 bits": (lambda w: w.segment.update(id=2**24), "record"),
    "id as a list": (lambda w: w.segment.update(id=[65]), "record"),
    "absolute path": (lambda w: w.record.update(file_name="/etc/passwd"), "path"),
    "path with ..": (lambda w: w.record.update(file_name="../../../etc/passwd"), "path"),
    "map path with ..": (lambda w: w.annotation.update(file_name="../../../etc/passwd"), "path"),
    "path with a zero byte": (lambda w: w.record.update(file_name="1\0.jpg"), "path"),
    "path of 100 000 characters": (lambda w: w.record.update(file_name="x" * 100_000), "path"),
    "path of a folder": (lambda w: w.record.update(file_name="."), "no-image"),
    "symlink out of the root": (lambda w: link(w.image, Path("/etc/hostname")), "path"),
    "symlink to a device": (lambda w: link(w.image, Path("/dev/zero")), "path"),
    "loop of symlinks": (lambda w: link(w.image, w.image), "path"),
    "lone surrogate in a path": (lambda w: w.record.update(file_name="\ud800"), "record"),
    "height as text": (lambda w: w.record.update(height="tall"), "record"),
    "image of a billion rows": (lambda w: w.record.update(height=10**9), "size"),
    "image without a record": (lambda w: w.document["images"].pop(0), "no-image"),
    "two images of one id": (
        lambda w: w.document["images"].append(w.record | {"file_name": "2.jpg"}),
        "duplicate-id",
    ),
    "record of another type": (lambda w: w.document["annotations"].__setitem__(0, 7), "no-labels record"),
}


@pytest.mark.parametrize("kind", BROKEN_RECORDS)
def test_a_broken_record_is_a_reject(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path / "c")
    change, reasons = BROKEN_RECORDS[kind]
    change(world)
    found = outcome(world.config())
    assert found.reasons == reasons.split() and len(found.curated.entries) == 3


def test_a_pipe_in_the_corpus_does_not_hang_the_build(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.image.unlink()
    os.mkfifo(world.image)
    assert outcome(world.config()).reasons == ["no-image"]


BROKEN_FILES: dict[str, bytes] = {
    "empty": b"",
    "truncated": json.dumps(panoptic(1, 4)).encode()[:-30],
    "not UTF-8": b'{"images": "\xff\xfe"}',
    "nested a million deep": b"[" * 10**6,
    "list instead of object": b"[]",
    "section of another type": b'{"images": {}, "annotations": [], "categories": []}',
    "number of a million digits": b'{"images": ' + b"9" * 10**6 + b"}",
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_annotation_file_is_one_error(tmp_path: Path, kind: str) -> None:
    config = World(tmp_path).config()
    (tmp_path / "panoptic.json").write_bytes(BROKEN_FILES[kind])
    with pytest.raises(CorpusError, match=r"panoptic\.json") as caught:
        outcome(config)
    assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------ masks


INSTANCES: dict[str, tuple[Any, str]] = {
    "empty polygon": ([], "segmentation"),
    "polygon of two points": ([[1, 1, 5, 5]], "segmentation"),
    "polygon without area": ([[3, 3, 3, 3, 3, 3]], "segmentation"),
    "polygon with NaN": ([[1, 1, 5, 1, float("nan"), 5]], "record"),
    "polygon far outside": ([[1e9, 1, 1e9, 9, 1, 9]], "segmentation"),
    "polygon of odd length": ([[1, 1, 5, 1, 5, 5, 1]], "segmentation"),
    "RLE of another size": ({"size": [9, 9], "counts": [0, 81]}, "segmentation"),
    "RLE that is too short": ({"size": [SIDE, 2 * SIDE], "counts": [0, 9]}, "segmentation"),
    "RLE with a negative run": ({"size": [SIDE, 2 * SIDE], "counts": [-1, 129]}, "record"),
    "RLE text that breaks off": ({"size": [SIDE, 2 * SIDE], "counts": "0o"}, "segmentation"),
    "RLE text of other characters": ({"size": [SIDE, 2 * SIDE], "counts": "\x7f\x7f"}, "segmentation"),
    "no mask": (None, "record"),
}


@pytest.mark.parametrize("kind", INSTANCES)
def test_a_broken_mask_is_a_reject_and_its_image_stays(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path)
    segmentation, reason = INSTANCES[kind]
    good = {"image_id": 1, "category_id": 7, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
    objects = [good | {"id": 1}, good | {"id": 2, "segmentation": segmentation}]
    world.document["annotations"] = objects + [good | {"id": i, "image_id": i} for i in (4, 3)]
    found = outcome(world.config(format="coco_instances"))
    assert found.reasons == sorted([reason, "no-labels"]) and len(found.curated.entries) == 3


@pytest.mark.parametrize("box", [[0, 0, -1, 4], [0, float("nan"), 1, 1], [0, 0, 4], ["a", 0, 1, 1]])
def test_an_object_whose_box_is_no_box_is_a_reject(tmp_path: Path, box: list[Any]) -> None:
    world = World(tmp_path, count=1)
    good = {"image_id": 1, "category_id": 7, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
    world.document["annotations"] = [good | {"id": 1}, good | {"id": 2, "bbox": box}]
    assert outcome(world.config(format="coco_instances")).reasons == ["record"]


# ------------------------------------------------------------------------------------------ pickles


class Runs:
    """Unpickling it would call os.mkdir."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trap),)


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch trap'\ntR.",
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x05",
        b"N.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a byte array of a terabyte
        b"\x80\x05\x8e" + struct.pack("<Q", 2**40) + b".",  # bytes of a terabyte
    ],
)
def test_a_forged_pickle_is_one_error(tmp_path: Path, content: bytes) -> None:
    world = World(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(content)
    with pytest.raises(CorpusError, match=r"refs\(unc\)\.p"):
        outcome(world.config(format="refcoco", annotations="refs(unc).p", instances="panoptic.json"))


def test_a_pickle_asks_for_no_more_memory_than_its_file_has(tmp_path: Path) -> None:
    """Byte arrays were zeroed, and so really taken, before anything was read into them."""
    world = World(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**28) + b".")
    config = world.config(format="refcoco", annotations="refs(unc).p", instances="panoptic.json")
    tracemalloc.start()
    with pytest.raises(CorpusError, match=r"refs\(unc\)\.p"):
        outcome(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


UNUSABLE_IDS = {
    "5000 digits": 10**5000,
    "5000 digits below zero": -(10**5000),
    "infinity": float("inf"),
    "NaN": float("nan"),
    "huge": 1e300,
    "broken": 1.5,
}


@pytest.mark.parametrize("key", ["ref_id", "ann_id", "image_id"])
@pytest.mark.parametrize("kind", UNUSABLE_IDS)
def test_an_id_that_is_no_number_to_write_down_is_a_reject(tmp_path: Path, key: str, kind: str) -> None:
    world = World(tmp_path, count=2)
    square = [[1, 1, 5, 1, 5, 5, 1, 5]]
    objects = [{"id": i, "image_id": i, "category_id": 7, "segmentation": square} for i in (1, 2)]
    world.document["annotations"] = objects
    refs = [
        {"ref_id": i, "ann_id": i, "image_id": i, "split": "train", "sentences": [{"sent": "it"}]}
        for i in (1, 2)
    ]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([refs[0], refs[1] | {key: UNUSABLE_IDS[kind]}]))
    found = outcome(world.config(format="refcoco", annotations="refs(unc).p", instances="panoptic.json"))
    assert found.reasons == ["record"] and len(found.curated.entries) == 1


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    world, trap = World(tmp_path), tmp_path / "trap"
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Runs(trap)]))
    with pytest.raises(CorpusError, match="nothing in a corpus may run"):
        outcome(world.config(format="refcoco", annotations="refs(unc).p", instances="panoptic.json"))
    assert not trap.exists()


# ------------------------------------------------------------------------------------------ texts and tables


LINES: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b"1.jpg,\xff\xfe", "text"),
    "empty caption": (b"1.jpg,", "text"),
    "control characters": (b"1.jpg,a\x1b[2Jb", "text"),
    "zero byte": (b"1.jpg,a\x00b", "text"),
    "caption of 20 000 characters": (b"1.jpg," + b"a" * 20_000, "text"),
    "caption of 200 kB": (b"1.jpg," + b"a " * 100_000, "text"),
    "one cell": (b"1.jpg", "record"),
    "three cells": (b"1.jpg,a,b", "record"),
    "no image": (b",a", "record"),
    "unknown image": (b"9.jpg,a", "no-image"),
    "path with ..": (b"../../etc/passwd,a", "path"),
    "URL as a path": (b"http://example.org/1.jpg,a", "no-image"),
    "path that is not UTF-8": (b"caf\xe9.jpg,a", "path"),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_broken_line_of_a_table_is_a_reject(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path)
    line, reason = LINES[kind]
    (tmp_path / "t.csv").write_bytes(b"image,caption\n2.jpg,good\n" + line + b"\n3.jpg,good\n")
    found = outcome(world.config(format="captions_table", annotations="t.csv"))
    assert found.reasons == [reason] and len(found.curated.entries) == 2


TABLES: dict[str, tuple[str, bytes]] = {
    "CSV whose quote never ends": ("t.csv", b'image,caption\n1.jpg,"a dog\n2.jpg,a cat\n'),
    "CSV whose quote opens 20 MB": ("t.csv", b'image,caption\n1.jpg,"a dog\n' + b"2.jpg,a cat\n" * 2_000_000),
    "CSV of an old Macintosh": ("t.csv", b"image,caption\r1.jpg,a dog\r"),
    "CSV with text behind a quote": ("t.csv", b'image,caption\n1.jpg,"a" dog\n'),
    "CSV of another header": ("t.csv", b"url,text\na,b\n"),
    "empty CSV": ("t.csv", b""),
    "TSV of zero bytes": ("t.tsv", bytes(100)),
    "Parquet that is none": ("t.parquet", b"PAR1" + bytes(100) + b"PAR1"),
    "truncated Parquet": ("t.parquet", b"PAR1"),
    "Arrow that is none": ("t.arrow", b"ARROW1\0\0" + bytes(100)),
    "unknown kind": ("t.xlsx", b"PK"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_broken_table_is_one_error(tmp_path: Path, kind: str) -> None:
    name, content = TABLES[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=name.replace(".", r"\.")) as caught:
        outcome(World(tmp_path).config(format="captions_table", annotations=name))
    assert len(str(caught.value)) < 1000


def test_a_bit_flipped_parquet_is_an_error_or_rejects(tmp_path: Path) -> None:
    world = World(tmp_path)
    images = [jpeg(pixels(i)) for i in range(4)]
    pq.write_table(pa.table({"image": images, "caption": list("abcd")}), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    for at in range(5, len(whole), len(whole) // 25):
        (tmp_path / "t.parquet").write_bytes(flipped(whole, at))
        try:
            found = outcome(world.config(format="captions_table", annotations="t.parquet"))
            assert found.num_read >= 1
        except CorpusError as error:
            assert "t.parquet" in str(error)


def test_names_in_a_parquet_that_are_no_text_are_an_error_or_rejects(tmp_path: Path) -> None:
    """Every column is named twice in the footer, and each name is read at another time."""
    images = [jpeg(pixels(i)) for i in range(2)]
    pq.write_table(pa.table({"image": images, "caption": list("ab")}), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    first, second = (found.start() for found in re.finditer(b"caption", whole))
    for at, what in ((first, "t.parquet"), (second, "unreadable")):
        (tmp_path / "t.parquet").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        try:
            found = outcome(World(tmp_path).config(format="captions_table", annotations="t.parquet"))
            assert found.reasons == [what] * 2
        except CorpusError as error:
            assert what in str(error)


def test_forged_offsets_in_an_arrow_file_are_one_error(tmp_path: Path) -> None:
    """Arrow itself would follow them out of the file."""
    table = pa.table({"image": [b"x" * 64] * 2, "caption": ["y" * 64] * 2})
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as file:
        file.write_table(table)
    whole = (tmp_path / "t.arrow").read_bytes()
    offsets = struct.pack("<iii", 0, 64, 128)
    assert whole.count(offsets) == 2
    (tmp_path / "t.arrow").write_bytes(whole.replace(offsets, struct.pack("<iii", 0, 2**30, 2**31 - 1)))
    with pytest.raises(CorpusError, match=r"t\.arrow"):
        outcome(World(tmp_path).config(format="captions_table", annotations="t.arrow"))


def test_an_image_cell_without_bytes_is_a_reject(tmp_path: Path) -> None:
    images = [jpeg(pixels(1)), None, b""]
    pq.write_table(pa.table({"image": images, "caption": list("abc")}), tmp_path / "t.parquet")
    found = outcome(World(tmp_path).config(format="captions_table", annotations="t.parquet"))
    assert found.reasons == ["corrupt", "unreadable"] and len(found.curated.entries) == 1


# ------------------------------------------------------------------------------------------ tars


def member(name: str, data: bytes, claimed: int | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if claimed is None else claimed, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def pair(key: str, seed: int = 1) -> bytes:
    return member(f"{key}.jpg", jpeg(pixels(seed))) + member(f"{key}.txt", b"a dog")


END = bytes(1024)
TARS: dict[str, tuple[Callable[[], bytes], str, int]] = {
    "member of 10 GB declared": (
        lambda: pair("a") + member("b.jpg", b"x", claimed=10 * 2**30) + END,
        "record",
        1,
    ),
    "cut at a member's border": (lambda: pair("a") + pair("b", 2), "record", 1),
    "cut within a member": (lambda: (pair("a") + pair("b", 2))[:-700], "record", 1),
    "second tar in the same file": (lambda: pair("a") + pair("b", 2) + END + pair("c", 3) + END, "record", 1),
    "zeros for a member": (
        lambda: pair("a") + pair("b", 2) + bytes(len(pair("c", 3))) + pair("d", 4) + END,
        "record",
        1,
    ),
    "hard link alone": (lambda: pair("a") + member("b.jpg", b"", kind=tarfile.LNKTYPE) + END, "no-image", 1),
    "one bad header": (lambda: pair("a") + pair("c", 3) + bytes([1]) * 512 + pair("b", 2) + END, "record", 1),
    "one key twice": (lambda: pair("a") + pair("b", 2) + pair("a", 3) + END, "duplicate-id", 2),
    "two images of one key": (
        lambda: pair("a") + member("b.jpg", jpeg(pixels(2))) + member("b.png", png(pixels(3))) + END,
        "no-image",
        1,
    ),
    "two texts of one key": (
        lambda: pair("a") + pair("b", 2) + member("b.txt", b"again") + END,
        "duplicate-id",
        1,
    ),
    "text alone": (lambda: pair("a") + member("b.txt", b"words") + END, "no-image", 1),
    "image alone": (lambda: pair("a") + member("b.jpg", jpeg(pixels(2))) + END, "unannotated", 1),
    "text that is not UTF-8": (
        lambda: pair("a") + member("b.jpg", jpeg(pixels(2))) + member("b.txt", b"\xff\xfe") + END,
        "text",
        1,
    ),
    "JSON that is none": (lambda: pair("a") + pair("b", 2) + member("b.json", b"{") + END, "record", 1),
    "JSON nested deep": (
        lambda: pair("a") + pair("b", 2) + member("b.json", b"[" * 200_000) + END,
        "record",
        1,
    ),
    "caption that is a number": (
        lambda: pair("a") + pair("b", 2) + member("b.json", b'{"caption": 3}') + END,
        "record",
        1,
    ),
    "text of 2 MB": (
        lambda: pair("a") + member("b.jpg", jpeg(pixels(2))) + member("b.txt", b"x" * 2**21) + END,
        "text",
        1,
    ),
    "key that is not UTF-8": (lambda: pair("a") + pair("caf\udce9", 2) + END, "path", 1),
    "symbolic link as an image": (
        lambda: pair("a") + member("b.jpg", b"", kind=tarfile.SYMTYPE) + member("b.txt", b"x") + END,
        "no-image",
        1,
    ),
}


@pytest.mark.parametrize("kind", TARS)
def test_a_broken_tar_is_a_reject_and_what_was_whole_stays(tmp_path: Path, kind: str) -> None:
    make, reason, kept = TARS[kind]
    (tmp_path / "x.tar").write_bytes(make())
    found = outcome(World(tmp_path).config(format="webdataset", annotations="*.tar"))
    assert found.reasons == [reason] and len(found.curated.entries) == kept


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b" + bytes(600), b"x" * 2000, bytes(20_000)])
def test_a_file_that_is_no_plain_tar_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(CorpusError, match=r"x\.tar"):
        outcome(World(tmp_path).config(format="webdataset", annotations="*.tar"))


def test_files_whose_names_are_not_utf8_are_named_plainly(tmp_path: Path) -> None:
    world = World(tmp_path / "c", count=2)
    (tmp_path / "c/own.yaml").write_text("stuff: {1: grass}")
    for i in (1, 2):
        (tmp_path / f"c/labels/{i}.png").write_bytes(png(np.ones((SIDE, 2 * SIDE), dtype=np.uint8)))
    config = world.config(format="index_maps", classes="own.yaml")
    for folder, name in (("images", "caf\udce9.jpg"), ("labels", "caf\udce9.png"), ("labels", "x\udce9.png")):
        (tmp_path / "c" / folder / name).write_bytes(b"")
    found = outcome(config)
    assert found.reasons == ["no-image", "no-image", "path"]
    assert len(found.curated.entries) == 2
    (tmp_path / "c/\udce9.tar").write_bytes(pair("a") + END)
    with pytest.raises(CorpusError, match=r"udce9\.tar' is not UTF-8; rename it") as caught:
        outcome(world.config(format="webdataset", annotations="*.tar"))
    assert str(caught.value).encode()


def test_a_reader_that_fails_unforeseen_names_its_corpus_and_keeps_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(config: CorpusConfig) -> Any:
        raise KeyError("caf\udce9")

    monkeypatch.setitem(READERS, "coco_panoptic", fail)
    order = HarvestOrder(corpus=World(tmp_path).config(), curate=CurateConfig(), number=0, work=str(tmp_path))
    with pytest.raises(CorpusError, match=r"corpus 'c' \(coco_panoptic, train\) under .*KeyError") as caught:
        harvest(order)
    assert str(caught.value).encode() and "in fail" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        END,
        b"x" * 2000,
        flipped(pair("b") + END, 20),
        member("b.jpg", b"x", claimed=2**60, kind=tarfile.XHDTYPE),
        member("x", b"", kind=tarfile.XHDTYPE) * 2000 + END,
    ],
)
def test_a_tar_without_a_whole_sample_is_a_reject_among_others(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    (tmp_path / "y.tar").write_bytes(pair("a") + END)
    found = outcome(World(tmp_path).config(format="webdataset", annotations="*.tar"))
    assert found.reasons == ["record"] and len(found.curated.entries) == 1
    assert found.rejects[0].record == "tar x.tar"


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE])
def test_a_sound_tar_may_end_with_something_else_than_a_file(tmp_path: Path, kind: bytes) -> None:
    config = World(tmp_path).config(format="webdataset", annotations="*.tar")
    (tmp_path / "x.tar").write_bytes(pair("./a") + member("./a.link", b"", kind=kind) + bytes(10_240))
    found = outcome(config)
    assert not found.rejects and len(found.curated.entries) == 1


def test_a_compressed_tar_is_to_be_decompressed_and_a_damaged_one_fetched(tmp_path: Path) -> None:
    config = World(tmp_path).config(format="webdataset", annotations="*.tar")
    for content, advice in (
        (gzip.compress(pair("a") + END), "decompress it"),
        (b"x" * 2000, "mend or fetch them"),
    ):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(CorpusError, match=rf"x\.tar.*{advice}"):
            outcome(config)


KEYS = ["a.b/c", "/abs/d", "../up", "sp ace", "ünïcode", "x" * 300, "-", "a%2fb", "c$(touch x)"]


def test_keys_with_dots_slashes_and_worse_become_plain_distinct_keys(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"".join(pair(key, i) for i, key in enumerate(KEYS)) + END)
    (tmp_path / "y.tar").write_bytes(pair("a.b/c", 99) + END)
    found = outcome(World(tmp_path).config(format="webdataset", annotations="*.tar"))
    keys = [entry.meta.key for entry in found.curated.entries]
    assert not found.rejects and len(set(keys)) == len(KEYS) + 1
    assert all(len(key) <= 80 and key.isascii() and not set(key) & set("./ %$") for key in keys)
    assert sorted(sample.key for sample in stored(found.curated.entries, tmp_path)) == sorted(keys)


# ------------------------------------------------------------------------------------------ all at once


def everything(root: Path) -> tuple[CorpusConfig, ...]:
    """All of the above in corpora that each keep something: a part of their records is broken."""
    made = []
    broken = [
        *((lambda w, make=make: w.image.write_bytes(make())) for make, _ in BROKEN_IMAGES.values()),
        *(change for change, _ in BROKEN_MAPS.values()),
        *(change for kind, (change, _) in BROKEN_RECORDS.items()),
    ]
    whole = panoptic(0, 0)
    for i, change in enumerate(broken):
        world = World(root, first=1 + 2 * i, count=2)
        change(world)
        for section in ("images", "annotations"):
            whole[section] += world.document[section]
    world = World(root, first=10_000, count=1)
    world.document = whole
    made.append(world.config(name="pictures"))
    lines = b"".join(line + b"\n" for line, _ in LINES.values())
    (root / "t.csv").write_bytes(b"image,caption\n10000.jpg,good\n" + lines)
    made.append(world.config(name="lines", format="captions_table", annotations="t.csv"))
    (root / "tars").mkdir()
    for i, (make, _, _) in enumerate(TARS.values()):
        (root / f"tars/{i}.tar").write_bytes(make())
    made.append(world.config(name="tars", format="webdataset", annotations="tars/*.tar"))
    (root / "images/20000.jpg").write_bytes(jpeg(pixels(20_000)))
    dog = {"image_id": 20_000, "category_id": 7}
    masks = [segmentation for segmentation, _ in INSTANCES.values()] + [[[1, 1, 5, 1, 5, 5, 1, 5]]]
    document = {
        "images": [{"id": 20_000, "file_name": "20000.jpg", "height": SIDE, "width": 2 * SIDE}],
        "categories": [{"id": 7, "name": "dog"}],
        "annotations": [dog | {"id": i, "segmentation": mask} for i, mask in enumerate(masks)],
    }
    (root / "instances.json").write_text(json.dumps(document))
    made.append(world.config(name="objects", format="coco_instances", annotations="instances.json"))
    return tuple(made)


def test_a_build_over_all_of_it_balances_or_publishes_nothing(ray_session: None, tmp_path: Path) -> None:
    corpora = everything(tmp_path / "c")
    catalog = Catalog(tmp_path / "store", "hostile")
    lenient = BuildConfig(max_pixels=LIMIT, max_reject_share=0.05)
    with pytest.raises(BuildError, match="more than max_reject_share 0.05.*nothing was published"):
        build(corpora, lenient, catalog)
    assert catalog.current() is None and not catalog.versions()
    report = build(corpora, lenient.model_copy(update={"max_reject_share": 0.9}), catalog)
    version = catalog.open()
    version.verify()
    assert report.num_read == report.num_kept + sum(report.rejects.values()) == version.card.num_read
    assert len(version.rejects) == sum(report.rejects.values()) > 80
    assert {"corrupt", "pixels", "size", "segments", "path", "text", "record"} <= set(report.rejects)
    samples = list(read_samples(version, split="train", stream="segmentation"))
    assert samples and all(sample.labels is not None for sample in samples)
