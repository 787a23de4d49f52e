"""A server that answers as vLLM or SGLang do, with routing that follows from the prompt: for `moetrace record`.

python engine_server.py ENGINE PORT DELAY_S     serve on 127.0.0.1 until the process is ended
"""

import base64
import io
import json
import sys
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

LAYERS, DENSE, TOP_K, EXPERTS = 4, 1, 2, 8
MODEL = "x/Some-Model"
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}

# Handler, path, body: answers a request in the place of the engine if it returns True.
Fault = Callable[["Handler", str, Any], bool]


class EngineServer(ThreadingHTTPServer):
    """Serves in threads of its own from when it is made until `close`."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, engine: str, port: int = 0, delay_s: float = 0.0, fault: Fault | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.engine, self.delay_s, self.fault = engine, delay_s, fault
        self.asked: list[tuple[str, dict[str, str], Any]] = []  # path, headers, body, of each POST
        self.under_way = self.most = 0  # requests at the same time
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request, client_address) -> None:
        """Clients go away in the middle: that is what is tested."""


class Handler(BaseHTTPRequestHandler):
    server: EngineServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.fault and self.server.fault(self, self.path, None):
            return
        engine = self.server.engine
        if self.path == "/v1/models":
            card = {"id": MODEL, "object": "model", "created": 1, "owned_by": engine, "root": MODEL, "parent": None}
            self.reply({"object": "list", "data": [card]})
        elif engine == "vllm" and self.path == "/version":
            self.reply({"version": VERSIONS[engine]})
        elif engine == "sglang" and self.path == "/server_info":
            told = {"model_path": MODEL, "api_key": "secret-of-the-server", "enable_return_routed_experts": True}
            self.reply(told | {"internal_states": [{}], "version": VERSIONS[engine]})
        else:
            self.reply({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append((self.path, dict(self.headers), body))
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            time.sleep(server.delay_s)
            if not (server.fault and server.fault(self, self.path, body)):
                self.reply(answer(server.engine, self.path, body))
        finally:
            with server.lock:
                server.under_way -= 1

    def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


def asked_for(path: str, body: Any) -> tuple[str, int]:
    """The prompt of a request as a text, and how many tokens may follow."""
    if path == "/generate":
        prompt, most = body.get("text", body.get("input_ids")), body["sampling_params"]["max_new_tokens"]
    else:
        prompt, most = body.get("prompt", body.get("messages")), body["max_tokens"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt), most


def routing_of(prompt: str, most: int) -> tuple[int, np.ndarray]:
    """The tokens of a prompt (one a word) and ids [tokens - 1, LAYERS, TOP_K]; layers below DENSE have no experts."""
    tokens = len(prompt.split())
    random = np.random.default_rng([zlib.crc32(prompt.encode()), most])
    ids = np.argsort(random.random((tokens + most - 1, LAYERS, EXPERTS)), axis=-1)[..., :TOP_K]
    ids[:, :DENSE] = 0
    return tokens, ids


def answer(engine: str, path: str, body: Any) -> dict:
    """What the engine answers; the id follows from the prompt, so that the same prompts give the same answers."""
    prompt, most = asked_for(path, body)
    tokens, ids = routing_of(prompt, most)
    name = f"cmpl-{zlib.crc32(prompt.encode()):08x}"
    if path == "/generate":
        return {"text": "é\n", "output_ids": [7] * most, "meta_info": meta_info(name, tokens, most, ids, body)}
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
    chat = path == "/v1/chat/completions"
    choice |= {"message": {"role": "assistant", "content": "é"}} if chat else {"text": "é\n"}
    usage = {"prompt_tokens": tokens, "completion_tokens": most, "total_tokens": tokens + most}
    whole = {
        "id": name,
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": body["model"],
    }
    if engine == "vllm":
        return whole | {"choices": [choice | {"routed_experts": npy_base64(ids)}], "usage": usage}
    extension: dict[str, Any] = {"routed_experts": int32_base64(ids)} if body.get("return_routed_experts") else {}
    if body.get("return_cached_tokens_details"):
        extension |= {"cached_tokens_details": {"device": 0, "host": 0}}
    return whole | {"choices": [choice], "usage": usage, "sglext": extension}


def meta_info(name: str, tokens: int, most: int, ids: np.ndarray, body: Any) -> dict:
    meta = {"id": name, "finish_reason": {"type": "length", "length": most}, "weight_version": "default"}
    meta |= {"prompt_tokens": tokens, "completion_tokens": most, "cached_tokens": 0, "e2e_latency": 0.5}
    return meta | ({"routed_experts": int32_base64(ids)} if body.get("return_routed_experts") else {})


def npy_base64(ids: np.ndarray) -> str:
    """As vLLM sends it: an npy file of uint8 for up to 256 experts."""
    file = io.BytesIO()
    np.save(file, ids.astype(np.uint8))
    return base64.b64encode(file.getvalue()).decode()


def int32_base64(ids: np.ndarray) -> str:
    """As SGLang sends it: int32 without a header."""
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


if __name__ == "__main__":
    serving = EngineServer(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    print(serving.url, flush=True)
    serving.thread.join()
