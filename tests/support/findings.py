"""What lint finds in a trace, and gates for one."""

import numpy as np

from moetrace.lints import LEVELS, RULES, Finding, lint
from moetrace.trace import Trace
from support.traps import (
    LAYERS,
    ROWS,
    TOP_K,
    trace,
)


def found(made: Trace | dict) -> dict[str, Finding]:
    """The findings by code, after what holds for any: each code once, levels of the rules, sorted by level."""
    with made if isinstance(made, Trace) else trace(made) as opened:
        findings = lint(opened)
    levels = [LEVELS.index(one.level) for one in findings]
    assert levels == sorted(levels) and len({one.code for one in findings}) == len(findings)
    for one in findings:
        assert one.level == RULES[one.code].level and one.what.endswith(".") and one.effect.endswith(".")
        assert one.count > 0 and len(one.rows) <= 16 and all(start < stop for start, stop in one.rows)
    return {one.code: one for one in findings}


def codes(made: Trace | dict) -> set[str]:
    return set(found(made))


def warned(made: Trace | dict) -> set[str]:
    return {code for code, one in found(made).items() if one.level != "note"}


def only(made: Trace | dict) -> Finding:
    findings = found(made)
    assert len(findings) == 1, findings
    return next(iter(findings.values()))


def where(one: Finding) -> tuple[list[int] | None, list[tuple[int, int]], int]:
    return one.layers, one.rows, one.count


def gates(rows: int = ROWS) -> np.ndarray:
    return np.broadcast_to(np.array([0.4, 0.3, 0.2, 0.1], np.float16), (rows, LAYERS, TOP_K)).copy()
