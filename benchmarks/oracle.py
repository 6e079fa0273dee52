"""Are our losses and matching those of transformers? An oracle beside the formulas in the tests.

    python -m benchmarks.oracle [--trials 20]

Random predictions and truths go through both; the largest difference of each is printed, relative to values
above one, and the status is 1 where one is above 1e-6. Both sides draw the same random points: from one seed,
in the same order. Of transformers only what equals the papers is asked; its post-processing and its text
encoder do not. The first run makes an environment with transformers (`benchmarks/huggingface.py`).
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import huggingface
from schemas.jobs import LossConfig
from xdecoder.model.deformable import attend
from xdecoder.training import losses
from xdecoder.training.matcher import Pairs, mask_costs, match, sample_points

TOLERANCE = 1e-6
ROWS, LATENTS, CLASSES, POINTS = 2, 12, 7, 448
GRID, SIDE = (16, 20), (64, 80)  # of predictions and of truths
CONFIG = LossConfig(points=POINTS)
WEIGHTS = (CONFIG.class_ce, CONFIG.mask_bce, CONFIG.mask_dice)
Compared = Iterator[tuple[str, Tensor, Tensor]]


def problem(draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Class logits [R, O, K + 1], mask logits [R, O, h, w], labels [R, M], masks [R, M, H, W], counts."""
    counts = torch.randint(1, 6, (ROWS,), generator=draw).tolist()
    labels = torch.randint(CLASSES, (ROWS, max(counts)), generator=draw)
    coarse = torch.rand(ROWS, max(counts), 4, 5, generator=draw)
    masks = (F.interpolate(coarse, size=SIDE, mode="bilinear") > 0.5).float()
    logits = 2 * torch.randn(ROWS, LATENTS, CLASSES + 1, generator=draw)
    return logits, 4 * torch.randn(ROWS, LATENTS, *GRID, generator=draw), labels, masks, counts


def costs(draw: torch.Generator) -> Compared:
    """Of every pair of masks, on points (Mask2Former) and on whole masks (MaskFormer)."""
    from transformers.models.mask2former import modeling_mask2former as m
    from transformers.models.maskformer import modeling_maskformer as f

    _, masks, _, truth, _ = problem(draw)
    places = torch.rand(ROWS, POINTS, 2, generator=draw)
    x, y = sample_points(masks, places), sample_points(truth, places)
    yield "points of a mask", x, m.sample_point(masks, places, align_corners=False)
    for kind, of in (
        ("bce", m.pair_wise_sigmoid_cross_entropy_loss),
        ("focal", f.pair_wise_sigmoid_focal_loss),
    ):
        each, dice = mask_costs(x, y, kind)  # type: ignore[arg-type]
        yield f"matching cost, {kind}", each, torch.stack([of(*pair) for pair in zip(x, y, strict=True)])
        theirs = [m.pair_wise_dice_loss(*pair) for pair in zip(x, y, strict=True)]
        yield "matching cost, dice", dice, torch.stack(theirs)


def mask2former(draw: torch.Generator) -> Compared:
    """Matching, then all losses on what was matched."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    logits, masks, labels, truth, counts = problem(draw)
    config = Mask2FormerConfig(num_labels=CLASSES, train_num_points=POINTS)
    oracle = Mask2FormerLoss(config, {})
    listed = [row[:count] for row, count in zip(truth, counts, strict=True)]
    named = [row[:count] for row, count in zip(labels, counts, strict=True)]
    probability = logits.softmax(-1).gather(-1, labels[:, None].expand(-1, LATENTS, -1))
    seed = int(torch.randint(1 << 30, (1,), generator=draw))
    torch.manual_seed(seed)
    theirs = oracle(masks, logits, listed, named)
    torch.manual_seed(seed)
    pairs = match(-probability[None], masks[None], truth, counts, WEIGHTS, POINTS)
    bce, dice = losses.mask_losses(masks[None], truth, pairs, CONFIG)
    yield "mask loss, bce", bce, theirs["loss_mask"]
    yield "mask loss, dice", dice, theirs["loss_dice"]
    ours = losses.class_loss(logits[None], labels, pairs, CONFIG.no_object_weight)
    yield "class loss", ours, theirs["loss_cross_entropy"]
    torch.manual_seed(seed)
    yield "pairs", _table(pairs), _table(oracle.matcher(masks, logits, listed, named))


def _table(pairs: Pairs | list[tuple[Tensor, Tensor]]) -> Tensor:
    """Which target each latent has, -1 for none: float[R, O]."""
    wanted = torch.full((len(pairs), LATENTS), -1.0)
    for row, (queries, targets) in enumerate(pairs):
        wanted[row, torch.as_tensor(queries)] = torch.as_tensor(targets).float()
    return wanted


def maskformer(draw: torch.Generator) -> Compared:
    """Losses of whole masks."""
    from transformers.models.maskformer import modeling_maskformer as f

    _, masks, _, truth, counts = problem(draw)
    pairs = [(torch.arange(n).numpy(), torch.arange(n).numpy()) for n in counts]
    whole = CONFIG.model_copy(update={"points": 0, "mask_bce": 0, "mask_focal": 20})
    focal, dice = losses.mask_losses(masks[None], truth, pairs, whole, "focal")
    matched = torch.cat([row[:n] for row, n in zip(masks, counts, strict=True)])
    x = F.interpolate(matched[:, None], size=SIDE, mode="bilinear", align_corners=False).flatten(1)
    y = torch.cat([row[:n] for row, n in zip(truth, counts, strict=True)]).flatten(1)
    yield "mask loss, focal", focal, f.sigmoid_focal_loss(x, y, sum(counts))
    yield "mask loss, dice of whole masks", dice, f.dice_loss(x, y, sum(counts))


def oneformer(draw: torch.Generator) -> Compared:
    """The query-text contrast, and deformable attention."""
    from transformers.models.oneformer import modeling_oneformer as o

    queries, texts = (torch.randn(4, LATENTS, 8, generator=draw) for _ in range(2))
    scale = torch.rand((), generator=draw) * 6  # some beyond the clamp at 100
    oracle: Any = torch.nn.Module()
    oracle.logit_scale = scale
    theirs = o.OneFormerLoss.loss_contrastive(oracle, queries, texts)["loss_contrastive"]
    yield "query-text contrast", losses.query_text_loss(queries, texts, scale), theirs
    grids = [(3, 4), (6, 8), (12, 16)]
    cells = sum(h * w for h, w in grids)
    value = torch.randn(2, cells, 4, 8, generator=draw)
    places = torch.rand(2, cells, 4, 3, 4, 2, generator=draw) * 1.2 - 0.1
    weights = torch.randn(2, cells, 4, 12, generator=draw).softmax(-1).unflatten(-1, (3, 4))
    read = o.multi_scale_deformable_attention(value, grids, places, weights)
    yield "deformable attention", attend(value, grids, places, weights), read


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


def main() -> int:
    huggingface.enter("benchmarks.oracle")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sources: tuple[Callable[[torch.Generator], Compared], ...] = (costs, mask2former, maskformer, oneformer)
    worst: dict[str, float] = {}
    for trial in range(arguments.trials):
        for source in sources:
            for name, ours, theirs in source(torch.Generator().manual_seed(trial)):
                worst[name] = max(worst.get(name, 0.0), difference(ours, theirs))
    report(worst)
    return int(max(worst.values()) > TOLERANCE)


def report(worst: Mapping[str, float]) -> None:
    for name, value in worst.items():
        print(f"{name:32} {value:.1e}{'' if value <= TOLERANCE else '  DIFFERS'}")


if __name__ == "__main__":
    sys.exit(main())
