"""Models whose blocks leave their weights where they are stored, and fetch them for each of their passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from safetensors import safe_open
from torch import Tensor, nn


def map_rewritten(model: nn.Module, folder: str) -> None:
    """Have weights that loading wrote to a folder mapped, so that the folder can go; their bytes go with the process.

    Those that the library has in another form than they are stored in, experts mostly, which it joins.
    """
    maps = [hook.weights_map for module in model.modules() for hook in _fetching_hooks(module)]
    for loader in {id(each.dataset): each.dataset for each in maps}.values():
        for name, stored in loader.index.items():
            if Path(stored.get("safetensors_file", "")).parent == Path(folder):
                with safe_open(stored["safetensors_file"], framework="pt") as file:
                    loader.state_dict[name] = file.get_tensor(stored["weight_name"])


def stream_blocks(blocks: nn.ModuleList) -> None:
    """Have blocks that a device map left to main memory or disk fetch their weights when they run, and drop them afterwards.

    In place of accelerate's hooks, which do so for each module of a block, and on a GPU give back what the allocator keeps
    with each weight. Whoever still needs the weights then holds them: a graph, for its backward passes.
    """
    for block in blocks:
        weights = [weight for module in block.modules() for weight in _taken_over(module)]
        if weights:
            # A partial and no closure, so that a copy of the model is one: its block fetches into its own modules.
            block.forward = functools.partial(_with_weights, weights, block.forward)


@dataclass(frozen=True)
class _Stored:
    """A parameter whose numbers are there while its block runs."""

    module: nn.Module
    name: str
    read: Callable[[], Tensor]
    device: torch.device
    absent: nn.Parameter

    def fetch(self) -> None:
        value = self.read()
        if self.device.type == "cuda":
            # A copy from pinned memory is queued, and the next is read meanwhile; from other memory each waits for the GPU.
            value = value.pin_memory()
        value = value.to(self.device, self.absent.dtype, non_blocking=True)
        setattr(self.module, self.name, nn.Parameter(value, requires_grad=False))

    def drop(self) -> None:
        setattr(self.module, self.name, self.absent)


def _taken_over(module: nn.Module) -> Iterator[_Stored]:
    """What accelerate's hook fetches for this module; from now on it only brings the arguments to the device."""
    for hook in _fetching_hooks(module):
        hook.offload = False
        for name, parameter in module.named_parameters(recurse=False):
            read = functools.partial(hook.weights_map.__getitem__, name)
            yield _Stored(module, name, read, torch.device(hook.execution_device), parameter)


def _fetching_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    every = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [each for each in every if isinstance(each, AlignDevicesHook) and each.offload]


def _with_weights(weights: Sequence[_Stored], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        for weight in weights:
            weight.fetch()
        return forward(*args, **kwargs)
    finally:
        for weight in weights:
            weight.drop()
