"""Settings and fingerprint, sums, and what a run directory promises."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import jobs
from fisher_ray import cli, shards
from fisher_ray.corpus import SourceRange
from fisher_ray.plan import ConfigError, RunConfig, Task, Tasks, make_plan
from fisher_ray.shards import Counts, Lease, Problem, Receipt, RefusedError, RunStore, receipt_of, reduced_folder
from fisher_ray.storage import DamagedError, OutageError, StorageError, StoredFile, seal
from fisher_ray.sums import LayerSums, Sums
from jobs import gpt2  # noqa: F401

D = 7
FLOAT32 = 5e-6  # products are in float32; a position left out shows as 1e-2 in the sum of F / tr F


# ---- settings ----------------------------------------------------------------------------------------------------------

# For every setting that changes results another value than the default. A new setting has to be put here or below.
CHANGES: dict[str, Any] = {
    "layers": "1", "estimator": "exact", "num_samples": 3, "top_p": 0.9, "temperature": 0.7, "token_source": "sampled",
    "token_draws": 2, "token_top_p": 0.9, "token_temperature": 0.7, "max_seq_len": 20, "stride": 3, "batch_tokens": 100,
    "positions": "last", "max_docs": 1, "column": "other", "unit": "file", "columns": ("other",), "save": "factors",
    "seed": 1, "dtype": "bfloat16", "gradients": "per_position", "trust_remote_code": True,
    "stream_weights": True, "compile": True,
    "memory_budget": 1 << 20, "cpus_per_actor": 2, "device": "cuda", "group_by": "position", "num_groups": 4,
    "sketch": 5, "rank": 3, "tolerance": 0.1, "task_bytes": 300,
}  # fmt: skip
NEEDS = {
    "token_draws": {"token_source": "sampled"}, "rank": {"estimator": "deflated"}, "tolerance": {"estimator": "exact"},
    "num_groups": {"group_by": "token"}, "token_top_p": {"token_source": "sampled"},
    "token_temperature": {"token_source": "sampled"},
}  # fmt: skip
ELSEWHERE = {"model", "corpus", "encoder_column", "until_relative_error", "until_relative_change"}
EXECUTION: dict[str, Any] = {
    "output": "elsewhere", "executor": "local", "min_actors": 2, "max_actors": 3, "gpus_per_actor": 0.5,
    "max_attempts": 5, "task_timeout": 60.0, "retry_quarantined": True, "verify_done": False, "revision": "main",
}  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text('{"text": "one", "other": "two"}\n{"text": "three", "other": "four"}\n')
    return folder


def fingerprint(model: str, corpus: Path, **changed: Any) -> str:
    return make_plan(jobs.settings(model, corpus, "run", **changed)).fingerprint


def test_every_setting_is_tested() -> None:
    assert {f.name for f in dataclasses.fields(RunConfig)} == {*CHANGES, *ELSEWHERE, *EXECUTION}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_results_changes_the_fingerprint(name: str, gpt2: str, corpus: Path) -> None:  # noqa: F811
    given = NEEDS.get(name, {})
    assert fingerprint(gpt2, corpus, **given) != fingerprint(gpt2, corpus, **given, **{name: CHANGES[name]})


@pytest.mark.parametrize("name", EXECUTION)
def test_what_changes_none_does_not(name: str, gpt2: str, corpus: Path) -> None:  # noqa: F811
    config = jobs.settings(gpt2, corpus, "run")
    changed = dataclasses.replace(config, **{name: EXECUTION[name]})
    assert make_plan(config).fingerprint == make_plan(changed).fingerprint


def test_what_is_off_may_be_left_out(gpt2: str, corpus: Path) -> None:  # noqa: F811
    assert fingerprint(gpt2, corpus) == fingerprint(gpt2, corpus, stream_weights=False, compile=False, stride=None)
    config = jobs.settings(gpt2, corpus, "run")
    assert RunConfig.from_dict({**config.asdict(), "stream_weights": None, "num_samples": None}) == config


def test_samples_change_nothing_where_none_are_drawn(gpt2: str, corpus: Path) -> None:  # noqa: F811
    """As in a sweep over estimators that sets them for all."""
    given = [fingerprint(gpt2, corpus, estimator=e, num_samples=n) for e in ("exact", "sampled") for n in (4, 8)]
    assert given[0] == given[1] and len(set(given)) == 3


def test_how_many_groups_there_may_be_changes_nothing_where_none_are_chosen(gpt2: str, corpus: Path) -> None:  # noqa: F811
    """Positions have the groups that they have; of tokens and of a column's values it says which."""
    for group_by, same in ((None, True), ("position", True), ("token", False), ("other", False)):
        few, many = (fingerprint(gpt2, corpus, group_by=group_by, num_groups=n) for n in (4, 8))
        assert (few == many) is same, group_by


