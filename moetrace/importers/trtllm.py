"""Expert statistics of TensorRT-LLM (EXPERT_STATISTIC_PATH): `meta_info.json` and a safetensors file a rank.

`rank{r}.safetensors` has for each "{iteration}_{layer}" how often each expert was chosen, int64 [experts]
(`tensorrt_llm/_torch/expert_statistic.py`, commit 0fccc5b9). Counts are taken before tokens are exchanged: with
attention data parallelism each rank counts its own tokens, so ranks are summed, as the engine's own reader does; where
all ranks of some layers hold equal counts, they all counted the same tokens (tensor parallelism), which count once.
Forks also write `rank{r}_raw.safetensors` with the ids themselves, [tokens, top_k], which give rows instead of counts.
With an EPLB load balancer on, the counts are of slots (meta_info.json: num_experts) instead of experts.

An iteration is a step. Phases and requests are not recorded: counts are of mixed phase; rows are prefill, and a rank is
a request. Iterations without tokens are left out.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.importers.captured import Capture, Counts, Hints, Part, rows_of_counts
from moetrace.importers.reading.numbering import told_mtp, told_taken
from moetrace.importers.reading.placeholders import Placeholders
from moetrace.importers.reading.tensors import HEADER_BYTES, integers, is_header, known_shape, tensors
from moetrace.importers.reading.text import first_bytes
from moetrace.spec.errors import MoetraceError
from moetrace.trace.ranges import named_layers
from moetrace.trace.schema import BLOCK_BYTES, MIXED, PREFILL, absent_id, check_sizes, expert_dtype

META = "meta_info.json"
_META_BYTES = 1 << 16
_KEY = re.compile(r"(\d{1,9})_(\d{1,5})")
_HEADER = re.compile(rb'\{("__metadata__":\{[^{}]*\},)?"\d{1,9}_\d{1,5}":\{')
_RANK = re.compile(r"rank(\d{1,9})(_raw)?\.safetensors")
_MAX_COUNT = 1 << 40

Cell = tuple[int, int]  # iteration, layer


class _RankFile(NamedTuple):
    path: Path
    shapes: dict[Cell, tuple[int, ...]]


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is such statistics, or the meta_info.json beside them."""
    if is_header(first):
        return _HEADER.match(first[HEADER_BYTES:].replace(b" ", b"")) is not None
    return first.lstrip().startswith(b"{") and b'"num_experts_per_token"' in first[:_META_BYTES] and len(first) < 4096


def read(sources: Sequence[Path], hints: Hints) -> list[Capture | Counts]:
    """Counts, or a capture, of all ranks a folder."""
    folders: dict[Path, list[Path]] = {}
    for path in sources:
        folders.setdefault(path.parent, []).append(path)
    return [_read(paths, hints) for paths in folders.values()]


def _read(paths: Sequence[Path], hints: Hints) -> Capture | Counts:
    metas = [path for path in paths if _is_meta(path)]
    files = sorted((path for path in paths if path not in metas), key=_order)
    if not files:
        raise MoetraceError(f"{paths[0].parent} has {META}, but no rank*.safetensors beside it.")
    beside = files[0].parent / META
    if not metas and beside.is_file():
        metas = [beside]
    num_experts, top_k = _sizes(metas[0] if metas else None, files[0], hints)
    ranks = [_rank(path) for path in files]
    raw = [rank for rank in ranks if any(len(shape) == 2 for shape in rank.shapes.values())]
    ranks, told = _taken(raw or ranks, hints)
    check_sizes(str(ranks[0].path), num_experts, top_k, len({cell[1] for cell in ranks[0].shapes}), 1, 1)
    facts = {"format": "trtllm", "engine": "TensorRT-LLM", "ids": "of slots, if a load balancer was on"} | told
    sources = (*metas, *(rank.path for rank in ranks))
    for path in sources:
        hints.reading(path.stat().st_size)
    if raw:
        return _rows(ranks, Placeholders(num_experts, hints, marks=True), top_k, facts, sources)
    return _counts(ranks, num_experts, top_k, facts, sources)


def _is_meta(path: Path) -> bool:
    first = first_bytes(path, 64)
    return not is_header(first) and first.lstrip().startswith(b"{")


def _order(path: Path) -> tuple[int, str]:
    found = _RANK.fullmatch(path.name)
    return (int(found[1]) if found else 0, path.name)


def _sizes(meta: Path | None, first: Path, hints: Hints) -> tuple[int, int]:
    """num_experts and top_k, as meta_info.json or the user says."""
    if meta is None:
        return hints.need("num_experts", first), hints.need("top_k", first)
    try:
        with meta.open("rb") as file:
            said = json.loads(file.read(_META_BYTES))
    except (ValueError, RecursionError):
        raise MoetraceError(f"{meta} is not JSON.") from None
    num_experts, top_k = (
        said.get(name) if isinstance(said, dict) else None for name in ("num_experts", "num_experts_per_token")
    )
    if type(num_experts) is not int or type(top_k) is not int:
        raise MoetraceError(f"{meta} does not say num_experts and num_experts_per_token.")
    return num_experts, top_k


