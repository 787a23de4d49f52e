"""`moetrace analyze`: questions about a trace that need no hardware."""

import importlib

import click

# Question -> its one-line help; the module is moetrace.cli.analyze_<question>.
QUESTIONS = {
    "balance": "How evenly placements and plans spread the work.",
    "cache": "Hit rates of caches of experts.",
    "locality": "How skewed, repetitive and predictable the routing is.",
    "prefetch": "What predictors of the next layer's experts are worth to a cache.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(QUESTIONS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in QUESTIONS:
            return None
        return importlib.import_module(f"moetrace.cli.commands.analyze_{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(QUESTIONS.items()))


@click.group("analyze", cls=_LazyGroup)
def command() -> None:
    """Answer questions about a trace that need no hardware."""
