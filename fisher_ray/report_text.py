"""The text of a run as sections of its page: documents shaded by a number of each token, and the strongest places."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from fisher_ray.inspection import document_title, ranking, stronger
from fisher_ray.page import Markup, Section, embedded, missing, table_of
from fisher_ray.run import Reading, Run

# Documents of the text view, and numbers in it: at most 5 MB. Longer documents are cut to what fits.
_DOCUMENTS, _NUMBERS = 100, 650_000
# Places named at each layer.
_PLACES = 8

# Of single positions: name in the table, label, whether each layer has its own.
_COLUMNS = [
    ("trace", "trace of F", True),
    ("top_eigenvalue", "top eigenvalue", True),
    ("participation_ratio", "participation ratio", True),
    ("entropy_rank", "entropy rank", True),
    ("trace_rank_99", "99 % rank", True),
    ("entropy", "entropy of p", False),
    ("surprisal", "surprisal of the next token", False),
    ("kept_mass", "kept mass", False),
    ("captured_share", "captured share", False),
    ("context", "context", False),
]
# Where a run keeps factors or matrices: v^T F v along the first directions of each layer.
_ALONG = [(f"along_{i}", f"vᵀFv, direction {i}", True) for i in range(4)]


@dataclass(frozen=True)
class _Document:
    """The rows of one document, [n], and what each layer has of them, [L, n]."""

    title: str
    position: list[int]
    text: list[str]
    values: dict[str, np.ndarray]


def text_sections(run: Run, reading: Reading, eigenvectors: Mapping[int, np.ndarray]) -> list[Section]:
    """The text of the first documents and the strongest places of all, from each task's table in turn.

    Args:
        eigenvectors: of each layer that could be read, columns.
    """
    documents: list[_Document] = []
    places: dict[int, list[dict[str, Any]]] = {layer: [] for layer in run.layers}
    lost: list[str] = []
    directions = {} if run.config.save == "summary" else eigenvectors
    for task, table in run.tables(reading):
        if table is None:
            lost.append(f"Left out: {reading.last}")
        elif len(table) and len(documents) < _DOCUMENTS:
            rows = len(table) // len(run.layers)
            along = np.full((len(_ALONG), len(run.layers), rows), np.nan)
            for i, layer in enumerate(run.layers):
                found = reading(partial(_along, run, task, layer, directions[layer])) if layer in directions else None
                if found is not None:
                    along[: len(found), i] = found
            documents += _documents(run, table, along)
        for layer in run.layers if table is not None else ():
            places[layer] = stronger(places[layer], run.of_layer(table, layer), run.config.kept_columns, _PLACES)
    if not documents and not lost:
        lost.append("No position is scored yet: there is nothing to show.")
    return [_text(run, documents, lost), _places(run, places, lost)]


def _along(run: Run, task: int, layer: int, eigenvectors: np.ndarray) -> np.ndarray:
    """``v^T F_t v`` of a task's positions for the first directions, [k, n]."""
    v = eigenvectors[:, : len(_ALONG)]
    if run.config.save == "factors":
        (shard,) = run.factors(layer, [task])
        return np.square(shard.array @ v).sum(1).T
    (shard,) = run.matrices(layer, [task])
    return np.einsum("nij,ik,jk->kn", shard.array, v, v)


