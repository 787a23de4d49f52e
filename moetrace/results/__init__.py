"""What comes out of a replay: figures per policy, step, unit, layer and request, as Polars frames and as files."""

from moetrace.results.replay import Result, replay

__all__ = ["Result", "replay"]
