"""How large a model is, before it is made: parameters by part, multiply-adds, memory of a training step.

All is counted on PyTorch's meta device, where tensors have shapes and no numbers, so a recipe for many GPUs
is measured on a laptop in seconds. Time is not: it has to be measured where the work is done.

Letters: `B` images, `H W` pixels, `O` latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from schemas.jobs import ModelConfig, TrainConfig
from schemas.tasks import NEEDS, STREAM_FIELDS
from xdecoder.model.decoder import Outputs, Pixels, Request
from xdecoder.model.files import unfetched
from xdecoder.model.xdecoder import XDecoder

FLOAT_BYTES = 4
ADAM_BYTES = 16  # a trained weight, its gradient and AdamW's two moments, float32 each


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a job's model and training step need.

    parameters         by part, largest first; `trained` of them learn
    segmenting         of them, what masks and classes come from once the names are read: as MaskFormer,
                       OneFormer and ZegFormer count
    untold             of the same model without task tokens: as X-Decoder counts
    multiply_adds      of one picture of side `side`, encoded and asked one request without words
    weights_bytes      of a GPU: weights, gradients and AdamW's state
    activations_bytes  of a GPU: what is kept for the gradient of its share of the pictures, a request each.
                       An upper estimate: in float32 and with attention written out; losses and words add to
                       it
    """

    parameters: dict[str, int]
    trained: int
    segmenting: int
    untold: int
    side: int
    multiply_adds: int
    weights_bytes: int
    activations_bytes: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


def measure(config: ModelConfig, train: TrainConfig) -> Size:
    """The size of a training job. Nothing is fetched, made or read."""
    model = _unmade(config)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    side = -(-train.augment.image_size // model.stride) * model.stride
    counter = FlopCounterMode(display=False)
    with counter:
        kept = _kept_bytes(model, side) * train.batch.segmentation
    if any(NEEDS[task] in STREAM_FIELDS["image_text"] for task in train.tasks):
        kept += _kept_bytes(model, train.augment.image_text_size) * train.batch.image_text
    frozen = sum(parts.values()) - trained
    return Size(
        parameters=dict(sorted(parts.items(), key=lambda item: -item[1])),
        trained=trained,
        segmenting=_segmenting(model),
        untold=sum(p.numel() for p in _unmade(config.model_copy(update={"task_tokens": False})).parameters()),
        side=side,
        multiply_adds=counter.get_total_flops() // 2,  # papers count a multiply-add once, PyTorch twice
        weights_bytes=trained * ADAM_BYTES + frozen * FLOAT_BYTES,
        activations_bytes=kept // train.num_workers,
    )


def _unmade(config: ModelConfig) -> XDecoder:
    with torch.device("meta"):
        model = XDecoder(unfetched(config))
    return model.to("meta")


def _segmenting(model: XDecoder) -> int:
    """The parameters that a gradient of masks and class probabilities reaches."""
    pixels, outputs = _asked(model, 2 * model.stride)
    closed = model.config.classes
    classes = torch.arange(closed + 1) if closed else torch.zeros(2, model.config.text_width)
    rows = outputs.images
    answers = model.pairs(outputs.final, pixels, rows, classes.to(rows.device))
    taught = [p for p in model.parameters() if p.requires_grad]
    told = torch.stack([x.sum() for x in answers if x.requires_grad]).sum()
    reached = torch.autograd.grad(told, taught, allow_unused=True)
    return sum(p.numel() for p, gradient in zip(taught, reached, strict=True) if gradient is not None)


def _asked(model: XDecoder, side: int) -> tuple[Pixels, Outputs]:
    """One picture, and one request without words."""
    device = model.task_ids.device
    images = torch.zeros(1, 3, side, side, device=device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    task = torch.zeros(1, model.config.text_width, device=device) if model.config.task_tokens else None
    pixels = model.encode(images, torch.zeros_like(images[:, 0], dtype=torch.bool))
    return pixels, model.decoder(pixels, Request(pattern="segmentation", images=rows, task=task))


def _kept_bytes(model: XDecoder, side: int) -> int:
    """What autograd keeps of one picture and the masks of every prediction; each tensor counts once."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept.setdefault(storage, tensor)  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pixels, outputs = _asked(model, side)
        for prediction in outputs.predictions:
            model.masks(prediction, pixels, outputs.images)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def lines(size: Size) -> list[str]:
    """As a job file's comment: what `--dry-run` prints behind the resolved file."""
    parts = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in size.parameters.items() if count >= 5000)
    told = size.untold != size.total
    gib = [b / 2**30 for b in (size.weights_bytes, size.activations_bytes)]
    return [
        f"# parameters: {size.total / 1e6:.2f} M ({size.trained / 1e6:.2f} M trained): {parts}",
        f"# {size.segmenting / 1e6:.2f} M answer segmentation once names are read, as MaskFormer, OneFormer "
        "and ZegFormer count" + f"; {size.untold / 1e6:.2f} M without task tokens, as X-Decoder does" * told,
        f"# multiply-adds: {size.multiply_adds / 1e9:.1f} G for a picture of {size.side} x {size.side}",
        f"# memory of a GPU, estimated: {sum(gib):.1f} GiB ({gib[0]:.1f} weights, gradients and AdamW; "
        f"at most {gib[1]:.1f} kept of the pictures for the gradient)",
    ]
