"""The report of one replay."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import polars as pl

from moetrace.results.figure_text import beyond
from moetrace.results.publish import file_in
from moetrace.results.read_parquet import readable
from moetrace.results.record import (
    ACCOUNTS,
    FIGURES,
    OF_A_DEADLINE,
    OF_A_LOSS,
    OF_RELAYOUT,
    OF_REMOTE,
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

# A folder of an earlier version has only the work bound.
_WHAT_COUNTS = (
    "GPU and units share each layer's work as well as they can; starts count, the rate of the link and the "
    "number of slots limit it. No policy is faster, not even one that knows the trace."
)
_WORK_ALONE = (
    "the parts that take part share all the work perfectly, nothing is started, waits or moves. No schedule of this "
    "work on them is faster."
)
# Figures of a card that only some machines or policies have.
_SOME_HAVE = (
    *("gate_mass_dropped", "resent_bytes", "host_hit_rate", "disk_bytes", "disk_busy", "moved_bytes"),
    *("remote_s", "remote_usd", "cold_s", *ACCOUNTS, *OF_A_DEADLINE, "regret"),
)
_FEW = 6  # policies that get a card each
# In the table of all figures: the speed-up after the total, the yardsticks before the hits, the rest as in the file.
_PLACES = {
    "speedup": "prefill_s",
    "work_bound_s": "hit_rate",
    "lower_bound_s": "hit_rate",
    "clairvoyant_s": "hit_rate",
}


_ABOUT_SOME = {
    OF_A_LOSS: (
        "A link that loses packets sends them again (resent), or, where it is relaxed, goes on without the rows that "
        "they carried. Gate mass dropped is the share of all router weights that these rows lost. It changes what the "
        "model says; no time counts that, so a policy that loses more may look better."
    ),
    ("host_hits",): (
        "Above a disk, a host hit is an active expert that the GPU did not hold and host memory did. The others were "
        "read from the disk, whose bytes and busy share are beside it."
    ),
    OF_RELAYOUT: "Moved is what went from one layout of the units to another, beside other work.",
    OF_REMOTE: (
        "In functions is the time of all copies of remote functions, and their price is that of their time alone: the "
        "machine's own price is not in it. The cold start is a part of the first step and of its TTFT."
    ),
    tuple(ACCOUNTS): (
        "Energy and price are accounts of the simulated time: a part draws its idle watts all the time and more "
        "while it works, the link draws for what it carries, and each hour has its price. They are as good as the "
        "watts and prices that the system lists; a part without any is not in them."
    ),
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
    if dropped := best.gate_mass_dropped:
        told += f". It drops {page.percent(dropped)} of the gate mass, which no time counts"
    over = _over(best.total_s, best.bound_s)
    return f"{told}. No policy could save more than {page.percent(_saved(best))} of that." + (
        "" if over is None or over >= 0.05 else " It is close to the best possible."
    )


def _subject(summary: Summary) -> str:
    trace = summary.trace
    kept = f"the GPU keeps up to {summary.slots:,} of {trace.layers * trace.experts:,} experts"
    if summary.of_cluster:
        kept = "all experts are in the memory of the cluster's GPUs"
    return (
        f"{trace.rows:,} rows in {trace.steps:,} steps, requests: {trace.requests:,} "
        f"({trace.prefill_rows:,} rows of prompts, {trace.decode_rows:,} of output); {trace.layers} MoE layers of "
        f"{trace.experts} experts, top {trace.top_k}; {kept}."
    )


def _side_by_side(summary: Summary) -> str:
    best = _fastest(summary)
    policies = [msgspec.to_builtins(policy) for policy in summary.policies]
    always = {*ACCOUNTS, *OF_A_DEADLINE}
    some = [name for name in _SOME_HAVE if name in always or any(value_in(policy, name) for policy in policies)]
    shown = summary.policies[:_FEW]
    cards = [_card(policy, some, len(summary.policies) > 1 and policy is best) for policy in shown]
    more = "" if len(summary.policies) <= _FEW else f"<p>The first {_FEW} of {len(summary.policies)} policies.</p>"
    whole = page.table(_figures(summary), "All figures of all policies")
    return f'{more}<div class="cards">{"".join(cards)}</div>\n{page.details("All figures", whole)}'


def _card(policy: PolicyFigures, some: Sequence[str], fastest: bool) -> str:
    """The figures of a policy that one reads first; `some` are those that only some replays have."""
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
            (_row_name(name)[0].upper() + _row_name(name)[1:], _shown(name, value))
            for name in some
            if (value := value_in(figures, name)) is not None
        ),
    ]
    if policy.cluster is not msgspec.UNSET:
        pairs = [pair for pair in pairs if pair[0] not in ("Over clairvoyant", "Hits")]
        exposed, moved = policy.cluster.exposed_s, policy.cluster.moved_bytes
        pairs += [("Transfers exposed", page.seconds(exposed)), ("Moved, GB", _gigabytes(moved))]
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
    there = {name for policy in summary.policies for name in msgspec.to_builtins(policy)}
    told += [words for names, words in _ABOUT_SOME.items() if there & {*names}]
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
        *([] if summary.of_cluster else [("Slots", f"{summary.slots:,}")]),
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
    return max(0.0, beyond(policy.total_s, policy.bound_s) / policy.total_s) if policy.total_s else None


def _over(total_s: float, yardstick_s: float | None) -> float | None:
    return beyond(total_s, yardstick_s) / yardstick_s if yardstick_s else None
