"""The table of `moetrace replay`: policies side by side, in parts that fit the terminal's width."""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from moetrace.cli.tables.output import stdout_console
from moetrace.cli.tables.parts import TextColumn, print_parts
from moetrace.engine.dispatch import OPTIMAL_UP_TO
from moetrace.results.figure import Figure
from moetrace.results.figure_text import beyond, digits, shown_unit
from moetrace.results.record import FIGURES, value_in
from moetrace.spec.cluster_policy import AUTO
from moetrace.spec.errors import counted
from moetrace.spec.known import Calibration, how_known

_PARTS = ("gpu", "ndp", "cpu", "host", "link", "disk", "remote", "network")  # tables of a system that hold constants


class _FigureColumn(NamedTuple):
    figure: Figure
    value: Callable[[dict[str, Any]], float | None]  # of a policy, in the figure's own unit
    always: bool | None = True  # False: only if a policy has something else than zero; None: only if one has it

    def text(self, values: list[float | None]) -> TextColumn:
        """The column, in the unit that suits its values."""
        factor, sign = shown_unit(self.figure, values)
        scaled = [None if value is None else factor * value for value in values]
        return TextColumn(self.figure.column_in(sign), _cells(self.figure.unit, scaled))


def _column(name: str, always: bool | None = True, **changes: Any) -> _FigureColumn:
    """The column of a figure of `summary.json`, as `results.record` has it, with these changes."""
    return _FigureColumn(FIGURES[name]._replace(**changes), lambda policy: value_in(policy, name), always)


def _beyond(heading: str, bound: str) -> _FigureColumn:
    """The time beyond a yardstick."""
    return _FigureColumn(Figure("s", "", heading=heading), lambda policy: beyond(policy["total_s"], policy[bound]))


def _over(heading: str, bound: str) -> _FigureColumn:
    """The same as a share of the yardstick."""

    def share(policy: dict[str, Any]) -> float | None:
        return beyond(policy["total_s"], policy[bound]) / policy[bound] if policy[bound] else None

    return _FigureColumn(Figure("share", "", heading=heading), share)


def print_comparison(summary: dict[str, Any], name: str) -> None:
    """Print what `summary.json` holds as a table on stdout; `name` is what the user called the trace."""
    console = stdout_console()
    policies = summary["policies"]
    names = TextColumn("policy", [policy["name"] for policy in policies], right=False)
    groups = _cluster_groups() if summary["system"].get("cluster") else _groups()
    print_parts(console, [names], [shown for group in groups if (shown := _shown(group, policies))])
    console.print()
    for line in _legend(summary, name):
        console.print(line)


def _groups() -> list[list[_FigureColumn]]:
    """Columns that should stay together: time, latency, what could be saved, how the machine is used."""
    return [
        *_times_and_latencies(),
        [
            _beyond("over bound", "lower_bound_s"),
            _over("", "lower_bound_s"),
            _beyond("over clairv.", "clairvoyant_s"),
            _over("", "clairvoyant_s"),
        ],
        [
            _column("hit_rate"),
            _column("utilization.gpu"),
            _column("utilization.ndp", always=False),
            _column("utilization.cpu", always=False),
            _column("utilization.link_in", always=False),
            _column("demand_bytes", always=False),
            _column("prefetch_bytes", always=False),
            _column("resent_bytes", always=False),
            _column("gate_mass_dropped", always=False),
        ],
        [_column("regret", always=None), _column("regret_equal_share", always=None)],
        [
            _column("host_hit_rate", always=False),
            _column("disk_bytes", always=False),
            _column("disk_busy", always=False),
        ],
        [
            _column("remote_s", always=False),
            _column("remote_calls", always=False),
            _column("remote_usd", always=False),
            _column("cold_s", always=False),
        ],
    ]


def _times_and_latencies() -> list[list[_FigureColumn]]:
    """Columns that every machine has."""
    return [
        [
            _column("total_s"),
            _column("speedup"),
            _column("prefill_s", always=False),
            _column("decode_s", always=False),
            _column("mixed_s", always=False),
        ],
        [
            _column("ttft_s.p50", always=False),
            _column("tpot_s.p50", always=False),
            _column("itl_s.p50", always=False),
            _column("itl_s.p99", always=False),
            _column("tokens_per_s", always=False),
            _column("break_even_tokens", always=False),
            _column("in_time", always=None),
            _column("mean_frequency", always=None),
        ],
    ]


