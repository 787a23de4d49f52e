"""An option of whole numbers."""

from typing import Any

import click


class NumberList(click.ParamType):
    """`0,16,32` as a list of whole numbers from 0."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The numbers, or click's error."""
        numbers = []
        for part in str(value).split(","):
            text = part.strip()
            if not (text.isascii() and text.isdecimal() and len(text) < 10):
                self.fail(f"{part!r} is not a whole number from 0: use numbers as in 0,16,32.", param, ctx)
            numbers.append(int(text))
        return numbers
