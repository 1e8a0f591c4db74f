"""A run as one HTML page that opens offline: what it is and how sound, its spectra and directions, and the text itself.

Whatever comes from the corpus or the settings is escaped. A file that turns out damaged costs the page what was in it, and
nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

import fisher_ray
from fisher_ray.page import INK, Section, figure_of, missing, page, table_of, token_marks
from fisher_ray.reduce import DIRECTIONS
from fisher_ray.report_text import text_sections
from fisher_ray.run import Reading, Run
from fisher_ray.spectrum import subspace_overlaps
from fisher_ray.statistics import Convergence, Estimate, Spectrum, convergence, half_angles, spectrum

# Directions looked at one by one.
_TOP = 16
# Points of one spectrum: evenly spaced on a logarithmic axis, more cannot be told apart.
_POINTS = 160
_NAMED = 20

_BLUE, _RED, _GREEN = "#0072B2", "#D55E00", "#009E73"  # safe for colour-blind readers
_UNIT = "nats² per squared unit of h"
_WHITENED = "Σ<sup>1/2</sup> F Σ<sup>1/2</sup>"

_POPULATION = (
    "Intervals are of 95 %, by the jackknife over blocks of documents: they say how far the value of the population that the "
    "documents were drawn from may be from the one computed, the noise of sampled scores included."
)


@dataclass(frozen=True)
class Report:
    """A page, and what it had to do without.

    Attributes:
        html: the page.
        damaged: what was found damaged or gone on the way, a line each.
    """

    html: str
    damaged: list[str]


@dataclass(frozen=True)
class _Layer:
    """What is shown of one layer; of eigenvectors only the first ``_TOP``."""

    layer: int
    positions: int
    spectrum: Spectrum
    whitened: Spectrum
    angles: np.ndarray
    convergence: Convergence


def html_report(run: Run, validation: Mapping[str, Any] | None = None) -> Report:
    """A run as one self-contained HTML page; finished, unfinished or damaged.

    It reads the tables of all tasks, one at a time; for each layer it costs three eigendecompositions, the leading
    eigenvectors of sixteen matrices more, and memory for the sums over all blocks.

    Args:
        run: an open run.
        validation: what ``fisher-ray validate --json`` has said of it.

    Raises:
        ValueError: a validation of another run, or none.
    """
    laws: list[Section] = []
    if validation is not None:
        if validation["fingerprint"] != run.description["fingerprint"]:
            raise ValueError(
                f"the validation is of another run, {validation.get('run')}, and not of {run.store.uri}: their fingerprints "
                "differ."
            )
        try:
            laws = [_validation(validation)]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError("the validation is not what fisher-ray validate RUN --json prints.") from error
    reading = Reading()
    counts = reading(lambda: run.counts)
    layers: list[_Layer] = []
    lost: list[str] = []
    for layer in run.layers if counts is None or counts.scored else ():
        found = reading(partial(_layer, run, layer))
        if found is None:
            lost.append(f"Layer {layer} is left out: {reading.last}")
        else:
            layers.append(found)
    shown = [
        _spectra(layers, lost),
        _dimensions(run, layers, lost),
        _traces(layers, lost),
        _anisotropies(run, layers, lost),
        _overlaps(run, layers, lost),
        _resolution(layers, lost),
        *text_sections(run, reading, {each.layer: each.spectrum.eigenvectors for each in layers}),
        _directions(run, reading, layers, lost),
        *([_groups(run, reading)] if run.config.group_by else []),
        _convergence(layers, lost),
        *laws,
    ]
    # What was met on the way is known only now, and yet comes first.
    workers = reading(lambda: run.provenance) or []
    first = [_summary(run, reading, counts, workers), _health(run, reading, counts, workers, layers, validation)]
    title = f"Fisher matrices of {escape(run.config.model_title)}"
    lead = (
        f"How a small nudge to a residual stream changes the next token: {escape(run.estimand)}.\n"
        f"{escape(run.status[0].upper() + run.status[1:])}."
    )
    footer = f"Made by fisher_ray {fisher_ray.__version__} on {_date(time.time())} from {escape(run.store.uri)}."
    return Report(page(title, lead, _tiles(run, counts, layers), [*first, *shown], footer), reading.damaged)


def _layer(run: Run, layer: int) -> _Layer:
    blocks = run.blocks(layer)
    plain, whitened = (
        replace(each, eigenvectors=each.eigenvectors[:, :_TOP].copy())
        for each in (spectrum(blocks), spectrum(blocks, whitened=True))
    )
    angles = half_angles(blocks, min(_TOP, run.d_model))
    return _Layer(layer, int(blocks.total.count), plain, whitened, angles, convergence(blocks))


def _tiles(run: Run, counts: Any, layers: Sequence[_Layer]) -> list[tuple[str, str]]:
    tiles = [
        ("documents", f"{counts.documents:,}" if counts else "?"),
        ("positions scored", f"{counts.scored:,}" if counts else "?"),
        ("layers", f"{len(run.layers)}"),
        ("width d", f"{run.d_model:,}"),
        ("estimator", run.config.estimator_in_words),
    ]
    errors = [each.convergence.error for each in layers if np.isfinite(each.convergence.error)]
    if errors:
        tiles.append(("standard error of F, worst layer", f"{100 * max(errors):.2g} %"))
    return tiles


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _shown(layers: Sequence[_Layer], lost: Sequence[str], *parts: str) -> str:
    """What there is of the layers, below a line for each that there is not."""
    if not layers and not lost:
        return missing("No position is scored yet: there is nothing to show.")
    return "".join(map(missing, lost)) + ("".join(parts) if layers else "")


def _pm(estimate: Estimate) -> str:
    """Value and standard error, to the error's second digit."""
    value, error = float(estimate.value), float(estimate.error)
    if not error > 1e-9 * abs(value):  # none, or the rounding of values that no block changes
        return f"{value:.4g}" + (" ± 0" if np.isfinite(error) else "")
    places = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{places}f} ± {error:.{places}f}" if places < 8 else f"{value:.4g} ± {error:.2g}"


