"""The tree of sums: its shape, its bits, its names, and what it does with tasks that were given up."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_run import rewrite

import jobs
from fisher_ray import cost, driver, open_run, reduce, worker
from fisher_ray.cli import main
from fisher_ray.cost import FAN_IN
from fisher_ray.plan import make_plan, position_bucket
from fisher_ray.reduce import Node, levels, look_back, sum_node
from fisher_ray.report_html import html_report
from fisher_ray.shards import RunStore
from jobs import D_MODEL, LAYERS, Stored, gpt2  # noqa: F401

TASK_BYTES = 1_000


def tasks_of(node: Node) -> list[int]:
    """The tasks that a node's sum is over, by its children."""
    if node.is_task:
        return [node.first]
    return [task for child in node.children() for task in tasks_of(child)]


@pytest.mark.parametrize("tasks", [1, 2, 31, 32, 33, 40, 1000, 1024, 1025, 50_000])
def test_every_task_is_in_the_tree_once_and_in_order(tasks: int) -> None:
    root = Node(0, tasks, (0,))
    assert tasks_of(root) == list(range(tasks))
    there = {child.first for child in root.children() if child.is_task}
    total = 0
    for level in levels(root):
        for node in level:
            children = node.children()
            assert 2 <= len(children) <= FAN_IN
            assert all(child.is_task or child.name in there for child in children)  # what it needs comes first
        there = there | {node.name for node in level}
        total += len(level)
    assert total <= tasks  # far fewer files than the tasks have
    sizes = {child.last - child.first for child in root.children()}
    assert max(sizes) - min(sizes) <= 1  # blocks for standard errors weigh the same


