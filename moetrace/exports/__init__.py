"""Exports, one file for each foreign format: a trace as other tools read it."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moetrace.spec.errors import UsageError
from moetrace.spec.named import nearest
from moetrace.trace.atomic import keep_inputs, whole_file
from moetrace.trace.format import Trace

if TYPE_CHECKING:
    from moetrace.exports.planned import PlanChoice
    from moetrace.exports.resident import KeptChoice, ResultTally

# Format -> how its files' names end (the first is usual; none: --to must say it), and what it is. The module
# moetrace.exports.<format>, with "_" for "-", has `write(trace, file, progress)`; those of `_TAKES` also get a
# `KeptChoice`, those of `PLAN_FORMS` a `PlanChoice`.
FORMATS = {
    "npz": ((".npz",), "NumPy archive: the arrays that `moetrace import` reads"),
    "parquet": ((".parquet",), "a row for each choice of an expert"),
    "oracle-general": ((".oracleGeneral", ".bin"), "libCacheSim's binary trace, with the time of each next access"),
    "eplb": ((".json",), "expert counts as SGLang's --init-expert-location and EPLB take them"),
    "ktransformers": ((".pt",), "expert counts, or a set as ranks, for KTransformers"),
    "moe-cache-profile": ((), "routing profile for llama.cpp forks with --moe-cache-profile"),
    "static-csv": ((), "set of experts for residency static of `moetrace replay`"),
    "moe-l2": ((), "router map for moe-l2: the experts to pin"),
    "e4b-placement": ((), "placement of experts4bit: experts in VRAM, main memory and NVMe"),
    "llama-args": ((), "--n-cpu-moe or -ot of llama.cpp: the layers whose experts stay in main memory"),
    "vllm-map": ((), "expert map for vLLM: the expert in each slot, by MoE layer"),
    "vllm-ascend-map": ((), "the same for vllm-ascend, by MoE layer and unit"),
}
PLAN_FORMS = {"vllm-map": "vLLM", "vllm-ascend-map": "vllm-ascend"}  # -> whose, as `plan_bytes` calls it
# Formats of what an engine is to keep: whether they take counts, and sets (of two tiers or three).
_TAKES = {
    "ktransformers": {"counts": True, "sets": True, "tiers": False},
    "moe-cache-profile": {"counts": True, "sets": True, "tiers": False},
    "static-csv": {"counts": False, "sets": True, "tiers": False},
    "moe-l2": {"counts": False, "sets": True, "tiers": False},
    "e4b-placement": {"counts": False, "sets": True, "tiers": True},
    "llama-args": {"counts": False, "sets": True, "tiers": False},
}

SET_FORMATS = tuple(name for name, takes in _TAKES.items() if takes["sets"])


def export(
    trace: Trace | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    choice: "KeptChoice | PlanChoice | None" = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a trace in the format of another tool. The same trace gives the same bytes.

    docs/export.md describes the formats. Memory does not grow with the trace.

    Args:
        trace: A trace or the path of its file.
        path: The new file. It is whole or not there.
        to: The format, a key of `FORMATS`. By default the suffix of `path` says it, if it is one format's.
        choice: For formats of what an engine is to keep: the phase that counts, and how many experts, or which. By
            default counts of all steps. For expert maps: the units, and which plan.
        progress: A function that gets the number of rows read since its last call.

    Raises:
        UsageError: The format is unknown or not clear, does not go with `choice`, or `path` is the trace's own.
        MoetraceError: The trace holds only counts and the format needs ids, or it holds an impossible id, differs from
            its sha256s, or the system refuses.

    Examples:
        >>> import moetrace as mt
        >>> import polars as pl
        >>> mt.export("traces/tiny-olmoe.h5", "tiny.parquet")
        >>> pl.scan_parquet("tiny.parquet").select(pl.len()).collect().item()
        393936
    """
    path = Path(path)
    form = _format(path, to)
    module = importlib.import_module(f"moetrace.exports.{form.replace('-', '_')}")
    chosen = _checked(form, choice)
    opened = trace if isinstance(trace, Trace) else Trace.open(trace)
    try:
        keep_inputs(path, [opened.path, *map(Path, _files_of(choice))])
        opened.verify_hashes()
        with whole_file(path) as file:

            def told(rows: int) -> None:
                file.raise_error()  # a full disk need not wait for the rest
                if progress:
                    progress(rows)

            module.write(opened, file, told, *chosen)
    finally:
        if opened is not trace:
            opened.close()


def write_kept(source: "ResultTally", path: Path, form: str, choice: "KeptChoice") -> None:
    """Write a set that a replay's result says, in one of `SET_FORMATS`; the file is whole or not there."""
    module = importlib.import_module(f"moetrace.exports.{form.replace('-', '_')}")
    with whole_file(path) as file:
        module.write(source, file, lambda _: None, *_checked(form, choice))


def _files_of(choice: "KeptChoice | PlanChoice | None") -> list[str | os.PathLike[str]]:
    """The files that a choice names."""
    return [file for name in ("held", "plan") if (file := getattr(choice, name, None))]


def _checked(form: str, choice: "KeptChoice | PlanChoice | None") -> "tuple[KeptChoice | PlanChoice, ...]":
    """Options of the format's writer beside the trace; raise UsageError if `choice` is not for it."""
    if form not in _TAKES and form not in PLAN_FORMS and choice is None:
        return ()
    from moetrace.exports.planned import PlanChoice
    from moetrace.exports.resident import KeptChoice, check_choice

    if form in PLAN_FORMS:
        if not isinstance(choice, PlanChoice):
            raise UsageError(f"{form} holds a plan for units: give --units N, and no --slots, --layer-slots or --set.")
        return (choice,)
    if isinstance(choice, PlanChoice):
        raise UsageError(f"{form} holds no plan for units: give no --units, --redundant or --plan.")
    choice = choice or KeptChoice()
    check_choice(choice, form, **_TAKES.get(form, {"counts": False, "sets": False, "tiers": False}))
    return (choice,) if form in _TAKES else ()


def _format(path: Path, to: str | None) -> str:
    if to is not None and to not in FORMATS:
        raise UsageError(
            f"there is no format {to!r} to export to{nearest(to, list(FORMATS))}; known are {', '.join(FORMATS)}."
        )
    for name, (suffixes, _) in FORMATS.items():
        if to == name or (to is None and path.suffix.lower() in map(str.lower, suffixes)):
            return name
    endings = ", ".join(suffix for suffixes, _ in FORMATS.values() for suffix in suffixes)
    raise UsageError(f"{path} does not say its format by its ending ({endings}): give one of {', '.join(FORMATS)}.")
