"""What directions of a run's residual streams mean: what they move, where they matter, what a step along one costs and does.

A direction is a row ``v [d_model]``; directions of one layer are rows of a matrix. They are taken as anybody has them: arrays,
tensors on any device, lists. ``v^T F_t v`` is how fast the prediction at position t changes along v: with ``u = J_z v`` it is
the variance under p of the change of the logits, ``u^T M u``. So it takes a product with ``J_z`` a direction, and no factor of
F.

What asks for a model takes the run's own, loaded each time; give it as ``model`` to load it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, Num
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fisher_ray.architecture import ModelError, ModelFacts, attention_reading, weights_digest
from fisher_ray.corpus import Window
from fisher_ray.estimators import Exact
from fisher_ray.head import Prediction, divergence
from fisher_ray.numerics import full_precision
from fisher_ray.plan import ConfigError, make_plan
from fisher_ray.run import Run
from fisher_ray.scores import chosen_positions, iter_scores, score_factors
from fisher_ray.spectrum import subspace_overlaps, symmetric_eigh
from fisher_ray.split import SplitModel
from fisher_ray.statistics import Estimate, jackknife, quadratic_form
from fisher_ray.tape import Tape
from fisher_ray.worker import WINDOWS, Worker, load_model

# Share of the mean eigenvalue that is added to every one before F is inverted: directions along which F is next to nothing
# would otherwise take steps far beyond where F describes the output. Fixed before anything was measured with it.
DAMPING = 1e-2

_SHOWN = 12  # tokens before a position
_SPREAD = 16  # positions a window that steps are tried at
_PUSH = 3  # backward passes that a product with J_z costs; factors of F cost d_model
_PUSHED = 1 << 24  # numbers of products with J_z in memory
_TABLE = 1 << 18  # rows of a table in memory

# One direction, or several, one a row.
Directions = Num[np.ndarray, "*k d_model"] | Num[Tensor, "*k d_model"] | Sequence[Any]

COORDINATES_SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("position", pa.int32()),
        ("layer", pa.int16()),
        ("token", pa.int32()),
        ("text", pa.string()),
        ("direction", pa.int32()),
        ("coordinate", pa.float32()),
        ("sensitivity", pa.float32()),
    ],
    metadata={"fisher_ray.schema": "coordinates.1"},
)


# ---- which directions ----------------------------------------------------------------------------------------------------


def top_directions(run: Run, layer: int, k: int) -> Float[np.ndarray, "k d_model"]:
    """The k leading eigenvectors of the mean F as rows, each with its largest entry positive.

    Raises:
        ValueError: no such layer, or k is not in [1, d_model].
    """
    if not 1 <= k <= run.d_model:
        raise ValueError(f"the number of directions must be in [1, {run.d_model}], got {k}.")
    return _eigenvectors(run, layer)[1].mT[:k].numpy()


def read_directions(path: str | Path, d_model: int, tensor: str | None = None) -> Float[np.ndarray, "k d_model"]:
    """Directions, one a row, from a matrix in an .npy, .npz or .safetensors file; see :func:`stored_directions`."""
    return stored_directions(path, d_model, tensor)[2]


def stored_directions(
    path: str | Path, d_model: int, tensor: str | None = None
) -> tuple[str, Literal["rows", "columns"], Float[np.ndarray, "k d_model"]]:
    """Directions of a file, with the name of the matrix they are of, and whether they are its rows or its columns.

    Of a matrix [k, d_model] they are the rows, also where it is square; of one [d_model, k], as ``nn.Linear`` keeps a decoder's
    weights, the columns.

    Args:
        path: an .npy, .npz or .safetensors file.
        d_model: of the run.
        tensor: name of the matrix; None: the only one with an axis of d_model.

    Raises:
        ValueError: no such file or tensor, not one of those files, several matrices or none of that width, or numbers that are
            no direction's.
    """
    path = Path(path)
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _arrays(path)
    except (OSError, ValueError, EOFError, BadZipFile, SafetensorError) as error:
        raise ValueError(
            f"cannot read directions from {path}: {error} Expected .npy, .npz or .safetensors with rows of {d_model} numbers."
        ) from error
    if tensor is not None and tensor not in tensors:
        raise ValueError(f"{path} has no tensor {tensor!r}; it holds {_listed(tensors)}.")
    named = tensors if tensor is None else {tensor: tensors[tensor]}
    fitting = {
        name: each for name, each in named.items() if each.ndim == 2 and d_model in each.shape and min(each.shape)
    }
    if not fitting:
        raise ValueError(
            f"{path} must hold a matrix of directions, [k, {d_model}] or [{d_model}, k], for this run's d_model of {d_model}; "
            f"it holds {_listed(named)}."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"{path} holds several matrices with an axis of this run's d_model of {d_model}: {_listed(fitting)}. Choose one "
            "(--tensor NAME)."
        )
    ((name, matrix),) = fitting.items()
    by: Literal["rows", "columns"] = "rows" if matrix.shape[1] == d_model else "columns"
    return name, by, _rows(matrix if by == "rows" else matrix.T, d_model, f"in {path}")


def _listed(tensors: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {list(each.shape)}" for name, each in sorted(tensors.items())) or "nothing"


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        read = np.load(path, allow_pickle=False)
    except ValueError:  # it takes any other file for a pickle, and advises to load that
        raise ValueError("it is no file of NumPy's arrays.") from None
    arrays = {path.name: read} if isinstance(read, np.ndarray) else dict(read)
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError("it is an archive of something else than arrays.")
    return arrays


def _rows(given: Directions, d_model: int, where: str) -> Float[np.ndarray, "k d_model"]:
    """Directions as they were given, one a row, in float64."""
    try:
        if isinstance(given, Tensor):
            given = given.detach().cpu().to(torch.promote_types(given.dtype, torch.float64)).numpy()
        found = np.asarray(given)
        # In C's order, as torch takes no negative strides.
        rows = np.atleast_2d(found).astype(np.float64, order="C", casting="same_kind")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"directions {where} must be rows of {d_model} real numbers: {error}") from error
    if rows.ndim != 2 or rows.shape[1] != d_model or not len(rows):
        raise ValueError(f"directions {where} must be [{d_model}] or [k, {d_model}], got {list(found.shape)}.")
    bad = np.flatnonzero(~(np.isfinite(rows).all(1) & rows.any(1)))
    if len(bad):
        named = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        raise ValueError(f"directions {where} must be finite and not zero; rows {named} are not.")
    return rows


def _rows_at(run: Run, layer: int, given: Directions) -> Float[np.ndarray, "k d_model"]:
    """The same for a layer of a run."""
    if layer not in run.layers:
        raise ValueError(f"layer must be one of {run.layers}, got {layer}.")
    return _rows(given, run.d_model, f"at layer {layer}")


def _one(rows: Float[np.ndarray, "k d_model"]) -> Float[np.ndarray, " d_model"]:
    if len(rows) > 1:
        raise ValueError(f"direction must be one, [{rows.shape[1]}], got {len(rows)} rows.")
    return rows[0]


def _at_least_one(**given: int | None) -> None:
    for name, count in given.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")


def _eigenvectors(run: Run, layer: int) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    return symmetric_eigh(torch.from_numpy(np.array(run.fisher(layer))))


# ---- the run's corpus, read again ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Passage:
    """One window of a document, as it goes through the model.

    Attributes:
        document: its id.
        number: of the document, from 1.
        window: tokens, and which of them are scored.
        ids: [1, seq].
        at: [n], window positions that are scored.
        encoder: what the scores' functions take of an encoder-decoder's other tokens.
        encoded: the encoder's output for them.
    """

    document: str
    number: int
    window: Window
    ids: Tensor
    at: Tensor
    encoder: Mapping[str, Any]
    encoded: Mapping[str, Tensor]

    def spread(self) -> Int[Tensor, " few"]:
        """At most 16 of its scored positions."""
        return self.at[:: -(-len(self.at) // _SPREAD)]


def model_of(run: Run, dtype: str | None = None) -> SplitModel:
    """The run's own model, on whatever device there is here.

    Args:
        run: an open run.
        dtype: of the weights; default: the run's.

    Raises:
        ModelError: it is gone, its weights are no longer those of the run, or it brings code that the run was opened without
            trust in.
    """
    weights = run.description["result_fields"]["weights"]
    config = replace(run.config_to_load(), dtype=dtype or run.config.dtype)
    if weights_digest(config.model, config.revision, config.trust_remote_code) != weights:
        raise ModelError(
            f"the weights of {config.model} are not those that {run.store.uri} was made with. Put those back, or run again in "
            "another directory."
        )
    return load_model(replace(config, device=None, compile=False))  # tapes do not run compiled


def worker_of(run: Run, model: SplitModel | None = None, dtype: str | None = None) -> Worker:
    """A worker that makes the run's own windows of the run's own corpus.

    Args:
        run: an open run.
        model: the run's, where it is loaded already; else it is loaded in ``dtype``, as :func:`model_of` does.

    Raises:
        ModelError, CorpusError: model or corpus cannot be read.
        ConfigError: tokenizer or corpus are no longer those of the run.
        ValueError: the model given is of another shape.
    """
    model = model or model_of(run, dtype)
    facts = ModelFacts.of(model.model.config)
    if facts.d_model != run.d_model or max(run.layers) > facts.num_layers:
        raise ValueError(
            f"the run is of {run.config.model}, width {run.d_model} and layers up to {max(run.layers)}; the model given, "
            f"{model.label}, has width {facts.d_model} and {facts.num_layers} blocks. Give the run's own."
        )
    plan = make_plan(run.config_to_load())
    for name, source in (("tokenizer", run.config.model), ("corpus", ", ".join(run.config.corpus))):
        if plan.result_fields[name] != run.description["result_fields"][name]:
            raise ConfigError(f"the {name} of {source} changed since the run. Put back what was there, or run again.")
    return Worker(plan, run.store, model)


class _Corpus:
    """The documents of a run's finished tasks, and the model that reads them."""

    def __init__(self, run: Run, model: SplitModel | None):
        self.run, self.worker = run, worker_of(run, model)
        self.model = self.worker.model

    def passages(self, documents: int | None = None) -> Iterator[_Passage]:
        """Windows in the order of the run's tasks; of the first so many documents that have one."""
        seen, last = 0, ""
        for task in self.run.corpus_tasks():
            for document, window, arguments in self.worker.windows(task):
                seen, last = seen + (document != last), document
                if documents is not None and seen > documents:
                    return
                ids = torch.tensor([window.ids], device=self.model.device)
                at = torch.tensor(window.scored, device=self.model.device)
                encoder = {name: value.to(self.model.device) for name, value in arguments.items()}
                encoded = self.model.encode(*encoder.values()) if encoder else {}
                yield _Passage(document, seen, window, ids, at, encoder, encoded)


