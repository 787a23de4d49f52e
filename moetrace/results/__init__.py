"""The results of a replay: figures per policy, step, unit, layer and request, as Polars frames and as files.

Only `replay` and what it computes with (`frames`, `summary`, `timeline`) import the engine. Modules that read a
finished result do not, so a report or a gate compiles nothing.
"""