# ---- what it is, and how sound ---------------------------------------------------------------------------------------


def _summary(run: Run, reading: Reading, counts: Any, workers: Sequence[Mapping[str, Any]]) -> Section:
    config = run.config
    progress = reading(lambda: run.store.read_sealed("progress.json")) or {}
    versions = [", ".join(f"{name} {version}" for name, version in worker["versions"].items()) for worker in workers]
    facts = [
        ("status", run.status),
        ("model", f"{config.model}{f' at {config.revision}' if config.revision else ''}, {config.dtype}"),
        ("corpus", ", ".join(config.corpus)),
        ("estimand", run.estimand),
        ("estimator", f"{config.estimator_in_words}; tokens {config.token_source}; seed {config.seed}"),
        (
            "layers",
            f"{', '.join(map(str, run.layers))}: the streams that enter these blocks; of n blocks, layer n is what leaves "
            "the last",
        ),
        ("positions", f"{config.positions} of each document"),
    ]
    if counts is not None:
        facts += [
            ("documents", f"{counts.documents:,}, of them {counts.empty:,} empty"),
            (
                "tokens",
                f"{counts.tokens:,} = {counts.scored:,} scored + {counts.skipped:,} skipped + {counts.invalid:,} invalid",
            ),
        ]
    facts += [
        ("self-check", _checked([worker["self_check"] for worker in workers if worker["self_check"]])),
        ("device", ", ".join(dict.fromkeys(worker["device"] for worker in workers)) or "unknown"),
        ("versions", "; and ".join(dict.fromkeys(versions)) or "unknown"),
        ("last written", _date(progress["written"]) if "written" in progress else "unknown"),
        ("fingerprint", run.description["fingerprint"]),
    ]
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{escape(str(value))}</td></tr>' for name, value in facts)
    settings = escape(json.dumps(run.description["config"], indent=1, sort_keys=True))
    return Section(
        "summary",
        "Summary",
        "What was computed, from what and by which versions; the same settings on the same kind of hardware give the same "
        "bits.",
        f'<table class="facts"><tbody>{rows}</tbody></table>'
        f"<details><summary>All settings</summary><pre>{settings}</pre></details>",
    )


