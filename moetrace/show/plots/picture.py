"""Common to all plots: a PNG, or one HTML page that loads nothing from anywhere."""

import json
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from moetrace.spec.errors import MoetraceError

if TYPE_CHECKING:
    import altair as alt
    import polars as pl

FORMS = ("png", "html")
_PAPER, _INK = "#ffffff", "#24292f"  # of the PNG; a page takes its reader's
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:;
 script-src 'unsafe-inline' 'unsafe-eval'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 2rem auto; max-width: {width}px; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; margin: 0; }}
p {{ margin: .3rem 0 1.5rem; }}
#chart {{ display: block; overflow-x: auto; }} /* Vega would make it as wide as the chart */
#vg-tooltip-element {{ color: #24292f; background: #fff; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{subtitle}</p>
<div id="chart"></div>
<script type="application/json" id="spec">{spec}</script>
<script type="module">{script}</script>
</body>
</html>
"""
_DRAW = """
const spec = JSON.parse(document.getElementById("spec").textContent);
vegaEmbed("#chart", spec, {renderer: "svg", actions: false});
"""


def check_can_plot(what: str = "--plot") -> None:
    """Raise a MoetraceError, `what` needs it, unless what draws is installed."""
    try:
        import altair
        import vl_convert
    except ImportError as missing:
        raise MoetraceError(
            f"{what} needs {missing.name}, which is not installed: pip install '.[report]' in the clone of moetrace."
        ) from None
    del altair, vl_convert


def picture(form: str, title: str, subtitle: str, width: int, draw: "Callable[[], alt.VConcatChart]") -> bytes:
    """Return what `draw` makes as a file's bytes; `form` is one of FORMS, `width` the pixels of a page. A subtitle
    may have lines.

    Raises MoetraceError if altair or vl-convert is missing.
    """
    check_can_plot()
    import vl_convert

    if form == "png":
        chart = inked(draw(), _INK).properties(
            title={
                "text": title,
                "subtitle": subtitle.split("\n"),
                "fontSize": 17,
                "subtitleFontSize": 13,
                "offset": 18,
            },
            background=_PAPER,
        )
        return vl_convert.vegalite_to_png(chart.to_json(), scale=2)
    spec = inked(draw(), "currentColor").properties(background="transparent").to_dict()
    page = _PAGE.format(
        title=escape(title),
        subtitle=escape(subtitle).replace("\n", "<br>"),
        width=width,
        spec=json.dumps(spec).replace("<", "\\u003c"),  # so that no text in it ends the script
        script=vl_convert.javascript_bundle(_DRAW),
    )
    return page.encode()


def inked(chart: "alt.VConcatChart", ink: str) -> "alt.VConcatChart":
    """Give all texts and lines of a chart the colour `ink`."""
    faint: dict[str, Any] = {
        "gridColor": ink,
        "gridOpacity": 0.12,
        "domainColor": ink,
        "tickColor": ink,
        "domainOpacity": 0.5,
    }
    text: dict[str, Any] = {"labelColor": ink, "titleColor": ink, "titleFontWeight": "normal"}
    return (
        chart.configure_axis(**faint, **text)
        .configure_legend(**text, labelLimit=200)
        .configure_title(color=ink, subtitleColor=ink, anchor="start", fontSize=13, offset=8)
        .configure_view(stroke=None)
    )


def inline(frame: "pl.DataFrame") -> Any:
    """Return the rows as data inside the chart itself, for any number: a page must be self-contained."""
    import altair as alt

    return alt.InlineData(values=frame.to_dicts())
