"""HTTP with one server: a request, and its whole answer before a deadline and under a ceiling, or one sentence.

Nothing is followed to another place, no proxy of the environment is used, and no cookie is kept: requests go only to
the address that the user named. Each request has a connection of its own.
"""

import http.client
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from moetrace.importers.reading.text import MAX_LINE_BYTES
from moetrace.spec.errors import MoetraceError, UsageError

CONNECT_S = 10.0
ANSWER_BYTES = MAX_LINE_BYTES - 4096  # of an answer with its mark in a line of the journal, which importers still read
ERROR_BYTES = 64 << 10  # read of an answer that says what is wrong
_PIECE_BYTES = 1 << 16
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_OF_ALL = {401, 403, 404, 405, 407, 421, 426}
LONGEST_WAIT_S = 60  # before a request is tried again, even if the server asks for more
_SHOWN_LETTERS = 200  # of what a server says


class RequestError(MoetraceError):
    """A request without a usable answer.

    `again`: the same request may go well later, after `wait_s` if the server says so. `of_all`: if it does not, then no
    other request will either.
    """

    def __init__(self, sentence: str, *, again: bool = False, of_all: bool = False, wait_s: int | None = None) -> None:
        super().__init__(sentence)
        self.again, self.of_all, self.wait_s = again, of_all, wait_s


class Address(NamedTuple):
    """Where a server is, without the path of its interface."""

    tls: bool
    host: str
    port: int | None
    prefix: str  # of its paths, without a / at the end

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"http{'s' if self.tls else ''}://{host}{port}{self.prefix}"


def address_of(url: str) -> Address:
    """The address that a user names, with or without `/v1` at its end; raise UsageError for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"the URL cannot be read: {error}.") from None
    if parts.username is not None or parts.password is not None:
        raise UsageError("the URL holds a name or a password: give it as --header 'Authorization: ...'.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError("the URL must begin with http://HOST or https://HOST.")
    if parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError("the URL must be http://HOST:PORT, or the same with /v1, and no more than that.")
    return Address(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"))


def headers_of(given: tuple[str, ...], key: str | None) -> dict[str, str]:
    """The headers that a user gives as `Name: value`, and his key as a bearer's unless they authorize already.

    Raises UsageError, which does not repeat a value.
    """
    headers: dict[str, str] = {}
    for number, text in enumerate(given, 1):
        name, colon, value = text.partition(":")
        if not colon or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"--header number {number} is not of the form 'Name: value'.")
        if not value.strip().isascii() or not value.strip().isprintable():
            raise UsageError(f"--header {name} holds a letter that no header may hold.")
        if name.lower() in ("host", "content-length", "transfer-encoding", "accept-encoding", "connection"):
            raise UsageError(f"--header {name} belongs to the connection, which moetrace makes.")
        headers[name] = value.strip()
    if key and not any(name.lower() == "authorization" for name in headers):
        if not key.strip().isascii() or not key.strip().isprintable():
            raise UsageError("OPENAI_API_KEY holds a letter that no header may hold.")
        headers["Authorization"] = f"Bearer {key.strip()}"
    return headers


class Client:
    """Asks one server; may be used by several threads at once, and ended by another one."""

    def __init__(self, address: Address, headers: Mapping[str, str], timeout_s: float) -> None:
        self.address, self._headers, self._timeout_s = address, dict(headers), timeout_s
        self._context = ssl.create_default_context() if address.tls else None
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._closed = False

    def get(self, path: str, most_bytes: int) -> bytes:
        """The body of the answer to GET; raises RequestError."""
        return self._ask("GET", path, None, most_bytes, min(self._timeout_s, CONNECT_S))

    def post(self, path: str, body: bytes, most_bytes: int = ANSWER_BYTES) -> bytes:
        """The body of the answer to POST of a JSON text; raises RequestError."""
        return self._ask("POST", path, body, most_bytes, self._timeout_s)

    def close(self) -> None:
        """End the requests under way, in all threads; every later request fails."""
        with self._lock:
            self._closed = True
            for watch in self._watches:
                watch.end()

    def _ask(self, method: str, path: str, sent: bytes | None, most_bytes: int, timeout_s: float) -> bytes:
        host, port, connect_s = self.address.host, self.address.port, min(timeout_s, CONNECT_S)
        if self._context is None:
            connection = http.client.HTTPConnection(host, port, timeout=connect_s)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=connect_s, context=self._context)
        with self._watched(timeout_s) as watch:
            try:
                self._connect(connection, watch, timeout_s)
                headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
                headers |= {"Content-Type": "application/json"} if sent is not None else {}
                # A server may answer, and close, before it has read all.
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, self.address.prefix + path, sent, headers | self._headers)
                response = connection.getresponse()
                with response:
                    self._check_head(response, path)
                    body = _read(response, most_bytes, self.address)
                if watch.expired:  # a body without a length ends where the connection does
                    raise TimeoutError
                return body
            except (OSError, http.client.HTTPException, ValueError) as error:
                if watch.expired or isinstance(error, TimeoutError):
                    raise RequestError(
                        f"{self.address} did not answer within {timeout_s:g} s: see --timeout."
                    ) from None
                why = self._shown(_why(error))
                raise RequestError(f"the answer of {self.address} was cut: {why}.", again=True) from None
            finally:
                connection.close()

    def _connect(self, connection: http.client.HTTPConnection, watch: "_Watch", timeout_s: float) -> None:
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            raise RequestError(
                f"{self.address} has no certificate to trust: {error.verify_message}.", of_all=True
            ) from None
        except (OSError, UnicodeError) as error:
            why = self._shown(_why(error))
            raise RequestError(f"{self.address} cannot be reached: {why}.", again=True, of_all=True) from None
        connection.sock.settimeout(timeout_s)
        watch.socket = connection.sock
        if self._closed or watch.expired:
            watch.end()

    @contextmanager
    def _watched(self, timeout_s: float) -> Iterator["_Watch"]:
        """Yield what ends a connection at its deadline, however slowly it goes on until then."""
        watch = _Watch()
        timer = threading.Timer(timeout_s, watch.expire)
        timer.daemon = True
        with self._lock:
            if self._closed:
                raise RequestError("the run has ended.", of_all=True)
            self._watches.add(watch)
        timer.start()
        try:
            yield watch
        finally:
            timer.cancel()
            with self._lock:
                self._watches.discard(watch)

    def _check_head(self, response: http.client.HTTPResponse, path: str) -> None:
        status = response.status
        if 300 <= status < 400:
            to = self._shown(response.getheader("Location") or "nowhere")
            raise RequestError(f"{self.address} redirects to {to}: give that address if you trust it.", of_all=True)
        if status != 200:
            said = self._shown(_error_of(response))
            wait = response.getheader("Retry-After") or ""
            wait_s = min(int(wait), LONGEST_WAIT_S) if wait.isascii() and wait.isdecimal() and len(wait) < 9 else None
            hint = " (give a key as --header or OPENAI_API_KEY)" if status in (401, 403) else ""
            sentence = f"{self.address}{path} answers {status}{f': {said}' if said else ''}{hint}."
            raise RequestError(sentence, again=status in _AGAIN, of_all=status in _OF_ALL, wait_s=wait_s)
        coding = response.getheader("Content-Encoding") or "identity"
        if coding.lower() != "identity":
            raise RequestError(
                f"{self.address} compresses its answers, which nobody asked for: switch that off.", of_all=True
            )

    def _shown(self, text: str) -> str:
        """A stranger's text without secrets, then cut: a secret across the cut would not be found any more."""
        text = " ".join(text.split())
        for value in self._headers.values():
            for secret in (" ".join(value.split()), value.rpartition(" ")[2]):
                text = text.replace(secret, "...") if len(secret) > 3 else text
        return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


