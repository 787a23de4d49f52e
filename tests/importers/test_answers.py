"""What an answer says of its tokens decides about its rows, alike for every engine that answers request by request."""

import json

import numpy as np
import pytest
from support.answers import answer, ids_of, no, one, places, read, said
from support.writers import imported, refused, routing, steps

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.trace import Trace

ENGINES = ["vllm", "sglang-request", "megatron"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rows", "first"), [(11, 0), (3, 8), (6, 5), (1, 10)])
def test_rows_end_at_the_last_token_but_one(tmp_path, engine, rows, first):
    ids = ids_of(rows)
    trace = read(tmp_path, engine, answer(engine, ids, 10, 2))
    assert places(trace) == one(range(first, 11), 10) and np.array_equal(trace.read("experts", 0, rows), ids)
    assert ("first_position" in trace.source) == (first > 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_rows_than_tokens_are_refused(tmp_path, engine):
    assert "12 tokens, but says that there are 10 tokens of the prompt and 2 of this answer, which allow 11" in no(
        tmp_path, engine, answer(engine, ids_of(12), 10, 2)
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rows", "cached", "positions"), [(5, None, range(5)), (6, None, range(6)), (2, 4, [4, 5])])
def test_an_answer_without_output_is_all_prompt(tmp_path, engine, rows, cached, positions):
    trace = read(tmp_path, engine, answer(engine, ids_of(rows), 6, 0, cached))
    assert places(trace) == one(positions, 6) and trace.steps == 1


@pytest.mark.parametrize("rows", [5, 6])
def test_sglang_prefill_tells_its_layers_by_either_number_of_rows(tmp_path, rows):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(answer("sglang-request", ids_of(rows), 6, 0)))
    trace = imported(tmp_path, path, num_experts=16, top_k=2)
    assert trace.layers == 3 and places(trace) == one(range(rows), 6)


def test_a_number_of_ids_that_fits_two_numbers_of_layers_is_asked_about(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(answer("sglang-request", routing(5, 6, 2, 16), 6, 0)))
    assert "give --model" in refused(tmp_path, path, num_experts=16, top_k=2)


def test_a_note_names_answers_without_numbers(tmp_path):
    path = tmp_path / "log.jsonl"
    answers = [answer("vllm", ids_of(9, seed), *numbers) for seed, numbers in enumerate([(6, 4), (), (6, 4)])]
    path.write_text("".join(json.dumps(one) + "\n" for one in answers))
    notes = []
    import_traces(path, tmp_path / "o.h5", hints=Hints(num_experts=16, note=notes.append))
    trace = Trace.open(tmp_path / "o.h5")
    assert places(trace) == one(range(9), 6) + one(range(9), 99, 1) + one(range(9), 6, 2)
    assert trace.source["requests_of_unknown_phase"] == 1 and "1 of 3 requests do not tell" in notes[0]


def test_a_recorded_start_goes_before_that_of_the_tokens(tmp_path):
    whole = answer("vllm", ids_of(6), 8, 4)
    assert places(read(tmp_path, "vllm", whole)) == one(range(5, 11), 8)
    cut = answer("vllm", ids_of(5), 8, 4, routed_experts_prompt_start=5)
    trace = read(tmp_path, "vllm", cut)
    assert places(trace) == one(range(5, 10), 8) and trace.source["lacking_rows"] == 1, "of the last token"


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_a_cached_prefix_are_left_out(tmp_path, engine):
    ids = ids_of(11)
    trace = read(tmp_path, engine, answer(engine, ids, 10, 2, cached=8))
    assert places(trace) == one(range(8, 11), 10) and np.array_equal(trace.read("experts", 0, 3), ids[8:])
    assert trace.source["left_out_cached_rows"] == 8
    partly = read(tmp_path, engine, answer(engine, ids[5:], 10, 2, cached=8))
    assert places(partly) == one(range(8, 11), 10) and partly.source["left_out_cached_rows"] == 3
    omitted = read(tmp_path, engine, answer(engine, ids[8:], 10, 2, cached=8))
    assert places(omitted) == one(range(8, 11), 10) and "left_out_cached_rows" not in omitted.source
    assert "keep them with --keep-cached" in no(tmp_path, engine, answer(engine, ids[:9], 10, 0, cached=10))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cached", [None, 7, 4, 0])
@pytest.mark.parametrize("known_by", ["rows", "id"])
def test_a_prompt_that_repeats_a_conversation_is_its_next_turn(tmp_path, engine, cached, known_by):
    ids = ids_of(15)
    name = "chat" if known_by == "id" else None
    other = answer(engine, ids_of(8, 5), 5, 4, name="b")
    turns = [answer(engine, ids[:7], 5, 3, name=name), other, answer(engine, ids, 12, 4, cached, name)]
    trace = read(tmp_path, engine, *turns)
    kept = 7 if cached is None else cached
    assert places(trace) == one(range(7), 5) + one(range(8), 5, 1) + one(range(kept, 15), 12)
    assert np.array_equal(trace.read("experts", 15, trace.rows), ids[kept:])
    assert trace.source["joined_answers"] == 1 and trace.source.get("left_out_cached_rows", 0) == kept


def test_a_turn_is_known_by_its_tokens_where_its_rows_begin_later(tmp_path):
    ids, tokens = ids_of(15), list(range(100, 116))
    first = answer("vllm", ids[:7], 5, 3, prompt_token_ids=tokens[:5])
    first["choices"][0]["token_ids"] = tokens[5:8]
    second = answer("vllm", ids[7:], 12, 4, prompt_token_ids=tokens[:12])
    trace = read(tmp_path, "vllm", first, second)
    assert places(trace) == one(range(7), 5) + one(range(7, 15), 12)
    assert places(read(tmp_path, "vllm", first, second | {"prompt_token_ids": tokens[1:13]}))[7][0] == 1


def test_three_turns_and_what_only_looks_like_one(tmp_path):
    ids = ids_of(30)
    turns = [answer("vllm", ids[:stop], prompt, stop + 1 - prompt) for stop, prompt in ((8, 5), (17, 12), (30, 25))]
    trace = read(tmp_path, "vllm", *turns)
    assert places(trace) == one(range(8), 5) + one(range(8, 17), 12) + one(range(17, 30), 25)
    trace = read(tmp_path, "vllm", answer("vllm", ids[:8], 8, 1), answer("vllm", ids, 25, 6))
    assert trace.rows == 38, "a common system prompt is no turn"
    trace = read(tmp_path, "vllm", answer("vllm", ids[:8], 5, 4), answer("vllm", ids[:12], 5, 8))
    assert trace.rows == 20, "the same prompt again is no turn"
    fork = np.concatenate([ids[:8], ids_of(8, 7)])
    turns = [answer("vllm", ids[:8], 5, 4), answer("vllm", ids[:17], 12, 6), answer("vllm", fork, 10, 7)]
    assert read(tmp_path, "vllm", *turns).rows == 17 + 16, "another turn after the first is a request of its own"
    changed = np.concatenate([ids_of(8, 9), ids[8:]])
    trace = read(tmp_path, "vllm", answer("vllm", ids[:8], 5, 4), answer("vllm", changed, 25, 6))
    assert trace.rows == 38, "other tokens are no turn"


@pytest.mark.parametrize("engine", ENGINES)
def test_keep_cached_keeps_every_row_of_every_turn(tmp_path, engine):
    ids = ids_of(15)
    path = tmp_path / "a.jsonl"
    turns = [answer(engine, ids[:7], 5, 3, name="x"), answer(engine, ids, 12, 4, cached=4, name="x")]
    path.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    import_traces(path, tmp_path / "o.h5", hints=Hints(**said(engine), keep_cached=True))
    trace = Trace.open(tmp_path / "o.h5")
    assert places(trace) == one(range(7), 5) + one(range(15), 12) and trace.source["cached_rows"] == "kept"


def chunks(ids, cuts, prompt, **more):
    """The chunks of a stream: from cut to cut, each with the tokens so far."""
    for start, stop in cuts:
        whole = answer(
            "vllm", ids[start:stop], prompt, stop + 1 - prompt, name="cmpl-1", object="text_completion.chunk"
        )
        yield whole | more


def test_chunks_of_a_stream_are_one_request(tmp_path):
    ids = ids_of(11)
    cuts = [(0, 8), (8, 9), (9, 11)]
    trace = read(tmp_path, "vllm", *chunks(ids, cuts, 8))
    assert places(trace) == one(range(11), 8) and np.array_equal(trace.read("experts", 0, 11), ids)
    assert steps(trace) == [(8, 0), (1, 1), (1, 1), (1, 1)] and trace.source["joined_answers"] == 2
    trace = read(tmp_path, "vllm", *chunks(ids, [(0, 8), (0, 9), (0, 11)], 8))
    assert places(trace) == one(range(11), 8), "each chunk has all rows so far"
    assert trace.source["left_out_rows_of_earlier_parts"] == 17
    other = [chunk | {"id": "cmpl-2"} for chunk in chunks(ids_of(11, 3), cuts, 8)]
    mixed = [chunk for pair in zip(chunks(ids, cuts, 8), other, strict=True) for chunk in pair]
    trace = read(tmp_path, "vllm", *mixed)
    assert sorted(places(trace)) == one(range(11), 8) + one(range(11), 8, 1), "two streams at a time"


def test_a_stream_tells_its_tokens_in_the_last_chunk(tmp_path):
    ids = ids_of(11)
    parts = [chunk | {"usage": None} for chunk in chunks(ids, [(0, 8), (8, 9), (9, 11)], 8)]
    empty = {"id": "cmpl-1", "object": "text_completion.chunk", "choices": [{"index": 0, "routed_experts": None}]}
    last = {"id": "cmpl-1", "object": "x.chunk", "choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 4}}
    trace = read(tmp_path, "vllm", *parts, empty, last)
    assert places(trace) == one(range(11), 8) and "left_out_answers" not in trace.source
    last["usage"]["prompt_tokens"] = 10
    assert places(read(tmp_path, "vllm", *parts, empty, last)) == one(range(2, 13), 10)
    last["usage"]["prompt_tokens"] = 5
    assert "which allow 8" in no(tmp_path, "vllm", *parts, last)
    assert places(read(tmp_path, "vllm", *parts)) == one(range(11), 99), "without, phases are unknown"


def test_server_sent_events_are_lines(tmp_path):
    ids = ids_of(11)
    path = tmp_path / "sse.txt"
    events = [f"event: x\ndata: {json.dumps(chunk)}\n\n" for chunk in chunks(ids, [(0, 8), (8, 9), (9, 11)], 8)]
    path.write_text(": hello\n" + "".join(events) + "data: [DONE]\n\n")
    for form in ("vllm", None):
        assert places(imported(tmp_path, path, num_experts=16, format=form)) == one(range(11), 8)
        path.write_text("".join(events))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transferred", ["again", "padding", "omitted"])
def test_a_prefill_and_a_decode_server_answer_one_request(tmp_path, engine, transferred):
    ids = ids_of(11).astype(np.int16)
    decode = ids.copy()
    decode[:8] = ids[:8] if transferred == "again" else 0
    if transferred == "omitted":
        decode = ids[8:]
    pair = [answer(engine, ids[:8], 8, 1, name="r"), answer(engine, decode, 8, 4, name="r")]
    trace = read(tmp_path, engine, *pair)
    assert places(trace) == one(range(11), 8) and np.array_equal(trace.read("experts", 0, 11), ids)
    trace = read(tmp_path, engine, *reversed(pair))
    assert places(trace) == one(range(11), 8), "whichever is read first"
    assert np.array_equal(trace.read("experts", 0, 11), ids)


@pytest.mark.parametrize("engine", ["vllm", "sglang-request"])
@pytest.mark.parametrize("overlap", [0, 1, 8])
@pytest.mark.parametrize("order", [("prefill", "decode"), ("decode", "prefill"), None])
def test_servers_of_prefill_and_decode_have_a_file_each(tmp_path, engine, overlap, order, monkeypatch):
    for module in ("request_spool", "conversations"):
        monkeypatch.setattr(f"moetrace.importers.reading.{module}.BLOCK_BYTES", 32)
    ids = [ids_of(11, seed) for seed in (1, 2)]
    folder = tmp_path / "pd"
    folder.mkdir()
    for name, rows, output in (("prefill", slice(8), 1), ("decode", slice(8 - overlap, 11), 4)):
        cached = 8 if name == "decode" else None
        lines = [answer(engine, own[rows], 8, output, cached, name=str(at)) for at, own in enumerate(ids)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [folder] if order is None else [folder / f"{name}.jsonl" for name in order]
    trace = imported(tmp_path, *sources, **said(engine), format=engine)
    expected = one(range(8), 8) + one(range(8), 8, 1) + one(range(8, 11), 8) + one(range(8, 11), 8, 1)
    assert places(trace) == expected and trace.source["joined_answers"] == 2
    both = np.concatenate([ids[0][:8], ids[1][:8], ids[0][8:], ids[1][8:]])
    assert np.array_equal(trace.read("experts", 0, 22), both)


def test_a_turn_after_a_decode_server_that_was_read_first(tmp_path):
    ids = ids_of(20)
    pair = [answer("vllm", ids[8:11], 8, 4, 8, name="r"), answer("vllm", ids[:8], 8, 1, name="r")]
    trace = read(tmp_path, "vllm", *pair, answer("vllm", ids, 14, 7))
    assert places(trace) == one(range(11), 8) + one(range(11, 20), 14)


def test_files_that_the_user_orders_stay_in_order(tmp_path):
    paths = [tmp_path / name for name in ("b.npy", "a.npy", "10.npy")]
    for rows, path in enumerate(paths, 1):
        np.save(path, ids_of(rows, rows))
    trace = imported(tmp_path, *paths, num_experts=16)
    assert trace.read("request", 0, 6).tolist() == [0, 1, 1, 2, 2, 2]


def test_the_last_chunk_tells_the_tokens_of_all_choices(tmp_path):
    whole = [np.concatenate([ids_of(6), ids_of(rows, rows)[6:]]) for rows in (8, 10)]  # outputs of 3 and 5
    for start in (0, 4):
        parts = []
        for choice, ids in enumerate(whole):
            for rows in (slice(start, 6), slice(6, None)):
                part = answer("vllm", ids[rows], name="c", object="x.chunk")
                part["choices"][0]["index"] = choice
                parts.append(part | {"usage": None})
        usage = {"prompt_tokens": 6, "completion_tokens": 8}
        trace = read(tmp_path, "vllm", *parts, {"id": "c", "object": "x.chunk", "choices": [], "usage": usage})
        expected = one(range(start, 8), 6) + one(range(start, 10), 6, 1)
        assert sorted(places(trace)) == expected and "phase" not in trace.source


def test_the_same_answer_twice_counts_once_and_others_of_its_id_are_their_own(tmp_path):
    ids = ids_of(9)
    same = answer("vllm", ids, 7, 3, name="7")
    trace = read(tmp_path, "vllm", same, same, answer("vllm", ids_of(9, 4), 7, 3, name="7"))
    assert places(trace) == one(range(9), 7) + one(range(9), 7, 1)
    assert trace.source["left_out_repeated_answers"] == 1
    sampled = np.concatenate([ids[:7], ids_of(9, 6)[7:]])
    trace = read(tmp_path, "vllm", same, answer("vllm", sampled, 7, 3, name="7"))
    assert trace.rows == 18, "the same prompt with another output"


def test_megatron_answers_tell_their_prompts_by_tokens_or_by_part(tmp_path):
    ids = ids_of(9)
    choice = {"moe_topk_indices": ids.tolist(), "prompt_moe_topk_indices": ids[:6].tolist()}
    trace = read(tmp_path, "megatron", {"choices": [choice]})
    assert places(trace) == one(range(9), 6) and trace.source["engine"] == "Megatron-LM"
    tokens = {"prompt_token_ids": [1] * 7, "generation_token_ids": [2] * 3}
    for own in (choice | tokens, choice | {"message": tokens}):
        whole = {"model": "EMPTY", "choices": [own], "usage": {"prompt_tokens": 99, "completion_tokens": 99}}
        trace = read(tmp_path, "megatron", whole)
        assert places(trace) == one(range(9), 7) and trace.model == "unknown"


@pytest.mark.parametrize("known_by", ["rows", "tokens"])
@pytest.mark.parametrize("cached", [None, 11])
def test_a_later_turn_whose_decode_server_was_read_first(tmp_path, known_by, cached):
    ids = ids_of(20)
    said = {}
    words = list(range(100, 121))
    if known_by == "tokens":
        said = {"prompt_token_ids": words[:14]}
    first = answer("vllm", ids[:11], 8, 4, name="a")
    if known_by == "tokens":
        first |= {"prompt_token_ids": words[:8]}
        first["choices"][0]["token_ids"] = words[8:12]
    decode = answer("vllm", ids[14:], 14, 7, 14, name="b") | said
    prefill = answer("vllm", ids[:14], 14, 1, cached, name="b") | said
    trace = read(tmp_path, "vllm", first, decode, prefill)
    assert places(trace) == one(range(11), 8) + one(range(11, 20), 14), "rows 11 to 13 are new"
    assert np.array_equal(trace.read("experts", 0, 20), ids)
    other = answer("vllm", ids_of(9, 5), 7, 3, name="c")
    trace = read(tmp_path, "vllm", first, decode, other, prefill)
    assert sorted(places(trace)) == one(range(11), 8) + one(range(11, 20), 14) + one(range(9), 7, 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("output", "reason", "first"), [(0, "abort", 0), (0, None, 5), (3, "abort", 8), (0, "stop", 5)]
)
def test_an_answer_that_was_aborted_in_its_prompt_has_the_first_rows(tmp_path, engine, output, reason, first):
    one_answer = answer(engine, ids_of(4), 10, output, name="a")
    if engine == "sglang-request":
        one_answer["meta_info"]["finish_reason"] = reason and {"type": reason, "message": "the client left"}
    else:
        one_answer["choices"][0]["finish_reason"] = reason
    trace = read(tmp_path, engine, one_answer, answer(engine, ids_of(9, 2), 7, 3, name="b"))
    assert places(trace) == one(range(first, first + 4), 10) + one(range(9), 7, 1)
    assert trace.source.get("aborted_in_their_prompts") == (1 if first == 0 else None)


def test_other_events_of_a_stream_do_not_count_as_left_out_answers(tmp_path):
    ids = ids_of(11)
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks(ids, [(0, 8), (8, 9), (9, 11)], 8)]
    alone = json.dumps(answer("vllm", ids_of(9, 2), 7, 3, name="other")) + "\n"
    empty = json.dumps({"id": "cmpl-1", "choices": [{"index": 0}]})  # a chunk without routing, that does not say so
    logs = [
        "".join(f": ping\n\nevent: m\nid: 3\nretry: 9\n{event}" for event in events) + "data:[DONE]\n",
        "".join(events).replace("\n", "\r\n") + "data: [DONE]\r\n",
        alone + f"data: {empty}\n\n" + "".join(events) + "data: [DONE]\n\n",
        "".join(events) + f"data: {empty}\n\ndata: [DONE]\n\n" + alone,
    ]
    for log in logs:
        (path := tmp_path / "log.txt").write_bytes(log.encode())
        trace = imported(tmp_path, path, num_experts=16)
        assert "left_out_answers" not in trace.source and trace.source["joined_answers"] == 2
        both = one(range(11), 8) + (one(range(9), 7, 1) if alone in log else [])
        assert sorted(position for _, position, _ in places(trace)) == sorted(position for _, position, _ in both)


@pytest.mark.parametrize("engine", ["vllm", "sglang-request", "megatron"])
def test_a_note_names_rows_that_are_taken_as_the_last_ones(tmp_path, engine):
    notes: list[str] = []
    path = tmp_path / "log.jsonl"
    for cached, told in ((None, True), (2, True), (3, False)):
        path.write_text(json.dumps(answer(engine, ids_of(6), 6, 4, cached)) + "\n")
        hints = Hints(num_experts=16, top_k=2, layers=3, note=notes.append)
        import_traces(path, tmp_path / "o.h5", hints=hints)
        with Trace.open(tmp_path / "o.h5") as trace:
            assert trace.read("position", 0, 6).tolist() == list(range(3, 9))
        assert ["taken as the last ones" in note for note in notes if "fewer rows" in note] == [True] * told
        notes.clear()
