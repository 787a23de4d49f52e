"""Types of paths on the command line."""

from pathlib import Path
from typing import Any

import click


class _Folder(click.Path):
    """A folder's path; an empty one, of a variable that is not set, would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("an empty path names no folder", param, ctx)
        return super().convert(value, param, ctx)


# Click would call a file that can't be read wrong usage, exit code 2; what opens it says why, with exit code 1.
ANY_PATH = click.Path(readable=False, path_type=Path)
FOLDER = _Folder(readable=False, path_type=Path)
