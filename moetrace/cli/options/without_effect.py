"""Options that would have no effect: if the user gave one, it is refused, not passed over."""

from collections.abc import Iterable

import click
from click.core import ParameterSource

from moetrace.spec.errors import UsageError


def refuse(names: Iterable[str], why: str) -> None:
    """Raise the UsageError `--option WHY` if one of the parameters `names` of the running command was given."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is not ParameterSource.DEFAULT:
            raise UsageError(f"{max(option.opts, key=len)} {why}")
