"""`record` against a local server that answers as vLLM and SGLang do: the trace is what the server routed."""

import json
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import engine_server
from support.engine_server import EXPERTS, TOP_K
from support.recorded import MOST, PROMPTS, changed, check_routing, failing, left, plainly_refused, recorded, written
from support.writers import steps

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.live.asks import Settings
from moetrace.live.recorder import record
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace


def test_the_trace_is_the_routing_and_that_of_an_import(engine, serve, prompts, tmp_path):
    server = serve(engine, delay_s=0.02)
    trace = recorded(f"{server.url}/v1", prompts, tmp_path / "a.h5", concurrency=4, keep_answers=True)
    check_routing(trace, PROMPTS)
    assert len(server.asked) == len(PROMPTS) and 2 <= server.most <= 4
    hints = Hints(num_experts=EXPERTS, top_k=TOP_K)
    import_traces(tmp_path / "a.h5.answers.jsonl", tmp_path / "b.h5", hints=hints)
    with Trace.open(tmp_path / "b.h5") as other:
        for name in ("experts", "request", "position"):
            assert np.array_equal(trace.read(name, 0, trace.rows), other.read(name, 0, other.rows))
        assert steps(trace) == steps(other) and trace.model == other.model
        assert other.source.items() <= trace.source.items()
    added = {name: value for name, value in trace.source.items() if name not in other.source}
    assert added.pop("prompts_sha256") and added == {
        "recorded": "live",
        "prompts": 12,
        "max_tokens": MOST,
        "temperature": 0.0,
        "seed": None,
        "ignore_eos": False,
        "prefix_cache": False,
        "engine_version": engine_server.VERSIONS[engine],
    }
    assert server.url.rpartition(":")[2] not in json.dumps(trace.source)


def test_concurrency_does_not_change_a_byte(engine, serve, prompts, tmp_path):
    server = serve(engine)
    for concurrency in (1, 12):
        recorded(server.url, prompts, tmp_path / f"{concurrency}.h5", concurrency=concurrency).close()
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "12.h5").read_bytes()
    assert left(tmp_path) == ["1.h5", "12.h5"], "the answers go when the trace is there"


def test_bodies_of_requests(engine, serve, tmp_path):
    server = serve(engine)
    lines = [
        {"prompt": "a b", "max_tokens": 2},
        {"token_ids": [5, 6]},
        {"messages": [{"role": "user", "content": "c"}]},
    ]
    settings = Settings(max_tokens=3, temperature=0.5, seed=7, ignore_eos=True)
    recorded(server.url, written(tmp_path, lines), tmp_path / "a.h5", settings=settings, concurrency=1).close()
    (text, ids, chat), salts = [(path, body) for path, _, body in server.asked], []
    for _, body in (text, ids, chat):
        salts.append(body.pop("extra_key", None) or body.pop("cache_salt"))
    assert len(set(salts)) == 3, "no prompt meets the cached prefix of another"
    sampling = {"max_tokens": 3, "temperature": 0.5, "seed": 7, "ignore_eos": True}
    told = {"model": engine_server.MODEL, "messages": lines[2]["messages"], **sampling}
    if engine == "vllm":
        assert text == ("/v1/completions", {"model": engine_server.MODEL, "prompt": "a b", **sampling, "max_tokens": 2})
        assert ids == ("/v1/completions", {"model": engine_server.MODEL, "prompt": [5, 6], **sampling})
    else:
        sampling = {"max_new_tokens": 3, "temperature": 0.5, "sampling_seed": 7, "ignore_eos": True}
        routed = {"return_routed_experts": True}
        shorter = {"text": "a b", "sampling_params": {**sampling, "max_new_tokens": 2}, **routed}
        assert text == ("/generate", shorter)
        assert ids == ("/generate", {"input_ids": [5, 6], "sampling_params": sampling, **routed})
        told |= routed | {"return_cached_tokens_details": True}
    assert chat == ("/v1/chat/completions", told)


def test_the_same_prompt_twice_is_two_requests(engine, serve, tmp_path):
    """Engines give each answer an id of its own; that of the local server follows from the prompt."""
    seen: list[int] = []

    def another_id(answer):
        seen.append(0)
        answer.get("meta_info", answer)["id"] = f"cmpl-{len(seen)}"

    server = serve(engine, fault=failing(100, changed(another_id)))
    texts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    check_routing(recorded(server.url, written(tmp_path, texts), tmp_path / "a.h5", concurrency=1), texts)


