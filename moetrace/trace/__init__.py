"""What was routed: the trace file, its generators and importers."""

from moetrace.trace.format import Trace
from moetrace.trace.schema import Block, Rows
from moetrace.trace.writer import Writer

__all__ = ["Block", "Rows", "Trace", "Writer"]
