"""A command that others stand below: `moetrace advise TRACE`, and `moetrace advise rebalance TRACE`."""

from typing import Any

import click

from moetrace.cli.lazy_group import LazyGroup


class DefaultGroup(LazyGroup):
    """A group that is its `default` command unless the first argument names one of its commands."""

    def __init__(self, *args: Any, default: click.Command, **options: Any) -> None:
        """Take LazyGroup's arguments and the command; help and parameters are those of the command."""
        super().__init__(*args, help=default.help, params=default.params, **options)
        self._default = default

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Return the context of the command that is meant, as if it stood where the group stands."""
        below = self.get_command(click.Context(self), args[0]) if args else None
        if below is None:
            return self._default.make_context(info_name, args, parent, **extra)
        return below.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