def window(run: Run, document: str, position: int, model: SplitModel | None = None) -> tuple[Int[Tensor, "1 seq"], int]:
    """The tokens that the model saw with a place of the corpus, and which of them is there.

    Places are as :func:`strongest` and the tables name them, by a position of the document; among the tokens of a window, as
    :func:`fisher_ray.score_factors`, :func:`steer` and :func:`nudge` take them, the sink is counted too. Reads one task's
    documents.

    Args:
        run: an open run.
        document: its id.
        position: of the document.
        model: the run's.

    Returns:
        the ids of the window that scores it, on the model's device, the sink first where there is one; and its position there.

    Raises:
        ValueError: there is no such position, or the model has an encoder, whose tokens would be left out.
    """
    number = run.task_of(document)
    if number is not None:
        task = next(task for task in run.corpus_tasks() if task.id == number)
        worker = worker_of(run, model)
        _check_decoder(worker.model)
        for name, found, _ in worker.windows(task):
            at = position - found.start + found.sink
            if name == document and at in found.scored:
                return torch.tensor([found.ids], device=worker.model.device), at
    raise ValueError(f"{run.store.uri} has no scored position {position} in a document {document!r}.")


def _check_decoder(model: SplitModel) -> None:
    if model.is_encoder_decoder:
        raise ValueError(f"{model.name} has an encoder; expected a model without.")