def _cluster_groups() -> list[list[_FigureColumn]]:
    """The same of a cluster: time, latency, where the time goes, how even the work is, what plans and kernels cost."""
    shares = (f"cluster.{stage}_share" for stage in ("attention", "dispatch", "experts", "combine"))
    taxes = (f"cluster.{tax}_tax_s" for tax in ("launch", "locality", "barrier"))
    return [
        *_times_and_latencies(),
        [
            _over("over bound", "lower_bound_s"),
            _column("cluster.exposed_s"),
            *(_column(name) for name in shares),
        ],
        [
            _column("imbalance_mean", heading="time\nmax/mean"),
            _column("cluster.imbalance_rows"),
            _column("cluster.fan_out", unit="count"),
            _column("utilization.gpu"),
            _column("cluster.network_bytes"),
        ],
        [
            _column("cluster.moved_bytes", always=False),
            _column("cluster.pause_s", always=False),
            *(_column(name, always=False) for name in taxes),
        ],
    ]


def _shown(group: list[_FigureColumn], policies: list[dict[str, Any]]) -> list[TextColumn]:
    """The columns of a group that have something to show, with a cell for each policy."""
    figures = [(column, [column.value(policy) for policy in policies]) for column in group]
    return [
        column.text(values)
        for column, values in figures
        if column.always or any(values) or (column.always is None and values.count(None) < len(values))
    ]


def _cells(unit: str, values: list[float | None]) -> list[str]:
    """The figures of a column, with an equal number of digits after the point; `-` where undefined."""
    if unit == "share":
        return digits(values, 1)
    if unit == "ratio":
        return [text if text == "-" else f"{text}x" for text in digits(values, 2)]
    is_whole = all(value is None or float(value).is_integer() for value in values)
    return digits(values, significant=1 if unit == "count" and is_whole else 4)


def _legend(summary: dict[str, Any], name: str) -> list[str]:
    trace, model, system, policies = (summary[key] for key in ("trace", "model", "system", "policies"))
    if system.get("cluster"):
        return _cluster_legend(summary, name)
    home = ""  # experts lie in the GPU's memory, or behind a link that fetches them
    if system["ndp"]:
        home = f" with {counted(system['ndp']['units'], 'NDP unit')}{' and a CPU' if _uses_cpu(policies) else ''}"
    elif system["cpu"] and system["link"]:
        home = " with a CPU"
    each = model["experts"]  # one number, or one for each layer
    everything = model["moe_layers"] * each if isinstance(each, int) else sum(each)
    bounds_ms = digits(sorted({1e3 * policy["lower_bound_s"] for policy in summary["policies"]}), significant=4)
    bound = f"the {bounds_ms[0]} ms that no policy beats, whatever it foresees"
    if bounds_ms[0] != bounds_ms[-1]:
        least, most = bounds_ms[0], bounds_ms[-1]
        bound = f"the least possible with a policy's placement, devices and first residents, {least} to {most} ms"
    layers = trace["steps"] * trace["layers"]
    return [
        f"{name}: {counted(trace['rows'], 'row')} in {counted(trace['steps'], 'step')} of "
        f"{counted(trace['requests'], 'request')}. Model {model['name']} on {system['name']}{home}; "
        f"the GPU keeps up to {summary['slots']:,} of {counted(everything, 'expert')} (slots)"
        f"{_host(summary['policies'])}.",
        "TTFT, TPOT and ITL (the time between two tokens) are medians, except the p99. "
        f"Over bound: time beyond {bound}. "
        "Over clairvoyant: beyond the same policy with what a layer needs already on the GPU, up to the slots"
        f"{', and all else in host memory' if system.get('disk') else ''}.",
        *_speculation(summary),
        *_deadlines(summary),
        *_functions(summary["policies"]),
        *_known(summary),
        *(
            f"{policy['name']}: {policy['optimal_fallbacks']:,} of {counted(layers, 'layer')} of all steps had more "
            f"than {OPTIMAL_UP_TO} active experts and were dispatched by balance."
            for policy in summary["policies"]
            if policy["optimal_fallbacks"]
        ),
        *_regret(summary["policies"]),
    ]


def _host(policies: list[dict[str, Any]]) -> str:
    """Say how many experts host memory keeps above a disk; nothing on a machine without one."""
    slots = policies[0].get("host_slots")
    return "" if slots is None else f", host memory up to {slots:,}; others are read from the disk"