def _rank(path: Path) -> _RankFile:
    shapes: dict[Cell, tuple[int, ...]] = {}
    with tensors(path) as file:
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            found = _KEY.fullmatch(key)
            if found is None or f"{int(found[1])}_{int(found[2])}" != key:
                raise MoetraceError(f"{path} has a tensor {key[:50]!r}, which is not named ITERATION_LAYER.")
            shapes[int(found[1]), int(found[2])] = known_shape(path, file, key)
    if not shapes:
        raise MoetraceError(f"{path} holds no tensors.")
    return _RankFile(path, shapes)


def _taken(ranks: list[_RankFile], hints: Hints) -> tuple[list[_RankFile], dict[str, Any]]:
    """The ranks with the layers that are wanted, and what to say of the others.

    MTP layers go here if they have other iterations or tokens than the model's own, so that they fit no grid; those
    that fit are left to `numbered`.
    """
    where, model = str(ranks[0].path), hints.model_layers
    layers = np.array(sorted({layer for rank in ranks for _, layer in rank.shapes}))
    if hints.only_layers is not None:
        taken = layers[named_layers(where, layers, hints.only_layers)]
        told = told_taken(where, taken, layers, hints)
    elif model is None or model.mtp == 0 or layers.size <= model.moe:
        return ranks, {}
    else:
        own, others = ([_cells(ranks, layer) for layer in part] for part in np.split(layers, [model.moe]))
        if any(cells != own[0] for cells in own) or own[0] in others:
            return ranks, {}
        taken = layers[: model.moe]
        told = told_mtp(where, layers[model.moe :], hints)
    kept = [rank._replace(shapes={cell: of for cell, of in rank.shapes.items() if cell[1] in taken}) for rank in ranks]
    return [rank for rank in kept if rank.shapes], told


def _cells(ranks: list[_RankFile], layer: int) -> set[tuple[Path, int, tuple[int, ...]]]:
    """Rank, iteration and shape of a layer's recording."""
    return {(rank.path, cell[0], shape) for rank in ranks for cell, shape in rank.shapes.items() if cell[1] == layer}


def _grid(ranks: list[_RankFile]) -> tuple[list[int], list[int]]:
    """All iterations and layers; raise MoetraceError unless each layer of each iteration was recorded."""
    cells = set().union(*(rank.shapes for rank in ranks))
    iterations, layers = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    if len(cells) < len(iterations) * len(layers):
        lacks = next(f"{i}_{j}" for i in iterations for j in layers if (i, j) not in cells)
        raise MoetraceError(f"{ranks[0].path}: the tensor {lacks} is missing, in all ranks.")
    return iterations, layers


def _counts(
    ranks: list[_RankFile], num_experts: int, top_k: int, facts: dict[str, Any], sources: tuple[Path, ...]
) -> Counts:
    for rank in ranks:
        for (iteration, layer), shape in rank.shapes.items():
            if shape != (num_experts,):
                raise MoetraceError(
                    f"{rank.path}: {iteration}_{layer} has shape {shape}, but there are {num_experts} experts."
                )
    _check_stages(ranks)
    iterations, layers = _grid(ranks)
    kept = _without_copies(ranks)
    rows = np.concatenate([rows_of_counts(part, top_k) for part in _sums(kept, iterations, layers, num_experts)])
    busy = [iteration for iteration, count in zip(iterations, rows.tolist(), strict=True) if count]
    if not busy:
        raise MoetraceError(f"{ranks[0].path} counts no choices.")
    facts |= {"ranks": len(kept), "iterations": f"{iterations[0]} to {iterations[-1]}"}
    if len(kept) < len(ranks):
        facts["left_out_ranks_that_are_copies"] = len(ranks) - len(kept)
    if len(busy) < len(iterations):
        facts["left_out_empty_iterations"] = len(iterations) - len(busy)
    return Counts(
        model="",
        num_experts=num_experts,
        top_k=top_k,
        layer_index=np.array(layers),
        rows=rows[rows > 0],
        phase=np.full(len(busy), MIXED, np.uint8),
        facts=facts,
        parts=lambda: _sums(kept, busy, layers, num_experts),
        sources=sources,
    )


def _check_stages(ranks: list[_RankFile]) -> None:
    """Raise MoetraceError if ranks share some layers and not others, whose counts then are too few."""
    whole: dict[int, _RankFile] = {}
    layers_of = {rank.path: {layer for _, layer in rank.shapes} for rank in ranks}
    for rank in ranks:
        for layer in layers_of[rank.path]:
            other = whole.setdefault(layer, rank)
            if lacking := layers_of[other.path] ^ layers_of[rank.path]:
                raise MoetraceError(
                    f"{rank.path} and {other.path} share layers, but only one of them has layer {min(lacking)}, whose "
                    f"counts would be too few: take layers that both have with --layers, or complete the file."
                )


