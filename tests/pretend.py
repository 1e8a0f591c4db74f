"""Pretend devices, to run a model over several of them where there is none.

A tensor on a pretend device reports it as its device (they are named ``meta:0``, ``meta:1``, ..., names that torch takes
without hardware) and keeps its numbers in an ordinary tensor. Every operation checks, more strictly than CUDA does, that
its tensors are on one device, and then runs on the CPU: so a pass over several devices either gives the very numbers of
one device or names the operation that mixed two.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

_CPU = torch.device("cpu")


class Placed(Tensor):
    """A tensor on a pretend device."""

    data_here: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, device: torch.device) -> Placed:
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype}
        placed = torch.Tensor._make_wrapper_subclass(cls, data.shape, device=device, **layout)
        placed.data_here = data
        return placed

    def __init__(self, data: Tensor, device: torch.device): ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    # A scalar in main memory goes with tensors anywhere, as it does on CUDA.
    devices = {x.device for x in given if isinstance(x, Placed) or x.ndim}
    copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if len(devices) > 1 and not copies:
        raise RuntimeError(f"{func} mixes tensors on {', '.join(sorted(map(str, devices)))}.")
    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": _CPU}
    elif copies:
        target = args[0].device
    else:
        target = next(iter(devices), _CPU)
    inner_args, inner_kwargs = tree_map_only(Placed, lambda x: x.data_here, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if target == _CPU:
        return out
    out = tree_map_only(Tensor, lambda x: Placed(x, target), out)
    return return_and_correct_aliasing(func, args, kwargs, out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """Between lists and tensors torch goes by ways of its own: none to a device called meta, none from a subclass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1]).to(args[0].device)]
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


def pretend_devices() -> ExitStack:
    """While this context lasts, ``meta:0``, ``meta:1``, ... are devices that hold numbers."""
    stack = ExitStack()
    stack.enter_context(_Operations())
    stack.enter_context(_Lists())
    return stack
