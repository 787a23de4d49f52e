"""One self-contained HTML page: its style, its parts as escaped text, its charts, the script that draws them."""

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import Any

import polars as pl

from moetrace.results import figure_text
from moetrace.show.charts.style import ChartGroup
from moetrace.show.plots.picture import inked
from moetrace.spec.errors import printable

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --raised: #f5f7f9; --ink: #1f2328; --soft: #57606a;
  --line: #d0d7de; --accent: #0b5cad; --best: #0f6b4c; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --raised: #1e232a; --ink: #e6e9ed; --soft: #a3adb8;
  --line: #3a424c; --accent: #7cb7ff; --best: #5fd0a5; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.75rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; scroll-margin-top: 1rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .4rem 0 1rem; max-width: 75ch; overflow-wrap: anywhere; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--paper); padding: .5rem 1rem; z-index: 2; }
.lede { font-size: 1.08rem; }
.soft { color: var(--soft); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; list-style: none; margin: .6rem 0 0; padding: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); gap: 1rem;
  margin: 1.2rem 0; }
.card { background: var(--raised); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.15rem;
  max-width: 34rem; }
.card .big { font-size: 1.9rem; font-weight: 650; line-height: 1.2; margin: .15rem 0 .5rem; }
.badge { color: var(--best); border: 1px solid currentColor; border-radius: 99px; font-size: .78rem; padding: 0 .55rem;
  font-weight: 600; margin-left: .5rem; white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(0, 1fr) fit-content(60%); gap: .15rem .6rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
dl.facts { grid-template-columns: minmax(7rem, max-content) 1fr; justify-content: start; max-width: 75ch; }
dl.facts dd { text-align: left; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1.4rem 2rem; }
figure { margin: .4rem 0 .6rem; min-width: 0; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
.chart { width: 100%; min-height: 40px; overflow-x: auto; }
/* Cells of a map would show their seams. */
.chart .mark-rect { shape-rendering: crispEdges; }
.chart > svg, .chart .vega-embed { display: block; width: 100%; }
details { margin: .5rem 0 1rem; }
summary { cursor: pointer; color: var(--accent); padding: .3rem 0; }
.scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; padding: .5rem .7rem; color: var(--soft); }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--raised); border-top: 0; vertical-align: bottom; }
th.text, td.text { text-align: left; }
pre { background: var(--raised); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  margin: .5rem 0; font-size: .86rem; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: .92em; }
footer { padding-top: 2rem; padding-bottom: 2rem; color: var(--soft); font-size: .9rem; }
#vg-tooltip-element { background: var(--paper); color: var(--ink); border: 1px solid var(--line); font-size: 13px; }
#vg-tooltip-element td.key { color: var(--soft); text-align: right; }
#vg-tooltip-element td { border: 0; padding: .1rem .3rem; white-space: normal; text-align: left; }
@media print {
  :root { color-scheme: light; --paper: #fff; --raised: #fff; --ink: #000; --soft: #333; --line: #999; --accent: #000;
    --best: #000; }
  nav, .skip { display: none; }
  .scroll { max-height: none; overflow: visible; }
  body { font-size: 11pt; }
  section { break-inside: auto; }
}
"""
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
script-src 'sha256-$digest' 'unsafe-eval'; base-uri 'none'; form-action 'none'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>$title</h1>
$head
<nav aria-label="Sections"><ul>
$links
</ul></nav>
</header>
<main id="main">
<noscript><p>Charts need JavaScript; the table behind each is below it.</p></noscript>
$sections
</main>
<footer>$foot</footer>
<script type="module">$script</script>
</body>
</html>
""")
# The policy above allows only this script, by its hash: no other script in the page would run.
_DRAW = """
const options = {mode: "vega-lite", renderer: "svg", actions: false, tooltip: {theme: "custom"}};
for (const chart of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(chart.nextElementSibling.textContent);
  try {
    await vegaEmbed(chart, spec, options);
  } catch (error) {
    chart.textContent = "This chart could not be drawn; its table is below.";
    console.error(error);
  }
}
document.documentElement.dataset.drawn = "true";
"""
_CODE, _MARKED = re.compile(r"`([^`]+)`"), r"<code>\1</code>"
MOST_ROWS = 2000  # of a table


