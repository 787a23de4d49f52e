"""The figures that every replay has, of a machine of any kind; `results.record` adds those of some machines only."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from moetrace.results.figure import Count, Figure, Spread


def _nothing() -> Spread:
    """The values for a spread that a file of an earlier version lacks."""
    return Spread(mean=None, p50=None, p95=None, p99=None, max=None)


class Utilization(msgspec.Struct):
    """Share of the total time in which each part of the machine works; at most 1."""

    gpu: Annotated[float | None, Figure("share", "busy time of the GPU / `total_s`", None, "GPU busy", "GPU\nbusy")]
    ndp: Annotated[
        list[float | None],
        Figure(
            "share",
            "busy time of each NDP unit / `total_s`, a list; in tables their mean",
            None,
            "NDP busy, mean",
            "NDP\nbusy",
        ),
    ]
    link_in: Annotated[
        float | None,
        Figure(
            "share",
            "share of `total_s` in which the link towards the GPU carries anything",
            None,
            "link in busy",
            "link in\nbusy",
        ),
    ]
    link_out: Annotated[
        float | None,
        Figure(
            "share", "share of `total_s` in which the link away from the GPU carries anything", None, "link out busy"
        ),
    ]
    cpu: Annotated[float | None, Figure("share", "busy time of the CPU / `total_s`", None, "CPU busy", "CPU\nbusy")]


class CommonFigures(msgspec.Struct, kw_only=True):
    """The figures that every policy of `summary.json` has, in the file's order."""

    name: Annotated[str, Meta(description="the policy")]
    total_s: Annotated[float, Figure("s", "time of all steps", "lower", "total", "total")]
    prefill_s: Annotated[float, Figure("s", "time of the prefill steps", "lower", "in prefill steps", "prefill")]
    decode_s: Annotated[float, Figure("s", "time of the decode steps", "lower", "in decode steps", "decode")]
    mixed_s: Annotated[float, Figure("s", "time of the mixed steps", "lower", "in mixed steps", "mixed")]
    tokens_per_s: Annotated[
        float | None,
        Figure("1/s", "output tokens of all requests / `total_s`", "higher", "output tokens a second", "tokens"),
    ]
    hits: Annotated[Count, Figure("count", "active experts per (step, layer) that were resident", "higher")]
    misses: Annotated[Count, Figure("count", "active experts per (step, layer) that were not", "lower")]
    step_s: Annotated[Spread, Figure("s", "time of a step, over the steps", "lower", "step")]
    ttft_s: Annotated[Spread, Figure("s", "time to the first token, over the requests", "lower", "TTFT", "TTFT")]
    tpot_s: Annotated[Spread, Figure("s", "time per output token, over the requests", "lower", "TPOT", "TPOT")]
    hit_rate: Annotated[float | None, Figure("share", "`hits` / (`hits` + `misses`)", "higher", "hits", "hits")]
    demand_bytes: Annotated[
        float,
        Figure("bytes", "weights that moved because they were demanded", "lower", "fetched on demand", "fetched"),
    ]
    prefetch_bytes: Annotated[
        float, Figure("bytes", "weights that moved ahead of time", None, "prefetched", "prefetch")
    ]
    late: Annotated[Count, Figure("count", "misses that were on their way", "lower")]
    wasted: Annotated[Count, Figure("count", "prefetched experts that moved for nothing", "lower")]
    imbalance_mean: Annotated[
        float | None,
        Figure(
            "ratio",
            "longest busy time of a unit / mean of all units, over layers where units had work",
            "lower",
            "imbalance of units",
        ),
    ]
    utilization: Utilization
    work_bound_s: Annotated[float, Figure("s", "the work bound: no schedule is faster", None, "work bound")]
    clairvoyant_s: Annotated[
        float | None,
        Figure("s", "the clairvoyant run: active experts are on the GPU, up to the slots", None, "clairvoyant"),
    ]
    # It moves when another policy does, so no baseline holds it.
    speedup: Annotated[
        float | None,
        Figure(
            "ratio",
            "`total_s` of the first policy / that of this one",
            "higher",
            "speed-up against the first",
            "speed-\nup",
            gated=False,
        ),
    ]
    used: Annotated[Count, Figure("count", "prefetched experts that the GPU ran")]
    optimal_fallbacks: Annotated[Count, Figure("count", "layers that dispatch `optimal` left to `balance`")]
    overhead_s: Annotated[float, Figure("s", "the host's overhead of all layers, a part of `dense_s`", "lower")] = 0.0
    choices: Annotated[dict[str, Any], Meta(description="what it chose, with the parameters that apply")]
    # A folder of an earlier version has none of those below.
    ttft_max_s: Annotated[
        Spread, Figure("s", "the longest TTFT of a request's turns, over the requests", "lower", "longest TTFT")
    ] = msgspec.field(default_factory=_nothing)
    itl_s: Annotated[
        Spread, Figure("s", "time between two tokens of a turn, over all of them (ITL)", "lower", "ITL", "ITL")
    ] = msgspec.field(default_factory=_nothing)
    request_tokens_per_s: Annotated[
        Spread,
        Figure(
            "1/s",
            "output tokens a second that a request sees, 1 / `tpot_s`, over the requests",
            "higher",
            "output tokens a second and request",
            "tokens a\nrequest",
        ),
    ] = msgspec.field(default_factory=_nothing)

    lower_bound_s: Annotated[
        float | None,
        Figure("s", "the lower bound: starts, the link and the slots count, and no policy is faster", None, "bound"),
    ] = None
    break_even_tokens: Annotated[
        float | None,
        Figure(
            "ratio",
            "of a trace of verified steps: a decode step's time over that with one row of a request, which is how many "
            "tokens a step must keep to be as fast",
            "lower",
            "",
            "break-\neven",
            gated=False,
        ),
    ] = None
