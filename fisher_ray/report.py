"""What a run shows at its end: a table of layers and a picture of their spectra."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from fisher_ray.plan import Plan, visible
from fisher_ray.reduce import read_array
from fisher_ray.shards import RunStore

# All of Unicode's that are no line end, and those that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Letters that a column of text has at least.
_LEAST_TEXT = 16


class Printable(RenderHook):
    """Shows what would move a terminal's cursor or colour, or turn its text around, in place of doing it.

    Names, documents and tokens come from corpora that may be anybody's.
    """

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printed(each) for each in renderables]


@dataclass(frozen=True)
class _Printed:
    what: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.what, options):
            yield Segment(text if control else _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text), style, control)


def number_table(*names: str, folded: str | None = None) -> Table:
    """A table of numbers; one column may hold text that is folded where there is no room."""
    table = Table(header_style="bold", pad_edge=False, box=None)
    for name in names:
        table.add_column(name, justify="left" if name == folded else "right", no_wrap=name != folded, overflow="fold")
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table with its numbers whole: what a terminal is too narrow for goes on in its next line, but for text, which is
    folded or cut to the room that there is."""
    widths = [max(cell_len(str(cell)) for cell in (column.header, *column.cells)) for column in table.columns]
    texts = [i for i, column in enumerate(table.columns) if not (column.no_wrap and column.overflow == "fold")]
    room = console.width - sum(widths) - 2 * (len(widths) - 1)
    for i in reversed(texts):
        kept = max(min(widths[i], _LEAST_TEXT), widths[i] + min(room, 0))
        room += widths[i] - kept
        table.columns[i].width = widths[i] = kept
    before = console.size
    console.size = ConsoleDimensions(max(before.width, sum(widths) + 2 * (len(widths) - 1)), before.height)
    console.print(table)
    console.size = before


def layer_table(rows: list[dict[str, Any]]) -> Table:
    """One line a layer; effective ranks are those of the mean matrix."""
    table = number_table("layer", "positions", "trace", "top", "part. ratio", "entropy rank", "99 % rank")
    table.add_column("the top direction raises / lowers", overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["layer"]),
            f"{row['positions']:,}",
            f"{row['trace']:.4g}",
            f"{row['top_eigenvalue']:.4g}",
            f"{row['participation_ratio']:.1f}",
            f"{row['entropy_rank']:.1f}",
            str(row["trace_rank_99"]),
            _moved(row),
        )
    return table


def direction_table(rows: list[dict[str, Any]]) -> Table:
    """One line a direction: what a step of its length costs in the mean, with its standard error, and tokens it moves."""
    table = number_table("layer", "direction", "|v|", "|v| / |h|", "v'Fv / 2, nats", "±")
    table.add_column("raises / lowers", overflow="ellipsis", no_wrap=True)
    for row in rows:
        error = "-" if row["error"] is None else f"{row['error']:.2g}"
        table.add_row(
            str(row["layer"]),
            str(row["direction"]),
            f"{row['norm']:.3g}",
            f"{row['share']:.2g}",
            f"{row['cost']:.4g}",
            error,
            _moved(row),
        )
    return table


def _moved(row: dict[str, Any]) -> Text:
    """Tokens that a direction raises and lowers; they may look like markup."""
    return Text(" / ".join(" ".join(map(visible, row[name][:3])) or "-" for name in ("raised", "lowered")))


def spectra_png(plan: Plan, store: RunStore, rows: list[dict[str, Any]]) -> bytes:
    """Spectra of every layer's mean F and of Sigma^(1/2) F Sigma^(1/2), and traces and effective ranks over layers."""
    import matplotlib  # here, as half a second that most commands and all workers start without
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    spectra, whitened, traces, ranks = figure.subplots(2, 2).flat
    for axes in (traces, ranks):
        axes.set_prop_cycle(color=["#0072B2", "#D55E00", "#009E73"])  # told apart by colour-blind readers too
    layers = plan.layers
    colours = matplotlib.colormaps["viridis"]
    norm = matplotlib.colors.Normalize(min(layers), max(max(layers), min(layers) + 1))
    for layer in layers:
        colour = colours(0.92 * norm(layer))
        for axes, name in ((spectra, "eigenvalues"), (whitened, "whitened_eigenvalues")):
            values = read_array(store, layer, name)
            values = values[values > 1e-9 * values[0]]
            axes.plot(range(1, len(values) + 1), values, color=colour, lw=1.4)
    for axes, title, unit in (
        (spectra, "Eigenvalues of the mean F", "nats² per squared unit of h"),
        (whitened, r"Eigenvalues of $\Sigma^{1/2} F\, \Sigma^{1/2}$ (compares over layers)", "nats²"),
    ):
        axes.set(xscale="log", yscale=_scale(axes), title=title, xlabel="index", ylabel=unit)
    scale = matplotlib.cm.ScalarMappable(
        norm, matplotlib.colors.ListedColormap(colours([0.92 * i / 255 for i in range(256)]))
    )
    shown = layers[:: -(-len(layers) // 13)]
    figure.colorbar(scale, ax=[spectra, whitened], label="layer", shrink=0.9, aspect=30, ticks=shown)
    for name, label, marker in (("trace", "tr F", "o"), ("whitened_trace", r"tr $\Sigma^{1/2} F\, \Sigma^{1/2}$", "s")):
        traces.plot(layers, [row[name] for row in rows], marker=marker, ms=4, label=label)
    traces.set(yscale=_scale(traces), title="Trace", xlabel="layer", ylabel="nats²; tr F per squared unit of h")
    for name, label, marker in (
        ("participation_ratio", "participation ratio", "o"),
        ("entropy_rank", "entropy rank", "s"),
        ("trace_rank_99", "99 % of the trace", "^"),
    ):
        ranks.plot(layers, [row[name] for row in rows], marker=marker, ms=4, label=label)
    ranks.set(ylim=(0, None), title=f"Effective dimension of the mean F (of {plan.facts.d_model})", xlabel="layer")
    for axes in (traces, ranks):
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (spectra, whitened, traces, ranks):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
    words = plan.config.estimator_in_words
    figure.suptitle(f"{plan.config.model_title}: {rows[0]['positions']:,} positions, {words}", fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _scale(axes: Any) -> str:
    """Logarithmic where there is anything above zero."""
    return "log" if any((line.get_ydata() > 0).any() for line in axes.lines) else "linear"
