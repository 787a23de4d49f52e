"""The requests to a server: the prompts of a file, each as the body of an HTTP request, read as they are needed."""

import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from moetrace.capture.prompts import PromptLine, prompt_lines
from moetrace.spec.errors import MoetraceError

Count = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"


class Settings(NamedTuple):
    """Settings that are the same for all prompts.

    Attributes:
        max_tokens: Most output tokens of a prompt whose line does not say it.
        temperature: Temperature of the sampling; 0: greedy.
        seed: Seed of the sampling. By default the server's own.
        ignore_eos: Whether a completion goes on after an end-of-sequence token.
        prefix_cache: Whether prompts may share the server's prefix cache. By default each has a salt of its own, so
            that every row of the trace was computed.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    prefix_cache: bool = False


class AskedLine(PromptLine, forbid_unknown_fields=True):
    """A line of a JSONL file: one prompt, and how many tokens may follow."""

    messages: list[dict[str, msgspec.Raw]] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    max_tokens: Count | None = None


class Ask(NamedTuple):
    """One prompt, as it is asked."""

    number: int  # of the prompt, from 0
    where: str  # its line
    path: str  # of the server's interface
    body: dict[str, Any]
    key: str  # what is asked, as 32 hexadecimal digits
    salt: str | None  # the field that keeps others' prefixes away

    def sent(self) -> bytes:
        """The body to send; each one has a salt that no earlier one had."""
        salt = {} if self.salt is None else {self.salt: f"moetrace-{secrets.token_hex(16)}"}
        return msgspec.json.encode(self.body | salt)


class Asks:
    """The prompts of a file as an engine is asked for them, in order, as often as one goes through them."""

    def __init__(self, prompts: Path, engine: str, model: str, settings: Settings) -> None:
        self._prompts, self._engine, self._model, self._settings = prompts, engine, model, settings

    def __iter__(self) -> Iterator[Ask]:
        for number, (where, line) in enumerate(_lines(self._prompts)):
            path, body = (self._of_sglang if self._engine == "sglang" else self._of_vllm)(line)
            shared = self._settings.prefix_cache
            key = hashlib.sha256(b"\0".join((path.encode(), msgspec.json.encode(body), b"shared" * shared)))
            salt = None if shared else "extra_key" if path == GENERATE else "cache_salt"
            yield Ask(number, where, path, body, key.hexdigest()[:32], salt)

    def _of_vllm(self, line: AskedLine) -> tuple[str, dict[str, Any]]:
        if line.messages is not None:
            return CHAT, {"model": self._model, "messages": line.messages} | self._sampling(line)
        return COMPLETIONS, {"model": self._model, "prompt": _prompt(line)} | self._sampling(line)

    def _of_sglang(self, line: AskedLine) -> tuple[str, dict[str, Any]]:
        """`/generate` tells cached tokens in any case, the OpenAI interface on demand."""
        routed = {"return_routed_experts": True}
        if line.messages is not None:
            path, body = self._of_vllm(line)
            return path, body | routed | {"return_cached_tokens_details": True}
        sampling = self._sampling(line, "max_new_tokens", "sampling_seed")
        name = "input_ids" if line.prompt is None else "text"
        return GENERATE, {name: _prompt(line), "sampling_params": sampling} | routed

    def _sampling(self, line: AskedLine, most: str = "max_tokens", seed: str = "seed") -> dict[str, Any]:
        settings = self._settings
        sampling = {most: line.max_tokens or settings.max_tokens, "temperature": settings.temperature}
        if settings.seed is not None:
            sampling[seed] = settings.seed
        return sampling | ({"ignore_eos": True} if settings.ignore_eos else {})


def count_prompts(prompts: Path) -> int:
    """How many prompts a file holds; raises MoetraceError for a file without prompts, or a line that can't be sent."""
    count = sum(1 for _ in _lines(prompts))
    if not count:
        raise MoetraceError(f"{prompts} holds no prompt.")
    return count


def _lines(prompts: Path) -> Iterator[tuple[str, AskedLine]]:
    for where, line in prompt_lines(prompts, AskedLine):
        if not (line.prompt or line.token_ids or line.messages):
            raise MoetraceError(f"{where} is an empty prompt.")
        yield where, line


def _prompt(line: AskedLine) -> str | list[int]:
    return line.token_ids or [] if line.prompt is None else line.prompt
