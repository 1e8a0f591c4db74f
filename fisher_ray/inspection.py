"""What there is in a run, in words and numbers: an overview, one layer, one position, and how two runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console
from rich.text import Text

from fisher_ray.report import number_table, print_table
from fisher_ray.run import Reading, Run
from fisher_ray.spectrum import subspace_overlaps, symmetric_eigh
from fisher_ray.statistics import Blocks, Estimate, Spectrum, convergence, half_angles, spectrum

# Eigenvectors of a layer that are looked at one by one, and that span the subspace two runs are compared by.
TOP = 8
# Tokens on either side that are shown of a position.
_AROUND = 12

# Columns that a place is told by.
_PLACE = ["document", "position", "token", "text", "trace", "entropy"]

RANKS = ("participation_ratio", "entropy_rank", "trace_rank_99")


def overview(run: Run) -> dict[str, Any]:
    """Status, counts, health and one row a layer; what cannot be read is left out and named in ``problems`` or ``damaged``."""
    reading = Reading()
    counts = reading(lambda: run.counts)
    problems: list[str] = []
    layers = []
    for layer in run.layers:
        try:
            blocks = reading(partial(run.blocks, layer))
        except ValueError as error:
            problems.append(str(error))
        else:
            layers += [] if blocks is None else [{"layer": layer, **_spectral(blocks, spectrum(blocks))}]
    notes = [reading(partial(run.store.read_sealed, path)) for path in run.store.notes()]
    if counts and counts.invalid:
        problems.append(f"{counts.invalid} positions had activations or scores that were not finite, and are left out")
    if counts and counts.halvings:
        problems.append(f"memory ran out {counts.halvings} times; micro-batches were halved, which may change rounding")
    groups = (reading(lambda: run.group_traces(run.layers[0])) or {}) if run.config.group_by else {}
    return {
        "run": run.store.uri,
        "status": run.status,
        "model": run.config.model,
        "corpus": list(run.config.corpus),
        "estimand": run.estimand,
        "estimator": run.config.estimator,
        "estimator_in_words": run.config.estimator_in_words,
        "d_model": run.d_model,
        "sketch": run.config.sketch,
        "counts": None if counts is None else asdict(counts),
        "groups": {group: n for group, (n, _) in groups.items()},
        "group_titles": {group: run.group_title(group) for group in groups},
        "layers": layers,
        "quarantined": [note["error"] for note in notes if note],
        "problems": problems,
        "damaged": reading.damaged,
    }


def one_layer(run: Run, layer: int, group: str | None = None) -> dict[str, Any]:
    """A layer's eigenvalues and directions, how well they are resolved, and the positions with the largest traces.

    What cannot be read is left out and named in ``damaged``.
    """
    reading = Reading()
    blocks = reading(lambda: run.blocks(layer, group))
    found = {"run": run.store.uri, "status": run.status, "layer": layer, "group": group}
    found |= {} if blocks is None else _resolved(blocks)
    largest = [] if group is not None else largest_traces(run, [layer], reading)[layer]
    return {**found, "largest_traces": largest, "ranking": ranking(run), "damaged": reading.damaged}


def _resolved(blocks: Blocks) -> dict[str, Any]:
    read, settled, angles = spectrum(blocks), convergence(blocks), half_angles(blocks, TOP)
    together = {i: f"{c[0]}-{c[-1]}" for c in read.clusters(TOP) if len(c) > 1 for i in c}
    values, errors = read.eigenvalues.value, read.eigenvalues.error
    shares = values.cumsum() / read.trace.value
    return {
        **_spectral(blocks, read),
        "relative_error": _or_none(settled.error),
        "convergence": {"positions": settled.positions.tolist(), "relative_change": settled.change[1:].tolist()},
        "directions": [
            {
                "direction": i,
                "eigenvalue": float(values[i]),
                "error": _or_none(errors[i]),
                "cumulative_share": float(shares[i]),
                "half_angle": float(np.median(angles[:, i])) if len(angles) else None,
                "not_told_apart": together.get(i),
            }
            for i in range(min(TOP, len(values)))
        ],
    }


def _spectral(blocks: Blocks, plain: Spectrum) -> dict[str, Any]:
    """Everything that is read off a layer's spectrum, with errors, beside its value after whitening."""
    whitened = spectrum(blocks, whitened=True)
    names = ("trace", *RANKS, "anisotropy")
    found: dict[str, Any] = {"positions": blocks.total.count, "blocks": len(blocks)}
    found["sketch_error"] = blocks.total.sketch_error
    found["top_eigenvalue"] = _pair(plain.eigenvalues, 0)
    found |= {name: _pair(getattr(plain, name)) for name in names}
    found["whitened_top_eigenvalue"] = _pair(whitened.eigenvalues, 0)
    found |= {f"whitened_{name}": _pair(getattr(whitened, name)) for name in names}
    return found | {"eigenvalues": plain.eigenvalues.value.tolist()}


