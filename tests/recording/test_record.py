"""`moetrace record` from a server that answers well: the trace is what an import makes of the answers, in their order."""

import json
import threading

import h5py
import numpy as np
import pytest
from support.engine_server import DENSE, EXPERTS, LAYERS, MODEL, TOP_K, EngineServer, answer, routing_of

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces

from .conftest import PROMPTS

ENGINES = ["vllm", "sglang"]
CHATS = [
    json.dumps({"messages": [{"role": "user", "content": prompt}], "max_tokens": 1 + n % 3})
    for n, prompt in enumerate(PROMPTS)
]


def expected(prompts, most=4):
    """Ids of all rows, one prompt after the other, with what no router chose absent; and each row's position."""
    routed = [routing_of(prompt, most) for prompt in prompts]
    ids = np.concatenate([ids for _, ids in routed])
    ids[:, :DENSE] = 255
    phase = np.concatenate([np.arange(len(ids)) >= tokens for tokens, ids in routed])
    return ids, np.concatenate([np.arange(len(ids)) for _, ids in routed]), phase


def alike(a, b):
    """Whether two traces hold the same bytes but for `source`."""
    with h5py.File(a) as first, h5py.File(b) as second:
        names = []
        first.visit(names.append)
        others = []
        second.visit(others.append)
        assert names == others
        for name in names:
            if isinstance(first[name], h5py.Dataset):
                assert (
                    first[name].dtype == second[name].dtype and first[name][()].tobytes() == second[name][()].tobytes()
                )
        attributes = [dict(file.attrs) for file in (first, second)]
        assert attributes[0].keys() == attributes[1].keys()
        differ = {key for key in attributes[0] if not np.array_equal(attributes[0][key], attributes[1][key])}
        assert differ <= {"source", "content_sha256"}, differ


@pytest.mark.parametrize("engine", ENGINES)
def test_every_row_is_what_the_server_routed(serve, recorded, engine):
    server = serve(engine)
    said = recorded(server)
    ids, position, decode = expected(PROMPTS)
    assert np.array_equal(said.trace.read("experts", 0, said.trace.rows), ids)
    assert np.array_equal(said.trace.read("position", 0, said.trace.rows), position)
    assert np.array_equal(np.repeat(said.trace.phase, np.diff(said.trace.offset)), decode)
    assert np.unique(said.trace.read("request", 0, said.trace.rows)).size == len(PROMPTS)
    assert said.failed == 0 and said.notes == [] and not said.answers.exists(), "the journal is gone"
    source = said.trace.source
    assert source["engine_version"] and source["prompts"] == len(PROMPTS) and source["max_tokens"] == 4
    assert (said.trace.model, said.trace.num_experts, said.trace.top_k) == (MODEL, EXPERTS, TOP_K)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "prompts"), [("p.txt", PROMPTS), ("p.jsonl", CHATS)])
def test_an_import_of_the_kept_answers_is_the_same_trace(serve, recorded, tmp_path, engine, name, prompts):
    said = recorded(serve(engine), prompts, name=name, keep_answers=True, hints={"layers": LAYERS - DENSE})
    other = tmp_path / "imported.h5"
    hints = Hints(num_experts=EXPERTS, top_k=TOP_K if engine == "sglang" else None, layers=LAYERS - DENSE)
    import_traces(said.answers, other, hints=hints)
    alike(said.out, other)
    assert said.trace.layer_index.tolist() == [1, 2, 3], "the dense layer is no layer of the trace"


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_without_the_mark_give_the_same_trace(serve, recorded, tmp_path, engine):
    """What another client saves, line by line, is imported as what `record` keeps."""
    server = serve(engine)
    said = recorded(server, concurrency=1)
    log = tmp_path / "log.jsonl"
    answers = [answer(engine, path, body) for path, _, body in server.asked]
    log.write_text("".join(json.dumps({"model": MODEL} | one) + "\n" for one in answers))
    import_traces(log, tmp_path / "imported.h5", hints=Hints(num_experts=EXPERTS, top_k=TOP_K))
    alike(said.out, tmp_path / "imported.h5")


