"""Traces with traps that lint must find: a clean one, and one small maker for each trap."""

from typing import Any

import numpy as np

from moetrace.trace import Trace

EXPERTS, TOP_K, LAYERS = 16, 4, 3
REQUESTS, PROMPT, OUTPUT = 4, 40, 60
ROWS = REQUESTS * (PROMPT + OUTPUT)


def choose(rng: np.random.Generator, rows: int, layers: int = LAYERS, experts: int = EXPERTS, k: int = TOP_K):
    """Ids [rows, layers, k] by Gumbel top-k over a Zipf popularity that each layer permutes."""
    popularity = -0.8 * np.log(np.argsort(rng.random((layers, experts)), axis=1) + 1)
    return np.argsort(-(popularity + rng.gumbel(size=(rows, layers, experts))), axis=-1)[..., :k]


def arrays(rows: int = ROWS, **sizes: int) -> dict[str, Any]:
    """What `Trace.from_arrays` takes: four requests one after another, each a prompt and decode steps of one row."""
    request = np.repeat(np.arange(REQUESTS), rows // REQUESTS)
    lengths = np.tile([PROMPT] + [1] * OUTPUT, REQUESTS)
    return {
        "experts": choose(np.random.default_rng(7), rows, **sizes),
        "num_experts": sizes.get("experts", EXPERTS),
        "request": request,
        "steps": lengths,
        "phase": np.tile([0] + [1] * OUTPUT, REQUESTS),
    }


def requests(count: int, prompt: int, output: int, seed: int = 0, **sizes: int) -> dict[str, Any]:
    """Requests one after another, each a prompt and decode steps of one row."""
    return {
        "experts": choose(np.random.default_rng(seed), count * (prompt + output), **sizes),
        "num_experts": sizes.get("experts", EXPERTS),
        "request": np.repeat(np.arange(count), prompt + output),
        "steps": np.tile([prompt] + [1] * output, count),
        "phase": np.tile([0] + [1] * output, count),
    }


def prepend(given: dict[str, Any], cells: np.ndarray) -> dict[str, Any]:
    """The trace with rows of these ids [rows, layers, k] before it, one prefill step of request 0."""
    rows = len(cells)
    return given | {
        "experts": np.concatenate([cells, given["experts"]]),
        "request": np.r_[np.zeros(rows, int), given["request"] + 1],
        "steps": np.r_[rows, given["steps"]],
        "phase": np.r_[0, given["phase"]],
    }


def flat_view(rng: np.random.Generator, rows: int, experts: int, k: int) -> np.ndarray:
    """What a flat read of the strided view of a ranking of all experts yields: [rows, k] of whole permutations."""
    rankings = rng.permuted(np.tile(np.arange(experts), (rows, 1)), axis=1)
    return rankings.ravel()[: rows * k].reshape(rows, k)


def trace(given: dict[str, Any]) -> Trace:
    return Trace.from_arrays(**given)
