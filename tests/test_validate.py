"""Runs against the divergences of their own models: right ones pass, wrong ones do not, and rounding is told from both."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import oracles
import pytest
import torch
from conftest import Models
from families import FAMILIES, OTHERS, build
from torch import Tensor

import jobs
from fisher_ray import cost, open_run, validate
from fisher_ray.cli import main
from fisher_ray.head import Prediction, divergence
from fisher_ray.run import Run, Shard
from fisher_ray.scores import Scores
from fisher_ray.validate import STEPS, LayerTest, Validation, _spread
from jobs import gpt2  # noqa: F401

SEQ_LEN = 14


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``made(family, **settings)``: an exact run of a family's tiny model over random tokens, in 7 tasks."""
    runs: dict[str, Path] = {}

    def make(family: str, **changed: Any) -> Path:
        key = f"{family} {changed}"
        if key not in runs:
            folder = tmp_path_factory.mktemp(family)
            build({**FAMILIES, **OTHERS}[family], torch.float32).save_pretrained(folder / "model")
            np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 61, (7, SEQ_LEN)))
            config = jobs.settings(str(folder / "model"), folder / "ids.npy", folder / "run", estimator="exact")
            config = replace(config, save="matrices")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cost.Cost, "task_bytes", lambda *_: 8 * SEQ_LEN)
                _, outcome = jobs.run_here(replace(config, **changed))
            assert outcome.tasks == 7
            runs[key] = folder
        return runs[key] / "run"

    return make


@pytest.fixture(scope="module")
def validated(made: Callable[..., Path]) -> Callable[[str, str], Validation]:
    """``validated(family, dtype)``: the test of its run at 7 positions, once."""
    return cache(lambda family, dtype: validate.validate(open_run(made(family)), num_positions=7, dtype=dtype))


@pytest.fixture
def copied(made: Callable[..., Path], tmp_path: Path) -> Path:
    """A run whose model, corpus and tasks may be damaged."""
    folder = tmp_path / "copied"
    shutil.copytree(made("gpt2").parent, folder)
    config = jobs.settings(str(folder / "model"), folder / "ids.npy", folder / "again", estimator="exact", layers="1")
    jobs.run_here(config)
    return folder / "again"


def changed_scores(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    right = validate.score_factors

    def wrong(*args: Any, **kwargs: Any) -> Scores:
        scores = right(*args, **kwargs)
        return replace(scores, factors={layer: change(factors) for layer, factors in scores.factors.items()})

    monkeypatch.setattr(validate, "score_factors", wrong)


# ---- the divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [0.9, 0.3, 0.09, 1e-2, 1e-4, 1e-6, 1e-8])
def test_divergence_keeps_its_digits(x: float) -> None:
    """Of (1/2, 1/2) from (1 + x, 1 - x) / 2 it is -log(1 - x^2) / 2. log q has an error of 1e-16, and the sum of p log(p / q)
    would be wrong by 1e-16 / x^2: entirely at 1e-8.
    """
    p = torch.full((2,), 0.5, dtype=torch.float64)
    log_q = torch.log1p(torch.tensor([x, -x], dtype=torch.float64)) - math.log(2)
    got = float(divergence(p.log(), log_q))
    assert got == pytest.approx(-math.log1p(-x * x) / 2, rel=1e-14 + 4e-16 / x, abs=0)


def test_divergence_of_unlikely_tokens_and_impossible_ones() -> None:
    """p = (1 - a, a, 0), q = (1 - 2a, 2a, 0): a (2 log 1 - log 2) + ... in closed form, with a token of p = 0 beside them."""
    a = 2.0**-60
    log_p = torch.tensor([[math.log1p(-a), math.log(a), -torch.inf]], dtype=torch.float64)
    log_q = torch.tensor([[math.log1p(-2 * a), math.log(2 * a), -torch.inf]], dtype=torch.float64)
    assert float(divergence(log_p, log_q)[0]) == pytest.approx(a * (1 - math.log(2)), rel=1e-13, abs=0)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "t5", "gptj"])
