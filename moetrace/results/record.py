"""Every figure of a replay and of a sweep, and the fields of the files that hold them: each stands here once.

Frames, files, tables, the gate, the search, reports and docs/results.md read names, units, meanings and directions from
here. To add a figure, add a field to `PolicyFigures` or `CellCosts`, and its value where the others are computed:
`results.summary` or `batch.work`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from moetrace.results.cluster_figures import ClusterFigures
from moetrace.results.figure import Count, Figure, Spread, no_spread
from moetrace.spec import PolicySpec, canonical

RESULT_SCHEMA = "moetrace.result/1"
TIMELINE_SCHEMA = "moetrace.timeline/1"
SWEEP_SCHEMA = "moetrace.sweep/1"
CELL_SCHEMA = "moetrace.cell/1"
SEARCH_SCHEMA = "moetrace.search/1"
ADVICE_SCHEMA = "moetrace.advice/1"
BASELINE_SCHEMA = "moetrace.baseline/1"
GATE_SCHEMA = "moetrace.gate/1"

SUMMARY_FILE = "summary.json"
TIMELINE_FILE = "timeline.json.gz"
SWEEP_FILE = "sweep.json"
SEARCH_FILE = "search.json"
ADVICE_FILE = "advice.json"
POLICY_FILE = "policy.toml"  # of an advice, the best
CELLS_FILE = "cells.parquet"
TRIALS_FILE = "trials.parquet"
CELLS_FOLDER = "cells"
TABLES = ("steps", "units", "layers", "requests", "experts")  # of a replay, each NAME.parquet

# What one write replaces: of an older result nothing of these names stays.
RESULT_FILES = (SUMMARY_FILE, *(f"{name}.parquet" for name in TABLES), TIMELINE_FILE)
SWEEP_FILES = (SWEEP_FILE, CELLS_FILE, SEARCH_FILE, TRIALS_FILE, ADVICE_FILE, POLICY_FILE)
OWN_FILES = frozenset((*RESULT_FILES, *SWEEP_FILES))

# In the metadata of a Parquet file, and in a timeline: the SHA-256 of the summary.json, or sweep.json, that it is of.
PARQUET_MARK = "moetrace.of_sha256"
TIMELINE_MARK = "summary_sha256"


class Utilization(msgspec.Struct):
    """Share of the total time in which each part of the machine works; at most 1."""

    gpu: Annotated[float | None, Figure("share", "busy time of the GPU / `total_s`", None, "GPU busy", "GPU\nbusy")]
    ndp: Annotated[
        list[float | None],
        Figure("share", "the same of the NDP units, a list; in tables their mean", None, "NDP busy, mean", "NDP\nbusy"),
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
    link_out: Annotated[float | None, Figure("share", "the same of the link away from the GPU", None, "link out busy")]
    cpu: Annotated[float | None, Figure("share", "busy time of the CPU / `total_s`", None, "CPU busy", "CPU\nbusy")]


class PolicyFigures(msgspec.Struct, kw_only=True):
    """One policy of `summary.json`, its fields in the file's order."""

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
        Figure("s", "the clairvoyant run: what a layer needs is on the GPU, up to the slots", None, "clairvoyant"),
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
    ] = msgspec.field(default_factory=no_spread)
    itl_s: Annotated[
        Spread, Figure("s", "time between two tokens of a turn, over all of them (ITL)", "lower", "ITL", "ITL")
    ] = msgspec.field(default_factory=no_spread)
    request_tokens_per_s: Annotated[
        Spread,
        Figure(
            "1/s",
            "output tokens a second that a request sees, 1 / `tpot_s`, over the requests",
            "higher",
            "output tokens a second and request",
            "tokens a\nrequest",
        ),
    ] = msgspec.field(default_factory=no_spread)

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

    cluster: ClusterFigures | None = None

    @property
    def bound_s(self) -> float:
        """The lower bound; of a folder of an earlier version, which has none, the work bound."""
        return self.work_bound_s if self.lower_bound_s is None else self.lower_bound_s


class CellCosts(msgspec.Struct):
    """What a cell of a sweep takes beside time; a Pareto front sets one of them against it."""

    gpu_memory_bytes: Annotated[
        float,
        Figure(
            "bytes",
            "GPU memory of the dense weights, and of the slots at the size of the largest expert",
            "lower",
            "GPU memory (dense weights and slots)",
            "GPU mem.",
        ),
    ]
    link_bytes: Annotated[
        float, Figure("bytes", "what the link carried, both ways", "lower", "moved over the link", "link")
    ]
    price: Annotated[
        float | None,
        Figure("price", "sum of what the system's `[price]` lists", "lower", "price of the machine", "price"),
    ]


