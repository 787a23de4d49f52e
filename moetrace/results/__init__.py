"""What comes out of a replay: figures per policy, step, unit, layer and request, as Polars frames and as files.

Only `replay` and what it computes with (`frames`, `summary`, `timeline`) import the engine. What reads a finished
result does not, so a report or a gate compiles nothing.
"""
