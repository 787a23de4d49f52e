"""`record` against a local server that answers as vLLM and SGLang do: the trace is what the server routed."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import engine_server
from support.engine_server import DENSE, EXPERTS, LAYERS, TOP_K, EngineServer, routing_of
from support.writers import steps

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.live import crew
from moetrace.live.asks import Settings
from moetrace.live.recorder import record
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace

PROMPTS = [" ".join(f"w{number}-{word}" for word in range(2 + number % 5)) for number in range(12)]
MOST = 4


@pytest.fixture(params=["vllm", "sglang"])
def engine(request):
    return request.param


@pytest.fixture
def serve():
    """Start servers that end with the test."""
    started: list[EngineServer] = []

    def serve(engine: str, **given) -> EngineServer:
        started.append(EngineServer(engine, **given))
        return started[-1]

    yield serve
    for server in started:
        server.close()


@pytest.fixture
def prompts(tmp_path):
    return written(tmp_path, PROMPTS)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(crew, "FIRST_WAIT_S", 0.01)


def written(folder: Path, lines) -> Path:
    path = folder / "prompts.jsonl"
    lines = [{"prompt": line} if isinstance(line, str) else line for line in lines]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def recorded(
    url: str, prompts: Path, out: Path, notes: list[str] | None = None, strict: bool = False, **given
) -> Trace:
    note = [].append if notes is None else notes.append
    hints = Hints(num_experts=EXPERTS, top_k=TOP_K, strict=strict, note=note)
    settings = given.pop("settings", Settings(max_tokens=MOST))
    record(url, prompts, out, hints=hints, settings=settings, **given)
    return Trace.open(out)


def check_routing(trace: Trace, texts: list[str], most: int = MOST) -> None:
    """Check every id, request, position and phase against what the server draws for these prompts."""
    trace.verify()
    routed = [routing_of(text, most) for text in texts]
    ids = np.concatenate([ids for _, ids in routed])
    ids[:, :DENSE] = 255  # absent, as an import has it
    assert np.array_equal(trace.read("experts", 0, trace.rows), ids) and trace.layers == LAYERS
    lengths = [len(ids) for _, ids in routed]
    assert trace.read("request", 0, trace.rows).tolist() == np.repeat(np.arange(len(texts)), lengths).tolist()
    assert trace.read("position", 0, trace.rows).tolist() == [i for length in lengths for i in range(length)]
    assert steps(trace) == [step for tokens, _ in routed for step in ([(tokens, 0)] + [(1, 1)] * (most - 1))]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "prompts.jsonl")


def test_the_trace_is_what_was_routed_and_what_an_import_makes(engine, serve, prompts, tmp_path):
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
        **{"recorded": "live", "prompts": 12, "max_tokens": MOST, "temperature": 0.0, "seed": None},
        **{"ignore_eos": False, "prefix_cache": False, "engine_version": engine_server.VERSIONS[engine]},
    }
    assert server.url.rpartition(":")[2] not in json.dumps(trace.source)


def test_concurrency_does_not_change_a_byte(engine, serve, prompts, tmp_path):
    server = serve(engine)
    for concurrency in (1, 12):
        recorded(server.url, prompts, tmp_path / f"{concurrency}.h5", concurrency=concurrency).close()
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "12.h5").read_bytes()
    assert left(tmp_path) == ["1.h5", "12.h5"], "the answers go when the trace is there"


def test_what_a_request_says(engine, serve, tmp_path):
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


def test_a_shared_prefix_cache_is_asked_for(engine, serve, prompts, tmp_path):
    server = serve(engine)
    settings = Settings(max_tokens=MOST, prefix_cache=True)
    recorded(server.url, prompts, tmp_path / "a.h5", settings=settings).close()
    assert not any({"extra_key", "cache_salt"} & body.keys() for _, _, body in server.asked)


def failing(times: int, how, texts=tuple(PROMPTS)):
    """A fault that comes over each of the prompts so many times."""
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def fault(handler, path, body):
        if body is None:
            return False
        text, _ = engine_server.asked_for(path, body)
        with lock:
            seen[text] = seen.get(text, 0) + 1
            now = text in texts and seen[text] <= times
        if now:
            how(handler, path, body)
        return now

    return fault


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
def test_what_passes_is_asked_again(engine, serve, prompts, tmp_path, how):
    server, calm = serve(engine, fault=failing(2, how)), serve(engine)
    recorded(calm.url, prompts, tmp_path / "calm.h5").close()
    check_routing(recorded(server.url, prompts, tmp_path / "a.h5"), PROMPTS)
    assert len(server.asked) == 3 * len(PROMPTS)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "calm.h5").read_bytes()


def changed(change):
    """A fault that changes an answer."""

    def how(handler, path, body):
        answer = engine_server.answer(handler.server.engine, path, body)
        handler.reply(change(answer) or answer)

    return how


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


def plainly_refused(handler, path, body):
    handler.reply({"error": {"message": "prompt is too long."}}, 400)


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
def test_what_holds_for_all_ends_the_run(engine, serve, prompts, tmp_path, status):
    def fault(handler, path, body):
        if body is not None:
            handler.reply({"detail": "no"}, status)
        return body is not None

    server = serve(engine, fault=fault)
    with pytest.raises(MoetraceError, match=rf"answers {status}: "):
        recorded(server.url, prompts, tmp_path / "a.h5", concurrency=1)
    assert len(server.asked) == 1 and left(tmp_path) == []


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


def test_what_is_no_answer_of_a_server(serve, prompts, tmp_path):
    server = serve("vllm")
    with pytest.raises(UsageError, match="does not say its sizes|do not say its sizes: give --model or --experts"):
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
def test_what_a_server_says_of_itself(serve, prompts, tmp_path, answers, sentence):
    def fault(handler, path, body):
        if path in answers:
            handler.reply(answers[path])
        return path in answers

    with pytest.raises(MoetraceError, match=sentence):
        recorded(serve("sglang", fault=fault).url, prompts, tmp_path / "a.h5")
    assert left(tmp_path) == []
