"""Real clusters on this machine: jobs stopped and killed, nodes lost, nodes that come on demand; always the same bits.

Run by ``pytest -m faults``. Nothing of the package is patched: as many tasks as a small corpus has.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from clusters import (
    INSTALLED,
    RAY,
    WATCHFUL,
    Cluster,
    Host,
    Tree,
    can_make_hosts,
    cluster,
    fisher_ray,
    state,
    two_hosts,
    until,
)
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.job_submission import JobSubmissionClient

import jobs
from jobs import MAX_POSITIONS, ROOT, Stored, gpt2  # noqa: F401

pytestmark = pytest.mark.faults

# What `run` and the published script both can be told.
NUM_SAMPLES, SEQUENCES = 2, 85
# Drivers of one run that are killed, one after the other; the count of benchmarks/README.md is 10.
DRIVER_KILLS = int(os.environ.get("DRIVER_KILLS", "3"))
ONE_GPU = ("--gpus-per-actor", 1, "--device", "cpu")  # a logical one: no such hardware is needed
DEMANDED = ("--min-actors", 1, "--max-actors", 2, *ONE_GPU)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 tasks of a quarter of a second or so; longer ones where more drivers are to be killed."""
    path = tmp_path_factory.mktemp("corpus") / "docs.txt"
    path.write_text(jobs.some_text(130_000 * DRIVER_KILLS))
    return path