def test_moved_streams_give_the_librarys_own_predictions(name: str, models: Models, float64_throughout: None) -> None:
    """Against forward passes of the library's model with the stream nudged by a hook, at that position alone."""
    split = models(name, gradients="per_position" if name == "gptj" else "own_position")
    batch = oracles.inputs(split, [9])
    ids, encoder = batch.rows[0][None], batch.encoder_of(0)
    encoded = oracles.encoded(split, encoder)
    positions = torch.tensor([2, 7])
    generator = torch.Generator().manual_seed(0)
    nudges = torch.randn(40, 2, split.d_model, dtype=torch.float64, generator=generator)  # more than go together
    streams = split.lower(ids, encoded, [1])[1][0, positions] + nudges
    z = split.replaced(ids, positions, 1, streams, encoded)
    assert z.shape[:2] == (40, 2)
    for k in (0, 17, 39):
        for n, position in enumerate(positions.tolist()):

            def nudged(module: Any, args: Any, kwargs: Any, at: int = position, by: Tensor = nudges[k, n]) -> Any:
                stream = (args[0] if args else kwargs["hidden_states"]).clone()
                stream[0, at] += by
                return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

            handle = split.blocks[1].register_forward_pre_hook(nudged, with_kwargs=True)
            try:
                truth = oracles.library_logits(split, ids, encoder)[0, position].log_softmax(-1)
            finally:
                handle.remove()
            got = split.head.predict(z[k, n][None]).logits[0].log_softmax(-1)
            assert (got - truth).abs().max() < 1e-10


# ---- right runs pass -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_right_runs_pass(validated: Callable[[str, str], Validation], family: str, dtype: str) -> None:
    """gemma2 has soft-capping in attention and head, sliding windows, and norms in float32 in any dtype."""
    result = validated(family, dtype)
    assert result.passed, result.asdict()
    assert list(result.layers) == [0, 2, 3]
    for test in result.layers.values():
        assert test.judged > 0.9 and test.order == pytest.approx(1, abs=0.2)
        assert len(test.stored) == 7 and 0 < test.stored.max() < 1e-5
        if dtype == "float64":
            assert test.off.max() < (1e-3 if family == "gemma2" else 1e-7)


def test_models_of_one_position_a_row_pass(made: Callable[..., Path]) -> None:
    run = made("gptj", gradients="per_position", positions="5,9")
    result = validate.validate(open_run(run), [1], num_positions=2)
    assert result.passed and {t for _, t in result.positions} <= {5, 9}


