"""Which query answers for which target: bipartite matching on class and mask costs, at every layer at once;
or fixed, latent i for class i.

Letters: `L` predictions (layers + 1), `R` requests, `O` latents, `M` target masks (padded), `P` points, `K`
classes.
"""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)
Pairs = list[tuple[np.ndarray, np.ndarray]]
Pixelwise = Literal["bce", "focal"]
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (MaskFormer, 2.2)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values: float[N, C, h, w] at float[N, P, 2] (x, y in [0, 1]) -> float[N, C, P].

    align_corners is False and the outside is zero, as in Mask2Former's point sampling.
    """
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, mode="bilinear", align_corners=False)[..., 0]


def sample_rows(maps: Tensor, points: Tensor) -> Tensor:
    """The same, of channels that lie side by side: float[N, h, w, C] at float[N, P, 2] -> float[N, P, C].

    Four rows of channels a point, weighed: quicker than `grid_sample` where there are many channels.
    """
    height, width = maps.shape[1:3]
    framed = F.pad(maps, (0, 0, 1, 1, 1, 1))  # the outside is zero
    place = points * points.new_tensor([width, height]) - 0.5
    low = place.floor()
    x, y = torch.stack((1 - (place - low), 1 - (low + 1 - place)), -1).unbind(2)  # shares of both neighbours
    shares = (y[..., :, None] * x[..., None, :]).flatten(2)
    column, row = (low + 1).long().unbind(2)
    picture = torch.arange(len(maps), device=maps.device)[:, None]
    first = (picture * (height + 2) + row) * (width + 2) + column
    cells = first[..., None] + torch.tensor([0, 1, width + 2, width + 3], device=maps.device)
    summed = F.embedding_bag(
        cells.flatten(0, 1), framed.flatten(0, 2), per_sample_weights=shares.flatten(0, 1), mode="sum"
    )
    return summed.unflatten(0, points.shape[:2])


def mask_costs(logits: Tensor, truth: Tensor, pixelwise: Pixelwise = "bce") -> tuple[Tensor, Tensor]:
    """Mean pixelwise loss and dice of every pair: float32[N, O, P], float32[N, M, P] -> two float32[N, O, M].

    bce    -log p where the target t is one, -log (1 - p) where it is zero
    focal  a (1 - p)^g (-log p) and (1 - a) p^g (-log (1 - p)), a = 0.25 and g = 2
    dice   1 - (2 sum(p t) + 1) / (sum p + sum t + 1)
    """
    count = logits.shape[-1]

    def inside(values: Tensor) -> Tensor:
        """Summed over the points of each target; on a CPU this way round is the quick one."""
        return (truth @ values.transpose(1, 2)).transpose(1, 2)

    if pixelwise == "bce":  # -log p is -log (1 - p) - x: one logarithm does for both
        each = (F.softplus(logits).sum(-1, keepdim=True) - inside(logits)) / count
        p = logits.sigmoid()  # only now, in the memory that softplus took
    else:
        p = logits.sigmoid()
        one = ALPHA * (1 - p) ** GAMMA * F.softplus(-logits)
        zero = (1 - ALPHA) * p**GAMMA * F.softplus(logits)
        each = (zero.sum(-1, keepdim=True) + inside(one - zero)) / count
    dice = 1 - (2 * inside(p) + 1) / (p.sum(-1, keepdim=True) + truth.sum(-1)[:, None] + 1)
    return each, dice


def assign(costs: Tensor, counts: list[int]) -> Pairs:
    """Hungarian assignment of every problem: float[N, O, M], the first counts[n] columns are real ->
    (queries, targets).

    All costs cross to the host in one copy. Costs that are not finite become worse than any assignment
    without them, so scipy never sees them and such a pair is chosen last. With more targets than queries, the
    targets left over stay unmatched.
    """
    matrix = costs.detach().double().cpu().numpy()
    bad = ~np.isfinite(matrix)
    if bad.any():
        log.warning("%d of %d matching costs are not finite", int(bad.sum()), bad.size)
        finite = matrix[~bad] if not bad.all() else np.zeros(1)
        worse = 1 + min(matrix.shape[1:]) * (finite.max() - finite.min())  # than what one pair could save
        matrix = np.where(bad, finite.max() + worse, matrix)
    return [linear_sum_assignment(matrix[n, :, :count]) for n, count in enumerate(counts)]


@torch.no_grad()
def match(
    class_costs: Tensor,
    mask_logits: Tensor,
    truth: Tensor,
    counts: list[int],
    weights: tuple[float, float, float],
    points: int,
    pixelwise: Pixelwise = "bce",
) -> Pairs:
    """Match all predictions of all requests, a prediction at a time: what is sampled of all would be large.

    class_costs    float[L, R, O, M], minus a probability
    mask_logits    float[L, R, O, h, w], read fastest where the latents of a cell lie side by side
    truth          float[R, M, H, W], padded; counts[r] are real
    weights        of class, pixelwise loss and dice (2, 5, 5 in Mask2Former; 1, 20, 1 in MaskFormer)
    points         uniform random points, drawn once a request and prediction, shared by all its masks; 0 is
                   every cell of the prediction, the truth resized to it by nearest (MaskFormer, 2.2)
    returns        L * R pairs (queries int64[n], targets int64[n]), requests fastest
    """
    layers, rows = class_costs.shape[:2]
    places = torch.rand(layers * rows, points, 2, device=truth.device).unflatten(0, (layers, rows))
    if not truth.numel():
        return assign(class_costs.flatten(0, 1), counts * layers)
    totals = []
    for costs, logits, where in zip(class_costs.float(), mask_logits.float(), places, strict=True):
        if points:
            predicted = sample_rows(logits.movedim(1, -1), where).transpose(1, 2)
            wanted = sample_points(truth, where)
        else:
            predicted = logits.flatten(2)
            wanted = F.interpolate(truth, size=logits.shape[-2:]).flatten(2)
        each, dice = mask_costs(predicted, wanted, pixelwise)
        totals.append(weights[0] * costs + weights[1] * each + weights[2] * dice)
    return assign(torch.cat(totals), counts * layers)


def match_fixed(labels: Tensor, counts: Sequence[int], latents: int, layers: int) -> Pairs:
    """Latent i answers for class i (MaskFormer, 2.1): int64[R, M] -> pairs as from `match`.

    Raises `ValueError` where a class has no latent.
    """
    pairs = [(row[:count].cpu().numpy(), np.arange(count)) for row, count in zip(labels, counts, strict=True)]
    most = max((int(classes.max()) for classes, _ in pairs if len(classes)), default=-1)
    if most >= latents:
        raise ValueError(f"fixed matching needs a latent for each class: class {most}, {latents} latents")
    return pairs * layers
