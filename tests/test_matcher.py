"""Laws of the matcher: optimal, robust to what is not a number, costs equal to their formulas."""

import itertools
import logging

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xdecoder.training.matcher import assign, mask_costs, match, match_fixed, sample_points, sample_rows


def cost_of(matrix: Tensor, pair: tuple[np.ndarray, np.ndarray]) -> float:
    return float(matrix[pair[0], pair[1]].sum())


def least(matrix: Tensor) -> float:
    """The cheapest one-to-one assignment, by trying all."""
    wide = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    rows, columns = wide.shape
    tries = itertools.permutations(range(rows), columns)
    return min(float(wide[list(chosen), range(columns)].sum()) for chosen in tries)


@pytest.mark.parametrize(("queries", "targets"), [(4, 4), (6, 3), (3, 5), (1, 1), (5, 1)])
def test_no_assignment_is_cheaper(queries: int, targets: int) -> None:
    costs = torch.randn(8, queries, targets, generator=torch.Generator().manual_seed(0))
    for matrix, (rows, columns) in zip(costs, assign(costs, [targets] * 8), strict=True):
        assert len(set(rows)) == len(set(columns)) == len(rows) == min(queries, targets)
        assert cost_of(matrix, (rows, columns)) == pytest.approx(least(matrix), abs=1e-5)


def test_padded_targets_are_never_matched() -> None:
    costs = torch.zeros(3, 4, 5)
    costs[..., 2:] = -100
    for pair, count in zip(assign(costs, [2, 0, 1]), [2, 0, 1], strict=True):
        assert sorted(pair[1]) == list(range(count))


def test_more_targets_than_queries_leave_targets_over() -> None:
    costs = torch.tensor([[[5.0, 1.0, 3.0], [4.0, 2.0, 0.0]]])
    ((queries, targets),) = assign(costs, [3])
    assert dict(zip(queries.tolist(), targets.tolist(), strict=True)) == {0: 1, 1: 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1.0, 1e6, 1e37])
