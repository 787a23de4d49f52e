"""A trace's choices as exports need them: checked, and in parts whose size does not depend on its steps."""

from collections.abc import Iterator
from typing import Any

from moetrace.importers.npz import FACTS
from moetrace.spec.errors import MoetraceError
from moetrace.trace.format import Trace
from moetrace.trace.schema import Part, check_ids

# Rows of a step that is larger come in several parts. A choice takes up to some 100 bytes on its way.
PART_CHOICES = 1 << 19
MAX_OBJECTS = 1 << 24  # experts of all layers; of the largest models there are some 20,000


def parts(trace: Trace) -> Iterator[Part]:
    """Yield all rows; raise MoetraceError on an impossible id, request, position or phase, or if there are no ids."""
    for part in trace.parts(max(1, PART_CHOICES // (trace.layers * trace.top_k))):
        check_ids(trace.shown, part.first, part.experts, trace.num_experts)
        yield part


def kept_facts(trace: Trace) -> dict[str, Any]:
    """The entries of the trace's source that an import of the export keeps."""
    return {key: value for key, value in trace.source.items() if key in FACTS}


def check_objects(trace: Trace, layers: int) -> None:
    """Raise MoetraceError if `layers` of the trace's experts are more than any model has: an array is made of them."""
    if layers * trace.num_experts > MAX_OBJECTS:
        raise MoetraceError(f"{layers} layers of {trace.num_experts} experts are more than this format is made for.")
