"""Every figure of a replay and of a sweep, and the fields of the files that hold them: each stands here once.

Frames, files, tables, the gate, the search, reports and docs/results.md read names, units, meanings and directions from
here. To add a figure, add a field to `PolicyFigures` or `CellCosts`, and its value where the others are computed:
`results.summary` or `batch.work`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UNSET, Meta, UnsetType

from moetrace.results.cluster_figures import ClusterFigures
from moetrace.results.common_figures import CommonFigures
from moetrace.results.figure import Count, Figure, Spread
from moetrace.spec import PolicySpec, canonical

RESULT_SCHEMA = "moetrace.result/1"
TIMELINE_SCHEMA = "moetrace.timeline/1"
SWEEP_SCHEMA = "moetrace.sweep/1"
CELL_SCHEMA = "moetrace.cell/1"
SEARCH_SCHEMA = "moetrace.search/1"
ADVICE_SCHEMA = "moetrace.advice/1"
REBALANCE_SCHEMA = "moetrace.rebalance/1"
BASELINE_SCHEMA = "moetrace.baseline/1"
GATE_SCHEMA = "moetrace.gate/1"

SUMMARY_FILE = "summary.json"
TIMELINE_FILE = "timeline.json.gz"
SWEEP_FILE = "sweep.json"
SEARCH_FILE = "search.json"
ADVICE_FILE = "advice.json"
REBALANCE_FILE = "rebalance.json"
POLICY_FILE = "policy.toml"  # of an advice, the best
CELLS_FILE = "cells.parquet"
TRIALS_FILE = "trials.parquet"
CELLS_FOLDER = "cells"
TABLES = ("steps", "units", "layers", "requests", "experts")  # of a replay, each NAME.parquet

# A write replaces all of these: no file of an older result keeps one of these names.
RESULT_FILES = (SUMMARY_FILE, *(f"{name}.parquet" for name in TABLES), TIMELINE_FILE)
SWEEP_FILES = (SWEEP_FILE, CELLS_FILE, SEARCH_FILE, TRIALS_FILE, ADVICE_FILE, REBALANCE_FILE, POLICY_FILE)
OWN_FILES = frozenset((*RESULT_FILES, *SWEEP_FILES))

# In the metadata of a Parquet file, and in a timeline: the SHA-256 of the summary.json, or sweep.json, that it is of.
PARQUET_MARK = "moetrace.of_sha256"
TIMELINE_MARK = "summary_sha256"


class PolicyFigures(CommonFigures, kw_only=True):
    """One policy of `summary.json`, its fields in the file's order: those of all policies, then those of some."""

    # Only where the system has the table that they are of (`OF_A_TABLE`); else a file does not have them at all.
    energy_j: Annotated[
        float | UnsetType,
        Figure("J", "energy of the replay; only where the system has `[energy]`", "lower", "energy", "energy"),
    ] = UNSET
    energy_per_token_j: Annotated[
        float | UnsetType | None,
        Figure("J", "`energy_j` / decode rows; only with it", "lower", "energy a token", "energy\na token"),
    ] = UNSET
    price_usd: Annotated[
        float | UnsetType,
        Figure("USD", "price of the replay; only where the system has `[price]`", "lower", "price", "price"),
    ] = UNSET
    usd_per_million_tokens: Annotated[
        float | UnsetType | None,
        Figure(
            "USD",
            "`price_usd` / decode rows * 1,000,000; only with it",
            "lower",
            "price of a million tokens",
            "a million\ntokens",
        ),
    ] = UNSET
    host_slots: Annotated[
        Count | UnsetType, Figure("count", "experts that host memory can hold; only where the system has `[disk]`")
    ] = UNSET
    host_hits: Annotated[
        Count | UnsetType,
        Figure("count", "active experts that the GPU did not hold, but host memory did; only with `[disk]`", "higher"),
    ] = UNSET
    host_misses: Annotated[
        Count | UnsetType, Figure("count", "active experts that were read from the disk; only with `[disk]`", "lower")
    ] = UNSET
    host_hit_rate: Annotated[
        float | UnsetType | None,
        Figure(
            "share", "`host_hits` / (`host_hits` + `host_misses`); only with them", "higher", "host hits", "host\nhits"
        ),
    ] = UNSET
    disk_bytes: Annotated[
        float | UnsetType,
        Figure("bytes", "weights that were read from the disk; only with `[disk]`", "lower", "read from disk", "disk"),
    ] = UNSET
    disk_busy: Annotated[
        float | UnsetType | None,
        Figure("share", "busy time of the disk / `total_s`; only with `[disk]`", None, "disk busy", "disk\nbusy"),
    ] = UNSET
    # Only where the link loses packets; else a file does not have them at all.
    resent_bytes: Annotated[
        float | UnsetType,
        Figure("bytes", "what the link carried again, as packets were lost; both ways", "lower", "resent", "resent"),
    ] = UNSET
    gate_mass_dropped: Annotated[
        float | UnsetType,
        Figure(
            "share",
            "gates of choices whose row was lost / all gates; 0 unless the link is relaxed",
            "lower",
            "gate mass dropped",
            "gates\nlost",
        ),
    ] = UNSET
    # Only of policies with prefetch `relayout`, and only where the system has `gpu.evict_us`.
    moved_bytes: Annotated[
        float | UnsetType,
        Figure("bytes", "weights that moved between layouts; only with prefetch `relayout`", "lower", "moved", "moved"),
    ] = UNSET
    moved_s: Annotated[
        float | UnsetType, Figure("s", "seconds in which they moved, beside other work; only with them", "lower")
    ] = UNSET
    evict_s: Annotated[
        float | UnsetType,
        Figure("s", "seconds of evictions, a part of `dense_s` of the steps; only with `gpu.evict_us`", "lower"),
    ] = UNSET
    # Only of policies with remote experts; else a file does not have them at all.
    remote_s: Annotated[
        float | UnsetType,
        Figure("s", "seconds of all copies of remote functions; only with `remote`", "lower", "in functions", "remote"),
    ] = UNSET
    remote_calls: Annotated[
        Count | UnsetType,
        Figure("count", "calls of remote functions; only with `remote`", "lower", "calls of functions", "calls"),
    ] = UNSET
    remote_experts: Annotated[
        Count | UnsetType,
        Figure("count", "active experts per (step, layer) that ran in remote functions; only with `remote`"),
    ] = UNSET
    remote_rows: Annotated[
        Count | UnsetType, Figure("count", "rows of these experts, each counted once an expert; only with `remote`")
    ] = UNSET
    remote_usd: Annotated[
        float | UnsetType,
        Figure("USD", "price of `remote_s`, by memory; only with `remote`", "lower", "price of functions", "functions"),
    ] = UNSET
    cold_s: Annotated[
        float | UnsetType,
        Figure("s", "the cold start, a part of the first step; only with `remote`", "lower", "cold start", "cold"),
    ] = UNSET
    # Only of a policy with a deadline (`OF_A_DEADLINE`).
    in_time: Annotated[
        float | UnsetType | None,
        Figure(
            "share",
            "share of the steps that end within the policy's `deadline_ms`; only with it",
            "higher",
            "steps in time",
            "in\ntime",
        ),
    ] = UNSET
    mean_frequency: Annotated[
        float | UnsetType | None,
        Figure(
            "share",
            "mean over the steps of the frequency of their level, over that of the top; only with `deadline_ms` and "
            "`[[gpu.levels]]`",
            None,
            "frequency, mean",
            "fre-\nquency",
        ),
    ] = UNSET
    # Only of a cluster; else a file does not have it at all.
    cluster: ClusterFigures | UnsetType = UNSET

    # Only where regret was asked for; else a file does not have them at all.
    regret: Annotated[
        float | UnsetType | None,
        Figure(
            "share",
            "time of the experts beyond that under `optimal`, layer by layer from the same state / the latter; only "
            "with `--regret`",
            "lower",
            "regret",
            "regret",
        ),
    ] = UNSET
    regret_equal_share: Annotated[
        float | UnsetType | None,
        Figure(
            "share",
            "active experts that `optimal` would have run on the same device, over the same layers",
            "higher",
            "decisions equal to optimal",
            "as\noptimal",
        ),
    ] = UNSET
    regret_layers: Annotated[
        Count | UnsetType, Figure("count", "layers of all steps that regret is of: all assignments were tried")
    ] = UNSET
    regret_left_out: Annotated[
        Count | UnsetType, Figure("count", "layers of all steps that regret leaves out: too many experts were active")
    ] = UNSET

    @property
    def bound_s(self) -> float:
        """The lower bound; for a folder of an earlier version, which lacks it, the work bound."""
        return self.work_bound_s if self.lower_bound_s is None else self.lower_bound_s


