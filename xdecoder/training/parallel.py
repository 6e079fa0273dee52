"""How a model is run in training: on many ranks with all weights on each (DDP) or a share of them (FSDP2),
with activation checkpointing, compiled.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from xdecoder.model.xdecoder import XDecoder
from xdecoder.training import joined


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts, innermost: members of lists of modules of one class that have parts of their
    own.
    """
    lists = [list(m.children()) for m in model.modules() if type(m) in (nn.ModuleList, nn.Sequential)]
    alike = [part for parts in lists if len({type(p) for p in parts}) == 1 for part in parts]
    found = [part for part in alike if any(True for _ in part.children())]
    return [b for b in found if not any(b is not other and other in set(b.modules()) for other in found)]


def save_memory(model: XDecoder) -> None:
    """Activation checkpointing: what a block keeps for its gradient is computed again when that is due."""
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: XDecoder, backend: str = "inductor") -> None:
    """torch.compile each of the blocks that look at whole pictures and texts.

    The decoder and the losses stay as they are: their shapes change with what each batch tells of.
    """
    for part in (model.backbone, model.pixel_decoder, model.text):
        for block in blocks(part):
            block.compile(backend=backend)


def distribute(objective: nn.Module, model: XDecoder, parallel: str, device: str) -> nn.Module:
    """The objective as each rank runs it."""
    return _WAYS[parallel](objective, model, device)


def _ddp(objective: nn.Module, model: XDecoder, device: str) -> nn.Module:
    return DistributedDataParallel(objective, find_unused_parameters=True)


def _fsdp(objective: nn.Module, model: XDecoder, device: str) -> nn.Module:
    """The blocks of the picture's side are gathered one by one, the rest for the whole step: how often the
    others run depends on what a rank's batch says, and all ranks have to come to every gathering.

    Scalars cannot be cut: they stay whole, and `finish` averages their gradients.
    """
    mesh = init_device_mesh(device.split(":")[0], (dist.get_world_size(),))
    whole = {p for p in model.parameters() if not p.ndim}
    shard = partial(fully_shard, mesh=mesh, ignored_params=whole)
    for part in (model.backbone, model.pixel_decoder):
        for block in blocks(part):
            shard(block)
    shard(objective, reshard_after_forward=False)
    return objective


_WAYS: Mapping[str, Callable[[nn.Module, XDecoder, str], nn.Module]] = {"ddp": _ddp, "fsdp": _fsdp}


@contextmanager
def _unsynchronised(objective: FSDPModule) -> Any:
    objective.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        objective.set_requires_gradient_sync(True)


def collecting(objective: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Inside, gradients are collected; ranks exchange them with the last micro-batch alone."""
    if last:
        return nullcontext()
    if isinstance(objective, DistributedDataParallel):
        return objective.no_sync()
    return _unsynchronised(objective) if isinstance(objective, FSDPModule) else nullcontext()


@contextmanager
def without_trace(objective: nn.Module, device: str) -> Iterator[None]:
    """What goes through inside changes no running statistics, and draws the numbers that come again
    behind it.
    """
    kept = [buffer.clone() for buffer in objective.buffers()]
    with torch.random.fork_rng([device] if device.startswith("cuda") else []):
        yield
    for buffer, before in zip(objective.buffers(), kept, strict=True):
        buffer.copy_(before)


def finish(objective: nn.Module, parameters: Iterable[nn.Parameter], clip: float) -> Tensor:
    """Gradients after the last backward pass -> those of the joined batch, clipped; returns their norm."""
    learned = [p for p in parameters if p.requires_grad]
    if not isinstance(objective, FSDPModule):
        return nn.utils.clip_grad_norm_(learned, clip)
    cut = [p for p in learned if isinstance(p, DTensor)]
    whole = [p for p in learned if not isinstance(p, DTensor)]
    for p in whole:  # every rank comes with each of them, also where nothing was to be learned from
        p.grad = joined.total(torch.zeros_like(p) if p.grad is None else p.grad) / joined.world()
    norms = [
        nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        for group in (cut, whole)
        if group
    ]
    norm = torch.stack([full(n) for n in norms]).norm()
    for group in (cut, whole):
        nn.utils.clip_grads_with_norm_(group, clip, norm)
    return norm


def full(x: Tensor) -> Tensor:
    """The whole of a tensor of which this rank may hold a part: all ranks have to ask for it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """What this rank holds of it."""
    return x.to_local() if isinstance(x, DTensor) else x
