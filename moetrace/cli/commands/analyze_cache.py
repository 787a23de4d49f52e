"""`moetrace analyze cache`: how often experts would have been in a cache of a given size."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from moetrace.cli.options.listing import ListingOption
from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.phases import check_phase
from moetrace.cli.options.presets import MODEL, SYSTEM
from moetrace.cli.options.targets import check_picture, check_targets
from moetrace.cli.options.without_effect import refuse
from moetrace.cli.tables.output import format_option, print_csv, print_json, say
from moetrace.spec.choices import cache_policies, cache_policy
from moetrace.spec.errors import UsageError
from moetrace.spec.load import AUTO

if TYPE_CHECKING:
    from moetrace.trace import Trace


class _Budget(click.ParamType):
    """`auto`, or the path of a file."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == AUTO else ANY_PATH.convert(value, param, ctx)


BUDGET = _Budget()


class _PolicyName(click.ParamType):
    """A name of a cache policy; installed ones are read only if no built-in one has the name."""

    name = "policy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if cache_policy(value) else click.Choice(tuple(cache_policies())).convert(value, param, ctx)


@click.command("cache")
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@click.option(
    "--capacity",
    "capacities",
    multiple=True,
    metavar="C",
    help="Experts (400) or bytes (3000MiB, 3GB) that the cache of all layers holds; may be repeated. By default an "
    "eighth, a quarter and a half of all experts.",
)
@click.option(
    "--policy",
    "policies",
    cls=ListingOption,
    listed=cache_policies,
    multiple=True,
    type=_PolicyName(),
    default=("lru", "lfu", "belady"),
    show_default=True,
    metavar="P",
    help="Who is evicted, one of {listed}; may be repeated.",
)
@click.option(
    "--scope",
    type=click.Choice(["global", "layer", "request"]),
    default="global",
    show_default=True,
    help="One cache that all layers share, or one of an equal part for each layer, or one that all share and that is "
    "emptied when no request is under way.",
)
@click.option(
    "--budget",
    type=BUDGET,
    metavar="B",
    help="With --scope layer, the experts that each layer's cache holds: FILE.csv with a number a line, or auto, by "
    "the choices of the first prompts.",
)
@click.option(
    "--phase",
    type=click.Choice(["all", "prefill", "decode", "mixed"]),
    help="Print only this phase (all: all steps together); everything is replayed all the same.",
)
@click.option("--sequential", is_flag=True, help="Demand one choice at a time, as general cache simulators do.")
@click.option(
    "--model",
    type=MODEL,
    metavar="M",
    help="Preset or model file with the sizes of experts, if the trace has no sizes.",
)
@click.option(
    "--system", type=SYSTEM, metavar="S", help="Preset or TOML file of the machine that fetches missed experts."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the bootstrap.")
@click.option(
    "--observed",
    metavar="RATE",
    help="Say instead which budget of each policy explains a measured hit rate: 62%, 0.62, or `recorded`, that of the "
    "trace's own record. It is that of decode steps if there are, else of all, unless --phase says otherwise.",
)
@click.option("--curve", is_flag=True, help="Say instead what LRU caches of every capacity hit, from one pass.")
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="Phase of a curve by layer.")
@click.option(
    "--export",
    "out",
    type=ANY_PATH,
    metavar="FILE.csv",
    help="Write the experts that static-hindsight keeps at the one --capacity, for residency static of a replay.",
)
@click.option("--plot", "picture", type=ANY_PATH, metavar="FILE", help="Draw it: FILE.png or .html.")
@format_option
def command(
    trace: Path, form: str, phase: str | None, curve: bool, picture: Path | None, out: Path | None, **asked: Any
) -> None:
    """Say how often experts would have been in a cache of a given size, under each policy.

    The experts of one layer in one step are demanded together, each one time, however many rows chose it; caches start
    empty. Belady's policy knows the future: at equal sizes no other keeps more of the needed experts, and its misses
    are more than fits. Hit rates come with half of their 95 % confidence interval over requests. If the trace holds
    what its engine recorded, the last column says how much of that each cache reproduces. docs/cache.md defines all of
    it.
    """
    from moetrace.cli.progress import LateBar
    from moetrace.trace import Trace

    observed = asked.pop("observed")
    _check_options(curve, picture, asked)
    if observed is not None:
        _check_observed(curve, picture, out)
    _check_export(out, curve, asked)
    read = [trace, asked["system"], asked["model"], asked["budget"]]
    check_targets({"--export": out, "--plot": picture}, read)
    check_picture(picture)
    with Trace.open(trace) as opened:
        from moetrace.cli.tables.cache_table import print_cache, print_curve, title_of

        check_phase(opened, phase)
        if observed is not None:
            _explain(opened, str(trace), observed, phase, asked, form)
            return
        title = title_of(opened, asked["scope"], asked["sequential"], asked["budget"])
        draws_curve = picture is not None and _draws_curve(opened, asked)
        if curve:
            found = every = _curve(opened, asked)
        else:
            asked["capacities"] = asked["capacities"] or _sixteenths(opened, asked, (2, 4, 8))
            drawn = _sixteenths(opened, asked, range(1, 17)) if picture else ()
            with LateBar("rows", opened.rows) as bar:
                every = _hits(opened, asked, bar, [*asked["capacities"], *drawn])
            found = every.filter(every["capacity"].is_in(list(asked["capacities"])))
        if out is not None:
            _export(out, opened, asked)
        if picture is not None:
            whole = _curve(opened, asked) if draws_curve else None
            _draw(picture, trace.name, every, whole, title, phase=phase, marked=asked["capacities"])
        if not curve:
            _note_small(found["capacity"].unique(maintain_order=True).to_list(), opened, asked)
    if phase is not None:
        found = found.filter(phase=phase)
    if form == "json":
        print_json(found.to_dicts())
    elif form == "csv":
        print_csv(found)
    elif curve:
        print_curve(found, f"{trace}: {title}")
    else:
        print_cache(found, f"{trace}: {title}", phase)


