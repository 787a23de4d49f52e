"""Several choices of an answer, and parts of one: what `usage` counts of all together, shared out by their rows."""

import numpy as np
import pytest
from support.answers import answer, ids_of, no, one, places, read
from support.writers import refused
from support.writers.sglang_request import text
from support.writers.vllm import npy_base64, response


@pytest.mark.parametrize("engine", ["vllm", "megatron"])
@pytest.mark.parametrize("start", [0, 3])
def test_usage_counts_the_tokens_of_all_choices(tmp_path, engine, start):
    ids = [np.concatenate([ids_of(6), ids_of(rows, rows)[6:]])[start:] for rows in (8, 6, 10)]  # outputs of 3, 1 and 5
    whole = answer(engine, ids[0], 6, 9)
    whole["choices"] = [answer(engine, own)["choices"][0] | {"index": n} for n, own in enumerate(ids)]
    trace = read(tmp_path, engine, whole)
    expected = [one(range(start, rows), 6, number) for number, rows in enumerate((8, 6, 10))]
    assert places(trace) == [row for rows in expected for row in rows]
    whole["usage"]["completion_tokens"] = 5
    if start == 0:
        assert "24 tokens in 3 choices" in no(tmp_path, engine, whole)


def test_a_single_choice_of_two_is_not_compared_with_the_tokens_of_both(tmp_path):
    ids = ids_of(10)
    usage = {"prompt_tokens": 6, "completion_tokens": 9}
    whole = {"choices": [{"index": 0}, {"index": 1}], "sglext": {"routed_experts": text(ids)}, "usage": usage}
    assert places(read(tmp_path, "sglang-request", whole)) == one(range(10), 6)
    usage["completion_tokens"] = 4
    assert "6 tokens of the prompt and 4 of its 2 choices, which allow 9" in no(tmp_path, "sglang-request", whole)
    path = tmp_path / "log.jsonl"
    assert "give --model" in refused(tmp_path, path, num_experts=16, top_k=2)


def test_choices_of_several_prompts_have_no_known_prompt(tmp_path):
    ids = [ids_of(6, 1), ids_of(8, 2)]  # prompts of 4 and 6, 3 tokens each
    whole = response(ids, 10)
    whole["usage"] = {"prompt_tokens": 10, "completion_tokens": 6}
    trace = read(tmp_path, "vllm", whole)
    assert places(trace) == one(range(6), 99) + one(range(8), 99, 1) and trace.source["phase"].startswith("unknown")
    for choice, prompt in zip(whole["choices"], (4, 6), strict=True):
        choice |= {"prompt_token_ids": [prompt] * prompt, "token_ids": [1, 2, 3]}
    assert places(read(tmp_path, "vllm", whole)) == one(range(6), 4) + one(range(8), 6, 1)


