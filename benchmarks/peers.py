"""What does a training step cost beside Hugging Face's OneFormer and Mask2Former, in time and in memory?

    python -m benchmarks.peers [--recipes oneformer mask2former] [--rounds 5] [--threads 1] [--wall]

Forward, losses and backward of the recipe and of its peer, in turns in one run: the same backbone
(ResNet-50), pictures, masks, texts, queries, layers, points and classes, random weights. Seconds of this
process's CPU, or with --wall of the clock. Memory is the most that a process of its own holds more than
before it made the model, over two steps. The first run makes an environment with transformers
(`benchmarks/huggingface.py`).
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import huggingface
from benchmarks.paired import Times, measure, table
from schemas.jobs import PretrainJob, load
from schemas.masks import Array
from schemas.taxonomy import shipped
from xdecoder.model.xdecoder import XDecoder
from xdecoder.prompts import Vocabulary, query_texts, task_prompt, tokenize
from xdecoder.training import losses, matcher
from xdecoder.training.batch import Batch, Work, mask_targets
from xdecoder.training.losses import total
from xdecoder.training.trainer import Objective

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
SIDE, PICTURES, QUERIES, SEGMENTS = 256, 2, 100, 8
VOCABULARY = Vocabulary(taxonomy=shipped("coco"), answers=())
CLASSES = VOCABULARY.taxonomy.names
# The task token is one of OneFormer's queries; ours has it beside the latents.
LATENTS = {"oneformer": QUERIES - 1, "mask2former": QUERIES}
CONTEXT, CONTEXTS = 77, 16  # tokens of a text, and learned vectors in OneFormer's list (1.2, 1.5)
Step = Callable[[], float]
Clock = Callable[[], float]


def scene() -> tuple[Tensor, list[tuple[Array, list[int]]]]:
    """Pictures float32[B, 3, H, W] in [0, 1], and for each its segments: bool[M, H, W] and their classes."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((PICTURES, 3, SIDE, SIDE), dtype=np.float32))
    places = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1)[..., None, :]
    found = []
    for _ in range(PICTURES):
        nearest = ((places - rng.integers(SIDE, size=(SEGMENTS, 2))) ** 2).sum(-1).argmin(-1)
        classes = sorted(rng.choice(len(CLASSES), SEGMENTS, replace=False).tolist())
        found.append((np.stack([nearest == i for i in range(SEGMENTS)]), classes))
    return images, found


def ours(recipe: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The recipe's model, and the loss of a step."""
    changes = ["model.backbone.pretrained=false", f"model.latents={LATENTS[recipe]}"]
    job = load(RECIPES / f"{recipe}.yaml", changes)
    assert isinstance(job, PretrainJob)
    images, found = scene()
    texts = job.model.latents + 1 - job.model.text_contexts if job.model.task_tokens else 0
    targets = mask_targets(found, ("panoptic",) * PICTURES, VOCABULARY, texts, job.model.context)
    work = Work(
        kind=job.train.tasks[0],
        tasks=("panoptic",) * PICTURES,
        images=torch.arange(PICTURES),
        targets=targets,
    )
    padding = torch.zeros(PICTURES, SIDE, SIDE, dtype=torch.bool)
    batch = Batch(images=images, padding=padding, keys=("a", "b"), works=(work,))
    objective = Objective(XDecoder(job.model), job.train.loss, VOCABULARY).train()
    return objective, lambda: total(objective((batch,)), job.train.loss)


def theirs(recipe: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Hugging Face's model of the same sizes, and the loss of a step."""
    import transformers

    transformers.logging.set_verbosity_error()
    images, found = scene()
    given: dict[str, Any] = {
        "pixel_values": images,
        "mask_labels": [torch.from_numpy(masks).float() for masks, _ in found],
        "class_labels": [torch.tensor(classes) for _, classes in found],
    }
    backbone = transformers.TimmBackboneConfig(
        backbone="resnet50", use_pretrained_backbone=False, out_indices=[1, 2, 3, 4]
    )
    sizes = {"backbone_config": backbone, "num_queries": QUERIES, "num_labels": len(CLASSES)}
    if recipe == "mask2former":
        model = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**sizes))
    else:
        given["task_inputs"] = _padded([task_prompt("panoptic")]).expand(PICTURES, -1).float()
        lists = [
            query_texts("panoptic", [CLASSES[c] for c in classes], QUERIES - CONTEXTS) for _, classes in found
        ]
        given["text_inputs"] = torch.stack([_padded(texts) for texts in lists])
        model = transformers.OneFormerForUniversalSegmentation(
            transformers.OneFormerConfig(**sizes, is_training=True, text_encoder_n_ctx=CONTEXTS)
        )
    model.train()
    return model, lambda: model(**given).loss