def _note_small(capacities: list[str], trace: "Trace", asked: dict[str, Any]) -> None:
    """Say which capacities hold less than an expert or a row needs of a layer, and why no bytes are known."""
    from moetrace.analyze.cache.hits import parse_capacity
    from moetrace.analyze.sizes import expert_bytes
    from moetrace.trace.naming import other_bits

    sizes = expert_bytes(trace, asked["model"])
    if sizes is None and (why := other_bits(trace.model, trace.layers, trace.num_experts)):
        say(f"moetrace: note: {trace.shown}: {why}")
    by_layer = asked["scope"] == "layer"
    for label in capacities:
        amount, unit, _ = parse_capacity(label)
        amount //= trace.layers if by_layer else 1
        expert = 1 if unit == "experts" or sizes is None else int(sizes.min())
        where = f"leaves each of the {trace.layers} layers a cache of" if by_layer else "is a cache of"
        holds = f"capacity {label} {where} {amount // expert} experts"
        if amount < expert:
            of = f", since one has {expert:,} bytes" if expert > 1 else ""
            say(f"moetrace: note: {holds}{of}.")
        elif amount < expert * trace.top_k and not asked["sequential"]:
            holds = holds.removesuffix("s") if amount // expert == 1 else holds
            say(f"moetrace: note: {holds}, but a row chooses {trace.top_k} in a layer.")


def _check_observed(curve: bool, picture: Path | None, out: Path | None) -> None:
    """Refuse what would have no effect beside --observed."""
    refuse(("system", "seed", "budget"), "has no effect with --observed.")
    for option, given in (("--curve", curve), ("--plot", picture), ("--export", out)):
        if given:
            raise UsageError(f"{option} has no effect with --observed: leave out one of them.")


def _explain(trace: "Trace", name: str, observed: str, phase: str | None, asked: dict[str, Any], form: str) -> None:
    """Print which budgets explain a hit rate."""
    from moetrace.analyze.cache.observed import OBSERVED_POLICIES, explain_hit_rate, parse_rate
    from moetrace.cli.progress import LateBar
    from moetrace.trace.schema import DECODE

    rate = parse_rate(observed)
    phase = phase or ("decode" if (trace.phase == DECODE).any() else "all")
    given = click.get_current_context().get_parameter_source("policies") is not ParameterSource.DEFAULT
    policies = asked["policies"] if given else OBSERVED_POLICIES
    how = {name: asked[name] for name in ("scope", "sequential", "model")}
    with LateBar("rows", trace.rows) as bar:
        found = explain_hit_rate(
            trace, rate, policies, list(asked["capacities"]), phase=phase, **how, progress=bar.advance
        )
    if form == "json":
        print_json(found.to_dicts())
    elif form == "csv":
        print_csv(found)
    else:
        from moetrace.cli.tables.cache_table import print_explained, title_of

        title = f"{name}: {title_of(trace, asked['scope'], asked['sequential'])}"
        print_explained(found, title, trace.layers, recorded=rate is None)


