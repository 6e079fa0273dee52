"""A contact sheet: one HTML file that shows what a dataset version holds and what it refused, with filters.

For looking at data before training on it; predictions are drawn in xdecoder/inference/draw.py. The page needs
nothing from outside and can load nothing: its policy admits the one script below and pictures inside it, so
that whatever a corpus says is shown and never run.
"""

import base64
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from pipelines.atomic import write_atomically
from pipelines.catalog import DatasetVersion
from pipelines.stream import read_samples
from schemas.masks import Array, decode_rle
from schemas.records import Reject, Sample, SampleMeta, Split
from schemas.tasks import Stream

_SIDE = 240  # long side of a thumbnail, pixels
_PHRASES = 2  # regions shown of one sample
_ANNOTATIONS = ("segments", "referring", "captions", "questions")
_REJECTS = 20  # shown of each reason
_STYLE = """body{font:13px sans-serif;margin:2em;background:#fafafa}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:1em}
figure{margin:0;padding:.6em;background:#fff;border:1px solid #ddd;overflow-wrap:anywhere}
figure.reject{border-color:#c66}figure[hidden]{display:none}
form{position:sticky;top:0;padding:.6em 0;background:#fafafa}select{margin-right:1.5em}
figure img{display:block;max-width:100%;margin-bottom:.3em}small{color:#666}b{font-weight:600}"""
# Every select filters by the attribute that it is named after; a figure lists its values there as JSON.
_SCRIPT = """
const figures = [...document.querySelectorAll('figure')];
const selects = [...document.querySelectorAll('select')];
const values = (figure, name) => JSON.parse(figure.dataset[name]);
for (const select of selects) {
  const counts = new Map();
  for (const figure of figures)
    for (const value of values(figure, select.name)) counts.set(value, (counts.get(value) || 0) + 1);
  for (const value of [...counts.keys()].sort())
    select.add(new Option(value + ' (' + counts.get(value) + ')', value));
  select.addEventListener('change', show);
}
function show() {
  let shown = 0;
  for (const figure of figures) {
    figure.hidden = !selects.every(s => s.value === '' || values(figure, s.name).includes(s.value));
    shown += !figure.hidden;
  }
  document.querySelector('output').value = shown + ' of ' + figures.length;
}
show();
"""


