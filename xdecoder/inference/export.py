"""Segmentation with a fixed class list as one graph (torch.export): tensors in, tensors out, no text encoder.

What the graph gives is what `postprocess` takes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from schemas.tasks import TASKS, Task
from xdecoder.inference.predictor import embed_classes
from xdecoder.model.xdecoder import XDecoder


class FixedClasses(nn.Module):
    """float32[B, 3, H, W] in [0, 1] and bool[B, H, W] (True is padding) -> class probabilities float32[B, O,
    K + 1], no object last, and mask logits float32[B, O, h, w].
    """

    classes: Tensor
    task: Tensor

    def __init__(self, model: XDecoder, classes: Sequence[str], task: Task = "panoptic") -> None:
        super().__init__()
        with torch.no_grad():
            sentence = model.text(model.task_ids).sentence[TASKS.index(task)]
        self.model = model
        closed = model.config.classes
        if closed and len(classes) != closed:
            raise ValueError(
                f"this model's class list is closed: it has {closed} classes, {len(classes)} are given"
            )
        self.register_buffer("classes", torch.arange(closed + 1) if closed else embed_classes(model, classes))
        self.register_buffer("task", sentence)

    def forward(self, images: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(images.shape[0], device=images.device)
        pixels = self.model.encode(images, padding)
        final = self.model.ask(pixels, "segmentation", rows, self.task.expand(images.shape[0], -1)).final
        return self.model.pairs(final, pixels, rows, self.classes)


def export_segmentation(
    model: XDecoder, classes: Sequence[str], size: tuple[int, int], task: Task = "panoptic"
) -> ExportedProgram:
    """A graph for pictures of one size (height, width; multiples of the stride), in batches of any number.

    torch.export.save(export_segmentation(model, ["car", "road"], (512, 512)), "segmentation.pt2")
    """
    example = (torch.zeros(2, 3, *size), torch.zeros(2, *size, dtype=torch.bool))
    place = model.task_ids.device
    batch = Dim("batch", min=1)
    return torch.export.export(
        FixedClasses(model, classes, task).eval(),
        tuple(x.to(place) for x in example),
        dynamic_shapes=({0: batch}, {0: batch}),
    )