def _check_options(curve: bool, picture: Path | None, asked: dict[str, Any]) -> None:
    """Refuse what would have no effect."""
    if asked["scope"] != "layer":
        refuse(("budget",), "is for caches of their own for each layer: use --scope layer.")
    if curve:
        if asked["scope"] == "request":
            raise UsageError("--curve is of caches that are never emptied: use --scope global or layer.")
        unread = ("budget", "capacities", "policies", "model", "system", "seed")
        refuse(unread, "has no effect with --curve, which is of LRU at every capacity.")
        if picture is not None:
            raise UsageError("--plot draws the whole curve of LRU beside the other policies: leave out --curve.")
    if picture is not None and (asked["scope"] == "request" or asked["budget"] is not None):
        raise UsageError(
            "--plot draws caches of equal parts that are never emptied: use --scope global or layer, without --budget."
        )
    draws = picture is not None and "lru" in asked["policies"]
    if not (asked["scope"] == "layer" and (curve or draws)):
        refuse(("threads",), "is for LRU's curve of --scope layer: with --curve, or with --plot and --policy lru.")


def _draws_curve(trace: "Trace", asked: dict[str, Any]) -> bool:
    """Whether the picture has LRU's whole curve; raises UsageError if it cannot be drawn at all."""
    from moetrace.analyze.cache.hit_curve import has_curve
    from moetrace.analyze.cache.hits import parse_capacity

    units = {parse_capacity(capacity).unit for capacity in asked["capacities"]}
    if len(units) > 1:
        raise UsageError("--plot needs capacities of one kind: all in experts, or all in bytes.")
    if "lru" not in asked["policies"] or "bytes" in units:
        refuse(("threads",), "is for LRU's curve, which this picture does not have.")
        return False
    if has_curve(trace):
        return True
    said = f"{trace.layers} x {trace.num_experts} experts are too many for LRU's whole curve"
    say(f"moetrace: note: {said}: it is drawn from the capacities of the table.")
    return False


def _check_export(out: Path | None, curve: bool, asked: dict[str, Any]) -> None:
    """Refuse at once what would only fail after the work."""
    if out is None:
        return
    if asked["budget"] is not None:
        raise UsageError("--export writes the set of equal parts: leave out --budget.")
    if curve or "static-hindsight" not in asked["policies"] or len(asked["capacities"]) != 1:
        raise UsageError("--export writes the set of static-hindsight: ask for that --policy, and for one --capacity.")
    if out.suffix.lower() != ".csv":
        raise UsageError(f"--export {out}: the name must end with .csv.")


def _export(out: Path, trace: "Trace", asked: dict[str, Any]) -> None:
    from moetrace.analyze.cache.hits import hindsight_set
    from moetrace.trace.atomic import whole_file

    how = {name: asked[name] for name in ("scope", "sequential", "model")}
    lines = ["layer,expert", *(f"{layer},{e}" for layer, e in hindsight_set(trace, asked["capacities"][0], **how))]
    with whole_file(out) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _sixteenths(trace: "Trace", asked: dict[str, Any], shares: Iterable[int]) -> list[str]:
    """Capacities of the given sixteenths of all experts; in bytes if the requested ones are."""
    from moetrace.analyze.cache.hits import parse_capacity
    from moetrace.analyze.sizes import expert_bytes, own_experts

    everything, unit = int(own_experts(trace).sum()), ""
    if any(parse_capacity(capacity).unit == "bytes" for capacity in asked["capacities"]):
        sizes = expert_bytes(trace, asked["model"])
        if sizes is None:  # said by what replays them
            return []
        everything, unit = int(sizes.sum()), "B"
    return [f"{max(1, everything * share // 16)}{unit}" for share in shares]


def _hits(trace: "Trace", asked: dict[str, Any], bar: Any, capacities: list[str]) -> Any:
    """The frame at these capacities."""
    from moetrace.analyze.cache.hits import cache_hits

    return cache_hits(
        trace,
        list(dict.fromkeys(capacities)),
        list(dict.fromkeys(asked["policies"])),
        scope=asked["scope"],
        budget=asked["budget"],
        sequential=asked["sequential"],
        model=asked["model"],
        system=asked["system"],
        seed=asked["seed"],
        progress=bar.advance,
    )


def _curve(trace: "Trace", asked: dict[str, Any]) -> Any:
    from moetrace.analyze.cache.hit_curve import lru_curve
    from moetrace.cli.progress import LateBar

    how = {name: asked[name] for name in ("scope", "sequential", "threads")}
    with LateBar("rows, for the curve", trace.rows) as bar:
        return lru_curve(trace, **how, progress=bar.advance)


def _draw(picture: Path, name: str, found: Any, curve: Any, title: str, **shown: Any) -> None:
    from moetrace.show.plots.cache_plot import plot
    from moetrace.trace.atomic import write_whole

    write_whole({picture: plot(found, curve, picture.suffix[1:].lower(), name, title, **shown)})
