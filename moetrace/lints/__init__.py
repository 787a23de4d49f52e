"""Lint: what is wrong or suspicious in a trace, found in one pass and in constant memory.

Each check is a class that sees the trace piece by piece and then says what it found; none of them knows the others.
NumPy only, and nothing is refused on the way: an impossible id is a finding like any other.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from moetrace.lints.counts_only import check_counts
from moetrace.lints.dummy_rows import DummyRows
from moetrace.lints.evenness import EvennessCheck, FlatView
from moetrace.lints.finding import LEVELS, RULES, Finding, Rule, finding
from moetrace.lints.gates import Gates
from moetrace.lints.hashing import row_digests
from moetrace.lints.ids import DuplicateIds, ImpossibleIds, ImpossibleRows
from moetrace.lints.layers import AbsentRows, DenseLayers, layer_numbers
from moetrace.lints.neighbours import Neighbours
from moetrace.lints.piece import Progress, pieces, shape_of
from moetrace.lints.popularity import popularity
from moetrace.lints.repeats import RepeatedRows
from moetrace.lints.stuck_layers import StuckLayers
from moetrace.lints.templates import Periodic, Sink, Templates
from moetrace.lints.whole_requests import RequestCheck
from moetrace.spec import list_presets, load_model
from moetrace.trace.format import Trace
from moetrace.trace.opening import accepts_path

__all__ = ["LEVELS", "RULES", "Finding", "Rule", "lint"]


@accepts_path
def lint(trace: Trace, progress: Progress | None = None) -> list[Finding]:
    """Find what is wrong or suspicious in a trace. docs/lint.md explains every code.

    Reads every value once, a few MiB at a time, and compares it with the sha256s if the trace is a file.

    Args:
        trace: A trace or the path of its file.
        progress: A function that gets the number of rows (of a trace of counts, steps) since its last call.

    Returns:
        The findings, errors first, then warnings and notes.

    Raises:
        MoetraceError: Data cannot be read at all.

    Examples:
        >>> import moetrace as mt
        >>> [(found.level, found.code) for found in mt.lint("traces/tiny-olmoe.h5")]
        [('note', 'gates-sum'), ('note', 'position-0-sink')]
    """
    digests: dict[str, Any] = {}
    check = (check_counts if "counts" in trace.has else _check_rows)(trace, digests, progress)
    found = [*check, *layer_numbers(trace.layer_index), *_other_top_k(trace)]
    if trace.path is not None:
        found += _check_sha256(trace, digests)
    order = list(RULES)
    return sorted(found, key=lambda one: (LEVELS.index(one.level), order.index(one.code)))


def _check_rows(trace: Trace, digests: dict[str, Any], progress: Progress | None) -> Iterator[Finding]:
    shape = shape_of(trace)
    impossible, duplicates, rows = ImpossibleIds(shape), DuplicateIds(shape), ImpossibleRows(shape)
    dense, absent, repeated = DenseLayers(shape), AbsentRows(shape), RepeatedRows(shape)
    flat, evenness, gates = (
        FlatView(shape),
        EvennessCheck(shape.num_experts, shape.top_k, shape.layer_index, shape.experts),
        Gates(shape),
    )
    requests, sink, templates, periodic = RequestCheck(shape), Sink(shape), Templates(shape), Periodic(shape)
    placeholders, neighbours, stuck = DummyRows(shape), Neighbours(shape), StuckLayers(shape)
    for piece in pieces(trace, digests, progress):
        for check in (impossible, duplicates, rows, absent, repeated, flat, evenness, gates, sink, periodic):
            check.see(piece)
        stuck.see(piece, dense.see(piece))
        placeholders.see(piece)
        order, row_digest = np.argsort(piece.request, kind="stable"), row_digests(piece)
        requests.see(piece, order, row_digest)
        templates.see(piece, order, row_digest)
        neighbours.see(piece, row_digest)
    repeated.finish()
    zero_layers = duplicates.zero_layers()
    without = dense.dense(zero_layers)
    for check in (impossible, duplicates, rows, flat, gates, requests, sink):
        yield from check.findings()
    yield from repeated.findings(*requests.runs.judged())
    yield from requests.runs.doubled()
    yield from placeholders.findings(without)
    if not flat.layers().any():
        yield from periodic.findings()
    yield from dense.findings(zero_layers)
    doubtful = without | (duplicates.cells > 0)
    yield from stuck.findings(doubtful, max((stop - start for start, stop, _ in repeated.found), default=0))
    yield from absent.findings(without)
    odd = without | flat.layers()
    yield from evenness.findings(odd, absent.layer_top_k())
    yield from neighbours.findings(odd)
    yield from neighbours.copied(odd)
    if evenness.counted:
        odd |= duplicates.cells > 0
        yield from popularity(evenness.chosen, absent.made(), shape.top_k, shape.layer_index, odd, neighbours.ids())
    yield from templates.findings(int(requests.rows[requests.copies()].sum()))
    if shape.top_k == shape.num_experts and not absent.is_free(without):
        what = f"top_k is the number of experts, {shape.num_experts}."
        yield finding("every-expert", what, shape.num_experts)


def _other_top_k(trace: Trace) -> Iterator[Finding]:
    """`other-top-k`, of a trace that names a preset."""
    if trace.model not in list_presets("models"):
        return
    model = load_model(trace.model)
    wanted, fits = model.most_top_k, (model.moe_layers, model.most_experts) == (trace.layers, trace.num_experts)
    if fits and wanted != trace.top_k:
        what = f"The trace has {trace.top_k} experts a token, but {trace.model} has {wanted}."
        yield finding("other-top-k", what, trace.top_k)


def _check_sha256(trace: Trace, digests: dict[str, Any]) -> Iterator[Finding]:
    """`sha256` and `no-sha256`; datasets not hashed while reading are small, and already in memory."""
    differ, lack = [], []
    for name, column in trace._columns.items():
        digest = digests.get(name) or hashlib.sha256(getattr(trace, name).data)
        if column.sha256 is None:
            lack.append(column.path)
        elif digest.hexdigest() != column.sha256:
            differ.append(column.path)
    if differ:
        yield finding("sha256", f"The sha256 of {', '.join(differ)} is not the one that the file states.", len(differ))
    if lack:
        yield finding("no-sha256", f"There is no sha256 to compare {', '.join(lack)} with.", len(lack))