def _checked(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return "none on record"
    worst = max(checks, key=lambda check: check["scores"] / check["limit"])
    return (
        f"scores differ from one-position autograd by {worst['scores']:.1e} at most; the limit is {worst['limit']:.0e}"
    )


def _health(
    run: Run,
    reading: Reading,
    counts: Any,
    workers: Sequence[Mapping[str, Any]],
    layers: Sequence[_Layer],
    validation: Mapping[str, Any] | None,
) -> Section:
    given_up = [
        record["error"] if (record := reading(partial(run.store.read_sealed, path))) else f"{path} cannot be read"
        for path in run.store.notes()
    ]
    lines = [(run.complete, run.status)]
    lines.append(
        (
            not given_up,
            f"{len(given_up) or 'no'} tasks in quarantine{', and the means are without them' if given_up else ''}",
        )
    )
    lines += [(False, f"given up: {line}") for line in given_up[:_NAMED]]
    if counts is not None:
        lines.append(
            (
                not counts.invalid,
                f"{counts.invalid or 'no'} invalid positions{', left out of every mean' if counts.invalid else ''}",
            )
        )
        lines.append(
            (
                not counts.halvings,
                f"micro-batches halved for memory {counts.halvings} times, which may change rounding"
                if counts.halvings
                else "memory never ran out",
            )
        )
    if layers:
        blocks = layers[0].spectrum.trace.blocks
        errors = f"standard errors come from {blocks} blocks of documents"
        lines.append((blocks > 7, errors if blocks > 1 else "one block of documents: there are no standard errors"))
    if layers and run.config.sketch is not None:
        lost = {each.layer: run.sketch_error(each.layer) / float(each.spectrum.eigenvalues.value[0]) for each in layers}
        worst = max(lost, key=lost.__getitem__)
        lines.append(
            (
                False,
                f"sums are sketches of {run.config.sketch} rows: an eigenvalue may be too small by up to {lost[worst]:.2g} of "
                f"the largest (layer {worst}), and effective dimensions are those of the sketch; what is whitened is a lower "
                "bound that may be many times too small",
            )
        )
    computed = {json.dumps(worker["versions"], sort_keys=True) for worker in workers}
    if len(computed) > 1:
        lines.append(
            (False, f"its tasks were computed with {len(computed)} sets of versions, whose last digits may differ")
        )
    if validation is not None:
        failed = [layer for layer, test in validation["layers"].items() if test["failures"]]
        said = (
            f"fails at layers {', '.join(failed)}" if failed else f"passes at layers {', '.join(validation['layers'])}"
        )
        lines.append((not failed, f"KL(p(h) || p(h + v)) against v^T F v / 2 {said}"))
    lines.append(
        (not reading.damaged, f"{len(reading.damaged) or 'no'} damaged or missing files met while this page was made")
    )
    lines += [(False, line) for line in reading.damaged[:_NAMED]]
    items = "".join(f'<li class="{"good" if good else "watch"}">{escape(line)}</li>' for good, line in lines)
    return Section(
        "health",
        "Health",
        "A tick: all is well. An exclamation mark: to be known before the numbers are used. Only what this page shows was "
        "read; <code>fisher-ray verify</code> reads everything back.",
        f'<ul class="health">{items}</ul>',
    )


# ---- figures ---------------------------------------------------------------------------------------------------------


def _colours(layers: Sequence[_Layer]) -> list[str]:
    last = max(1, len(layers) - 1)
    return sample_colorscale("Viridis", [0.92 * i / last for i in range(len(layers))])


def _reach(estimate: Sequence[Estimate]) -> list[float | None]:
    """Half the width of each interval; None without one."""
    widths = [float(each.interval()[1] - each.value) for each in estimate]
    return [width if np.isfinite(width) else None for width in widths]


def _over_layers(
    figure: go.Figure, column: int, layers: Sequence[_Layer], estimates: Sequence[Estimate], **style: Any
) -> None:
    """One quantity at every layer, with its interval."""
    marker = {"color": style.pop("color"), "symbol": style.pop("symbol", "circle"), "size": 8}
    figure.add_scatter(
        x=[each.layer for each in layers],
        y=[float(estimate.value) for estimate in estimates],
        error_y={"array": _reach(estimates), "thickness": 1.4, "width": 4},
        mode="lines+markers",
        marker=marker,
        line={"color": marker["color"], "width": 1.6},
        row=1,
        col=column,
        **style,
    )


def _spectra(layers: Sequence[_Layer], lost: Sequence[str]) -> Section:
    figure = make_subplots(
        1, 2, subplot_titles=("of the mean F", f"of {_WHITENED}, which compare over layers"), horizontal_spacing=0.13
    )
    # More than a dozen at once cannot be told apart; the others come with a click.
    drawn = set(np.linspace(0, len(layers) - 1, min(13, len(layers))).round().astype(int).tolist())
    for i, (each, colour) in enumerate(zip(layers, _colours(layers), strict=True)):
        for column, of in ((1, each.spectrum), (2, each.whitened)):
            values, (lower, upper) = of.eigenvalues.value, of.eigenvalues.interval()
            count = int((values > 1e-9 * values[0]).sum())
            at = np.unique(np.geomspace(1, max(1, count), _POINTS).round().astype(int))
            same: dict[str, Any] = {"legendgroup": f"{each.layer}", "row": 1, "col": column}
            same["visible"] = True if i in drawn else "legendonly"
            if np.isfinite(upper[at - 1]).all():
                # Down to a thousandth on an axis that has no zero.
                band = np.concatenate([upper[at - 1], np.maximum(lower, values / 1000)[at - 1][::-1]]).astype(
                    np.float32
                )
                figure.add_scatter(
                    x=np.concatenate([at, at[::-1]]), y=band, fill="toself", mode="lines", line={"width": 0},
                    fillcolor=colour.replace("rgb", "rgba").replace(")", ", 0.18)"), showlegend=False, hoverinfo="skip",
                    **same,
                )  # fmt: skip
            figure.add_scatter(
                x=at, y=values[at - 1].astype(np.float32), mode="lines" if len(at) > 1 else "markers",
                line={"color": colour, "width": 1.8}, name=f"layer {each.layer}", showlegend=column == 1,
                customdata=of.eigenvalues.error[at - 1].astype(np.float32),
                hovertemplate="index %{x}: %{y:.4g} ± %{customdata:.2g}", **same,
            )  # fmt: skip
    figure.update_layout(legend={"tracegroupgap": 0, "font": {"size": 12}})
    figure.update_xaxes(type="log", title="index", dtick="D2", tickformat="~g")
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(title=f"eigenvalue ({_UNIT})", col=1)
    figure.update_yaxes(title="eigenvalue (nats²)", col=2)
    return Section(
        "spectra",
        "Spectra",
        "Each line is one layer's eigenvalues in descending order with its interval as a band; the steeper it falls, the fewer "
        "directions matter. The scale of h differs from layer to layer, so only the right picture, in units of how h varies, "
        "compares over layers. A click on a layer's name hides or shows it.",
        _shown(layers, lost, figure_of(figure, 470), f'<p class="note">{_POPULATION}</p>'),
    )


def _dimensions(run: Run, layers: Sequence[_Layer], lost: Sequence[str]) -> Section:
    figure = make_subplots(1, 2, subplot_titles=("of the mean F", f"of {_WHITENED}"), horizontal_spacing=0.13)
    for name, label, colour, symbol in (
        ("participation_ratio", "participation ratio (Σλ)² / Σλ²", _BLUE, "circle"),
        ("entropy_rank", "entropy rank exp H(λ / Σλ)", _RED, "square"),
        ("trace_rank_99", "99 % of the trace", _GREEN, "triangle-up"),
    ):
        for column, of in ((1, "spectrum"), (2, "whitened")):
            estimates = [getattr(getattr(each, of), name) for each in layers]
            _over_layers(
                figure, column, layers, estimates, color=colour, symbol=symbol, name=label, legendgroup=name,
                showlegend=column == 1,
            )  # fmt: skip
    figure.add_hline(run.d_model, line={"dash": "dash", "color": "#5b6675", "width": 1})
    figure.update_xaxes(**_layer_axis(layers))
    figure.update_yaxes(rangemode="tozero", range=[0, 1.08 * run.d_model])
    figure.update_yaxes(title="effective dimension", col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.2})
    head = ["layer", "positions", "trace", "top eigenvalue", "participation ratio", "entropy rank", "99 % rank"]
    rows = []
    for each in layers:
        s = each.spectrum
        top = Estimate(s.eigenvalues.value[0], s.eigenvalues.error[0], s.eigenvalues.blocks)
        shown = (s.trace, top, s.participation_ratio, s.entropy_rank, s.trace_rank_99)
        rows.append((each.layer, f"{each.positions:,}", *map(_pm, shown)))
    return Section(
        "dimension",
        "Effective dimension",
        f"How many of the d = {run.d_model:,} directions (dashed) the prediction depends on, counted in three ways: low means "
        "that a few directions carry nearly all the sensitivity. Leaving out a block moves two of them a little, which gives "
        "their intervals; the number of eigenvalues with 99 % of the trace moves by whole steps or not at all, and has none.",
        _shown(
            layers,
            lost,
            figure_of(figure, 430),
            '<p class="lead-in">In numbers, of the mean F, ± standard errors:</p>',
            table_of(head, rows, range(len(head))),
        ),
    )