def test_the_order_of_answers_does_not_matter(serve, recorded):
    """The first prompts are answered last: the same bytes."""
    plain = recorded(serve())
    held = plain.out.read_bytes()
    plain.out.unlink()
    last = threading.Event()

    def late(handler, path, body):
        if body and body["prompt"] == PROMPTS[-1]:
            last.set()
        elif body and body["prompt"] == PROMPTS[0]:
            assert last.wait(10)
        return False

    said = recorded(serve(fault=late), concurrency=3, keep_answers=True)
    assert said.out.read_bytes() == held
    numbers = [json.loads(line)["moetrace"]["prompt"] for line in said.answers.read_text().splitlines()]
    assert numbers == list(range(len(PROMPTS)))


def test_several_are_asked_at_a_time_and_no_more(serve, recorded):
    server = serve(delay_s=0.05)
    recorded(server, concurrency=4)
    assert server.most == 4 and len(server.asked) == len(PROMPTS)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_asked(serve, recorded, engine):
    lines = [
        {"prompt": "a b"},
        {"token_ids": [5, 6]},
        {"messages": [{"role": "user", "content": [1]}], "max_tokens": 2},
    ]
    server = serve(engine)
    recorded(server, [json.dumps(line) for line in lines], name="p.jsonl", concurrency=1, seed=3, ignore_eos=True)
    (path, _, text), (_, _, ids), (chat_path, _, chat) = server.asked
    sampling = {"temperature": 0.0, "seed": 3, "ignore_eos": True, "max_tokens": 4}
    salts = {body.pop("extra_key" if at == "/generate" else "cache_salt") for at, _, body in server.asked}
    assert len(salts) == 3, "no prompt finds what another one left in the prefix cache"
    messages = {"model": MODEL, "messages": lines[2]["messages"]} | sampling | {"max_tokens": 2}
    assert chat_path == "/v1/chat/completions"
    if engine == "vllm":
        assert path == "/v1/completions" and text == {"model": MODEL, "prompt": "a b"} | sampling
        assert ids == {"model": MODEL, "prompt": [5, 6]} | sampling and chat == messages
    else:
        sampling = {"temperature": 0.0, "sampling_seed": 3, "ignore_eos": True, "max_new_tokens": 4}
        common = {"sampling_params": sampling, "return_routed_experts": True}
        assert path == "/generate" and text == {"text": "a b"} | common and ids == {"input_ids": [5, 6]} | common
        assert chat == messages | {"return_routed_experts": True, "return_cached_tokens_details": True}


def test_a_shared_prefix_cache_is_no_salt_and_cached_rows_are_left_out(serve, recorded):
    def cached(handler, path, body):
        if body is None:
            return False
        told = answer("sglang", path, body)
        told["meta_info"]["cached_tokens"] = 2
        handler.reply(told)
        return True

    server = serve("sglang", fault=cached)
    said = recorded(server, prefix_cache=True)
    assert not any("extra_key" in body for _, _, body in server.asked)
    assert said.trace.source["left_out_cached_rows"] == 2 * len(PROMPTS) and "cached" in said.notes[0]
    said.out.unlink()
    assert recorded(server, prefix_cache=True, hints={"keep_cached": True}).trace.rows == said.trace.rows + 24


def test_cached_tokens_by_their_places_count(serve, recorded):
    """Without --enable-cache-report, the OpenAI interface of SGLang tells them only in `sglext`."""

    def cached(handler, path, body):
        if body is None:
            return False
        told = answer("sglang", path, body)
        told["sglext"]["cached_tokens_details"] = {"device": 1, "host": 1, "storage": 1, "storage_backend": "file"}
        handler.reply(told)
        return True

    said = recorded(serve("sglang", fault=cached), CHATS, name="p.jsonl", prefix_cache=True)
    assert said.trace.source["left_out_cached_rows"] == 3 * len(CHATS)


