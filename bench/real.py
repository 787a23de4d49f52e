"""Published figures of real machines beside what a replay says, with data-sheet constants and with calibrated ones.

    python bench/real.py            print the table
    python bench/real.py --write    also write it into docs/real.md
    python bench/real.py --check    exit 1 if the table in docs/real.md is stale

A constant is never fitted to the figure that it is judged by: it comes from a table of measured kernels, or from the
other published figures of that machine and engine.
"""

import argparse
import sys
from typing import NamedTuple

from markers import replaced_between
from pages import ROOT
from real_figures import Engine, Figure, engines
from reference import table as markdown

PAGE = ROOT / "docs/real.md"
CLOSE, NEAR = 0.25, 0.5


class Judged(NamedTuple):
    """A figure beside both predictions."""

    figure: Figure
    data_sheet: tuple[float, ...]
    calibrated: tuple[float, ...]


def judge(some: list[Engine]) -> list[Judged]:
    """All figures by number."""
    rows = [
        Judged(figure, figure.say({}), figure.say(engine.constants(figure)))
        for engine in some
        for figure in engine.figures
    ]
    return sorted(rows, key=lambda row: row.figure.number)


def off(said: tuple[float, ...], published: tuple[float, ...]) -> float:
    """The error that is largest, with its sign: 0.25 is a quarter too much."""
    return max((a / b - 1 for a, b in zip(said, published, strict=True)), key=abs)


def _values(values: tuple[float, ...]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


def _constant(item: tuple[str, float]) -> str:
    path, value = item
    return f"`{path.removeprefix('system.')}` = {f'{value:.0f}' if value >= 100 else f'{value:.2g}'}"


def page(some: list[Engine]) -> str:
    """The table, how many are met, what explains the rest, and the constants that fit each machine best."""
    rows = judge(some)
    errors = {
        kind: [off(getattr(row, kind), row.figure.published) for row in rows] for kind in ("data_sheet", "calibrated")
    }
    head = ("", "published", "", "data sheet", "off by (worst)", "calibrated", "off by (worst)")
    lines = [
        (
            f"{row.figure.number}. {row.figure.what}",
            _values(row.figure.published),
            row.figure.unit,
            _values(row.data_sheet),
            f"{errors['data_sheet'][i]:+.0%}",
            _values(row.calibrated),
            f"{errors['calibrated'][i]:+.0%}",
        )
        for i, row in enumerate(rows)
    ]
    counts = [
        f"With {name} constants {_within(errors[kind], CLOSE)} of {len(rows)} are within {CLOSE:.0%}, and "
        f"{_within(errors[kind], NEAR)} within {NEAR:.0%}."
        for name, kind in (("data-sheet", "data_sheet"), ("calibrated", "calibrated"))
    ]
    missed = [
        f"- {row.figure.number} ({error:+.0%}): {row.figure.why}"
        for row, error in zip(rows, errors["calibrated"], strict=True)
        if abs(error) > 0.1
    ]
    found = [
        (
            engine.name,
            ", ".join(str(figure.number) for figure in engine.figures),
            engine.source,
            ", ".join(map(_constant, engine.best.items())) or "-",
        )
        for engine in some
    ]
    return "\n\n".join(
        [
            markdown(head, lines),
            " ".join(counts),
            "Reasons, where the calibrated constants are off by more than a tenth:",
            "\n".join(missed),
            "Where the calibrated constants come from. The best fit uses all figures of a machine, so it judges none "
            "of them; begin with it when you describe a machine of your own:",
            markdown(("engine and machine", "figures", "judged by constants from", "best fit"), found),
        ]
    )


def _within(errors: list[float], bound: float) -> int:
    return sum(abs(error) <= bound for error in errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/real.md")
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/real.md is stale")
    arguments = parser.parse_args()
    found = page(engines())
    if not (arguments.write or arguments.check):
        print(found)
        return
    before = PAGE.read_text(encoding="utf-8")
    after = replaced_between(before, "real", found)
    if arguments.write:
        PAGE.write_text(after, encoding="utf-8")
    elif after != before:
        sys.exit(f"{PAGE.name} is stale: run python bench/real.py --write")


if __name__ == "__main__":
    main()
