"""How a trace shows itself, in a console and in a notebook; no row is read."""

from typing import Any

from moetrace.spec.errors import printable
from moetrace.spec.html_table import html_table
from moetrace.trace.schema import PHASE_NAMES


def trace_text(self: Any) -> str:
    """Return a trace in one line."""
    trace = self
    return f"<Trace {printable(trace.shown)}: {trace.rows:,} rows in {trace.steps:,} steps of {printable(trace.model)}>"


def trace_html(trace: Any) -> str:
    """Return what a trace's file says of itself, as a table."""
    phases = [f"{int((trace.phase == phase).sum()):,} {name}" for phase, name in enumerate(PHASE_NAMES)]
    facts = {
        "model": trace.model,
        "layers": trace.layers,
        "experts": f"{trace.num_experts} a layer, top {trace.top_k}",
        "steps": f"{trace.steps:,} ({', '.join(phases)})",
        "rows": trace.rows,
        "also holds": ", ".join(sorted(trace.has)) or None,
        "ids": trace.storage,
    }
    return html_table(["trace", trace.shown], facts.items())
