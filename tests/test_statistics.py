"""Standard errors against closed forms, against decomposing anew, and against what many corpora give."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from fisher_ray.spectrum import anisotropy, entropy_rank, participation_ratio
from fisher_ray.statistics import Blocks, Estimate, convergence, half_angles, jackknife, mean_trace, spectrum
from fisher_ray.sums import ALL, GroupSums, Sums

D = 5


def blocks_of(scores: list[np.ndarray], streams: list[np.ndarray]) -> Blocks:
    """One block for each array of scores [n, d] and streams [n, d], with F = g g^T at every position."""
    made = []
    for g, h in zip(scores, streams, strict=True):
        sums = Sums([0], g.shape[1])
        sums.add(0, torch.from_numpy(g)[:, None], torch.from_numpy(h)[:, None])
        made.append(sums.packed(0).groups[ALL])
    return Blocks(made)


def corpus(random: np.random.Generator, blocks: int, sizes: tuple[int, int] = (30, 60), scale: float = 1.0) -> Blocks:
    """Blocks of positions whose scores have the spectrum 16, 9, 4, 1, 1 and depend on each other within a block."""
    spread = np.array([4.0, 3.0, 2.0, 1.0, 1.0])
    scores, streams = [], []
    for _ in range(blocks):
        n = int(random.integers(*sizes))
        shared = 1 + 0.3 * scale * random.standard_normal((1, D))  # what makes positions of one document alike
        scores.append(random.standard_normal((n, D)) * spread * abs(shared))
        streams.append(random.standard_normal((n, D)) * [1, 2, 3, 1, 2] + shared)
    return blocks_of(scores, streams)


def without(blocks: Blocks, i: int) -> Blocks:
    return Blocks([GroupSums(**vars(block)) for j, block in enumerate(blocks.sums) if j != i])


# ---- the jackknife -----------------------------------------------------------------------------------------------------


def test_of_a_mean_over_equal_blocks_it_is_the_usual_standard_error() -> None:
    means = np.random.default_rng(0).standard_normal(12)
    left = (means.sum() - means) / 11
    got = jackknife(torch.tensor(means.mean()), torch.from_numpy(left))
    assert got.blocks == 12
    assert got.error == pytest.approx(means.std(ddof=1) / np.sqrt(12), rel=1e-12, abs=0)


def test_of_a_mean_over_unequal_blocks_it_is_that_of_a_ratio() -> None:
    """Var = (B - 1)/B sum (m_j / (n - m_j))^2 (mean_j - mean)^2, which follows by hand from the definition."""
    random = np.random.default_rng(1)
    sizes, means = random.integers(5, 50, 10).astype(float), random.standard_normal(10)
    mean = (sizes * means).sum() / sizes.sum()
    got = jackknife(torch.tensor(mean), torch.from_numpy(left_out(sizes, means)))
    truth = np.sqrt(0.9 * ((sizes / (sizes.sum() - sizes)) ** 2 * (means - mean) ** 2).sum())
    assert got.error == pytest.approx(truth, rel=1e-12, abs=0)


@pytest.mark.parametrize("spread", [0.3, 0.6, 1.0])
def test_errors_hold_where_documents_differ_in_length(spread: float) -> None:
    """32 documents of log-normal lengths, one a block: over 3,000 corpora the mean square error is the variance.

    Both are known to 3 %. Weighing blocks by their lengths would give 0.87, 0.71 and 0.44 of it.
    """
    random = np.random.default_rng(0)
    values, squares = [], []
    for _ in range(3_000):
        sizes, means = np.exp(random.normal(6, spread, 32)).round(), random.standard_normal(32)
        values.append((sizes * means).sum() / sizes.sum())
        got = jackknife(torch.tensor(values[-1]), torch.from_numpy(left_out(sizes, means)))
        squares.append(float(got.error) ** 2)
    assert np.mean(squares) == pytest.approx(np.var(values), rel=0.1)


def left_out(sizes: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The means over all positions but each block's."""
    sums = sizes * means
    return (sums.sum() - sums) / (sizes.sum() - sizes)


def test_with_one_block_nothing_is_known() -> None:
    one = corpus(np.random.default_rng(2), 1)
    assert np.isnan(spectrum(one).trace.error)
    assert np.isnan(convergence(one).error)
    assert half_angles(one, 3).shape == (0, 3)