def test_a_shared_prefix_cache_is_asked_for(engine, serve, prompts, tmp_path):
    server = serve(engine)
    settings = Settings(max_tokens=MOST, prefix_cache=True)
    recorded(server.url, prompts, tmp_path / "a.h5", settings=settings).close()
    assert not any({"extra_key", "cache_salt"} & body.keys() for _, _, body in server.asked)


def started(engine: str, delay_s: float):
    server = subprocess.Popen(
        [sys.executable, engine_server.__file__, engine, "0", str(delay_s)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    return server, server.stdout.readline().strip()


def test_a_server_that_dies_in_the_middle(engine, serve, prompts, tmp_path):
    """What is kept is not asked for again, and the trace has the bytes of an undisturbed run."""
    out, kept, notes = tmp_path / "a.h5", tmp_path / "a.h5.answers.jsonl", []
    process, url = started(engine, 0.1)

    def kill():
        for _ in range(2000):
            if kept.exists() and kept.read_bytes().count(b"\n") >= 4:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(MoetraceError, match=r"(cannot be reached|was cut): "):
            recorded(url, prompts, out, notes, concurrency=2)
    finally:
        killer.join()
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    held = kept.read_bytes().count(b"\n")
    assert 4 <= held < len(PROMPTS) and left(tmp_path) == [kept.name]
    assert notes == [f"{kept} keeps {held} of 12 answers: the same command asks for the others."]
    kept.write_bytes(kept.read_bytes() + b'{"moetrace":{"prompt":11,"asked":"0123')  # as a killed client leaves it
    server = serve(engine)
    check_routing(recorded(server.url, prompts, out), PROMPTS)
    assert len(server.asked) == len(PROMPTS) - held
    recorded(server.url, prompts, tmp_path / "b.h5").close()
    assert out.read_bytes() == (tmp_path / "b.h5").read_bytes() and left(tmp_path) == ["a.h5", "b.h5"]


def test_a_slow_server_is_waited_for_until_the_timeout(engine, serve, prompts, tmp_path):
    """One byte at a time does not extend it."""

    def drips(handler, path, body):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.02)

    server = serve(engine, fault=failing(100, drips, PROMPTS[2:3]))
    notes: list[str] = []
    start_s = time.monotonic()
    check_routing(recorded(server.url, prompts, tmp_path / "a.h5", notes, timeout_s=0.5), PROMPTS[:2] + PROMPTS[3:])
    assert time.monotonic() - start_s < 3
    assert any("did not answer within 0.5 s: see --timeout; " in note for note in notes)


def test_answers_to_other_questions_are_refused(engine, serve, prompts, tmp_path):
    server, out = serve(engine, fault=failing(100, plainly_refused, PROMPTS[3:4])), tmp_path / "a.h5"
    recorded(server.url, prompts, out).close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other in (Settings(max_tokens=MOST, seed=1), Settings(max_tokens=5), Settings(MOST, prefix_cache=True)):
        with pytest.raises(
            UsageError, match="keeps answers to other prompts, or to the same ones asked in another way"
        ):
            recorded(server.url, prompts, out, settings=other)
    written(tmp_path, PROMPTS[:2])
    with pytest.raises(UsageError, match="keeps answers to other prompts"):
        recorded(server.url, prompts, out)
    written(tmp_path, PROMPTS)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_servers_without_usable_answers_are_refused(serve, prompts, tmp_path):
    server = serve("vllm")
    with pytest.raises(
        UsageError, match=r"the answers of x/Some-Model do not say its sizes: give --model or --experts\.$"
    ):
        record(server.url, prompts, tmp_path / "a.h5")
    with pytest.raises(UsageError, match="serves no 'other', but x/Some-Model"):
        recorded(server.url, prompts, tmp_path / "a.h5", served_model="other")
    assert server.asked == [] and left(tmp_path) == []


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({"/v1/models": {"data": []}}, "lists no model: give --engine and --served-model"),
        ({"/v1/models": []}, "lists no model: give --engine and --served-model"),
        ({"/v1/models": {"data": [{"id": "m", "owned_by": "me"}]}}, r"owned by 'me'\): give --engine vllm or"),
        ({"/server_info": {"enable_return_routed_experts": False}}, "runs without --enable-return-routed-experts"),
    ],
)
def test_servers_with_malformed_facts_are_refused(serve, prompts, tmp_path, answers, sentence):
    def fault(handler, path, body):
        if path in answers:
            handler.reply(answers[path])
        return path in answers

    with pytest.raises(MoetraceError, match=sentence):
        recorded(serve("sglang", fault=fault).url, prompts, tmp_path / "a.h5")
    assert left(tmp_path) == []
