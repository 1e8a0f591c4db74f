"""Ray clusters of several nodes on one machine: each node a tree of processes that is killed as a whole, as machines are.

Nothing here touches another Ray: every cluster has its own ports and folder, and what ends is what it started.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from ray.util.state import list_nodes

import jobs  # before Ray: it says how Ray authenticates

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
_LIBC = ctypes.CDLL(None)
_ADOPT_ORPHANS = 36  # prctl's PR_SET_CHILD_SUBREAPER

# A lost node is noticed after 6 s instead of 19. Not less: a busy machine's nodes would count as lost.
WATCHFUL = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "6",
}
# What nodes have in common on a cluster whose machines have the package; jobs bring it along.
INSTALLED = {"PYTHONPATH": str(jobs.ROOT)}


def until(condition: Callable[[], Any], seconds: float, what: str, during: Tree | None = None) -> Any:
    """What a condition gives once it holds, while a process that would make it hold still runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        if during is not None and during.process.poll() is not None:
            raise AssertionError(f"ended before {what}: {during.said}")
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s in vain until {what}: {during.said if during else ''}")


# ---- processes ---------------------------------------------------------------------------------------------------------


class Tree:
    """A command and all that descends from it, daemons too; what it says, with the times of its lines."""

    def __init__(self, *argv: Any, cwd: str | Path = "/", **variables: str):
        ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])  # jobs say "python"
        # Where the package comes from is the test's to say, and 120 columns are what a job's log has.
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS", "COLUMNS")}
        self.process = subprocess.Popen(
            [str(arg) for arg in argv], cwd=cwd, env={**kept, **ours, "PATH": path, **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: _LIBC.prctl(_ADOPT_ORPHANS, 1),
        )  # fmt: skip
        self.pid = self.process.pid
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def said(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def code(self, seconds: float = 400) -> int:
        """The exit code; with all that was said."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.said}") from None
        self._reader.join(10)
        return code

    def actors(self, doing: bytes = b"") -> list[int]:
        """Workers of runs below it; ``.answer``: those at a task."""
        found = []
        for pid in jobs.descendants(self.pid):
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Actor" + doing):
                    found.append(pid)
        return found

    def end(self) -> None:
        """As when the power goes: all stand still at once, so that none hears of another's death, and none is left."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGSTOP)  # the foster parent has to outlive them all
        for number in (signal.SIGSTOP, signal.SIGKILL):
            end = time.monotonic() + 20
            while time.monotonic() < end and (left := self._left(number)):
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(0.02)
        self.process.kill()
        self.process.wait(10)

    def _left(self, number: int) -> list[int]:
        """Processes below it that a signal has not reached yet."""
        return [
            pid
            for pid in jobs.descendants(self.pid)
            if state(pid) not in ("T" if number == signal.SIGSTOP else "") + "ZX"
        ]


def state(pid: int) -> str:
    """The kernel's letter for it, X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def fisher_ray(*argv: Any, **variables: str) -> Tree:
    """``fisher-ray argv``."""
    return Tree(sys.executable, "-m", "fisher_ray.cli", *argv, **INSTALLED, **variables)


# ---- clusters ----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """Below those that the kernel gives out by itself: one of these may be taken before it is used."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


@dataclass
class Cluster:
    """A head, and nodes that come and go."""

    port: int
    dashboard_port: int
    folder: Path
    head: Tree
    nodes: list[Tree] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def jobs_address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def add(self, *options: Any) -> Tree:
        """A node more. Of two of one machine that start at once, one may not come up: wait for each."""
        before = self.alive()
        argv = [RAY, "start", "--block", "--address", self.address, *node_options(), *options]
        self.nodes.append(Tree(*argv, **self.variables))
        until(lambda: self.alive() > before, 60, "the node is there", self.nodes[-1])
        return self.nodes[-1]

    def actors(self) -> list[int]:
        """Workers on all nodes."""
        return [pid for tree in (self.head, *self.nodes) for pid in tree.actors()]

    def alive(self) -> int:
        """Nodes, the head among them."""
        return sum(node.state == "ALIVE" for node in list_nodes(address=self.jobs_address))


def node_options() -> list[Any]:
    """No more memory than these tests need, and no port that another node of this machine has."""
    return [
        "--disable-usage-stats", "--object-store-memory", 80_000_000, "--dashboard-agent-listen-port", free_port(),
        "--min-worker-port", 0, "--max-worker-port", 0,
    ]  # fmt: skip


@contextmanager
def cluster(*options: Any, autoscaling: dict[str, Any] | None = None, **variables: str) -> Iterator[Cluster]:
    """A head with ``ray start``'s options; ended with all its nodes and all that they started."""
    # Sockets lie in it, whose names must be short.
    folder = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))
    port, dashboard_port = free_port(), free_port()
    if autoscaling is not None:
        autoscaling["provider"]["gcs_address"] = f"127.0.0.1:{port}"
        (folder / "autoscaling.yaml").write_text(json.dumps(autoscaling))
        options += ("--autoscaling-config", folder / "autoscaling.yaml")
    head = Tree(
        RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", port, "--dashboard-port",
        dashboard_port, "--ray-client-server-port", free_port(), "--temp-dir", folder, *node_options(), *options,
        **variables,
    )  # fmt: skip
    made = Cluster(port, dashboard_port, folder, head, variables=variables)
    try:
        until(lambda: _answers(f"{made.jobs_address}/api/jobs/"), 90, "the job server answers", head)
        until(lambda: made.alive() == 1, 60, "the head is counted", head)
        yield made
    finally:
        for tree in [*made.nodes, head]:
            tree.end()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    with suppress(OSError), urlopen(url, timeout=5) as answer:
        return answer.status == 200
    return False


