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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the one line of each command, without importing it."""
        with formatter.section("Commands"):
            formatter.write_dl([*self._one_lines.items()])