def test_what_decides_the_micro_batches_of_a_gpu_changes_it(gpt2: str, corpus: Path) -> None:  # noqa: F811
    def on(device: Any, **changed: Any) -> str:
        return make_plan(jobs.settings(gpt2, corpus, "run", **changed)).on(device).fingerprint

    one, half, two = (on("cuda", gpus_per_actor=gpus) for gpus in (1, 0.5, 2))
    assert on("cuda") == one == on("cuda", gpus_per_actor=1.0) and len({one, half, two}) == 3
    assert on("cuda", memory_budget=1 << 30) == on("cuda", memory_budget=1 << 30, gpus_per_actor=0.5)
    assert on("cpu") == on("cpu", gpus_per_actor=0.5)


def test_the_encoders_column_changes_the_fingerprint(corpus: Path, tmp_path: Path) -> None:
    model = jobs.save_model(tmp_path / "t5", "t5")
    assert fingerprint(model, corpus, encoder_column="other") != fingerprint(model, corpus, encoder_column="text")


def test_other_weights_in_the_same_place_change_the_fingerprint(corpus: Path, tmp_path: Path) -> None:
    before = fingerprint(jobs.save_model(tmp_path / "model", seed=0), corpus)
    after = fingerprint(jobs.save_model(tmp_path / "model", seed=1), corpus)
    assert before != after


def test_the_corpus_changes_the_fingerprint(gpt2: str, corpus: Path) -> None:  # noqa: F811
    seen = {fingerprint(gpt2, corpus)}
    file = corpus / "b.jsonl"
    raw, stat = file.read_bytes(), file.stat()
    file.write_bytes(raw.replace(b"four", b"FOUR"))  # as many bytes
    os.utime(file, (stat.st_atime, stat.st_mtime + 10))
    seen.add(fingerprint(gpt2, corpus))
    file.write_bytes(raw * 2)
    os.utime(file, (stat.st_atime, stat.st_mtime))
    seen.add(fingerprint(gpt2, corpus))
    file.rename(corpus / "c.jsonl")
    seen.add(fingerprint(gpt2, corpus))
    file.with_name("c.jsonl").unlink()
    seen.add(fingerprint(gpt2, corpus))
    assert len(seen) == 5


@pytest.mark.parametrize("files", ["a.jsonl", "."])
def test_moving_the_corpus_does_not(files: str, gpt2: str, corpus: Path) -> None:  # noqa: F811
    before = fingerprint(gpt2, corpus / files)
    moved = corpus.rename(corpus.parent / "moved_away")
    assert fingerprint(gpt2, moved / files) == before


def test_layers() -> None:
    def chosen(spec: str) -> list[int]:
        return jobs.settings("m", "c", "o", layers=spec).layer_list(5)

    assert [chosen(spec) for spec in ("all", "0-2", "3", "5,1", "4-5, 0,0")] == [
        [0, 1, 2, 3, 4, 5], [0, 1, 2], [3], [1, 5], [0, 4, 5]
    ]  # fmt: skip
    for spec, message in [
        ("6", r"must be in \[0, 5\], got 6"),
        ("3-9", "got 9"),
        ("2-1", "backwards"),
        ("x", "layers"),
    ]:
        with pytest.raises(ConfigError, match=message):
            chosen(spec)
    for spec in ("", "-1", "1-", "1.5", "0,,1"):
        with pytest.raises(ConfigError, match="layers must be"):
            chosen(spec)


