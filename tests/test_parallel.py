"""Laws of many ranks and of accumulation: what they learn is what one process learns from the joined batch.

The batches are uneven: some shares hold no phrase, no caption, no mask at all. Every pixel is looked at,
because points are drawn by each rank for itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import exact_trainer, run_ranks, steps_of
from tiny import MODEL, VOCABULARY, endless, samples, train_config
from torch import Tensor

from schemas.jobs import BackboneConfig
from xdecoder.model.files import load_model
from xdecoder.training import checkpoint, parallel
from xdecoder.training.joined import Rehearsal
from xdecoder.training.trainer import Trainer

STEPS, FEW = 20, 6
WAYS = ("ddp", "fsdp")


def weights_of(of: Trainer) -> dict[str, Tensor]:
    return {name: parallel.full(x).clone() for name, x in of.model.state_dict().items()}


def both_ways(rank: int, folder: Path) -> None:
    """Twenty steps each way; FSDP2 stops in the middle, and goes on in a new trainer from a checkpoint."""
    found: dict[str, Any] = {}
    for way in WAYS:
        of = exact_trainer(rank=rank, world=2, parallel=way)
        for _ in range(rank + 1):  # unreadable samples in the first batches
            of.skip()
        rows = steps_of(of, STEPS // 2, rank=rank, world=2)
        if way == "fsdp":
            checkpoint.save(of, folder / "state")
            torch.distributed.barrier()
            of = exact_trainer(rank=rank, world=2, parallel=way)
            checkpoint.restore(of, folder / "state")
        rows += steps_of(of, STEPS // 2, rank=rank, world=2)
        assert of.rejects == 3, "each once, those of both ranks, also after going on"
        found[way] = (rows, weights_of(of))
    checkpoint.export(of, folder / f"model{rank}")
    torch.save(found, folder / f"{rank}.pt")


def same_losses(expected: list[dict[str, float]], found: list[dict[str, float]]) -> None:
    """The loss of every step to 1e-5. Its terms and gradient may stray further in float32, where rounding
    moves a ReLU or a cell of masked attention across its threshold; a wrong count would show in the second
    digit.
    """
    for row, wanted in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def same_weights(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """To a twentieth of what the steps may change; but softmax does not see a key's bias, whose gradient is
    rounding, which Adam makes large.
    """
    for name, weight in expected.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(
                found[name], weight, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.fixture(scope="module")
def alone() -> tuple[list[dict[str, float]], Trainer]:
    of = exact_trainer()
    return steps_of(of, STEPS), of


def test_two_ranks_learn_what_one_process_learns(
    alone: tuple[list[dict[str, float]], Trainer], tmp_path: Path
) -> None:
    expected, whole = alone
    for ways in run_ranks(both_ways, tmp_path):
        for rows, weights in ways.values():
            same_losses(expected, rows)
            same_weights(weights_of(whole), weights)
    exported, _ = load_model(tmp_path / "model0")
    same_weights(weights_of(whole), exported.state_dict())
    assert not (tmp_path / "model1").exists()
    one = exact_trainer()  # and shares are read by a process alone
    checkpoint.restore(one, tmp_path / "state")
    same_losses(expected[STEPS // 2 : STEPS // 2 + 1], steps_of(one, 1))


@pytest.mark.parametrize("parts", [2, 4])
def test_an_accumulated_step_is_that_of_the_large_batch(
    parts: int, alone: tuple[list[dict[str, float]], Trainer]
) -> None:
    expected, _ = alone
    of = exact_trainer(accumulate=parts)
    same_losses(expected[:FEW], steps_of(of, FEW))


def test_a_rehearsal_leaves_no_trace_and_is_what_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backbone that drops paths by chance, and keeps statistics of what it has seen."""
    chance = BackboneConfig(name="resnet10t", options={"drop_path_rate": 0.5})
    config = train_config(tasks=("panoptic", "retrieval"), accumulate=2)
    of = Trainer(MODEL.model_copy(update={"backbone": chance}), config, VOCABULARY)
    meet, same = Rehearsal.meet, list[bool]()

    def meeting(self: Rehearsal, x: Tensor) -> list[Tensor]:
        if self.playing:
            same.append(x.detach().equal(self.rows[self.part][self.call]))
        return meet(self, x)

    monkeypatch.setattr(Rehearsal, "meet", meeting)
    drawn = {s: endless(of.make_batch(s), samples(), 2) for s in of.streams}
    of.objective.train()
    of._gradients([tuple(next(stream)[0] for stream in drawn.values()) for _ in range(2)])
    seen = {int(b) for n, b in of.model.named_buffers() if n.endswith("num_batches_tracked")}
    assert seen == {4} and same and all(same)  # two parts of two streams


def both_ways_in_parts(rank: int, folder: Path) -> None:
    found = []
    for way in WAYS:
        of = exact_trainer(rank=rank, world=2, parallel=way, accumulate=2)
        found.append(steps_of(of, 2, rank=rank, world=2))
    torch.save(found, folder / f"{rank}.pt")


def test_two_ranks_accumulate_to_the_same_step(
    alone: tuple[list[dict[str, float]], Trainer], tmp_path: Path
) -> None:
    for ways in run_ranks(both_ways_in_parts, tmp_path):
        for rows in ways:
            same_losses(alone[0][:2], rows)


def test_blocks_are_the_repeated_parts() -> None:
    model = exact_trainer().model
    found = parallel.blocks(model)
    assert set(model.text.blocks) | set(model.decoder.layers) <= set(found)
    assert not any(b is not other and other in set(b.modules()) for b in found for other in found)


def test_activation_checkpointing_changes_nothing_that_is_learned(
    alone: tuple[list[dict[str, float]], Trainer],
) -> None:
    of = exact_trainer(activation_checkpointing=True)
    for row, wanted in zip(steps_of(of, 3), alone[0][:3], strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)


def test_compiled_blocks_learn_the_same(alone: tuple[list[dict[str, float]], Trainer]) -> None:
    """Without the code generator, which takes minutes: what is compiled is whole, and the same."""
    of = exact_trainer()
    parallel.compile_blocks(of.model, backend="eager")
    (row,) = steps_of(of, 1)
    assert row == pytest.approx(alone[0][0], rel=1e-5)
    assert any(block._compiled_call_impl is not None for block in parallel.blocks(of.model.text))
