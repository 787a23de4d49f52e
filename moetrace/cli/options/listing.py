"""An option whose help lists choices from their records."""

from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem


class ListingOption(click.Option):
    """An option with `{listed}` in its help. The names are read when the help is printed, not before a run."""

    def __init__(self, *arguments: Any, listed: Callable[[], Iterable[str]], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.listed = listed

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin so."""
        return [CompletionItem(name) for name in self.listed() if name.startswith(incomplete)]

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help, with the names."""
        self.help = (self.help or "").replace("{listed}", ", ".join(self.listed()))
        return super().get_help_record(ctx)
