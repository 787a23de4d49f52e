"""Recordings from `engine_server`, and what they must be."""

import json
import threading
from pathlib import Path

import numpy as np

from moetrace.importers.captured import Hints
from moetrace.live.asks import Settings
from moetrace.live.recorder import record
from moetrace.trace import Trace
from support import engine_server
from support.engine_server import DENSE, EXPERTS, LAYERS, TOP_K, routing_of
from support.writers import steps

PROMPTS = [" ".join(f"w{number}-{word}" for word in range(2 + number % 5)) for number in range(12)]
MOST = 4


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


def changed(change):
    """A fault that changes an answer."""

    def how(handler, path, body):
        answer = engine_server.answer(handler.server.engine, path, body)
        handler.reply(change(answer) or answer)

    return how


def plainly_refused(handler, path, body):
    handler.reply({"error": {"message": "prompt is too long."}}, 400)
