"""Counts of SGLang's recorder: `stat` and `per_pass` dumps, and the CSV of older versions."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.importers.captured import SPARSEST, Counts, Hints, rows_of_counts
from moetrace.importers.reading.numbering import kept_layers
from moetrace.importers.reading.text import text_of
from moetrace.importers.sglang_dumps import Dump, integers, table
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import BLOCK_BYTES, MAX_EXPERTS, MAX_LAYERS, MIXED

MAX_COUNT = 2**40  # of one record and expert: sums of any number of records stay exact
_CSV_FIRST = b"layer_id,expert_id,count"
_CSV_NAME = re.compile(r"rank(\d{1,9})_timestamp([\d.]{1,40})")
_ROWS = "the least that explain the counts with this top_k; tensor-parallel ranks count the same tokens once each"


def read_stat(path: Path, content: dict[str, Any], hints: Hints) -> Counts:
    """Counts of a `stat` dump, a step a forward pass, without the unused ones; or of one table, a single step."""
    where = f"{path}: logical_count"
    counts = table(where, content["logical_count"])
    facts = {"mode": "stat", "order_of_steps": "not recorded: the buffer is a ring"}
    if len(counts) == 1:
        facts = {"mode": "one table"}
    return counts_of_steps(where, len(counts), counts.shape[1:], lambda step: counts[step], facts, hints, (path,))


def read_passes(dumps: Sequence[Dump], hints: Hints) -> Counts:
    """Counts of `per_pass` dumps: a step a forward pass, in the order of their numbers, ranks summed."""
    passes: dict[int, list[tuple[int, int]]] = defaultdict(list)
    seen: dict[tuple[int, int, str], Path] = {}
    for number, dump in enumerate(dumps):
        for index, record in enumerate(dump.records):
            key = (record["forward_pass_id"], record.get("rank", 0), str(record.get("gatherer_key")))
            if key in seen:
                raise MoetraceError(
                    f"{dump.path} and {seen[key]} both hold forward pass {key[0]} of rank {key[1]}: import dumps of "
                    f"one start of the server."
                )
            seen[key] = dump.path
            passes[key[0]].append((number, index))
    order = sorted(passes)
    shape = (len(dumps[0].logical), int(dumps[0].logical.max()) + 1)

    def step(at: int) -> np.ndarray:
        total = np.zeros(shape, np.int64)
        for number, index in passes[order[at]]:
            dump = dumps[number]
            where = f"{dump.path}: global_physical_count of record {index}"
            counts = integers(where, dump.records[index].get("global_physical_count"), 2)
            if counts.shape != dump.logical.shape or counts.min() < 0 or counts.max() > MAX_COUNT:
                raise MoetraceError(f"{where} {counts.shape} is negative, or does not fit the map.")
            np.add.at(total, (np.arange(shape[0])[:, None], dump.logical), counts)
        return total

    ranks = len({rank for _, rank, _ in seen})
    facts = {"mode": "per_pass", "ranks": ranks, "ids": "logical, by the map at the time of the dump"}
    return counts_of_steps(str(dumps[0].path), len(order), shape, step, facts, hints, [dump.path for dump in dumps])


def read_csv(sources: Sequence[Path], hints: Hints) -> Counts:
    """Counts of CSV files: a step for each dump, ranks summed unless they are copies of each other."""
    import polars as pl

    tables: dict[tuple[int, float, int], pl.DataFrame] = {}
    for number, path in enumerate(sources):
        name = _CSV_NAME.search(path.name)
        when = float(name[2]) if name and re.fullmatch(r"\d+(\.\d*)?", name[2]) else 0.0
        tables[int(name[1]) if name else 0, when, number] = _csv(path)
        hints.reading(path.stat().st_size)
    steps: dict[int, list[pl.DataFrame]] = defaultdict(list)  # the n-th dump of each rank belongs to the n-th of others
    dumps: dict[int, int] = defaultdict(int)
    for rank, when, number in sorted(tables):
        table = tables[rank, when, number].sort("layer_id", "expert_id")
        if not any(table.equals(other) for other in steps[dumps[rank]]):
            steps[dumps[rank]].append(table)
        dumps[rank] += 1
    whole = pl.concat(tables.values())
    lines, layers = whole.height, int(whole["layer_id"].max() or 0) + 1  # pyright: ignore
    num_experts = hints.num_experts or int(whole["expert_id"].max() or 0) + 1  # pyright: ignore
    if layers * num_experts > SPARSEST * lines + 2**16:
        raise MoetraceError(f"{sources[0]}: {lines} lines are too few for {layers} layers of {num_experts} experts.")
    if int(whole["expert_id"].max() or 0) >= num_experts:  # pyright: ignore
        raise MoetraceError(f"{sources[0]} counts expert {whole['expert_id'].max()}, but there are {num_experts}.")

    def step(at: int) -> np.ndarray:
        total = np.zeros((layers, num_experts), np.int64)
        for table in steps[at]:
            np.add.at(total, (table["layer_id"].to_numpy(), table["expert_id"].to_numpy()), table["count"].to_numpy())
        return total

    facts = {"mode": "csv", "ranks": len(dumps)}
    if hints.num_experts is None:
        facts["num_experts"] = "the largest id and one"
    return counts_of_steps(str(sources[0]), len(steps), (layers, num_experts), step, facts, hints, sources)


def _csv(path: Path):
    import polars as pl

    columns = {"layer_id": pl.Int64, "expert_id": pl.Int64, "count": pl.Int64}
    try:
        # Bytes, because of a path Polars takes [ and * as a pattern, and unpacks the file if it is compressed.
        table = pl.read_csv(_text(path), columns=list(columns), schema_overrides=columns, quote_char=None)
    except pl.exceptions.PolarsError as error:
        raise MoetraceError(f"{path} can't be read as CSV: {str(error).splitlines()[0][:200]}.") from error
    for name, most in (("layer_id", MAX_LAYERS - 1), ("expert_id", MAX_EXPERTS - 1), ("count", MAX_COUNT)):
        wrong = ~table[name].is_between(0, most).fill_null(False)
        if wrong.any():
            raise MoetraceError(f"{path}: line {2 + (wrong.arg_max() or 0)}: {name} is not 0 to {most}.")
    return table


def _text(path: Path) -> bytes:
    data = text_of(path)
    if not data.lstrip().startswith(_CSV_FIRST):
        raise MoetraceError(f"{path} does not begin with the line {_CSV_FIRST.decode()}.")
    return data


def counts_of_steps(
    where: str,
    steps: int,
    shape: tuple[int, ...],  # layers, experts
    step: Callable[[int], np.ndarray],
    facts: dict[str, Any],
    hints: Hints,
    sources: Sequence[Path],
) -> Counts:
    """Counts of the steps that are not empty, read twice and never all at once; `facts` say the format, if another."""
    if not 0 < shape[0] <= MAX_LAYERS or not 0 < shape[1] <= MAX_EXPERTS:
        raise MoetraceError(f"{where} has {shape[0]} layers of {shape[1]} experts.")
    top_k = hints.need("top_k", sources[0])
    used, rows = np.zeros(shape[0], bool), np.zeros(steps, np.int64)
    for at in range(steps):
        counts = step(at)
        if counts.min() < 0 or counts.max() > MAX_COUNT:
            raise MoetraceError(f"{where}: step {at} holds an impossible count, {counts.min()} or {counts.max()}.")
        used |= counts.any(axis=1)
        rows[at] = rows_of_counts(counts[None], top_k)[0]
    taken = np.flatnonzero(rows)
    if not taken.size:
        raise MoetraceError(f"{where} counts nothing: start recording before the requests.")
    layers, dropped = kept_layers(used, hints)
    if taken.size < steps:
        facts["unused_steps_dropped"] = steps - taken.size

    def parts() -> Iterator[np.ndarray]:
        at_once = max(1, BLOCK_BYTES // (8 * layers.size * shape[1]))
        for start in range(0, taken.size, at_once):
            yield np.stack([step(at)[layers].astype(np.int64) for at in taken[start : start + at_once].tolist()])

    return Counts(
        model="",
        num_experts=shape[1],
        top_k=top_k,
        layer_index=layers,
        rows=rows[taken],
        phase=np.full(taken.size, MIXED, np.uint8),
        facts={"format": "sglang", "engine": "SGLang", **facts, **dropped, "rows": _ROWS},
        parts=parts,
        sources=tuple(sources),
    )
