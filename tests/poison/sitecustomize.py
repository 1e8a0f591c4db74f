"""Faults for workers. Python imports this by itself where the folder is on PYTHONPATH; nothing in the package knows of it.

Beside a run's directory, ``faults.json`` says what is to happen: ``{"3": "kill", "*": "slow"}``. Without it everything goes
as usual; with it every attempt at a task is noted in ``attempts.jsonl``.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20


def patch(worker: Any) -> None:
    """Make ``Worker.compute`` do as faults.json says."""
    compute = worker.compute

    @functools.wraps(compute)
    def compute_or_not(self: Any, task: Any, *more: Any) -> Any:
        place = Path(self.config.output).parent
        if not (place / "faults.json").exists():
            return compute(self, task, *more)
        faults = json.loads((place / "faults.json").read_text())
        note(place, task.id, "start")
        _as_a_broken_device_does()
        for name in (faults.get("*"), faults.get(str(task.id))):
            if name is not None:
                FAULTS[name](place, task.id)
        receipt = compute(self, task, *more)
        note(place, task.id, "end")
        return receipt

    worker.compute = compute_or_not


def note(place: Path, task: int, what: str) -> None:
    """One line, whole whoever else writes."""
    line = json.dumps({"task": task, "what": what, "pid": os.getpid(), "time": time.time()}) + "\n"
    handle = os.open(place / "attempts.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, line.encode())
    os.close(handle)


def first(place: Path, task: int) -> bool:
    """Whether nobody has asked before."""
    try:
        (place / f"once-{task}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


# ---- faults ------------------------------------------------------------------------------------------------------------


def fail(place: Path, task: int) -> None:
    raise RuntimeError("poisoned on purpose")


def kill(place: Path, task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(place: Path, task: int) -> None:
    time.sleep(100_000)


def slow(place: Path, task: int) -> None:
    time.sleep(0.5)


def slow_once(place: Path, task: int) -> None:
    if first(place, task):
        time.sleep(60.0)


def wait(place: Path, task: int) -> None:
    while not (place / "go").exists():
        time.sleep(0.02)


def allocate(place: Path, task: int) -> None:
    """Ask for more than this process may have; big pieces, so that others in it hardly notice."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    (used,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(used.split()[1]) * 1024 + 1024 * MIB, limits[1]))
    try:
        held = [bytearray(512 * MIB) for _ in range(64)]
        raise RuntimeError(f"{len(held)} pieces of memory in spite of the limit")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def eat(place: Path, task: int) -> None:
    """Use memory until Ray's monitor acts; never more than a machine for tests has to spare."""
    held = []
    for _ in range(int((place / "eat_mib").read_text()) // 256):
        held.append(b"x" * (256 * MIB))
        time.sleep(0.1)
    time.sleep(5.0)
    raise RuntimeError("the memory monitor has looked on")


_broken = False


def break_device(place: Path, task: int) -> None:
    """What a sticky CUDA error does to its process."""
    global _broken
    if first(place, task):
        _broken = True
        _as_a_broken_device_does()


def _as_a_broken_device_does() -> None:
    if _broken:
        import torch

        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


FAULTS = {f.__name__: f for f in (fail, kill, hang, slow, slow_once, wait, allocate, eat, break_device)}


# ---- as soon as there is a worker to patch -------------------------------------------------------------------------------


class _WhenImported(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "fisher_ray.worker":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_patch(module: Any) -> None:
            load(module)
            patch(module.Worker)

        spec.loader.exec_module = load_and_patch  # type: ignore[method-assign]
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _WhenImported())
