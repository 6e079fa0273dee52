"""Laws of survival: killed and resumed is the same as uninterrupted; what is broken on disk is not
believed.
"""

import datetime
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_trainer import fit, trainer
from tiny import MODEL, VOCABULARY, endless, files_of_at_most, samples, train_config

from benchmarks.resume import Course, Streams, live
from jobs.pretrain import stoppable
from jobs.worker import Duty, MissingRank, following, listen, missing_named, rewind
from schemas.jobs import PretrainJob, load
from schemas.records import Sample
from xdecoder.model.files import load_model
from xdecoder.tasks import BatchMaker
from xdecoder.training import checkpoint
from xdecoder.training.batch import Batch
from xdecoder.training.checkpoint import CheckpointError, Checkpoints
from xdecoder.training.trainer import NonFiniteLoss, Trainer

PLAIN = {"tasks": ("captioning",)}


def course_streams(of: Trainer) -> Streams:
    share = 4 // of.world_size
    own = slice(of.rank * share, (of.rank + 1) * share)

    def part(make: BatchMaker, chosen: Sequence[Sample], seeds: Sequence[int]) -> Batch:
        return make(chosen[own], seeds[own])

    makers = {stream: partial(part, of.make_batch(stream)) for stream in of.streams}
    return {s: endless(m, samples(), position=of.positions[s]) for s, m in makers.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "kills"), [(1, 2), (2, 1)])
def test_killed_and_resumed_is_the_same_to_the_last_bit(world: int, kills: int, tmp_path: Path) -> None:
    course = Course(
        model=MODEL,
        train=train_config(steps=16, checkpoint_every=3),
        vocabulary=VOCABULARY,
        streams=course_streams,
    )
    whole = live(course, tmp_path / "whole", world=world)
    assert len(whole.curve) == 16
    pieces = live(course, tmp_path / "pieces", world=world, kills=kills, seed=1, pace_s=whole.seconds / 4)
    assert pieces.kills == kills
    assert pieces.same(whole)


def checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, keep=keep, facts={"job": {}})


def test_a_checkpoint_is_of_the_step_at_which_it_was_begun(tmp_path: Path) -> None:
    of, saved = trainer(**PLAIN), checkpoints(tmp_path)
    fit(of, 1)
    weights = {name: x.clone() for name, x in of.model.state_dict().items()}
    saved.save(of)
    fit(of, 3)
    saved.wait()
    again = trainer(**PLAIN)
    assert checkpoints(tmp_path).restore(again) == tmp_path / "step-00000001"
    assert again.step == 1
    assert all(torch.equal(x, weights[name]) for name, x in again.model.state_dict().items())


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    of, saved = trainer(**PLAIN), checkpoints(tmp_path)
    for step, metric in enumerate((None, 5.0, 40.0, 30.0, None, 20.0)):
        of.step = step
        saved.save(of, metric)
    saved.wait()
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["2", "4", "5"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of, saved = trainer(**PLAIN), checkpoints(tmp_path)
    for step in (3, 6):
        of.step = step
        saved.save(of)
        saved.wait()
    state, manifest = (tmp_path / "step-00000006" / name for name in ("rank0.pt", "checkpoint.json"))
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "flip": lambda: state.write_bytes(data),
        "cut": lambda: state.write_bytes(data[:-100]),
        "missing": state.unlink,
        "manifest": lambda: manifest.write_text('{"files":'),
    }[damage]()
    again = trainer(**PLAIN)
    with caplog.at_level(logging.WARNING):
        checkpoints(tmp_path).restore(again)
    assert again.step == 3
    assert "step-00000006 is damaged" in caplog.text and "going back" in caplog.text


def test_what_a_kill_left_unfinished_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009").mkdir(parents=True)
    assert checkpoints(tmp_path).restore(trainer(**PLAIN)) is None
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_once_is_survived_and_twice_stops_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of, saved = trainer(**PLAIN), checkpoints(tmp_path)
    saved.save(of)
    saved.wait()
    for step in (1, 2):
        of.step = step
        with files_of_at_most(10_000), caplog.at_level(logging.WARNING):
            saved.save(of)
            if step == 1:
                saved.wait()
                assert "no checkpoint at step 1, the training goes on" in caplog.text
            else:
                with pytest.raises(CheckpointError, match="twice in a row.*File too large.*rank0.pt"):
                    saved.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]
    saved.save(of)  # there is room again
    saved.wait()
    assert checkpoints(tmp_path).restore(trainer(**PLAIN)) == tmp_path / "step-00000002"


