"""Settings and fingerprint, sums, and what a run directory promises."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import jobs
from fisher_ray import cli
from fisher_ray.plan import ConfigError, RunConfig, make_plan
from fisher_ray.shards import Counts, Receipt, RunStore, StorageError, StoredFile, Sums
from jobs import gpt2  # noqa: F401

D = 7
FLOAT32 = 5e-6  # products are in float32; a position left out shows as 1e-2 in the sum of F / tr F


# ---- settings ----------------------------------------------------------------------------------------------------------

# For every setting that changes results another value than the default. A new setting has to be put here or below.
CHANGES: dict[str, Any] = {
    "layers": "1", "estimator": "exact", "num_samples": 3, "top_p": 0.9, "temperature": 0.7, "token_source": "sampled",
    "token_draws": 2, "token_top_p": 0.9, "token_temperature": 0.7, "max_seq_len": 20, "stride": 3, "batch_tokens": 100,
    "positions": "last", "max_docs": 1, "column": "other", "unit": "file", "columns": ("other",), "save": "factors",
    "seed": 1, "dtype": "bfloat16", "gradients": "per_position", "revision": "main", "trust_remote_code": True,
    "memory_budget": 1 << 20, "cpus_per_actor": 2,
}  # fmt: skip
NEEDS = {"token_draws": {"token_source": "sampled"}}
ELSEWHERE = {"model", "corpus", "encoder_column"}
EXECUTION: dict[str, Any] = {"output": "elsewhere", "actors": 3, "gpus_per_actor": 0.0}


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


def test_settings_come_back_from_a_file() -> None:
    config = RunConfig(
        model="m", corpus=("a", "b"), output="o", encoder_column="x", actors=3, gpus_per_actor=0.5, **CHANGES
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

    def instead(config: RunConfig, progress: Any) -> Any:
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


@pytest.mark.parametrize(("num_factors", "num_draws"), [(1, 1), (3, 1), (D, 4), (5000, 1)])
def test_sums_against_a_loop_in_float64(num_factors: int, num_draws: int) -> None:
    factors, activations = scores(9, num_factors, num_draws)
    sums = filled([0, 2], (factors, activations))
    for i, layer in enumerate([0, 2]):
        fisher, normalised, second, mean = np.zeros((D, D)), np.zeros((D, D)), np.zeros((D, D)), np.zeros(D)
        for g, h in zip(
            factors.double().numpy() * (layer + 1), activations.double().numpy() * (layer + 1), strict=True
        ):
            f = sum(np.outer(row, row) for row in g)
            fisher, second, mean = fisher + f, second + sum(np.outer(x, x) for x in h) / len(h), mean + h.mean(0)
            if f.trace() > 0:
                normalised = normalised + f / f.trace()
        assert sums.count[i] == 9 and sums.traced[i] == 8
        for got, truth in [(sums.fisher, fisher), (sums.normalised, normalised), (sums.second_moment, second)]:
            assert np.linalg.norm(got[i].numpy() - truth) < FLOAT32 * np.linalg.norm(truth)
        np.testing.assert_allclose(sums.activation[i].numpy(), mean, rtol=1e-6)


def test_many_small_terms_are_not_lost_beside_a_large_one() -> None:
    """A float32 running sum would stop at 2^24: 40 batches of ones after it would vanish."""
    sums = Sums([0], 1)
    sums.add(0, torch.full((1, 1, 1), 2.0**13), torch.zeros(1, 1, 1))
    for _ in range(40):
        sums.add(0, torch.full((1, 1, 1), 1.0), torch.zeros(1, 1, 1))
    assert float(sums.fisher) == 2.0**26 + 40


def test_packed_sums_are_rounded_once() -> None:
    sums = filled([0, 3], scores(40, 3), scores(41, 3, seed=1))
    back = Sums.from_bytes(sums.to_bytes())
    assert back.layers == [0, 3]
    for name in ("count", "traced", "activation"):
        assert torch.equal(getattr(back, name), getattr(sums, name))
    for name in ("fisher", "normalised", "second_moment"):
        exact, got = getattr(sums, name).triu(), getattr(back, name)
        assert got.dtype == torch.float64 and torch.equal(got.triu(), exact.float().double())
        assert torch.equal(got, got.mT) and not torch.equal(got.triu(), exact)
    assert Sums.from_bytes(back.to_bytes()).to_bytes() == sums.to_bytes()
    with np.load(io.BytesIO(sums.to_bytes()), allow_pickle=False) as arrays:
        assert arrays["fisher"].dtype == np.float32 and arrays["fisher"].shape == (2, D * (D + 1) // 2)


def test_merged_sums_are_sums_over_all() -> None:
    one, other = scores(6, 2, seed=1), scores(5, 2, seed=2)
    merged = filled([0, 1], one)
    merged.merge(filled([0, 1], other))
    both = filled([0, 1], one, other)
    for name in ("count", "traced", "fisher", "normalised", "second_moment", "activation"):
        torch.testing.assert_close(getattr(merged, name), getattr(both, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "other", [Sums([0, 2], D), Sums([0], D), Sums([0, 1], D + 1)], ids=["layers", "fewer", "width"]
)
def test_sums_of_something_else_are_refused(other: Sums) -> None:
    with pytest.raises(StorageError, match="cannot be added"):
        Sums([0, 1], D).merge(other)


def test_counts_add_up() -> None:
    assert Counts(1, 2, 3, 4, 5, 6) + Counts(10, 20, 30, 40, 50, 60) == Counts(11, 22, 33, 44, 55, 66)


# ---- storage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def receipt(task: int, plan: str = "this", seconds: float = 1.0) -> Receipt:
    return Receipt(task, plan, {"sums": StoredFile("sums/x", "0" * 64, 3)}, Counts(tokens=task), 0, seconds, {"a": [1]})


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
        with pytest.raises(OSError, match="large"):
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
    with pytest.raises(StorageError, match=r"sums/a\.npz is damaged"):
        store.load(stored)


def test_receipts_of_this_plan_only(store: RunStore) -> None:
    assert store.receipts("this") == {}
    for r in (receipt(11), receipt(2), receipt(3, plan="another")):
        store.commit(r)
    assert store.receipts("this") == {2: receipt(2), 11: receipt(11)}


def test_a_second_attempt_does_not_replace_the_first(store: RunStore) -> None:
    assert store.commit(receipt(4, seconds=1.0)) == receipt(4, seconds=1.0)
    assert store.commit(receipt(4, seconds=2.0)) == receipt(4, seconds=1.0)
    assert store.receipts("this") == {4: receipt(4, seconds=1.0)}


def test_a_run_is_created_once(store: RunStore, gpt2: str, corpus: Path) -> None:  # noqa: F811
    description = {"schema": "run.1", "fingerprint": "this", "result_fields": {"seed": 0}}
    plan = make_plan(jobs.settings(gpt2, corpus, "run"))
    assert store.read_run() is None
    store.create_run(description, plan.table())
    assert store.read_run() == description
    with pytest.raises(StorageError, match="another run"):
        store.create_run({**description, "fingerprint": "another"}, plan.table())
    store.discard()
    assert store.read_run() is None
