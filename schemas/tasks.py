"""The seven tasks by name, and what a sample must hold to train or score each.

Only names and needs stand here, because every layer speaks of them; what a task *does* is the table of
`xdecoder/tasks.py`.
"""

from typing import Literal, get_args

Task = Literal["semantic", "instance", "panoptic", "referring", "retrieval", "captioning", "vqa"]
TASKS: tuple[Task, ...] = get_args(Task)

# Which field of a SAMPLE (schemas/records.py) a task reads its truth from.
NEEDS: dict[Task, str] = {
    "semantic": "segments",
    "instance": "segments",
    "panoptic": "segments",
    "referring": "referring",
    "retrieval": "captions",
    "captioning": "captions",
    "vqa": "questions",
}

# The two streams of a training step, and the field of a SAMPLE that admits it to each.
Stream = Literal["segmentation", "image_text"]
STREAM_FIELDS: dict[Stream, tuple[str, ...]] = {
    "segmentation": ("segments", "referring"),
    "image_text": ("captions", "questions"),
}