def _without_copies(ranks: list[_RankFile]) -> list[_RankFile]:
    """Ranks with the same layers and iterations; only the first if all hold the same."""
    alike: dict[frozenset[Cell], list[_RankFile]] = {}
    for rank in ranks:
        alike.setdefault(frozenset(rank.shapes), []).append(rank)
    kept = []
    for group in alike.values():
        kept += group[:1] if all(_equal(group[0], other) for other in group[1:]) else group
    return kept


def _equal(one: _RankFile, other: _RankFile) -> bool:
    with tensors(one.path) as mine, tensors(other.path) as theirs:
        return one.shapes == other.shapes and all(
            np.array_equal(mine.get_tensor(f"{i}_{j}"), theirs.get_tensor(f"{i}_{j}")) for i, j in one.shapes
        )


def _sums(ranks: list[_RankFile], iterations: list[int], layers: list[int], num_experts: int) -> Iterator[np.ndarray]:
    """Counts int64 [some iterations, layers, experts], summed over ranks."""
    at_once = max(1, BLOCK_BYTES // (8 * len(layers) * num_experts))
    with ExitStack() as stack:
        files = [(rank, stack.enter_context(tensors(rank.path))) for rank in ranks]
        for start in range(0, len(iterations), at_once):
            some = iterations[start : start + at_once]
            total = np.zeros((len(some), len(layers), num_experts), np.int64)
            for rank, file in files:
                block = np.zeros(total.shape, np.int64)
                for step, iteration in enumerate(some):
                    for entry, layer in enumerate(layers):
                        if (iteration, layer) in rank.shapes:
                            block[step, entry] = file.get_tensor(f"{iteration}_{layer}")
                total += integers(rank.path, f"{some[0]}_{layers[0]} or a later one", block, 0, _MAX_COUNT)
            yield total


def _rows(
    ranks: list[_RankFile], placeholders: Placeholders, top_k: int, facts: dict[str, Any], sources: tuple[Path, ...]
) -> Capture:
    iterations, layers = _grid(ranks)
    for rank in ranks:
        if len(rank.shapes) < len(iterations) * len(layers):
            raise MoetraceError(
                f"{rank.path} lacks layers or iterations that other ranks have: import them separately."
            )
        for (iteration, layer), shape in rank.shapes.items():
            if shape != (rank.shapes[iteration, layers[0]][0], top_k):
                raise MoetraceError(
                    f"{rank.path}: {iteration}_{layer} has shape {shape}, but must have "
                    f"{(rank.shapes[iteration, layers[0]][0], top_k)}, as {iteration}_{layers[0]}."
                )
    kept = _without_copies(ranks)
    tokens = np.array([[rank.shapes[i, layers[0]][0] for rank in kept] for i in iterations], np.int64)
    number = np.tile(np.arange(len(kept)), len(iterations))
    before = np.cumsum(tokens, axis=0) - tokens  # of the same rank
    rows = int(tokens.sum())
    starts = np.cumsum(tokens.ravel()) - tokens.ravel()
    step_rows = tokens.sum(axis=1)
    if not rows:
        raise MoetraceError(f"{kept[0].path} holds no tokens.")
    facts |= {"ranks": len(kept), "iterations": f"{iterations[0]} to {iterations[-1]}"}
    facts["requests"] = "not recorded: a rank is one, all of it prefill"
    return Capture(
        model="",
        num_experts=placeholders.num_experts,
        top_k=top_k,
        layer_index=np.array(layers),
        expert_bytes=None,
        request=np.repeat(number, tokens.ravel()),
        position=np.arange(rows) + np.repeat(before.ravel() - starts, tokens.ravel()),
        phase=np.full(rows, PREFILL, np.uint8),
        optional=(),
        facts=facts,
        parts=lambda: _ids(kept, iterations, layers, placeholders, top_k),
        sources=sources,
        step_rows=step_rows[step_rows > 0],
    )


def _ids(
    ranks: list[_RankFile], iterations: list[int], layers: list[int], placeholders: Placeholders, top_k: int
) -> Iterator[Part]:
    """Ids of one rank and iteration at a time; -1 is absent."""
    num_experts = placeholders.num_experts
    with ExitStack() as stack:
        files = [(rank, stack.enter_context(tensors(rank.path))) for rank in ranks]
        for iteration in iterations:
            for rank, file in files:
                count = rank.shapes[iteration, layers[0]][0]
                block = np.empty((count, len(layers), top_k), expert_dtype(num_experts))
                for entry, layer in enumerate(layers):
                    key = f"{iteration}_{layer}"
                    ids = integers(rank.path, key, placeholders.marked(file.get_tensor(key)), -1, num_experts)
                    block[:, entry] = np.where(ids < 0, absent_id(num_experts), ids)
                if count:
                    yield {"experts": block}
        placeholders.told(str(ranks[0].path))
