"""Import what a writer wrote, and see what became of it."""

from pathlib import Path

import numpy as np
import pytest

from moetrace.importers.captured import Hints
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace


def imported(sources: Path | list[Path], form: str, **hints: int) -> Trace:
    """The trace, verified, of sources whose format is seen from their content."""
    sources = [sources] if isinstance(sources, Path) else sources
    assert {detect(source) for source in sources if source.is_file()} <= {form}
    out = sources[0].parent / f"out-{sources[0].name}.h5"
    import_traces(sources, out, hints=Hints(**hints))
    trace = Trace.open(out)
    trace.verify()
    assert trace.source["format"] == form and str(sources[0].parent) not in str(trace.source)
    return trace


def column(trace: Trace, name: str) -> np.ndarray:
    """All rows of one array."""
    return trace.read(name, 0, trace.rows)


def refused(sources: Path | list[Path], sentence: str, form: str, **hints: int) -> None:
    """Importing raises an error of one line that matches `sentence`, and leaves nothing behind."""
    sources = [sources] if isinstance(sources, Path) else sources
    folder = sources[0].parent / "refused"
    folder.mkdir()
    with pytest.raises(MoetraceError, match=sentence) as raised:
        import_traces(sources, folder / "out.h5", format=form, hints=Hints(**hints))
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".") and list(folder.iterdir()) == []
    folder.rmdir()
