"""The trace file holds the routing: checked when opened, read in blocks of whole steps, and written whole."""

from moetrace.trace.format import Trace
from moetrace.trace.schema import Block, Rows
from moetrace.trace.writer import Writer

__all__ = ["Block", "Rows", "Trace", "Writer"]