def _sensitivities(model: SplitModel, tape: Tape, layer: int, directions: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
    """``v^T F_t v`` exactly, at every query of a tape; nats^2 per squared unit of v."""
    found = []
    for some in directions.split(max(1, _PUSHED // tape.z.numel())):
        pushed = tape.push(layer, some)
        rows = max(1, model.head.positions_at_once() // len(some))
        parts = [model.head.predict(z).variance(u) for z, u in zip(tape.z.split(rows), pushed.split(rows), strict=True)]
        found.append(torch.cat(parts))
    return torch.cat(found, 1)


# ---- what they move, and where -------------------------------------------------------------------------------------------


def moved_tokens(
    run: Run, directions: Mapping[int, Directions], model: SplitModel | None = None
) -> dict[int, list[tuple[list[str], list[str]]]]:
    """Tokens that a step along each direction raises and lowers, through the model's own upper layers.

    ``dlog p(y)/de`` at ``h + e v``, averaged over up to 128 positions of 32 windows that are spread over the tasks done. Listed
    are tokens whose mean is at least four standard errors from zero: a token may go up at one position and down at another.

    Args:
        run: whose corpus the positions are of.
        directions: per layer, one a row.
        model: the run's.

    Returns:
        per layer and direction: up to five tokens raised and up to five lowered, most first.

    Raises:
        ValueError: no such layer, directions that are none or of another width, or no task is done that has positions.
    """
    rows = {layer: _rows_at(run, layer, each) for layer, each in directions.items()}
    examples = set(run.store.examples(run.done_tasks, WINDOWS))
    if not examples:
        raise ValueError(f"no position of {run.store.uri} is scored yet.")
    tasks = [task for task in run.corpus_tasks() if task.id in examples]
    return worker_of(run, model).moved_tokens(tasks, rows)


@dataclass(frozen=True)
class Place:
    """A position of the corpus where a direction matters.

    Attributes:
        sensitivity: ``v^T F_t v``, nats^2 per squared unit of v.
        before: the text before it, up to twelve tokens.
        text: the token there.
    """

    document: str
    position: int
    sensitivity: float
    before: str
    text: str


@dataclass(frozen=True)
class Strongest:
    """Where a direction is strongest, most first, and what that was read from, in words."""

    places: list[Place]
    source: str


def strongest(
    run: Run,
    layer: int,
    direction: Directions,
    count: int = 10,
    documents: int = 50,
    model: SplitModel | None = None,
) -> Strongest:
    """The positions of the corpus with the largest ``v^T F_t v = |G_t v|^2``.

    From the factors or matrices of all positions where the run has kept them, with its estimator's error; else computed
    again, exactly, over the first documents.

    Args:
        run: an open run.
        layer: one of its layers.
        direction: v.
        count: positions wanted.
        documents: read at most, where nothing was kept.
        model: the run's; not needed where factors or matrices were kept.

    Returns:
        those of positions where it is finite.

    Raises:
        ValueError: no such layer, no direction or several, another width, or a number below 1.
    """
    _at_least_one(count=count, documents=documents)
    v = _one(_rows_at(run, layer, direction))
    kept = run.config.save != "summary"
    found = _kept(run, layer, v, count) if kept else _recomputed(run, layer, v, count, documents, model)
    source = (
        f"the {run.config.save} of all positions"
        if kept
        else f"the first {documents} documents of its tasks, computed again"
    )
    estimator = run.config.estimator_in_words if kept else "exact"
    return Strongest(nlargest(count, found, key=lambda place: place.sensitivity), f"{source} ({estimator})")


def _kept(run: Run, layer: int, direction: np.ndarray, count: int) -> Iterator[Place]:
    """The strongest positions of each task, from what it has saved."""
    for shard in run.factors(layer) if run.config.save == "factors" else run.matrices(layer):
        along = shard.array @ direction
        values = np.square(along).sum(-1) if run.config.save == "factors" else along @ direction
        document, position, text = (shard.table[name].to_pylist() for name in ("document", "position", "text"))
        finite = np.flatnonzero(np.isfinite(values))
        for i in finite[np.argsort(-values[finite])[:count]].tolist():
            # Text that lies before it in the same document, as far as it was scored.
            first = i
            while first > max(0, i - _SHOWN) and (document[first - 1], position[first - 1]) == (
                document[i],
                position[first] - 1,
            ):
                first -= 1
            yield Place(document[i], position[i], float(values[i]), "".join(text[first:i]), text[i])


def _recomputed(
    run: Run, layer: int, direction: np.ndarray, count: int, documents: int, model: SplitModel | None
) -> Iterator[Place]:
    """The strongest positions of each window."""
    corpus = _Corpus(run, model)
    along = {layer: torch.tensor(direction[None], device=corpus.model.device)}
    for passage in corpus.passages(documents):
        for _, at, _, sensitivity in _measured(corpus, passage, along):
            values = sensitivity[:, 0]
            finite = values.isfinite().nonzero()[:, 0]
            for i in finite[values[finite].argsort(descending=True)[:count]].tolist():
                t = int(at[i])
                texts = [corpus.worker.text(token) for token in passage.window.ids[: t + 1]]
                before = "".join(texts[max(passage.window.sink, t - _SHOWN) : t])
                yield Place(passage.document, passage.window.position(t), float(values[i]), before, texts[t])


def project(
    run: Run,
    directions: Mapping[int, Directions],
    output: str | Path,
    documents: int | None = None,
    model: SplitModel | None = None,
    heard: Callable[[int], None] | None = None,
) -> int:
    """Coordinates ``h_t . v`` and exact ``v^T F_t v`` of every position of the corpus, as a Parquet table.

    One window is in memory at a time; the file appears when it is whole. The rows hold :data:`COORDINATES_SCHEMA`, v as it is
    given: a direction twice as long has twice the coordinate and four times the sensitivity. Tokens are the corpus's own, also
    for a run with ``token_source="sampled"``. Costs a forward pass, and three backward passes a direction and layer or those
    of :class:`fisher_ray.Exact`, whichever is less.

    Args:
        run: an open run.
        directions: per layer, one a row.
        output: the file.
        documents: the first so many; default: all of the tasks that are done.
        model: the run's.
        heard: told how many documents have been read so far.

    Returns:
        rows written. Positions where something is not finite have none.

    Raises:
        ValueError: a layer that the run has not, directions of another width or none, or a file that cannot be.
    """
    output = Path(output)
    if not output.parent.is_dir() or (output.exists() and not output.is_file()):
        raise ValueError(f"output must name a file in a directory that exists, got {output}.")
    if not directions:
        raise ValueError("directions must be given at one layer at least, got none.")
    _at_least_one(documents=documents)
    given = {layer: _rows_at(run, layer, directions[layer]) for layer in sorted(directions)}
    corpus = _Corpus(run, model)
    rows = {layer: torch.tensor(each, device=corpus.model.device) for layer, each in given.items()}
    written, unfinished = 0, output.with_name(output.name + ".part")
    try:
        with pq.ParquetWriter(unfinished, COORDINATES_SCHEMA, compression="zstd") as writer:
            for passage in corpus.passages(documents):
                for layer, *measured in _measured(corpus, passage, rows):
                    for table in _coordinates(corpus, passage, layer, *measured):
                        writer.write_table(table)
                        written += len(table)
                if heard is not None:
                    heard(passage.number)
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


def _measured(
    corpus: _Corpus, passage: _Passage, directions: Mapping[int, Tensor]
) -> Iterator[tuple[int, Int[Tensor, " n"], Float[Tensor, "n k"], Float[Tensor, "n k"]]]:
    """(layer, window positions, coordinates, sensitivities), by products with J_z or by factors, whichever is cheaper."""
    model, layers = corpus.model, list(directions)
    most = max(map(len, directions.values()))
    # A row and a graph for every position is more than may fit; scores are cut to what does.
    if model.gradients == "own_position" and _PUSH * most < model.d_model:
        with full_precision():
            tape = model.tape(passage.ids, passage.encoded, layers, passage.at)
            found = [
                (
                    layer,
                    passage.at,
                    tape.streams[layer] @ rows.mT.to(tape.streams[layer]),
                    _sensitivities(model, tape, layer, rows),
                )
                for layer, rows in directions.items()
            ]
        yield from found
        return
    at = passage.at.tolist()
    for scores in iter_scores(model, passage.ids, layers=layers, estimator=Exact(), positions=at, **passage.encoder):
        for layer, rows in directions.items():
            along = rows.mT.to(scores.factors[layer])
            with full_precision():
                sensitivity = torch.stack([(g @ along).square().sum(0) for g in scores.factors[layer]])
                coordinate = scores.activations[layer][:, 0] @ along
            yield layer, scores.position, coordinate, sensitivity


def _coordinates(
    corpus: _Corpus,
    passage: _Passage,
    layer: int,
    at: Int[Tensor, " n"],
    coordinate: Float[Tensor, "n k"],
    sensitivity: Float[Tensor, "n k"],
) -> Iterator[pa.Table]:
    """One row a position and direction; a table for each few positions, so that many directions take no more memory."""
    finite = (sensitivity.isfinite() & coordinate.isfinite()).all(1)
    for some in finite.nonzero()[:, 0].cpu().split(max(1, _TABLE // sensitivity.shape[1])):
        where = at.cpu()[some].tolist()
        tokens = [passage.window.ids[t] for t in where]
        one_each = {
            "document": [passage.document] * len(where),
            "position": [passage.window.position(t) for t in where],
            "layer": [layer] * len(where),
            "token": tokens,
            "text": [corpus.worker.text(token) for token in tokens],
        }
        k = sensitivity.shape[1]
        fields = [COORDINATES_SCHEMA.field(name) for name in one_each]
        repeated = pa.table(one_each, pa.schema(fields)).take(np.repeat(np.arange(len(where)), k))
        numbers = [values.cpu()[some].flatten().float().numpy() for values in (coordinate, sensitivity)]
        directions = np.tile(np.arange(k, dtype=np.int32), len(where))
        yield pa.Table.from_arrays([*repeated.columns, directions, *numbers], schema=COORDINATES_SCHEMA)


# ---- what a step costs ---------------------------------------------------------------------------------------------------


def typical_norm(run: Run, layer: int) -> float:
    """``sqrt(E |h|^2)`` over the corpus, what the length of a step is measured by."""
    total = run.blocks(layer).total
    return float(total.second_moment.trace / total.count) ** 0.5


def cost(run: Run, layer: int, direction: Directions) -> Estimate:
    """``v^T F v / 2`` with the mean F: what the step v costs in output, ``KL(p(h) || p(h + v))`` to second order, nats.

    Args:
        run: an open run.
        layer: one of its layers.
        direction: v, or several, one a row.

    Returns:
        the mean over positions of the corpus, with its jackknife standard error; not below 0, where rounding would have put the
        cost of a step that changes nothing. Of sketches a lower bound: up to ``run.sketch_error(layer) |v|^2 / 2`` is left out.

    Raises:
        ValueError: no such layer, another width, or no direction.
    """
    whole = quadratic_form(run.blocks(layer), torch.from_numpy(_rows_at(run, layer, direction)))
    shape = np.shape(direction)[:-1]
    return Estimate(whole.value.reshape(shape).clip(0) / 2, whole.error.reshape(shape) / 2, whole.blocks)


@dataclass(frozen=True)
class SafeDirections:
    """A subspace in which steps change the output little, and what steps in it were measured to do.

    Attributes:
        vectors: [m, d_model], orthonormal rows.
        share: of tr F that it holds.
        norm: of the steps tried.
        kl: ``KL(p(h) || p(h + v))`` of steps of that norm in it, nats; mean over positions, standard error over documents.
        random_kl: the same of steps in any direction.
        predicted, random_predicted: what ``v^T F v / 2`` makes of them.
    """

    vectors: np.ndarray
    share: float
    norm: float
    kl: Estimate
    random_kl: Estimate
    predicted: float
    random_predicted: float


def safe_directions(
    run: Run,
    layer: int,
    share: float,
    norm: float | None = None,
    documents: int = 16,
    seed: int = 0,
    model: SplitModel | None = None,
) -> SafeDirections:
    """The largest bottom eigenspace of the mean F that holds at most ``share`` of its trace, verified by KL.

    Args:
        run: an open run.
        layer: one of its layers.
        share: in (0, 1), of the trace over this corpus; of other documents such an eigenspace holds somewhat more.
        norm: of the steps that it is verified with; default: a tenth of the standard deviation of h, ``sqrt(tr Sigma) / 10``.
        documents: that it is verified on, the first of the corpus.
        seed: of the steps.
        model: the run's.

    Raises:
        ValueError: a share out of range, or one that the smallest eigenvalue exceeds by itself; no document.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}.")
    _at_least_one(documents=documents)
    values, vectors = _eigenvectors(run, layer)
    held = values.clamp_min(0).flip(0).cumsum(0) / values.clamp_min(0).sum()
    m = int((held <= share).sum())
    if m == 0:
        raise ValueError(
            f"the smallest eigenvalue at layer {layer} holds {float(held[0]):.2g} of the trace, more than {share:g}. "
            "Allow a larger share."
        )
    if norm is None:
        of_all = run.blocks(layer).total  # also of sketches, whose traces are exact
        mean = of_all.activation / of_all.count
        norm = 0.1 * (of_all.second_moment.trace / of_all.count - float(mean @ mean)) ** 0.5
    bottom = vectors[:, -m:].flip(1)
    generator = torch.Generator().manual_seed(seed)
    corpus = _Corpus(run, model)
    sums: dict[str, list[float]] = {}
    for passage in corpus.passages(documents):
        at = passage.spread()
        anywhere = torch.randn(len(at), run.d_model, generator=generator, dtype=torch.float64)
        within = torch.randn(len(at), m, generator=generator, dtype=torch.float64) @ bottom.mT
        steps = torch.stack([within, anywhere])
        steps = torch.cat([torch.zeros_like(steps[:1]), norm * steps / steps.norm(dim=-1, keepdim=True)])
        with full_precision():
            h = corpus.model.lower(passage.ids, passage.encoded, [layer])[layer][0, at]
            moved = corpus.model.replaced(passage.ids, at, layer, h + steps.to(h), passage.encoded)
            before, *after = (corpus.model.head.predict(z) for z in moved)
        kl = torch.stack([_kl(before, other) for other in after])
        kept = kl[:, kl.isfinite().all(0)]
        total = sums.setdefault(passage.document, [0.0, 0.0, 0])
        sums[passage.document] = [
            total[0] + float(kept[0].sum()),
            total[1] + float(kept[1].sum()),
            total[2] + kept.shape[1],
        ]
    each = torch.tensor([row for row in sums.values() if row[2]], dtype=torch.float64)
    if not len(each):
        raise ValueError(f"no position of {run.store.uri} is scored yet at layer {layer}.")
    whole = each.sum(0)
    rest = whole - each if len(each) > 1 else each
    both = jackknife(whole[:2] / whole[2], rest[:, :2] / rest[:, 2:])
    estimates = [
        Estimate(np.asarray(v), np.asarray(e), both.blocks) for v, e in zip(both.value, both.error, strict=True)
    ]
    trace = float(values.sum())
    return SafeDirections(
        bottom.mT.numpy(),
        float(held[m - 1]),
        norm,
        kl=estimates[0],
        random_kl=estimates[1],
        predicted=norm**2 * float(held[m - 1]) * trace / m / 2,
        random_predicted=norm**2 * trace / run.d_model / 2,
    )


def _kl(p: Prediction, q: Prediction, without: Int[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
    """``KL(p || q)`` a position, nats, in float64; where a token is named, over the others, renormalised."""
    logits = [each.logits.double() for each in (p, q)]
    if without is not None:
        logits = [each.scatter(1, without[:, None], -torch.inf) for each in logits]
    return divergence(*(each.log_softmax(-1) for each in logits))


# ---- who reads them, and where they go -----------------------------------------------------------------------------------


def reading_heads(
    model: SplitModel, run: Run, layer: int, k: int
) -> dict[Literal["query", "key", "value"], Float[np.ndarray, " heads"]]:
    """How much of what each attention head of block ``layer`` reads lies in the top-k eigenspace of the mean F there.

    The share is ``|W_a U|_F^2 / |W_a|_F^2``, with ``U [d_model, k]`` the eigenvectors and ``W_a [head_dim, d_model]`` the
    head's rows of the query, key or value projection times the linear part of the block's input norm: its scale, and for a
    LayerNorm the subtraction of the mean. (The division by the size of h is one number a position and changes no share.)
    Weights that point anywhere have ``k / d_model``.

    Returns:
        shares in [0, 1], one a query head; heads that share a key and value head have its share.

    Raises:
        ValueError: the run has no such layer, or no block reads it.
        ModelError: an attention whose weights this package does not know.
    """
    if not 0 <= layer < model.num_layers:
        raise ValueError(f"layer must be in [0, {model.num_layers}), the blocks of {model.name}, got {layer}.")
    top = torch.tensor(top_directions(run, layer, k)).mT
    weights = attention_reading(model.model, model.blocks[layer], lambda h: model.upper(h, layer, {}))
    return {
        name: ((each @ top).square().sum((1, 2)) / each.square().sum((1, 2))).numpy() for name, each in weights.items()
    }


def overlaps(run: Run, k: int) -> tuple[Float[np.ndarray, "L L"], float]:
    """How much of one layer's top-k eigenspace lies in another's, ``|U_i^T U_j|_F^2 / k``, for all pairs of the run's layers.

    Returns:
        the matrix, 1 on its diagonal; and ``k / d_model``, what random subspaces have in the mean.
    """
    tops = torch.tensor(np.stack([top_directions(run, layer, k) for layer in run.layers]))
    return subspace_overlaps(tops.mT).numpy(), k / run.d_model


# ---- steering ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steering:
    """Steps that raise tokens' log-probability, at n positions.

    Attributes:
        steps: [n, d_model].
        gain: [n], of log p of the target, nats, as measured; NaN where no step along that direction reached what was asked.
        kl_others: [n], KL over the other tokens, renormalised: what else the step has changed, nats.
    """

    steps: Tensor
    gain: Tensor
    kl_others: Tensor


def steer(
    model: SplitModel,
    run: Run,
    layer: int,
    input_ids: Int[Tensor, "1 seq"],
    positions: Int[Tensor, " n"] | Sequence[int],
    targets: Int[Tensor, " n"] | Sequence[int],
    metric: Literal["position", "mean", "euclidean"] = "mean",
    gain: float = 0.1,
) -> Steering:
    """The steps of least output change that raise tokens' log-probability by ``gain``.

    ``v ~ (F + DAMPING tr F / d_model)^-1 grad_h log p(target)``, its length found on the model itself. Take a model in float32:
    half precision rounds h by as much as such steps change it.

    Args:
        model: the run's.
        run: whose mean F is used with ``metric="mean"``.
        layer: where the step is taken.
        input_ids: one sequence.
        positions: of it, ascending; negative from its end.
        targets: the token to raise at each.
        metric: F of each position, exactly; the corpus's mean; or the identity, a plain gradient step.
        gain: nats, above 0.

    Raises:
        ValueError: tokens, positions, targets or a gain that are not as above, or a metric that there is not.
    """
    if not gain > 0:
        raise ValueError(f"gain must be above 0 nats, got {gain}.")
    if metric not in ("position", "mean", "euclidean"):
        raise ValueError(f"metric must be position, mean or euclidean, got {metric!r}.")
    given, targets = torch.as_tensor(positions), torch.as_tensor(targets)
    if given.ndim != 1 or not len(given) or targets.shape != given.shape:
        raise ValueError(
            f"positions and targets must be as many, [n], got {list(given.shape)} and {list(targets.shape)}."
        )
    chosen = _places(model, input_ids, given)
    seq = input_ids.shape[1]
    if chosen != [t % seq for t in given.tolist()]:
        raise ValueError(f"positions must ascend within [0, {seq}), got {given.tolist()}.")
    tokens = model.head.vocab_size
    if int(targets.min()) < 0 or int(targets.max()) >= tokens:
        raise ValueError(f"targets must be tokens in [0, {tokens}), got {targets.tolist()}.")
    (layer,) = model.check_layers([layer])
    at = torch.tensor(chosen, device=model.device)
    input_ids, targets = input_ids.to(model.device), targets.to(model.device)
    with full_precision():
        tape = model.tape(input_ids, {}, [layer], at)
        before = model.head.predict(tape.z)
        gradient = tape.pull(before.scores(targets[:, None])[:, 0])[layer].double()
        if metric == "position":
            scores = score_factors(model, input_ids, layers=[layer], estimator=Exact(), positions=chosen)
            direction = _least_change(scores.matrices(layer).double(), gradient)
        elif metric == "mean":
            direction = _least_change(torch.tensor(run.fisher(layer), device=gradient.device), gradient)
        else:
            direction = gradient
        direction = direction / direction.norm(dim=-1, keepdim=True)

        stream = tape.streams[layer]

        def stepped(length: Tensor) -> Tensor:
            return stream + (length[:, None] * direction).to(stream)

        def moved(length: Tensor) -> Prediction:
            return model.head.predict(model.replaced(input_ids, at, layer, stepped(length)[None], {})[0])

        def gain_of(after: Prediction) -> Tensor:
            return (after.log_prob(targets) - before.log_prob(targets)).double()

        length = _reach(lambda tried: gain_of(moved(tried)), gain, gain / (direction * gradient).sum(-1))
        after = moved(length.nan_to_num())
    reached = length.isfinite()
    return Steering(
        stepped(length).double() - stream.double(),  # as taken: rounded where the model is of half precision
        gain_of(after).where(reached, torch.nan),
        _kl(before, after, targets).where(reached, torch.nan),
    )


def _places(
    model: SplitModel, input_ids: Int[Tensor, "1 seq"], positions: Int[Tensor, " n"] | Sequence[int] | None
) -> list[int]:
    """Positions of one sequence, ascending, as :func:`fisher_ray.score_factors` takes them."""
    _check_decoder(model)
    if input_ids.ndim != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids must be one sequence, [1, seq], got {list(input_ids.shape)}.")
    model.check_ids(input_ids, input_ids.shape[1])
    given = None if positions is None else torch.as_tensor(positions).tolist()
    (chosen,) = chosen_positions([input_ids[0]], given, first=0)
    return chosen


def _least_change(fisher: Float[Tensor, "*n d d"], gradient: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """``(F + DAMPING tr F / d)^-1 g``."""
    d = gradient.shape[-1]
    ridge = DAMPING / d * fisher.diagonal(dim1=-2, dim2=-1).sum(-1)
    damped = fisher + ridge[..., None, None] * torch.eye(d, dtype=fisher.dtype, device=fisher.device)
    return torch.linalg.solve_ex(damped, gradient[..., None]).result[..., 0]  # where F is zero nothing changes anything


def _reach(gained: Callable[[Tensor], Tensor], gain: float, guess: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The length at which each position has gained enough, the first found by doubling; NaN beyond 2^10 of the guess."""
    low, high = torch.zeros_like(guess), guess.clone()
    short = gained(high) < gain
    for _ in range(10):
        low, high = torch.where(short, high, low), torch.where(short, 2 * high, high)
        short = gained(high) < gain
        if not short.any():
            break
    for _ in range(30):
        middle = (low + high) / 2
        enough = gained(middle) >= gain
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high.masked_fill(short, torch.nan)


# ---- what a step does ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nudged:
    """What steps along a direction do to the next token, at n positions.

    Attributes:
        positions: [n], ascending.
        kl: [m, n], ``KL(p || p')`` for each of m steps, p before and p' after it; nats.
        raised, lowered: [m, n, top], the tokens whose probability rises and falls most, most first.
        raised_by, lowered_by: [m, n, top], ``p' - p`` of those.
    """

    positions: Tensor
    kl: Tensor
    raised: Tensor
    lowered: Tensor
    raised_by: Tensor
    lowered_by: Tensor


def nudge(
    model: SplitModel,
    layer: int,
    input_ids: Int[Tensor, "1 seq"],
    direction: Directions,
    steps: Sequence[float] | Float[np.ndarray, " m"],
    positions: Int[Tensor, " n"] | Sequence[int] | None = None,
    top: int = 5,
) -> Nudged:
    """What becomes of ``p(. | h_t, x_<t)`` where ``step v`` is added to h_t, for each step and position, by forward passes.

    A position's step is taken alone, all others' streams as they are without it: what ``KL = step^2 v^T F_t v / 2`` says of
    small steps, measured for any. Steps at several positions together reach later ones through attention too; that is another
    thing. Costs two forward passes a step. Half precision rounds h by as much as small steps change it.

    Args:
        model: the model.
        layer: where the step is taken.
        input_ids: one sequence.
        direction: v.
        steps: m of them, in lengths of v; negative ones go the other way.
        positions: of the sequence, negative from its end; None: all.
        top: tokens to name each way.

    Raises:
        ValueError: tokens, positions, a direction or steps that are not as above.
    """
    _at_least_one(top=top)
    lengths = torch.as_tensor(steps, dtype=torch.float64)
    if lengths.ndim != 1 or not len(lengths) or not bool(lengths.isfinite().all()):
        raise ValueError(f"steps must be finite numbers, one at least, got {lengths.tolist()}.")
    at = torch.tensor(_places(model, input_ids, positions), device=model.device)
    (layer,) = model.check_layers([layer])
    v = torch.tensor(_one(_rows(direction, model.d_model, f"at layer {layer}")), device=model.device)
    input_ids, top = input_ids.to(model.device), min(top, model.head.vocab_size)
    parts: list[list[Tensor]] = []
    with full_precision():
        h = model.lower(input_ids, {}, [layer])[layer][0, at].double()
        # h itself goes the same way, as another might round otherwise.
        states = [
            model.replaced(input_ids, at, layer, (h + step * v)[None], {})[0] for step in (0.0, *lengths.tolist())
        ]
        for before, *after in zip(*(each.split(model.head.positions_at_once()) for each in states), strict=True):
            p = model.head.predict(before)
            parts.append([torch.stack(each) for each in zip(*(_changes(p, z, top) for z in after), strict=True)])
    return Nudged(at, *(torch.cat(each, 1) for each in zip(*parts, strict=True)))


def _changes(p: Prediction, z: Float[Tensor, "n d_z"], top: int) -> tuple[Tensor, ...]:
    """Of :class:`Nudged`, at one step."""
    q = p.head.predict(z)
    change = q.prob - p.prob
    up, down = change.topk(top), change.topk(top, largest=False)
    return _kl(p, q), up.indices, down.indices, up.values, down.values
