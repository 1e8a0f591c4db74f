"""What directions mean, against autograd over every token, steps through the library's own model, and weights made by hand."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf
from families import FAMILIES, build
from pretend import pretend_devices
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save_file
from torch import Tensor

import jobs
from fisher_ray import Exact, ModelError, SplitModel, cost, open_run, score_factors, worker
from fisher_ray import directions as fd
from fisher_ray.cli import BAD_INPUT, COMPLETE, STOPPED, main
from fisher_ray.head import Head
from fisher_ray.plan import make_plan, token_text
from fisher_ray.run import Run
from fisher_ray.tape import Tape
from fisher_ray.worker import load_model
from jobs import D_MODEL, LAYERS, MAX_POSITIONS, VOCAB, Stored, gpt2  # noqa: F401

LAYER = 1
STRIDE = 12  # a quarter of the window


@pytest.fixture(scope="module")
def made(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Two runs of one corpus, exact: one that keeps factors, one that keeps nothing of single positions; in several tasks."""
    folder = tmp_path_factory.mktemp("directions")
    (folder / "docs.txt").write_text(jobs.some_text(2_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", 400)
        for save in ("factors", "summary"):
            config = jobs.settings(gpt2, folder / "docs.txt", folder / save, estimator="exact", save=save)
            assert jobs.run_here(config)[1].tasks > 4
    return folder


@pytest.fixture
def run(made: Path) -> Run:
    return open_run(made / "summary")


@pytest.fixture(scope="module")
def split(gpt2: str) -> SplitModel:  # noqa: F811
    """The stored model in float64; oracles look at it through the library alone."""
    return SplitModel(jobs.library_model(gpt2), jobs.tokenizer())


def some_directions(k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, D_MODEL))


def window_of(document: str, position: int, made: Path) -> tuple[Tensor, int]:
    """The tokens of the window that scores a document's position, sink first, and where in it that is."""
    offset = int(document.rpartition(":")[2])
    text = dict(jobs.paragraphs((made / "docs.txt").read_bytes()))[offset]
    ids = jobs.tokenizer()(text)["input_ids"]
    for first, new, end in jobs.token_windows(len(ids), MAX_POSITIONS, STRIDE):
        if new <= position < end:
            return torch.tensor([0, *ids[first:end]]), position - first + 1
    raise AssertionError(f"{document} has no position {position}")


# ---- v^T F v -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5", "gpt_oss", "gptj", "mamba"])
def test_pushed_directions_have_the_variance_that_all_tokens_scores_have(name: str, models: Callable[..., SplitModel]):
    """v^T F v through J_z v, against sum_y p(y) (g_y . v)^2 by autograd, one token at a time."""
    split = models(name, gradients="per_position" if name in ("gptj", "mamba") else "own_position")
    batch = oracles.inputs(split, [9])
    at, along = torch.tensor([1, 4, 8]), torch.randn(2, 24, generator=torch.Generator().manual_seed(1)).double()
    tape = split.tape(batch.rows[0][None], oracles.encoded(split, batch.encoder_of(0)), [0, 2], at)
    for layer in (0, 2):
        got = split.head.predict(tape.z).variance(tape.push(layer, along))
        for n, position in enumerate(at.tolist()):
            truth = oracles.one_position(split, batch.rows[0], position, [layer], batch.encoder_of(0))
            expected = ((truth.scores[layer] @ along.mT).square() * truth.prob[:, None]).sum(0)
            torch.testing.assert_close(got[n], expected, rtol=2e-5, atol=0)


def test_variance_keeps_its_digits_where_p_is_peaked():
    """In float32, 1 - p(top) from 1e-2 to 1e-7: sum p x^2 - (sum p x)^2 loses all of them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator) + 30  # rows with a common part that drops out
    tangents = torch.randn(6, 2, 8, generator=generator)
    logits = torch.randn(6, 50, generator=generator)
    logits[:, 3] = torch.linspace(8, 20, 6)
    z = torch.linalg.lstsq(weight.double(), logits.double().mT).solution.mT
    head = Head(weight)
    got = head.predict(z.float()).variance(tangents)
    truth = Head(weight.double()).predict(z.float().double()).variance(tangents.double())
    p = (z.float().double() @ weight.double().mT).softmax(-1)
    rates = tangents.double() @ weight.double().mT
    mean = (p[:, None] * rates).sum(-1, keepdim=True)
    torch.testing.assert_close(truth, (p[:, None] * (rates - mean).square()).sum(-1), rtol=1e-9, atol=0)
    torch.testing.assert_close(got.double(), truth, rtol=2e-3, atol=0)


def test_cost_is_the_quadratic_form_of_the_mean_with_the_error_of_a_mean(run: Run, made: Path):
    directions = some_directions(3)
    got = fd.cost(run, LAYER, directions)
    factors = Stored(made / "factors").saved("factors", LAYER).astype(np.float64)
    each = ((factors @ directions.T) ** 2).sum(1) / 2  # one row a position
    np.testing.assert_allclose(got.value, each.mean(0), rtol=1e-5)
    # The blocks of a run this small are its tasks; the jackknife by leaving out one after the other.
    sizes = [size for receipt in Stored(made / "factors").receipts if (size := receipt["counts"]["scored"])]
    assert got.blocks == len(sizes) > 4
    variance, n = 0, len(each)
    for block in np.split(each, np.cumsum(sizes)[:-1]):
        m = len(block)
        moved = (each.sum(0) - block.sum(0)) / (n - m) - each.mean(0)
        variance = variance + (1 - 1 / len(sizes)) * moved**2
    np.testing.assert_allclose(got.error, variance**0.5, rtol=1e-3)
    one = fd.cost(run, LAYER, directions[1])
    assert one.value.shape == () and float(one.value) == pytest.approx(got.value[1]) and one.blocks == got.blocks


def test_cost_of_an_eigenvector_is_half_its_eigenvalue(run: Run):
    top = fd.top_directions(run, LAYER, 3)
    np.testing.assert_allclose(top @ top.T, np.eye(3), atol=1e-10)
    values = np.linalg.eigvalsh(run.fisher(LAYER))[::-1]
    np.testing.assert_allclose(2 * fd.cost(run, LAYER, top).value, values[:3], rtol=1e-6)


# ---- where ---------------------------------------------------------------------------------------------------------------


def test_the_strongest_positions_with_their_text(made: Path):
    direction = some_directions(1)[0]
    stored = Stored(made / "factors")
    rows = stored.rows(LAYER)
    strength = ((stored.saved("factors", LAYER).astype(np.float64) @ direction) ** 2).sum(1)
    order = np.argsort(-strength)[:6]
    kept = fd.strongest(open_run(made / "factors"), LAYER, direction, count=6)
    again = fd.strongest(open_run(made / "summary"), LAYER, direction, count=6, documents=1000)
    assert kept.source == "the factors of all positions (exact)"
    assert again.source == "the first 1000 documents of its tasks, computed again (exact)"
    for found in (kept.places, again.places):
        assert [(p.document, p.position) for p in found] == [(rows[i]["document"], rows[i]["position"]) for i in order]
        np.testing.assert_allclose([p.sensitivity for p in found], strength[order], rtol=1e-4)
        for place in found:
            ids, t = window_of(place.document, place.position, made)
            before, here = ids[max(1, t - 12) : t].tolist(), int(ids[t])
            assert place.text == jobs.tokenizer().decode([here])
            assert place.before.endswith("".join(jobs.tokenizer().decode([i]) for i in before))


def test_fewer_documents_are_the_first_ones(run: Run, made: Path):
    places = fd.strongest(run, LAYER, some_directions(1)[0], count=1000, documents=2).places
    offsets = [offset for offset, _ in jobs.paragraphs((made / "docs.txt").read_bytes())]
    assert {place.document for place in places} == {f"docs.txt:{offset}" for offset in offsets[:2]}


@pytest.mark.parametrize(("save", "scale"), [("factors", 2.5), ("summary", 0.9)])
def test_places_are_those_where_it_is_finite(save: str, scale: float, made: Path, split: SplitModel):
    """Of a direction so long that v^T F_t v is beyond the largest number at many: none of those, and none in place of them."""
    run, direction = open_run(made / save), some_directions(1)[0]
    long = direction * scale * np.finfo(np.float64).max ** 0.5
    with np.errstate(over="ignore"):
        every, found = (
            [place.sensitivity for place in fd.strongest(run, LAYER, v, 10_000, 5, split).places]
            for v in (direction, long)
        )
    assert 0.1 * len(every) < len(found) < 0.9 * len(every)
    assert np.isfinite(found).all() and min(found) > 0 and found == sorted(found, reverse=True)


def test_a_place_of_the_corpus_is_found_again(run: Run, made: Path, split: SplitModel):
    """In the window that scored it, the second of a long document too: there v^T F_t v is what it was."""
    direction = some_directions(1)[0]
    places = fd.strongest(run, LAYER, direction, 10_000, 1000, split).places
    beyond = [place for place in places if place.position > MAX_POSITIONS]
    for place in [*places[:2], *beyond[:2]]:
        ids, t = fd.window(run, place.document, place.position, split)
        expected, at = window_of(place.document, place.position, made)
        assert ids[0].tolist() == expected.tolist() and t == at
        scores = score_factors(split, ids, layers=[LAYER], estimator=Exact(), positions=[t])
        assert float((scores.factors[LAYER][0] @ torch.tensor(direction)).square().sum()) == pytest.approx(
            place.sensitivity
        )
    assert len(beyond) > 100
    for document, position in ((places[0].document, 10_000), (places[0].document, -1), ("docs.txt:3", 0)):
        with pytest.raises(ValueError, match=rf"has no scored position {position} in a document '{document}'"):
            fd.window(run, document, position, split)


def test_the_table_of_coordinates(run: Run, made: Path, split: SplitModel, tmp_path: Path):
    """Every scored position of every window, against h and F of autograd through the library's model."""
    directions = {0: some_directions(2), LAYER: some_directions(3, 1)}
    written = fd.project(run, directions, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    rows = table.to_pylist()
    assert written == len(rows) == 5 * run.count(LAYER)
    assert table.schema.equals(fd.COORDINATES_SCHEMA) and not list(tmp_path.glob("*.part"))
    positions = {(row["document"], row["position"]): row for row in Stored(made / "summary").rows(LAYER)}
    beyond = [row for row in rows if row["position"] > MAX_POSITIONS and row["layer"] == LAYER]
    for row in [*rows[:: len(rows) // 5], *beyond[:: len(beyond) // 3], rows[-1]]:
        ids, t = window_of(row["document"], row["position"], made)
        truth = oracles.one_position(split, ids, t, [row["layer"]])
        v = torch.tensor(directions[row["layer"]][row["direction"]])
        assert row["token"] == ids[t] == positions[row["document"], row["position"]]["token"]
        assert row["text"] == positions[row["document"], row["position"]]["text"]
        assert row["coordinate"] == pytest.approx(float(truth.streams[row["layer"]] @ v), rel=1e-4, abs=1e-5)
        assert row["sensitivity"] == pytest.approx(float(v @ truth.matrix(row["layer"]) @ v), rel=1e-3)
    assert len(beyond) > 300


def test_many_directions_are_measured_by_factors_and_the_numbers_are_the_same(run: Run, tmp_path: Path):
    few = {LAYER: some_directions(3)}
    many = {LAYER: np.concatenate([few[LAYER], some_directions(20, 7)])}
    for name, directions in (("few", few), ("many", many)):
        fd.project(run, directions, tmp_path / name, documents=3)
    one, other = (pq.read_table(tmp_path / name) for name in ("few", "many"))
    assert len(other) * 3 == len(one) * 23
    other = other.filter(pc.field("direction") < 3)
    assert one.drop_columns(["coordinate", "sensitivity"]).equals(other.drop_columns(["coordinate", "sensitivity"]))
    for name in ("coordinate", "sensitivity"):
        np.testing.assert_allclose(one[name], other[name], rtol=2e-4, atol=1e-6)


# ---- what they move ------------------------------------------------------------------------------------------------------


def test_few_windows_tell_no_error_and_so_no_tokens(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    """Of one the error would be zero, and every token that moves beyond it."""
    for count, said in ((1, False), (7, False), (8, True)):
        corpus = tmp_path / f"{count}.jsonl"
        corpus.write_text("".join(json.dumps({"text": "The same words again."}) + "\n" for _ in range(count)))
        run, _ = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / str(count), layers="1", estimator="exact"))
        rows = pq.read_table(run.folder / "reduced/directions.parquet").to_pylist()
        assert rows and all(bool(row["raised"] or row["lowered"]) == said for row in rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_directions_that_are_none_are_refused(bad: float, run: Run, split: SplitModel, tmp_path: Path) -> None:
    """One of them would leave every position out."""
    rows = some_directions(3)
    rows[1] = bad
    with pytest.raises(ValueError, match="directions at layer 1 must be finite and not zero; rows 1 are not"):
        fd.project(run, {LAYER: rows}, tmp_path / "out.parquet", model=split)
    assert not (tmp_path / "out.parquet").exists()


def test_moved_tokens_of_several_directions(
    gpt2: str, split: SplitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Means over documents of g_y . v at all positions, as these are short, of tokens that the documents agree on."""
    texts = ["abcd", "0123", "zyzy", "!?.,", "q w ", "mnop", "RSTU", "x=1;"]
    (tmp_path / "docs.txt").write_text("\n\n".join(texts))
    jobs.run_here(jobs.settings(gpt2, tmp_path / "docs.txt", tmp_path / "run", task_bytes=12))
    assert len(open_run(tmp_path / "run").done_tasks) == 4
    directions = some_directions(2)
    each: list[np.ndarray] = []
    for text in texts:
        ids = torch.tensor([0, *jobs.tokenizer()(text)["input_ids"]])
        assert len(ids) <= 5
        truths = [oracles.one_position(split, ids, t, [LAYER]) for t in range(1, len(ids))]
        each.append(np.mean([truth.scores[LAYER] @ torch.tensor(directions).mT for truth in truths], 0))
    means, errors = np.mean(each, 0).T, np.std(each, 0, ddof=1).T / len(each) ** 0.5
    # Documents so short agree on most tokens; asked for more agreement, on some of those that are moved most.
    limit = float(np.median([(abs(m) / e)[abs(m).argsort()[-10:]] for m, e in zip(means, errors, strict=True)]))
    monkeypatch.setattr(worker, "_CONSISTENT", limit)
    (found,) = fd.moved_tokens(open_run(tmp_path / "run"), {LAYER: directions}).values()
    for (raised, lowered), mean, error in zip(found, means, errors, strict=True):
        agreed = [int(i) for i in mean.argsort() if abs(mean[i]) > limit * error[i]]
        assert raised == [token_text(i, jobs.tokenizer()) for i in agreed[::-1] if mean[i] > 0][:5]
        assert lowered == [token_text(i, jobs.tokenizer()) for i in agreed if mean[i] < 0][:5]
    assert found[0] != found[1]


# ---- safe subspaces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_safe_directions_hold_what_they_may_and_cost_what_f_says(run: Run, share: float):
    """Steps short enough for the second order: measured KL within four standard errors of v^T F v / 2, and apart."""
    got = fd.safe_directions(run, LAYER, share, norm=0.02, documents=1000)
    m, fisher = len(got.vectors), np.array(run.fisher(LAYER))
    np.testing.assert_allclose(got.vectors @ got.vectors.T, np.eye(m), atol=1e-10)
    held = np.trace(got.vectors @ fisher @ got.vectors.T) / np.trace(fisher)
    assert got.share == pytest.approx(held) and held <= share
    assert np.linalg.eigvalsh(fisher)[: m + 1].sum() > share * np.trace(fisher)
    assert got.predicted == pytest.approx(0.02**2 * held * np.trace(fisher) / m / 2, rel=1e-6, abs=0)
    assert got.random_predicted == pytest.approx(0.02**2 * np.trace(fisher) / D_MODEL / 2, rel=1e-6, abs=0)
    assert abs(got.kl.value - got.predicted) < 4 * got.kl.error < got.predicted
    assert abs(got.random_kl.value - got.random_predicted) < 4 * got.random_kl.error < got.random_predicted
    assert got.kl.value < 0.6 * got.random_kl.value


def test_shares_that_no_subspace_has(run: Run):
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"share must be in \(0, 1\)"):
            fd.safe_directions(run, LAYER, share)
    steep = Fixed(np.diag(np.arange(1.0, D_MODEL + 1)))
    with pytest.raises(ValueError, match=r"smallest eigenvalue at layer 0 holds 0.013 of the trace, more than 0.01"):
        fd.safe_directions(steep, 0, 0.01)


# ---- heads and layers ----------------------------------------------------------------------------------------------------


class Fixed(Run):
    """A run whose mean F is given."""

    def __init__(self, fisher: np.ndarray):
        self.d_model, self._fisher = len(fisher), fisher

    def fisher(self, layer: int, group: str | None = None, normalised: bool = False) -> np.ndarray:
        return self._fisher


def planted(rows: Tensor, head: int, size: int, u: Tensor, scale: Tensor) -> Tensor:
    """Weights [heads * size, d] of which that head alone reads u through a norm of the given scale, and reads nothing else."""
    read = rows * scale
    read = read - torch.outer(read @ u, u)
    read[head * size : (head + 1) * size] = torch.outer(torch.arange(1.0, size + 1).to(u), u)
    return read / scale


def test_a_model_on_a_device_takes_what_is_in_main_memory(unchecked_shapes: None):
    """Steering too: ids, positions and targets as anyone makes them."""
    ids, at, targets = torch.arange(1, 13)[None], torch.tensor([3, 9]), torch.tensor([5, 6])
    nothing: Any = None
    here = SplitModel(build(FAMILIES["llama"]))
    expected = fd.steer(here, nothing, 1, ids, at, targets, "euclidean")
    kl_expected = fd.nudge(here, 1, ids, expected.steps[0], [1.0], at).kl
    with pretend_devices():
        split = SplitModel(build(FAMILIES["llama"]).to("meta:0"), check=False)
        got = fd.steer(split, nothing, 1, ids, at, targets, "euclidean")
        torch.testing.assert_close(got.steps.cpu(), expected.steps, rtol=1e-5, atol=1e-8)
        kl = fd.nudge(split, 1, ids, got.steps[0].float().requires_grad_(), [1.0], at).kl
        torch.testing.assert_close(kl.cpu(), kl_expected, rtol=1e-4, atol=1e-8)


def test_steps_of_half_precision_are_those_that_were_taken():
    """h and the step rounded together: what is given back, added to h, is the h that was tried."""
    split = SplitModel(build(FAMILIES["llama"], torch.bfloat16))
    ids, at, targets = torch.arange(1, 13)[None], torch.tensor([3, 9]), torch.tensor([5, 6])
    nothing: Any = None
    got = fd.steer(split, nothing, 1, ids, at, targets, "euclidean")
    stream = split.tape(ids, {}, [1], at).streams[1]
    moved = stream.double() + got.steps
    assert torch.equal(moved, moved.bfloat16().double())


def test_opening_the_model_of_a_run_leaves_the_process_as_it_is(run: Run, gpt2: str):  # noqa: F811
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    )
    torch.set_num_threads(before[0] + 1)
    try:
        fd.model_of(run)
        assert (torch.get_num_threads() - 1, *before[1:]) == before
        assert torch.are_deterministic_algorithms_enabled() == before[1]
        assert torch.backends.cuda.flash_sdp_enabled() == before[2]
    finally:
        torch.set_num_threads(before[0])


def test_a_model_that_ran_compiled_is_not_compiled_to_be_read(run: Run, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    monkeypatch.setattr(fd, "load_model", asked.append)
    vars(run)["config"] = replace(run.config, compile=True)
    fd.model_of(run)
    assert [config.compile for config in asked] == [False]


def test_a_hub_models_tokenizer_is_that_of_its_commit(run: Run, split: SplitModel, monkeypatch: pytest.MonkeyPatch):
    """A branch may have moved since the run."""
    commit = "0123456789abcdef" * 2 + "01234567"
    digests = {**run.description["result_fields"], "weights": commit, "tokenizer": commit}
    run.description["result_fields"] = digests
    vars(run)["config"] = replace(run.config, model="some/model")
    plan = make_plan(open_run(run.store.uri).config)

    def planned(config: Any) -> Any:
        assert config.model == "some/model"
        now = config.revision or "f" * 40
        return replace(plan, result_fields={**digests, "weights": now, "tokenizer": now})

    monkeypatch.setattr(fd, "make_plan", planned)
    assert fd.worker_of(run, split).plan.config.model == plan.config.model


@pytest.mark.parametrize(("gpus", "placed"), [(None, None), (1.0, None), (2.0, "auto")])
def test_a_model_that_took_several_gpus_takes_them_again(
    gpus: float | None, placed: str | None, run: Run, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(SplitModel, "from_pretrained", classmethod(lambda cls, *_, **given: asked.update(given)))
    load_model(replace(run.config, device=None, gpus_per_actor=gpus))
    assert (asked["device"], asked["device_map"]) == (None, placed)


def test_what_heads_read_is_known_of_weights_that_are_streamed(tmp_path: Path):
    build(FAMILIES["llama"], torch.float32).save_pretrained(tmp_path)
    whole, streamed = (SplitModel.from_pretrained(tmp_path, stream_weights=each, check=False) for each in (False, True))
    expected, got = (fd.reading_heads(split, Fixed(np.diag(np.arange(24.0))), 1, 5) for split in (whole, streamed))
    for name, shares in expected.items():
        np.testing.assert_array_equal(got[name], shares)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma", "opt", "olmo2"])
def test_one_head_alone_reads_a_direction(name: str):
    model = build(FAMILIES[name], torch.float64)
    split = SplitModel(model, check=False)
    block, d = split.blocks[1], split.d_model
    u = torch.randn(d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u = u - u.mean()  # a LayerNorm lets nothing else through
    u = u / u.norm()
    scale = {
        "gpt2": lambda: block.ln_1.weight,
        "gemma": lambda: 1 + block.input_layernorm.weight,
        "opt": lambda: block.self_attn_layer_norm.weight,
        "olmo2": lambda: torch.ones(d, dtype=torch.float64),  # its norms stand behind attention and MLP
    }.get(name, lambda: block.input_layernorm.weight)()
    size = 6
    if name == "gpt2":
        fused = block.attn.c_attn.weight
        query, key, value = fused.T.chunk(3)
        fused.copy_(torch.cat([planted(query, 2, size, u, scale), planted(key, 1, size, u, scale), value]).T)
        where = {"query": [0, 0, 1, 0], "key": [0, 1, 0, 0]}
    else:
        attention = block.self_attn
        attention.q_proj.weight.copy_(planted(attention.q_proj.weight, 2, size, u, scale))
        attention.k_proj.weight.copy_(planted(attention.k_proj.weight, 1, size, u, scale))
        grouped = attention.k_proj.weight.shape[0] < attention.q_proj.weight.shape[0]
        where = {"query": [0, 0, 1, 0], "key": [0, 0, 1, 1] if grouped else [0, 1, 0, 0]}
    shares = fd.reading_heads(split, Fixed(torch.outer(u, u).numpy()), 1, 1)
    for what, expected in where.items():
        np.testing.assert_allclose(shares[what], expected, atol=1e-4)  # the norm's epsilon
    assert (shares["value"] > 0.001).all() and (shares["value"] < 0.5).all()
    everything = fd.reading_heads(split, Fixed(np.eye(d)), 1, d)
    for share in everything.values():
        np.testing.assert_allclose(share, 1, atol=1e-12)


def _many_heads() -> Any:
    """BigCode's other order: with a key and a value for each head."""
    sizes = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 61}
    return tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**sizes, bos_token_id=1, eos_token_id=2, multi_query=False))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "phi3", "gpt_bigcode", "many_heads"])
