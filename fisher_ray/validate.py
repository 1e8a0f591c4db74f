"""The physical test of a run: KL divergences of its own model, at its own positions, against the quadratic form of F.

The exact F of a position says what a step ``v`` of its residual stream does to the prediction there:

    KL(p(h) || p(h + v)) = v^T F v / 2 + O(|v|^3).

Both sides are computed apart: F from gradients, the divergence from nothing but forward passes with the stream moved and
the context held constant. The term of third order is odd in ``v``, so of the mean over ``v`` and ``-v`` only the fourth
order is left, and the mean tells far better than one side whether the limit is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from fisher_ray.directions import worker_of
from fisher_ray.estimators import Exact
from fisher_ray.head import divergence
from fisher_ray.numerics import full_precision
from fisher_ray.plan import ConfigError, Task, Tasks
from fisher_ray.report import number_table
from fisher_ray.run import Run
from fisher_ray.scores import score_factors
from fisher_ray.shards import places
from fisher_ray.split import SplitModel
from fisher_ray.storage import StoredFile
from fisher_ray.worker import Worker

# Steps, relative to |h|.
STEPS = 10.0 ** np.arange(-7, 0.25, 0.5)

# What the limit of the ratio may differ from 1 by. float64 models of transformers take some norms and softmaxes in float32.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}

# What stored matrices may differ from those computed anew by; an exact run in float32 is off by 1e-5.
_STORED = 1e-3

# Share of the limits that may be off: where a ReLU bends or another expert is chosen within the smallest step that
# rounding leaves to see, there is no second order to be seen. opt in float32: 3 %.
_KINKS = 0.05

# Up to where the second order is said to hold.
_HOLDS = 0.1

# Steps of the fourth difference that shows rounding, relative to |h|: so small that the function's own fourth difference,
# about (30 step)^4, is below rounding, and so large that they move what transformers computes in float32 in any model.
_PROBE = {torch.float64: 3e-6, torch.float32: 3e-4}
_LEADING, _RANDOM = 3, 2


@dataclass(frozen=True)
class LayerTest:
    """The law at one layer: P positions, D directions at each (leading eigenvectors of F, a middle one, random ones), S steps.

    Attributes:
        ratio: [P, D, 2, S], ``KL / (v^T F v / 2)`` of steps along ``v`` and ``-v``.
        predicted: [P, D, S], ``v^T F v / 2``, nats.
        noise: [P, D, S], what rounding may change the ratio by.
        stored: [n], relative differences of what the run has stored of these positions from F computed anew: of matrices
            where it keeps them, else of traces; none where its matrices are not exact ones.
        judges_stored: whether they decide anything; those of weights in half precision only say how far they are off.
        tolerance: what the limit of the ratio may differ from 1 by.
    """

    ratio: np.ndarray
    predicted: np.ndarray
    noise: np.ndarray
    stored: np.ndarray
    judges_stored: bool
    tolerance: float

    @cached_property
    def _limit(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[P, D]: the step at which the mean ratio of both sides is closest to its limit, the ratio, and what it may be off by.

        It is off by rounding and by the fourth order, which a step of sqrt(10) times the length has ten times over. Where
        that estimate vanishes by chance, the square of the third order, odd in the step, does not.
        """
        mean = self.ratio.mean(2)
        fourth = np.abs(np.diff(mean)) / 9
        third = np.abs(self.ratio[:, :, 0] - self.ratio[:, :, 1]) / 2
        error = self.noise[..., :-1] + np.maximum(fourth, third[..., :-1] ** 2)
        best = error.argmin(-1)[..., None]
        return best[..., 0], np.take_along_axis(mean, best, -1)[..., 0], np.take_along_axis(error, best, -1)[..., 0]

    @property
    def _clear(self) -> np.ndarray:
        """[P, D], where the limit is known well enough to be judged."""
        return self._limit[2] <= self.tolerance / 2

    @property
    def judged(self) -> float:
        """Share of the pairs of position and direction whose limit is known well enough."""
        return float(self._clear.mean())

    @property
    def off(self) -> np.ndarray:
        """[judged], how far the limits of the ratio are from 1."""
        return np.abs(self._limit[1][self._clear] - 1)

    @property
    def step(self) -> float:
        """Median of the steps, relative to |h|, that limits are read at."""
        return float(np.median(STEPS[self._limit[0]]))

    @property
    def deviation(self) -> np.ndarray:
        """[3, S], quartiles over positions, directions and sides of ``|ratio - 1|``."""
        return np.quantile(np.abs(self.ratio - 1), (0.25, 0.5, 0.75), axis=(0, 1, 2))

    @property
    def floor(self) -> np.ndarray:
        """[S], median of what rounding may change the ratio by."""
        return np.median(self.noise, axis=(0, 1))

    @property
    def order(self) -> float | None:
        """The power of the step that the median deviation falls with, over the smallest decade that rounding leaves to see.

        1 by the law. None where rounding covers the deviation up to steps that are no longer small.
        """
        median = self.deviation[1]
        seen = ((median > 10 * self.floor) & (median < _HOLDS)).nonzero()[0][:3]
        if len(seen) < 3:
            return None
        return float(np.polyfit(np.log10(STEPS[seen]), np.log10(median[seen]), 1)[0])

    @property
    def reach(self) -> tuple[float, float] | None:
        """The step up to which both sides' ratios stay within 10 % of 1: relative to |h|, and in nats predicted.

        Of the pairs that are judged nine in ten go as far; None where none of them is judged.
        """
        first = self._limit[0]
        wrong = np.abs(self.ratio - 1).max(2) > _HOLDS
        wrong &= np.arange(len(STEPS)) >= first[..., None]
        last = np.where(wrong.any(-1), wrong.argmax(-1), len(STEPS)) - 1
        p, d = (self._clear & (last >= first)).nonzero()
        if not len(p):
            return None
        steps, nats = STEPS[last[p, d]], self.predicted[p, d, last[p, d]]
        step, predicted = (float(np.quantile(each, 0.1, method="lower")) for each in (steps, nats))
        return step, predicted

    @property
    def failures(self) -> list[str]:
        """Why the layer does not pass, in words; empty where it does."""
        found = []
        if self.judged < 0.5:
            found.append(f"rounding hides the limit at {1 - self.judged:.0%}")
        if self.judged and (share := (self.off > self.tolerance).mean()) > _KINKS:
            found.append(f"limit is off at {share:.0%}")
        if self.order is not None and abs(self.order - 1) > 0.5:
            found.append(f"order is {round(self.order, 2) + 0.0:.2f}, not 1")
        if self.judges_stored and len(self.stored) and self.stored.max() > _STORED:
            found.append("stored F is another")
        return found

    def asdict(self) -> dict[str, Any]:
        """Plain values: results, and curves over the steps."""
        reach = self.reach or (None, None)
        return {
            "judged": self.judged,
            "median_off": float(np.median(self.off)) if self.judged else None,
            "worst_off": float(self.off.max()) if self.judged else None,
            "at_step": self.step,
            "order": self.order,
            "tolerance": self.tolerance,
            "holds_to_step": reach[0],
            "holds_to_nats": reach[1],
            "stored_off": float(self.stored.max()) if len(self.stored) else None,
            "failures": self.failures,
            "deviation": dict(
                zip(("lower_quartile", "median", "upper_quartile"), self.deviation.tolist(), strict=True)
            ),
            "noise": self.floor.tolist(),
            "predicted_nats": np.median(self.predicted, axis=(0, 1)).tolist(),
        }