class _Watch:
    """A connection under way, and how to end it from another thread."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.expired = False

    def expire(self) -> None:
        self.expired = True
        self.end()

    def end(self) -> None:
        if self.socket is not None:
            with suppress(OSError):  # not SSLSocket.shutdown, which would take the layer away from a reader
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse, most_bytes: int, address: Address) -> bytes:
    """The whole body; raises RequestError if it is larger, ValueError if it is shorter than it says."""
    announced = response.length
    if announced is not None and announced > most_bytes:
        raise RequestError(f"{address} announces an answer of {announced:,} bytes; at most {most_bytes:,} are read.")
    pieces, size = [], 0
    while piece := response.read(_PIECE_BYTES):
        size += len(piece)
        if size > most_bytes:
            raise RequestError(f"{address} sends an answer of more than {most_bytes:,} bytes, which is not read.")
        pieces.append(piece)
    if announced is not None and size != announced:
        raise ValueError(f"{size:,} of {announced:,} bytes came")
    return b"".join(pieces)


class _Told(msgspec.Struct):
    """The answer of an engine instead of a completion: `message`, in `error` or not."""

    message: str = ""
    detail: msgspec.Raw = msgspec.Raw(b"")
    error: msgspec.Raw = msgspec.Raw(b"")


def _error_of(response: http.client.HTTPResponse) -> str:
    """The message in an error's body."""
    body = response.read(ERROR_BYTES)
    if len(body) == ERROR_BYTES:  # its last word may be half a secret
        body = body.rsplit(None, 1)[0] if body.split(None, 1)[1:] else b""
    text = ""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        told = msgspec.json.decode(body, type=_Told)
        if not told.message and bytes(told.error):
            with suppress(msgspec.MsgspecError):
                told = msgspec.json.decode(told.error, type=_Told)
        text = told.message or bytes(told.error or told.detail).decode(errors="replace")
    return " ".join((text or body.decode(errors="replace")).split()).rstrip(".")


def _why(error: Exception) -> str:
    """The message of an error of a socket or of http.client, as the end of a sentence."""
    if isinstance(error, http.client.IncompleteRead):
        return f"{len(error.partial):,} bytes of its last part came"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
