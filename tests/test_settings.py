"""What the settings give: saved factors and matrices, positions, token sources, other models and formats, the script."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf
from families import build

import jobs
from fisher_ray import open_run, worker
from fisher_ray.cli import main
from fisher_ray.corpus import Window
from fisher_ray.estimators import Exact
from fisher_ray.plan import ConfigError, RunConfig, token_text
from fisher_ray.scores import Pass, Scores, score_factors
from fisher_ray.split import SplitModel
from fisher_ray.worker import Worker
from jobs import LAYERS, MAX_POSITIONS, VOCAB, Stored, cluster, gpt2  # noqa: F401

ALL_LAYERS = list(range(LAYERS + 1))
CLOSE = 1e-3  # one position in float32 against float64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docs.txt"
    path.write_text(jobs.some_text(4_000))
    return path


@pytest.fixture(scope="module")
def documents(corpus: Path) -> list[list[int]]:
    """The tokenizer's ids of each document."""
    return [jobs.tokenizer()(text)["input_ids"] for _, text in jobs.paragraphs(corpus.read_bytes())]


def close(got: Any, truth: Any, tolerance: float = CLOSE) -> None:
    got, truth = np.asarray(got), np.asarray(truth)
    assert got.shape == truth.shape
    assert np.linalg.norm(got - truth) <= tolerance * np.linalg.norm(truth)


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_a_gpu_takes_more_tokens_together() -> None:
    config = RunConfig(model="m", corpus=("c",), output="o")
    assert [replace(config, device=device).together for device in (None, "cpu", "cuda")] == [4096, 4096, 32768]
    assert replace(config, device="cuda", batch_tokens=100).together == 100


@pytest.mark.parametrize("count", [1, 12, 2_000])
def test_batches_hold_little_padding(count: int) -> None:
    """Each window once, within the budget; and not a batch a window, as long as windows have lengths alike."""
    lengths = [int(n) for n in np.random.default_rng(count).integers(2, 513, count)]
    some = [Window(0, 0, [5] * n, 1, [1], None) for n in lengths]
    batches = list(Worker._batches(SimpleNamespace(config=SimpleNamespace(together=4096)), some))  # type: ignore[arg-type]
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= 4096 and padded - sum(lengths[i] for i in batch) <= max(128, padded / 8)
    assert len(batches) < 1.1 * sum(lengths) / 4096 + 12


# ---- what is kept ------------------------------------------------------------------------------------------------------


def test_saved_factors_and_matrices_stand_as_the_table_does(gpt2: str, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    runs = {
        save: jobs.run_here(
            jobs.settings(
                gpt2, corpus, tmp_path / save, save=save, estimator="sampled", num_samples=3, positions="1:40:3"
            )
        )[0]
        for save in ("factors", "matrices", "summary")
    }
    factors, matrices, summary = runs["factors"], runs["matrices"], runs["summary"]
    assert {path.name for path in summary.folder.iterdir()}.isdisjoint({"factors", "matrices"})
    for layer in ALL_LAYERS:
        g, f, rows = factors.saved("factors", layer), matrices.saved("matrices", layer), summary.rows(layer)
        assert g.shape == (len(rows), 3, jobs.D_MODEL) and f.shape == (len(rows), jobs.D_MODEL, jobs.D_MODEL)
        assert factors.rows(layer) == matrices.rows(layer) == rows
        trace = np.array([row["trace"] for row in rows])
        assert trace.std() > 0.1 * trace.mean()  # so that rows in another order would show
        np.testing.assert_allclose(np.square(g.astype(float)).sum((1, 2)), trace, rtol=1e-5)
        np.testing.assert_allclose(f.trace(axis1=1, axis2=2), trace, rtol=1e-5)
        close(g.mT @ g, f, 1e-6)
        close(f.astype(float).mean(0), summary.reduced(layer), 1e-6)


def test_columns_of_the_corpus_go_along(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"text": "one two", "kind": "a", "n": 1}, {"text": "three", "kind": None, "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    config = jobs.settings(gpt2, tmp_path / "a.parquet", tmp_path / "run", columns=("kind", "n"))
    got = {(r["document"], r["kind"], r["n"]) for r in jobs.run_here(config)[0].table.to_pylist()}
    assert got == {("a.parquet:0", "a", "1"), ("a.parquet:1", None, "2")}


def test_many_small_files_share_tasks(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    files = tmp_path / "files"
    files.mkdir()
    for i in range(20):
        (files / f"{i:02}.txt").write_text(f"file number {i}\n\nand more\n")
    stored, outcome = jobs.run_here(jobs.settings(gpt2, files, tmp_path / "run", num_samples=1, layers="1"))
    assert outcome.tasks == 1
    first = {r["document"]: r["token"] for r in stored.rows(1) if r["position"] == 0}
    assert [name.partition(":")[0] for name in first] == [f"{i:02}.txt" for i in range(20) for _ in range(2)]
    assert stored.counts()["documents"] == 40


# ---- which positions, which tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "chosen"), [("last", slice(-1, None)), ("2::5", slice(2, None, 5)), ("0,-1", None)]
)  # fmt: skip
def test_positions(spec: str, chosen: slice | None, gpt2: str, corpus: Path, documents: Any, tmp_path: Path) -> None:  # noqa: F811
    stored, _ = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / "run", positions=spec, num_samples=1, layers="1"))
    every, _ = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / "all", num_samples=1, layers="1"))
    truth = [sorted({0, len(ids) - 1}) if chosen is None else list(range(len(ids)))[chosen] for ids in documents]
    rows = stored.rows(1)
    assert [r["position"] for r in rows] == [t for of_one in truth for t in of_one]
    tokens = sum(map(len, documents))
    assert stored.counts() == {
        "documents": len(documents), "empty": 0, "tokens": tokens, "scored": len(rows), "skipped": tokens - len(rows),
        "invalid": 0, "halvings": 0,
    }  # fmt: skip
    # The same numbers as where all are scored: draws and context of a position do not depend on the others.
    same = {(r["document"], r["position"]): r for r in every.rows(1)}
    for row in rows:
        other = same[row["document"], row["position"]]
        assert row["trace"] == pytest.approx(other["trace"], rel=CLOSE)
        assert row["entropy"] == pytest.approx(other["entropy"], rel=CLOSE)


