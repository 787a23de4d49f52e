"""`moetrace record`: what it writes, says and refuses, and that no key stays anywhere."""

import json

import pytest
from support.engine_server import EngineServer

from moetrace.trace import Trace

SECRET = "sk-very-secret-123"
SIZES = ["--experts", 8, "--top-k", 2, "--max-tokens", 3]


@pytest.fixture(params=["vllm", "sglang"])
def server(request):
    server = EngineServer(request.param)
    yield server
    server.close()


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one two\n\nthree four five\n", encoding="utf-8")
    return tmp_path / "p.txt"


def test_text_becomes_a_trace_and_the_key_goes_to_the_server_only(run, server, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    out = tmp_path / "a.h5"
    options = ["--keep-answers", "--header", "X-Team: 7"]
    code, said, err = run("record", f"{server.url}/v1", "--prompts", prompts, "-o", out, *SIZES, *options)
    assert (code, said) == (0, "") and err.startswith(f"{out}: x/Some-Model, 9 rows in 6 steps, ")
    with Trace.open(out) as trace:
        trace.verify()
        assert trace.source["recorded"] == "live"
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {f"Bearer {SECRET}"}
    assert {headers["X-Team"] for _, headers, _ in server.asked} == {"7"}
    assert SECRET not in err and not [path for path in tmp_path.iterdir() if SECRET.encode() in path.read_bytes()]
    assert len((tmp_path / "a.h5.answers.jsonl").read_text().splitlines()) == 2


def test_an_earlier_trace_stays_if_the_server_fails(run, server, prompts, tmp_path):
    def fault(handler, path, body):
        if body is not None:
            handler.reply({"error": {"message": f"bad key {handler.headers['Authorization']}"}}, 401)
        return body is not None

    server.fault, out = fault, tmp_path / "a.h5"
    out.write_bytes(b"before")
    code, said, err = run(
        *("record", server.url, "--prompts", prompts, "-o", out, *SIZES, "--header", f"Authorization: Bearer {SECRET}")
    )
    assert (code, said, out.read_bytes()) == (1, "", b"before")
    assert "answers 401: bad key ... (give a key as --header or OPENAI_API_KEY)." in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "p.txt"]


def test_a_failed_prompt_is_a_note(run, server, prompts, tmp_path):
    def fault(handler, path, body):
        bad = body is not None and "three" in json.dumps(body)
        if bad:
            handler.reply({"error": {"message": "\x1b[31mtoo long"}}, 400)
        return bad

    server.fault = fault
    code, _, err = run("record", server.url, "--prompts", prompts, "-o", tmp_path / "a.h5", *SIZES)
    assert (
        code == 0 and "note: 1 prompt of 2 failed, the first because" in err and "line 3" in err and "\x1b" not in err
    )
    code, _, err = run("record", server.url, "--prompts", prompts, "-o", tmp_path / "b.h5", *SIZES, "--strict")
    assert code == 1 and "1 prompt failed, the first because" in err and not (tmp_path / "b.h5").exists()


@pytest.mark.parametrize(
    ("url", "options", "code", "sentence"),
    [
        ("http://127.0.0.1:9", [], 1, "http://127.0.0.1:9 cannot be reached: Connection refused."),
        ("localhost:8000", [], 2, "the URL must begin with http://HOST or https://HOST"),
        (f"http://me:{SECRET}@a", [], 2, "the URL holds a name or a password"),
        ("http://127.0.0.1:9", ["--header", SECRET], 2, "--header number 1 is not of the form 'Name: value'"),
        ("http://127.0.0.1:9", ["--keep-cached"], 2, "is for --prefix-cache"),
        ("http://127.0.0.1:9", ["--concurrency", 0], 2, "--concurrency"),
        ("http://127.0.0.1:9", ["--temperature", "nan"], 2, "--temperature"),
    ],
)
def test_wrong_urls_and_options_are_refused_in_one_sentence(run, prompts, tmp_path, url, options, code, sentence):
    found, said, err = run("record", url, "--prompts", prompts, "-o", tmp_path / "a.h5", *SIZES, *options)
    assert (found, said) == (code, "") and sentence in err and err.count("\n") == 1 and SECRET not in err
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no prompt"),
        ('{"prompt": ""}\n', "is an empty prompt"),
        ('{"prompt": "a", "x": 1}\n', "line 1 is not"),
    ],
)
def test_prompts_are_read_before_the_server_is_asked(run, server, prompts, tmp_path, text, sentence):
    prompts.write_text(text, encoding="utf-8")
    code, _, err = run("record", server.url, "--prompts", prompts, "-o", tmp_path / "a.h5", *SIZES)
    assert code == 1 and sentence in err and err.count("\n") == 1 and server.asked == []
    assert list(tmp_path.iterdir()) == [prompts]
