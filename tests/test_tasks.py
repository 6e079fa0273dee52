"""Laws of the table: every task has a row that trains on its own, and an exam whose scores have a meaning."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainer import fit, trainer
from tiny import TAXONOMY, samples, train_config

from schemas.jobs import EvaluateConfig
from schemas.tasks import NEEDS, STREAM_FIELDS, TASKS, Task
from xdecoder.inference.evaluator import evaluate
from xdecoder.inference.predictor import Predictor
from xdecoder.tasks import ALTERNATIVES, TABLE
from xdecoder.training import checkpoint
from xdecoder.training.trainer import Trainer

# the score that a task is known by
HEADLINES: dict[Task, str] = {
    "semantic": "mIoU",
    "instance": "AP",
    "panoptic": "PQ",
    "referring": "cIoU",
    "retrieval": "text_to_image_R1",
    "captioning": "F1",
    "vqa": "accuracy",
}


def predictor(of: Trainer) -> Predictor:
    return Predictor(of.model, checkpoint.card(of))


def test_the_table_has_a_row_for_every_task() -> None:
    assert tuple(TABLE) == TASKS
    for task, row in TABLE.items():
        assert NEEDS[task] in STREAM_FIELDS[row.stream]
    assert set(ALTERNATIVES) == {task for task in TASKS if NEEDS[task] == "segments"}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_learns_on_its_own_and_passes_its_exam(task: Task) -> None:
    fast = train_config().optim.model_copy(update={"lr": 3e-3, "warmup_steps": 10, "schedule": "cosine"})
    of = trainer(tasks=(task,), steps=40, optim=fast)
    losses = [report.metrics["loss"] for report in fit(of, 40)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])

    config = EvaluateConfig(tasks=(task,), pictures=1, object_threshold=0, batch=3)
    told: list[tuple[str, int, int]] = []
    evaluation = evaluate(
        predictor(of),
        {stream: lambda: iter(samples()) for stream in STREAM_FIELDS},
        config,
        TAXONOMY,
        lambda *progress: told.append(progress),
    )
    assert evaluation.results[0].metric == HEADLINES[task]
    for result in evaluation.results:
        assert result.task == task and result.examples >= 4
        assert math.isfinite(result.value) and 0 <= result.value <= 100, result
        assert result.chance is None or 0 <= result.chance <= 100, result
    assert evaluation.results[0].chance is not None
    assert told and told[-1][0] == task and told[-1][1] == told[-1][2] == 4
    ((name, picture),) = evaluation.pictures
    assert name == f"{task}-tiny-0" and picture.width >= 32


THREADS = """
import os, threading, torch
from test_trainer import trainer
from tiny import samples
from schemas.jobs import AugmentConfig

torch.set_num_threads(4)
learner = trainer(augment=AugmentConfig(image_size=160, image_text_size=160))
makers = [learner.make_batch(stream) for stream in learner.streams]
alone = len(os.listdir("/proc/self/task"))
made, seen = threading.Event(), threading.Event()

def prepare():
    for make in makers:
        make(samples(8, height=160, width=160), list(range(8)))
    made.set()
    seen.wait()

thread = threading.Thread(target=prepare)
thread.start()
made.wait()
print(len(os.listdir("/proc/self/task")) - alone)
seen.set()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux shows them")
def test_a_thread_that_makes_batches_starts_no_others() -> None:
    """With more OpenMP threads than cores all barriers of a training sleep: its step took much longer."""
    command = [sys.executable, "-c", THREADS]
    tests = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "4", "PYTHONPATH": str(tests.parent)}
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1"], done.stderr