class TraceFacts(msgspec.Struct, kw_only=True):
    """The trace of `summary.json`: which one it was, without where it lay."""

    model: str
    layers: Count
    experts: Count
    top_k: Count
    rows: Count
    steps: Count
    own_expert_bytes: bool = False
    source: dict[str, Any]
    sha256: str | None = None
    requests: Count
    prefill_rows: Count
    decode_rows: Count
    # A folder of an earlier version has none of these.
    turns: Count = 0
    tokens: Count = 0
    recomputed_rows: Count = 0
    drafted_rows: Count = 0
    accepted_rows: Count = 0


# How far the parts of a file are checked when it is read: a report takes structs, a gate whatever it is to compare.
TraceForm = TypeVar("TraceForm")
PolicyForm = TypeVar("PolicyForm")
CellForm = TypeVar("CellForm")
ResultForm = TypeVar("ResultForm")


class SummaryFile(msgspec.Struct, Generic[TraceForm, PolicyForm], kw_only=True):
    """`summary.json`."""

    schema: str = RESULT_SCHEMA
    moetrace: str
    engine: str | None = None
    trace: TraceForm
    model: dict[str, Any]
    system: dict[str, Any]
    slots: Count
    policies: list[PolicyForm]


Summary = SummaryFile[TraceFacts, PolicyFigures]
PlainSummary = SummaryFile[dict[str, Any], dict[str, Any]]


class ListedCell(msgspec.Struct):
    """A cell in `sweep.json`: its name and the hash that names its file, or why it has none. Its axes are beside it."""

    name: str
    cell: str | None
    error: str | None = None


class SweepFile(msgspec.Struct, Generic[CellForm], kw_only=True):
    """`sweep.json`."""

    schema: str = SWEEP_SCHEMA
    moetrace: str
    engine: str | None = None
    pareto: str = "gpu_memory_bytes"
    axes: dict[str, Any]
    cells: list[CellForm]
    notes: list[str] = []
    slo: list[str] = []


class CellFile(msgspec.Struct, Generic[ResultForm], kw_only=True):
    """`cells/HASH.json` of a sweep; `found_sha256` is of `result`, `costs` and `warnings`."""

    schema: str = CELL_SCHEMA
    moetrace: str = ""
    engine: str | None = None
    inputs: dict[str, Any]
    found_sha256: str = ""
    result: ResultForm
    costs: dict[str, Any] = {}
    warnings: list[str] = []


def choices_of(policy: PolicySpec) -> dict[str, Any]:
    """Return what a policy chose, with the parameters that apply."""
    return {field: value for field, value in canonical(policy).items() if field not in ("name", *policy.unread)}


def fields_of(struct: type[msgspec.Struct]) -> Iterator[tuple[str, Figure | Meta, Any]]:
    """Yield name, annotation and type of each field; of the parts of `utilization`, names such as `utilization.gpu`."""
    for name, hint in get_type_hints(struct, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, *notes = get_args(hint)
            yield name, notes[-1], kind
            continue
        for inner in (hint, *get_args(hint)):  # a part, or one that may be absent
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                yield from ((f"{name}.{part}", note, kind) for part, note, kind in fields_of(inner))


def _figures_of(struct: type[msgspec.Struct]) -> Iterator[tuple[str, Figure]]:
    for name, figure, kind in fields_of(struct):
        if not isinstance(figure, Figure):
            continue
        if kind is Spread:
            for part in Spread.__struct_fields__:
                label = f"{figure.label}, {part}"
                heading = figure.heading if part == "p50" or not figure.heading else f"{figure.heading} {part}"
                meaning = f"`{part}`: {figure.meaning}"
                yield f"{name}.{part}", figure._replace(meaning=meaning, label=label, heading=heading)
        else:
            yield name, figure


# By the path in a policy's part of summary.json, `ttft_s.p50`; a frame's column has `_` for each point.
FIGURES: dict[str, Figure] = dict(_figures_of(PolicyFigures))
METRICS: dict[str, Figure] = {name: figure for name, figure in FIGURES.items() if figure.gated}
COSTS: dict[str, Figure] = dict(_figures_of(CellCosts))
COLUMNS: dict[str, Figure] = {name.replace(".", "_"): figure for name, figure in FIGURES.items()} | COSTS


def value_in(policy: Mapping[str, Any], name: str, check: Callable[[Any], Any] = lambda value: value) -> Any:
    """Return a figure of a policy's part of summary.json; of a list the mean of what is defined, None if nothing is.

    `check` returns each number as it is to be used; by default as it is.
    """
    value: Any = policy
    for key in name.split("."):
        value = None if value is None else value[key]
    if not isinstance(value, list):
        return check(value)
    known = [one for one in map(check, value) if one is not None]
    return math.fsum(known) / len(known) if known else None
