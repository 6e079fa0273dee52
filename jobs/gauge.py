"""What is known of a running training beside its losses: memory, pace, place in the epoch, rejects."""

from collections.abc import Collection

import psutil
import torch

from pipelines.catalog import DatasetVersion
from pipelines.stream import members
from schemas.tasks import Stream
from xdecoder.model.size import measure
from xdecoder.training.trainer import StepReport, Trainer

# Dense bfloat16 operations a second, from NVIDIA's data sheets (A100 2020, L40S and H100 2023, H200 2024,
# B200 2025); the name as `torch.cuda.get_device_name` gives it holds the key.
PEAK = {"A100": 312e12, "L40S": 362e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
GB = 1e9


class Gauge:
    """Of one rank. Sizes of the epochs and the work of a step are counted once.

    elsewhere   streams that do not draw from `data` alone, and so have no epochs of it
    """

    def __init__(self, trainer: Trainer, data: DatasetVersion, elsewhere: Collection[Stream]) -> None:
        self.trainer, self.process = trainer, psutil.Process()
        self.epochs = {
            stream: len(members(data, "train", stream))
            for stream in trainer.streams
            if stream not in elsewhere
        }
        self.peak = _peak(trainer)
        self.operations = _operations(trainer) if self.peak else 0.0

    def read(self, report: StepReport) -> dict[str, float]:
        """Metrics to log with a report."""
        of = self.trainer
        found = {f"epoch/{stream}": of.positions[stream] / size for stream, size in self.epochs.items()}
        found["rejects"] = float(of.rejects)
        if of.rewound is not None:
            found["rewound"] = float(of.rewound)
        found["memory/process_gb"] = self.process.memory_info().rss / GB
        found["samples_per_s_per_device"] = report.metrics["samples_per_s"] / of.world_size
        if torch.cuda.is_available():
            found["memory/device_gb"] = torch.cuda.max_memory_allocated() / GB
        if self.peak:
            found["share_of_peak"] = self.operations / of.world_size / report.metrics["step_s"] / self.peak
        return found


def _peak(trainer: Trainer) -> float:
    """Operations a second of this rank's device; 0 where that is not known, or not in use (float32)."""
    if not trainer.device.startswith("cuda") or trainer.config.precision != "bf16":
        return 0.0
    name = torch.cuda.get_device_name(trainer.device)
    return next((peak for key, peak in PEAK.items() if key in name), 0.0)


def _operations(trainer: Trainer) -> float:
    """Of a step, of all ranks: at least, as a picture may be asked more than the one request that is counted.

    A multiply-add is two operations, and the gradient costs twice the forward pass.
    """
    train = trainer.config
    size = measure(trainer.model.config, train)
    sides = {"segmentation": train.augment.image_size, "image_text": train.augment.image_text_size}
    pictures = sum(getattr(train.batch, s) * (sides[s] / size.side) ** 2 for s in trainer.streams)
    return 3 * 2 * size.multiply_adds * pictures