def _pair(estimate: Estimate, at: int | None = None) -> list[float | None]:
    """[value, standard error], as JSON can hold it."""
    value, error = (array if at is None else array[at] for array in (estimate.value, estimate.error))
    return [float(value), _or_none(error)]


def _or_none(number: Any) -> float | None:
    """A number as JSON can hold it: None for NaN."""
    return None if np.isnan(number) else float(number)


def ranking(run: Run) -> str:
    """What is to be known before single positions are ranked by their traces; empty where nothing is."""
    if run.config.estimator != "sampled":
        return ""
    return (
        f"Traces of single positions are of {run.config.num_samples * run.config.token_draws} sampled scores here, too few to "
        "rank by: the largest are mostly too large, and others may belong in their place. Take --estimator deflated or exact."
    )


def largest_traces(run: Run, layers: Sequence[int], reading: Reading) -> dict[int, list[dict[str, Any]]]:
    """The five strongest places at each layer, see :func:`stronger`, with the text around them; a task's table at a time."""
    best: dict[int, list[dict[str, Any]]] = {layer: [] for layer in layers}
    columns = run.config.kept_columns
    for _, table in run.tables(reading, [*_PLACE, *columns]):
        for layer in layers if table is not None else ():
            best[layer] = stronger(best[layer], run.of_layer(table, layer), columns, 5)
    return best