@pytest.fixture(scope="module")
def undisturbed(gpt2: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:  # noqa: F811
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    stored, outcome = jobs.run_here(
        jobs.settings(gpt2, corpus, folder, num_samples=NUM_SAMPLES, batch_tokens=SEQUENCES * MAX_POSITIONS)
    )
    assert outcome.tasks >= 32
    return stored


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def flags(gpt2: str, corpus: Path, output: Path) -> list[Any]:  # noqa: F811
    tokens = SEQUENCES * MAX_POSITIONS
    return [
        "--model", gpt2, "--corpus", corpus, "--output", output, "--num-samples", NUM_SAMPLES, "--batch-tokens", tokens
    ]  # fmt: skip


def done(output: Path) -> int:
    return len(list(output.glob("done/[0-9]*.json")))


def when_done(output: Path, tasks: int, run: Tree) -> None:
    until(lambda: done(output) >= tasks, 120, f"{tasks} tasks are done", run)


def together(count: int, actors: Callable[[], list[int]], run: Tree) -> None:
    """Hold workers that have come until there are so many, or the first may be through before the last has started."""
    held: list[int] = []

    def enough() -> bool:
        for pid in set(actors()) - set(held):
            os.kill(pid, signal.SIGSTOP)
            held.append(pid)
        return len(held) >= count

    until(enough, 180, f"{count} workers are there", run)
    for pid in held:
        os.kill(pid, signal.SIGCONT)


def held_at_work(node: Tree, run: Tree) -> int:
    """The worker of a node, stopped in the middle of a task."""
    (pid,) = until(lambda: node.actors(b".answer"), 120, "the node's worker has a task", run)
    os.kill(pid, signal.SIGSTOP)
    return pid


def driver_of(output: Path) -> int | None:
    """The living process that holds the lease."""
    for path in output.glob("lease/[0-9]*.json"):
        with suppress(OSError, ValueError):  # it is being written
            pid = int(json.loads(path.read_text())["pid"])
            if state(pid) not in "ZX":
                return pid
    return None


def same(output: Path, undisturbed: Stored) -> None:
    stored = Stored(output)
    assert stored.bits() == undisturbed.bits()
    assert stored.table.equals(undisturbed.table)


def kept(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("done/[0-9]*.json")}


def still_there(output: Path, before: dict[str, bytes]) -> None:
    now = kept(output)
    assert {name: now[name] for name in before} == before


# ---- jobs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job_server() -> Iterator[Cluster]:
    with cluster("--num-cpus", 2) as made:
        yield made


def submit(server: Cluster, *argv: Any) -> Tree:
    """``fisher-ray submit`` from the folder of the project, as the README says."""
    command = (sys.executable, "-m", "fisher_ray.cli", "submit", "--address", server.jobs_address, "--", *argv)
    return Tree(*command, cwd=ROOT)


def job_of(submission: Tree) -> str:
    return until(lambda: re.search(r"job (raysubmit_\w+):", submission.said), 60, "the job is accepted").group(1)


def test_the_published_script_as_a_job(
    job_server: Cluster, gpt2: str, corpus: Path, output: Path, undisturbed: Stored  # noqa: F811
) -> None:  # fmt: skip
    script = ("python", "jobs/calculate_fisher_matrices.py", "--model_name", gpt2, "--corpus", corpus)
    settings = ("--layer_idx", "all", "--max_seq_len", MAX_POSITIONS, "--output_dir", output)
    settings += ("--num_samples", NUM_SAMPLES, "--batch_size", SEQUENCES)
    address = ("--address", job_server.jobs_address)
    job = Tree(RAY, "job", "submit", *address, "--working-dir", ".", "--", *script, *settings, cwd=ROOT)
    assert job.code() == 0, job.said
    assert "picture:" in job.said and "complete: " in job.said
    same(output, undisturbed)


def test_a_job_is_followed_with_plain_lines(
    job_server: Cluster, flags: list[Any], output: Path, undisturbed: Stored
) -> None:
    job = submit(job_server, "run", *flags, "--max-actors", 1)
    try:
        when_done(output, 1, job)
        (actor,) = job_server.head.actors()
        os.kill(actor, signal.SIGSTOP)  # as slow as it takes for two lines more, on any machine
        until(lambda: job.said.count("computing: ") >= 3, 45, "two lines of progress have come since the first")
        assert done(output) < len(undisturbed.receipts)
        os.kill(actor, signal.SIGCONT)
        assert job.code() == 0, job.said
    finally:
        job.end()
    times = [at for at, line in job.lines if line.startswith("computing: ")]
    assert all(13 < later - earlier < 18 for earlier, later in pairwise(times))
    number = r"[\d,]+"
    progress = re.compile(
        rf"(computing|reducing|complete): {number}/{number} tasks, {number} tokens/s(, [\d:]+ left)?, actors \d+ alive "
        r"\d+ pending, \d+ retried, \d+ quarantined"
    )
    lines = [line for _, line in job.lines if "tokens/s" in line]
    assert lines[-1].startswith("complete: ") and all(progress.fullmatch(line) for line in lines), lines
    assert not re.search("[\r\x1b\u2588\u2501]|it/s", job.said)
    same(output, undisturbed)


def test_bad_input_passes_through(job_server: Cluster, flags: list[Any], output: Path) -> None:
    job = submit(job_server, "run", *flags, "--layers", 9)
    assert job.code(120) == 2, job.said
    (line,) = [line for _, line in job.lines if line.startswith("error:")]
    assert "9" in line and "Traceback" not in job.said
    assert not output.exists()


def test_a_job_stopped_goes_on(job_server: Cluster, flags: list[Any], output: Path, undisturbed: Stored) -> None:
    job = submit(job_server, "run", *flags)
    try:
        when_done(output, 2, job)
        # What `ray job stop` sends; the command itself may take longer to start than the workers need for the rest.
        assert JobSubmissionClient(job_server.jobs_address).stop_job(job_of(job))
        assert job.code(120) == 130, job.said
    finally:
        job.end()
    assert "stopped; what is done is kept, and the same command goes on." in job.said
    assert "job stopped" in job.said and "Traceback" not in job.said
    before = kept(output)
    assert 2 <= len(before) < len(undisturbed.receipts)
    assert json.loads((output / "progress.json").read_text())["state"] == "stopped"
    assert not list(output.glob("lease/*")) and not (output / "reduced").exists()

    again = submit(job_server, "run", *flags)
    assert again.code() == 0, again.said
    assert f"{len(before)} of {len(undisturbed.receipts)} tasks were done before" in again.said
    still_there(output, before)
    assert len(list(output.glob("sums/*"))) == len(
        undisturbed.receipts
    )  # nothing was computed twice, nothing left over
    same(output, undisturbed)


def test_a_job_whose_driver_is_killed(job_server: Cluster, flags: list[Any], output: Path, undisturbed: Stored) -> None:
    draw = random.Random(1)
    before: dict[str, bytes] = {}
    for _ in range(DRIVER_KILLS):
        job = submit(job_server, "run", *flags, "--max-actors", 1)
        try:
            driver = until(lambda: driver_of(output), 90, "a driver works", job)
            # Anywhere between its first moments, with no worker yet, and a few tasks later.
            when_done(output, len(before) + draw.choice([0, 1, 2]), job)
            time.sleep(draw.uniform(0, 0.8))
            os.kill(driver, signal.SIGKILL)
            assert job.code(60) not in (0, 2, 130), job.said
        finally:
            job.end()
        assert "job failed" in job.said
        still_there(output, before)
        # Workers of a driver that is gone may commit what they were at before Ray ends them.
        until(lambda: not job_server.head.actors(), 60, "its workers are gone")
        before = kept(output)
        assert len(before) < len(undisturbed.receipts)
    again = submit(job_server, "run", *flags)
    assert again.code() == 0, again.said
    if before:
        assert f"{len(before)} of {len(undisturbed.receipts)} tasks were done before" in again.said
    still_there(output, before)
    same(output, undisturbed)


def test_a_sweep_as_a_job(job_server: Cluster, gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    """One of four points is killed; the sweep as a whole goes on."""
    other = jobs.save_model(tmp_path / "other", seed=1)
    (tmp_path / "docs.txt").write_text(jobs.some_text(40_000))
    product = {"model": [gpt2, other], "estimator": ["sampled", "exact"]}
    common = {"corpus": [str(tmp_path / "docs.txt")], "num_samples": 2, "max_actors": 1}
    sweep = {"output": str(tmp_path / "sweep"), "side_by_side": 2, "common": common, "product": product}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))

    job = submit(job_server, "jobs/sweep.py", tmp_path / "sweep.yaml")
    try:

        def a_point() -> Path | None:
            return next((p for p in (tmp_path / "sweep").glob("*") if driver_of(p) and done(p) >= 1), None)

        killed = until(a_point, 120, "a point works", job)
        os.kill(driver_of(killed), signal.SIGKILL)
        code = job.code()
    finally:
        job.end()
    points = {path.name: path for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert len(points) == 4 and code not in (0, 2), job.said
    rows = pq.read_table(tmp_path / "sweep/summary.parquet").to_pylist()
    assert {row["point"]: row["code"] for row in rows} == {name: -9 * (name == killed.name) for name in points}
    assert [row["layer"] for row in rows if row["point"] == killed.name] == [None]
    table = job.said[job.said.index("entropy rank") :]
    assert re.search(r"-9 +- +- ", table)

    complete = {name: path for name, path in points.items() if path != killed}
    before = {name: kept(path) for name, path in complete.items()}
    again = submit(job_server, "jobs/sweep.py", tmp_path / "sweep.yaml")
    assert again.code() == 0, again.said
    assert f"{killed.name}: begun" in again.said
    assert {name: kept(path) for name, path in complete.items()} == before
    rows = pq.read_table(tmp_path / "sweep/summary.parquet").to_pylist()
    assert {row["code"] for row in rows} == {0} and len(rows) == 4 * (jobs.LAYERS + 1)
    for name, path in points.items():
        config = json.loads((path / "run.json").read_text())["config"]
        alone = jobs.settings(
            config["model"],
            tmp_path / "docs.txt",
            tmp_path / "alone" / name,
            num_samples=2,
            estimator=config["estimator"],
        )
        same(path, jobs.run_here(alone)[0])


# ---- nodes that are lost -----------------------------------------------------------------------------------------------


def test_a_node_lost(flags: list[Any], output: Path, undisturbed: Stored) -> None:
    """With a single attempt a task: a machine that goes is not the task's failure."""
    with cluster("--num-cpus", 0, **WATCHFUL, **INSTALLED) as made:
        nodes = [made.add("--num-cpus", 1, "--num-gpus", 1) for _ in range(2)]
        flags += ["--max-actors", 2, *ONE_GPU, "--max-attempts", 1]
        run = fisher_ray("run", *flags, RAY_ADDRESS=made.address)
        try:
            together(2, made.actors, run)
            held_at_work(nodes[1], run)
            when_done(output, done(output) + 2, run)
            nodes[1].end()
            assert run.code() == 0, run.said
        finally:
            run.end()
    nothing_was_lost(run, output, undisturbed)


def test_two_workers_share_a_gpu(flags: list[Any], output: Path, undisturbed: Stored) -> None:
    with cluster("--num-cpus", 0, **INSTALLED) as made:
        node = made.add("--num-cpus", 4, "--num-gpus", 1)
        run = fisher_ray("run", *flags, "--gpus-per-actor", 0.5, "--device", "cpu", RAY_ADDRESS=made.address)
        try:
            together(2, node.actors, run)
            assert run.code() == 0, run.said
        finally:
            run.end()
    same(output, undisturbed)


# ---- nodes that come ---------------------------------------------------------------------------------------------------


def test_nodes_come_on_demand_and_leave(flags: list[Any], output: Path, undisturbed: Stored) -> None:
    """From no worker node to two and back, under Ray's autoscaler."""
    autoscaling = {
        "cluster_name": "fake", "max_workers": 4, "idle_timeout_minutes": 0.1, "upscaling_speed": 10.0,
        # All nodes have this machine's address: only their names tell them apart.
        "provider": {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 4},
        },
        "head_node_type": "ray.head.default",
        "auth": {}, "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {},
        "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
        "initialization_commands": [],
    }  # fmt: skip
    fake = {
        "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "0",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    with cluster("--num-cpus", 0, autoscaling=autoscaling, **fake, **INSTALLED) as made:
        run = fisher_ray("run", *flags, *DEMANDED, RAY_ADDRESS=made.address)
        try:
            together(2, made.actors, run)
            assert made.alive() == 3  # each asks for a GPU, and a node has one
            assert run.code() == 0, run.said
        finally:
            run.end()
        until(lambda: made.alive() == 1, 90, "idle nodes have left")
    same(output, undisturbed)


def test_a_node_that_comes_late_is_used(flags: list[Any], output: Path, undisturbed: Stored) -> None:
    with cluster("--num-cpus", 1, **INSTALLED) as made:
        run = fisher_ray("run", *flags, RAY_ADDRESS=made.address)
        try:
            when_done(output, 1, run)
            (first,) = made.head.actors()
            os.kill(first, signal.SIGSTOP)  # from now on whatever is done is done elsewhere
            before = done(output)
            late = made.add("--num-cpus", 1)
            until(late.actors, 60, "a worker is on the new node", run)
            when_done(output, before + 2, run)
            os.kill(first, signal.SIGCONT)
            assert run.code() == 0, run.said
        finally:
            run.end()
    same(output, undisturbed)


def test_no_gpus_and_none_to_come(flags: list[Any], output: Path) -> None:
    with cluster("--num-cpus", 1, **INSTALLED) as made:
        begun = time.monotonic()
        run = fisher_ray("run", *flags, *ONE_GPU, RAY_ADDRESS=made.address)
        assert run.code(60) == 2, run.said
        assert time.monotonic() - begun < 30
    (line,) = run.said.splitlines()
    assert line.startswith("error: no node has the 1 CPUs and 1 GPUs that an actor needs; the cluster has 1 and 0.")
    assert "--max-actors" in line and not output.exists()


# ---- hosts -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if not can_make_hosts():
        pytest.skip("network namespaces need root and iproute2")
    with two_hosts() as made:
        yield made


def test_a_host_cut_off_and_back(
    hosts: tuple[Host, Host], flags: list[Any], output: Path, undisturbed: Stored, tmp_path: Path
) -> None:
    """A cable is pulled: no process ends, no connection is closed, and what ran there goes on for a while."""
    with at_work_on(hosts, flags) as (run, node):
        cut_off = held_at_work(node, run)  # or it may have committed what it was at
        hosts[1].link("down")
        lost = done(output)
        when_done(output, lost + 2, run)
        os.kill(cut_off, signal.SIGCONT)
        hosts[1].link("up")
        assert run.code() == 0, run.said
    nothing_was_lost(run, output, undisturbed)


@pytest.mark.parametrize("what", ["corpus", "output"])
def test_a_host_that_loses_a_mount(
    what: str, hosts: tuple[Host, Host], flags: list[Any], corpus: Path, output: Path, undisturbed: Stored
) -> None:
    """Its corpus is gone, or what it writes is refused: the others do its tasks, and none is given up for it."""
    with at_work_on(hosts, flags) as (run, _):
        when_done(output, 1, run)
        if what == "corpus":
            mounted = hosts[1].run("mount", "-t", "tmpfs", "none", corpus.parent)
        else:
            mounted = hosts[1].run("sh", "-c", f"mount --bind {output} {output} && mount -o remount,ro,bind {output}")
        assert mounted.code(20) == 0, mounted.said
        assert run.code() == 0, run.said
    assert re.search(r"complete: .*, [1-9]\d* retried", run.said), run.said
    nothing_was_lost(run, output, undisturbed)


@contextmanager
def at_work_on(hosts: tuple[Host, Host], flags: list[Any]) -> Iterator[tuple[Tree, Tree]]:
    """A run driven from the first, with a worker on each and one attempt a task; and the second's node."""
    with ray_on(hosts) as (head, node):
        run = hosts[0].run(
            sys.executable, "-m", "fisher_ray.cli", "run", *flags, "--max-actors", 2, *ONE_GPU, "--max-attempts", 1,
            RAY_ADDRESS=f"{hosts[0].ip}:6379", **INSTALLED,
        )  # fmt: skip
        together(2, lambda: head.actors() + node.actors(), run)
        yield run, node


def nothing_was_lost(run: Tree, output: Path, undisturbed: Stored) -> None:
    assert done(output) == len(undisturbed.receipts)
    assert re.search(r"complete: .*, 0 quarantined", run.said), run.said
    same(output, undisturbed)


TWO_NODES = """
import ray, sys, time
ray.init(sys.argv[1], log_to_driver=False)
end = time.monotonic() + 60
while (alive := sum(node["Alive"] for node in ray.nodes())) < 2 and time.monotonic() < end:
    time.sleep(0.5)
sys.exit(alive < 2)
"""


@contextmanager
def ray_on(hosts: tuple[Host, Host]) -> Iterator[tuple[Tree, Tree]]:
    """A head and a node, each with a logical GPU."""
    folder = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))
    common = ("--block", "--disable-usage-stats", "--object-store-memory", 80_000_000, "--num-gpus", 1, "--num-cpus", 1)
    head_options = ("--head", "--port", 6379, "--temp-dir", folder / "a", "--include-dashboard", "false")
    try:
        head = hosts[0].run(
            RAY, "start", *head_options, "--node-ip-address", hosts[0].ip, *common, **WATCHFUL, **INSTALLED
        )
        until(lambda: "Ray runtime started" in head.said, 60, f"the head has started: {head.said}")
        joining = ("--address", f"{hosts[0].ip}:6379", "--node-ip-address", hosts[1].ip, "--temp-dir", folder / "b")
        for _ in range(3):  # on a busy machine Ray may give a node up that its own agents come to late
            node = hosts[1].run(RAY, "start", *joining, *common, **WATCHFUL, **INSTALLED)
            if hosts[0].run(sys.executable, "-c", TWO_NODES, f"{hosts[0].ip}:6379", **INSTALLED).code(120) == 0:
                break
            node.end()
        yield head, node
    finally:
        for tree in (*hosts[0].trees, *hosts[1].trees):
            tree.end()
        shutil.rmtree(folder, ignore_errors=True)


