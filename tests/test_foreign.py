"""Tars of others: read plainly, equally long on every rank, and said to be without guarantees."""

import io
import logging
from itertools import islice
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from pipelines.foreign import foreign_stream
from pipelines.stream import StreamError
from schemas.records import Sample


def tar(path: Path, keys: list[str], *, caption: bool = True) -> Path:
    with wds.TarWriter(str(path)) as sink:
        for key in keys:
            data = io.BytesIO()
            Image.new("RGB", (6, 4), (200, 0, 0)).save(data, "JPEG")
            sample = {"__key__": key, "jpg": data.getvalue()}
            sink.write(sample | ({"txt": f"picture {key}".encode()} if caption else {}))
    return path


def told(samples: list[Sample], seeds: list[int]) -> list[str]:
    assert len(set(seeds)) == len(samples)
    return [sample.meta.captions[0] for sample in samples]


def test_tars_of_others_are_read_for_ever_and_said_to_be_without_guarantees(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tars = [tar(tmp_path / f"{i}.tar", [f"{i}{k}" for k in "abc"]) for i in range(3)]
    for rank in range(2):
        stream = foreign_stream(
            tars, seed=0, global_batch=4, rank=rank, world_size=2, position=8, make_batch=told
        )
        drawn = list(islice(stream, 9))
        assert [position for _, position in drawn] == list(range(12, 48, 4))
        assert {caption for batch, _ in drawn for caption in batch} == {
            f"picture {i}{k}" for i in range(3) for k in "abc"
        }
    assert "without an index" in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_what_cannot_be_used_is_skipped_named_and_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = tar(tmp_path / "good.tar", ["a", "b"]), tar(tmp_path / "bad.tar", ["c"], caption=False)
    settings = {"seed": 0, "global_batch": 2, "rank": 0, "world_size": 1, "make_batch": told}
    skipped: list[int] = []
    seen = islice(foreign_stream([good, bad], on_skip=lambda: skipped.append(1), **settings), 4)
    assert {caption for batch, _ in seen for caption in batch} == {"picture a", "picture b"}
    assert len(skipped) == caplog.text.count("c of ") > 0
    assert "c of " in caplog.text and "bad.tar" in caplog.text
    with pytest.raises(StreamError, match="none of 1 tars"):
        next(foreign_stream([bad], **settings))
    with pytest.raises(StreamError, match="1 unusable samples in a row"):
        next(foreign_stream([bad], max_corrupt=0, **settings))
    with pytest.raises(ValueError, match="pipe:echo"):
        foreign_stream([Path("pipe:echo")], **settings)
