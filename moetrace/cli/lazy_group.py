"""A group of commands whose modules are imported only when they are used: its help knows each command's one line."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """A group that imports the module of a command, which has a `command`, when that command is called."""

    def __init__(
        self, *args: Any, one_lines: Mapping[str, str], module_of: Callable[[str], str], **options: Any
    ) -> None:
        """Take click's arguments; `one_lines` is command -> its one-line help, `module_of` gives a command's module."""
        super().__init__(*args, **options)
        self._one_lines, self._module_of = one_lines, module_of

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return [*self._one_lines]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if there is no such command."""
        if cmd_name not in self._one_lines:
            return None
        return importlib.import_module(self._module_of(cmd_name)).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments begin with; else say which is the nearest."""
        from moetrace.spec.named import nearest

        if args[0] not in self._one_lines and not ctx.resilient_parsing:
            ctx.fail(f"there is no command {args[0]!r}{nearest(args[0], [*self._one_lines])}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the one line of each command, without importing it."""
        with formatter.section("Commands"):
            formatter.write_dl([*self._one_lines.items()])
