"""The tables of `moetrace advise`: the best policy beside the default, the bounds, and other sizes of memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from moetrace.cli.tables.figure_columns import SOME_HAVE, is_shown, text_column
from moetrace.cli.tables.output import stdout_console
from moetrace.cli.tables.parts import TextColumn, print_parts
from moetrace.results.figure_text import beyond, digits, percent, shown_unit
from moetrace.results.record import COLUMNS
from moetrace.spec.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

    from moetrace.batch.advice import Advice
    from moetrace.batch.stages import Tried

_FIGURES = ("tokens_per_s", "ttft_s_p50", "tpot_s_p50", "tpot_s_p99", "itl_s_p99", "hit_rate")
_DROPPED = "gate_mass_dropped"
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
    lossy = shown["gate_mass_dropped"].fill_null(0.0) > 0 if _DROPPED in shown.columns else [False] * len(shown)
    drops = ["~" if is_lossy else "" for is_lossy in lossy]
    keys = [
        TextColumn("", [marks.get(role, "") + drop for role, drop in zip(shown["role"], drops, strict=True)], False),
        TextColumn("policy", shown["policy"].to_list(), right=False),
    ]
    if shown["slots"].n_unique() > 1:  # the best may be one that does better with fewer
        keys.append(TextColumn("slots", [f"{slots:,}" for slots in shown["slots"]]))
    base = advice.default.total_s if advice.default is not None else None
    speedups = ["-" if base is None else f"{base / seconds:.2f}x" for seconds in shown["total_s"]]
    first = [text_column(shown, "total_s"), TextColumn("speed-\nup", speedups)]
    if advice.slos:
        first.append(TextColumn("misses\n%", [_missed(miss) for miss in shown["miss"]]))
    figures = dict.fromkeys((_DROPPED, *_FIGURES, *SOME_HAVE))  # what is lost stands beside the time
    groups = [[column] for column in first] + [[text_column(shown, name)] for name in figures if is_shown(shown, name)]
    print_parts(console, keys, groups)
    console.print()


def _print_sizes(console: "Console", advice: "Advice") -> None:
    """Print the gains of other sizes of the GPU's memory."""
    if not advice.sizes:
        return
    rows = [(size.best, size.more_bytes, size.wins) for size in advice.sizes] + [(advice.best, 0.0, 0.0)]
    rows.sort(key=lambda row: row[0].slots)
    tried: list[Tried] = [row[0] for row in rows]
    bytes_of = [one.found["costs"]["gpu_memory_bytes"] for one in tried]
    factor, sign = shown_unit(COLUMNS["gpu_memory_bytes"], bytes_of)
    more_of = [factor * more if more else None for _, more, _ in rows]
    columns = [
        TextColumn(COLUMNS["gpu_memory_bytes"].column_in(sign), digits([factor * value for value in bytes_of], 2)),
        TextColumn(f"more\n{sign}", digits(more_of, 2, signed=True)),
        _column("total_s", [one.total_s for one in tried]),
        TextColumn("wins\n%", digits([100 * wins if more else None for _, more, wins in rows], 1, signed=True)),
    ]
    if any(one.dropped for one in tried):
        columns.append(_column(_DROPPED, [one.dropped for one in tried]))
    if advice.slos:
        columns.append(TextColumn("misses\n%", [_missed(one.miss) for one in tried]))
    columns.append(TextColumn("policy", [one.candidate.label for one in tried], right=False))
    slots = TextColumn("slots", [f"{one.slots:,}" for one in tried])
    print_parts(console, [slots], [[column] for column in columns])
    console.print()


def _column(name: str, values: Sequence[float]) -> TextColumn:
    return text_column(pl.DataFrame({name: values}), name)


def _legend(advice: "Advice", name: str) -> list[str]:
    best = advice.best
    trace, system = best.found["result"]["trace"], best.found["result"]["system"]["name"]
    bound, seer = best.figures["lower_bound_s"], best.figures["clairvoyant_s"]
    bound_ms = digits([1e3 * bound], 1)[0]
    lines = [
        f"{name}: {counted(trace['rows'], 'row')} in {counted(trace['steps'], 'step')} of "
        f"{counted(trace['requests'], 'request')}. Model {best.found['result']['model']['name']} on {system}; the GPU "
        f"keeps up to {best.slots:,} of {counted(advice.all_experts, 'expert')} (slots).",
        _tried(advice),
        f"* is the best that an engine can run, {_over(best, bound)} over the {bound_ms} ms that are the least "
        f"possible with its placement, devices and first residents, and {_over(best, seer)} over the same policy "
        "with what a layer needs already on the GPU. d is the default, against which speed-ups are. "
        "o knows the future: it is no advice.",
    ]
    if advice.best.dropped:
        lines.append(_lossy(advice))
    if advice.slos and best.miss > 0:
        lines.append("No policy keeps the limits: the first misses them least.")
    if (usd := advice.usd_per_million_tokens) is not None:
        cost = digits([usd], 2)[0]
        lines.append(f"At {advice.usd_hour:g} USD an hour, a million output tokens cost {cost} USD.")
    return lines


def _lossy(advice: "Advice") -> str:
    """Say that the best loses rows, which no time counts, and name the best without losses."""
    other = advice.lossless
    found = "No policy that was replayed over the whole trace drops none"
    if other is not None:
        times = digits([other.total_s / advice.best.total_s], 2)[0]
        found = f"The best that drops none is {other.candidate.label}, which takes {times} times as long"
    return (
        "~ drops gate mass: rows whose packets got lost go without what the experts said of them. Time does not count "
        f"that, so a policy that loses more may look better. {found}. --slo 'gate_mass_dropped<=1%' is a limit; with "
        "--set system.link.loss_mode=reliable every packet is sent again."
    )


def _tried(advice: "Advice") -> str:
    said = "1 policy was tried" if advice.tried == 1 else f"{advice.tried:,} policies were tried"
    if advice.short_steps >= advice.steps:
        return f"{said}, over the whole trace."
    return (
        f"{said} over the first {counted(advice.short_steps, 'step')}, and the best {len(advice.ranked):,} of them "
        "over the whole trace."
    )


def _over(best: "Tried", bound_s: float) -> str:
    return percent(beyond(best.total_s, bound_s) / bound_s) if bound_s else "-"


def _missed(miss: float | None) -> str:
    """By how many percent a limit is missed; nothing where it is kept."""
    return "-" if miss is None or miss == float("inf") else digits([100 * miss], 1)[0] if miss else "kept"
