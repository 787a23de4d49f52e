"""What a path on the command line may be."""

from pathlib import Path

import click

# Click would call a file that can't be read wrong usage, exit code 2; what opens it says why, with exit code 1.
ANY_PATH = click.Path(readable=False, path_type=Path)
