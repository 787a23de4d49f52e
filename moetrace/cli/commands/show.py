"""`moetrace show`: one resolved spec, and every quantity that follows from it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from moetrace.cli.options.code import code_option
from moetrace.cli.options.overrides import set_option, split_settings
from moetrace.cli.options.presets import MODEL, complete_spec
from moetrace.cli.tables.output import format_option_with, print_json, print_rows, print_text, say
from moetrace.spec.errors import UsageError

if TYPE_CHECKING:
    from moetrace.spec import Model, PolicySpec, System
    from moetrace.spec.derived import Derived


# Text for a policy's parameter that is not set.
_UNSET = {
    "half_life": "not set: counts are never halved",
    "gpu_layers": "not set: the layers that fit",
    "gpu_layers_end": "not set: the last layers",
    "most_count": "not set: 12",
    "evicted_share": "not set: 0.5",
    "margin": "not set: 0.1",
    "ahead_layers": "not set: 6",
    "follows": "not set: true",
    "now_weight": "not set: 1",
    "long_weight": "not set: 2",
    "gpu_rows": "not set: nothing is fetched in any step",
    "layout": "not set: expert e whole on unit e mod N",
    "loads": "not set: the first plan_steps steps say it",
    "plan_steps": "not set: 32",
    "with_cpu": "not set: a CPU beside units takes part where the dispatch uses it",
}


@click.command("show")
@click.argument("kind", type=click.Choice(["model", "system", "policy"]), metavar="model|system|policy")
@click.argument("name", shell_complete=complete_spec)
@click.option(
    "--model", "model_name", type=MODEL, metavar="MODEL", help="With a system: also what this model means on it."
)
@set_option
@code_option
@format_option_with("toml", "the spec as a TOML file to keep")
def command(kind: str, name: str, model_name: str | None, settings: tuple[str, ...], code: bool, form: str) -> None:
    """Print a resolved spec and what follows from it.

    NAME is a preset (see `moetrace list`) or the path of a TOML file. A model can also be your own: the folder or the
    config.json of a Hugging Face model, or a GGUF file; `--format toml` prints it as a file to keep.
    """
    if model_name and kind != "system":
        raise UsageError(f"--model goes with `show system` only, not with `show {kind}`.")
    from moetrace.spec import check_fits, derived, load_model, load_policy, load_system

    overrides = split_settings(settings, [kind, "model"] if model_name else [kind])
    if kind == "model":
        model = load_model(name, overrides["model"])
        _print(model, derived.model_figures(model), form)
    elif kind == "policy":
        _print(load_policy(name, overrides["policy"], code=code), [], form)
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
            say(f"A replay would be refused: {misfit}")


def _print(spec: "Model | System | PolicySpec", figures: "list[Derived]", form: str) -> None:
    from moetrace.spec import PolicySpec, canonical

    resolved = canonical(spec)
    if isinstance(spec, PolicySpec):
        resolved = {field: value for field, value in resolved.items() if field not in spec.unread}
    if form == "toml":
        from moetrace.spec.toml_text import toml

        print_text(toml(resolved).rstrip("\n"))
        return
    if form == "json":
        print_json({"spec": resolved, "derived": {row.name: row.value for row in figures}})
        return
    leaves = resolved.items() if isinstance(spec, PolicySpec) else _leaves(resolved)
    fields = [{"part": "spec", "name": field, "value": value} for field, value in leaves]
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
    from moetrace.spec.choices import KINDS, find
    from moetrace.spec.policy import SCOPES

    if field == "scope":
        return SCOPES[str(value)]
    if field not in KINDS:
        return _UNSET.get(field, "") if value is None else ""
    record = find(field, str(value))
    return record.meaning if record else "a user's own function"


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted path and value of each field that is set; a list becomes one text."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", " ".join(map(_entry, value)) if isinstance(value, list) else value


def _entry(value: object) -> str:
    """An entry of a list; of a table its values."""
    return "/".join(map(str, value.values())) if isinstance(value, dict) else str(value)
