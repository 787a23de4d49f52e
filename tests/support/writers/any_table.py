"""Tables of routing in every form that `moetrace.importers.any_table` reads."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

import moetrace as mt
from support.writers import Sample, routing

ROWS, LAYERS, TOP_K, EXPERTS = 12, 3, 2, 8
NUMBERS = [1, 3, 4]  # of the layers


def ids() -> np.ndarray:
    return routing(ROWS, LAYERS, TOP_K, EXPERTS)


def gates() -> np.ndarray:
    return np.random.default_rng(1).random((ROWS, LAYERS, TOP_K)).astype(np.float16).astype(np.float32)


def choices() -> pl.DataFrame:
    """A row a choice."""
    row, layer, _ = np.indices((ROWS, LAYERS, TOP_K)).reshape(3, -1)
    return pl.DataFrame(
        {
            "request": row // 6,
            "token_idx": row % 6,
            "layer": np.array(NUMBERS)[layer],
            "expert": ids().ravel(),
            "gate": gates().ravel(),
        }
    )


def lists() -> pl.DataFrame:
    """A row a cell, with lists."""
    row, layer = np.indices((ROWS, LAYERS)).reshape(2, -1)
    frame = {"request": row // 6, "token_idx": row % 6, "layer": np.array(NUMBERS)[layer]}
    frame |= {"experts": ids().reshape(-1, TOP_K).tolist(), "gates": gates().reshape(-1, TOP_K).tolist()}
    return pl.DataFrame(frame)


def tokens() -> pl.DataFrame:
    """A row a token, with lists of lists: layers count from 0."""
    return pl.DataFrame({"request": np.arange(ROWS) // 6, "experts": ids().tolist(), "gates": gates().tolist()})


def csv_of(frame: pl.DataFrame, text: str = "[{}]") -> str:
    """A frame with lists as CSV, lists as texts."""
    columns = []
    for name, kind in frame.schema.items():
        column = pl.col(name)
        if isinstance(kind, pl.List):
            column = pl.format(text, column.cast(pl.List(pl.String)).list.join(", ")).alias(name)
        columns.append(column)
    return frame.select(columns).write_csv()


def json_of(frame: pl.DataFrame) -> str:
    return "".join(json.dumps(row) + "\n" for row in frame.iter_rows(named=True))


def prompt_table(rows: Sequence[int] = range(6)) -> str:
    """A file of MoE-Beyond: a prompt, layer by layer, with the texts of its tokens, here in layers 1, 3 and 4."""
    texts = ["<｜begin｜>", "I", '","', '"Ġ[a, b]"', '""""', "Ċ"]
    lines = ["Layer ID,Batch Number,Token,Activated Expert IDs"]
    for place, layer in enumerate(NUMBERS):
        lines += [f'{layer},0,{texts[row]},"{ids()[row, place].tolist()}"' for row in rows]
    return "\r\n".join(lines) + "\r\n"


def score_table(place: int, told_layer: int = 0) -> str:
    """A table of DynaNDE of one layer: the score of each expert, 0 where it is not chosen."""
    scores = np.zeros((ROWS, EXPERTS))
    np.put_along_axis(scores, ids()[:, place], np.sort(gates()[:, place] + 0.01)[:, ::-1], axis=1)
    lines = [f"layer_id,token_id,{','.join(f'expert_{expert}' for expert in range(EXPERTS))}"]
    lines += [f"{told_layer},{row},{','.join(f'{score:.6f}' for score in one)}" for row, one in enumerate(scores)]
    return "\n".join(lines) + "\n"


def samples(folder: Path) -> list[Sample]:
    hints = {"num_experts": EXPERTS, "top_k": TOP_K}
    for name, frame in (("choices", choices()), ("lists", lists())):
        frame.write_parquet(folder / f"{name}.parquet")
        (folder / f"{name}.csv").write_text(csv_of(frame))
        (folder / f"{name}.jsonl").write_text(json_of(frame))
    tokens().write_parquet(folder / "tokens.parquet")
    (folder / "tokens.jsonl").write_text(json_of(tokens()))
    trace = mt.Trace.from_arrays(num_experts=EXPERTS, model="m", experts=ids(), gates=gates(), layer_index=NUMBERS)
    mt.export(trace, folder / "t-own.parquet")
    layers = [lists().filter(pl.col("layer") == layer).drop("layer") for layer in NUMBERS]
    for layer, frame in zip(NUMBERS, layers, strict=True):
        frame.write_parquet(folder / f"layer{layer}.parquet", compression="snappy")
    single = [Sample([path], hints) for path in sorted(folder.glob("[clt]*.*")) if not path.name.startswith("layer")]
    single = [sample if "own" not in sample.files[0].name else Sample(sample.files) for sample in single]
    (folder / "prompt_7_data.csv").write_text(prompt_table(), newline="")
    tables = [folder / f"flame-moe_layer{layer}_64x512.csv" for layer in NUMBERS]
    for place, path in enumerate(tables):
        path.write_text(score_table(place))
    alone = folder / "one_table.csv"
    alone.write_text(score_table(0, 2))
    single += [Sample([folder / "prompt_7_data.csv"], hints), Sample(tables), Sample([alone])]
    return [*single, Sample([folder / f"layer{layer}.parquet" for layer in NUMBERS], hints)]