def _regret(policies: list[dict[str, Any]]) -> list[str]:
    """Say what regret is, and which layers it leaves out; nothing where it was not asked for."""
    if "regret" not in policies[0]:
        return []
    left_out: dict[tuple[int, int], list[str]] = {}
    for policy in policies:
        if policy["regret_left_out"]:
            layers = policy["regret_layers"] + policy["regret_left_out"]
            left_out.setdefault((policy["regret_left_out"], layers), []).append(policy["name"])
    return [
        "Regret: time of the experts beyond the best assignment's, layer by layer from the same state. As optimal: "
        "active experts that it runs on the same device.",
        *(
            f"{', '.join(names)}: regret leaves out {count:,} of {counted(layers, 'layer')} of all steps, with too "
            "many active experts to try all assignments."
            for (count, layers), names in left_out.items()
        ),
    ]


def _cluster_legend(summary: dict[str, Any], name: str) -> list[str]:
    trace, model, system = summary["trace"], summary["model"], summary["system"]
    cluster = system["cluster"]
    gpus = f"{cluster['gpus']} GPUs" if cluster["gpus"] else ""
    gpus = gpus or f"{counted(cluster['attention'], 'GPU')} for attention and {cluster['experts']} for experts"
    chosen = (
        f"{policy['name']} runs {phase} steps by {cut}."
        for policy in summary["policies"]
        if policy["choices"].get("schedule") == AUTO
        for phase, cut in policy["cluster"]["cuts"].items()
    )
    return [
        f"{name}: {counted(trace['rows'], 'row')} in {counted(trace['steps'], 'step')} of "
        f"{counted(trace['requests'], 'request')}. Model {model['name']} on {system['name']}, {gpus}.",
        "TTFT, TPOT and ITL (the time between two tokens) are medians, except the p99. Over bound: time beyond all "
        "work shared out evenly over the GPUs, without transfers. Exposed: time beyond the same steps with transfers "
        "that take none. Shares of the total: parts of a step that overlap may sum to more than 100 %.",
        *chosen,
        *_speculation(summary),
        *_known(summary),
    ]


def _speculation(summary: dict[str, Any]) -> list[str]:
    """Say what the break-even is, and beside it what the trace keeps."""
    if all(policy["break_even_tokens"] is None for policy in summary["policies"]):
        return []
    trace = summary["trace"]
    steps = trace["tokens"] - trace["accepted_rows"]  # in which a request brought a token
    return [
        "Break-even: what a step that verifies several rows of a request costs, in steps of one row. Speculation pays "
        f"where it keeps more tokens a step; this trace keeps {trace['tokens'] / max(steps, 1):.2f}. The time of the "
        "draft model is not in it.",
    ]


def _deadlines(summary: dict[str, Any]) -> list[str]:
    """Say what policies with a deadline chose, and which figures are not of the chosen levels."""
    deadlines = {policy["name"]: policy["choices"].get("deadline_ms") for policy in summary["policies"]}
    told = [f"{name} {deadline_ms:g} ms" for name, deadline_ms in deadlines.items() if deadline_ms is not None]
    if not told:
        return []
    words = f"In time: steps that end within deadline_ms ({', '.join(told)})."
    if any(policy.get("mean_frequency") is not None for policy in summary["policies"]):
        words += (
            " Each step runs at the lowest frequency level that is in time, at the top if none is; times are of these "
            "levels, bounds of the top."
        )
    return [words]


def _functions(policies: list[dict[str, Any]]) -> list[str]:
    """Say what the columns of remote functions are, if a policy has some."""
    if not any("remote_s" in policy for policy in policies):
        return []
    return [
        "Remote: the time of all copies of functions, their calls and their price, which the machine's is not in. "
        "Cold: the start of machine and functions, a part of the first step and of its TTFT."
    ]


def _known(summary: dict[str, Any]) -> list[str]:
    """Say how well the constants of the parts that policies use are known, if the machine's spec does."""
    system, policies = summary["system"], summary["policies"]
    table = msgspec.convert(system.get("calibration"), dict[str, Calibration] | None)
    idle = set() if _uses_cpu(policies) else {"cpu"}
    idle |= set() if any("remote_s" in policy for policy in policies) else {"remote"}
    words = how_known(system.get("known"), table, [part for part in _PARTS if system.get(part) and part not in idle])
    return [f"Constants of {system['name']}: {words}."] if words else []


def _uses_cpu(policies: list[dict[str, Any]]) -> bool:
    """Whether a policy ran an expert on the CPU."""
    return any(policy["utilization"]["cpu"] for policy in policies)
