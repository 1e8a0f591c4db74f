"""Runs under random faults, each compared to the last bit with one that nothing disturbed.

    python benchmarks/soak.py --minutes 30
    python benchmarks/soak.py --kills 50      # that many actors killed, over runs with 1, 2 and 3 of them

A round makes one run of a tiny model in a new directory. Its command is given again and again; meanwhile actors are killed
or paused, drivers are killed, stopped or paused until another one takes over, second drivers are started, and between two
commands files are flipped, cut short or removed. Every few rounds the storage fails at random instead, in one process. Then
the command is given once more and left alone: it has to succeed, ``fisher-ray verify`` has to find nothing, and matrices,
spectra, summary and table have to be those of the undisturbed run. What was drawn follows from ``--seed``; when it strikes
does not. Exit code 1 at any difference; what differs is kept.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import pyarrow.parquet as pq
import ray

import jobs
from fisher_ray import cost, storage
from fisher_ray.cli import COMPLETE, FAILED, QUARANTINED, REFUSED, STOPPED
from fisher_ray.storage import Storage

TASK_BYTES = 1_500
CORPUS_BYTES = 90_000
# Drivers of a round that may be disturbed before one is left alone.
DISTURBED = 4
# Receipts of which more are there than one damaging takes.
_TELLING = 9
TIMEOUT = 300


class Mismatch(Exception):  # noqa: N818  it is a finding
    """A run that ended otherwise than an undisturbed one."""


class Soak:
    """The rounds of one call, and what has been counted."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.rounds = 0
        self.model = jobs.save_model(folder / "model")
        self.corpus = folder / "docs.txt"
        self.corpus.write_text(jobs.some_text(CORPUS_BYTES))
        self.address = jobs.address()
        self.output = folder / "undisturbed"
        start = time.monotonic()
        self.until_complete(1)
        self.seconds = time.monotonic() - start
        self.truth = jobs.Stored(self.output)
        self.tasks = len(self.truth.receipts)
        self.compare()
        print(f"undisturbed: {self.tasks} tasks, {self.seconds:.1f} s; seed {seed}", flush=True)

    # ---- one run -----------------------------------------------------------------------------------------------------

    def start(self, actors: int) -> subprocess.Popen[str]:
        """The command, on the cluster of this process."""
        flags = ("--model", self.model, "--corpus", self.corpus, "--output", self.output, "--max-actors", actors)
        # As many attempts as it takes: that a task is given up after three is not what is tried here.
        more = ("--max-attempts", 1000, "--retry-quarantined")
        return jobs.command("run", *map(str, (*flags, *more)), task_bytes=TASK_BYTES, RAY_ADDRESS=self.address)

    def until_complete(self, actors: int) -> None:
        """Give the command once more, disturbing nothing."""
        for _ in range(3):
            process = self.start(actors)
            _, err, code = self.ended(process)
            if code == COMPLETE:
                return
            if code != REFUSED:  # the lease of a driver that is just about to see that it is superseded
                raise Mismatch(f"undisturbed driver ended with {code}: {err[-2000:]}")
            self.ends["refused at the end"] += 1
            time.sleep(5)
        raise Mismatch("refused again and again, with no other driver there")

    def ended(self, process: subprocess.Popen[str]) -> tuple[str, str, int]:
        """What a process said to either side, and its exit code."""
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise Mismatch(f"a driver did not end in {TIMEOUT} s: {out[-2000:]} {err[-2000:]}") from None
        return out, err, process.returncode

    def disturbed_end(self, process: subprocess.Popen[str]) -> None:
        """Wait for a disturbed driver and check that it said no more than it may."""
        _, err, code = self.ended(process)
        names = {
            COMPLETE: "complete", FAILED: "failed", REFUSED: "refused", STOPPED: "stopped", QUARANTINED: "quarantined",
            -signal.SIGKILL: "killed", -signal.SIGTERM: "terminated before it could listen",
        }  # fmt: skip
        if code not in names or "Traceback" in err:
            raise Mismatch(f"a disturbed driver ended with {code}: {err[-2000:]}")
        if code == FAILED:
            print(f"  said: {err.strip()[-300:]}", flush=True)
        self.ends[names[code]] += 1

    def compare(self) -> None:
        """Against the undisturbed run, and against the run's own receipts."""
        out, err, code = self.ended(jobs.command("verify", str(self.output)))
        if code != COMPLETE:
            raise Mismatch(f"verify ended with {code}: {out[-1000:]} {err[-1000:]}")
        stored = jobs.Stored(self.output)
        if stored.bits() != self.truth.bits():
            raise Mismatch("matrices or spectra")
        summaries = [pq.read_table(run.folder / "reduced/summary.parquet") for run in (stored, self.truth)]
        if not summaries[0].equals(summaries[1]):
            raise Mismatch("summary")
        if not stored.table.equals(self.truth.table) or stored.counts() != self.truth.counts():
            raise Mismatch("table of positions, or counts")

    @property
    def done(self) -> int:
        return len(list(self.output.glob("done/[0-9]*.json")))

    def reached(self, process: subprocess.Popen[str], tasks: int) -> bool:
        """Wait until so many tasks are done; false where the driver ended before."""
        deadline = time.monotonic() + TIMEOUT
        while self.done < tasks and time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            time.sleep(0.005)
        return process.poll() is None

    def actors(self) -> list[int]:
        """Worker processes of this process's cluster that hold an actor."""
        found = []
        for pid in jobs.descendants(os.getpid()):
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Actor"):
                    found.append(pid)
            except OSError:  # it has ended
                continue
        return found

    # ---- faults while a driver runs ----------------------------------------------------------------------------------

    def send(self, pid: int, number: int) -> bool:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def kill_actor(self, process: subprocess.Popen[str], actors: int) -> None:
        if found := self.actors():
            self.faults["actor killed"] += self.send(self.random.choice(found), signal.SIGKILL)

    def kill_actors(self, process: subprocess.Popen[str], actors: int) -> None:
        for pid in self.actors():
            self.faults["actor killed"] += self.send(pid, signal.SIGKILL)

    def pause_actor(self, process: subprocess.Popen[str], actors: int) -> None:
        if found := self.actors():
            pid = self.random.choice(found)
            if self.send(pid, signal.SIGSTOP):
                self.faults["actor paused"] += 1
                time.sleep(self.random.uniform(0.2, 3))
                self.send(pid, signal.SIGCONT)

    def kill_driver(self, process: subprocess.Popen[str], actors: int) -> None:
        self.faults["driver killed"] += self.send(process.pid, signal.SIGKILL)

    def stop_driver(self, process: subprocess.Popen[str], actors: int) -> None:
        self.faults["driver told to stop"] += self.send(process.pid, signal.SIGTERM)

    def second_driver(self, process: subprocess.Popen[str], actors: int) -> None:
        self.faults["second driver"] += 1
        self.disturbed_end(self.start(actors))

    def pause_driver(self, process: subprocess.Popen[str], actors: int) -> None:
        """Until another one has taken the run over; then there are two, and one of them has to find out."""
        if self.send(process.pid, signal.SIGSTOP):
            self.faults["driver paused until another took over"] += 1
            other = self.start(actors)
            try:
                deadline = time.monotonic() + 60
                while other.poll() is None and time.monotonic() < deadline and len(self._leases()) < 2:
                    time.sleep(0.05)
            finally:
                self.send(process.pid, signal.SIGCONT)
            self.disturbed_end(other)

    def _leases(self) -> set[str]:
        """Leases that were ever seen in this round."""
        self._seen |= {path.name for path in self.output.glob("lease/*.json")}
        return self._seen

    # ---- faults between drivers --------------------------------------------------------------------------------------

    def damage(self) -> None:
        files = sorted(path for path in self.output.rglob("*") if path.is_file() and path.name[0] != ".")
        if self.done < _TELLING:
            # Without run.json only receipts tell what run it was; without those either the command refuses, and says so.
            files = [path for path in files if path.name != "run.json" and path.parent.name != "done"]
        for path in self.random.sample(files, min(len(files), self.random.choice((1, 1, 2, 3, 8)))):
            raw = bytearray(path.read_bytes())
            how = self.random.choice(("bit flipped", "cut short", "removed"))
            if how == "removed" or not raw:
                path.unlink()
            elif how == "cut short":
                path.write_bytes(raw[: self.random.randrange(len(raw))])
            else:
                raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
                path.write_bytes(raw)
            self.faults[f"file {how}"] += 1
            self.log(f"{how}: {path.relative_to(self.output)}")

    def log(self, what: str) -> None:
        self.story.append(what)

    # ---- rounds ------------------------------------------------------------------------------------------------------

    @contextmanager
    def round(self, name: str) -> Iterator[None]:
        """A new output directory; at the end it is complete and compared."""
        self.rounds += 1
        self.output = self.folder / f"round-{self.rounds:04d}"
        self.story: list[str] = [name]
        self._seen: set[str] = set()
        yield
        self.compare()
        shutil.rmtree(self.output)

    def disturb(self) -> None:
        """One round of random faults."""
        actors = self.random.choice((1, 2, 3))
        with self.round(f"{actors} actors"):
            for _ in range(self.random.randint(1, DISTURBED)):
                process = self.start(actors)
                acts = self.random.choices(
                    (self.kill_actor, self.kill_actors, self.pause_actor, self.kill_driver, self.stop_driver,
                     self.second_driver, self.pause_driver),
                    weights=(6, 2, 3, 5, 3, 1, 1),
                    k=self.random.randint(1, 4),
                )  # fmt: skip
                at = self.done
                for act in acts:
                    at = self.random.randint(at, self.tasks)
                    if not self.reached(process, at):
                        break
                    time.sleep(self.random.uniform(0, 0.5))
                    self.log(f"{act.__name__} at {self.done} tasks")
                    act(process, actors)
                self.disturbed_end(process)
                if self.random.random() < 0.7:
                    self.damage()
            if self.random.random() < 0.5:
                self.until_complete(actors)
                self.damage()  # of a run that was complete
            self.until_complete(actors)

    def flaky(self) -> None:
        """One round in this process over a storage that fails now and then, before or after it has done what was asked."""
        with self.round("flaky storage"):
            rate = self.random.choice((0.02, 0.1, 0.2))

            def failing(real: Callable[..., Any]) -> Callable[..., Any]:
                def maybe(*args: Any) -> Any:
                    if self.random.random() < rate / 2:
                        self.faults["storage failed"] += 1
                        raise OSError(errno.EIO, "flaky")
                    result = real(*args)
                    if self.random.random() < rate / 2:
                        self.faults["storage failed after the fact"] += 1
                        raise OSError(errno.EIO, "flaky")
                    return result

                return maybe

            with (
                mock.patch.object(cost, "MIN_TASK_BYTES", TASK_BYTES),
                mock.patch.object(storage, "_DELAYS", (0.001,) * 6),
                mock.patch.object(Storage, "_write", failing(Storage._write)),
                mock.patch.object(Storage, "_create", failing(Storage._create)),
            ):
                jobs.run_here(jobs.settings(self.model, self.corpus, self.output, max_attempts=1000))

    def kill_some(self, actors: int, kills: int) -> None:
        """One round in which nothing but actors is killed, after every few tasks."""
        with self.round(f"{actors} actors, {kills} kills"):
            process = self.start(actors)
            before = self.faults["actor killed"]
            while self.faults["actor killed"] - before < kills:
                if not self.reached(process, self.done + self.random.randint(0, max(1, self.tasks // (2 * kills)))):
                    break
                time.sleep(self.random.uniform(0, 0.3))
                self.kill_actor(process, actors)
            _, err, code = self.ended(process)
            if code != COMPLETE:
                self.ends["driver gave up"] += 1
                print(f"  said: {err.strip()[-300:]}", flush=True)
                self.until_complete(actors)
            else:
                self.ends["complete in one go"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--kills", type=int, help="kill so many actors and do nothing else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where runs that differ are left (a temporary folder)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=args.keep))
    mismatches = 0
    start = time.monotonic()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        soak = Soak(folder, args.seed)
        while (
            soak.faults["actor killed"] < args.kills
            if args.kills is not None
            else time.monotonic() - start < 60 * args.minutes
        ):
            try:
                if args.kills is not None:
                    left = args.kills - soak.faults["actor killed"]
                    soak.kill_some(1 + soak.rounds % 3, min(left, 6))
                elif soak.rounds % 5 == 4:
                    soak.flaky()
                else:
                    soak.disturb()
            except (Mismatch, AssertionError, OSError, ValueError, RuntimeError) as error:
                mismatches += 1
                print(
                    f"MISMATCH in {soak.output}: {type(error).__name__}: {error}", *soak.story, sep="\n  ", flush=True
                )
            print(
                f"{(time.monotonic() - start) / 60:5.1f} min, {soak.rounds} rounds, {mismatches} mismatches, "
                f"{sum(soak.faults.values())} faults; last: {', '.join(soak.story)}",
                flush=True,
            )
    finally:
        ray.shutdown()
    for name, count in sorted((soak.faults + soak.ends).items()):
        print(f"{count:6d} {name}")
    print(f"{soak.rounds} rounds, {mismatches} mismatches")
    if not mismatches:
        shutil.rmtree(folder)
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
