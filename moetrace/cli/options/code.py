"""The option that keeps Python files of policies from running."""

import click

code_option = click.option(
    "--no-code",
    "code",
    flag_value=False,
    default=True,
    help="Refuse policies that name a Python file, whose code would run.",
)