@dataclass(frozen=True)
class Validation:
    """What the test has found.

    Attributes:
        run: where the run is.
        fingerprint: the run's.
        dtype: in which its model was loaded.
        positions: (document, position) of each.
        layers: the test of each layer.
    """

    run: str
    fingerprint: str
    dtype: str
    positions: list[tuple[str, int]]
    layers: dict[int, LayerTest]

    @property
    def passed(self) -> bool:
        return not any(test.failures for test in self.layers.values())

    def asdict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "run": self.run,
            "fingerprint": self.fingerprint,
            "passed": self.passed,
            "dtype": self.dtype,
            "positions": self.positions,
            "steps": STEPS.tolist(),
            "layers": {layer: test.asdict() for layer, test in self.layers.items()},
        }

    def table(self) -> Table:
        """One line a layer."""
        names = (
            "layer",
            "judged",
            "|limit - 1|",
            "worst",
            "at |v|/|h|",
            "order",
            "holds to |v|/|h|",
            "nats",
            "stored F",
        )
        table = number_table(*names)
        table.add_column("")
        for layer, test in self.layers.items():
            facts = test.asdict()
            shown = [facts[name] for name in ("median_off", "worst_off", "at_step")]
            shown += [None if test.order is None else round(test.order, 3)]
            shown += [facts[name] for name in ("holds_to_step", "holds_to_nats", "stored_off")]
            table.add_row(
                str(layer),
                f"{test.judged:.0%}",
                *("-" if value is None else f"{value:.2g}" for value in shown),
                "; ".join(test.failures) or "pass",
                style="" if not test.failures else "#D55E00",
            )
        return table

    def plot(self, file: str | Path | BinaryIO) -> None:
        """Median and quartiles of ``|ratio - 1|`` against the step, by layer, over what rounding may hide; a PNG."""
        import matplotlib  # here, as half a second that most commands start without
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.colormaps["viridis"]
        floor = np.median([test.floor for test in self.layers.values()], axis=0)
        axes.fill_between(STEPS, 1e-30, floor, color="0.88", lw=0, label="hidden by rounding")
        for i, (layer, test) in enumerate(self.layers.items()):
            low, median, high = test.deviation
            colour = colours(0.85 * i / max(1, len(self.layers) - 1))
            axes.fill_between(STEPS, low, high, color=colour, alpha=0.12, lw=0)
            axes.plot(STEPS, median, color=colour, marker="o", ms=4, lw=1.4, label=f"layer {layer}")
        lowest = np.min([test.deviation[0] for test in self.layers.values()], axis=0)
        anchor = max((lowest < _HOLDS).nonzero()[0], default=0)
        beside = lowest[anchor] / 3 * STEPS / STEPS[anchor]  # the curves would cover it
        axes.plot(STEPS, beside, color="0.3", ls="--", lw=1, label="slope 1, the law's")
        axes.axhline(_HOLDS, color="#D55E00", lw=0.8, ls=":", label="10 %")
        axes.set(
            xscale="log",
            yscale="log",
            ylim=(min(floor[0] / 100, lowest.min() / 3), 10),
            xlim=(STEPS[0], STEPS[-1]),
            xlabel="step |v| / |h|",
            ylabel=r"$|\,\mathrm{KL} \,/\, \frac{1}{2} v^T F v - 1\,|$",
            title=f"{self.run.rstrip('/').rpartition('/')[2]}: KL divergence against the quadratic form of F, "
            f"{len(self.positions)} positions, {self.dtype}",
        )
        axes.legend(loc="upper center", facecolor="white", edgecolor="none", framealpha=1, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
        figure.savefig(file, format="png", dpi=120)


def validate(
    run: Run, layers: Sequence[int] | None = None, num_positions: int = 32, dtype: str = "float64"
) -> Validation:
    """Compare KL divergences with ``v^T F v / 2`` at positions of a run, on its own model and corpus.

    Args:
        run: finished or not; at least one task has to be done.
        layers: of the run's; None: its first, middle and last.
        num_positions: spread evenly over the scored positions of tasks that are spread evenly over the run.
        dtype: of the weights and of everything computed: ``float64`` or ``float32``.

    Raises:
        ConfigError: an argument that cannot be, or model or corpus are not those of the run any more.
        ModelError, CorpusError: they cannot be read.

    Cost: per layer and position one exact F, and about 190 tokens through the model.
    """
    if layers is None:
        layers = sorted({run.layers[0], run.layers[len(run.layers) // 2], run.layers[-1]})
    for layer in layers:
        if layer not in run.layers:
            raise ConfigError(f"layer must be one of {run.layers}, got {layer}.")
    if dtype not in ("float64", "float32"):
        raise ConfigError(f"dtype must be float64 or float32, got {dtype!r}.")
    if num_positions < 1:
        raise ConfigError(f"positions must be at least 1, got {num_positions}.")
    worker = worker_of(run, dtype=dtype)
    tasks = Tasks(run.store.load(StoredFile(**run.description["plan"])))
    moved: dict[int, list[tuple[np.ndarray, ...]]] = {layer: [] for layer in layers}
    differences: dict[int, list[float]] = {layer: [] for layer in layers}
    positions: list[tuple[str, int]] = []
    for task, table, chosen in _spread(run, num_positions):
        stored = {layer: _stored(run, layer, task) for layer in layers}
        for place in _places(worker, tasks[task], table, chosen):
            scores = score_factors(
                worker.model,
                place.ids,
                layers=layers,
                estimator=Exact(),
                positions=[place.at],
                **place.encoder,  # type: ignore[arg-type]
            )
            if not len(scores):  # not finite in this dtype
                continue
            positions.append((place.document, place.position))
            for layer in layers:
                factors = scores.factors[layer][0]
                moved[layer].append(_moved(worker.model, place, layer, scores.activations[layer][0, 0], factors))
                if len(stored[layer]):
                    differences[layer].append(_difference(stored[layer][place.row], factors))
    if not positions:
        raise ConfigError(f"no position of {run.store.uri} is scored yet. Validate it when a task is done.")
    tests = {}
    for layer in layers:
        ratio, predicted, noise = map(np.stack, zip(*moved[layer], strict=True))
        full = run.config.dtype in ("float32", "float64")
        tests[layer] = LayerTest(
            ratio, predicted, noise, np.array(differences[layer]), full, _TOLERANCE[worker.model.dtype]
        )
    return Validation(run.store.uri, run.description["fingerprint"], dtype, positions, tests)


# ---- the run's positions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A position of the run.

    Attributes:
        ids: [1, seq], tokens of its window.
        encoder: the encoder's tokens, as arguments of passes; empty without an encoder.
        at: where it is in the window.
        document, position: where it is in the corpus.
        row: where it is among its task's rows at each layer.
    """

    ids: Tensor
    encoder: dict[str, Tensor]
    at: int
    document: str
    position: int
    row: int


def _spread(run: Run, count: int) -> Iterator[tuple[int, pa.Table, list[int]]]:
    """Tasks spread over those that are done, with their rows at one layer, and rows spread over each, always the same."""
    found = run.store.examples(run.done_tasks, count)
    for i, task in enumerate(found):
        table = run.table(task).filter(pc.field("layer") == run.layers[0])
        yield task, table, places(len(table), count, i, len(found))


def _places(worker: Worker, task: Task, table: pa.Table, chosen: list[int]) -> Iterator[_Place]:
    """Chosen rows of a task, found again in the windows that a worker makes of the corpus."""
    rows = table.select(["document", "position", "token"]).take(chosen).to_pylist()
    wanted = {tuple(row.values()): index for row, index in zip(rows, chosen, strict=True)}
    for document, window, encoder in worker.windows(task):
        for t in window.scored:
            position = window.position(t)
            row = wanted.get((document, position, window.ids[t]))
            if row is not None:
                ids = torch.tensor([window.ids], device=worker.model.device)
                yield _Place(ids, encoder, t, document, position, row)


def _stored(run: Run, layer: int, task: int) -> np.ndarray:
    """What the run has stored of a task's F: matrices, else traces; nothing where they are not exact ones."""
    config = run.config
    if config.estimator != "exact" or config.is_lower_bound or config.token_source != "observed":
        return np.empty(0)
    if run.config.save == "summary":
        rows = run.table(task).filter(pc.field("layer") == layer)
        return rows["trace"].to_numpy()
    (shard,) = run.matrices(layer, [task])
    return shard.array


def _difference(stored: np.ndarray | np.floating[Any], factors: Float[Tensor, "R d_model"]) -> float:
    """Relative difference of a stored matrix or trace from that of the factors."""
    matrix = (factors.mT @ factors).cpu().numpy()
    truth = matrix if np.ndim(stored) else np.trace(matrix)
    return float(np.linalg.norm(stored - truth) / np.linalg.norm(truth))


# ---- moving a stream -------------------------------------------------------------------------------------------------


def _moved(
    model: SplitModel,
    place: _Place,
    layer: int,
    stream: Float[Tensor, " d_model"],
    factors: Float[Tensor, "R d_model"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ratio [D, 2, S], predicted [D, S] and noise [D, S] at one position; see :class:`LayerTest`."""
    size = stream.norm()
    directions = _directions(factors, seed=place.position)
    ahead = torch.from_numpy(STEPS).to(directions)[:, None] * size * directions[:, None]  # [D, S, d_model]
    probes = _PROBE[stream.dtype] * size * torch.tensor([-2, -1, 0, 1, 2]).to(directions)[:, None]
    probes = probes * directions[-_RANDOM:, None]  # [random, 5, d_model]
    to = stream + torch.cat([probes.flatten(0, 1), torch.stack([ahead, -ahead], 1).flatten(0, 2)])
    log_prob = _log_probs(model, place, layer, to)
    around, log_p, log_q = log_prob[: 5 * _RANDOM], log_prob[2], log_prob[5 * _RANDOM :]
    shape = (len(directions), 2, len(STEPS))
    measured = torch.cat([divergence(log_p[None], some) for some in log_q.split(model.head.positions_at_once())]).view(
        shape
    )
    # A float32 stream takes a small step only roughly: what it took is what counts.
    taken = (to[5 * _RANDOM :] - stream).double()
    predicted = ((taken @ factors.double().mT).square().sum(-1) / 2).view(shape)
    fourth = around.unflatten(0, (_RANDOM, 5)).mul(torch.tensor([1, -4, 6, -4, 1]).to(around)[:, None]).sum(1)
    mean = (log_p.exp() * fourth).sum(-1, keepdim=True)
    # Errors e of log q - log p weigh as a divergence of Var(e) / 2; the fourth difference of independent ones has 35 Var(e).
    rounding = (log_p.exp() * (fourth - mean).square()).sum(-1).mean() / 70
    # Var(d + e) against Var(d), by Cauchy and Schwarz.
    share = rounding / predicted.mean(1)
    noise = 2 * share.sqrt() + share
    ratio = (measured / predicted).nan_to_num(nan=0.0)
    return ratio.cpu().numpy(), predicted.mean(1).cpu().numpy(), noise.nan_to_num(nan=torch.inf).cpu().numpy()


def _directions(factors: Float[Tensor, "R d_model"], seed: int) -> Float[Tensor, "D d_model"]:
    """Unit vectors: leading eigenvectors of F, the middle one of those above 1e-4 of the first, and random ones."""
    eigenvalues, vectors = torch.linalg.eigh((factors.mT @ factors).double())
    middle = int((eigenvalues > 1e-4 * eigenvalues[-1]).sum()) // 2
    chosen = [*range(_LEADING), middle]
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(_RANDOM, len(vectors), dtype=vectors.dtype, generator=generator).to(vectors.device)
    return torch.cat([vectors.flip(1)[:, chosen].mT, random / random.norm(dim=-1, keepdim=True)]).to(factors.dtype)


def _log_probs(
    model: SplitModel, place: _Place, layer: int, streams: Float[Tensor, "k d_model"]
) -> Float[Tensor, "k vocab_size"]:
    """log p with the position's stream replaced, in float64 from the logits on."""
    encoded = {}
    if place.encoder:
        encoded = model.encode(*(tensor.to(model.device) for tensor in place.encoder.values()))
    at = torch.tensor([place.at], device=model.device)
    with full_precision():
        z = model.replaced(place.ids, at, layer, streams[:, None], encoded)[:, 0]
        return torch.cat(
            [
                model.head.predict(some).logits.double().log_softmax(-1)
                for some in z.split(model.head.positions_at_once())
            ]
        )