def test_a_loss_that_is_no_number_rewinds_once_and_passes_over_the_samples(tmp_path: Path) -> None:
    of, saved = trainer(**PLAIN), checkpoints(tmp_path)
    fit(of, 2)
    saved.save(of)
    good = {name: x.clone() for name, x in of.model.state_dict().items()}
    fit(of, 3)
    weight = of.model.caption_embed.weight
    for attempt in (1, 2):
        spoil = weight.register_hook(lambda gradient: gradient * float("nan"))
        with pytest.raises(NonFiniteLoss) as bad:
            fit(of, 5)
        spoil.remove()
        if attempt == 2:
            assert not rewind(of, saved, bad.value)
            break
        assert rewind(of, saved, bad.value)
        assert (of.step, of.rewound, of.positions["image_text"]) == (2, 3, 16)
        assert all(torch.equal(x, good[name]) for name, x in of.model.state_dict().items())
        fit(of, 4)
        saved.save(of)  # that it went back is remembered
        saved.wait()
        of = trainer(**PLAIN)
        saved.restore(of)
        assert of.rewound == 3
        weight = of.model.caption_embed.weight


def test_a_training_may_refuse_to_rewind(tmp_path: Path) -> None:
    of, saved = trainer(**PLAIN, rewind=False), checkpoints(tmp_path)
    saved.save(of)
    assert not rewind(of, saved, NonFiniteLoss("nan"))


def test_the_average_of_the_weights_is_kept_resumed_and_exported(tmp_path: Path) -> None:
    settings = {**PLAIN, "ema_decay": 0.5, "export": "average"}
    of, name = trainer(**settings), "caption_embed.weight"
    fit(of, 2)
    checkpoint.save(of, tmp_path)
    again = trainer(**settings)
    checkpoint.restore(again, tmp_path)
    assert all(torch.equal(x, of.average[n]) for n, x in again.average.items())
    checkpoint.export(again, tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    assert torch.equal(model.state_dict()[name], of.average[name])
    assert not torch.equal(of.average[name], of.model.state_dict()[name])


def test_the_average_follows_its_formula() -> None:
    of = trainer(**PLAIN, ema_decay=0.75)
    average = of.model.caption_embed.weight.detach().clone()
    for step in (1, 2, 3):
        fit(of, step)
        average = 0.75 * average + 0.25 * of.model.caption_embed.weight.detach()
    torch.testing.assert_close(of.average["caption_embed.weight"], average)


def test_an_average_is_exported_only_where_one_is_kept() -> None:
    with pytest.raises(ValueError, match="export: average needs ema_decay"):
        train_config(export="average")


def test_training_pauses_for_what_is_due_and_nowhere_else() -> None:
    train = train_config(steps=10, checkpoint_every=4, validation={"every": 6, "limit": 1}, profile=(1, 5))
    stops = [0]
    while stops[-1] < train.steps:
        stops.append(following(train, stops[-1]))
    assert stops == [0, 1, 4, 5, 6, 8, 10]


def _all_but_one_come(rank: int, folder: Path) -> None:
    patience = datetime.timedelta(seconds=2)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=3, timeout=patience)
    roll = dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        with missing_named(roll, lambda: "step 7", patience_s=2):
            dist.all_reduce(torch.ones(1))
    except MissingRank as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_all_but_one_come, args=(rank, tmp_path)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks[::2]:
        process.join(60)
    for process in ranks:
        process.kill()
        process.join()
    said = (tmp_path / "0.txt").read_text()
    assert said.startswith("step 7: a rank does not come:") and "Ranks 1 failed" in said
    assert "check rank 0" in (tmp_path / "2.txt").read_text()


def test_sigterm_stops_all_ranks_after_the_step_at_hand(tmp_path: Path) -> None:
    job = load(Path(__file__).resolve().parents[1] / "jobs" / "pretrain.yaml")
    assert isinstance(job, PretrainJob)
    duty = Duty(job=job, store=tmp_path, version="", vocabulary=VOCABULARY, cpus=1, folder=tmp_path)
    of, before = trainer(**PLAIN), signal.getsignal(signal.SIGTERM)
    with stoppable(duty):
        threading.Thread(target=listen, args=(of, duty), daemon=True).start()
        fit(of, 1)
        assert not of.stopping
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 30
        while not of.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        fit(of, 6)
        assert of.stopping and of.step == 2
    assert signal.getsignal(signal.SIGTERM) == before
    assert not duty.stop.exists(), "the next submission would stop at once"
