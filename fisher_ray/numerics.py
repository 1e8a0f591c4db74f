"""How this process computes: precision, kernels and threads, which PyTorch keeps for all that run in it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# Attention kernels of CUDA that are chosen among.
_KERNELS = ("mem_efficient", "cudnn", "flash")


def deterministic_kernels() -> None:
    """From here on the same inputs give the same bits on a GPU as well; for worker processes, before a model is loaded.

    Own-position passes write by distinct indices and add through none, so nothing in them depends on the order of
    threads but matrix products that cuBLAS splits over streams. What models and their attention may bring: sums over
    the tokens of an expert (``index_add``, the backward pass of indexing), which are atomic otherwise, also on several
    CPU threads; and attention kernels whose backward pass knows no fixed order, or on a GPU takes none while it may warn
    instead. What has no other way only warns:
    a model that no one can run is worse than one whose last bits are not the same.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(not torch.cuda.is_available())  # a CPU's has one


@contextmanager
def settings_restored() -> Iterator[None]:
    """Afterwards threads and kernels are again what they were: for work that sets them in a process of somebody else's."""
    cuda: Any = torch.backends.cuda
    threads, workspace = torch.get_num_threads(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    kernels = [getattr(cuda, f"{kind}_sdp_enabled")() for kind in _KERNELS]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        for kind, enabled in zip(_KERNELS, kernels, strict=True):
            getattr(cuda, f"enable_{kind}_sdp")(enabled)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast and no TF32: float32 products are float32 products, whichever way the caller asked for less.

    Autocast is a thread's own affair. TF32 is the process's: the first thread to come turns it off, the last to leave back on.
    """
    cuda: AbstractContextManager[Any] = (
        torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    )
    with torch.autocast("cpu", enabled=False), cuda, _IEEE:
        yield


class _WithoutTF32:
    """Turns TF32 off for as long as anybody is inside."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[str] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [self._turned_off(each) for each in self._products()]
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for each, own in zip(self._products(), self._before, strict=True):
                    each.fp32_precision = own

    @staticmethod
    def _turned_off(products: Any) -> str:
        """Turn TF32 off here; what to set again: none where what was read is what holds for all, whatever that becomes."""
        before: str = products.fp32_precision
        products.fp32_precision = "none"
        inherited = products.fp32_precision == before
        products.fp32_precision = "ieee"
        return "none" if inherited else before

    @staticmethod
    def _products() -> tuple[Any, ...]:
        backends: Any = torch.backends
        return backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul


_IEEE = _WithoutTF32()