def test_a_task_of_many_ranges_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than Parquet puts into one group of rows by itself, which is a million, and here as many as the first has."""

    class Writer(pq.ParquetWriter):
        def write_table(self, table: Any, row_group_size: int | None = None) -> None:
            super().write_table(table, row_group_size or 20)

    monkeypatch.setattr(pq, "ParquetWriter", Writer)
    ranges = [SourceRange(f"file:///a/{i}", str(i), 0, 5, 5, "v", 100 if i == 20 else 5) for i in range(99)]
    written = Tasks.from_ranges(ranges, 100)
    parts = [tuple(ranges[:20]), (ranges[20],), *(tuple(ranges[i : i + 20]) for i in (21, 41, 61, 81))]
    for tasks in (written, Tasks.from_ranges(ranges, 1_000), written.below("file:///a/")):
        truth = [tuple(ranges)] if len(tasks) == 1 else parts
        assert list(tasks) == [tasks[i] for i in range(len(truth))] == [Task(i, part) for i, part in enumerate(truth)]


def test_settings_come_back_from_a_file() -> None:
    # Without those that others exclude.
    changes = {
        name: value for name, value in CHANGES.items() if name not in ("rank", "compile", "top_p", "temperature")
    }
    config = RunConfig(
        model="m", corpus=("a", "b"), output="o", encoder_column="x", max_actors=3, gpus_per_actor=0.5, **changes
    )
    for dumped in (
        config.asdict(),
        yaml.safe_load(yaml.safe_dump(config.asdict())),
        json.loads(json.dumps(config.asdict())),
    ):
        assert RunConfig.from_dict(dumped) == config


def test_flags_override_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ncorpus: [a, b]\noutput: o\nnum-samples: 3\nseed: 4\nlayers: 2\ncolumns: kind\n")
    seen: list[RunConfig] = []

    def instead(config: RunConfig, *_: Any) -> Any:
        seen.append(config)
        raise StorageError("stop here")

    monkeypatch.setattr(cli, "run", instead)
    assert cli.main(["run", "--config", str(path), "--seed", "5", "--corpus", "c"]) != 0
    (config,) = seen
    assert config == RunConfig("m", ("c",), "o", layers="2", num_samples=3, seed=5, columns=("kind",))


# ---- sums --------------------------------------------------------------------------------------------------------------


def scores(n: int, num_factors: int, num_draws: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, num_factors, D, generator=generator) * torch.logspace(-3, 3, n)[:, None, None]
    factors[n // 2] = 0
    return factors, torch.randn(n, num_draws, D, generator=generator) + 4


def filled(layers: list[int], *parts: tuple[torch.Tensor, torch.Tensor]) -> Sums:
    sums = Sums(layers, D)
    for factors, activations in parts:
        for layer in layers:
            sums.add(layer, factors * (layer + 1), activations * (layer + 1))
    return sums


MATRICES = ("fisher", "normalised", "second_moment")


def truth(factors: np.ndarray, activations: np.ndarray) -> dict[str, np.ndarray]:
    """The sums by a loop in float64."""
    fisher, normalised, second, mean = np.zeros((D, D)), np.zeros((D, D)), np.zeros((D, D)), np.zeros(D)
    for g, h in zip(factors, activations, strict=True):
        f = sum(np.outer(row, row) for row in g)
        fisher, second, mean = fisher + f, second + sum(np.outer(x, x) for x in h) / len(h), mean + h.mean(0)
        if f.trace() > 0:
            normalised = normalised + f / f.trace()
    return {"fisher": fisher, "normalised": normalised, "second_moment": second, "activation": mean}


@pytest.mark.parametrize(("num_factors", "num_draws"), [(1, 1), (3, 1), (D, 4), (5000, 1)])
def test_sums_against_a_loop_in_float64(num_factors: int, num_draws: int) -> None:
    factors, activations = scores(9, num_factors, num_draws)
    sums = filled([0, 2], (factors, activations))
    for layer in (0, 2):
        expected = truth(factors.double().numpy() * (layer + 1), activations.double().numpy() * (layer + 1))
        (got,) = sums.packed(layer).groups.values()
        assert got.count == 9 and got.traced == 8
        for name in MATRICES:
            assert np.linalg.norm(got.square(name) - expected[name]) < FLOAT32 * np.linalg.norm(expected[name])
        np.testing.assert_allclose(got.activation, expected["activation"], rtol=1e-6)


def test_each_group_has_its_own_sums() -> None:
    factors, activations = scores(12, 3)
    member = torch.tensor([0, 2, 2, 0, 2, 0, 0, 2, 2, 2, 0, 0])
    sums = Sums([1], D, ["a", "empty", "c"])
    sums.add(1, factors, activations, member)
    packed = sums.packed(1)
    assert sorted(packed.groups) == ["a", "c"]
    for index, name in ((0, "a"), (2, "c")):
        some = (member == index).numpy()
        expected = truth(factors.double().numpy()[some], activations.double().numpy()[some])
        got = packed.groups[name]
        assert got.count == some.sum()
        for matrix in MATRICES:
            assert np.linalg.norm(got.square(matrix) - expected[matrix]) < FLOAT32 * np.linalg.norm(expected[matrix])
    total = packed.total()
    assert total is not None and total.count == 12
    expected = truth(factors.double().numpy(), activations.double().numpy())
    assert np.linalg.norm(total.square("fisher") - expected["fisher"]) < FLOAT32 * np.linalg.norm(expected["fisher"])
    assert packed.groups["a"].count < 12  # the total is no alias of a group


def test_many_small_terms_are_not_lost_beside_a_large_one() -> None:
    """A float32 running sum would stop at 2^24: 40 batches of ones after it would vanish."""
    sums = Sums([0], 1)
    sums.add(0, torch.full((1, 1, 1), 2.0**13), torch.zeros(1, 1, 1))
    for _ in range(40):
        sums.add(0, torch.full((1, 1, 1), 1.0), torch.zeros(1, 1, 1))
    merged = sums.packed(0)
    assert merged.groups[""].square("fisher").item() == 2.0**26 + 40
    for _ in range(40):
        one = Sums([0], 1)
        one.add(0, torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
        merged.merge(LayerSums.from_bytes(one.packed(0).to_bytes(np.float32)))
    assert merged.groups[""].square("fisher").item() == 2.0**26 + 80


def test_packed_sums_are_rounded_once() -> None:
    sums = filled([0, 3], scores(40, 3), scores(41, 3, seed=1))
    upper = np.triu_indices(D)
    for layer in (0, 3):
        (back,) = LayerSums.from_bytes(sums.packed(layer).to_bytes(np.float32)).groups.values()
        (whole,) = LayerSums.from_bytes(sums.packed(layer).to_bytes()).groups.values()
        assert (back.count, back.traced) == (81, 79)
        assert (back.activation == whole.activation).all()
        for name in MATRICES:
            values, exact = getattr(back, name).values, getattr(whole, name).values
            assert (whole.square(name)[upper] == exact).all() and exact.dtype == np.float64
            assert values.dtype == np.float32 and (values == exact.astype(np.float32)).all() and (values != exact).any()
            assert (back.square(name) == back.square(name).T).all() and back.square(name).dtype == np.float64


def test_merged_sums_are_sums_over_all() -> None:
    # In float64, as float32 streams are rounded where a mean is taken off, another one in each.
    one, other = ((g.double(), h.double()) for g, h in (scores(6, 2, seed=1), scores(5, 2, seed=2)))
    merged = filled([0, 1], one).packed(1)
    merged.merge(filled([0, 1], other).packed(1))
    (got,), (both,) = merged.groups.values(), filled([0, 1], one, other).packed(1).groups.values()
    assert (got.count, got.traced) == (both.count, both.traced)
    np.testing.assert_allclose(got.activation, both.activation, rtol=1e-12)
    for name in MATRICES:
        np.testing.assert_allclose(got.square(name), both.square(name), rtol=1e-12)
        assert getattr(got, name).trace == pytest.approx(got.square(name).trace(), rel=1e-14, abs=0)


def test_sums_of_another_width_are_refused() -> None:
    wider = Sums([0], D + 1)
    wider.add(0, torch.ones(1, 1, D + 1), torch.ones(1, 1, D + 1))
    with pytest.raises(ValueError, match="cannot be added"):
        filled([0], scores(3, 1)).packed(0).merge(wider.packed(0))


def test_counts_add_up() -> None:
    assert Counts(1, 2, 3, 4, 5, 6, 7) + Counts(10, 20, 30, 40, 50, 60, 70) == Counts(11, 22, 33, 44, 55, 66, 77)


# ---- storage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def receipt(task: int, plan: str = "this", seconds: float = 1.0) -> Receipt:
    files = {"sums_0": StoredFile("sums/x", "0" * 64, 3)}
    return Receipt(f"{task:08d}", plan, files, Counts(tokens=task), {"compute": seconds}, [{"a": [1]}])


def test_a_file_is_created_once(store: RunStore) -> None:
    assert store.create("done/1.json", b"first")
    assert not store.create("done/1.json", b"second")
    assert store.read("done/1.json") == b"first"
    assert list(store.list("done")) == ["done/1.json"]


def test_of_many_that_create_at_once_one_wins(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    for trial in range(20):
        gate, won = threading.Barrier(8), []

        def attempt(i: int, trial: int = trial, gate: threading.Barrier = gate, won: list[int] = won) -> None:
            gate.wait()
            if store.create(f"done/{trial}", str(i).encode() * 10_000):
                won.append(i)

        threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read(f"done/{trial}") == str(won[0]).encode() * 10_000
    assert len(list((tmp_path / "done").iterdir())) == 20


@pytest.mark.parametrize("how", ["write", "create"])
def test_a_write_that_fails_midway_leaves_nothing(how: str, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.write("sums/old", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # what a full disk does, at 4 KiB
    try:
        with pytest.raises(StorageError, match="large"):
            getattr(store, how)("sums/old" if how == "write" else "sums/new", b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "sums").iterdir()] == ["old"]
    assert store.read("sums/old") == b"old"


@pytest.mark.parametrize("raw", [b"data!", b"dat", b""])
def test_other_bytes_than_were_written_are_refused(raw: bytes, store: RunStore) -> None:
    stored = store.store("sums/a.npz", b"data.")
    assert store.load(stored) == b"data." and stored.bytes == 5
    store.write("sums/a.npz", raw)
    with pytest.raises(DamagedError, match=r"sums/a\.npz is damaged"):
        store.load(stored)
    store.remove("sums/a.npz")
    with pytest.raises(DamagedError, match=r"sums/a\.npz is gone"):
        store.load(stored)


def test_a_flipped_bit_anywhere_in_a_receipt_is_noticed(store: RunStore) -> None:
    store.commit("done", receipt(7))
    assert store.receipt("done", "00000007") == receipt(7)
    raw = store.read("done/00000007.json")
    for i in range(len(raw)):
        flipped = bytearray(raw)
        flipped[i] ^= 1 << (i % 7)
        store.write("done/00000007.json", bytes(flipped))
        with pytest.raises(DamagedError):
            store.receipt("done", "00000007")
    store.write("done/00000008.json", raw)  # another task's, whole
    with pytest.raises(DamagedError, match="is the receipt of 00000007"):
        store.receipt("done", "00000008")


def test_a_second_attempt_does_not_replace_the_first(store: RunStore) -> None:
    assert store.commit("done", receipt(4, seconds=1.0)) == receipt(4, seconds=1.0)
    assert store.commit("done", receipt(4, seconds=2.0)) == receipt(4, seconds=1.0)
    assert store.names("done") == {"00000004"} and store.names("tree") == set()


def test_a_run_is_created_once(store: RunStore) -> None:
    description = {"fingerprint": "this", "result_fields": {"seed": 0}}
    assert store.read_run() is None
    assert store.create_run(description, b"plan")
    assert store.read_run() == description
    assert not store.create_run({**description, "fingerprint": "another"}, b"another plan")
    assert store.read_run() == description and store.read("plan.parquet") == b"plan"
    store.remove_run([])
    assert store.read_run() is None
    store.write("lease/000000.json", b"{}")  # another driver's, which has removed its run or not made it yet
    assert store.read_run() is None


def test_what_is_removed_of_a_run_is_what_it_wrote(tmp_path: Path) -> None:
    """Folders that were made for it go, unless others have come to use them; what was there before stays."""
    (tmp_path / "mine/empty").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "mine")
    old = RunStore(str(tmp_path / "linked"))
    new, beside = (RunStore(str(tmp_path / f"made/for/{name}")) for name in ("one", "other"))
    made = new.missing_folders()
    assert old.missing_folders() == [] and [folder.name for folder in made] == ["one", "for", "made"]
    for run in (old, new, beside):
        run.create_run({"fingerprint": "this"}, b"plan")
        run.write("sums/1/layer_000.npz", b"sums")
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "mine/sums/.writing-x").write_text("half")
    for _ in range(2):
        old.remove_run([])
        new.remove_run(made)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        *(f"made/for/other/{name}" for name in ("plan.parquet", "run.json", "sums/1/layer_000.npz")),
        "mine/notes.txt",
    ]
    assert (tmp_path / "linked").is_symlink() and (tmp_path / "mine/empty").is_dir()
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["empty", "notes.txt"]
    assert not (tmp_path / "made/for/one").exists()
    beside.remove_run(made[1:])
    assert (tmp_path / "made/for").exists()  # the other's own folder is empty, and not among these
    beside.remove_run([tmp_path / "made/for/other", *made[1:]])
    assert not (tmp_path / "made").exists()


def test_names_of_groups_are_names_of_folders(store: RunStore) -> None:
    """File systems take 255 bytes; two long ones that begin alike stay two."""
    title = "\N{CJK UNIFIED IDEOGRAPH-6771}" * 60
    folders = [reduced_folder(0, group) for group in ("de", "a/b", title, title + "x")]
    assert folders[:2] == ["reduced/layer_000/group_de", "reduced/layer_000/group_a%2Fb"]
    assert len(set(folders)) == 4
    for folder in folders:
        store.write(f"{folder}/fisher.npy", b"x")


def test_other_files_in_the_folder_of_leases(store: RunStore) -> None:
    """NFS keeps a replaced file that someone has open under a name of its own."""
    store.create_run({"fingerprint": "this"}, b"plan")
    lease = Lease(store, patience=0.5)
    for folder in ("lease", "quarantine"):
        store.write(f"{folder}/.nfs0001.json", b"")
    assert store.names("quarantine") == set() and not any("nfs" in path for path in store.list())
    time.sleep(1.0)
    assert lease.lost is None and lease._thread.is_alive()
    assert Lease.holder(store)[1]
    lease.release()
    assert Lease.holder(store) == (None, False)
    Lease(store, patience=0.5).release()


@pytest.mark.parametrize("written", [False, True])
def test_a_storage_that_is_away_for_a_while_ends_no_driver(
    written: bool, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether what is reported as failed was written or not; nor does another name of its machine."""
    lease = Lease(store, patience=0.5)
    write = RunStore.write

    def away(self: RunStore, path: str, raw: bytes) -> None:
        if written:
            write(self, path, raw)
        raise OutageError("no answer")

    with monkeypatch.context() as outage:
        outage.setattr(RunStore, "write", away)
        outage.setattr(socket, "gethostname", lambda: "renamed")
        time.sleep(1.0)
        assert lease.lost is None and lease._thread.is_alive()
    before = store.read("lease/000001.json")
    time.sleep(0.5)
    assert store.read("lease/000001.json") != before and lease.lost is None
    lease.release()
    assert store.list("lease") == {}