def test_differences_over_the_same_blocks_are_paired() -> None:
    """Of two means over documents that vary together the difference is known far better than either."""
    random = np.random.default_rng(2)
    shared = random.standard_normal(12)
    one, other = (shared + 0.1 * random.standard_normal(12) for _ in range(2))
    made = [jackknife(torch.tensor(x.mean()), torch.from_numpy((x.sum() - x) / 11)) for x in (one, other)]
    difference = other - one
    paired, apart = (made[1].minus(made[0], numbers) for numbers in ((range(12), range(12)), None))
    assert paired.value == apart.value == pytest.approx(difference.mean())
    assert paired.error == pytest.approx(difference.std(ddof=1) / np.sqrt(12), rel=1e-9)
    assert apart.error == pytest.approx(np.hypot(one.std(ddof=1), other.std(ddof=1)) / np.sqrt(12), rel=1e-9)
    assert paired.error < 0.3 * apart.error


def test_differences_of_groups_that_some_blocks_lack() -> None:
    """A block is left out of both means, or of the one that it has a part in."""
    random = np.random.default_rng(5)
    values, counts = random.random((2, 6)), random.integers(1, 9, (2, 6))
    counts[0, 2] = counts[1, 5] = 0

    def difference(kept: np.ndarray) -> float:
        means = (values * counts)[:, kept].sum(1) / counts[:, kept].sum(1)
        return float(means[1] - means[0])

    every = np.arange(6)
    left = np.array([difference(np.delete(every, b)) for b in every])
    numbers = [np.flatnonzero(row).tolist() for row in counts]
    one, other = (
        mean_trace([(int(n), float(n * x)) for n, x in zip(counts[i], values[i], strict=True) if n]) for i in (0, 1)
    )
    change = other.minus(one, (numbers[1], numbers[0]))
    assert change.value == pytest.approx(difference(every))
    assert change.error == pytest.approx(np.sqrt(5 / 6 * np.square(left - difference(every)).sum()), rel=1e-9)


def test_intervals_have_students_quantile() -> None:
    low, high = Estimate(np.array(3.0), np.array(0.5), 32).interval(0.95)
    assert (high - low) / 2 == pytest.approx(0.5 * stats.t(31).ppf(0.975))
    assert low + high == pytest.approx(6.0)


def test_blocks_without_a_position_do_not_count_and_keep_their_places() -> None:
    one, other = corpus(np.random.default_rng(3), 2).sums
    empty = GroupSums(**{**vars(one), "count": 0})
    blocks = Blocks([None, one, empty, other])
    assert (len(blocks), blocks.numbers) == (2, [1, 3]) and blocks.total.count == one.count + other.count


def test_no_position_is_said() -> None:
    with pytest.raises(ValueError, match="no block of documents has a position"):
        Blocks([])


# ---- spectra -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitened", [False, True])
def test_errors_are_those_of_decomposing_every_time(whitened: bool) -> None:
    """To first order; with many blocks each moves the mean little. An error of the sums' order would be 1 or more."""
    blocks = corpus(np.random.default_rng(3), 200, scale=0.3)
    got = spectrum(blocks, whitened)
    again = [spectrum(without(blocks, i), whitened) for i in range(len(blocks))]
    for name, rel in {"eigenvalues": 0.05, "trace": 1e-9, "participation_ratio": 0.05, "entropy_rank": 0.05}.items():
        left = torch.from_numpy(np.stack([uncorrected(getattr(one, name)) for one in again]))
        value = getattr(got, name)
        truth = jackknife(torch.from_numpy(uncorrected(value)), left)
        apart = slice(0, 3) if name == "eigenvalues" else ...  # the last two are equal: their order is noise
        np.testing.assert_allclose(value.error[apart], truth.error[apart], rtol=rel)


def uncorrected(estimate: Estimate) -> np.ndarray:
    """What the mean itself gives."""
    return np.asarray(estimate.value + estimate.bias)