def test_a_name_says_what_is_covered_and_what_is_missing() -> None:
    names = {
        Node(0, 40, (0, 1)).name,
        Node(0, 41, (0, 1)).name,
        Node(0, 40, (0,)).name,
        Node(0, 40, (0, 1), (3,)).name,
        Node(0, 40, (0, 1), (4,)).name,
    }
    assert len(names) == 5
    root = Node(0, 100, (0,), (3, 50, 51))
    assert tasks_of(root) == [task for task in range(100) if task not in (3, 50, 51)]
    whole = {node.name for level in levels(Node(0, 100, (0,))) for node in level}
    partly = {node.name for level in levels(root) for node in level}
    assert len(partly - whole) == 2  # the rest is shared with a reduction of everything


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Three levels of what would be one, a layer a call, and tasks of a kilobyte."""
    patch.setattr(reduce, "FAN_IN", 3)
    patch.setattr(cost, "_CALL_BYTES", 1)
    patch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)


@pytest.fixture
def small_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def triangle(values: np.ndarray, d: int) -> np.ndarray:
    square = np.zeros((d, d))
    square[np.triu_indices(d)] = values
    return square + np.triu(square, 1).T


def leaf(stored: Stored, task: int, layer: int) -> Any:
    receipt = json.loads((stored.folder / f"done/{task:08d}.json").read_text())
    return np.load(stored.folder / receipt["files"][f"sums_{layer}"]["path"])


def by_hand(stored: Stored, first: int, last: int, layer: int) -> dict[str, np.ndarray]:
    """The tree's sum, by the definition alone: three nearly equal parts, one after the other, in float64."""
    if last - first == 1:
        arrays = leaf(stored, first, layer)
        if not len(arrays["groups"]):  # documents without tokens
            return {
                "count": np.zeros(()),
                "fisher": np.zeros(D_MODEL * (D_MODEL + 1) // 2),
                "activation": np.zeros(D_MODEL),
            }
        return {name: arrays[name][0].astype(np.float64) for name in ("count", "fisher", "activation")}
    parts = min(3, last - first)
    bounds = [first + (last - first) * i // parts for i in range(parts + 1)]
    total = by_hand(stored, bounds[0], bounds[1], layer)
    for a, b in pairwise(bounds[1:]):
        more = by_hand(stored, a, b, layer)
        total = {name: total[name] + more[name] for name in total}
    return total


@pytest.fixture(scope="module")
def made(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with a corpus and a run."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "docs.txt").write_text(jobs.some_text(20_000))
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        _, outcome = jobs.run_here(jobs.settings(gpt2, folder / "docs.txt", folder / "run"))
    assert outcome.tasks > 12
    return folder


def test_positions_of_blocks_are_counted_once(made: Path) -> None:
    """A block has a receipt for each call of the reduction, which takes a layer here."""
    reader = open_run(made / "run")
    assert max(map(len, reader._blocks)) == LAYERS + 1
    assert sum(reader.block_positions) == reader.counts.scored


def test_sums_take_as_many_threads_as_scores(made: Path, gpt2: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Of sketches they are decompositions, whose bits hang on it."""
    plan, store = make_plan(jobs.settings(gpt2, made / "docs.txt", made / "run")), RunStore(str(made / "run"))
    before = torch.get_num_threads()
    monkeypatch.setattr(RunStore, "commit", lambda *_: None)
    try:
        for work in (
            partial(sum_node, plan, store, Node(0, 9, (0,))),
            partial(look_back, plan, store, Node(0, 9, (0,)), None),
        ):
            torch.set_num_threads(plan.config.cpus_per_actor + 1)
            work()
            assert torch.get_num_threads() == plan.config.cpus_per_actor
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Stored:
    """A copy to damage."""
    shutil.copytree(made, tmp_path / "made")
    return Stored(tmp_path / "made/run")


def test_means_are_the_trees_to_the_last_bit(run: Stored) -> None:
    tasks = len(run.receipts)
    for layer in range(LAYERS + 1):
        total = by_hand(run, 0, tasks, layer)
        fisher = triangle(total["fisher"], len(total["activation"])) / total["count"]
        assert (run.reduced(layer) == fisher).all()
        assert (run.reduced(layer, "activation_mean") == total["activation"] / total["count"]).all()


def test_blocks_add_up_to_the_whole_and_share_no_document(run: Stored) -> None:
    manifest = json.loads((run.folder / "reduced/manifest.json").read_text())
    blocks = [(block["first"], block["last"]) for block in manifest["blocks"]]
    assert len(blocks) == 3 and blocks[0][0] == 0 and blocks[-1][1] == len(run.receipts)
    sums = []
    for first, last in blocks:
        (node,) = [n for n in manifest["nodes"] if n.startswith(f"{first:08d}-{last:08d}-001-001")]
        receipt = json.loads((run.folder / f"tree/{node}.json").read_text())
        arrays = np.load(run.folder / receipt["files"]["sums_1"]["path"])
        assert arrays["fisher"].dtype == np.float64
        sums.append((arrays["count"][0], arrays["fisher"][0]))
    count = sum(c for c, _ in sums)
    mean = triangle(sum(f for _, f in sums) / count, run.reduced(1).shape[0])
    np.testing.assert_allclose(mean, run.reduced(1), rtol=1e-12)
    of_block: dict[str, int] = {}
    for receipt in run.receipts:
        block = next(i for i, (first, last) in enumerate(blocks) if first <= int(receipt["name"]) < last)
        if "positions" in receipt["files"]:
            table = pq.read_table(run.folder / receipt["files"]["positions"]["path"], columns=["document"])
            for document in set(table["document"].to_pylist()):
                assert of_block.setdefault(document, block) == block


def test_blocks_of_single_tasks_count_them_once(gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Where a layer a call is added up, and some blocks are single tasks, whose receipts are of all layers."""
    make_small(monkeypatch)
    (tmp_path / "docs.txt").write_text(jobs.some_text(4_000))
    config = jobs.settings(gpt2, tmp_path / "docs.txt", tmp_path / "run")
    stored, outcome = jobs.run_here(config)
    assert 3 < outcome.tasks < 6  # in three blocks: one or two tasks each
    for layer in range(LAYERS + 1):
        total = open_run(config.output).blocks(layer).total
        assert total.count == len(stored.rows(layer))
        np.testing.assert_allclose(total.fisher.mean(total.count), stored.reduced(layer), rtol=1e-6, atol=1e-12)
    before = json.loads((tmp_path / "run/reduced/manifest.json").read_text())
    assert all(len(set(block["receipts"])) == len(block["receipts"]) for block in before["blocks"])
    twice = [{**block, "receipts": [*block["receipts"], *block["receipts"]]} for block in before["blocks"]]
    rewrite(tmp_path / "run/reduced/manifest.json", blocks=twice)  # as manifests were written
    assert open_run(config.output).blocks(1).total.count == len(stored.rows(1))


def test_a_reduction_that_ends_half_way_is_none(gpt2: str, run: Stored, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Its files replace those of the one before, whose manifest must not stand over them."""
    make_small(monkeypatch)

    def stop(*_: Any) -> bytes:
        raise RuntimeError("stopped")

    (run.folder / "reduced/layer_000/fisher.npy").unlink()
    monkeypatch.setattr(driver, "spectra_png", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        jobs.run_here(jobs.settings(gpt2, run.folder.parent / "docs.txt", run.folder))
    assert not (run.folder / "reduced/manifest.json").exists()
    assert open_run(run.folder).status != "complete"


def test_a_reduction_that_was_interrupted_goes_on(run: Stored, gpt2: str, small_tree: None) -> None:  # noqa: F811
    before = run.bits()
    markers = sorted((run.folder / "tree").glob("*.json"))
    kept = {path: path.stat().st_mtime_ns for path in markers[::2]}
    for path in markers[1::2]:
        path.unlink()
    (run.folder / "reduced/manifest.json").unlink()
    (run.folder / "reduced/layer_001/fisher.npy").unlink()
    again, outcome = jobs.run_here(jobs.settings(gpt2, run.folder.parent / "docs.txt", run.folder))
    assert outcome.computed == 0 and again.bits() == before
    assert sorted((run.folder / "tree").glob("*.json")) == markers
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # these were not added up again


def test_a_damaged_node_is_added_up_again(run: Stored, gpt2: str, small_tree: None) -> None:  # noqa: F811
    before = run.bits()
    third = len(run.receipts) // 3
    (node,) = run.folder.glob(f"tree/00000000-{third:08d}-*/layer_001.npz")
    node.write_bytes(node.read_bytes()[:-9])
    (run.folder / "reduced/manifest.json").unlink()
    settings = jobs.settings(gpt2, run.folder.parent / "docs.txt", run.folder, verify_done=False)
    again, outcome = jobs.run_here(settings)  # found while reducing
    assert outcome.computed == 0 and again.bits() == before
    assert main(["verify", str(run.folder)]) == 0


def test_a_sum_says_who_has_computed_its_tasks(
    run: Stored, gpt2: str, small_tree: None, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """One worker for each device with other versions, of whichever tasks it was; the page of the run says so, too."""

    def versions(workers: list[dict[str, Any]]) -> list[str]:
        assert all(set(worker) == {"device", "self_check", "versions"} for worker in workers)
        assert all(worker["versions"]["numpy"] == np.__version__ for worker in workers)
        return [worker["versions"]["fisher_ray"] for worker in workers]

    def reduced() -> list[str]:
        return versions(json.loads((run.folder / "reduced/provenance.json").read_text())["workers"])

    (before,) = reduced()
    assert "sets of versions" not in html_report(open_run(run.folder)).html
    for folder in ("tree", "reduced"):
        shutil.rmtree(run.folder / folder)
    later = {len(run.receipts) - 3, len(run.receipts) - 1}
    for task in later:
        (run.folder / f"done/{task:08d}.json").unlink()
    monkeypatch.setattr(worker.fisher_ray, "__version__", "99.1")
    again, outcome = jobs.run_here(jobs.settings(gpt2, run.folder.parent / "docs.txt", run.folder))
    assert outcome.computed == 2
    nodes = [json.loads(path.read_text()) for path in (run.folder / "tree").glob("*.json")]
    spans = [tuple(map(int, node["name"].split("-")[:2])) for node in nodes]
    tasks = [(task, task + 1) for task in range(len(again.receipts))]
    for receipt, (first, last) in zip([*again.receipts, *nodes], [*tasks, *spans], strict=True):
        some = {"99.1" if task in later else before for task in range(first, last)}
        found = versions(receipt["workers"])
        assert len(found) == len(some) and set(found) == some, receipt["name"]
    assert reduced() == versions(open_run(run.folder).provenance) == [before, "99.1"]
    page = html_report(open_run(run.folder)).html
    assert "its tasks were computed with 2 sets of versions" in page
    assert f"fisher_ray {before}, numpy" in page and "; and fisher_ray 99.1, numpy" in page


# ---- groups ------------------------------------------------------------------------------------------------------------


def jsonl(path: Path) -> list[dict[str, str]]:
    languages = ["de", "en", "a/b c", None]
    texts = [text for _, text in jobs.paragraphs(jobs.some_text(8_000).encode())]
    rows = [{"text": text, "language": languages[i % 4], "number": str(i)} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("group_by", ["language", "position", "token"])
def test_each_groups_mean_is_that_of_its_positions(
    group_by: str,
    gpt2: str,  # noqa: F811
    tmp_path: Path,
    small_tree: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the stored factors of every position, by plain NumPy."""
    jsonl(tmp_path / "docs.jsonl")
    config = jobs.settings(
        gpt2, tmp_path / "docs.jsonl", tmp_path / "run", group_by=group_by, columns=("number",), save="factors", layers="1",
        num_groups=6,
    )  # fmt: skip
    stored, outcome = jobs.run_here(config)
    rows, factors = stored.rows(1), stored.saved("factors", 1).astype(np.float64)
    if group_by == "language":
        language = {}
        source = (tmp_path / "docs.jsonl").read_bytes()
        for row in rows:
            offset = int(row["document"].rpartition(":")[2])
            language[row["document"]] = str(json.loads(source[offset:].split(b"\n", 1)[0])["language"])
        groups = [language[row["document"]] for row in rows]
        assert [str(row["language"]) for row in rows] == groups
    elif group_by == "position":
        groups = [position_bucket(row["position"]) for row in rows]
        assert {"0", "1", "2-3", "4-7", "8-15"} <= set(groups)
    else:
        tokens = [row["token"] for row in rows]
        named = {row["group"] for row in outcome.rows if row["group"] not in (None, "other")}
        frequent = sorted(set(tokens), key=tokens.count, reverse=True)
        assert len(named) == 5 and len(named & {str(t) for t in frequent[:8]}) >= 4
        groups = [str(token) if str(token) in named else "other" for token in tokens]
        main(["inspect", str(tmp_path / "run")])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("groups:"))
        for name in named:
            text = jobs.tokenizer().decode([int(name)]).replace(" ", "·")
            assert f"{name} {text} ({groups.count(name)})" in line
    summary = {row["group"]: row for row in outcome.rows}
    assert set(summary) == {None, *groups}
    for name in set(groups):
        chosen = factors[[i for i, group in enumerate(groups) if group == name]]
        mean = np.einsum("nri,nrj->ij", chosen, chosen) / len(chosen)
        folder = stored.folder / "reduced/layer_001" / f"group_{name.replace('/', '%2F')}"
        np.testing.assert_allclose(np.load(folder / "fisher.npy"), mean, atol=2e-5 * np.abs(mean).max())
        assert summary[name]["positions"] == len(chosen)
    whole = np.einsum("nri,nrj->ij", factors, factors) / len(factors)
    np.testing.assert_allclose(stored.reduced(1), whole, atol=2e-5 * np.abs(whole).max())
    assert sum(row["positions"] for name, row in summary.items() if name) == summary[None]["positions"]


def test_more_groups_than_allowed_are_refused(
    gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    jsonl(tmp_path / "docs.jsonl")
    flags = ["--model", gpt2, "--corpus", str(tmp_path / "docs.jsonl"), "--output", str(tmp_path / "run")]
    for command in ("run", "plan"):
        assert main([command, *flags, "--executor", "local", "--group-by", "language", "--num-groups", "3"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "4 values" in line and "at most 3 groups" in line and "--num-groups" in line
        assert main([command, *flags, "--executor", "local", "--group-by", "token", "--num-groups", "9999999"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "GiB of sums" in line and "--layers" in line
    assert not (tmp_path / "run").exists()