def test_heads_read_what_the_librarys_attention_is_given(name: str, monkeypatch: pytest.MonkeyPatch):
    """Against queries, keys and values that the library's own code hands to its attention, unit vectors going in.

    They are at position 0, where rotary embeddings turn nothing, and enter behind the norm, whose scale is given here.
    """
    model = build(_many_heads if name == "many_heads" else FAMILIES[name], torch.float64)
    block = SplitModel(model, check=False).blocks[1]
    attention = getattr(block, "attn", None) or getattr(block, "attention", None) or block.self_attn
    norm = block.ln_1 if hasattr(block, "ln_1") else block.input_layernorm
    d, heads = len(norm.weight), model.config.num_attention_heads
    seen: dict[str, Tensor] = {}

    def captured(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module is attention:
            seen.update(query=query, key=key, value=value)
        return original(module, query, key, value, *args, **kwargs)

    library = sys.modules[type(attention).__module__]
    original = library.eager_attention_forward
    monkeypatch.setattr(library, "eager_attention_forward", captured)
    model.set_attn_implementation("eager")
    inputs = torch.cat([torch.eye(d, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)])[:, None]
    norm.register_forward_hook(lambda *_: inputs)
    model(torch.ones(d + 1, 1, dtype=torch.int64), use_cache=False)
    monkeypatch.undo()

    model = build(_many_heads if name == "many_heads" else FAMILIES[name], torch.float64)
    got = fd.reading_heads(SplitModel(model, check=False), Fixed(np.diag(np.arange(d, 0.0, -1))), 1, 5)
    scale = torch.diag(norm.weight)
    if isinstance(norm, torch.nn.LayerNorm):
        scale = scale @ (torch.eye(d, dtype=torch.float64) - 1 / d)
    for what, shares in got.items():
        read = (seen[what][:d] - seen[what][d])[:, :, 0].permute(1, 2, 0) @ scale  # [heads, head_dim, d_model]
        read = read.repeat_interleave(heads // len(read), 0)
        truth = read[..., :5].square().sum((1, 2)) / read.square().sum((1, 2))
        np.testing.assert_allclose(shares, truth, rtol=1e-4)
    assert np.ptp(got["query"]) > 0.005


def test_attention_that_is_not_known(models: Callable[..., SplitModel], run: Run, split: SplitModel):
    with pytest.raises(ModelError, match=r"DeepseekV3DecoderLayer of .* has no attentions with known weights: q_proj"):
        fd.reading_heads(models("deepseek_v3"), Fixed(np.eye(24)), 1, 2)
    with pytest.raises(ValueError, match=rf"layer must be in \[0, {LAYERS}\)"):
        fd.reading_heads(split, run, LAYERS, 2)


def test_overlaps_are_traces_of_products_of_projectors(run: Run):
    k = 4
    got, chance = fd.overlaps(run, k)
    projectors = []
    for layer in run.layers:
        vectors = np.linalg.eigh(run.fisher(layer))[1][:, -k:]
        projectors.append(vectors @ vectors.T)
    truth = [[np.trace(one @ other) / k for other in projectors] for one in projectors]
    np.testing.assert_allclose(got, truth, atol=1e-8)
    np.testing.assert_allclose(np.diag(got), 1)
    assert chance == k / D_MODEL
    whole, one = fd.overlaps(run, D_MODEL)
    assert one == 1
    np.testing.assert_allclose(whole, 1)


# ---- steering ------------------------------------------------------------------------------------------------------------


def nudged_log_probs(split: SplitModel, ids: Tensor, t: int, step: Tensor) -> Tensor:
    """log p at t with a step added to the stream there, through the library's own model."""

    def before(module: Any, args: Any) -> Any:
        stream = args[0].clone()
        stream[:, t] += step
        return (stream, *args[1:])

    handle = split.blocks[LAYER].register_forward_pre_hook(before)
    try:
        return oracles.library_logits(split, ids[None])[0, t].double().log_softmax(-1)
    finally:
        handle.remove()


@pytest.mark.parametrize("metric", ["euclidean", "mean", "position"])
def test_steps_gain_what_was_asked_along_the_direction_of_the_formula(run: Run, split: SplitModel, metric: Any):
    ids, at, targets = (
        torch.randint(2, 400, (20,), generator=torch.Generator().manual_seed(3)),
        [2, 7, 19],
        [5, 250, 31],
    )
    got = fd.steer(split, run, LAYER, ids[None], torch.tensor(at), torch.tensor(targets), metric, gain=0.1)
    for n, (t, target) in enumerate(zip(at, targets, strict=True)):
        truth = oracles.one_position(split, ids, t, [LAYER])
        g = truth.scores[LAYER][target]
        fisher = {
            "euclidean": torch.zeros(D_MODEL, D_MODEL, dtype=torch.float64),
            "mean": torch.tensor(run.fisher(LAYER)),
            "position": truth.matrix(LAYER),
        }[metric]
        damped = fisher + 0.01 * (fisher.trace() or 1) / D_MODEL * torch.eye(D_MODEL, dtype=torch.float64)
        direction = torch.linalg.inv(damped) @ g
        assert torch.nn.functional.cosine_similarity(got.steps[n], direction, dim=0) > 1 - 1e-6
        after = nudged_log_probs(split, ids, t, got.steps[n])
        assert float(after[target] - truth.log_prob[target]) == pytest.approx(0.1, abs=1e-6)
        assert float(got.gain[n]) == pytest.approx(0.1, abs=1e-6)
        others = torch.arange(400) != target
        p, q = truth.log_prob[others].exp(), after[others].exp()
        p, q = p / p.sum(), q / q.sum()
        assert float(got.kl_others[n]) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_what_the_caller_asks_of_products_changes_no_number(run: Run, gpt2: str, tmp_path: Path):  # noqa: F811
    model = SplitModel.from_pretrained(gpt2)
    ids, at, targets = torch.arange(2, 22)[None], torch.tensor([2, 7, 19]), torch.tensor([5, 250, 31])
    many = {LAYER: some_directions(20, 7)}
    found = []
    for asked in (False, True):
        with torch.autocast("cpu", enabled=asked):
            fd.project(run, many, tmp_path / "table", documents=1, model=model)
            found.append((fd.steer(model, run, LAYER, ids, at, targets), pq.read_table(tmp_path / "table")))
    (steered, table), (other, other_table) = found
    assert torch.equal(steered.gain, other.gain) and torch.equal(steered.steps, other.steps)
    torch.testing.assert_close(steered.gain, torch.full((3,), 0.1, dtype=torch.float64), atol=1e-5, rtol=0)
    assert table.equals(other_table)


def test_positions_are_taken_as_scores_take_them(run: Run, split: SplitModel):
    ids, at, targets = torch.arange(2, 14)[None], torch.tensor([3, 8]), torch.tensor([7, 9])
    expected = fd.steer(split, run, LAYER, ids, at, targets, "position")
    for given, wanted in (([3, -4], [7, 9]), (torch.tensor([-9, -4]), targets)):
        got = fd.steer(split, run, LAYER, ids, given, wanted, "position")
        assert torch.equal(got.steps, expected.steps) and torch.equal(got.gain, expected.gain)


def test_the_metric_of_a_position_changes_the_other_tokens_least(run: Run, split: SplitModel):
    ids = torch.randint(2, 400, (1, 30), generator=torch.Generator().manual_seed(4))
    at = torch.arange(1, 30)
    targets = torch.randint(2, 400, (29,), generator=torch.Generator().manual_seed(5))
    plain, own = (fd.steer(split, run, LAYER, ids, at, targets, metric) for metric in ("euclidean", "position"))
    assert (own.kl_others < plain.kl_others).all()
    assert (own.steps.norm(dim=1) > plain.steps.norm(dim=1)).float().mean() > 0.9  # at the price of a longer step


def test_a_gain_that_no_step_reaches_is_nan_and_others_go_on(run: Run, split: SplitModel):
    ids, at, targets = torch.arange(2, 14)[None], torch.tensor([3, 8]), torch.tensor([7, 9])
    got = fd.steer(split, run, LAYER, ids, at, targets, "mean", gain=30.0)
    assert got.gain.isnan().all() and got.kl_others.isnan().all() and got.steps.isnan().all()


def test_what_cannot_be_steered_is_said(run: Run, split: SplitModel, unchecked_shapes: None):
    ids, at, targets = torch.arange(2, 14)[None], torch.tensor([3, 8]), torch.tensor([7, 9])
    for given, message in (
        ((ids, at.flip(0), targets), r"positions must ascend within \[0, 12\), got \[8, 3\]"),
        ((ids, at + 5, targets), r"positions of sequence 0 must be in \[0, 12\), or negative; got 13"),
        ((ids, at - 4, targets), r"positions must ascend within \[0, 12\), got \[-1, 4\]"),
        ((ids, [3, -9], targets), r"positions must ascend within \[0, 12\), got \[3, -9\]"),
        ((ids, at, targets + 400), r"targets must be tokens in \[0, 400\), got \[407, 409\]"),
        ((ids + 400, at, targets), r"token ids must be in \[0, 400\), got 413"),
        ((ids[0], at, targets), r"input_ids must be one sequence, \[1, seq\], got \[12\]"),
        ((ids.expand(2, -1), at, targets), r"one sequence, .* got \[2, 12\]"),
        ((ids, at, targets[:1]), r"positions and targets must be as many, \[n\], got \[2\] and \[1\]"),
        ((ids, at[:0], targets[:0]), r"as many, \[n\], got \[0\] and \[0\]"),
        ((ids, at, targets, "mean", 0.0), "gain must be above 0 nats, got 0.0"),
        ((ids, at, targets, "mean", -0.1), "gain must be above 0 nats, got -0.1"),
        ((ids, at, targets, "mean", float("nan")), "gain must be above 0 nats, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            fd.steer(split, run, LAYER, *given)


# ---- steps along a direction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gptj"])
@pytest.mark.parametrize("rows", [None, 3])
def test_what_a_step_does_is_what_it_does_to_the_librarys_model(
    name: str, rows: int | None, models: Callable[..., SplitModel], monkeypatch: pytest.MonkeyPatch
):
    """A hook adds it at one position at a time; predictions all together, and a few at a time."""
    split = models(name, gradients="per_position" if name == "gptj" else "own_position")
    if rows is not None:
        monkeypatch.setattr(Head, "positions_at_once", lambda self: rows)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, split.head.vocab_size, (8,), generator=generator)
    v = torch.randn(split.d_model, generator=generator, dtype=torch.float64)
    steps = [0.5, -0.5, 0.0, 3.0]
    got = fd.nudge(split, LAYER, ids[None], v, steps, top=3)
    assert got.positions.tolist() == list(range(8)) and got.kl.shape == (4, 8) and got.raised.shape == (4, 8, 3)
    for t in range(8):
        before = nudged_log_probs(split, ids, t, 0 * v)
        for i, step in enumerate(steps):
            after = nudged_log_probs(split, ids, t, step * v)
            kl = (before.exp() * (before - after)).sum()
            torch.testing.assert_close(got.kl[i, t], kl, rtol=1e-5, atol=1e-12)
            change = after.exp() - before.exp()
            order = change.argsort(descending=True)
            if step:
                assert got.raised[i, t].tolist() == order[:3].tolist()
                assert got.lowered[i, t].tolist() == order.flip(0)[:3].tolist()
            torch.testing.assert_close(got.raised_by[i, t], change[got.raised[i, t]], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(got.lowered_by[i, t], change[got.lowered[i, t]], rtol=1e-5, atol=1e-9)
    some = fd.nudge(split, LAYER, ids[None], v, np.array(steps), positions=[-1, 2], top=1000)
    assert some.positions.tolist() == [2, 7] and some.raised.shape == (4, 2, split.head.vocab_size)
    torch.testing.assert_close(some.kl, got.kl[:, [2, 7]], rtol=1e-9, atol=1e-15)


def test_short_steps_cost_what_f_says(split: SplitModel):
    ids, v = torch.arange(2, 14)[None], some_directions(1)[0]
    scores = score_factors(split, ids, layers=[LAYER], estimator=Exact())
    expected = (scores.factors[LAYER] @ torch.tensor(v)).square().sum(1) / 2
    kl = fd.nudge(split, LAYER, ids, v, [1e-3, 2e-3]).kl
    torch.testing.assert_close(kl / torch.tensor([[1e-6], [4e-6]]), expected.expand(2, -1), rtol=1e-2, atol=0)


def test_what_cannot_be_nudged_is_said(split: SplitModel, models: Callable[..., SplitModel], unchecked_shapes: None):
    ids, v = torch.arange(2, 14)[None], np.ones(D_MODEL)
    for given, message in (
        ((LAYER, ids, v, []), r"steps must be finite numbers, one at least, got \[\]"),
        ((LAYER, ids, v, [1.0, float("nan")]), r"steps must be finite numbers, .* got \[1.0, nan\]"),
        ((LAYER, ids, v, [1.0], [12]), r"positions of sequence 0 must be in \[0, 12\), or negative; got 12"),
        ((LAYER, ids, v, [1.0], []), "no positions to score"),
        ((LAYER, ids, v, [1.0], None, 0), "top must be at least 1, got 0"),
        ((7, ids, v, [1.0]), r"layer_idx must be in \[0, 2\], got 7"),
        ((LAYER, ids[0], v, [1.0]), r"input_ids must be one sequence, \[1, seq\], got \[12\]"),
        ((LAYER, ids + 400, v, [1.0]), r"token ids must be in \[0, 400\), got 413"),
    ):
        with pytest.raises(ValueError, match=message):
            fd.nudge(split, *given)
    with pytest.raises(ValueError, match="has an encoder; expected a model without"):
        fd.nudge(models("t5"), LAYER, ids, np.ones(24), [1.0])


# ---- files, models and the command ---------------------------------------------------------------------------------------


def test_directions_are_read_from_both_kinds_of_files(tmp_path: Path):
    rows = some_directions(3).astype(np.float32)
    np.save(tmp_path / "a.npy", rows)
    save_file({"W_dec": rows, "W_enc": rows.T.copy(), "b": rows[:, 0].copy()}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", W_dec=rows, W_enc=rows.T)
    for name, tensor in (("a.npy", None), ("a.npz", "W_dec"), ("a.safetensors", "W_dec")):
        np.testing.assert_array_equal(fd.read_directions(tmp_path / name, D_MODEL, tensor), rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [3, D_MODEL, 40])
def test_a_decoder_of_linear_layers_is_read_by_columns(k: int, dtype: torch.dtype, tmp_path: Path):
    """And not its encoder's rows in place of them; a square matrix by rows."""
    sizes = {"encoder": (D_MODEL, k), "decoder": (k, D_MODEL)}
    layers = {name: torch.nn.Linear(*size, dtype=dtype).requires_grad_(False) for name, size in sizes.items()}
    tensors = {f"{name}.{kind}": each for name, one in layers.items() for kind, each in one.state_dict().items()}
    decoder, encoder = (tensors[f"{name}.weight"].double().numpy() for name in ("decoder", "encoder"))
    path = tmp_path / "sae.safetensors"
    torch_save_file(tensors, path)
    expected = decoder if k == D_MODEL else decoder.T
    by = "rows" if k == D_MODEL else "columns"
    name, read, rows = fd.stored_directions(path, D_MODEL, "decoder.weight")
    assert (name, read) == ("decoder.weight", by)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(fd.read_directions(path, D_MODEL, "encoder.weight"), encoder)
    with pytest.raises(
        ValueError,
        match=rf"several matrices .* d_model of 12: decoder.weight \[12, {k}\], encoder.weight \[{k}, 12\]\. Choose one",
    ):
        fd.read_directions(path, D_MODEL)
    with pytest.raises(
        ValueError, match=r"sae.safetensors has no tensor 'W_dec'; it holds decoder.bias \[12\], decoder.w"
    ):
        fd.read_directions(path, D_MODEL, "W_dec")
    with pytest.raises(ValueError, match=r"must hold a matrix of directions, .*; it holds decoder.bias \[12\]\."):
        fd.read_directions(path, D_MODEL, "decoder.bias")
    del tensors["encoder.weight"]
    torch_save_file(tensors, path)
    name, read, rows = fd.stored_directions(path, D_MODEL)
    assert (name, read) == ("decoder.weight", by)
    np.testing.assert_array_equal(rows, expected)


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "narrow.npy": (
        lambda path: np.save(path, np.ones((3, 5))),
        r"must hold a matrix of directions, \[k, 12\] or \[12, k\], .* d_model of 12; it holds narrow.npy \[3, 5\]",
    ),
    "flat.npy": (lambda path: np.save(path, np.ones(D_MODEL)), r"it holds flat.npy \[12\]"),
    "two.safetensors": (
        lambda path: save_file({"a": np.ones((2, D_MODEL)), "b": np.ones((2, D_MODEL))}, path),
        r"holds several matrices .*: a \[2, 12\], b \[2, 12\]\. Choose one \(--tensor NAME\)",
    ),
    "none.npy": (lambda path: np.save(path, np.ones((0, D_MODEL))), r"it holds none.npy \[0, 12\]"),
    "words.npz": (
        lambda path: np.savez(path, w=np.full((2, D_MODEL), "a")),
        r"in \S+ must be rows of 12 real numbers: Cannot cast",
    ),
    "nan.npy": (lambda path: np.save(path, np.full((2, D_MODEL), np.nan)), r"must be finite and not zero; rows 0, 1 are not"),
    "zero.npy": (
        lambda path: np.save(path, np.diag([1.0, 0.0, 1.0]) @ np.ones((3, D_MODEL))),
        r"must be finite and not zero; rows 1 are not",
    ),
    "tensors.pt": (lambda path: torch.save(torch.ones(2, D_MODEL), path), r"cannot read directions from"),
    "text.npy": (
        lambda path: path.write_text("no array"),
        r"cannot read directions from \S+: it is no file of NumPy's arrays. Expected .npy, .npz or .safet",
    ),
    "text.safetensors": (lambda path: path.write_text("no tensors at all"), r"cannot read directions from"),
    "missing.npy": (lambda path: None, r"cannot read directions from .*No such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_hold_no_directions(name: str, tmp_path: Path):
    write, message = BAD_FILES[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        fd.read_directions(tmp_path / name, D_MODEL)


def test_weights_that_have_changed_since_the_run_are_refused(made: Path, tmp_path: Path):
    (tmp_path / "docs.txt").write_text("some words here")
    model = jobs.save_model(tmp_path / "model")
    jobs.run_here(jobs.settings(model, tmp_path / "docs.txt", tmp_path / "run"))
    jobs.save_model(tmp_path / "model", seed=1)
    with pytest.raises(ModelError, match=r"the weights of .*model are not those that .*run was made with"):
        fd.model_of(open_run(tmp_path / "run"))


def test_another_model_or_layer_is_refused(run: Run, models: Callable[..., SplitModel], tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"width 12 and layers up to 2; the model given, .*, has width 24 and 3 blocks"
    ):
        fd.moved_tokens(run, {0: some_directions(1)}, models("gpt2"))
    for read in (fd.moved_tokens, partial(fd.project, output=tmp_path / "out.parquet")):
        with pytest.raises(ValueError, match=r"layer must be one of \[0, 1, 2\], got 7"):
            read(run, directions={7: some_directions(1)})
    with pytest.raises(ValueError, match="directions must be given at one layer at least, got none"):
        fd.project(run, {}, tmp_path / "out.parquet")
    with pytest.raises(ValueError, match="documents must be at least 1, got 0"):
        fd.safe_directions(run, 0, 0.5, documents=0)
    with pytest.raises(ValueError, match=r"number of directions must be in \[1, 12\], got 13"):
        fd.top_directions(run, 0, 13)
    for read in (fd.cost, fd.strongest):
        with pytest.raises(ValueError, match=r"layer must be one of \[0, 1, 2\], got 7"):
            read(run, 7, np.ones(D_MODEL))
    for given, message in (
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"documents": -1}, "documents must be at least 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            fd.strongest(run, 0, np.ones(D_MODEL), **given)
    with pytest.raises(ValueError, match="documents must be at least 1, got 0"):
        fd.project(run, {0: np.ones(D_MODEL)}, tmp_path / "out.parquet", documents=0)


# The same numbers, as anybody may have them.
FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "list": np.ndarray.tolist,
    "turned round": lambda rows: rows[..., ::-1].copy()[..., ::-1],
    "by columns": np.asfortranarray,
    "tensor": torch.tensor,
    "with a gradient": lambda rows: torch.tensor(rows, requires_grad=True),
    "bfloat16": lambda rows: torch.tensor(rows, dtype=torch.bfloat16, requires_grad=True),
    "list of tensors": lambda rows: list(torch.tensor(rows)),
    "whole numbers": lambda rows: rows.astype(np.int64),
}


@pytest.mark.parametrize("form", FORMS)
def test_directions_are_taken_as_anybody_has_them(
    form: str, run: Run, split: SplitModel, tmp_path: Path, unchecked_shapes: None
):
    rows = np.round(3 * some_directions(2)) + 0.0
    given, one = FORMS[form](rows), FORMS[form](rows[0])
    for read in (
        lambda rows, one: fd.cost(run, LAYER, rows).value,
        lambda rows, one: fd.cost(run, LAYER, one).value,
        lambda rows, one: [place.position for place in fd.strongest(run, LAYER, one, 5, 2, split).places],
        lambda rows, one: fd.nudge(split, LAYER, torch.arange(2, 14)[None], one, [0.1]).kl,
    ):
        np.testing.assert_array_equal(read(given, one), read(rows, rows[0]))
    np.testing.assert_array_equal(fd.cost(run, LAYER, rows[:1]).value, [fd.cost(run, LAYER, rows[0]).value])
    for name, each in (("given", given), ("plain", rows)):
        fd.project(run, {LAYER: each}, tmp_path / name, documents=1, model=split)
    assert pq.read_table(tmp_path / "given").equals(pq.read_table(tmp_path / "plain"))
    read = fd.moved_tokens if form in ("turned round", "with a gradient") else dict  # some seconds each
    assert read is dict or read(run, {LAYER: given}, split) == read(run, {LAYER: rows}, split)


def test_what_is_no_direction_is_said_before_anything_is_loaded(
    run: Run, split: SplitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked_shapes: None
):
    monkeypatch.setattr(fd, "worker_of", None)
    taking: list[Callable[[Any], Any]] = [
        lambda given: fd.project(run, {0: given}, tmp_path / "out.parquet"),
        lambda given: fd.moved_tokens(run, {0: given}),
        lambda given: fd.cost(run, 0, given),
        lambda given: fd.strongest(run, 0, given),
        lambda given: fd.nudge(split, 0, torch.arange(2, 14)[None], given, [0.1]),
    ]
    for given, message in (
        (np.ones(5), r"must be \[12\] or \[k, 12\], got \[5\]"),
        (np.ones((2, 5)), r"must be \[12\] or \[k, 12\], got \[2, 5\]"),
        (np.ones((1, 1, D_MODEL)), r"got \[1, 1, 12\]"),
        (np.ones((0, D_MODEL)), r"got \[0, 12\]"),
        (3.0, r"got \[\]"),
        (torch.zeros(D_MODEL), "must be finite and not zero; rows 0 are not"),
        (1j * np.ones(D_MODEL), "must be rows of 12 real numbers: Cannot cast"),
        (1j * torch.ones(D_MODEL), "must be rows of 12 real numbers: Cannot cast"),
        (["a"] * D_MODEL, "must be rows of 12 real numbers: Cannot cast"),
        ([[1.0, 2.0], [3.0]], "must be rows of 12 real numbers: setting an array element"),
        ([torch.ones(D_MODEL, requires_grad=True)], "must be rows of 12 real numbers: Can't call numpy"),
    ):
        for take in taking:
            with pytest.raises(ValueError, match=rf"^directions at layer 0 .*{message}") as raised:
                take(given)
            assert "\n" not in str(raised.value)
    for take in taking[3:]:
        with pytest.raises(ValueError, match=r"direction must be one, \[12\], got 2 rows"):
            take(some_directions(2))


def test_a_table_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fd, "worker_of", None)
    for output in (tmp_path / "no/out.parquet", tmp_path):
        with pytest.raises(ValueError, match="output must name a file in a directory that exists, got /"):
            fd.project(run, {LAYER: some_directions(1)}, output)


def test_the_typical_norm_is_that_of_the_positions(run: Run):
    """From the mean and the spread of h that the run keeps."""
    moment = np.load(Path(run.store.uri) / f"reduced/layer_{LAYER:03d}/activation_second_moment.npy")
    assert fd.typical_norm(run, LAYER) == pytest.approx(np.trace(moment) ** 0.5, rel=1e-9)


def test_many_directions_are_taken_a_few_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their rates of tokens, and their products with J_z, are more than memory holds; the numbers are the same."""
    rows = {LAYER: some_directions(3)}
    taken: list[int] = []
    push = Tape.push

    def noted(self: Tape, layer: int, directions: Tensor) -> Tensor:
        taken.append(len(directions))
        return push(self, layer, directions)

    monkeypatch.setattr(Tape, "push", noted)
    whole = fd.moved_tokens(run, rows)
    assert set(taken) == {3}
    fd.project(run, rows, tmp_path / "whole", documents=2)
    assert set(taken) == {3}
    monkeypatch.setattr(worker, "_RATES", 2 * VOCAB)
    monkeypatch.setattr(fd, "_PUSHED", 1)
    taken.clear()
    assert fd.moved_tokens(run, rows) == whole
    assert set(taken) == {1, 2}
    fd.project(run, rows, tmp_path / "few", documents=2)
    assert taken[-1] == 1
    one, other = (pq.read_table(tmp_path / name) for name in ("whole", "few"))
    np.testing.assert_allclose(one["sensitivity"], other["sensitivity"], rtol=1e-4)


def test_tokens_are_moved_at_positions_that_are_finite(run: Run, monkeypatch: pytest.MonkeyPatch):
    """They are those of a mean over the others; where no position is, a window counts for nothing."""
    rows = {LAYER: some_directions(2)}
    own = SplitModel.log_probability_rates
    number = itertools.count()

    def changed(without: bool) -> Any:
        def rates(*args: Any) -> Iterator[Tensor]:
            window = next(number)
            for some in own(*args):
                if without and window % 5 == 0:
                    some = some.masked_fill(torch.ones_like(some, dtype=torch.bool), torch.inf)
                    some[:, -1, :3] = 0
                elif without:
                    some[:, 0, 7] = torch.nan
                else:
                    some = some[:, 1:] if window % 5 else some[:, :0]
                yield some

        return rates

    found = []
    for without in (False, True):
        number = itertools.count()
        monkeypatch.setattr(SplitModel, "log_probability_rates", changed(without))
        found.append(fd.moved_tokens(run, rows))
    assert found[0] == found[1] and any(raised for raised, _ in found[0][LAYER])


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    uri = str(made / "summary")
    assert (
        main(["project", uri, "--top", "2", "--layers", "1", "-o", str(tmp_path / "o.parquet"), "--json"]) == COMPLETE
    )
    said = json.loads(capsys.readouterr().out)
    run = open_run(uri)
    top = fd.top_directions(run, 1, 2)
    assert [(row["layer"], row["direction"]) for row in said["directions"]] == [(1, 0), (1, 1)]
    np.testing.assert_allclose([row["cost"] for row in said["directions"]], fd.cost(run, 1, top).value)
    assert said["rows"] == len(pq.read_table(tmp_path / "o.parquet")) == 2 * run.count(1)
    moved = fd.moved_tokens(run, {1: top})[1]
    kept = [row for row in run.directions if row["layer"] == 1][:2]
    assert [(row["raised"], row["lowered"]) for row in kept] == moved
    assert [(row["raised"], row["lowered"]) for row in said["directions"]] == moved

    np.save(tmp_path / "mine.npy", top)
    assert main(["project", uri, "--directions", str(tmp_path / "mine.npy"), "--layers", "1"]) == COMPLETE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(":")[1].strip().startswith("complete") and len(lines) == 6
    assert lines[1] == "directions: rows of mine.npy"
    assert f"{float(fd.cost(run, 1, top).value[0]):.4g}" in lines[3]
    assert f" {1 / fd.typical_norm(run, 1):.2g} " in lines[3]
    assert (said["tensor"], said["by"]) == (None, None)

    save_file(
        {"decoder.weight": np.ascontiguousarray(top.T), "encoder.weight": top[::-1].copy()},
        tmp_path / "sae.safetensors",
    )
    sae = ["--directions", str(tmp_path / "sae.safetensors"), "--layers", "1", "--json"]
    assert main(["project", uri, *sae, "--tensor", "decoder.weight"]) == COMPLETE
    read = json.loads(capsys.readouterr().out)
    assert (read["tensor"], read["by"]) == ("decoder.weight", "columns")
    np.testing.assert_allclose([row["cost"] for row in read["directions"]], fd.cost(run, 1, top).value)

    documents = run.counts.documents - run.counts.empty
    for flags, count in (([], documents), (["--max-docs", "2"], 2)):
        assert main(["project", uri, "--layers", "1", "-o", str(tmp_path / "o.parquet"), *flags]) == COMPLETE
        lines = capsys.readouterr().out.splitlines()
        assert f"coordinates: 1 of {count} documents" in lines
        assert lines[-1].startswith(f"coordinates: {tmp_path / 'o.parquet'}, ")

    np.save(tmp_path / "narrow.npy", np.ones((2, 5)))
    for flags in (
        ["--directions", str(tmp_path / "narrow.npy")],
        sae,  # of several tensors none is named
        ["--tensor", "decoder.weight"],
        ["--layers", "9"],
        ["-o", str(tmp_path / "no/o.parquet")],
    ):
        assert main(["project", uri, *flags]) == BAD_INPUT
        assert capsys.readouterr().err.count("\n") == 1


def test_a_table_that_is_ended_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Nothing half-written, and no word of work that is kept: that is a run's."""
    before = signal.getsignal(signal.SIGTERM)

    def measured(*_: object) -> Iterator[object]:
        assert (tmp_path / "o.parquet.part").exists()
        signal.raise_signal(signal.SIGTERM)
        yield

    monkeypatch.setattr(fd, "_measured", measured)
    assert main(["project", str(made / "summary"), "--layers", "1", "-o", str(tmp_path / "o.parquet")]) == STOPPED
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "stopped.\n"
    assert not list(tmp_path.iterdir())