def test_drawn_tokens(gpt2: str, corpus: Path, documents: Any, tmp_path: Path) -> None:  # noqa: F811
    """A nucleus of nothing leaves the likeliest token, so that what was drawn is known."""
    config = jobs.settings(
        gpt2, corpus, tmp_path / "run", token_source="sampled", token_draws=2, token_top_p=1e-6, estimator="exact",
        save="matrices", positions="0,7,-1", max_docs=8,
    )  # fmt: skip
    stored, _ = jobs.run_here(config)
    library = jobs.library_model(gpt2)
    model = SplitModel.from_pretrained(gpt2, dtype="float64", check=False)
    truth: dict[int, list[Any]] = {layer: [] for layer in ALL_LAYERS}
    changed = 0
    for ids in documents[:8]:
        for t in sorted({t for t in (0, 7, len(ids) - 1) if t < len(ids)}):
            first, _, end = next(w for w in jobs.token_windows(len(ids), MAX_POSITIONS, 12) if w[1] <= t < w[2])
            window, at = [0, *ids[first:end]], t - first + 1
            likeliest = int(jobs.log_probs(library, window)[at - 1].argmax())
            changed += likeliest != window[at]
            window[at] = likeliest
            scores = score_factors(model, torch.tensor([window]), layers=ALL_LAYERS, estimator=Exact(), positions=[at])
            for layer in ALL_LAYERS:
                truth[layer].append(scores.matrices(layer)[0].numpy())
    assert changed > 10
    for layer in ALL_LAYERS:
        close(stored.saved("matrices", layer), truth[layer])
        close(stored.reduced(layer), np.mean(truth[layer], 0))


def test_sampled_scores_estimate_the_exact_matrix(gpt2: str, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    """The mean over some 1,800 positions of 64 scores each, every entry within 6 of its standard errors."""
    given: dict[str, Any] = {"layers": "1", "estimator": "sampled", "save": "factors"}
    exact, _ = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / "exact", estimator="exact", layers="1"))
    sampled, _ = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / "sampled", num_samples=64, seed=3, **given))
    g = sampled.saved("factors", 1).astype(float) * 8  # unscaled scores
    products = np.einsum("nsi,nsj->nsij", g, g)
    error = np.sqrt(products.var(1, ddof=1).sum(0) / 64) / len(g)
    assert (abs(sampled.reduced(1) - exact.reduced(1)) < 6 * error).all()
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact.reduced(1))


# ---- other models and formats ------------------------------------------------------------------------------------------


