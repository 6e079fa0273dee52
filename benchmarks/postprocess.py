"""Panoptic post-processing against a plain loop over queries: the same answer, in what time.

    python -m benchmarks.postprocess [--queries 100] [--height 480] [--width 640] [--rounds 5]

Paired in one run. The loop is the papers' rule as one would write it down: all masks at the full size, then
one query after the other. Seconds of this process's CPU.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paired import measure, table
from schemas.masks import Array
from xdecoder.inference import postprocess
from xdecoder.inference.postprocess import Frame

OBJECT, OVERLAP = 0.8, 0.8
CLASSES = 133


@torch.no_grad()
def loop(probs: Tensor, logits: Tensor, frame: Frame, things: Tensor) -> tuple[Array, int]:
    """The label map int32[H, W] and the number of its segments."""
    large = F.interpolate(logits[None], frame.padded, mode="bilinear", align_corners=False)
    large = large[..., : frame.valid[0], : frame.valid[1]]
    masks = F.interpolate(large, frame.original, mode="bilinear", align_corners=False)[0].sigmoid()
    scores, labels = probs.max(-1)
    keep = (labels != probs.shape[1] - 1) & (scores > OBJECT)
    scores, labels, masks = scores[keep], labels[keep], masks[keep]
    answer, number = np.zeros(frame.original, dtype=np.int32), 0
    if not len(scores):
        return answer, number
    owner = (scores[:, None, None] * masks).argmax(0)
    stuff: dict[int, int] = {}
    for query, label in enumerate(labels.tolist()):
        mine, solid = owner == query, masks[query] >= 0.5
        both = mine & solid
        if not both.any() or mine.sum() / solid.sum() < OVERLAP:
            continue
        if not things[label] and label in stuff:
            answer[both.numpy()] = stuff[label]
            continue
        number += 1
        answer[both.numpy()] = number
        if not things[label]:
            stuff[label] = number
    return answer, number


def scene(queries: int, frame: Frame) -> tuple[Tensor, Tensor]:
    """Class scores and masks like a trained model's: blobs that overlap, two of three queries without one."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(queries, CLASSES + 1, generator=draw)
    wanted = torch.randint(CLASSES, (queries,), generator=draw)
    wanted[torch.rand(queries, generator=draw) < 2 / 3] = CLASSES
    scores[torch.arange(queries), wanted] += 8 + 2 * torch.rand(queries, generator=draw)
    probs = scores.softmax(-1)
    h, w = frame.padded[0] // 4, frame.padded[1] // 4
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    centre = torch.rand(queries, 2, generator=draw) * torch.tensor([h, w])
    radius = torch.rand(queries, generator=draw) * h / 6 + 2
    far = ((y - centre[:, 0, None, None]) ** 2 + (x - centre[:, 1, None, None]) ** 2).sqrt()
    return probs, (4 * (radius[:, None, None] - far)).clamp(-8, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = (arguments.height, arguments.width)
    padded = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    frame = Frame(padded=padded, valid=size, original=size)
    probs, logits = scene(arguments.queries, frame)
    things = torch.arange(CLASSES) < 80

    def ours() -> tuple[Array, int]:
        found = postprocess.panoptic(
            probs, logits, frame, things=things, object_threshold=OBJECT, overlap_threshold=OVERLAP
        )
        return found.labels, len(found.segments)

    ways: dict[str, Callable[[], tuple[Array, int]]] = {
        "ours": ours,
        "loop": lambda: loop(probs, logits, frame, things),
    }
    times = measure(ways, arguments.rounds, lambda said: np.array_equal(said["ours"][0], said["loop"][0]))
    print(f"{arguments.queries} queries, {size[0]} x {size[1]}, {ours()[1]} segments; CPU seconds")
    print(table(times, "ours"))


if __name__ == "__main__":
    main()
