"""`moetrace show`: one resolved spec, and every quantity that follows from it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from moetrace.cli.options.overrides import set_option, split_settings
from moetrace.cli.tables.output import format_option, print_json, print_rows
from moetrace.spec.errors import UsageError

if TYPE_CHECKING:
    from moetrace.spec import Model, PolicySpec, System
    from moetrace.spec.derived import Derived

# What each choice of a policy means; a parameter behind a colon and a user's own function are cut off first.
_MEANINGS = {
    ("placement", "ep"): "each expert whole on one unit, unit = id mod N",
    ("placement", "ep-block"): "each expert whole on one unit, equal blocks of ids",
    ("placement", "ep-lpt"): "each expert whole on one unit, longest load first",
    ("placement", "eplb"): "each expert whole on one unit, equally many on each, longest load first",
    ("placement", "plan"): "each expert whole on the unit that a plan's file says",
    ("placement", "tp"): "each expert split over all units, or over groups of g",
    ("dispatch", "ndp"): "all active experts run on the NDP units",
    ("dispatch", "gpu"): "all active experts run on the GPU, missing ones are fetched",
    ("dispatch", "hot"): "the most demanded experts are fetched to the GPU, the rest stay",
    ("dispatch", "balance"): "experts move to the GPU one by one while the layer gets faster",
    ("dispatch", "optimal"): "the split between GPU and units of least time",
    ("residency", "none"): "the GPU keeps no expert",
    ("residency", "static"): "the GPU keeps a given set",
    ("residency", "static-hindsight"): "the GPU keeps what the whole trace demands most, once fetched",
    ("residency", "fifo"): "the GPU drops what it has kept longest",
    ("residency", "sieve"): "the GPU drops the first not demanded since a hand passed it",
    ("residency", "lru"): "the GPU drops what was touched longest ago",
    ("residency", "lfu"): "the GPU drops what was demanded least",
    ("residency", "lfu-in-cache"): "the GPU drops what was demanded least since it is kept",
    ("residency", "least-stale"): "the GPU drops an expert of the layer that comes round last",
    ("residency", "prefill"): "the GPU keeps what the running requests' prompts used most",
    ("residency", "ewma"): "the GPU drops what has the least moving average of load",
    ("residency", "belady"): "the GPU drops what is needed farthest in the future",
    ("prefetch", "none"): "weights move on demand alone",
    ("prefetch", "prefill"): "what the prompts used most moves after each prefill",
    ("prefetch", "online"): "up to m experts of a layer move when their score earns a slot",
    ("prefetch", "oracle"): "what the next d layers need moves ahead, with probability p",
    ("scope", "layer"): "each layer has its own share of the slots",
    ("scope", "global"): "all layers share the slots",
}


@click.command("show")
@click.argument("kind", type=click.Choice(["model", "system", "policy"]))
@click.argument("name")
@click.option("--model", "model_name", metavar="MODEL", help="With a system: also what this model means on it.")
@set_option
@format_option
def command(kind: str, name: str, model_name: str | None, settings: tuple[str, ...], form: str) -> None:
    """Print a resolved spec and what follows from it.

    NAME is a preset (see `moetrace list`) or the path of a TOML file.
    """
    if model_name and kind != "system":
        raise UsageError(f"--model goes with `show system` only, not with `show {kind}`.")
    from moetrace.spec import check_fits, derived, load_model, load_policy, load_system

    overrides = split_settings(settings, [kind, "model"] if model_name else [kind])
    if kind == "model":
        model = load_model(name, overrides["model"])
        _print(model, derived.model_figures(model), form)
    elif kind == "policy":
        _print(load_policy(name, overrides["policy"]), [], form)
    else:
        system = load_system(name, overrides["system"])
        figures = derived.system_figures(system)
        if not model_name:
            _print(system, figures, form)
            return
        model = load_model(model_name, overrides["model"])
        _print(system, figures + derived.pair_figures(model, system), form)
        try:
            check_fits(model, system, model.expert_bytes())
        except UsageError as misfit:
            click.echo(f"A replay would be refused: {misfit}", err=True)


def _print(spec: "Model | System | PolicySpec", figures: "list[Derived]", form: str) -> None:
    from moetrace.spec import PolicySpec, canonical

    resolved = canonical(spec)
    if isinstance(spec, PolicySpec):
        resolved = {field: value for field, value in resolved.items() if field not in spec.unread}
    if form == "json":
        print_json({"spec": resolved, "derived": {row.name: row.value for row in figures}})
        return
    fields = [{"part": "spec", "name": field, "value": value} for field, value in _leaves(resolved)]
    derived = [{"part": "derived"} | row._asdict() for row in figures]
    if form == "csv":
        print_rows({"part": "part", "name": "name", "value": "value"}, fields + derived, form)
        return
    if isinstance(spec, PolicySpec):
        rows = [row | {"meaning": _meaning(row["name"], row["value"])} for row in fields]
        print_rows({"name": "field", "value": "value", "meaning": "meaning"}, rows, form)
    else:
        print_rows({"name": "field", "value": "value"}, fields, form)
    if derived:
        click.echo()
        print_rows({"name": "derived", "value": "value", "meaning": "meaning"}, derived, form)


def _meaning(field: str, value: object) -> str:
    kind = str(value).partition(":")[0]
    return "a user's own function" if kind.endswith(".py") else _MEANINGS.get((field, kind), "")


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted path and value of each field that is set; a list becomes one text."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", " ".join(map(str, value)) if isinstance(value, list) else value
