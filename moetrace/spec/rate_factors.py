"""How fast each GPU of a cluster is beside `[gpu]`: the CSV file that `cluster.rate_factors` names."""

from pathlib import Path

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.spec.load import data_lines
from moetrace.spec.network import Cluster

HEADER = ["gpu", "factor"]
MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6


def read_factors(path: str | Path, cluster: Cluster) -> np.ndarray:
    """Read lines of `gpu,factor`, with that header or without: a GPU by its name in `units.parquet`, or its number.

    Blank lines and lines that begin with `#` are skipped.

    Returns:
        float64 [GPUs], attention GPUs first: the share of `[gpu]`'s rates that each GPU computes and reads at; 1 where
        the file has no line of it.

    Raises:
        MoetraceError: The file cannot be read, or a line is not as it must be; the message names it.
    """
    names = cluster.names
    number_of = {name: gpu for gpu, name in enumerate(names)} | {str(gpu): gpu for gpu in range(len(names))}
    factors, seen = np.ones(len(names)), set()
    for number, cells in data_lines(path, HEADER):
        where = f"{path}, line {number}"
        try:
            name, factor = cells[0].strip(), float(cells[1])
        except (IndexError, ValueError):
            name, factor = "", 0.0
        if len(cells) != len(HEADER) or not name:
            raise MoetraceError(f"{where}: wants {','.join(HEADER)}, as {names[-1]},0.8.")
        gpu = number_of.get(name)
        if gpu is None:
            raise MoetraceError(
                f"{where}: the cluster has no GPU {name[:40]}; wants one of {names[0]} to {names[-1]}, or of 0 to "
                f"{len(names) - 1}."
            )
        if not MIN_FACTOR <= factor <= MAX_FACTOR:
            raise MoetraceError(f"{where}: wants a factor from {MIN_FACTOR:g} to {MAX_FACTOR:g}, got {factor:g}.")
        if gpu in seen:
            raise MoetraceError(f"{where}: {names[gpu]} has a factor already; give each GPU one.")
        seen.add(gpu)
        factors[gpu] = factor
    return factors
