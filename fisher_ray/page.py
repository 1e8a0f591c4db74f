"""Elements of a self-contained HTML page: sections, tables, figures, data for its script, and the page around them.

Nothing is loaded from elsewhere: plotly's script and ours are in the page, and its content security policy forbids the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fisher_ray.plan import visible

INK, _LINE = "#1d2530", "#e6eaee"


@dataclass(frozen=True)
class Section:
    """A part of the page; ``body`` is HTML, and so are the other texts."""

    name: str
    title: str
    how: str
    body: str

    def html(self) -> str:
        """Title, how to read it, and what there is to read."""
        return f'<section id="{self.name}"><h2>{self.title}</h2><p class="how">{self.how}</p>{self.body}</section>'


def page(title: str, lead: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section], footer: str) -> str:
    """The whole page; its texts are HTML."""
    package = files("fisher_ray")
    style, script = ((package / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<dl class="tiles">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)}</dl>
</header>
<nav aria-label="Sections"><div>{"".join(f'<a href="#{s.name}">{s.title}</a>' for s in sections)}</div></nav>
<main>
{"".join(section.html() for section in sections)}
</main>
<footer>{footer}</footer>
<script>{get_plotlyjs()}</script>
<script>{script}</script>
</body>
</html>
"""


def table_of(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: range) -> str:
    """A table of cells, escaped unless they are markup already.

    Args:
        numbers: columns that are set as numbers.
    """
    kinds = [' class="number"' if i in numbers else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


class Markup(str):
    """Text that is HTML already."""


def _cell(value: Any) -> str:
    return value if isinstance(value, Markup) else escape(str(value))


def token_marks(tokens: Sequence[str] | None) -> Markup:
    """Tokens side by side, spaces and newlines made visible."""
    shown = (f'<span class="token">{escape(visible(token))}</span>' for token in tokens or ())
    return Markup(" ".join(shown) or "–")


def missing(line: str) -> str:
    """In place of what cannot be shown."""
    return f'<p class="damaged">{escape(line)}</p>'


# Plotly's buttons lie over the top of a figure, where pointers hover or there are none; titles and legends keep below them.
_TOOLBAR = 26


def figure_of(figure: go.Figure, height: int) -> str:
    """A figure of plotly's, drawn by the page's script."""
    axis = {"gridcolor": _LINE, "linecolor": "#9aa5b1", "zeroline": False, "ticks": "outside", "tickcolor": "#9aa5b1"}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        template="none",
        height=height + _TOOLBAR,
        font={"family": 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', "size": 13, "color": INK},
        margin={"l": 70, "r": 20, "t": _TOOLBAR + (40 if figure.layout.annotations else 12), "b": 55},
        hoverlabel={"font": {"size": 12}},
    )
    data = embedded(figure.to_json() or "")
    return f'<div class="figure" style="min-height: {height + _TOOLBAR}px">{data}</div>'


def embedded(data: str, name: str = "") -> str:
    """A script element of JSON, which nothing in it can end."""
    named, safe = f' id="{name}"' if name else "", data.replace("<", "\\u003c")
    return f'<script type="application/json"{named}>{safe}</script>'