def stronger(best: list[dict[str, Any]], rows: pa.Table, columns: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The places with the largest traces, of those so far and of one task's rows at one layer.

    The largest of each document come first, most first, then the second ones, and so on: else a few documents have them all.
    """
    trace = rows["trace"].to_numpy()
    document = rows["document"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(-trace, kind="stable")
    nth = _earlier_ones(document[order])
    places = []
    for j in np.argsort(nth, kind="stable")[:count].tolist():
        i = int(order[j])
        first = max(0, i - _AROUND)
        near = rows.slice(first, i - first + _AROUND + 1).to_pylist()
        here = near[i - first]
        beside = [row for row in near if row["document"] == here["document"]]
        about = {"carried": {name: here[name] for name in columns}, "rank_in_document": int(nth[j])}
        places.append({name: here[name] for name in _PLACE} | _text_around(beside, here["position"]) | about)
    return sorted([*best, *places], key=lambda place: (place["rank_in_document"], -place["trace"]))[:count]


def _earlier_ones(codes: np.ndarray) -> np.ndarray:
    """How many of those before each are equal to it."""
    by = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[by], prepend=-1))
    found = np.empty(len(codes), np.int64)
    found[by] = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    return found


def document_title(document: str, carried: Mapping[str, Any]) -> str:
    """A document's id with the columns of the corpus that were carried along."""
    return " · ".join([document, *(f"{name}: {value}" for name, value in carried.items())])


def _text_around(rows: Sequence[Mapping[str, Any]], position: int) -> dict[str, str]:
    """Text ``before`` and ``after`` a position, from rows of one document in order; "…" where the run left positions out."""
    found = {"before": "", "after": ""}
    last = None
    for row in rows:
        t = row["position"]
        if abs(t - position) > _AROUND:
            continue
        if last is not None and t > last + 1:
            found["before" if t <= position else "after"] += " … "
        if t != position:
            # Ids of a model without tokenizer would run together.
            text = f" {row['text']} " if row["text"] == str(row["token"]) else row["text"]
            found["before" if t < position else "after"] += text
        last = t
    return found


def one_position(run: Run, document: str, position: int) -> dict[str, Any]:
    """One position at every layer, with the text around it, and its own matrix's spectrum where the run kept it.

    Raises:
        ValueError: the run has no such position.
        DamagedError: its table is damaged.
    """
    reading = Reading()
    task = run.task_of(document)
    if task is None:
        raise ValueError(
            f"{run.store.uri} has no document {document!r}. Documents are named as in positions/*.parquet."
        )
    rows = run.table(task).filter(pc.field("document") == document).to_pylist()
    here = [row for row in rows if row["position"] == position]
    if not here:
        reach = sorted(row["position"] for row in rows)
        raise ValueError(
            f"document {document!r} has no scored position {position}; its positions run from {reach[0]} to {reach[-1]}."
        )
    around = sorted((row for row in rows if row["layer"] == here[0]["layer"]), key=lambda row: row["position"])
    found: dict[str, Any] = {
        "run": run.store.uri,
        "document": document,
        "position": position,
        "text": here[0]["text"],
        **_text_around(around, position),
        "layers": sorted(here, key=lambda row: row["layer"]),
    }
    if run.config.save != "summary":
        matrices = {layer: reading(partial(run.matrix, layer, document, position, task)) for layer in run.layers}
        found["eigenvalues"] = {
            k: np.linalg.eigvalsh(f)[::-1].clip(0).tolist() for k, f in matrices.items() if f is not None
        }
    return {**found, "damaged": reading.damaged}


def difference(
    one: Run,
    other: Run,
    layers: tuple[int, int] | None = None,
    groups: tuple[str | None, str | None] = (None, None),
) -> dict[str, Any]:
    """How two mean Fisher matrices differ: of two runs, as of two corpora or checkpoints, of two groups, or at two layers.

    Traces and ranks, also after whitening, with their change and its standard error: of the same documents, as two checkpoints
    on one corpus are, by the jackknife of the difference (``paired``), else as of independent samples; the relative Frobenius
    distance ``|F' - F| / |F|``; the overlap ``|U^T U'|_F^2 / k`` of the top-k eigenspaces, where random ones would have
    ``k / d_model``; and what moved most: the leading eigenvalues of ``F' - F`` of either sign.

    Args:
        one: a run.
        other: another, or the same.
        layers: one of each run; None: every layer that both have, each beside itself.
        groups: of each run; None: the mean over all of its positions.

    Raises:
        ValueError: models of different width, no layer in common, or a layer or group that a run does not have.
    """
    if one.d_model != other.d_model:
        raise ValueError(
            f"runs of one model can be compared, got d_model {one.d_model} in {one.store.uri} and {other.d_model} in "
            f"{other.store.uri}."
        )
    pairs = [layers] if layers is not None else [(k, k) for k in sorted(set(one.layers) & set(other.layers))]
    if not pairs:
        raise ValueError(f"the runs have no layer in common: {one.layers} and {other.layers}.")
    reading = Reading()
    rows = [reading(partial(_differing, (one, k, groups[0]), (other, other_k, groups[1]))) for k, other_k in pairs]
    k = min(TOP, one.d_model)
    kinds = [run.config.estimated for run in (one, other)]
    return {
        "runs": [one.store.uri, other.store.uri],
        "status": [one.status, other.status],
        "models": [one.config.model, other.config.model],
        "estimands": [one.estimand, other.estimand],
        "groups": list(groups),
        "unlike": sorted(name for name in kinds[0] if kinds[0][name] != kinds[1][name]),
        "subspace": k,
        "random_overlap": k / one.d_model,
        "layers": [row for row in rows if row is not None],
        "damaged": reading.damaged,
    }


_Mean = tuple[Run, int, str | None]


def _differing(first: _Mean, second: _Mean) -> dict[str, Any]:
    """A row of :func:`difference`, of two means: of a run at a layer, of a group."""
    (one, layer, group), (other, other_layer, other_group) = first, second
    blocks = [one.blocks(layer, group), other.blocks(other_layer, other_group)]
    corpora = [run.description["result_fields"].get("corpus") for run in (one, other)]
    paired = one is other or (corpora[0] == corpora[1] and one.block_positions == other.block_positions)
    spectra, whitened = ([spectrum(each, white) for each in blocks] for white in (False, True))
    stored = one.fisher(layer, group), other.fisher(other_layer, other_group)
    fishers = [torch.from_numpy(np.array(fisher)) for fisher in stored]
    moved, _ = symmetric_eigh(fishers[1] - fishers[0])
    top = torch.from_numpy(np.stack([s.eigenvectors[:, :TOP] for s in spectra]))
    row: dict[str, Any] = {"layer": layer, "other_layer": other_layer, "paired": paired}
    row["positions"] = [each.total.count for each in blocks]
    row["blocks"] = [len(each) for each in blocks]
    row["sketch_errors"] = [each.total.sketch_error for each in blocks]
    for prefix, both in (("", spectra), ("whitened_", whitened)):
        for name in ("trace", *RANKS):
            before, after = (getattr(s, name) for s in both)
            change = after.minus(before, (blocks[1].numbers, blocks[0].numbers) if paired else None)
            row[prefix + name] = {"values": [float(before.value), float(after.value)], "change": _pair(change)}
    row["distance"] = float((fishers[1] - fishers[0]).norm() / fishers[0].norm())
    row["overlap"] = float(subspace_overlaps(top)[0, 1])
    row["gained"], row["lost"] = float(moved[0].clamp_min(0)), float((-moved[-1]).clamp_min(0))
    return row


def exported(run: Run, reading: Reading) -> dict[str, np.ndarray]:
    """Means and spectra of every layer and group by name, ``layer_003/fisher`` and ``layer_003/group/de/fisher``, float64."""
    arrays: dict[str, np.ndarray] = {}
    for layer in run.layers:
        for group in (None, *(reading(lambda: run.groups) or ())):
            where = f"layer_{layer:03d}" + ("" if group is None else f"/group/{group}")
            found = reading(partial(_means, run, layer, group)) or {}
            arrays |= {f"{where}/{name}": array for name, array in found.items()}
    return arrays


def _means(run: Run, layer: int, group: str | None) -> dict[str, np.ndarray]:
    """Of one layer and group; empty without positions, as some groups and unfinished runs are."""
    try:
        blocks = run.blocks(layer, group)
    except ValueError:
        return {}
    read = spectrum(blocks)
    return {
        "fisher": np.array(run.fisher(layer, group)),
        "normalised_fisher": np.array(run.fisher(layer, group, normalised=True)),
        "activation_mean": blocks.mean("activation").numpy(),
        "activation_second_moment": blocks.mean("second_moment").numpy(),
        "eigenvalues": read.eigenvalues.value,
        "eigenvalue_errors": read.eigenvalues.error,
        "eigenvectors": np.ascontiguousarray(read.eigenvectors),
        "whitened_eigenvalues": spectrum(blocks, whitened=True).eigenvalues.value,
        "positions": np.array(blocks.total.count),
    }


# ---- in a terminal -------------------------------------------------------------------------------------------------------


def show_overview(console: Console, facts: Mapping[str, Any]) -> None:
    """Print what :func:`overview` found."""
    counts = facts["counts"]
    for line in (
        f"{facts['run']}: {facts['status']}",
        f"model:     {facts['model']}, d_model {facts['d_model']}",
        f"corpus:    {' '.join(facts['corpus'])}",
        f"estimates: {facts['estimand']} ({facts['estimator_in_words']})",
        "tokens:    unknown"
        if counts is None
        else f"tokens:    {counts['tokens']:,} in {counts['documents']:,} documents = {counts['scored']:,} scored + "
        f"{counts['skipped']:,} skipped + {counts['invalid']:,} invalid",
    ):
        _say(console, line)
    if facts["groups"]:
        named = (f"{facts['group_titles'][name]} ({n:,})" for name, n in facts["groups"].items())
        _say(console, "groups:    " + ", ".join(named))
    table = number_table("layer", "trace", "top eigenvalue", "entropy rank", "whitened e. rank", "99 % rank")
    table.add_column("spectrum", no_wrap=True, overflow="fold")
    for row in facts["layers"]:
        names = ("trace", "top_eigenvalue", "entropy_rank", "whitened_entropy_rank", "trace_rank_99")
        table.add_row(str(row["layer"]), *(_plus_minus(row[name]) for name in names), _sparkline(row["eigenvalues"]))
    print_table(console, table)
    blocks = min((row["blocks"] for row in facts["layers"]), default=0)
    errors = f"± one standard error from {of_blocks(blocks)}, for the population they come from"
    if blocks == 1:
        errors = f"No standard errors: {of_blocks(blocks)}"
    if blocks:
        _say(
            console,
            f"{errors}. Only what is whitened compares over layers. Spectra span three decades, indices on a logarithmic axis.",
        )
    if facts["sketch"] is not None:
        lost = ", ".join(f"{row['sketch_error']:.3g}" for row in facts["layers"])
        _say(
            console,
            f"note: sums are sketches of {facts['sketch']} rows, so an eigenvalue of F may be too small by at most {lost} (of "
            f"these layers in turn), and ranks are those of the sketch. {_SKETCHED}",
            style="yellow",
        )
    for line in (*facts["quarantined"], *facts["problems"]):
        _say(console, f"note: {line}", style="yellow")


def show_layer(console: Console, facts: Mapping[str, Any]) -> None:
    """Print what :func:`one_layer` found."""
    _say(console, f"{facts['run']}: {facts['status']}")
    if "directions" in facts:
        _show_resolved(console, facts)
    if facts["largest_traces"]:
        table = number_table("document", "position", "trace", "entropy", folded="document")
        table.add_column("text", overflow="fold")
        for row in facts["largest_traces"]:
            text = f"{row['before']}[{row['text']}]{row['after']}"
            numbers = (f"{row['trace']:.4g}", f"{row['entropy']:.3f}")
            title = Text(document_title(row["document"], row["carried"]))
            table.add_row(title, str(row["position"]), *numbers, Text(" ".join(text.split())))
        print_table(console, table)
        if facts["ranking"]:
            _say(console, f"note: {facts['ranking']}", style="yellow")


def _show_resolved(console: Console, facts: Mapping[str, Any]) -> None:
    group = "" if facts["group"] is None else f", group {facts['group']}"
    _say(
        console,
        f"layer {facts['layer']}{group}: {facts['positions']:,} positions in {of_blocks(facts['blocks'])}; "
        f"relative standard error of the mean F {_share(facts['relative_error'])}",
    )
    if facts["sketch_error"]:
        _say(
            console,
            f"note: of a sketch; an eigenvalue of F may be too small by at most {facts['sketch_error']:.3g}, and ranks are "
            f"those of the sketch. {_SKETCHED}",
            style="yellow",
        )
    table = number_table("quantity", "F", "after whitening")
    for name in ("trace", "top_eigenvalue", *RANKS, "anisotropy"):
        table.add_row(
            _NAMES.get(name, name.replace("_", " ")), _plus_minus(facts[name]), _plus_minus(facts[f"whitened_{name}"])
        )
    print_table(console, table)
    table = number_table("direction", "eigenvalue", "share so far", "angle of halves", "in one cluster")
    for row in facts["directions"]:
        angle = "-" if row["half_angle"] is None else f"{row['half_angle']:.0f}°"
        value = _plus_minus([row["eigenvalue"], row["error"]])
        table.add_row(
            str(row["direction"]), value, f"{row['cumulative_share']:.1%}", angle, row["not_told_apart"] or ""
        )
    print_table(console, table)


def show_position(console: Console, facts: Mapping[str, Any]) -> None:
    """Print what :func:`one_position` found."""
    text = f"{facts['before']}[{facts['text']}]{facts['after']}"
    _say(console, f"{facts['document']}, position {facts['position']}: {' '.join(text.split())}")
    first = facts["layers"][0]
    surprisal = "-" if first["surprisal"] is None else f"{first['surprisal']:.4g}"
    _say(console, f"entropy {first['entropy']:.4g}, surprisal {surprisal} nats; {first['context']} tokens of context")
    table = number_table("layer", "trace", "part. ratio", "entropy rank", "99 % rank")
    table.add_column("leading eigenvalues", no_wrap=True, overflow="fold")
    for row in facts["layers"]:
        own = facts.get("eigenvalues", {}).get(row["layer"], row["top_eigenvalues"])
        values = " ".join(f"{value:.3g}" for value in own[:TOP])
        table.add_row(str(row["layer"]), f"{row['trace']:.4g}", *(f"{row[name]:.1f}" for name in RANKS), values)
    print_table(console, table)
    _say(console, "Ranks of a single position's matrix cannot exceed the number of its factors.")


def show_difference(console: Console, facts: Mapping[str, Any]) -> None:
    """Print what :func:`difference` found."""
    for i, (run, status, model, estimand, group) in enumerate(
        zip(*(facts[k] for k in ("runs", "status", "models", "estimands", "groups")), strict=True)
    ):
        counts = {row["positions"][i] for row in facts["layers"]}
        positions = (
            f"; {'group ' + group + ', ' if group is not None else ''}{min(counts):,} positions" if counts else ""
        )
        _say(console, f"{run}: {status}; {model}; {estimand}{positions}")
    table = number_table(
        "layer", "trace", "change", "entropy rank", "change", "|F' - F| / |F|", "overlap", "gained", "lost"
    )
    whitened = number_table("layer", "whitened trace", "change", "whitened entropy rank", "change")
    for row in facts["layers"]:
        numbers = (f"{row[name]:.3g}" for name in ("distance", "overlap", "gained", "lost"))
        layer = f"{row['layer']}" if row["layer"] == row["other_layer"] else f"{row['layer']} -> {row['other_layer']}"
        table.add_row(layer, *_changes(row, "trace", "entropy_rank"), *numbers)
        whitened.add_row(layer, *_changes(row, "whitened_trace", "whitened_entropy_rank"))
    print_table(console, table)
    print_table(console, whitened)
    one, other = (min((row["blocks"][i] for row in facts["layers"]), default=0) for i in (0, 1))
    rough = _ROUGH if min(one, other) < 8 else ""
    errors = (
        f"± one standard error of the difference, each block of documents left out of both: of {one} and {other}{rough}"
    )
    if not all(row["paired"] for row in facts["layers"]):
        errors = f"± one standard error, the corpora taken for independent samples of {one} and {other} blocks{rough}"
    if any(row["trace"]["change"][1] is None for row in facts["layers"]):
        errors = "No standard errors: one side is of one block of documents"
    _say(
        console,
        f"{errors}. Overlap of the top {facts['subspace']} directions: 1 where they span the same space, "
        f"{facts['random_overlap']:.2g} for random ones. Gained and lost: the largest eigenvalues of F' - F of either sign. "
        "Only what is whitened compares where the scales of h differ.",
    )
    if any(any(row["sketch_errors"]) for row in facts["layers"]):
        _say(
            console,
            "note: of sketches; all but traces of F is of what the sketches hold, and there it has no errors.",
            style="yellow",
        )
    if facts["unlike"]:
        _say(
            console,
            f"note: the runs estimate different quantities: they differ in {', '.join(facts['unlike'])}",
            style="yellow",
        )


def _changes(row: Mapping[str, Any], *names: str) -> Iterator[str]:
    """Cells: what each quantity was and is, and its change with the error."""
    for name in names:
        before, after = row[name]["values"]
        yield f"{before:.4g} -> {after:.4g}"
        yield _plus_minus(row[name]["change"])


def _say(console: Console, line: str, style: str | None = None) -> None:
    console.print(Text(line), highlight=False, soft_wrap=True, style=style)


def _plus_minus(pair: Sequence[float | None]) -> str:
    """A value with its error, to the digits that the error leaves."""
    value, error = pair
    assert value is not None
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def of_blocks(count: int) -> str:
    """What standard errors are made of, in words."""
    if count == 1:
        return "one block of documents"
    return f"{count} blocks of documents{_ROUGH if count < 8 else ''}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2%}"


_NAMES = {"trace_rank_99": "99 % rank"}
_SKETCHED = "What is whitened is so by a sketch too: a lower bound, which may be many times too small."
_ROUGH = " (few, so the errors are rough)"
_BLOCKS = " ▁▂▃▄▅▆▇█"


def _sparkline(eigenvalues: Sequence[float]) -> str:
    """A spectrum over three decades, indices on a logarithmic axis."""
    values = np.asarray(eigenvalues)
    if values[0] <= 0:
        return ""
    at = np.unique(np.geomspace(1, len(values), 16).round().astype(int)) - 1
    heights = 1 + np.log10((values[at] / values[0]).clip(1e-3)) / 3
    return "".join(_BLOCKS[round(float(h) * (len(_BLOCKS) - 1))] for h in heights)