def _padded(texts: list[str]) -> Tensor:
    ids = tokenize(texts, CONTEXT)
    return nn.functional.pad(ids, (0, CONTEXT - ids.shape[1]))


SIDES: Mapping[str, Callable[[str], tuple[nn.Module, Callable[[], Tensor]]]] = {
    "ours": ours,
    "theirs": theirs,
}


def step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """One training step but for the optimiser's, which is PyTorch's on both sides."""

    def run() -> float:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return float(value.detach())

    return run


class Timed:
    """A function whose seconds are added up while the context is open."""

    def __init__(self, module: Any, name: str, clock: Clock) -> None:
        self.seconds, self.clock, self.inner = 0.0, clock, getattr(module, name)
        self.patch: AbstractContextManager[Any] = mock.patch.object(module, name, self)

    def __call__(self, *arguments: Any) -> Any:
        start = self.clock()
        try:
            return self.inner(*arguments)
        finally:
            self.seconds += self.clock() - start


def compare(recipe: str, rounds: int, clock: Clock) -> None:
    """Print the times of both sides, and of our matching."""
    torch.manual_seed(0)
    steps = {side: step(*make(recipe)) for side, make in SIDES.items()}
    for run in steps.values():  # kernels are chosen and buffers made in the first
        run()
    whole, assigned = Timed(losses, "match", clock), Timed(matcher, "assign", clock)
    with whole.patch, assigned.patch:
        times: Times = measure(steps, rounds, clock=clock)
    print(table(times, "ours"))
    spent = sum(times["ours"])
    shares = f"matching {whole.seconds / spent:.1%} of our step, its copy and assignment"
    print(f"{shares} {assigned.seconds / spent:.2%}", flush=True)


def peak_mb(recipe: str, side: str) -> float:
    """What two steps of a side hold at most, in a process of its own, megabytes more than before."""
    command = [sys.executable, "-m", "benchmarks.peers", "--recipes", recipe, "--peak", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def grown_mb(recipe: str, side: str) -> float:
    """The same of this process: call it once, first."""
    import transformers  # noqa: F401  both sides hold its code

    before = _held_mb()
    run = step(*SIDES[side](recipe))
    run(), run()
    return _held_mb() - before


def _held_mb() -> float:
    """The most that this process ever held. Linux alone: `ru_maxrss` would start with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(kilobytes) / 1024


def main() -> None:
    huggingface.enter("benchmarks.peers")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=LATENTS, default=list(LATENTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="seconds of the clock: for a quiet machine")
    parser.add_argument("--peak", choices=SIDES, help="print the memory of one side, and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(grown_mb(arguments.recipes[0], arguments.peak))
        return
    first, *others = arguments.recipes
    clock = time.perf_counter if arguments.wall else time.process_time
    seconds = "wall" if arguments.wall else "CPU"
    size = f"{PICTURES} pictures of {SIDE} pixels, {QUERIES} queries"
    print(f"\n{first}, ResNet-50, {size}; {seconds} seconds")
    compare(first, arguments.rounds, clock)
    held = {side: peak_mb(first, side) for side in SIDES}
    print("memory " + ", ".join(f"{side} {mb:.0f} MB" for side, mb in held.items()), flush=True)
    if others:  # in a new process: where freed memory lies after one recipe slows the next
        command = [sys.executable, "-m", "benchmarks.peers", *sys.argv[1:], "--recipes", *others]
        os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