def test_the_models_name_tells_sizes(serve, recorded):
    def named(handler, path, body):
        if path == "/v1/models":
            handler.reply({"data": [{"id": "you/tiny-OLMoE", "owned_by": "vllm"}]})
        return path == "/v1/models"

    said = recorded(serve(fault=named), hints={"num_experts": None, "top_k": None})
    assert said.trace.num_experts == 32 and "taken as tiny-olmoe" in said.notes[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_users_words_replace_questions(serve, recorded, engine):
    def silent(handler, path, body):
        if body is None:
            handler.reply({}, 404)
        return body is None

    said = recorded(serve(engine, fault=silent), engine=engine, served_model=MODEL)
    assert said.failed == 0 and "engine_version" not in said.trace.source


def test_no_key_is_in_the_trace_nor_in_the_answers(serve, recorded):
    server = serve("sglang")
    said = recorded(server, headers={"Authorization": "Bearer my-secret-key"}, keep_answers=True)
    assert all(headers["Authorization"] == "Bearer my-secret-key" for _, headers, _ in server.asked)
    for path in (said.out, said.answers):
        assert b"secret" not in path.read_bytes()


def test_proxies_of_the_environment_are_not_used(serve, recorded, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert recorded(serve()).failed == 0


class TestResuming:
    """A run that ended early, and the same one again."""

    def test_only_what_is_missing_is_asked(self, serve, recorded):
        whole = recorded(serve())
        held = whole.out.read_bytes()
        whole.out.unlink()
        server = serve(fault=lambda handler, path, body: bool(body) and len(handler.server.asked) > 5 and gone(handler))
        said = recorded(server, concurrency=1)
        assert "failed in a row" in said.error or "cut" in said.error
        kept = said.answers.read_bytes().count(b"\n")
        assert kept == 5 and said.notes[-1].endswith("keeps 5 of 12 answers: the same command asks for the others.")
        again = serve()
        said = recorded(again)
        assert len(again.asked) == len(PROMPTS) - 5 and said.out.read_bytes() == held and not said.answers.exists()

    def test_a_last_line_that_was_cut_is_asked_again(self, serve, recorded):
        said = recorded(serve(), keep_answers=True)
        whole = said.answers.read_bytes()
        held = said.out.read_bytes()
        for cut in (1, 40, 900):
            said.answers.write_bytes(whole[:-cut])
            server = serve()
            recorded(server, keep_answers=True)
            assert len(server.asked) in (1, 2)
            assert said.answers.read_bytes() == whole and said.out.read_bytes() == held

    def test_kept_answers_are_not_asked_again(self, serve, recorded):
        recorded(serve(), keep_answers=True)
        server = serve()
        assert recorded(server).failed == 0 and server.asked == []

    @pytest.mark.parametrize(
        "change",
        [
            {"max_tokens": 5},
            {"temperature": 0.5},
            {"prompts": PROMPTS[::-1]},
            {"prompts": PROMPTS[:5]},
            {"prefix_cache": True},
        ],
    )
    def test_answers_to_something_else_are_not_taken(self, serve, recorded, change):
        said = recorded(serve(), keep_answers=True)
        held = said.answers.read_bytes()
        said.out.unlink()
        server = serve()
        error = recorded(server, **change).error
        assert "keeps answers to other prompts" in error and server.asked == [] and said.answers.read_bytes() == held

    @pytest.mark.parametrize("content", ["{}\n", "\n", '{"choices": []}\n', "x" * 300 + "\n"])
    def test_a_file_of_somebody_else_is_left_alone(self, serve, recorded, content):
        said = recorded(serve(), keep_answers=True)
        said.out.unlink()
        said.answers.write_text(content)
        assert "line 1 is no answer that moetrace record put there" in recorded(serve()).error
        assert said.answers.read_text() == content

    def test_a_link_is_not_followed(self, serve, recorded, tmp_path):
        (tmp_path / "out.h5.answers.jsonl").symlink_to(tmp_path / "elsewhere")
        assert "no ordinary file" in recorded(serve()).error and not (tmp_path / "elsewhere").exists()

    def test_two_runs_do_not_share_a_file(self, serve, recorded):
        begun, go = threading.Event(), threading.Event()

        def wait(handler, path, body):
            if body:
                begun.set()
                assert go.wait(20)
            return False

        other = serve(fault=wait)
        found = []
        thread = threading.Thread(target=lambda: found.append(recorded(other)))
        thread.start()
        assert begun.wait(20)
        error = recorded(serve()).error
        go.set()
        thread.join()
        assert "is in use" in error and found[0].failed == 0


def gone(handler) -> bool:
    """Close the connection instead of an answer."""
    handler.close_connection = True
    return True


def test_the_server_of_the_tests_is_torn_down():
    server = EngineServer("vllm")
    server.close()
    assert not server.thread.is_alive()