def test_a_lease_that_is_being_written_is_a_drivers(store: RunStore) -> None:
    store.write("lease/000001.json", b"")
    assert Lease.holder(store) == ("a driver that cannot be told", True)


def test_copies_of_receipts_are_none(store: RunStore) -> None:
    """As tools that synchronise folders name them."""
    for folder in ("done", "lease", "quarantine"):
        store.write(f"{folder}/00000000-1.json", b"")
        assert store.names(folder) == set()
    store.write("tree/00000000-00000008-000-003.json", b"")
    store.write("tree/00000000.json", b"")
    assert store.names("tree") == {"00000000-00000008-000-003"}


def test_a_heartbeat_that_ends_says_why(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create_run({"fingerprint": "this"}, b"plan")
    lease = Lease(store, patience=0.5)

    def failing(*_: Any) -> None:
        raise ValueError("what nobody thought of")

    monkeypatch.setattr(RunStore, "write", failing)
    lease._thread.join(5)
    assert isinstance(lease.lost, StorageError) and "what nobody thought of" in str(lease.lost)


def test_a_driver_that_leaves_while_it_is_looked_for(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunStore, "names", lambda self, folder: {"000007"})
    assert Lease.holder(store) == (None, False)


def test_a_directory_of_something_else_is_refused(store: RunStore) -> None:
    store.write("notes.txt", b"mine")
    with pytest.raises(StorageError, match="holds no run of ours"):
        store.read_run()
    store.write("run.json", b'{"mine": 1}')
    with pytest.raises(StorageError, match="not written by a run of ours"):
        store.read_run()


def test_what_undoing_a_task_takes_along(store: RunStore) -> None:
    for task in range(4):
        store.commit("done", receipt(task))
    nodes = ["00000000-00000002-000-003", "00000002-00000004-000-003", "00000000-00000004-000-003-without-abc"]
    for name in nodes:
        store.commit("tree", Receipt(name, "this", {}, Counts()))
    store.write("reduced/manifest.json", seal({}))
    store.undo([2])
    assert store.names("done") == {f"{task:08d}" for task in (0, 1, 3)}
    assert store.names("tree") == {nodes[0]}
    assert "reduced/manifest.json" not in store.list()


def test_what_is_an_orphan(store: RunStore) -> None:
    kept = store.store("sums/a/layer_000.npz", b"named")
    store.create_run({"fingerprint": "this"}, b"plan")
    store.commit("done", Receipt("00000000", "this", {"sums_0": kept}, Counts()))
    store.write("quarantine/00000001.json", seal({"error": "x"}))
    assert store.orphans() == []
    store.write("sums/b/layer_000.npz", b"of a killed attempt")
    store.write("positions/00000000-x.parquet", b"of another")
    assert store.orphans() == ["positions/00000000-x.parquet", "sums/b/layer_000.npz"]


def test_what_a_damaged_receipt_may_name_is_no_orphan(store: RunStore) -> None:
    store.create_run({"fingerprint": "this"}, b"plan")
    node = "00000000-00000002-000-003"
    for folder, name, paths in (
        ("done", "00000000", ["sums/00000000-a/layer_000.npz", "positions/00000000-a.parquet"]),
        ("done", "00000001", ["sums/00000001-a/layer_000.npz"]),
        ("tree", node, [f"tree/{node}-a/layer_000.npz"]),
    ):
        files = {path: store.store(path, b"named") for path in paths}
        store.commit(folder, Receipt(name, "this", files, Counts()))
    for path in ("done/00000000.json", f"tree/{node}.json"):
        store.write(path, store.read(path)[:-9])
    store.write("sums/00000001-b/layer_000.npz", b"of a killed attempt")
    assert store.orphans() == ["sums/00000001-b/layer_000.npz"]


def test_workers_are_told_apart_by_device_and_versions() -> None:
    def worker(device: str, torch: str, check: float) -> dict[str, Any]:
        return {"device": device, "versions": {"torch": torch}, "self_check": {"scores": check}}

    cpu, gpu, newer = worker("cpu", "2.9", 1.0), worker("H200", "2.9", 2.0), worker("cpu", "2.10", 3.0)
    computed = [[cpu], [worker("cpu", "2.9", 4.0)], [gpu, newer], [gpu]]
    receipts = [Receipt(f"{i:08d}", "this", {}, Counts(), {}, workers) for i, workers in enumerate(computed)]
    assert shards.distinct_workers(receipts) == [cpu, gpu, newer]


def test_checking_names_what_is_wrong(store: RunStore) -> None:
    import pyarrow as pa

    from fisher_ray.shards import parquet_bytes

    table = store.store("positions/a.parquet", parquet_bytes(pa.table({"x": [1, 2, 3]})), rows=3)
    store.commit("done", Receipt("00000000", "this", {"positions": table}, Counts()))
    assert store.check("done", "00000000", "this")[1] == []
    assert "another plan" in store.check("done", "00000000", "other")[1][0].what
    assert store.check("done", "00000001", "this")[1] == [Problem("done/00000001.json", "is missing")]
    wrong = dataclasses.replace(table, rows=4)
    store.commit("done", Receipt("00000002", "this", {"positions": wrong}, Counts()))
    assert "4 rows" in store.check("done", "00000002", "this")[1][0].what


# ---- one driver at a time ----------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_while_the_first_lives(store: RunStore) -> None:
    first = Lease(store, patience=2.0)
    with pytest.raises(RefusedError, match=f"process {os.getpid()} on"):
        Lease(store, patience=2.0)
    assert first.lost is None
    first.release()
    assert store.list("lease") == {}
    Lease(store, patience=2.0).release()


def test_of_many_drivers_at_once_one_works(store: RunStore) -> None:
    held: list[Lease] = []
    refused: list[RefusedError] = []
    gate = threading.Barrier(6)

    def drive() -> None:
        gate.wait()
        try:
            held.append(Lease(store, patience=2.0))
        except RefusedError as error:
            refused.append(error)

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 5
    held[0].release()


def test_files_of_a_corpus_that_are_others_are_named(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcdef":
        (texts / f"{name}.txt").write_text(jobs.some_text(60))
    config = jobs.settings(gpt2, texts, tmp_path / "run", layers="1")
    jobs.run_here(config)
    (texts / "empty.txt").touch()
    os.utime(texts / "a.txt", (1, 1))
    for name in "bcde":
        (texts / f"{name}.txt").rename(texts / f"{name}{name}.txt")
    said = (
        r"another one: 1 file is changed \(a\.txt\), 4 files are gone \(b\.txt, c\.txt, d\.txt, \.\.\.\), "
        r"4 files are not in the run \(bb\.txt, cc\.txt, dd\.txt, \.\.\.\); "
        r"they are told by path, size and time of change\. Choose"
    )
    with pytest.raises(RefusedError, match=said):
        jobs.run_here(config)
    with pytest.raises(RefusedError, match=r"4 files are gone \([^)]*\); they are told by .*; max_docs was None, is 1"):
        jobs.run_here(dataclasses.replace(config, max_docs=1))
    (tmp_path / "run/plan.parquet").unlink()
    with pytest.raises(RefusedError, match=r"another run: the corpus is another one\. Choose"):
        jobs.run_here(config)


def test_a_dead_drivers_lease_is_taken_over(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once where the process can be seen to be gone, after some patience from elsewhere."""
    gone = seal(
        {"host": "there", "machine": shards._process()["machine"], "pid": os.getpid(), "started": "before", "beat": 3}
    )
    store.write("lease/000001.json", gone)
    begun = time.monotonic()
    Lease(store, patience=30.0).release()
    assert time.monotonic() - begun < 5
    store.write("lease/000001.json", seal({"host": "there", "machine": "another", "pid": 1, "started": "0", "beat": 3}))
    begun = time.monotonic()
    lease = Lease(store, patience=1.0)
    assert 0.9 < time.monotonic() - begun < 10
    assert list(store.list("lease")) == ["lease/000002.json"]
    lease.release()


def test_a_driver_that_was_taken_over_notices(store: RunStore) -> None:
    lease = Lease(store, patience=1.0)
    store.write("lease/000002.json", seal({"host": "there", "beat": 0}))
    deadline = time.monotonic() + 5
    while lease.lost is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lease.lost is not None and "taken this run over" in str(lease.lost)
    lease.release()
    assert "lease/000002.json" in store.list("lease")  # the other's stays


def test_a_driver_whose_number_was_given_to_another_notices(store: RunStore) -> None:
    """Both of its successors have left, and a third has started from 1 again."""
    lease = Lease(store, patience=1.0)
    store.write("lease/000001.json", seal({"host": "there", "beat": 0}))
    deadline = time.monotonic() + 5
    while lease.lost is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lease.lost is not None
    lease.release()


@pytest.mark.parametrize(
    ("path", "receipt"),
    [
        ("done/00000002.json", ("done", "00000002")),
        ("sums/00000002-0a1b2c3d/layer_001.npz", ("done", "00000002")),
        ("positions/00000002-0a1b2c3d.parquet", ("done", "00000002")),
        ("factors/00000002-0a1b2c3d/layer_001.npy", ("done", "00000002")),
        ("tree/00000000-00000008-000-003.json", ("tree", "00000000-00000008-000-003")),
        ("tree/00000000-00000008-000-003-without-0a1b2c3d-4e5f6071/layer_002.npz",
         ("tree", "00000000-00000008-000-003-without-0a1b2c3d")),
        ("run.json", None), ("reduced/layer_003/fisher.npy", None), ("quarantine/00000002.json", None),
    ],
)  # fmt: skip
def test_what_a_file_belongs_to(path: str, receipt: tuple[str, str] | None):
    assert receipt_of(path) == receipt
