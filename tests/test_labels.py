"""Laws of label maps: every encoding gives the ids that its corpus means, wherever the bytes lie."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import labels, places
from pipelines.facts import stamp
from pipelines.inspection import inspect
from pipelines.labels import Kind, LabelError, Region, SegmentRule, label_place, painted, segments_of
from pipelines.places import PlaceError, cell, holder, member
from schemas.masks import encode_rle, ids_to_rgb

MAP = np.array([[0, 1, 2], [255, 255, 2]])
LIMIT = 10**6


def png(path: Path, values: Any, dtype: type = np.uint8, mode: str | None = None) -> str:
    image = Image.fromarray(np.asarray(values).astype(dtype))
    if mode == "P":
        image = image.convert("L")
        image.putpalette([i % 256 for i in range(768)])
    image.save(path)
    return str(path)


# ------------------------------------------------------------------------------------------ places


def containers(folder: Path, data: bytes) -> dict[str, str]:
    """The same bytes in a file, a tar, a Parquet file (third row group) and both kinds of Arrow file."""
    (folder / "plain.png").write_bytes(data)
    with tarfile.open(folder / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a/b.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    table = pa.table({"n": range(5), "image": [{"bytes": b"other", "path": ""}] * 4 + [{"bytes": data}]})
    pq.write_table(table, folder / "x.parquet", row_group_size=2)
    with pa.ipc.new_file(folder / "file.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=2)
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    return {
        "file": str(folder / "plain.png"),
        "tar": member(str(folder / "x.tar"), tarfile.BLOCKSIZE, len(data)),
        **{n: cell(str(folder / n), 4, "image.bytes") for n in ("x.parquet", "file.arrow", "stream.arrow")},
    }


def test_the_same_bytes_are_read_wherever_they_lie(tmp_path: Path) -> None:
    found = containers(tmp_path, b"pixels")
    assert {name: places.read(place) for name, place in found.items()} == dict.fromkeys(found, b"pixels")
    for place in found.values():
        size = Path(holder(place)).stat().st_size
        assert stamp(holder(place))[0] == size


@pytest.mark.parametrize("where", ["/a:b.tar", "/a#b|c.tar", "/ü %3A.tar"])
def test_a_place_gives_back_its_file(where: str) -> None:
    assert holder(where) == holder(member(where, 1, 2)) == holder(cell(where, 3, "im:age.bytes")) == where


def test_what_is_not_there_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    found = containers(tmp_path, b"pixels")
    wrong = [
        member(found["file"], 3, 10),
        member(found["file"], 0, 2**40),
        *(cell(holder(found[n]), 5, "image.bytes") for n in ("x.parquet", "file.arrow")),
        *(cell(holder(found[n]), 0, "n") for n in ("x.parquet", "file.arrow")),
        cell(holder(found["x.parquet"]), 0, "image.path"),
        cell(found["file"], 0, "image"),
    ]
    for place in wrong:
        with pytest.raises(PlaceError, match=holder(place)):
            places.read(place)


def test_a_rewritten_file_has_another_stamp(tmp_path: Path) -> None:
    place = containers(tmp_path, b"pixels")["tar"]
    before = stamp(holder(place))
    Path(holder(place)).write_bytes(b"another")
    assert stamp(holder(place)) != before


# ------------------------------------------------------------------------------------------ encodings


def encoded(folder: Path) -> dict[str, tuple[str, Any]]:
    """Label places of every encoding, and the ids that they mean."""
    classes, objects = [[0, 1, 1], [255, 9, 9]], [[0, 1, 2], [255, 1, 1]]
    top, bottom = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    top[0, :2] = True
    return {
        "rgb": (png(folder / "rgb.png", ids_to_rgb(MAP * 60000)), MAP * 60000),
        "index": (label_place("index", png(folder / "index.png", MAP)), MAP),
        "index_from_0": (label_place("index_from_0", png(folder / "0.png", MAP, mode="P")), MAP + 1),
        "class_object": (
            label_place(
                "class_object", png(folder / "c.png", classes, mode="P"), png(folder / "o.png", objects)
            ),
            [[256, 513, 514], [65536, 2561, 2561]],
        ),
        "masks": (painted([encode_rle(bottom), encode_rle(top)]), [[2, 2, 1], [1, 1, 1]]),
    }


@pytest.mark.parametrize("encoding", labels.ENCODINGS)
def test_every_encoding_gives_the_ids_that_it_means(tmp_path: Path, encoding: str) -> None:
    place, ids = encoded(tmp_path)[encoding]
    found = labels.read(place, LIMIT)
    assert np.issubdtype(found.runs.pixels.dtype, np.integer) and np.array_equal(found.runs.pixels, ids)
    facts, runs = inspect("labels", place, LIMIT)
    assert runs is not None and np.array_equal(runs.pixels, ids)
    assert not facts.fault and (facts.height, facts.width) == (2, 3) and facts.sha256 == found.sha256
    assert facts.regions.keys() == set(np.unique(ids).tolist()) - {0}
    assert len(labels.holders(place)) == (2 if encoding == "class_object" else encoding != "masks")


def test_equal_bytes_of_another_encoding_are_another_map(tmp_path: Path) -> None:
    path = png(tmp_path / "x.png", MAP)
    hashes = {labels.read(label_place(e, path), LIMIT).sha256 for e in ("rgb", "index", "index_from_0")}
    assert len(hashes) == 3


def test_sixteen_bits_are_read_from_png_and_tiff(tmp_path: Path) -> None:
    values = MAP * 257
    for name in ("x.png", "x.tif"):
        found = labels.read(label_place("index", png(tmp_path / name, values, np.uint16)), LIMIT)
        assert np.array_equal(found.runs.pixels, values)


def test_a_map_of_one_bit_holds_0_and_1(tmp_path: Path) -> None:
    place = png(tmp_path / "x.png", MAP == 255, bool)
    assert Image.open(place).mode == "1"
    assert np.array_equal(labels.read(label_place("index", place), LIMIT).runs.pixels, MAP == 255)
    assert np.array_equal(
        labels.read(label_place("index_from_0", place), LIMIT).runs.pixels, 1 + (MAP == 255)
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_a_grey_map_of_few_bits_holds_their_values(tmp_path: Path, bits: int) -> None:
    """PIL spreads them over eight; it cannot write them, so the file is made here."""
    values = np.arange(2**bits, dtype=np.uint8)
    packed = values.reshape(-1, 8 // bits) @ (1 << np.arange(8 - bits, -1, -bits))
    row = zlib.compress(b"\0" + packed.astype(np.uint8).tobytes())
    parts = {b"IHDR": struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0), b"IDAT": row, b"IEND": b""}
    chunks = [
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts.items()
    ]
    place = str(tmp_path / "x.png")
    Path(place).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert np.asarray(Image.open(place)).max() == 255
    assert labels.read(label_place("index", place), LIMIT).runs.pixels.tolist() == [values.tolist()]


def test_a_map_that_is_not_what_its_encoding_says_is_a_fault(tmp_path: Path) -> None:
    rgb = png(tmp_path / "rgb.png", ids_to_rgb(MAP))
    tall = png(tmp_path / "tall.png", MAP.T)
    flat = png(tmp_path / "flat.png", MAP)
    cases = {
        label_place("index", rgb): "corrupt",
        label_place("class_object", flat, tall): "size",
        label_place("index", str(tmp_path / "no.png")): "unreadable",
    }
    assert {place: inspect("labels", place, LIMIT)[0].fault for place in cases} == cases
    assert inspect("labels", flat, 5)[0].fault == "pixels"


@pytest.mark.parametrize(("number", "mode"), [(0, "L"), (255, "L"), (256, "I;16")])
def test_an_index_map_counts_in_the_order_that_is_asked_for(number: int, mode: str) -> None:
    order = np.random.default_rng(0).permutation(np.arange(1, number + 1)) * 60000
    ids = np.append(order, [0, 7])[:, None].repeat(2, 1)  # 7 is not asked for
    image = Image.open(io.BytesIO(labels.index_map(labels.runs_of(ids), order.tolist())))
    assert image.mode == mode
    assert np.asarray(image).tolist() == [[i, i] for i in (*range(1, number + 1), 0, 0)]


# ---------------------------------------------------------------------------------- segments from regions


RULE = SegmentRule(
    kinds={7: Kind(name="road", isthing=False), 26: Kind(name="car", isthing=True)},
    void=frozenset({1}),
    divisor=1000,
    crowds=True,
)


def region(area: int) -> Region:
    return Region(area=area, bbox=(0, 0, area, 1))


def test_a_rule_decodes_cityscapes_instance_ids() -> None:
    """Of mcordts/cityscapesScripts: 26001 is a car, 26 a group of cars, 7 the road, 1 is left out."""
    found = segments_of(RULE, {i: region(i) for i in (1, 7, 26, 26000, 26001)})
    assert [(s.id, s.category, s.isthing, s.iscrowd) for s in found] == [
        (7, "road", False, False),
        (26, "car", True, True),
        (26000, "car", True, False),
        (26001, "car", True, False),
    ]
    assert [s.area for s in found] == [7, 26, 26000, 26001]


def test_an_id_of_no_class_is_a_fault_not_a_guess() -> None:
    with pytest.raises(LabelError, match=r"ids of no class: \[8, 27001\]"):
        segments_of(RULE, {8: region(1), 27001: region(1), 7: region(1)})


def test_a_rule_survives_the_wire() -> None:
    assert SegmentRule.model_validate_json(json.dumps(json.loads(RULE.model_dump_json()))) == RULE
