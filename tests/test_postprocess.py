"""Laws of the decision rules: tiny cases by hand, and plain full-size formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from xdecoder.inference import postprocess
from xdecoder.inference.postprocess import Frame, instances, panoptic, referring, semantic

THINGS = torch.tensor([True, False, False])  # one thing class, two stuff classes


def square(height: int, width: int) -> Frame:
    return Frame(padded=(height, width), valid=(height, width), original=(height, width))


def probs(*rows: tuple[int, float], classes: int = 3) -> torch.Tensor:
    """Class scores of queries, each (class, its probability); the rest is spread over the others."""
    table = torch.empty(len(rows), classes + 1)
    for query, (label, score) in enumerate(rows):
        table[query] = (1 - score) / classes
        table[query, label] = score
    return table


def strip(*spans: tuple[int, int], width: int = 10, logit: float = 4.0) -> torch.Tensor:
    """Masks on one row of pixels: each covers [start, stop)."""
    masks = torch.full((len(spans), 1, width), -8.0)
    for query, (start, stop) in enumerate(spans):
        masks[query, 0, start:stop] = logit
    return masks


def decide(
    class_probs: torch.Tensor, masks: torch.Tensor, *, object_threshold: float = 0.5
) -> postprocess.PanopticMap:
    frame = square(*masks.shape[1:])
    thresholds = {"object_threshold": object_threshold, "overlap_threshold": 0.8}
    return panoptic(class_probs, masks, frame, things=THINGS, **thresholds)


# name, classes, masks, expected labels, expected (label, isthing) of the segments
CASES = [
    ("one thing", probs((0, 0.9)), strip((0, 4)), "1111000000", [(0, True)]),
    ("all background", probs((3, 0.9), (3, 0.8)), strip((0, 4), (4, 9)), "0000000000", []),
    ("score at the threshold is not above it", probs((0, 0.5)), strip((0, 4)), "0000000000", []),
    ("empty mask", probs((0, 0.9)), strip((0, 0)), "0000000000", []),
    (
        "two things of one class stay two",
        probs((0, 0.9), (0, 0.8)),
        strip((0, 4), (5, 9)),
        "1111022220",
        [(0, True)] * 2,
    ),
    (
        "the better score owns",
        probs((0, 0.9), (1, 0.8)),
        strip((0, 5), (4, 10)),
        "1111122222",
        [(0, True), (1, False)],
    ),
    # The second covers 10 pixels and owns 8 of them: exactly 0.8 is enough; then 7 of 10 is not.
    (
        "ratio exactly 0.8",
        probs((0, 0.9), (1, 0.8)),
        strip((0, 2), (0, 10)),
        "1122222222",
        [(0, True), (1, False)],
    ),
    ("ratio 0.7", probs((0, 0.9), (1, 0.8)), strip((0, 3), (0, 10)), "1110000000", [(0, True)]),
    (
        "stuff that appears again joins its first segment",
        probs((1, 0.9), (0, 0.9), (1, 0.8), (2, 0.9)),
        strip((0, 2), (3, 5), (6, 8), (9, 10)),
        "1102201103",
        [(1, False), (0, True), (2, False)],
    ),
]


@pytest.mark.parametrize(
    ("class_probs", "masks", "expected", "kinds"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_panoptic_cases(class_probs: torch.Tensor, masks: torch.Tensor, expected: str, kinds: list) -> None:
    found = decide(class_probs, masks)
    assert "".join(map(str, found.labels[0])) == expected
    assert found.labels.dtype == np.int32
    assert [(s.label, s.isthing) for s in found.segments] == kinds
    assert [s.id for s in found.segments] == list(range(1, len(kinds) + 1))


def test_merged_stuff_has_the_best_score_of_its_parts() -> None:
    found = decide(probs((1, 0.7), (1, 0.95)), strip((0, 2), (5, 7)))
    assert [s.score for s in found.segments] == pytest.approx([0.95])


def test_owner_is_counted_before_and_the_segment_cut_after_the_half_probability() -> None:
    """A query owns weak pixels (0.3) that nobody else wants, but its segment does not hold them."""
    masks = strip((0, 4))
    masks[0, 0, 4:6] = torch.logit(torch.tensor(0.3))
    assert "".join(map(str, decide(probs((0, 0.9)), masks).labels[0])) == "1111000000"


def test_no_queries_and_background_only_give_empty_answers() -> None:
    frame, none = square(4, 5), torch.zeros(0, 4)
    empty = panoptic(
        none, torch.zeros(0, 2, 2), frame, things=THINGS, object_threshold=0, overlap_threshold=0
    )
    assert empty.segments == () and not empty.labels.any()
    assert len(instances(none, torch.zeros(0, 2, 2), frame, things=THINGS, top_k=5).labels) == 0
    assert referring(torch.zeros(3, 0), torch.zeros(3, 2, 2), frame).shape == (0, 4, 5)


def random_outputs(queries: int = 7, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, Frame]:
    generator = torch.Generator().manual_seed(3)
    class_probs = (3 * torch.randn(queries, classes + 1, generator=generator)).softmax(-1)
    masks = 4 * torch.randn(queries, 6, 8, generator=generator)
    return class_probs, masks, Frame(padded=(24, 32), valid=(20, 29), original=(31, 45))


def full_size(masks: torch.Tensor, frame: Frame) -> torch.Tensor:
    """All masks at once, as the papers' code does it."""
    large = F.interpolate(masks[None], frame.padded, mode="bilinear", align_corners=False)
    large = large[..., : frame.valid[0], : frame.valid[1]]
    return F.interpolate(large, frame.original, mode="bilinear", align_corners=False)[0].sigmoid()


