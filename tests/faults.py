"""Runs under faults: what is to go wrong, who is killed, and what every attempt at a task left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
from fisher_ray.cli import main
from jobs import Stored

TASK_BYTES = 3_000


@dataclass
class Place:
    """A folder for one run; the faults in it are those of poison/sitecustomize.py."""

    folder: Path
    model: str
    corpus: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def stored(self) -> Stored:
        return Stored(self.run)

    def faults(self, by_task: dict[Any, str]) -> None:
        """From now on; ``"*"`` is every task."""
        (self.folder / "faults.json").write_text(json.dumps(by_task))

    def argv(self, *more: Any) -> list[str]:
        flags = ("--model", self.model, "--corpus", self.corpus, "--output", self.run)
        return ["run", *map(str, (*flags, *more))]

    def here(self, *more: Any) -> int:
        """The command in this process, on the cluster that it has joined."""
        return main(self.argv(*more))

    def command(self, *more: Any, **variables: str) -> subprocess.Popen[str]:
        """The command in a process of its own; the workers of a Ray that it starts have the faults too."""
        poisoned = {"PYTHONPATH": jobs.python_path(jobs.POISON), **variables}
        return jobs.command(*self.argv(*more), task_bytes=TASK_BYTES, **poisoned)

    def attempts(self, what: str = "start") -> list[dict[str, Any]]:
        """What was noted of attempts: task, process and time of each."""
        path = self.folder / "attempts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [noted for noted in map(json.loads, lines) if noted["what"] == what]

    def tries(self) -> Counter[int]:
        """How often each task was begun."""
        return Counter(noted["task"] for noted in self.attempts())

    def done(self) -> dict[int, bytes]:
        """Receipts by task, as they are stored."""
        found = {}
        for path in self.run.glob("done/[0-9]*.json"):
            found[int(path.stem)] = path.read_bytes()
        return found

    def quarantined(self) -> dict[int, dict[str, Any]]:
        """Notes of tasks that were given up."""
        return {int(path.stem): json.loads(path.read_text()) for path in self.run.glob("quarantine/*.json")}


def until(condition: Callable[[], Any], timeout: float = 120.0) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise TimeoutError(f"not within {timeout:.0f} s")


def actors() -> list[int]:
    """Processes of actors below this one, whether they have loaded their model or not."""
    found = []
    for pid in jobs.descendants(os.getpid()):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Actor"):
                found.append(pid)
        except OSError:  # it has ended
            continue
    return found


@dataclass(frozen=True)
class Storm:
    """A run while actors were killed.

    Attributes:
        code: of the command.
        killed: actors.
        tasks: of the plan.
        attempts: at tasks, that were begun.
        seconds: of the whole run.
    """

    code: int
    killed: int
    tasks: int
    attempts: int
    seconds: float

    @property
    def repeated(self) -> int:
        """Attempts more than one a task."""
        return self.attempts - self.tasks


def run_under_kills(place: Place, num_actors: int, kills: int, seed: int) -> Storm:
    """A run in this process, with SIGKILL to random actors at random times.

    Each comes up to half a second, about a task, over the number of actors after a random number of tasks, another one each
    time, is done: an actor that takes longer to load than kills are apart would never do anything. So there must be more than
    twice as many tasks as kills.
    """
    place.faults({"*": "slow"})
    ended = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        chance = random.Random(seed)
        while not ended.is_set() and not (place.run / "run.json").exists():
            time.sleep(0.01)
        tasks = place.stored.description["tasks"]
        for mark in sorted(chance.sample(range(tasks // 2 + 1), kills)):
            while not ended.is_set() and (len(place.done()) < mark or not actors()):
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.5 / num_actors))
            found = actors()
            while not found and not ended.is_set():  # the last one killed was the only one there
                time.sleep(0.01)
                found = actors()
            if not ended.is_set():
                killed.append(chance.choice(found))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    begun = time.monotonic()
    killer.start()
    try:
        # So many kills may hit one task more often than a task may fail by itself.
        code = place.here("--max-actors", num_actors, "--max-attempts", kills + 3)
    finally:
        ended.set()
        killer.join()
    tasks = place.stored.description["tasks"]
    return Storm(code, len(killed), tasks, place.tries().total(), time.monotonic() - begun)
