"""One self-contained HTML page about a comparison and those before it: no script, no network, light, dark and printed.

Charts are drawn by matplotlib as SVG inside the page, with the page's own colours; everything else is a template whose
values are escaped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from beam_pipeline import __version__
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import tables, totals
from beam_pipeline.comparison.results import Result
from beam_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

SHOWN_GROUPS = 30

_NOTHING = "\u2013"

# Colours that no chart uses otherwise, and what stands for them in the page, which knows whether it is dark.
_INK, _NOW, _THEN, _BAND = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {_INK: "currentColor", _NOW: "var(--now)", _THEN: "var(--then)", _BAND: "var(--band)"}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "font.size": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,
}


def require() -> None:
    """Raises ConfigError if what draws the page is not installed; workers have no use for it."""
    try:
        import jinja2  # noqa: F401 - whether it is there is all that is asked
        import matplotlib  # noqa: F401 - likewise
    except ImportError as error:
        raise ConfigError("the page needs jinja2 and matplotlib; pip install 'beam-pipeline[report]'") from error


def render(results: Sequence[Result], destination: Destination) -> str:
    """Returns the page about the last pair of some results, with the others as what it is compared with.

    Args:
        results: oldest pair first, as `find_results` returns them.
        destination: the tables, to be named.
    """
    import jinja2

    pair = results[-1].pair
    newest = [result for result in results if result.pair == pair]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("beam_pipeline.comparison", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "share": _share, "count": _count}
    return environment.get_template("page.html.jinja").render(
        values=newest[0].values,
        towers=[_tower(result, results) for result in newest],
        pairs=len({result.pair for result in results}),
        table=tables.comparison_table(destination),
        version=__version__,
    )


def _tower(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    values = result.values
    of_tower = [other for other in results if other.values["tower"] == values["tower"]]
    place = of_tower.index(result)
    earlier = of_tower[place - 1] if place else None
    groups = sorted(values["by_group"], key=lambda group: -group["score_change_mean"])
    return {
        "result": result,
        "values": values,
        "earlier": earlier.values if earlier else None,
        "history": _svg("history", values["tower"], lambda axes: _draw_history(axes, of_tower, result)),
        "histogram": _svg("histogram", values["tower"], lambda axes: _draw_histogram(axes, result, earlier)),
        "plane": _svg("plane", values["tower"], lambda axes: _draw_plane(axes, values))
        if values["distance_and_score_change"]
        else None,
        "norms": _svg("norms", values["tower"], lambda axes: _draw_norms(axes, values)) if values["norms"] else None,
        "spectrum": _svg("spectrum", values["tower"], lambda axes: _draw_spectrum(axes, values)),
        "groups": groups[:SHOWN_GROUPS],
        "more_groups": max(0, len(groups) - SHOWN_GROUPS),
        "largest_group": max((group["score_change_mean"] for group in groups), default=0) or 1,
    }


def _number(value: float | None, digits: int = 2) -> str:
    return _NOTHING if value is None else f"{value:,.{digits}f}"


def _share(value: float | None, digits: int = 1) -> str:
    return _NOTHING if value is None else f"{value:.{digits}%}"


def _count(value: int | None) -> str:
    return _NOTHING if value is None else f"{value:,}"


# Charts.


def _svg(kind: str, tower: str, draw: Callable[[Axes], None]) -> Markup:
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    # Names of clip paths and markers are derived from the salt: two charts of a page must not share them.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{kind} {tower}"}):
        figure = Figure(figsize=(5.4, 3.0), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 sans-serif", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # Groups are numbered in each chart from one; nothing refers to them.
    text = re.sub(r'<g id="[A-Za-z0-9_.]+_\d+">', "<g>", text)
    # What is drawn comes from numbers and dates; text that matplotlib writes is escaped by it.
    return Markup(re.sub(r"\s*\n\s*", "\n", text))


def _draw_history(axes: Axes, of_tower: Sequence[Result], result: Result) -> None:
    name = result.measure
    days = [each.values["train_date"] for each in of_tower]
    usual = result.usual
    if usual.low is not None and usual.high is not None:
        axes.axhspan(usual.low, usual.high, color=_BAND, lw=0, label="usual for the 99th percentile")
    places = [*range(len(of_tower))]
    for key, colour, label in (("p99", _NOW, "99th percentile"), ("p50", _THEN, "median")):
        heights = [each.values[f"{name}_{key}"] for each in of_tower]
        axes.plot(
            places, [float("nan") if v is None else v for v in heights], "o-", ms=4, lw=1.2, color=colour, label=label
        )
    step = max(1, len(days) // 6)
    axes.set_xticks(places[::-step][::-1], [str(day) for day in days][::-step][::-1], rotation=20, ha="right")
    axes.set_xlim(-0.5, len(of_tower) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(name.replace("_", " "))
    axes.legend(loc="lower left", ncols=3, fontsize=8, bbox_to_anchor=(0, 1), borderaxespad=0)


def _draw_histogram(axes: Axes, result: Result, earlier: Result | None) -> None:
    name = result.measure
    edges = [totals.COARSE * place for place in range(101)]
    last = 5
    for one, label in ((result, "this pair"), (earlier, "the pair before")):
        counts = one.values[f"{name}_histogram"] if one else []
        total = sum(counts)
        if not total:
            continue
        shares = [count / total for count in counts]
        last = max(last, *(place for place, count in enumerate(counts) if count))
        if one is result:
            axes.stairs(shares, edges, fill=True, color=_NOW, alpha=0.75, label=label)
        else:
            axes.stairs(shares, edges, color=_THEN, lw=1.5, label=label)
    axes.set_xlim(0, min(2.0, edges[last + 1] + 0.05))
    axes.set_xlabel(name.replace("_", " "))
    axes.set_ylabel("share of the ids")
    if axes.has_data():
        axes.legend(fontsize=8)


def _sizes(counts: Sequence[int]) -> list[float]:
    largest = max(counts)
    return [3 + 60 * (count / largest) for count in counts]


def _draw_plane(axes: Axes, values: Mapping[str, Any]) -> None:
    squares = values["distance_and_score_change"]
    across, up = ([square[name] for square in squares] for name in ("distance", "score_change"))
    axes.scatter(across, up, _sizes([square["ids"] for square in squares]), color=_NOW, alpha=0.7, lw=0)
    if values["distance_unrelated"] is not None:
        axes.axvline(values["distance_unrelated"], color=_THEN, ls="--", lw=1, label="distance if unrelated")
        axes.legend(fontsize=8)
    axes.set_xlim(0, max(1.0, max(across) + 0.1))
    axes.set_ylim(0, max(1.0, max(up) + 0.1))
    axes.set_xlabel("distance")
    axes.set_ylabel("score change")


def _draw_norms(axes: Axes, values: Mapping[str, Any]) -> None:
    bins = values["norms"]
    before, after = ([one[name] for one in bins] for name in ("before", "after"))
    axes.scatter(before, after, _sizes([one["ids"] for one in bins]), color=_NOW, alpha=0.7, lw=0)
    ends = [min(*before, *after), max(*before, *after)]
    axes.plot(ends, ends, color=_THEN, ls="--", lw=1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("norm before")
    axes.set_ylabel("norm after")


def _draw_spectrum(axes: Axes, values: Mapping[str, Any]) -> None:
    for when, colour, marker in (("before", _THEN, "s"), ("after", _NOW, "o")):
        shares = values[f"spectrum_{when}"]
        if sum(shares):
            marker_size = 4 if len(shares) <= 64 else 0
            axes.plot(range(1, len(shares) + 1), shares, marker=marker, ms=marker_size, lw=1, color=colour, label=when)
            axes.legend(fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("direction")
    axes.set_ylabel("share of the variance")