# ---- hosts in namespaces of their own ----------------------------------------------------------------------------------


def can_make_hosts() -> bool:
    return os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter"))


class Host:
    """A machine of its own as far as network, processes and name go; files are shared, as on NFS."""

    def __init__(self, name: str, ip: str):
        self.name, self.ip = name, ip
        _ip("netns", "add", name)
        apart = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts")
        boot = f"hostname {name}; echo up; exec sleep infinity"
        self._machine = Tree("ip", "netns", "exec", name, *apart, "sh", "-c", boot)
        until(lambda: "up" in self._machine.said, 20, f"{name} is up", self._machine)
        (self._init,) = (pid for pid in jobs.descendants(self._machine.pid) if _inner_pid(pid) == "1")
        self.trees: list[Tree] = []

    def run(self, *argv: Any, **variables: str) -> Tree:
        """A command on it."""
        self.trees.append(
            Tree("nsenter", "--target", self._init, "--net", "--pid", "--mount", "--uts", *argv, **variables)
        )
        return self.trees[-1]

    def freeze(self, number: int) -> None:
        """SIGSTOP and SIGCONT for all that runs on it.

        nsenter stops itself once it sees its child stopped: it must not be stopped as well, and must go on last, lest it see
        that only then.
        """
        for tree in self.trees:
            pids = jobs.descendants(tree.pid)
            for pid in pids if number == signal.SIGSTOP else (*pids, tree.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def link(self, to: str) -> None:
        """``down`` cuts it off, ``up`` brings it back."""
        _ip("-n", self.name, "link", "set", "eth0", to)
        if to == "up":  # Ray asks for the way to the world to know its own address
            _ip("-n", self.name, "route", "replace", "default", "dev", "eth0")

    def end(self) -> None:
        """Switch it off."""
        for tree in (*self.trees, self._machine):
            tree.end()
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", self.name)


def _inner_pid(pid: int) -> str:
    """Of a process, in the innermost namespace."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid:"))
    return line.split()[-1]


def _ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True, timeout=20)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two machines on one wire."""
    hosts: list[Host] = []
    try:
        for i, letter in enumerate("ab", 1):
            hosts.append(Host(f"fr{os.getpid()}{letter}", f"10.87.0.{i}"))
        one, other = hosts
        _ip("link", "add", "eth0", "netns", one.name, "type", "veth", "peer", "eth0", "netns", other.name)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.ip}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.link("up")
        yield one, other
    finally:
        for host in hosts:
            host.end()
