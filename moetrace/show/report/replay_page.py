"""The report of one replay."""

from pathlib import Path

import msgspec
import polars as pl

from moetrace.results.publish import file_in
from moetrace.results.read_parquet import readable
from moetrace.results.record import (
    ACCOUNTS,
    FIGURES,
    OF_A_DEADLINE,
    TIMELINE_FILE,
    PolicyFigures,
    Summary,
    value_in,
)
from moetrace.results.replayed import Replayed
from moetrace.show.charts import QUESTIONS
from moetrace.show.charts.analyzed import balance as balanced
from moetrace.show.charts.analyzed import hit_curves
from moetrace.show.charts.one_step import one_step
from moetrace.show.report import page
from moetrace.show.report.again import again

# Of a folder of an earlier version there is only the work bound.
_WHAT_COUNTS = (
    "GPU and units share each layer's work as well as they can; starts count, the rate of the link and the "
    "number of slots limit it. No policy is faster, not even one that knows the trace."
)
_WORK_ALONE = (
    "the parts that take part share all the work perfectly, nothing is started, waits or moves. No schedule of this "
    "work on them is faster."
)
_FEW = 6  # policies that get a card each
# In the table of all figures: the speed-up after the total, the yardsticks before the hits, the rest as in the file.
_PLACES = {
    "speedup": "prefill_s",
    "work_bound_s": "hit_rate",
    "lower_bound_s": "hit_rate",
    "clairvoyant_s": "hit_rate",
}


def _in_order() -> list[str]:
    names = [name for name, figure in FIGURES.items() if figure.label and name not in _PLACES]
    for name, before in _PLACES.items():
        names.insert(names.index(before), name)
    return names


_LISTED = _in_order()


def replay_page(replayed: Replayed, folder: Path | None, cache: Path | None, balance: Path | None) -> bytes:
    """Return the page; `folder` may hold a time line, `cache` and `balance` are what `moetrace analyze` printed."""
    summary = replayed.summary
    sections = [("policies", "Policies side by side", _side_by_side(summary))]
    with readable((folder or Path()) / "steps.parquet"):
        figures = [draw(replayed) for draw in QUESTIONS.values()]
    figures.append(one_step(file_in(folder, TIMELINE_FILE), replayed.sha256) if folder else None)
    figures.append(hit_curves(cache, summary.trace) if cache else None)
    figures.append(balanced(balance, summary.trace) if balance else None)
    sections += [page.figure(found) for found in figures if found is not None]
    sections.append(("words", "Meaning of the figures", _words(summary)))
    sections.append(("again", "How it was run, and how to run it again", _how(summary)))
    names = f"{summary.model.get('name')} on {summary.system.get('name')}"
    head = f'<p class="lede">{page.text(_lede(summary))}</p>\n<p class="soft">{page.text(_subject(summary))}</p>'
    foot = (
        f"Made by moetrace {page.text(summary.moetrace)} from a simulated replay: a model of a machine, not a "
        "measurement. Everything is in this file; nothing is loaded from anywhere."
    )
    return page.page(f"Replay of {names}", head, sections, foot)


def _lede(summary: Summary) -> str:
    first, best = summary.policies[0], _fastest(summary)
    if len(summary.policies) == 1:
        told = f"{best.name} takes {page.seconds(best.total_s)}"
    elif best is first:
        told = f"{best.name}, the first of {len(summary.policies)}, is the fastest: {page.seconds(best.total_s)}"
    else:
        ratio = f", {best.speedup:.2f} times as fast as {first.name}" if best.speedup else ""
        told = f"{best.name} is the fastest of {len(summary.policies)} policies: {page.seconds(best.total_s)}{ratio}"
    over = _over(best.total_s, best.bound_s)
    return f"{told}. No policy could save more than {page.percent(_saved(best))} of that." + (
        "" if over is None or over >= 0.05 else " It is close to the best possible."
    )


def _subject(summary: Summary) -> str:
    trace = summary.trace
    everything = trace.layers * trace.experts
    return (
        f"{trace.rows:,} rows in {trace.steps:,} steps, requests: {trace.requests:,} "
        f"({trace.prefill_rows:,} rows of prompts, {trace.decode_rows:,} of output); {trace.layers} MoE layers of "
        f"{trace.experts} experts, top {trace.top_k}; the GPU keeps up to {summary.slots:,} of {everything:,} experts."
    )


def _side_by_side(summary: Summary) -> str:
    best = _fastest(summary)
    shown = summary.policies[:_FEW]
    cards = [_card(policy, len(summary.policies) > 1 and policy is best) for policy in shown]
    more = "" if len(summary.policies) <= _FEW else f"<p>The first {_FEW} of {len(summary.policies)} policies.</p>"
    whole = page.table(_figures(summary), "All figures of all policies")
    return f'{more}<div class="cards">{"".join(cards)}</div>\n{page.details("All figures", whole)}'


def _card(policy: PolicyFigures, fastest: bool) -> str:
    figures = msgspec.to_builtins(policy)
    pairs = [
        ("Speed-up", "–" if policy.speedup is None else f"{policy.speedup:.2f}×"),
        ("TTFT, median", page.seconds(policy.ttft_s.p50)),
        ("TPOT, median", page.seconds(policy.tpot_s.p50)),
        ("ITL, p99", page.seconds(policy.itl_s.p99)),
        ("Tokens a second", page.number(policy.tokens_per_s)),
        ("Over bound", page.percent(_over(policy.total_s, policy.bound_s))),
        ("Over clairvoyant", page.percent(_over(policy.total_s, policy.clairvoyant_s))),
        ("Hits", page.percent(policy.hit_rate)),
        *(
            (_row_name(name), _shown(name, value))
            for name in (*ACCOUNTS, *OF_A_DEADLINE)
            if (value := value_in(figures, name)) is not None
        ),
    ]
    badge = '<span class="badge">fastest</span>' if fastest else ""
    return (
        f'<article class="card"><h3>{page.text(policy.name)}{badge}</h3>'
        f'<p class="big">{page.text(page.seconds(policy.total_s))}</p>{page.facts(pairs)}</article>'
    )