@pytest.fixture(params=[1 << 26, 1], ids=["one chunk", "chunks of one"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
def test_semantic_equals_the_full_size_formula() -> None:
    class_probs, masks, frame = random_outputs()
    scores = torch.einsum("qc,qhw->chw", class_probs[:, :-1], full_size(masks, frame))
    found = semantic(class_probs, masks, frame)
    assert found.dtype == np.int64 and found.shape == frame.original
    np.testing.assert_array_equal(found, scores.argmax(0).numpy())


@pytest.mark.usefixtures("_chunks")
def test_panoptic_equals_the_full_size_formula() -> None:
    class_probs, masks, frame = random_outputs()
    things = torch.tensor([True, False, True, False, False])
    found = panoptic(class_probs, masks, frame, things=things, object_threshold=0.3, overlap_threshold=0.2)
    scores, labels = class_probs.max(-1)
    keep = (labels != 5) & (scores > 0.3)
    large, scores, labels = full_size(masks, frame)[keep], scores[keep], labels[keep].tolist()
    owner = (scores[:, None, None] * large).argmax(0)
    expected = np.full(frame.original, -1)
    for query in range(len(labels)):
        mine, solid = owner == query, large[query] >= 0.5
        if (mine & solid).any() and mine.sum() / solid.sum() >= 0.2:
            expected[mine & solid] = query if things[labels[query]] else 100 + labels[query]
    assert len(np.unique(expected)) > 3, "the case must have several segments"
    pairs = set(zip(expected.ravel().tolist(), found.labels.ravel().tolist(), strict=True))
    assert (
        len(pairs) == len(np.unique(expected)) == len(found.segments) + 1
    )  # the same partition, other numbers
    assert {f for e, f in pairs if e == -1} == {0}


@pytest.mark.usefixtures("_chunks")
def test_instances_equal_the_full_size_formula() -> None:
    class_probs, masks, frame = random_outputs()
    things = torch.tensor([True, False, True, False, False])
    found = instances(class_probs, masks, frame, things=things, top_k=12)
    large = full_size(masks, frame)
    flat = sorted(((float(class_probs[q, c]), q, c) for q in range(7) for c in range(5)), reverse=True)[:12]
    expected = []
    for score, query, label in flat:
        inside = large[query] > 0.5
        if things[label]:
            expected.append((score * float(large[query][inside].mean()), label, inside.numpy()))
    expected.sort(key=lambda e: -e[0])
    np.testing.assert_allclose(found.scores, [e[0] for e in expected], rtol=1e-4)
    np.testing.assert_array_equal(found.labels, [e[1] for e in expected])
    np.testing.assert_array_equal(found.masks, np.stack([e[2] for e in expected]))


def test_more_instances_asked_than_pairs_exist() -> None:
    class_probs, masks, frame = random_outputs(queries=2, classes=1)
    assert len(instances(class_probs, masks, frame, things=torch.tensor([True]), top_k=100).scores) == 2


@pytest.mark.usefixtures("_chunks")
def test_referring_takes_the_nearest_query_of_each_phrase() -> None:
    _, masks, frame = random_outputs()
    similarity = torch.zeros(7, 3)
    similarity[4, 0] = similarity[1, 1] = similarity[4, 2] = 1
    found = referring(similarity, masks, frame)
    np.testing.assert_array_equal(found, (full_size(masks, frame)[[4, 1, 4]] > 0.5).numpy())


def test_order_of_queries_does_not_matter() -> None:
    class_probs, masks, frame = random_outputs()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(
        semantic(class_probs, masks, frame), semantic(class_probs[order], masks[order], frame)
    )
    things = torch.ones(5, dtype=torch.bool)
    one, two = (
        instances(c, m, frame, things=things, top_k=9)
        for c, m in ((class_probs, masks), (class_probs[order], masks[order]))
    )
    np.testing.assert_allclose(one.scores, two.scores, rtol=1e-6)
    np.testing.assert_array_equal(one.masks, two.masks)


def test_padding_is_cut_away() -> None:
    """A mask in the padding only is empty in the picture."""
    masks = torch.full((1, 8, 8), -8.0)
    masks[:, :, 5:] = 8
    frame = Frame(padded=(16, 16), valid=(16, 9), original=(32, 18))
    assert not referring(torch.ones(1, 1), masks, frame).any()


@pytest.mark.parametrize("rule", ["semantic", "panoptic", "instances", "referring", "masks"])
def test_no_tensor_holds_more_than_a_few_full_size_masks(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixty queries all at once would be 60 masks; three fit a chunk."""
    frame = Frame(padded=(128, 128), valid=(96, 128), original=(150, 200))
    size = frame.original[0] * frame.original[1]
    monkeypatch.setattr(postprocess, "CHUNK_ELEMENTS", 3 * size)
    generator = torch.Generator().manual_seed(0)
    class_probs = (3 * torch.randn(60, 4, generator=generator)).softmax(-1)
    logits = torch.randn(60, 16, 16, generator=generator)
    run = {
        "semantic": lambda: semantic(class_probs[:4], logits[:4], frame),
        "panoptic": lambda: panoptic(
            class_probs, logits, frame, things=THINGS, object_threshold=0, overlap_threshold=0
        ),
        "instances": lambda: instances(class_probs, logits, frame, things=THINGS, top_k=8),
        "referring": lambda: referring(torch.eye(60)[:, :4], logits, frame),
        "masks": lambda: postprocess.masks(logits[:5], frame),
    }[rule]
    with _Largest() as seen:
        run()
    assert size <= seen.elements <= 3 * size


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made
