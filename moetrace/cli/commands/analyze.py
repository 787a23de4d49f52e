"""`moetrace analyze`: questions about a trace that need no hardware."""

import click

from moetrace.cli.lazy_group import LazyGroup

# Question -> its one-line help; the module is moetrace.cli.commands.analyze_<question>.
QUESTIONS = {
    "balance": "How evenly placements and plans spread the work.",
    "cache": "Hit rates of caches of experts.",
    "locality": "How skewed, repetitive and predictable the routing is.",
    "prefetch": "The value of predictors of the next layer's experts to a cache.",
}


@click.group("analyze", cls=LazyGroup, one_lines=QUESTIONS, module_of="moetrace.cli.commands.analyze_{}".format)
def command() -> None:
    """Answer questions about a trace that need no hardware."""
