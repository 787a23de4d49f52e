"""Logs of answers with routing, for each engine that answers request by request, and what an import makes of them."""

import json

import numpy as np

from moetrace.importers.formats import detect
from support.writers import imported, refused
from support.writers.sglang_request import text
from support.writers.vllm import npy_base64, request


def answer(engine, ids, prompt=None, output=None, cached=None, name=None, **more):
    """An answer of an engine with the ids of one completion, and what it says of its tokens."""
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    if engine == "sglang-request":
        meta = usage | {"id": name, "cached_tokens": cached, "routed_experts": text(ids)}
        return {"meta_info": {key: value for key, value in meta.items() if value is not None}} | more
    routed = {"routed_experts": npy_base64(ids)} if engine == "vllm" else {"moe_topk_indices": ids.tolist()}
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return {"id": name, "choices": [{"index": 0} | routed], "usage": usage} | more


def read(tmp_path, engine, *answers, **options):
    """The trace of a log with an answer a line."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in answers))
    assert detect(path) == engine
    return imported(tmp_path, path, **said(engine), **options)


def said(engine):
    return {"num_experts": 16} | ({"top_k": 2, "layers": 3} if engine == "sglang-request" else {})


def no(tmp_path, engine, *answers, **options):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in answers))
    return refused(tmp_path, path, **said(engine), **options)


def ids_of(rows, seed=0):
    ids = request(rows, 3, 2, 16, seed)
    assert (ids.max(axis=2) > 0).all()
    return ids


def places(trace):
    """(request, position, phase) of each row."""
    phase = np.repeat(trace.phase, np.diff(trace.offset)).tolist()
    return list(
        zip(*(trace.read(name, 0, trace.rows).tolist() for name in ("request", "position")), phase, strict=True)
    )


def one(positions, prompt, number=0):
    return [(number, position, int(position >= prompt)) for position in positions]
