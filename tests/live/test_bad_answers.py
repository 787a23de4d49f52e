"""Answers that are no use: asked again, left out and said, or the end of the run."""

import json

import numpy as np
import pytest
from support import engine_server
from support.engine_server import EXPERTS, LAYERS, TOP_K
from support.recorded import PROMPTS, changed, check_routing, failing, left, plainly_refused, recorded, written

from moetrace.spec.errors import MoetraceError


def busy(handler, path, body):
    handler.reply({"error": {"message": "overloaded"}}, 503, {"Retry-After": "0"})


def cut(handler, path, body):
    data = json.dumps(engine_server.answer(handler.server.engine, path, body)).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])


def cut_chunk(handler, path, body):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"1000\r\n{")
    handler.close_connection = True


def hung_up(handler, path, body):
    handler.close_connection = True


def no_http(handler, path, body):
    handler.wfile.write(b"\x1b[31mhello\r\n\r\n")


@pytest.mark.parametrize("how", [busy, cut, cut_chunk, hung_up, no_http])
def test_a_request_is_repeated_after_a_passing_failure(engine, serve, prompts, tmp_path, how):
    server, calm = serve(engine, fault=failing(2, how)), serve(engine)
    recorded(calm.url, prompts, tmp_path / "calm.h5").close()
    check_routing(recorded(server.url, prompts, tmp_path / "a.h5"), PROMPTS)
    assert len(server.asked) == 3 * len(PROMPTS)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "calm.h5").read_bytes()


def routed_in(answer):
    return answer["meta_info"] if "meta_info" in answer else answer["choices"][0]


def without_routing(answer):
    routed_in(answer).pop("routed_experts")


def no_base64(answer):
    routed_in(answer)["routed_experts"] = "§§§"


def another_type(answer):
    routed_in(answer)["routed_experts"] = {"a": [1]}


def cut_routing(answer):
    routed_in(answer)["routed_experts"] = routed_in(answer)["routed_experts"][:-8]


def without_counts(answer):
    meta = answer.get("meta_info", {})
    for name in ("prompt_tokens", "completion_tokens"):
        meta.pop(name, None)
    answer.pop("usage", None)


def more_rows(answer):
    counts = answer.get("meta_info") or answer["usage"]
    counts["completion_tokens"] = 1


def unknown_experts(answer):
    ids = np.full((5, LAYERS, TOP_K), [EXPERTS + 90, EXPERTS + 91])
    sglang = "meta_info" in answer
    routed_in(answer)["routed_experts"] = (engine_server.int32_base64 if sglang else engine_server.npy_base64)(ids)
    (answer["meta_info"] if sglang else answer["usage"]).update(prompt_tokens=3, completion_tokens=3)


def a_list(answer):
    return [answer]


CHANGES = [without_routing, no_base64, another_type, cut_routing, without_counts, more_rows, unknown_experts, a_list]


def no_json(handler, path, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "5")
    handler.end_headers()
    handler.wfile.write(b'{"a":')


def deep(handler, path, body):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"a":' + b"[" * 200_000)


def announces_much(handler, path, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 40))
    handler.end_headers()


@pytest.mark.parametrize(
    "how", [*map(changed, CHANGES), plainly_refused, no_json, deep, announces_much], ids=lambda how: how.__qualname__
)
def test_a_bad_answer_is_left_out_said_and_asked_for_again(engine, serve, prompts, tmp_path, how):
    bad = (PROMPTS[3], PROMPTS[7])
    server, notes = serve(engine, fault=failing(100, how, bad)), []
    out = tmp_path / "a.h5"
    trace = recorded(server.url, prompts, out, notes)
    check_routing(trace, [text for text in PROMPTS if text not in bad])
    assert trace.source["failed_prompts"] == 2
    (note,) = [note for note in notes if "failed" in note]
    assert "2 prompts of 12 failed, the first because" in note and "\n" not in note and len(note) < 900
    assert f"{prompts}: line 4" in note or f"{prompts}: line 8" in note
    server.fault, asked = None, len(server.asked)
    check_routing(recorded(server.url, prompts, out), PROMPTS)
    assert len(server.asked) == asked + 2 and left(tmp_path) == ["a.h5"]


def test_strict_writes_nothing_but_keeps_answers(engine, serve, prompts, tmp_path):
    server = serve(engine, fault=failing(100, plainly_refused, PROMPTS[3:4]))
    with pytest.raises(MoetraceError, match=r"1 prompt failed, .*line 4.* answers 400: prompt is too long\.$"):
        recorded(server.url, prompts, tmp_path / "a.h5", strict=True)
    assert left(tmp_path) == ["a.h5.answers.jsonl"]


def test_a_server_without_routing_is_not_asked_for_all(engine, serve, tmp_path):
    prompts = written(tmp_path, [f"p{number}" for number in range(200)])
    server = serve(engine, fault=failing(100, changed(without_routing), tuple(f"p{n}" for n in range(200))))
    with pytest.raises(MoetraceError, match=r"8 prompts failed in a row, the last because the answer to .* has no"):
        recorded(server.url, prompts, tmp_path / "a.h5")
    assert len(server.asked) < 40 and left(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_error_that_holds_for_all_requests_ends_the_run(engine, serve, prompts, tmp_path, status):
    def fault(handler, path, body):
        if body is not None:
            handler.reply({"detail": "no"}, status)
        return body is not None

    server = serve(engine, fault=fault)
    with pytest.raises(MoetraceError, match=rf"answers {status}: "):
        recorded(server.url, prompts, tmp_path / "a.h5", concurrency=1)
    assert len(server.asked) == 1 and left(tmp_path) == []
