"""Files imported for tests of bad records: what is left out with a note, and refused where the user is strict."""

import pytest

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace


def imported(path, **hints):
    """The trace of a file with records that may be bad, and the notes on it: each a sentence that names the file."""
    notes = []
    out = path.parent / "out.h5"
    import_traces(path, out, hints=Hints(**hints, note=notes.append))
    assert all("\n" not in note and note.endswith(".") and note.startswith(str(path)) for note in notes)
    trace = Trace.open(out)
    trace.verify()
    return trace, notes


def strict(path, **hints):
    """What is said where the user wants bad records refused; nothing is left behind."""
    with pytest.raises(MoetraceError) as raised:
        import_traces(path, path.parent / "strict.h5", hints=Hints(**hints, strict=True))
    assert not (path.parent / "strict.h5").exists()
    return str(raised.value)
