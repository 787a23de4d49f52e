"""The option `--set`: single fields of a model, system or policy, from the command line."""

from collections.abc import Iterable

import click

from moetrace.spec.errors import UsageError

set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KIND.FIELD=VALUE",
    help="Override one field of a spec, as in system.ndp.units=4; may be repeated.",
)


def split_settings(settings: Iterable[str], kinds: Iterable[str]) -> dict[str, dict[str, object]]:
    """Sort `KIND.FIELD=VALUE` texts by kind: `{"system": {"ndp.units": "4"}, ...}`, an entry for each of `kinds`.

    Raises:
        UsageError: a text of another form, or a kind that is not among `kinds`.
    """
    sorted_settings: dict[str, dict[str, object]] = {kind: {} for kind in kinds}
    for setting in settings:
        path, equals, value = setting.partition("=")
        kind, _, field = path.strip().partition(".")
        if not equals or not all(field.split(".")) or kind not in sorted_settings:
            wanted = " or ".join(f"{kind}.FIELD=VALUE" for kind in sorted_settings)
            raise UsageError(f"--set wants {wanted}, as in system.ndp.units=4, got {setting!r}.")
        sorted_settings[kind][field] = value.strip()
    return sorted_settings