class CellCosts(msgspec.Struct):
    """The costs of a cell of a sweep beside time."""

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
        Figure(
            "USD/h", "USD an hour of the machine, by the system's `[price]`", "lower", "price of the machine", "price"
        ),
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


# Depth of the checks when a file is read: a report takes structs, a gate takes any value that it compares.
TraceForm = TypeVar("TraceForm")
PolicyForm = TypeVar("PolicyForm")


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

    @property
    def of_cluster(self) -> bool:
        """Whether the replay was one of a cluster."""
        return self.system.get("cluster") is not None


Summary = SummaryFile[TraceFacts, PolicyFigures]
PlainSummary = SummaryFile[dict[str, Any], dict[str, Any]]


def choices_of(policy: PolicySpec) -> dict[str, Any]:
    """Return what a policy chose, with the parameters that apply."""
    unread = {"name", *policy.unread}
    return {field: value for field, value in canonical(policy).items() if field not in unread}


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
ACCOUNTS: dict[str, str] = dict.fromkeys(("energy_j", "energy_per_token_j"), "energy")
ACCOUNTS |= dict.fromkeys(("price_usd", "usd_per_million_tokens"), "price")
# Figures that a Pareto front may set against time.
FRONTS = (*COSTS, "energy_j", "price_usd")