def page(title: str, head: str, sections: Sequence[tuple[str, str, str]], foot: str) -> bytes:
    """Return the whole page; `sections` are anchor, title and HTML, `head` and `foot` HTML.

    Raises MoetraceError if altair or vl-convert is missing.
    """
    links = [f'<li><a href="#{anchor}">{text(name)}</a></li>' for anchor, name, _ in sections]
    bodies = [
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{text(name)}</h2>\n{body}\n</section>'
        for anchor, name, body in sections
    ]
    whole = _PAGE.substitute(
        title=text(title),
        style=_STYLE,
        head=head,
        links="\n".join(links),
        sections="\n".join(bodies),
        foot=foot,
        script=_bundle(),
        digest=base64.b64encode(hashlib.sha256(_bundle().encode()).digest()).decode(),
    )
    return whole.encode()


@functools.cache
def _bundle() -> str:
    """Return Vega, Vega-Lite, and what draws the charts of a page with them, as one script."""
    import vl_convert

    return vl_convert.javascript_bundle(_DRAW)


def text(words: object) -> str:
    """Return text that is safe in HTML, between tags or in quotes, for any input."""
    return escape(printable(str(words)))


def prose(words: str) -> str:
    """Return the same, with text in backticks as code."""
    return _CODE.sub(_MARKED, text(words))


def figure(found: ChartGroup) -> tuple[str, str, str]:
    """Return a figure as a section: words, panels, and the table behind them."""
    panels = []
    for number, (title, chart) in enumerate(found.panels, start=1):
        anchor = f"{found.name}-{number}"
        spec = inked(chart, "currentColor").properties(
            width="container",
            background="transparent",
            description=f"{title}. {found.words}",
            autosize={"type": "fit-x", "contains": "padding"},
        )
        encoded = _script_json(_for_page(spec.to_dict()))
        panels.append(
            f'<figure aria-labelledby="{anchor}"><figcaption id="{anchor}">{text(title)}</figcaption>'
            f'<div class="chart"></div><script type="application/json">{encoded}</script></figure>'
        )
    behind = details("The table behind it", table(found.table, found.title))
    body = f'<p>{prose(found.words)}</p>\n<div class="panels">{"".join(panels)}</div>\n{behind}'
    return found.name.replace("_", "-"), found.title, body


def details(title: str, body: str) -> str:
    """Return something that is folded until it is asked for."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def table(frame: pl.DataFrame, caption: str) -> str:
    """Return a frame as a table; the first column names the rows."""
    left = [kind == pl.String for kind in frame.dtypes]
    kinds = [' class="text"' if is_text else "" for is_text in left]
    heads = "".join(f'<th scope="col"{kind}>{text(name)}</th>' for name, kind in zip(frame.columns, kinds, strict=True))
    lines = []
    for row in frame.head(MOST_ROWS).iter_rows():
        cells = [
            f'<th scope="row"{kind}>{text(number(value))}</th>' if i == 0 else f"<td{kind}>{text(number(value))}</td>"
            for i, (value, kind) in enumerate(zip(row, kinds, strict=True))
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    if len(frame) > MOST_ROWS:
        caption += f"; the first {MOST_ROWS:,} of {len(frame):,} rows"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, object]], kind: str = "figures") -> str:
    """Return names and values as a list of terms."""
    inner = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)
    return f'<dl class="{kind}">{inner}</dl>'


def number(value: object) -> str:
    """Return a value for people: four digits of a number with a fraction, an en dash for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value == 0:
        return "0"
    places = 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, min(places, 9))}f}" if 1e-6 < abs(value) < 1e15 else f"{value:.3e}"


def seconds(value: float | None) -> str:
    """Return a time in the unit that suits it."""
    if value is None:
        return "–"
    factor, unit = next(
        ((factor, unit) for limit, factor, unit in ((1, 1, "s"), (1e-3, 1e3, "ms")) if abs(value) >= limit), (1e6, "µs")
    )
    return f"{number(float(value * factor))} {unit}"


def percent(share: float | None) -> str:
    """Return a share in percent."""
    return "–" if share is None or not math.isfinite(share) else figure_text.percent(share)


def _script_json(value: Any) -> str:
    """Return JSON that may stand in a script element: no text in it can end the element or begin a comment."""
    encoded = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return encoded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _for_page(spec: dict[str, Any]) -> dict[str, Any]:
    """Leave out the address of the schema, as the page names no host; make texts as large as the page's small ones."""
    config = spec["config"]
    for part in ("axis", "legend"):
        config[part] = config[part] | {"labelFontSize": 12, "titleFontSize": 12}
    return {key: value for key, value in spec.items() if key != "$schema"}