def few_positions(random: np.random.Generator, blocks: int, positions: int) -> Blocks:
    """Independent ones of a spectrum that falls from 9 to 1 over 12 dimensions."""
    shape = (blocks, positions, 12)
    return blocks_of([*random.standard_normal(shape) * np.linspace(3, 1, 12)], [*random.standard_normal(shape)])


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("name", ["participation_ratio", "entropy_rank"])
def test_the_bias_is_that_of_decomposing_every_time(name: str, whitened: bool) -> None:
    """Quenouille's, which to first order is nothing."""
    blocks = few_positions(np.random.default_rng(10), 50, 4)
    got = getattr(spectrum(blocks, whitened), name)
    left = np.stack([uncorrected(getattr(spectrum(without(blocks, i), whitened), name)) for i in range(50)])
    truth = 49 * (left.mean() - uncorrected(got))
    assert truth < -0.1
    assert got.bias == pytest.approx(truth, rel=0.05)
    assert got.error == pytest.approx(np.sqrt(49 / 50 * np.square(left - left.mean()).sum()), rel=0.05)


@pytest.mark.parametrize("whitened", [False, True])
def test_dimensions_of_few_positions_are_those_of_many(whitened: bool) -> None:
    """Over 200 corpora of 320 positions; as the mean gives them they are too small by one to two errors."""
    random = np.random.default_rng(11)
    population = spectrum(few_positions(random, 2, 200_000), whitened)
    many = [spectrum(few_positions(random, 20, 16), whitened) for _ in range(200)]
    for name in ("participation_ratio", "entropy_rank"):
        truth = uncorrected(getattr(population, name))
        found = [getattr(one, name) for one in many]
        values, before = np.array([one.value for one in found]), np.array([uncorrected(one) for one in found])
        error = np.mean([one.error for one in found])
        assert before.mean() < truth - error
        assert abs(values.mean() - truth) < 0.25 * error
        assert values.std(ddof=1) == pytest.approx(error, rel=0.2)
        held = np.mean([low <= truth <= high for low, high in (one.interval() for one in found)])
        assert held > 0.88  # of 200, 95 % is known to 1.5 %


def test_where_one_block_outweighs_the_others_dimensions_are_as_they_are() -> None:
    """The bias of order 1 / B is then no smaller than the quantity: by it these are of 1 and of fewer dimensions than that."""
    random = np.random.default_rng(5)
    scores = [random.standard_normal((100, D)) for _ in range(6)]
    scores[2][:, 0] *= 6
    found = spectrum(blocks_of(scores, scores))
    values = torch.from_numpy(found.eigenvalues.value)
    for estimate, function in ((found.participation_ratio, participation_ratio), (found.entropy_rank, entropy_rank)):
        assert estimate.value == pytest.approx(float(function(values)), rel=1e-12)
        assert estimate.bias == 0 and estimate.error > 0.3 * estimate.value


def test_errors_are_what_many_corpora_show() -> None:
    """Mean error over 150 corpora of 32 blocks against the spread over them, known to 1 / sqrt(300) = 6 %."""
    random = np.random.default_rng(4)
    many = [spectrum(corpus(random, 32)) for _ in range(150)]
    for read in (lambda s: s.trace, lambda s: s.participation_ratio):
        spread = np.std([read(s).value for s in many], ddof=1)
        assert np.mean([read(s).error for s in many]) == pytest.approx(spread, rel=0.2)
    top = np.array([s.eigenvalues.value[0] for s in many]).std(ddof=1)
    assert np.mean([s.eigenvalues.error[0] for s in many]) == pytest.approx(top, rel=0.2)


def test_what_is_read_off_a_spectrum() -> None:
    blocks = corpus(np.random.default_rng(5), 8)
    got = spectrum(blocks)
    fisher = blocks.mean("fisher").numpy()
    values = np.linalg.eigvalsh(fisher)[::-1]
    np.testing.assert_allclose(got.eigenvalues.value, values, rtol=1e-12)
    assert got.trace.value == pytest.approx(np.trace(fisher))
    assert uncorrected(got.participation_ratio) == pytest.approx(np.trace(fisher) ** 2 / (fisher**2).sum())
    shares = values / values.sum()
    assert uncorrected(got.entropy_rank) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert got.anisotropy.value == pytest.approx(np.linalg.norm(fisher / (np.trace(fisher) / D) - np.eye(D), 2))
    np.testing.assert_allclose(fisher @ got.eigenvectors, got.eigenvectors * values, atol=1e-9)


def test_a_euclidean_metric_is_at_distance_zero() -> None:
    assert anisotropy(torch.full((7,), 3.0)) == 0
    assert anisotropy(torch.tensor([7.0, 0, 0, 0, 0, 0, 0])) == pytest.approx(6)
    assert anisotropy(torch.tensor([1.1, 1.1, 1.1, 0.7])) == pytest.approx(0.3)  # the smallest is farthest