def _traces(layers: Sequence[_Layer], lost: Sequence[str]) -> Section:
    figure = make_subplots(1, 2, subplot_titles=("of the mean F", f"of {_WHITENED}"), horizontal_spacing=0.13)
    for column, of in ((1, "spectrum"), (2, "whitened")):
        traces = [getattr(each, of).trace for each in layers]
        values = [float(trace.value) for trace in traces]
        _over_layers(figure, column, layers, traces, color=_BLUE, showlegend=False)
        # Ticks at 2 and 5 of each decade, where those are enough.
        wide = bool(values) and max(values) > 5 * min(values)
        figure.update_yaxes(type="log", dtick="D2" if wide else None, tickformat="~g", col=column)
    figure.update_xaxes(**_layer_axis(layers))
    figure.update_yaxes(title=f"trace ({_UNIT})", col=1)
    figure.update_yaxes(title="trace (nats²)", col=2)
    return Section(
        "trace",
        "Trace",
        "Twice the KL divergence that steps cost to second order: at the left summed over orthonormal unit steps, which "
        "follows the scale of h; at the right in the mean over steps that vary as h does, which compares over layers.",
        _shown(layers, lost, figure_of(figure, 380)),
    )


def _anisotropies(run: Run, layers: Sequence[_Layer], lost: Sequence[str]) -> Section:
    figure = make_subplots(1, 1)
    for of, name, colour, symbol in (
        ("spectrum", "mean F", _BLUE, "circle"),
        ("whitened", _WHITENED, _RED, "square"),
    ):
        _over_layers(
            figure, 1, layers, [getattr(each, of).anisotropy for each in layers], color=colour, symbol=symbol, name=name
        )
    figure.update_xaxes(**_layer_axis(layers))
    figure.update_yaxes(title="anisotropy", rangemode="tozero", minallowed=0, maxallowed=run.d_model)
    return Section(
        "anisotropy",
        "Anisotropy",
        f"The spectral norm of F / (tr F / d) - I: 0 where all directions count the same, {run.d_model - 1:,} where one has "
        "everything.",
        _shown(layers, lost, figure_of(figure, 360)),
    )


