"""Charts of measured figures, drawn by plotly in the reader's browser from a script that lies beside the pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

SCRIPT = "javascripts/plotly.min.js"
INK, GRID = "#7d848d", "rgba(125, 132, 141, 0.25)"  # on white and on black
COLOURS = ("#2f74c8", "#c77d1a", "#1d8757", "#d8359a", "#8a6a12", "#4f97ea")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star")

Points = Sequence[tuple[float, float]]


def script() -> str:
    """The source that `SCRIPT` names."""
    return str(get_plotlyjs())


def lines(series: Mapping[str, Points], title: str, x: str, y: str, *, even: float | None = 1.0) -> str:
    """One line for each series, both axes logarithmic; ``even`` is where neither side wins."""
    figure = go.Figure()
    for i, (name, points) in enumerate(series.items()):
        figure.add_scatter(
            x=[a for a, _ in points],
            y=[b for _, b in points],
            name=escape(name),
            mode="lines+markers",
            line={"color": COLOURS[i % len(COLOURS)]},
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 8},
        )
    if even is not None:
        figure.add_hline(y=even, line={"color": INK, "dash": "dash", "width": 1})
    ticks = sorted({a for points in series.values() for a, _ in points})
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": INK, "type": "log"}
    figure.update_layout(
        title={"text": escape(title), "font": {"size": 14}},
        xaxis={
            **axis,
            "title": x,
            "tickvals": ticks,
            "ticktext": [f"{tick:,.10g}" for tick in ticks],
        },
        yaxis={**axis, "title": y, "dtick": "D2"},
        legend={"orientation": "h", "y": -0.28},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "family": "sans-serif"},
        margin={"l": 60, "r": 15, "t": 40, "b": 60},
        height=360,
    )
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    said = escape(f"{title}: {y} by {x}; the figures are in the table below.", quote=True)
    return f'<figure class="chart" role="img" aria-label="{said}">{drawn}</figure>\n'