def _text(run: Run, documents: list[_Document], lost: Sequence[str]) -> Section:
    documents = documents[:_DOCUMENTS]
    config = run.config
    partial = config.is_lower_bound or config.estimator == "deflated"
    unsaid = {"kept_mass": config.top_p == 1, "captured_share": not partial}  # the same number at every position
    columns = [c for c in _COLUMNS if not unsaid.get(c[0])]
    if run.config.save != "summary":
        columns[2:2] = _ALONG[: run.d_model]
    numbers = sum(len(run.layers) if layered else 1 for _, _, layered in columns)
    length = _cut([len(document.position) for document in documents], _NUMBERS // numbers)
    data = {
        "layers": run.layers,
        "columns": [{"name": name, "label": label, "layered": layered} for name, label, layered in columns],
        "documents": [
            {
                "title": document.title,
                "rows": len(document.position),
                "position": document.position[:length],
                "text": document.text[:length],
                "values": {name: _rounded(document.values[name][..., :length]) for name, _, _ in columns},
            }
            for document in documents
        ],
    }
    options = "".join(f'<option value="{i}">{label}</option>' for i, (_, label, _) in enumerate(columns))
    middle = len(run.layers) // 2
    reader = f"""<div id="reader">
<div class="controls">
<label>shade by <select id="column">{options}</select></label>
<label>layer <input id="layer" type="range" min="0" max="{len(run.layers) - 1}" value="{middle}"
{"disabled" if len(run.layers) == 1 else ""}><output id="shown" for="layer"></output></label>
<span id="legend" aria-label="shades and what they stand for"></span>
</div>
<div id="documents" tabindex="0" role="group" aria-label="documents; arrow keys go from token to token"></div>
<aside id="numbers" aria-live="polite">Point at a token, or use ← and → in the text, for its numbers.</aside>
</div>
{embedded(json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False), "positions")}"""
    return Section(
        "text",
        "Text",
        f"{len(documents):,} documents of the corpus, each token shaded by how much a nudge there changes the next one, or by "
        "another number; the scale is that of the layer shown.",
        "".join(map(missing, lost)) + (reader if documents else "") + f'<p class="note">{_capped(run)}</p>',
    )


def _places(run: Run, places: Mapping[int, Sequence[Mapping[str, Any]]], lost: Sequence[str]) -> Section:
    head = ["document", "position", "trace", "entropy of p", "text"]
    layers = [layer for layer, found in places.items() if found]
    tables = []
    for layer in layers:
        rows = []
        for place in places[layer]:
            before, text, after = (escape(place[name]).replace("\n", "↵") for name in ("before", "text", "after"))
            rows.append(
                (
                    document_title(place["document"], place["carried"]),
                    place["position"],
                    f"{place['trace']:.4g}",
                    f"{place['entropy']:.3g}",
                    Markup(f"{before}<mark>{text}</mark>{after}"),
                )
            )
        tables.append(f'<div class="places"><h3>layer {layer}</h3>{table_of(head, rows, range(1, 4))}</div>')
    middle = layers[len(layers) // 2] if layers else None
    options = "".join(f"<option{' selected' * (k == middle)}>{k}</option>" for k in layers)
    chooser = f'<div class="controls"><label>layer <select id="place-layer">{options}</select></label></div>'
    return Section(
        "places",
        "Strongest places",
        "Where a nudge changes the next token most: of each document the position with the largest trace at a layer, the "
        f"{_PLACES} largest of these (where there are fewer documents, more of each), marked in the text around it. Gaps are "
        "positions that were not scored.",
        (f'<p class="note">{escape(noisy)}</p>' if (noisy := ranking(run)) else "")
        + "".join(map(missing, lost))
        + (chooser + "".join(tables) if layers else ""),
    )


def _capped(run: Run) -> str:
    """What ranks of single positions are bounded by."""
    config = run.config
    if config.is_lower_bound:
        return f"Traces and ranks of single positions are of lower bounds ({config.estimator_in_words}): they are too small."
    if config.estimator == "exact":
        return "Ranks of single positions are of exact matrices; they cannot exceed d or the number of tokens."
    cap = (config.num_samples + (config.rank or 0)) * config.token_draws
    if config.estimator == "deflated":
        return (
            f"Ranks of single positions cannot exceed {cap}, the number of factors there, whatever the true rank; the share of "
            "their traces that no draw decides is the captured share."
        )
    return (
        f"Ranks of single positions cannot exceed {cap}, the number of sampled scores there, whatever the true rank. "
        f"{ranking(run)}"
    )


def _documents(run: Run, table: Any, along: np.ndarray) -> list[_Document]:
    """A task's documents; its rows are by layer, then by document and position, the same ones for each.

    Args:
        along: ``v^T F_t v`` of a few directions, [k, L, n].
    """
    rows = len(table) // len(run.layers)
    each = {
        name: np.asarray(table[name].to_numpy(), np.float64).reshape(-1, rows) for name, _, _ in _COLUMNS
        if name != "top_eigenvalue"
    }  # fmt: skip
    top = [values[0] for values in table["top_eigenvalues"].to_pylist()]
    each["top_eigenvalue"] = np.array(top, np.float64).reshape(-1, rows)
    each |= {name: values for (name, _, _), values in zip(_ALONG, along, strict=True)}
    first = table.slice(0, rows)
    names, positions, texts, ids = (first[c].to_pylist() for c in ("document", "position", "text", "token"))
    if texts == [str(token) for token in ids]:  # no tokenizer: ids in a row would run together
        texts = [f"{text} " for text in texts]
    carried = [first[column].to_pylist() for column in run.config.kept_columns]
    found = []
    bounds = [i for i in range(rows) if i == 0 or names[i] != names[i - 1]] + [rows]
    for start, stop in pairwise(bounds):
        values = {
            name: each[name][:, start:stop] if layered else each[name][0, start:stop]
            for name, _, layered in [*_COLUMNS, *_ALONG]
        }
        title = document_title(
            names[start], {c: v[start] for c, v in zip(run.config.kept_columns, carried, strict=True)}
        )
        found.append(_Document(title, positions[start:stop], texts[start:stop], values))
    return found


def _cut(lengths: Sequence[int], room: int) -> int:
    """The greatest length that documents may be cut to for all of them to have room."""
    low, high = 1, max(lengths, default=1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(n, middle) for n in lengths) <= room else (low, middle - 1)
    return low


def _rounded(values: np.ndarray) -> list[Any]:
    """Four digits of each number; None for those that are not."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    short = (float(f"{value:.4g}") for value in values)
    return [None if x != x else int(x) if x.is_integer() else x for x in short]
