"""An option of ranges."""

from typing import Any

import click


class RangeList(click.ParamType):
    """`A:B,C,D:` as pairs of start and stop; a single number is itself."""

    name = "ranges"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The pairs, or click's error."""
        ranges = []
        for part in str(value).split(","):
            start, colon, stop = (text.strip() for text in part.partition(":"))
            if not all(
                text == "" or (text.isascii() and text.isdecimal() and len(text) < 19) for text in (start, stop)
            ):
                self.fail(f"{part!r} is no range: use A:B (A to B - 1), A:, :B or one number.", param, ctx)
            if not colon and not start:
                self.fail("a range is empty: use A:B (A to B - 1), A:, :B or one number.", param, ctx)
            first = int(start or 0)
            ranges.append((first, int(stop) if stop else None if colon else first + 1))
        return ranges
