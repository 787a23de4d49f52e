"""Charts of a replay's figures: one function a question, used by `result.plot` and by reports alike."""

from moetrace.show.charts.latency import bounds, latency, over_time, parts
from moetrace.show.charts.machine_parts import layers, load, utilization

# In the order of a report.
QUESTIONS = {
    "bounds": bounds,
    "latency": latency,
    "parts": parts,
    "utilization": utilization,
    "over_time": over_time,
    "layers": layers,
    "load": load,
}

__all__ = ["QUESTIONS", "bounds", "latency", "layers", "load", "over_time", "parts", "utilization"]