def write_sheet(version: DatasetVersion, path: Path, limit: int = 24) -> int:
    """Write the sheet to `path`, with up to `limit` samples of each split and stream. Returns their number.

    Rejects stand behind them, some of each reason. Raises `StreamError` where a sample cannot be read.
    """
    figures = [figure(sample) for sample in _chosen(version, limit)]
    title = f"{escape(version.card.dataset)} {version.id}"
    page = (
        f"<!doctype html><meta charset='utf-8'><meta http-equiv='Content-Security-Policy' "
        f'content="{_policy()}"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{_summary(version)}{_FILTERS}"
        f"<main>{''.join(figures)}{''.join(_rejects(version))}</main><script>{_SCRIPT}</script>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return len(figures)


def _chosen(version: DatasetVersion, limit: int) -> Iterator[Sample]:
    shown: set[str] = set()
    for split in get_args(Split):
        for stream in get_args(Stream):
            try:
                samples = list(read_samples(version, split=split, stream=stream, limit=limit))
            except ValueError:  # a split without this stream
                continue
            yield from (sample for sample in samples if sample.key not in shown)
            shown |= {sample.key for sample in samples}


_FILTERS = "<form>" + "".join(
    f"<label>{name} <select name='{name}'><option value=''>all</option></select></label>"
    for name in ("split", "annotation", "class", "reject")
) + "<output></output></form>"  # fmt: skip


def _policy() -> str:
    """What the page may do: show what it holds, run the one script."""
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"


def _data(split: str, annotation: list[str], classes: list[str], reject: list[str]) -> str:
    """The attributes by which the page filters."""
    values = {"split": [split], "annotation": annotation, "class": classes, "reject": reject}
    return "".join(
        f' data-{name}="{escape(json.dumps(sorted(set(listed))))}"' for name, listed in values.items()
    )


def _rejects(version: DatasetVersion) -> Iterator[str]:
    """Some of each reason; there is no picture that could be trusted."""
    shown: Counter[str] = Counter()
    for start in range(0, len(version.rejects), 1000):
        for row in version.rejects.slice(start, 1000).to_pylist():
            shown[row["reason"]] += 1
            if shown[row["reason"]] <= _REJECTS:
                yield _reject(Reject(**row))


def _reject(row: Reject) -> str:
    where = f"<small>{escape(row.corpus)}, {escape(row.split)}, {escape(row.record)}</small>"
    said = f"<b>{escape(row.reason)}</b><div>{escape(row.detail)}</div>"
    return f"<figure class='reject'{_data(row.split, [], [], [row.reason])}>{where}{said}</figure>"


def _summary(version: DatasetVersion) -> str:
    card = version.card
    lines = [f"{split}: {counts}" for split, counts in card.counts.items()]
    lines.append(f"read {card.num_read} = kept {card.num_kept} + rejected {sum(card.rejects.values())}")
    lines += [f"rejected, {reason}: {count}" for reason, count in card.rejects.items()]
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def figure(sample: Sample) -> str:
    """One sample as an HTML <figure>; whatever its texts hold is shown, not interpreted."""
    meta = sample.meta
    pictures = [_picture(sample.image, sample.labels, _colours(meta))]
    texts = [
        ", ".join(_coloured(s.category + " (crowd)" * s.iscrowd, s.category) for s in meta.segments or ())
    ]
    for referring in meta.referring[:_PHRASES]:
        mask = decode_rle(referring.mask).astype(np.uint16)
        pictures.append(_picture(sample.image, mask, np.array([[0, 0, 0], [255, 0, 255]], dtype=np.uint8)))
        texts.append("refers: " + escape(" / ".join(referring.sentences)))
    texts += [f"caption: {escape(caption)}" for caption in meta.captions]
    texts += [
        f"{escape(q.question)} <b>{escape(max(q.answers, key=q.answers.count, default='?'))}</b>"
        for q in meta.questions
    ]
    size = f"{meta.split}, {meta.width} x {meta.height}"
    body = "".join(f"<div>{text}</div>" for text in texts if text)
    annotation = [name for name in _ANNOTATIONS if getattr(meta, name)]
    data = _data(meta.split, annotation, [s.category for s in meta.segments or ()], [])
    return f"<figure{data}>{''.join(pictures)}<small>{escape(meta.key)}, {size}</small>{body}</figure>"


def _picture(image: Array, labels: Array | None, colours: Array) -> str:
    """A thumbnail as <img>, with the outlines of `labels` in `colours` uint8[n + 1, 3]."""
    height, width = image.shape[:2]
    scale = _SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    smooth = Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST
    pixels = np.array(Image.fromarray(image).resize(size, smooth))
    if labels is not None:
        small = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        edges = _edges(small)
        pixels[edges] = colours[small[edges]]
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()}'>"


def _edges(labels: Array) -> Array:
    """bool[H, W], true inside a region where a neighbour has another label."""
    edges = np.zeros(labels.shape, dtype=bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges & (labels != 0)


def _colours(meta: SampleMeta) -> Array:
    """uint8[n + 1, 3]: void black, then the colour of each segment's category."""
    return np.array([(0, 0, 0), *(_colour(s.category) for s in meta.segments or ())], dtype=np.uint8)


def _colour(category: str) -> tuple[int, int, int]:
    """The same for a category on every sheet, and never dark."""
    code = zlib.crc32(category.encode())
    red, green, blue = (64 + (code >> shift) % 192 for shift in (0, 8, 16))
    return red, green, blue


def _coloured(text: str, category: str) -> str:
    red, green, blue = _colour(category)
    return f"<span style='border-bottom:3px solid rgb({red},{green},{blue})'>{escape(text)}</span>"
