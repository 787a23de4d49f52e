"""The tables of `moetrace advise`: the best policy beside the default, the bounds, and other sizes of memory."""

from typing import TYPE_CHECKING

import polars as pl

from moetrace.cli.tables.figure_columns import is_shown, text_column
from moetrace.cli.tables.output import stdout_console
from moetrace.cli.tables.parts import TextColumn, print_parts
from moetrace.spec.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

    from moetrace.batch.advice import Advice
    from moetrace.batch.stages import Tried

_FIGURES = ("total_s", "tokens_per_s", "ttft_s_p50", "tpot_s_p50", "tpot_s_p99", "itl_s_p99", "hit_rate")
_KIND = ["residency", "prefetch"]  # what makes an oracle one
_SHOWN = 5
_ORACLES = 3


def print_advice(advice: "Advice", name: str) -> None:
    """Print an advice on stdout; `name` is what the user called the trace."""
    console = stdout_console()
    console.print(f"{advice.verdict}\n")
    _print_policies(console, advice)
    _print_sizes(console, advice)
    for line in _legend(advice, name):
        console.print(line)
    console.print("Replay the best:")
    console.print(f"  {advice.command}", soft_wrap=True)


def _print_policies(console: "Console", advice: "Advice") -> None:
    """The best few, the default and the bounds."""
    frame = advice.frame
    real = frame.filter(pl.col("role").is_in(["best", "real"]))[:_SHOWN]
    usual = frame.filter(pl.col("role") == "default").join(real, on=["policy", "slots"], how="anti")
    bounds = frame.filter(pl.col("role") == "oracle").unique(_KIND, keep="first", maintain_order=True)[:_ORACLES]
    bounds = bounds.with_columns(pl.concat_str(_KIND, separator=" ").str.strip_suffix(" none").alias("policy"))
    shown = pl.concat([real, usual, bounds])
    marks = {"best": "*", "default": "d", "oracle": "o"}
    keys = [
        TextColumn("", [marks.get(role, "") for role in shown["role"]], right=False),
        TextColumn("policy", shown["policy"].to_list(), right=False),
    ]
    if shown["slots"].n_unique() > 1:  # the best may be one that does better with fewer
        keys.append(TextColumn("slots", [f"{slots:,}" for slots in shown["slots"]]))
    base = advice.default.total_s if advice.default is not None else None
    speedups = ["-" if base is None else f"{base / seconds:.2f}x" for seconds in shown["total_s"]]
    first = [text_column(shown, "total_s"), TextColumn("speed-\nup", speedups)]
    if advice.slos:
        first.append(TextColumn("misses\n%", [_missed(miss) for miss in shown["miss"]]))
    groups = [first, *([text_column(shown, figure)] for figure in _FIGURES[1:] if is_shown(shown, figure))]
    print_parts(console, keys, groups)
    console.print()


def _print_sizes(console: "Console", advice: "Advice") -> None:
    """What other sizes of the GPU's memory win."""
    if not advice.sizes:
        return
    rows = [(size.best, size.more_bytes, size.wins) for size in advice.sizes] + [(advice.best, 0.0, 0.0)]
    rows.sort(key=lambda row: row[0].slots)
    tried: list[Tried] = [row[0] for row in rows]
    columns = [
        TextColumn("slots", [f"{one.slots:,}" for one in tried]),
        TextColumn("GPU mem.\nGB", [f"{one.found['costs']['gpu_memory_bytes'] / 1e9:,.2f}" for one in tried]),
        TextColumn("more\nGB", [f"{more / 1e9:+,.2f}" if more else "-" for _, more, _ in rows]),
        TextColumn("total\nms", [f"{1e3 * one.total_s:,.1f}" for one in tried]),
        TextColumn("wins\n%", [f"{100 * wins:+.1f}" if more else "-" for _, more, wins in rows]),
    ]
    if advice.slos:
        columns.append(TextColumn("misses\n%", [_missed(one.miss) for one in tried]))
    columns.append(TextColumn("policy", [one.candidate.label for one in tried], right=False))
    print_parts(console, columns, [[]])
    console.print()


def _legend(advice: "Advice", name: str) -> list[str]:
    best = advice.best
    trace, system = best.found["result"]["trace"], best.found["result"]["system"]["name"]
    bound, seer = best.figures["lower_bound_s"], best.figures["clairvoyant_s"]
    lines = [
        f"{name}: {counted(trace['rows'], 'row')} in {counted(trace['steps'], 'step')} of "
        f"{counted(trace['requests'], 'request')}. Model {best.found['result']['model']['name']} on {system}; the GPU "
        f"keeps up to {best.slots:,} of {counted(advice.all_experts, 'expert')} (slots).",
        _tried(advice),
        f"* is the best that an engine can run, {_over(best, bound)} over the {1e3 * bound:,.1f} ms that no policy "
        f"with its placement, parts and start beats, and {_over(best, seer)} over the same policy with what a layer "
        "needs already on the GPU. d is the default, against which speed-ups are. o knows the future: it is no advice.",
    ]
    if advice.slos and best.miss > 0:
        lines.append("No policy keeps the limits: the first misses them least.")
    if (usd := advice.usd_per_million_tokens) is not None:
        lines.append(f"At {advice.usd_hour:g} USD an hour, a million output tokens cost {usd:,.2f} USD.")
    return lines


def _tried(advice: "Advice") -> str:
    said = "1 policy was tried" if advice.tried == 1 else f"{advice.tried:,} policies were tried"
    if advice.short_steps >= advice.steps:
        return f"{said}, over the whole trace."
    return (
        f"{said} over the first {counted(advice.short_steps, 'step')}, and the best {len(advice.ranked):,} of them "
        "over the whole trace."
    )


def _over(best: "Tried", bound_s: float) -> str:
    return f"{100 * (best.total_s / bound_s - 1):.1f} %" if bound_s else "-"


def _missed(miss: float | None) -> str:
    """By how many percent a limit is missed; nothing where it is kept."""
    return "-" if miss is None or miss == float("inf") else f"{100 * miss:.1f}" if miss else "kept"
