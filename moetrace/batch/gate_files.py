"""A gate's files for other tools: JUnit XML, Markdown for a job's summary, and github-action-benchmark's JSON."""

import json
import math
import re
from xml.etree import ElementTree

from moetrace.batch.gate import Gate
from moetrace.batch.verdict import Judged, Moved
from moetrace.results.record import METRICS
from moetrace.spec.errors import printable

# GitHub takes 1 MiB of summary a step.
_SHOWN_CELLS = 100
_LONGEST_TEXT = 500
_ICONS = {"worse": "🔴", "missing": "🔴", "changed": "🟠", "better": "🟢", "new": "⚪", "same": ""}


def junit(gate: Gate) -> bytes:
    """Return JUnit XML: a test case a cell, failed where the gate fails, skipped where there was nothing to compare.

    It holds what Jenkins' schema and the readers of GitHub, GitLab and Azure agree on; no clock time or host.
    """
    failed = {*gate.failed}
    # New cells, and those that failed before, too.
    skipped = {
        cell.name
        for cell in gate.cells
        if cell.name not in failed and (cell.verdict == "new" or (cell.verdict == "same" and not cell.metrics))
    }
    counts = {"tests": len(gate.cells), "failures": len(failed), "errors": 0, "skipped": len(skipped)}
    attributes = {"name": "moetrace gate", **{key: str(count) for key, count in counts.items()}}
    suites = ElementTree.Element(
        "testsuites", {key: attributes[key] for key in ("name", "tests", "failures", "errors")}
    )
    suite = ElementTree.SubElement(suites, "testsuite", attributes | {"time": "0"})
    for cell in gate.cells:
        group, _, name = cell.name.rpartition("/")
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": _xml(group or "moetrace"), "name": _xml(name), "time": "0"}
        )
        said = _xml(f"{cell.verdict}: {one_line(cell)}")
        if cell.name in failed:
            found = ElementTree.SubElement(case, "failure", {"type": cell.verdict, "message": said})
            found.text = _xml("\n".join(_lines(cell)), between="\n")
        elif cell.name in skipped:
            ElementTree.SubElement(case, "skipped", {"message": said})
        elif cell.verdict != "same":
            ElementTree.SubElement(case, "system-out").text = _xml("\n".join(_lines(cell)), between="\n")
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"


def markdown(gate: Gate) -> str:
    """Return a table of the cells that are not the same, the gravest first, in GitHub's Markdown."""
    head = "accepted" if gate.updated else "passed" if gate.passed else "failed"
    lines = [f"### moetrace gate: {head}", "", f"{gate.counted()}.", ""]
    if gate.moved:
        lines += ["| cell | verdict | metric | baseline | now | change |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for cell in gate.moved[:_SHOWN_CELLS]:
        verdict = f"{_ICONS[cell.verdict]} {cell.verdict}"
        moved = worth_showing(cell)
        why = f"<br>{_text(cell.why)}" if cell.why else ""
        for number, one in enumerate(moved or [None]):
            first = [f"{_text(cell.name)}{why}", verdict] if number == 0 else ["", ""]
            lines.append(f"| {' | '.join([*first, *(_figures(one) if one else ['', '', '', ''])])} |")
    if len(gate.moved) > _SHOWN_CELLS:
        lines += ["", f"{len(gate.moved) - _SHOWN_CELLS:,} more cells are not shown."]
    if gate.dropped:
        lines += ["", f"Dropped from the baseline: {', '.join(map(_text, gate.dropped[:_SHOWN_CELLS]))}."]
    lines += [f"\n{_text(note)}" for note in gate.notes]
    return "\n".join(lines).rstrip() + "\n"


def benchmark_json(gate: Gate) -> str:
    """Return the `customSmallerIsBetter` JSON of github-action-benchmark: every metric of which less is better."""
    points = [
        {
            "name": printable(f"{cell.name} {one.metric}"),
            "unit": METRICS[one.metric].sign or "count",
            "value": one.value,
        }
        for cell in gate.cells
        for one in cell.metrics
        if METRICS[one.metric].better == "lower" and one.value is not None
    ]
    return json.dumps(points, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def one_line(cell: Judged) -> str:
    """The figures and inputs behind the verdict: `total_s 5.9333 -> 6.1 s (+2.81 %); policy changed: ...`."""
    moved = ", ".join(_said(one) for one in cell.metrics if one.verdict == cell.verdict)
    return "; ".join(part for part in (moved, cell.why) if part)


def worth_showing(cell: Judged) -> list[Moved]:
    """The metrics that moved; of a new cell the first one."""
    return list(cell.metrics[:1]) if cell.verdict == "new" else [one for one in cell.metrics if one.verdict != "same"]


def change(moved: Moved) -> str:
    """`+2.81 %` of the baseline, of a share `-1.53 points`; or nothing. Three digits, however small."""
    if METRICS[moved.metric].unit == "share" and None not in (moved.baseline, moved.value):
        return f"{100 * ((moved.value or 0.0) - (moved.baseline or 0.0)):+#.3g} points"
    return "" if moved.relative is None else f"{100 * moved.relative:+#.3g} %"


def shown(moved: Moved) -> tuple[str, str, str]:
    """Baseline, value and unit for people: ms, GB and %, with enough digits to distinguish the two, five at least."""
    factor, unit = METRICS[moved.metric].shown
    before, after = (None if value is None else factor * value for value in (moved.baseline, moved.value))
    digits = 5
    if before is not None and after is not None and before != after:
        digits = next((some for some in range(5, 17) if _rounded(before, some) != _rounded(after, some)), 17)
    return _digits(before, digits), _digits(after, digits), unit


def _rounded(value: float, digits: int) -> str:
    return f"{value:.{digits - 1}e}"


def _digits(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    if value.is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, places)}f}" if 1e-4 <= abs(value) < 1e15 else f"{value:.{digits}g}"


def _lines(cell: Judged) -> list[str]:
    return [
        *filter(None, [cell.why]),
        *(f"{one.verdict}: {_said(one)}" for one in cell.metrics if one.verdict != "same"),
    ]


def _said(one: Moved) -> str:
    before, after, unit = shown(one)
    share = change(one)
    return f"{one.metric} {before} -> {after}{f' {unit}' if unit else ''}{f' ({share})' if share else ''}"


def _figures(one: Moved) -> list[str]:
    before, after, unit = shown(one)
    sign = {"worse": "**worse**", "same": ""}.get(one.verdict, one.verdict)
    return [f"`{one.metric}`", before, f"{after} {unit}".strip(), f"{change(one)} {sign}".strip()]


def _xml(text: str, between: str = "") -> str:
    """Text without what XML 1.0 has no way to write; lines only where they are ours."""
    if between:
        return between.join(_xml(line) for line in text.split(between))
    return printable(text)


def _text(text: str) -> str:
    """A stranger's text as code, which neither ends a cell of a table nor links, mentions or runs anything."""
    told = printable(text)
    if len(told) > _LONGEST_TEXT:
        told = f"{told[:_LONGEST_TEXT]}..."
    if re.fullmatch(r"[\w ./=:;,()<>+%-]+", told, re.ASCII):
        return f"`{told}`"
    # Markdown's own marks are still read inside HTML, so all that may be one is written as an entity.
    letters = [letter if letter.isalnum() or letter in " /-" else f"&#{ord(letter)};" for letter in told]
    return f"<code>{''.join(letters)}</code>"
