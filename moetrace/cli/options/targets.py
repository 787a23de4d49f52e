"""The files that a command will write, looked at before the work and not after it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from moetrace.spec.errors import UsageError


def check_targets(targets: Mapping[str, Path | None], inputs: Iterable[Path | str | None]) -> None:
    """Check what will be written: option or argument -> file, None if it was not asked for.

    Raises UsageError if that is one of the `inputs` (files, or names of presets; None: not given) or another target,
    MoetraceError if it cannot be written.
    """
    from moetrace.trace.atomic import check_writable, keep_inputs, real_path

    read = [Path(given) for given in inputs if given]
    written: dict[Path, str] = {}
    for option, path in targets.items():
        if path is None:
            continue
        keep_inputs(path, read)
        if (other := written.setdefault(real_path(path), option)) != option:
            raise UsageError(f"{other} and {option} must be different files, but both are {path}.")
        check_writable(path)


def check_picture(picture: Path | None) -> None:
    """Raise UsageError or MoetraceError if --plot cannot draw a file of this name."""
    if picture is None:
        return
    from moetrace.show.plots.picture import FORMS, check_can_plot

    if picture.suffix[1:].lower() not in FORMS:
        raise UsageError(f"--plot {picture}: the name must end with .png or .html.")
    check_can_plot()