_OF_DISK = ("host_slots", "host_hits", "host_misses", "host_hit_rate", "disk_bytes", "disk_busy")
# Figures of policies with remote experts only.
OF_REMOTE = ("remote_s", "remote_calls", "remote_experts", "remote_rows", "remote_usd", "cold_s")
# Figures that a system without a table does not have, and that table; and all that a file may lack.
OF_A_TABLE = dict.fromkeys(_OF_DISK, "disk") | ACCOUNTS
OF_A_DEADLINE = ("in_time", "mean_frequency")  # only where the policy has `deadline_ms`
OF_REGRET = ("regret", "regret_equal_share", "regret_layers", "regret_left_out")
OF_CLUSTER = tuple(name for name in FIGURES if name.startswith("cluster."))
OF_A_LOSS = ("resent_bytes", "gate_mass_dropped")  # only where the system has `link.loss`
OF_RELAYOUT = ("moved_bytes", "moved_s")  # only of policies with that prefetch
OF_EVICTIONS = ("evict_s",)  # only where the system has `gpu.evict_us`
_ON_A_LINK = (*OF_A_LOSS, *OF_RELAYOUT, *OF_EVICTIONS)
OPTIONAL = frozenset((*OF_A_TABLE, *_ON_A_LINK, *OF_REMOTE, *OF_A_DEADLINE, *OF_CLUSTER, *OF_REGRET))


def is_absent(name: str, policy: Mapping[str, Any]) -> bool:
    """Whether a policy's part of summary.json does not have a figure of `OPTIONAL`."""
    return name in OPTIONAL and name.partition(".")[0] not in policy


def value_in(policy: Mapping[str, Any], name: str, check: Callable[[Any], Any] = lambda value: value) -> Any:
    """Return a figure of a policy's part of summary.json; of a list the mean of its defined values, or None.

    `check` returns each number as it is to be used; by default as it is. One of `OPTIONAL` may be absent: None.
    """
    if is_absent(name, policy):
        return None
    value: Any = policy
    for key in name.split("."):
        value = value[key]
    if not isinstance(value, list):
        return check(value)
    known = [one for one in map(check, value) if one is not None]
    return math.fsum(known) / len(known) if known else None