def of_choices(arrays, prompt, output, cached=None, **more):
    """An answer of several choices, None without routing, with `usage` of all."""
    whole = response([ids_of(1)] * len(arrays), prompt) | more
    for choice, ids in zip(whole["choices"], arrays, strict=True):
        choice["routed_experts"] = None if ids is None else npy_base64(ids)
    whole["usage"] = {"prompt_tokens": prompt, "completion_tokens": output}
    if cached is not None:
        whole["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
    return whole


@pytest.mark.parametrize("prompts", [(3, 5), (3, 5, 4), (4, 4)])
@pytest.mark.parametrize("cached", [None, 4])
def test_several_prompts_with_several_choices_begin_at_0(tmp_path, prompts, cached):
    ids = [ids_of(prompt + 2, at) for at, prompt in enumerate(prompts) for _ in range(2)]
    trace = read(tmp_path, "vllm", of_choices(ids, sum(prompts), 3 * len(ids), cached))
    expected = [one(range(len(own)), 99, at) for at, own in enumerate(ids)]
    assert places(trace) == [row for rows in expected for row in rows]
    assert trace.source["phase"].startswith("unknown") and "left_out_cached_rows" not in trace.source


def test_recorded_prompts_without_recorded_outputs(tmp_path):
    whole = of_choices([ids_of(5, 1), ids_of(7, 2)], 8, 6)
    for choice, prompt in zip(whole["choices"], (3, 5), strict=True):
        choice["prompt_token_ids"] = [prompt] * prompt
    assert places(read(tmp_path, "vllm", whole)) == one(range(5), 3) + one(range(7), 5, 1)
    alone = answer("vllm", ids_of(6))
    alone["choices"][0]["prompt_token_ids"] = [1, 2, 3, 4]
    assert places(read(tmp_path, "vllm", alone)) == one(range(6), 4)


@pytest.mark.parametrize(
    ("rows", "output", "cached", "first", "prompt"),
    [
        (range(9), 5, None, 0, 6),
        (range(9), 4, None, 0, 6),  # the other had no token
        (range(9), 7, 4, 0, 6),  # from 4 on, it would have 8 tokens
        (range(4, 9), 8, 4, 4, 6),
        (range(9), 9, 4, 0, 99),  # 4 tokens from 0 on, or 8 from 4 on
        (range(4, 9), 8, None, 0, 99),
    ],
)
def test_a_choice_without_routing_has_tokens_of_its_own(tmp_path, rows, output, cached, first, prompt):
    ids = ids_of(9)[list(rows)]
    trace = read(tmp_path, "vllm", of_choices([ids, None], 6, output, cached))
    dropped = 4 if cached and first == 0 and prompt == 6 else 0
    assert places(trace) == one(range(first + dropped, first + len(ids)), prompt)
    assert ("phase" in trace.source) == (prompt == 99) and trace.source["left_out_answers"] == {"without routing": 1}


def test_choices_that_begin_elsewhere_are_aligned_by_their_prompt(tmp_path):
    whole = [np.concatenate([ids_of(6), ids_of(rows, rows)[6:]]) for rows in (8, 10, 9)]
    for starts in ((0, 4, 4), (3, 0, 1), (1, 1, 4), (5, 5, 0)):
        ids = [own[start:] for own, start in zip(whole, starts, strict=True)]
        trace = read(tmp_path, "vllm", of_choices(ids, 6, 12))
        expected = [one(range(starts[at], len(own)), 6, at) for at, own in enumerate(whole)]
        assert places(trace) == [row for rows in expected for row in rows]
    ids = [whole[0], ids_of(6, 8), ids_of(5, 9)]  # no rows of the prompt are the same
    trace = read(tmp_path, "vllm", of_choices(ids, 6, 12))
    assert {position for _, position, _ in places(trace)[8:]} == set(range(6)) and "phase" in trace.source


@pytest.mark.parametrize(
    ("prompt", "output", "usage", "positions"),
    [
        (6, 3, (6, 4, None), range(9)),
        (6, 3, (6, 3, None), range(9)),
        (3, 3, (6, 3, 3), range(3, 9)),
        (6, 3, (6, 4, 3), range(3, 9)),
        (6, 3, (6, 1, None), "6 tokens of a prompt and 3 of the output, but says that there are 6 (0 of them cached)"),
        (6, 3, (6, 9, None), "6 tokens of a prompt and 3 of the output"),
        (4, 5, (9, 5, None), "4 tokens of a prompt and 5 of the output, but says that there are 9"),
        (6, 3, (5, 4, None), "6 tokens of a prompt"),
    ],
)
def test_parts_of_the_prompt_and_the_output_are_compared_with_usage(tmp_path, prompt, output, usage, positions):
    ids = ids_of(9)
    whole = of_choices([ids[6 : 6 + output] if prompt != 4 else ids[4:]], *usage)
    whole["choices"][0]["prompt_routed_experts"] = npy_base64(ids[6 - prompt : 6] if prompt != 4 else ids[:4])
    if isinstance(positions, str):
        assert positions in no(tmp_path, "vllm", whole)
    else:
        assert places(read(tmp_path, "vllm", whole)) == one(positions, 6)


def test_parts_of_several_choices_are_compared_with_usage_together(tmp_path):
    ids = ids_of(9)
    whole = of_choices([ids[6:8], ids[6:]], 6, 7) | {"prompt_routed_experts": npy_base64(ids[:6])}
    assert places(read(tmp_path, "vllm", whole)) == one(range(8), 6) + one(range(9), 6, 1)
    whole["usage"]["completion_tokens"] = 4
    assert "6 tokens of a prompt and 5 of the output" in no(tmp_path, "vllm", whole)
    whole = of_choices([ids[6:8], ids[6:]], 10, 7)
    for choice, rows in zip(whole["choices"], (6, 4), strict=True):  # a batch of two prompts
        choice["prompt_routed_experts"] = npy_base64(ids[:rows])
    assert places(read(tmp_path, "vllm", whole)) == one(range(8), 6) + one(range(7), 4, 1)