def test_an_encoder_decoder(tmp_path: Path) -> None:
    model_path = jobs.save_model(tmp_path / "t5", "t5")
    texts = [part for _, part in jobs.paragraphs(jobs.some_text(1_500).encode())][:8]
    rows = [{"said": a, "heard": b} for a, b in zip(texts, texts[::-1], strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = jobs.settings(
        model_path, tmp_path / "a.jsonl", tmp_path / "run", column="heard", encoder_column="said", estimator="exact",
        max_seq_len=32, stride=8,
    )  # fmt: skip
    stored, _ = jobs.run_here(config)
    model = SplitModel.from_pretrained(model_path, dtype="float64", check=False)
    truth: dict[int, list[Any]] = {layer: [] for layer in ALL_LAYERS}
    for row in rows:
        heard, said = (jobs.tokenizer()(row[name])["input_ids"] for name in ("heard", "said"))
        for first, new, end in jobs.token_windows(len(heard), 32, 8):
            scores = score_factors(
                model, torch.tensor([[0, *heard[first:end]]]), layers=ALL_LAYERS, estimator=Exact(),
                positions=[t - first + 1 for t in range(new, end)], encoder_input_ids=torch.tensor([said[:32]]),
            )  # fmt: skip
            for layer in ALL_LAYERS:
                truth[layer] += list(scores.matrices(layer).numpy())
    for layer in ALL_LAYERS:
        close(stored.reduced(layer), np.mean(truth[layer], 0), 1e-4)
        assert [r["trace"] for r in stored.rows(layer)] == pytest.approx([f.trace() for f in truth[layer]], rel=CLOSE)


def test_one_position_at_a_time_on_bloom(corpus: Path, documents: Any, tmp_path: Path) -> None:
    """Its attention mixes positions where own-position gradients cannot see it."""
    path = jobs.save_model(tmp_path / "bloom", "bloom")
    config = jobs.settings(
        path, corpus, tmp_path / "run", gradients="per_position", estimator="exact", save="matrices",
        positions="4,-1", max_docs=4, max_seq_len=400,
    )  # fmt: skip
    stored, _ = jobs.run_here(config)
    model = SplitModel.from_pretrained(path, dtype="float64", gradients="per_position", check=False)
    cases = [(ids, t) for ids in documents[:4] for t in sorted({t for t in (4, len(ids) - 1) if t < len(ids)})]
    for i, (ids, t) in enumerate(cases):
        truth = oracles.one_position(model, torch.tensor([0, *ids]), t + 1, ALL_LAYERS)
        for layer in ALL_LAYERS:
            close(stored.saved("matrices", layer)[i], truth.matrix(layer).numpy())
    assert len(cases) == stored.counts()["scored"]


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_token_ids_without_a_tokenizer(ending: str, tmp_path: Path) -> None:
    model = jobs.save_model(tmp_path / "model", with_tokenizer=False)
    ids = np.random.default_rng(0).integers(2, VOCAB, (5, 70))
    if ending == "npy":
        np.save(tmp_path / "a.npy", ids)
    else:
        pq.write_table(pa.table({"text": list(ids)}), tmp_path / "a.parquet", row_group_size=2)
    config = jobs.settings(model, tmp_path / f"a.{ending}", tmp_path / "run", layers="0,2", num_samples=2)
    stored, outcome = jobs.run_here(config)
    rows = stored.rows(2)
    assert [r["token"] for r in rows] == ids.flatten().tolist() and [r["text"] for r in rows] == list(
        map(str, ids.flat)
    )
    moved = Worker(outcome.plan, outcome.store).moved_tokens(
        [outcome.plan.make_tasks()[0]], {2: np.eye(jobs.D_MODEL)[:1]}
    )
    assert all(0 <= int(token) < VOCAB for tokens in moved[2][0] for token in tokens)


def test_a_micro_batch_is_gone_before_the_next_is_computed(
    corpus: Path,
    gpt2: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    score = Pass._score

    def watched(self: Pass, *batch: Any) -> Scores:
        assert all(factors() is None for factors in seen)
        scores = score(self, *batch)
        seen.append(weakref.ref(scores.factors[1]))
        return scores

    monkeypatch.setattr(Pass, "_score", watched)
    jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / "run", layers="1", batch_tokens=16))
    assert len(seen) > 5


def test_statistics_that_do_not_fit_are_of_fewer_positions(
    corpus: Path,
    gpt2: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"layers": "1", "save": "factors", "max_docs": 3}
    expected, _ = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / "whole", **settings))
    made = worker.statistics

    def statistics(factors: torch.Tensor) -> dict[str, np.ndarray]:
        if len(factors) > 3:
            raise torch.OutOfMemoryError("no more")
        return made(factors)

    monkeypatch.setattr(worker, "statistics", statistics)
    got, _ = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / "halved", **settings))
    assert got.counts()["halvings"] > 0 == expected.counts()["halvings"]
    for row, other in zip(expected.rows(1), got.rows(1), strict=True):
        assert row["position"] == other["position"]
        assert row["top_eigenvalues"] == pytest.approx(other["top_eigenvalues"], rel=1e-5)
    np.testing.assert_array_equal(got.reduced(1), expected.reduced(1))