def _overlaps(run: Run, layers: Sequence[_Layer], lost: Sequence[str]) -> Section:
    sizes = [k for k in (1, 4, _TOP) if k < run.d_model]
    vectors = np.stack([each.spectrum.eigenvectors for each in layers]) if layers else np.empty((0, 0, 0))
    titles = [f"k = {k} (random: {k / run.d_model:.2g})" for k in sizes]
    figure = make_subplots(1, len(sizes), subplot_titles=titles, horizontal_spacing=0.06)
    names = [str(each.layer) for each in layers]
    for column, k in enumerate(sizes, 1):
        overlap = subspace_overlaps(torch.from_numpy(vectors[:, :, :k]))
        figure.add_heatmap(
            x=names, y=names, z=overlap.float().numpy(), coloraxis="coloraxis", row=1, col=column,
            hovertemplate="layers %{y} and %{x}: %{z:.3f}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": {"thickness": 14}})
    figure.update_xaxes(title="layer", type="category", constrain="domain")
    figure.update_yaxes(type="category", autorange="reversed")
    for column in range(1, len(sizes) + 1):
        figure.update_yaxes(scaleanchor=f"x{'' if column == 1 else column}", constrain="domain", col=column)
    return Section(
        "overlap",
        "Overlap",
        "The share of one layer's first k eigenvectors that lies in the space of another's, |U<sub>i</sub>ᵀ "
        "U<sub>j</sub>|² / k: 1 where both are sensitive to the same directions of the residual stream, about k / d where they "
        "have nothing to do with each other.",
        _shown(layers, lost, figure_of(figure, 400) if len(layers) > 1 else missing("One layer: there is no other.")),
    )