def test_encoder_decoders_pass(tmp_path: Path) -> None:
    model = jobs.save_model(tmp_path / "t5", "t5")
    rows = [{"text": a, "source": b} for a, b in zip(jobs.some_text(2_000).split("\n\n"), "abcdefgh", strict=False)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = jobs.settings(model, tmp_path / "pairs.jsonl", tmp_path / "run", encoder_column="source", num_samples=1)
    jobs.run_here(replace(config, max_seq_len=16, max_docs=3))
    result = validate.validate(open_run(tmp_path / "run"), num_positions=2)
    assert result.passed
    assert not any(len(test.stored) for test in result.layers.values())  # sampled ones are no measure of F


def test_positions_are_spread_over_the_run_and_always_the_same(
    made: Callable[..., Path], validated: Callable[[str, str], Validation]
) -> None:
    run = open_run(made("gpt2"))
    first = validated("gpt2", "float64").positions
    again = validate.validate(run, [1], num_positions=7, dtype="float32").positions
    assert first == again and len(set(first)) == 7
    assert len({document for document, _ in first}) == 7  # every task's
    table = run.positions().to_table(["document", "position"]).to_pylist()
    assert set(first) <= {(row["document"], row["position"]) for row in table}


# ---- wrong ones do not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_scaled_fisher_matrix_does_not_pass(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    changed_scores(monkeypatch, lambda factors: factors * math.sqrt(1.1))
    result = validate.validate(open_run(made("gpt2")), [2], num_positions=2, dtype=dtype)
    assert not result.passed
    np.testing.assert_allclose(np.median(result.layers[2].off), 1 - 1 / 1.1, rtol=1e-2)
    assert "limit is off at 100%" in result.layers[2].failures


def test_an_error_far_below_the_tolerance_shows_in_the_order(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_scores(monkeypatch, lambda factors: factors * (1 + 1e-5))
    test = validate.validate(open_run(made("gpt2")), [2], num_positions=2).layers[2]
    assert test.off.max() < test.tolerance / 10
    assert [failure for failure in test.failures if failure.startswith("order is 0.")]


def test_gradients_that_are_wrong_in_one_coordinate_do_not_pass(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = torch.ones(24)
    wrong[5] = 0
    changed_scores(monkeypatch, lambda factors: factors * wrong)
    assert not validate.validate(open_run(made("gpt2")), [2], num_positions=2).passed


def test_soft_capping_left_out_of_the_gradient_does_not_pass(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = validate.score_factors

    def wrong(*args: Any, **kwargs: Any) -> Scores:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Prediction, "_slope", lambda self, logits: self.head.scale)
            return right(*args, **kwargs)

    monkeypatch.setattr(validate, "score_factors", wrong)
    assert not validate.validate(open_run(made("gemma2")), [3], num_positions=2).passed


@pytest.mark.parametrize("save", ["summary", "matrices", "factors"])
def test_another_stored_matrix_does_not_pass(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, save: str
) -> None:
    run = open_run(made("gpt2") if save == "matrices" else made("gpt2", save=save))
    assert validate.validate(run, [2], num_positions=2).layers[2].stored.max() < 1e-5
    right_matrices, right_rows = Run.matrices, Run.table

    def matrices(self: Run, *args: Any) -> Any:
        return (Shard(shard.table, shard.array * 1.01) for shard in right_matrices(self, *args))

    def rows(self: Run, task: int) -> Any:
        table = right_rows(self, task)
        at = table.column_names.index("trace")
        return table.set_column(at, "trace", [table["trace"].to_numpy() * np.float32(1.01)])

    monkeypatch.setattr(Run, "matrices", matrices)
    monkeypatch.setattr(Run, "table", rows)
    test = validate.validate(run, [2], num_positions=2).layers[2]
    assert test.failures == ["stored F is another"]
    np.testing.assert_allclose(test.stored, 0.01, rtol=1e-3)


# ---- rounding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "float64"), ("gpt2", "float32"), ("gemma2", "float64")])
def test_the_noise_bounds_what_rounding_does_and_not_by_much(
    validated: Callable[[str, str], Validation], family: str, dtype: str
) -> None:
    """At the smallest step the mean of both sides is off by rounding, and by 1e-14 times some hundreds."""
    test = validated(family, dtype).layers[2]
    off, noise = np.abs(test.ratio.mean(2) - 1)[..., 0], test.noise[..., 0]
    assert noise.min() > 1e-11
    assert (off < noise).mean() > 0.9
    assert np.median(off / noise) > 1 / 30


def test_float32_has_no_limit_where_rounding_hides_it(validated: Callable[[str, str], Validation]) -> None:
    single, double = (validated("gpt2", dtype).layers[2] for dtype in ("float32", "float64"))
    assert single.floor[0] > 0.1 and single.step > 1e-3  # a step of 1e-7 |h| is rounding, and is not what is judged
    assert double.floor[0] < 1e-5 and double.step < 1e-4


# ---- what is made of ratios ------------------------------------------------------------------------------------------------


def lawful(limit: float = 1.0, third: float = 3.0, fourth: float = 7.0, noise: float = 1e-16) -> LayerTest:
    """``limit +- third step + fourth step^2`` exactly, with noise that falls with the step."""
    ratio = np.stack([limit + third * STEPS + fourth * STEPS**2, limit - third * STEPS + fourth * STEPS**2])
    shape = (5, 6, 2, len(STEPS))
    predicted = np.broadcast_to(STEPS**2, (5, 6, len(STEPS)))
    return LayerTest(
        np.broadcast_to(ratio, shape),
        predicted,
        np.broadcast_to(noise / STEPS, predicted.shape),
        np.empty(0),
        True,
        1e-3,
    )


def test_limit_order_and_reach_of_a_known_law() -> None:
    test = lawful()
    assert test.failures == [] and test.judged == 1
    assert test.off.max() < 1e-9
    assert test.order == pytest.approx(1, abs=1e-3)
    # 3 s + 7 s^2 < 0.1 up to s = 0.031...: the last step of the ladder below is 10^-2
    assert test.reach == pytest.approx((1e-2, 1e-4))
    ratio = test.ratio.copy()
    ratio.reshape(30, 2, -1)[:6] = 1 + 10 * (ratio.reshape(30, 2, -1)[:6] - 1)  # one in five, up to s = 0.0033
    assert replace(test, ratio=ratio).reach[0] == pytest.approx(10**-2.5)
    wrong = lawful(limit=1.01)
    assert wrong.failures[0] == "limit is off at 100%" and wrong.failures[1].startswith("order is 0.0")
    np.testing.assert_allclose(wrong.off, 0.01, rtol=1e-6)


def test_where_rounding_hides_everything_there_is_no_verdict() -> None:
    test = lawful(noise=1e-2)
    assert test.judged == 0 and test.order is None and test.reach is None
    assert test.failures == ["rounding hides the limit at 100%"]
    facts = json.loads(json.dumps(test.asdict(), allow_nan=False))
    assert facts["median_off"] is None and facts["holds_to_step"] is None


def test_a_few_kinks_are_forgiven_and_many_are_not() -> None:
    for share, failures in ((1, []), (3, ["limit is off at 10%"])):
        test = lawful()
        ratio = test.ratio.copy()
        ratio.reshape(30, 2, -1)[:share] *= 1.1
        assert replace(test, ratio=ratio).failures == failures


# ---- what is not as it should be -------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], run: Path, *flags: str) -> str:
    assert main(["validate", str(run), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1
    return err


def test_a_corpus_that_is_gone_or_another(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.load(copied.parent / "ids.npy")
    np.save(copied.parent / "ids.npy", ids[:-1])
    assert "the corpus of" in (said := fails(capsys, copied)) and "changed since the run" in said and "ids.npy" in said
    (copied.parent / "ids.npy").unlink()
    assert "corpus not found" in fails(capsys, copied)


def test_a_model_that_is_gone_or_another(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied.parent / "model"
    build(FAMILIES["gpt2"], torch.float32, seed=1).save_pretrained(folder)
    assert "the weights of" in (said := fails(capsys, copied)) and "are not those" in said
    shutil.rmtree(folder)
    assert str(folder) in fails(capsys, copied)


def test_a_document_longer_than_a_task(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    """Most tasks have no position then: those asked for are of the others."""
    (tmp_path / "long.txt").write_text(jobs.some_text(30_000).replace("\n\n", "\n") + "\n\n" + jobs.some_text(300))
    config = jobs.settings(gpt2, tmp_path / "long.txt", tmp_path / "run", layers="1", num_samples=1)
    _, outcome = jobs.run_here(replace(config, task_bytes=2_000))
    run = open_run(tmp_path / "run")
    empty = [task for task in run.done_tasks if not len(run.table(task))]
    assert len(empty) > outcome.tasks // 2
    chosen = list(_spread(run, 32))
    assert sum(len(rows) for _, _, rows in chosen) == 32
    assert not {task for task, _, _ in chosen} & set(empty)
    assert len(validate.validate(run, num_positions=8).positions) == 8


def test_a_run_without_a_position(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "reduced")
    for receipt in (copied / "done").iterdir():
        receipt.unlink()
    assert "no position of" in fails(capsys, copied)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--layers", "7"), "layer must be one of [0, 1, 2, 3], got 7"),
        (("--layers", "0-99999999999"), "layer must be one of [0, 1, 2, 3], got 4"),
        (("--layers", "0 3"), "layers must be all, a range 0-11 or a list 3,6; got '0 3'"),
        (("--positions", "0"), "positions must be at least 1"),
    ],
)
def test_bad_arguments(
    made: Callable[..., Path], flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in fails(capsys, made("gpt2"), *flags)


# ---- the command -----------------------------------------------------------------------------------------------------------


def test_the_command(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, picture = str(made("gpt2")), tmp_path / "law.png"
    flags = ["validate", run, "--positions", "3", "--layers", "0,3"]
    assert main([*flags, "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.count("pass\n") == 2 and "3 positions in float64" in out
    assert matplotlib.image.imread(picture).shape[2] == 4
    changed_scores(monkeypatch, lambda factors: 1.1 * factors)
    assert main([*flags, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] is False and list(facts["layers"]) == ["0", "3"] and len(facts["steps"]) == len(STEPS)
    assert facts["layers"]["0"]["median_off"] == pytest.approx(1 - 1 / 1.21, rel=1e-2)
