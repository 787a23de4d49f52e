"""One request and its answer: bounds, deadlines, secrets, and no step to another place."""

import json
import threading
import time

import pytest
from support.engine_server import EngineServer

from moetrace.live.exchange import ERROR_BYTES, Client, RequestError, address_of, headers_of
from moetrace.spec.errors import UsageError

SECRET = "sk-very-secret-123"


@pytest.fixture
def ask():
    """Ask a server that answers as `how` does; return what came, or the error."""
    servers: list[EngineServer] = []

    def ask(how, most_bytes=1000, timeout_s=5.0):
        def fault(handler, path, body):
            how(handler)
            return True

        server = EngineServer("vllm", fault=fault)
        servers.append(server)
        client = Client(address_of(server.url), headers_of((), SECRET), timeout_s)
        try:
            return client.post("/v1/completions", b"{}", most_bytes)
        except RequestError as error:
            assert "\n" not in str(error) and SECRET not in str(error) and len(str(error)) < 500
            return error

    yield ask
    for server in servers:
        server.close()


def body_of(data: bytes, *headers: tuple[str, str], status: int = 200, chunked: bool = False):
    def how(handler):
        handler.protocol_version, sent = "HTTP/1.1" if chunked else "HTTP/1.0", data
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        if chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            pieces = [data[start : start + 100] for start in range(0, len(data), 100)] + [b""]
            sent = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        handler.end_headers()
        handler.wfile.write(sent)
        handler.close_connection = True

    return how


def test_the_largest_body_is_read_and_one_byte_more_is_not(ask):
    assert ask(body_of(b"x" * 1000)) == b"x" * 1000
    for how in (body_of(b"x" * 1001), body_of(b"x" * 2000, chunked=True)):
        error = ask(how)
        assert "sends an answer of more than 1,000 bytes" in str(error) and not error.again
    assert "announces an answer of 1,001 bytes" in str(ask(body_of(b"", ("Content-Length", "1001"))))


def test_a_redirect_is_not_followed(ask):
    there = EngineServer("vllm")
    for status in (301, 302, 303, 307, 308):
        error = ask(body_of(b"", ("Location", f"{there.url}/{SECRET}"), status=status))
        assert f"redirects to {there.url}/...: give that address if you trust it." in str(error) and error.of_all
    there.close()
    assert there.asked == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500, 503])
def test_an_error_says_what_the_server_says_but_no_secret(ask, status):
    said = json.dumps({"error": {"message": f"key {SECRET}\nBearer {SECRET} is wrong" + "x" * 3000}}).encode()
    error = ask(body_of(said, status=status))
    assert f"/v1/completions answers {status}: key ... " in str(error)
    assert error.again == (status in (429, 500, 503)) and error.of_all == (status in (401, 403, 404))
    assert ("OPENAI_API_KEY" in str(error)) == (status in (401, 403))


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[" * 100_000, b'{"detail":[{"loc":["body"]}]}', b"plain"])
def test_an_error_of_any_body_is_one_sentence(ask, body):
    assert "answers 500" in str(ask(body_of(body, status=500)))


def test_a_long_wait_is_cut_short(ask):
    waits = [ask(body_of(b"", ("Retry-After", text), status=503)).wait_s for text in ("2", "99999", "soon", "9" * 500)]
    assert waits == [2, 60, None, None]


def test_headers_without_end_are_cut(ask):
    def how(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(300)) + b"\r\n")

    assert "was cut: " in str(ask(how))


def test_compressed_answers_are_refused(ask):
    assert "compresses its answers" in str(ask(body_of(b"", ("Content-Encoding", "gzip"))))


def test_silence_ends_at_the_timeout_and_at_close(ask):
    start_s = time.monotonic()
    assert "did not answer within 0.3 s" in str(ask(lambda _: time.sleep(1), timeout_s=0.3))
    assert time.monotonic() - start_s < 0.9
    server = EngineServer("vllm", delay_s=1.0)
    client = Client(address_of(server.url), {}, 60)
    threading.Timer(0.2, client.close).start()
    with pytest.raises(RequestError):
        client.post("/v1/completions", b"{}")
    assert time.monotonic() - start_s < 1.5
    with pytest.raises(RequestError, match="the run has ended"):
        client.get("/v1/models", 10)
    server.close()


def test_no_proxy_and_no_other_place(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = EngineServer("vllm")
    assert b"Some-Model" in Client(address_of(server.url), {}, 5).get("/v1/models", 10_000)
    server.close()
    with pytest.raises(RequestError, match=r"cannot be reached: .*refused\.$"):
        Client(address_of(server.url), {}, 5).get("/v1/models", 10_000)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a:80/v1", "http://a:80"),
        ("http://a:80/v1/", "http://a:80"),
        ("https://a/x/y/v1", "https://a/x/y"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses(url, address):
    assert str(address_of(url)) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a",
        "ftp://a",
        "http://",
        "http://a:99999",
        "http://me:pw-123@a",
        "http://a?key=pw-123",
        "http://a b",
        "http://a#b",
    ],
)
def test_malformed_addresses_are_refused_without_their_secret(url):
    with pytest.raises(UsageError) as found:
        address_of(url)
    assert "pw-123" not in str(found.value)


def test_headers():
    assert headers_of((), None) == {} and headers_of(("X: 1 ",), None) == {"X": "1"}
    assert headers_of((), "k") == {"Authorization": "Bearer k"}
    assert headers_of(("authorization: Basic z",), "k") == {"authorization": "Basic z"}
    for bad in ("no colon pw-123", "a b: pw-123", "X: pw-123\r\nY: 1", "X: pw-123é", "Host: pw-123"):
        with pytest.raises(UsageError) as found:
            headers_of((bad,), None)
        assert "pw-123" not in str(found.value)
    with pytest.raises(UsageError, match="OPENAI_API_KEY holds a letter"):
        headers_of((), "pw\n1")


@pytest.mark.parametrize("before", [0, 150, 170, 185, 190, 199, 200, 201])
def test_a_secret_across_the_cut_is_not_shown(ask, before):
    for said in (
        json.dumps({"error": {"message": f"{'x' * before}Bearer {SECRET}"}}).encode(),
        b"x" * before + f" Bearer {SECRET} ".encode() + b"y" * 300,
    ):
        error = ask(body_of(said, status=500))
        assert "very" not in str(error) and "sk-" not in str(error)
    error = ask(body_of(b"", ("Location", f"http://a/{'x' * before}{SECRET}"), status=302))
    assert "sk-" not in str(error)


def test_a_secret_across_the_end_of_the_read_bytes_is_not_shown(ask):
    for before in (b" " * (ERROR_BYTES - 12), b"x" + b" " * (ERROR_BYTES - 13), b"x" * (ERROR_BYTES - 12)):
        assert "sk-" not in str(ask(body_of(before + SECRET.encode(), status=500)))
