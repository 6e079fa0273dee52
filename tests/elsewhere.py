"""A CUDA device that is not there: the processor holds what says it lies on it, and computes with it.

Operations that would fail on a real one for having an operand here and one there fail here, too. Gradients
cannot be had: autograd asks the real device for its streams.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

PLACE = torch.device("cuda", 0)
aten = torch.ops.aten
_BETWEEN = (aten._to_copy.default, aten.copy_.default)  # what may have one operand here and one there


class There(torch.Tensor):
    """A tensor of the device; `held` is where its numbers are."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "There":
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            dtype=held.dtype,
            device=PLACE,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees what is made from nothing, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    # one number may lie anywhere, as in PyTorch
    here = [tuple(t.shape) for t in tensors if not isinstance(t, There) and t.dim()]
    if there and here and func not in _BETWEEN:
        raise RuntimeError(f"{func}: {[tuple(t.shape) for t in there]} lie on {PLACE}, {here} do not")
    goes = bool(there)
    if func is aten.copy_.default:
        goes = isinstance(args[0], There)
    elif kwargs.get("device") is not None:
        goes = torch.device(kwargs["device"]).type == PLACE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with _disable_current_modes():
        found = func(*_held(args), **_held(dict(kwargs)))
    if not goes:
        return found
    same = {id(t.held): t for t in there}  # what is written in place
    return tree_map_only(torch.Tensor, lambda t: same[id(t)] if id(t) in same else There(t), found)


def _held(tree: Any) -> Any:
    return tree_map_only(There, lambda t: t.held, tree)


@contextmanager
def elsewhere() -> Iterator[str]:
    """Inside, the name of the device can be given to whatever takes one."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.object(torch.cuda, "_lazy_init"), torch.no_grad(), _Factories():
            yield str(PLACE)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)