def _layer_axis(layers: Sequence[_Layer]) -> dict[str, Any]:
    """Ticks at the layers that there are, a dozen at most."""
    return {"title": "layer", "tickvals": [each.layer for each in layers][:: -(-len(layers) // 12) or 1]}


def _resolution(layers: Sequence[_Layer], lost: Sequence[str]) -> Section:
    body = missing("One block of documents cannot be halved.")
    if layers and len(layers[0].angles):
        angles = np.stack([np.median(each.angles, 0) for each in layers])
        figure = go.Figure(
            go.Heatmap(
                x=list(range(angles.shape[1])), y=[str(each.layer) for each in layers], z=angles.astype(np.float32),
                colorscale="Viridis", reversescale=True, zmin=0, zmax=90, colorbar={"thickness": 14, "ticksuffix": "°"},
                hovertemplate="layer %{y}, direction %{x}: %{z:.1f}°<extra></extra>",
                **({"texttemplate": "%{z:.0f}", "textfont": {"size": 10}} if len(layers) < 20 else {}),
            )
        )  # fmt: skip
        figure.update_xaxes(title="direction", dtick=1)
        figure.update_yaxes(title="layer", type="category", autorange="reversed")
        body = figure_of(figure, 130 + 26 * len(layers))
    return Section(
        "resolution",
        "Resolution",
        "Angles between the same eigenvector of two random halves of the corpus, the median over splits: a few degrees where "
        "the corpus determines it, near 90° where it does not and only the space that it spans with its neighbours means "
        "anything.",
        _shown(layers, lost, body),
    )


def _directions(run: Run, reading: Reading, layers: Sequence[_Layer], lost: Sequence[str]) -> Section:
    moved = {(row["layer"], row["direction"]): row for row in reading(lambda: run.directions) or []}
    waiting = [] if moved else [missing("The tokens are in the files of a reduction, and there is none to be read.")]
    head = ["layer", "direction", "eigenvalue", "share", "angle of halves", "together with"]
    rows = []
    for each in layers:
        values = each.spectrum.eigenvalues
        together = {i: f"{c[0]}–{c[-1]}" for c in each.spectrum.clusters(DIRECTIONS) if len(c) > 1 for i in c}
        for i in range(min(DIRECTIONS, len(values.value))):
            row = moved.get((each.layer, i), {})
            rows.append(
                (
                    each.layer if i == 0 else "",
                    i,
                    _pm(Estimate(values.value[i], values.error[i], values.blocks)),
                    f"{100 * values.value[i] / each.spectrum.trace.value:.1f} %",
                    f"{np.median(each.angles[:, i]):.0f}°" if len(each.angles) else "–",
                    together.get(i, ""),
                    token_marks(row.get("raised")),
                    token_marks(row.get("lowered")),
                )
            )
    return Section(
        "directions",
        "Top directions",
        "Whose log p a small step along each layer's first eigenvectors raises and lowers most on average, through the model's "
        "own upper layers: up to five tokens each that 32 windows of the corpus agree on. (A sign is arbitrary: the other way "
        "round, they swap.) Eigenvectors count from 0, as columns of eigenvectors.npy; shares are of the trace. Those with "
        "eigenvalues that this corpus cannot tell apart span something together, all of them, and mean nothing one by one.",
        _shown(layers, lost, *waiting, table_of([*head, "raises", "lowers"], rows, range(6))),
    )


def _groups(run: Run, reading: Reading) -> Section:
    chosen = [run.layers[i] for i in np.unique(np.linspace(0, len(run.layers) - 1, 6).round().astype(int))]
    found = {k: means for k in chosen if (means := reading(partial(run.group_traces, k))) is not None}
    lost = [] if len(found) == len(chosen) else [missing(f"Left out: {reading.last}")]
    by = str(run.config.group_column or run.config.group_by)
    head = [by, "positions", "blocks", *(f"trace, layer {k}" for k in found)]
    # Names over all layers shown: each has the same ones.
    first = next(iter(found.values()), {})
    rows = [
        (run.group_title(group), f"{positions:,}", trace.blocks, *(_pm(means[group][1]) for means in found.values()))
        for group, (positions, trace) in first.items()
    ]
    return Section(
        "groups",
        "Groups",
        "Traces of the means over groups of positions, ± standard errors: down a column they compare, along a row they follow "
        "the scale of h. Errors come from the blocks of documents that a group is in, and are rough where those are few. How "
        "two groups differ, with the error of the difference, is said by <code>fisher-ray diff --group</code>.",
        "".join(lost) + (table_of(head, rows, range(1, len(head))) if rows else "" if lost else _shown([], [])),
    )


def _convergence(layers: Sequence[_Layer], lost: Sequence[str]) -> Section:
    figure = make_subplots(
        1, 2, subplot_titles=("change of the mean F by each block", "standard error over all"), horizontal_spacing=0.13
    )
    for each, colour in zip(layers, _colours(layers), strict=True):
        figure.add_scatter(
            x=each.convergence.positions, y=each.convergence.change.astype(np.float32), mode="lines+markers",
            marker={"size": 4}, line={"color": colour, "width": 1.5}, name=f"layer {each.layer}", row=1, col=1,
        )  # fmt: skip
    figure.add_scatter(
        x=[each.layer for each in layers], y=[each.convergence.error for each in layers], mode="lines+markers",
        marker={"color": _BLUE, "size": 8}, line={"color": _BLUE, "width": 1.6}, showlegend=False, row=1, col=2,
    )  # fmt: skip
    figure.update_xaxes(type="log", title="positions", dtick="D2", tickformat="~s", col=1)
    figure.update_yaxes(type="log", title="relative change, |ΔF| / |F|", dtick="D2", tickformat="~p", col=1)
    figure.update_xaxes(**_layer_axis(layers), col=2)
    figure.update_yaxes(title="relative, in the Frobenius norm", tickformat=".2~p", rangemode="tozero", col=2)
    if layers and len(layers[0].convergence.positions) > 1:
        body = figure_of(figure, 420)
    else:
        body = missing("One block of documents: how the mean settles cannot be told.")
    return Section(
        "convergence",
        "Convergence",
        "Left, how far each further block of documents moves the mean. With documents in random order that falls as one over "
        "the positions, however many there are; a line that flattens or jumps says that the text drifts, or that few documents "
        "make up much of the mean. Right, one standard error of the mean as a whole, which says whether there is enough text.",
        _shown(layers, lost, body),
    )


def _validation(found: Mapping[str, Any]) -> Section:
    """Median and quartiles of ``|ratio - 1|`` against the step, as ``fisher-ray validate -o`` draws them."""
    tests, steps = found["layers"], np.array(found["steps"])
    last = max(1, len(tests) - 1)
    colours = sample_colorscale("Viridis", [0.92 * i / last for i in range(len(tests))])
    floor = np.median([test["noise"] for test in tests.values()], axis=0)
    lowest = np.min([test["deviation"]["lower_quartile"] for test in tests.values()], axis=0)
    bottom = float(np.log10(max(1e-30, min(floor[0] / 100, lowest.min() / 3))))
    figure = go.Figure()
    figure.add_scatter(
        x=[*steps, *steps[::-1]], y=[*floor, *np.full(len(steps), 10**bottom)], fill="toself", mode="lines",
        line={"width": 0}, fillcolor="#c3cad2", name="hidden by rounding", hoverinfo="skip",
    )  # fmt: skip
    for (layer, test), colour in zip(tests.items(), colours, strict=True):
        low, median, high = (test["deviation"][name] for name in ("lower_quartile", "median", "upper_quartile"))
        same: dict[str, Any] = {"legendgroup": layer, "mode": "lines"}
        figure.add_scatter(
            x=[*steps, *steps[::-1]], y=[*high, *low[::-1]], fill="toself", line={"width": 0}, showlegend=False,
            fillcolor=colour.replace("rgb", "rgba").replace(")", ", 0.1)"), hoverinfo="skip", **same,
        )  # fmt: skip
        figure.add_scatter(
            x=steps, y=median, **{**same, "mode": "lines+markers"}, marker={"size": 5},
            line={"color": colour, "width": 1.8}, name=f"layer {layer}", hovertemplate="|v| / |h| = %{x:.2g}: %{y:.2g}",
        )  # fmt: skip
    anchor = max((lowest < 0.1).nonzero()[0], default=0)
    figure.add_scatter(
        x=steps, y=lowest[anchor] / 3 * steps / steps[anchor], mode="lines", hoverinfo="skip",
        line={"color": INK, "dash": "dash", "width": 1}, name="slope 1, the law's",
    )  # fmt: skip
    figure.add_hline(0.1, line={"dash": "dot", "color": _RED, "width": 1.2})
    figure.update_xaxes(type="log", title="step |v| / |h|", dtick=1, exponentformat="power")
    ends = [bottom, 1]
    figure.update_yaxes(
        type="log", title="|KL / (v<sup>T</sup> F v / 2) - 1|", range=ends, dtick=1, exponentformat="power"
    )
    head = [
        "layer",
        "limits judged",
        "|limit - 1|, median",
        "worst",
        "power of |v|",
        "holds to |v| / |h|",
        "in nats",
        "",
    ]
    names = ("median_off", "worst_off", "order", "holds_to_step", "holds_to_nats")
    rows = [
        (
            layer,
            f"{test['judged']:.0%}",
            *("–" if test[name] is None else f"{test[name]:.2g}" for name in names),
            "; ".join(test["failures"]) or "pass",
        )
        for layer, test in tests.items()
    ]
    return Section(
        "validation",
        "Validation",
        f"The run's own model at {len(found['positions'])} of its positions, in {escape(str(found['dtype']))}: the divergence "
        "that a step of the stream really makes, over what F says of it. As steps shrink the deviation falls with their first "
        "power, down to what rounding hides (grey); the dotted line is at 10 %, up to which the second order is said to hold: "
        "nine of ten positions and directions go as far as the table says.",
        figure_of(figure, 430) + table_of(head, rows, range(7)),
    )
