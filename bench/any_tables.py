"""Tables of routing for `bench/importing.py`: cells with lists as Parquet and CSV, choices as Parquet and CSV."""

from pathlib import Path

import numpy as np
import polars as pl

# Form -> bytes of a cell of eight experts and gates, about.
FORMS = {"lists.parquet": 68, "choices.parquet": 42, "lists.csv": 100, "choices.csv": 130}


def write_table(folder: Path, megabytes: int, form: str, ids: np.ndarray) -> Path:
    """Write tokens that choose as `ids` [tokens, layers, top_k] over and over; Parquet as Polars writes it."""
    _, layers, top_k = ids.shape
    tokens = max(100, megabytes * 1_000_000 // (layers * FORMS[form]))
    ids = np.resize(ids, (tokens, layers, top_k))
    gates = np.random.default_rng(0).random(ids.shape, np.float32).round(5)
    times = 1 if form.startswith("lists") else top_k
    layer = np.resize(np.repeat(np.arange(layers, dtype=np.uint16), times), tokens * layers * times)
    frame = {"token": np.repeat(np.arange(tokens, dtype=np.int32), layers * times), "layer": layer}
    if form.startswith("lists"):
        frame["experts"] = pl.Series(ids.reshape(-1, top_k).astype(np.int32)).cast(pl.List(pl.Int32))
        frame["gates"] = pl.Series(gates.reshape(-1, top_k)).cast(pl.List(pl.Float32))
    else:
        frame |= {"expert": ids.ravel(), "gate": gates.ravel()}
    path, table = folder / f"a.{form}", pl.DataFrame(frame)
    if form.endswith("parquet"):
        table.write_parquet(path, row_group_size=1 << 18)
    elif form.startswith("lists"):
        table.with_columns(
            pl.col(name).cast(pl.List(pl.String)).list.join(" ") for name in ("experts", "gates")
        ).write_csv(path)
    else:
        table.write_csv(path)
    return path