def test_whitened_spectra_and_their_errors_do_not_see_the_scale_of_h() -> None:
    """h = A h' makes of scores A^T g: the whitened spectrum stays, with its errors; the plain one does not."""
    random = np.random.default_rng(6)
    a = random.standard_normal((D, D)) + 2 * np.eye(D)
    scores = [random.standard_normal((40, D)) * [4, 3, 2, 1, 1] for _ in range(12)]
    streams = [random.standard_normal((40, D)) for _ in range(12)]
    before = blocks_of(scores, streams)
    after = blocks_of([g @ a for g in scores], [np.linalg.solve(a, h.T).T for h in streams])
    one, other = spectrum(before, whitened=True), spectrum(after, whitened=True)
    np.testing.assert_allclose(one.eigenvalues.value, other.eigenvalues.value, rtol=1e-6)
    np.testing.assert_allclose(one.eigenvalues.error, other.eigenvalues.error, rtol=1e-5)
    assert spectrum(before).trace.value != pytest.approx(spectrum(after).trace.value, rel=0.1)


@pytest.mark.parametrize("function", [participation_ratio, entropy_rank])
def test_effective_ranks_count_equal_eigenvalues(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert float(function(torch.tensor([2.0, 2, 2, 0, 0]))) == pytest.approx(3, rel=1e-6)


# ---- what a corpus resolves --------------------------------------------------------------------------------------------


def test_eigenvalues_that_cannot_be_told_apart_are_one_cluster() -> None:
    """16, 9, 4 stand apart, 1 and 1 do not; with few documents none does."""
    random = np.random.default_rng(7)
    many, few = corpus(random, 64, (200, 300), scale=0.1), corpus(random, 4, (3, 5), scale=2.0)
    assert [list(c) for c in spectrum(many).clusters(5)] == [[0], [1], [2], [3, 4]]
    assert [list(c) for c in spectrum(many).clusters(2)] == [[0], [1]]
    assert [list(c) for c in spectrum(many).clusters(4)] == [[0], [1], [2], [3, 4]]
    assert len(spectrum(few).clusters(5)) < 4


def test_halves_agree_on_directions_that_are_resolved() -> None:
    angles = half_angles(corpus(np.random.default_rng(8), 64, (200, 300), scale=0.1), 5)
    assert angles.shape == (8, 5)
    median = np.median(angles, 0)
    assert median[:3].max() < 10
    assert median[3:].min() > 15


def test_convergence_is_that_of_the_running_mean() -> None:
    random = np.random.default_rng(9)
    blocks = corpus(random, 40)
    got = convergence(blocks)
    sums = [block.square("fisher") for block in blocks.sums]
    positions = np.cumsum([block.count for block in blocks])
    running = [np.sum(sums[: i + 1], 0) / positions[i] for i in range(40)]
    truth = [np.linalg.norm(b - a) / np.linalg.norm(b) for a, b in itertools.pairwise(running)]
    np.testing.assert_allclose(got.change[1:], truth, rtol=1e-10)
    assert np.isnan(got.change[0])
    np.testing.assert_array_equal(got.positions, positions)


def test_of_a_mean_that_is_zero_nothing_is_known() -> None:
    """As that of a model that is certain at every position."""
    got = convergence(blocks_of([np.zeros((3, D))] * 3, [np.ones((3, D))] * 3))
    assert np.isnan(got.error) and np.isnan(got.change).all()


def test_an_iterator_cannot_be_read_twice() -> None:
    with pytest.raises(TypeError, match="read twice"):
        convergence(iter(corpus(np.random.default_rng(9), 4)))


def test_the_error_of_the_mean_is_how_far_it_is_from_the_truth() -> None:
    """Over 100 corpora the mean square of |F - truth| / |truth| is that of the errors; each is known to some 10 %."""
    random = np.random.default_rng(10)
    many = [corpus(random, 32) for _ in range(100)]
    truth = torch.stack([blocks.mean("fisher") for blocks in many]).mean(0)
    off = [float((blocks.mean("fisher") - truth).norm() / truth.norm()) ** 2 for blocks in many]
    said = [convergence(blocks).error ** 2 for blocks in many]
    assert np.mean(said) == pytest.approx(np.mean(off), rel=0.3)