def _figures(summary: Summary) -> pl.DataFrame:
    """A row for each figure that has a label, a column for each policy; without rows that say nothing."""
    policies = [msgspec.to_builtins(policy) for policy in summary.policies]
    rows = {_row_name(name): [_shown(name, value_in(policy, name)) for policy in policies] for name in _LISTED}
    kept = {name: cells for name, cells in rows.items() if any(cell not in ("–", "0 µs", "0.0 %") for cell in cells)}
    return pl.DataFrame(
        {
            "figure": list(kept),
            **{p.name: [cells[i] for cells in kept.values()] for i, p in enumerate(summary.policies)},
        }
    )


def _row_name(name: str) -> str:
    figure = FIGURES[name]
    return f"{figure.label}, {figure.shown[1]}" if figure.unit in ("bytes", "J", "USD") else figure.label


def _shown(name: str, value: float | None) -> str:
    if name == "speedup":
        return "–" if value is None else f"{value:.3f}×"
    forms = {"s": page.seconds, "share": page.percent, "bytes": _gigabytes}
    return forms.get(FIGURES[name].unit, page.number)(value)


def _gigabytes(value: float | None) -> str:
    return page.number(None if value is None else value / 1e9)


def _words(summary: Summary) -> str:
    best = _fastest(summary)
    if best.clairvoyant_s is None:
        return _cluster_words(summary)
    over_bound, over_clairvoyant = best.total_s - best.bound_s, best.total_s - best.clairvoyant_s
    told = [
        f"Bound ({_bounds(summary)}): {_WHAT_COUNTS if best.lower_bound_s is not None else _WORK_ALONE}",
        "Clairvoyant (another for each policy): the same placement and dispatch, but what a layer needs is on the GPU "
        "already, up to the slots, free of charge. A yardstick and not a bound: a dispatch that decides greedily may "
        "do better with less.",
    ]
    won_s = over_clairvoyant if over_clairvoyant > 1e-9 else 0.0  # less is what rounding leaves
    if best.bound_s > 0:
        told.append(
            f"{best.name} is {page.seconds(over_bound)} above the bound. Better residency and prefetch could save "
            f"about {page.seconds(won_s)} of that; the rest is placement, dispatch, "
            "transfers, and the parts of the machine that cannot work at once."
        )
    told.append(
        "TTFT and TPOT are of requests as the trace batches them, without queueing. A hit is an active expert that was "
        "on the GPU when the router spoke, wherever it then ran: a hit rate is not a latency."
    )
    if any(name in msgspec.to_builtins(best) for name in ACCOUNTS):
        told.append(
            "Energy and price are accounts of the simulated time: a part draws its idle watts all the time and more "
            "while it works, the link draws for what it carries, and each hour has its price. They are as good as the "
            "watts and prices that the system lists; a part without any is not in them."
        )
    return "".join(f"<p>{page.text(words)}</p>" for words in told)


def _cluster_words(summary: Summary) -> str:
    told = [
        f"Bound ({_bounds(summary)}): all work shared out evenly over the GPUs, without transfers and without waiting.",
        "TTFT and TPOT are of requests as the trace batches them, without queueing. The stages of a step "
        "and the limits of the model are in docs/cluster.md.",
    ]
    return "".join(f"<p>{page.text(words)}</p>" for words in told)


def _bounds(summary: Summary) -> str:
    """The bound of all policies, or the least and the largest, if policies differ in what it depends on."""
    low, *_, high = sorted([policy.bound_s for policy in summary.policies] * 2)
    if low == high:
        return f"{page.seconds(low)}, the same for all policies"
    return f"{page.seconds(low)} to {page.seconds(high)}, by the placement, the parts and the start of a policy"


def _how(summary: Summary) -> str:
    trace = summary.trace
    run = again(summary)
    known: list[tuple[str, object]] = [
        ("Trace", f"of {trace.model}{f', SHA-256 {trace.sha256}' if trace.sha256 else ''}"),
        ("Model", summary.model.get("name")),
        ("System", summary.system.get("name")),
        ("Policies", ", ".join(policy.name for policy in summary.policies)),
        ("Slots", f"{summary.slots:,}"),
        ("moetrace", summary.moetrace),
    ]
    source = [(f"Trace's {key}", value) for key, value in trace.source.items() if isinstance(value, str | int | float)]
    blocks = [
        f"<h3>{page.text(name)}</h3><pre><code>{_lines(content)}</code></pre>" for name, content in run.files.items()
    ]
    notes = "".join(f"<p>{page.prose(note)}</p>" for note in run.notes)
    return (
        f"{page.facts([*known, *source], 'facts')}\n<p>To run it again:</p>\n"
        f"<pre><code>{page.text(run.command)}</code></pre>\n{notes}{''.join(blocks)}"
    )


def _lines(content: str) -> str:
    return "\n".join(page.text(line) for line in content.rstrip("\n").split("\n"))


def _fastest(summary: Summary) -> PolicyFigures:
    return min(summary.policies, key=lambda policy: policy.total_s)


def _saved(policy: PolicyFigures) -> float | None:
    return max(0.0, 1 - policy.bound_s / policy.total_s) if policy.total_s else None


def _over(total_s: float, yardstick_s: float | None) -> float | None:
    return total_s / yardstick_s - 1 if yardstick_s else None
