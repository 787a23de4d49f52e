"""The table of `moetrace advise rebalance`: a row for each number of redundant experts and each interval."""

from typing import TYPE_CHECKING

from moetrace.cli.tables.figure_columns import is_shown, ratio_column, text_column
from moetrace.cli.tables.output import stdout_console
from moetrace.cli.tables.parts import TextColumn, print_parts
from moetrace.spec.errors import counted

if TYPE_CHECKING:
    from moetrace.batch.rebalance_advice import RebalanceAdvice

# With titles of their own where others would need more room.
_FIGURES = {
    "cluster_imbalance_rows": "",
    "cluster_plans": "",
    "cluster_moved_bytes": "",
    "cluster_pauses": "pauses",
    "cluster_pause_s": "paused",
}


def print_rebalance(advice: "RebalanceAdvice", name: str) -> None:
    """Print an advice on stdout; `name` is what the user called the trace."""
    console, frame = stdout_console(), advice.frame
    console.print(f"{advice.verdict}\n")
    rows = frame.select("is_best", "fits", "redundant", "interval").rows()
    keys = [
        TextColumn("", ["*" if best else "" if fits else "!" for best, fits, *_ in rows], right=False),
        TextColumn("redun-\ndant", ["-" if number is None else f"{number:,}" for *_, number, _ in rows]),
        TextColumn("plan\nevery", [_often(often) for *_, often in rows]),
    ]
    figures = [figure for figure in _FIGURES if is_shown(frame, figure)]
    if "cluster_pauses" in figures:  # then each plan that moves something is one
        figures.remove("cluster_plans")
    steps = [text_column(frame, f"step_s_{part}", f"step {part}") for part in ("p50", "p99")]
    groups = [
        [text_column(frame, "total_s"), ratio_column(frame, "speedup", "speed-\nup")],
        [ratio_column(frame, "over_once", "over\nonce")],
        *([step] for step in steps),
        *([text_column(frame, figure, _FIGURES[figure])] for figure in figures),
    ]
    print_parts(console, keys, groups)
    console.print()
    for line in _legend(advice, name):
        console.print(line)
    console.print("Replay the best:")
    console.print(f"  {advice.command}", soft_wrap=True)


def _often(interval: int | None) -> str:
    return "no plan" if interval is None else "once" if interval == 0 else f"{interval:,}"


def _legend(advice: "RebalanceAdvice", name: str) -> list[str]:
    result = advice.best.found["result"]
    trace = result["trace"]
    moves = "steps wait for experts to move" if advice.migrate == "pause" else "experts move while steps go on"
    lines = [
        f"{name}: {counted(trace['rows'], 'row')} in {counted(trace['steps'], 'step')} of "
        f"{counted(trace['requests'], 'request')}. Model {result['model']['name']} on {result['system']['name']}, "
        f"policy {advice.policy}; plans are made from {counted(advice.window, 'step')}, and {moves}.",
        "* is the best. Speed-ups are over no plan (experts in blocks, one copy of each), and over one plan with "
        "equally many redundant experts (once).",
    ]
    if not all(row.fits for row in advice.rows):
        lines.append("! does not fit the memory of a GPU, and is priced as if it did.")
    return lines