def test_a_pair_that_is_no_number_is_chosen_last(
    bad: float, size: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the only way around it costs far more than any other pair."""
    costs = torch.tensor([[[bad, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 0.0, -1.0]]]) * size
    with caplog.at_level(logging.WARNING):
        ((queries, targets),) = assign(costs, [3])
    assert (0, 0) not in zip(queries, targets, strict=True)
    assert "1 of 9 matching costs are not finite" in caplog.text


def test_nothing_finite_still_gives_an_assignment() -> None:
    ((queries, targets),) = assign(torch.full((1, 3, 2), float("nan")), [2])
    assert len(set(queries)) == 2 and sorted(targets) == [0, 1]


def test_costs_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 50, generator=generator)
    truth = torch.rand(2, 4, 50, generator=generator)
    bce, dice = mask_costs(logits, truth)
    for n, o, m in itertools.product(range(2), range(3), range(4)):
        x, t = logits[n, o], truth[n, m]
        p = x.sigmoid()
        torch.testing.assert_close(bce[n, o, m], F.binary_cross_entropy_with_logits(x, t))
        torch.testing.assert_close(dice[n, o, m], 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))


def test_points_are_read_bilinearly_and_zero_outside() -> None:
    grid = torch.arange(12.0).view(1, 1, 3, 4)
    centres = torch.tensor([[[(x + 0.5) / 4, (y + 0.5) / 3] for y in range(3) for x in range(4)]])
    torch.testing.assert_close(sample_points(grid, centres)[0, 0], torch.arange(12.0))
    between = torch.tensor([[[1.0 / 4, 0.5 / 3], [0.0, 0.5 / 3], [1.0, 1.0]]])
    # halfway between 0 and 1; halfway between 0 and the outside; a quarter of the last cell
    torch.testing.assert_close(sample_points(grid, between)[0, 0], torch.tensor([0.5, 0.0, 11 / 4]))


@pytest.mark.parametrize("size", [(3, 4), (1, 1), (7, 2)])
def test_both_ways_of_sampling_agree(size: tuple[int, int]) -> None:
    maps = torch.randn(2, 5, *size)
    places = torch.rand(2, 60, 2)
    places[:, :3] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    rows = sample_rows(maps.movedim(1, -1), places)
    torch.testing.assert_close(rows.transpose(1, 2), sample_points(maps, places), atol=1e-6, rtol=0)


def test_matching_finds_the_masks_that_were_shuffled() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = F.interpolate((torch.rand(2, 4, 4, 4, generator=generator) > 0.5).float(), scale_factor=8)
    order = torch.tensor([[3, 0, 2, 1], [1, 2, 3, 0]])
    logits = torch.stack([(20 * m - 10)[o] for m, o in zip(masks, order, strict=True)])
    pairs = match(torch.zeros(3, 2, 4, 4), logits.expand(3, -1, -1, -1, -1), masks, [4, 3], (2, 5, 5), 256)
    assert len(pairs) == 3 * 2
    for i, (queries, targets) in enumerate(pairs):  # requests run fastest
        assert order[i % 2][queries].tolist() == targets.tolist()
        assert sorted(targets) == [0, 1, 2, 3][: 4 - i % 2]


def test_the_weights_decide_between_class_and_mask() -> None:
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, :4], masks[0, 1, 4:] = 1, 1
    logits = (20 * masks - 10)[None]
    classes = -torch.eye(2).flip(0)[None, None]  # the class of each query fits the other target
    for weights, expected in ((1.0, 0.0, 0.0), [1, 0]), ((0.0, 1.0, 1.0), [0, 1]):
        ((_, targets),) = match(classes, logits, masks, [2], weights, 64)
        assert targets.tolist() == expected


@pytest.mark.parametrize("points", [16, 0])
def test_no_targets_and_no_pairs(points: int) -> None:
    pairs = match(
        torch.zeros(2, 1, 3, 0), torch.zeros(2, 1, 3, 8, 8), torch.zeros(1, 0, 8, 8), [0], (2, 5, 5), points
    )
    assert [len(queries) for queries, _ in pairs] == [0, 0]


def test_focal_costs_equal_their_formula() -> None:
    """MaskFormer, 2.2: 1/P [a (1 - p)^2 (-log p) t + (1 - a) p^2 (-log(1 - p)) (1 - t)]."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 50, generator=generator).double()
    truth = torch.rand(2, 4, 50, generator=generator).double()
    focal, dice = mask_costs(logits, truth, "focal")
    torch.testing.assert_close(dice, mask_costs(logits, truth)[1])
    for n, o, m in itertools.product(range(2), range(3), range(4)):
        p, t = logits[n, o].sigmoid(), truth[n, m]
        inside, outside = 0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log()
        torch.testing.assert_close(focal[n, o, m], (inside * t + outside * (1 - t)).mean(), atol=1e-9, rtol=0)


def test_whole_masks_are_matched_at_the_size_of_the_prediction() -> None:
    """Without points: the truth is resized by nearest, and no random number is drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 1, 5, 4, 4, generator=generator)
    truth = (torch.rand(1, 3, 8, 8, generator=generator) > 0.5).float()
    state = torch.get_rng_state()
    pairs = match(torch.zeros(2, 1, 5, 3), logits, truth, [3], (1, 20, 1), 0, "focal")
    assert torch.equal(state, torch.get_rng_state())
    for layer, pair in enumerate(pairs):
        focal, dice = mask_costs(logits[layer].flatten(2), truth[..., ::2, ::2].flatten(2), "focal")
        costs = 20 * focal[0] + dice[0]
        assert cost_of(costs, pair) == pytest.approx(least(costs), abs=1e-5)


def test_fixed_matching_gives_each_class_its_own_latent() -> None:
    pairs = match_fixed(torch.tensor([[4, 0], [2, -1]]), [2, 1], latents=5, layers=3)
    assert [(q.tolist(), t.tolist()) for q, t in pairs] == [([4, 0], [0, 1]), ([2], [0])] * 3
    with pytest.raises(ValueError, match="class 4, 4 latents"):
        match_fixed(torch.tensor([[4]]), [1], latents=4, layers=1)