@pytest.mark.parametrize(("gpus", "share"), [(None, 1.0), (0.25, 0.25), (1.0, 1.0), (2.0, 1.0)])
def test_a_worker_of_a_share_of_a_gpu_has_a_share_of_the_memory(
    gpus: float | None,
    share: float,
    corpus: Path,
    gpt2: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def noted(model: SplitModel, share: float) -> int:
        asked.append(share)
        return 1 << 30

    monkeypatch.setattr(worker, "default_memory_budget", noted)
    config = jobs.settings(gpt2, corpus, tmp_path / "run", layers="1", max_docs=1, gpus_per_actor=gpus, device="cpu")
    jobs.run_here(config)
    assert set(asked) == {share}


def test_positions_that_are_not_finite_are_left_out_and_counted(
    corpus: Path, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token overflows: no position that sees it is scored, every window without it is, and nothing else is lost."""
    path = jobs.save_model(tmp_path / "model", "untied")
    config = jobs.settings(path, corpus, tmp_path / "run", num_samples=1)
    token, init = documents[0][3], Worker.__init__

    def spoiled_worker(self: Worker, *args: Any) -> None:
        init(self, *args)
        with torch.no_grad():
            self.model.model.transformer.wte.weight[token] = float("inf")

    monkeypatch.setattr(Worker, "__init__", spoiled_worker)
    stored, _ = jobs.run_here(config)
    clean, spoiled = set(), set()
    for (offset, _), ids in zip(jobs.paragraphs(corpus.read_bytes()), documents, strict=True):
        for first, new, end in jobs.token_windows(len(ids), MAX_POSITIONS, 12):
            clean |= {(f"docs.txt:{offset}", t) for t in range(new, end) if token not in ids[first:end]}
            spoiled |= {(f"docs.txt:{offset}", t) for t in range(new, end) if token in ids[first : t + 1]}
    rows = stored.rows(0)
    got = {(r["document"], r["position"]) for r in rows}
    assert clean <= got and len(clean) > 100 and got.isdisjoint(spoiled) and len(spoiled) > 100
    counts = stored.counts()
    assert counts["scored"] == len(rows) == len(got) and counts["skipped"] == 0
    assert counts["scored"] + counts["invalid"] == counts["tokens"] == sum(map(len, documents))
    assert all(np.isfinite(r["trace"]) and np.isfinite(r["entropy"]) for r in rows)
    assert all(np.isfinite(stored.reduced(layer)).all() for layer in ALL_LAYERS)


# ---- over Ray, at length -----------------------------------------------------------------------------------------------


def test_a_quarter_of_a_megabyte(cluster: None, tmp_path: Path) -> None:  # noqa: F811
    """Every token of it is accounted for."""
    config = tf.GPT2Config(n_embd=4, n_layer=1, n_head=1, n_positions=128, vocab_size=VOCAB, bos_token_id=0)
    build(lambda: tf.GPT2LMHeadModel(config), torch.float32).save_pretrained(tmp_path / "model")
    jobs.tokenizer().save_pretrained(tmp_path / "model")
    text = jobs.some_text(1 << 18)
    (tmp_path / "docs.txt").write_text(text)
    argv = ["run", "--model", tmp_path / "model", "--corpus", tmp_path / "docs.txt", "--output", tmp_path / "run"]
    assert (
        main([*map(str, argv), "--max-actors", "2", "--layers", "1", "--num-samples", "1", "--positions", "::2"]) == 0
    )
    documents = [len(jobs.tokenizer()(part)["input_ids"]) for _, part in jobs.paragraphs(text.encode())]
    stored = Stored(tmp_path / "run")
    scored = sum(-(-length // 2) for length in documents)
    assert stored.counts() == {
        "documents": len(documents), "empty": 0, "tokens": sum(documents), "scored": scored,
        "skipped": sum(documents) - scored, "invalid": 0, "halvings": 0,
    }  # fmt: skip
    places = stored.table.select(["document", "position"])
    assert places.num_rows == scored == places.group_by(["document", "position"]).aggregate([]).num_rows


# ---- the published script's flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["observed", "sampled"])
def test_the_script(
    source: str, gpt2: str, corpus: Path, documents: Any, cluster: None, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    script = jobs.ROOT / "jobs/calculate_fisher_matrices.py"
    argv = {
        "model_name": gpt2, "layer_idx": 1, "output_dir": tmp_path / "run", "corpus": corpus, "batch_size": 4,
        "num_samples": 3, "max_seq_len": 40, "num_sequences": 6, "max_positions": 5, "position_skip": 2,
        "temperature": 0.9, "top_p": 0.95, "max_ctxt_len": 30, "random_seed": 5, "token_source": source,
    }  # fmt: skip
    flags = [str(part) for key, value in argv.items() for part in (f"--{key}", value)]
    process = jobs.python(str(script), *flags, RAY_ADDRESS=jobs.address())
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    stored = Stored(tmp_path / "run")
    config = stored.description["config"]
    shared = {"seed": 5, "max_seq_len": 31, "batch_tokens": 4 * 31, "token_source": source, "max_docs": 6}
    drawn = {"estimator": "exact", "token_draws": 3, "token_top_p": 0.95, "token_temperature": 0.9, "top_p": 1.0}
    plain = {"estimator": "sampled", "num_samples": 3, "top_p": 0.95, "temperature": 0.9, "token_draws": 1}
    assert config | shared | (drawn if source == "sampled" else plain) == config
    truth = [(t, ids[t]) for ids in documents[:6] for t in range(0, min(10, len(ids)), 2)]
    assert [(r["position"], r["token"]) for r in stored.rows(1)] == truth
    assert stored.reduced(1).shape == (jobs.D_MODEL, jobs.D_MODEL)
    assert not (stored.folder / "reduced/layer_000").exists()
    assert f"{len(truth):,} scored" in out
    mass = np.array([r["kept_mass"] for r in stored.rows(1)])
    assert (mass == 1).all() if source == "sampled" else (mass < 1).any() and (mass > 0.8).all()


def test_groups_with_long_names(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    """Titles, of which percent signs make names that no file system takes."""
    titles = ["\N{CJK UNIFIED IDEOGRAPH-6771}\N{CJK UNIFIED IDEOGRAPH-4EAC}" * 30 + end for end in ("", "x")]
    lines = [json.dumps({"text": f"one two three {i}", "title": titles[i % 2]}) for i in range(6)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    config = jobs.settings(
        gpt2, tmp_path / "docs.jsonl", tmp_path / "run", group_by="title", layers="1", estimator="exact"
    )
    jobs.run_here(config)
    run = open_run(tmp_path / "run")
    assert run.groups == sorted(titles)
    counts = [run.count(1, title) for title in titles]
    means = [run.fisher(1, title) for title in titles]
    np.testing.assert_allclose(np.average(means, 0, counts), run.fisher(1), rtol=1e-6, atol=1e-12)
    assert not np.allclose(*means)


def test_positions_of_later_windows_alone(gpt2: str, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    """None is in the first window, by which tasks and memory are reckoned."""
    length = MAX_POSITIONS // 2
    given = {"positions": f"{length}:", "max_seq_len": length, "layers": "1", "save": "factors"}
    stored, outcome = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / "run", **given))
    positions = [row["position"] for row in stored.rows(1)]
    assert positions and min(positions) == length and outcome.counts.scored == len(positions)


def test_a_token_is_shown_with_its_space() -> None:
    """Of tokenizers too that drop the space which a text begins with."""

    class Metaspace:
        tokens = ("▁the", "the", "▁")

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(self.tokens[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert [token_text(i, Metaspace()) for i in range(3)] == [" the", "the", " "]
    byte_level = jobs.tokenizer()
    for token in range(VOCAB):
        if "\ufffd" not in (text := byte_level.decode([token], clean_up_tokenization_spaces=False)):
            assert token_text(token, byte_level) == text


def test_a_part_of_a_letter_is_shown_as_bytes() -> None:
    """Which letter they are of can be told from those of the tokens beside it."""
    byte_level = jobs.tokenizer()
    shown = "".join(token_text(i, byte_level) for i in byte_level("一 b", add_special_tokens=False)["input_ids"])
    assert shown == "<0xE4><0xB8><0x80> b"

    class Bytes:
        """As LLaMA's has them."""

        def decode(self, ids: list[int], **_: Any) -> str:
            return "\ufffd" * len(ids)

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"<0x{token:02X}>" if token else "\ufffd"

    assert [token_text(token, Bytes()) for token in (228, 0)] == ["<0xE4>", "\ufffd"]


def test_settings_of_drawn_tokens_are_for_them() -> None:
    for changed in ({"token_top_p": 0.5}, {"token_temperature": 2.0}):
        with pytest.raises(ConfigError, match="token_top_p and token_temperature are for token_source sampled"):
            RunConfig(model="m", corpus=("c",), output="o", **changed)
        RunConfig(model="m", corpus=("c",), output="o", token_source="sampled", **changed)