def test_one_driver_of_two_hosts(hosts: tuple[Host, Host], flags: list[Any], output: Path, undisturbed: Stored) -> None:
    """Refused while the other works, let in when it has not been heard of; the other stops when it is back.

    A host cut off from its storage stands still, as with NFS mounted hard, and so does one that is suspended.
    """
    command = (sys.executable, "-m", "fisher_ray.cli", "run", *flags, "--executor", "local", "--num-samples", 8)
    first = hosts[0].run(*command, **INSTALLED)
    when_done(output, 1, first)
    second = hosts[1].run(*command, **INSTALLED)
    assert second.code(60) == 3, second.said
    (line,) = [line for line in second.said.splitlines() if line.startswith("error:")]
    assert "another driver works on" in line and f"on {hosts[0].name}" in line
    assert first.process.poll() is None, first.said

    hosts[0].freeze(signal.SIGSTOP)
    hosts[0].link("down")
    began, before = time.monotonic(), done(output)
    second = hosts[1].run(*command, **INSTALLED)
    when_done(output, before + 1, second)
    assert time.monotonic() - began > 15  # the lease's patience
    hosts[0].link("up")
    hosts[0].freeze(signal.SIGCONT)
    assert first.code(60) == 3, first.said
    assert "another driver has taken this run over" in first.said and "Traceback" not in first.said
    assert second.code() == 0, second.said
    assert "tasks were done before" in second.said
    assert Stored(output).receipts and not list(output.glob("lease/*"))
