"""Prompts from a file: one a line as text, or as JSON objects; and from there to token ids."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from moetrace.spec.errors import MoetraceError

LINE_BYTES = 64 << 20  # the longest line that is read: far beyond any context window


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str


class PromptLine(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a JSONL file: one of these three."""

    prompt: str | None = None
    token_ids: list[Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]] | None = None
    messages: list[_Message] | None = None


Line = TypeVar("Line", bound=PromptLine)


def read_prompts(path: Path, tokenizer: Callable[[], Any], vocabulary: int) -> list[np.ndarray]:
    """The token ids, int32 [length], of each prompt in the file at `path`.

    A file named .jsonl, or whose first line is a JSON object of such a field, has one object a line:
    {"prompt": text}, {"token_ids": [...]} or {"messages": [{"role": ..., "content": ...}]}, which the chat template
    of the tokenizer turns into a prompt. In any other file each line is a prompt. Empty lines are skipped.
    `tokenizer` is called where there is text. Raises MoetraceError, naming the line, for a line of another form, for an
    id of `vocabulary` or above, and for a file without prompts.
    """
    reader = _Tokenizing(tokenizer)
    prompts = [_checked(where, reader.ids(where, line), vocabulary) for where, line in prompt_lines(path, PromptLine)]
    if not prompts:
        raise MoetraceError(f"{path} holds no prompt.")
    return prompts


def prompt_lines(path: Path, form: type[Line]) -> Iterator[tuple[str, Line]]:
    """Yield the prompts of the file at `path` one by one, as `read_prompts` says, each with the name of its line.

    `form` is what a line of JSON may hold. Raises MoetraceError, naming the line, for what it may not.
    """
    if not path.is_file():
        raise MoetraceError(f"{path} is not a file." if path.exists() else f"there is no file {path}.")
    json: bool | None = True if path.suffix.lower() in (".jsonl", ".ndjson") else None  # whether lines are JSON
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(line) > LINE_BYTES:
                raise MoetraceError(f"{where} is longer than {LINE_BYTES} bytes.")
            if not line.strip():
                continue
            json = _is_object(line) if json is None else json
            yield where, _of_object(where, line, form) if json else form(prompt=_decoded(where, line))


def _of_object(where: str, line: bytes, form: type[Line]) -> Line:
    try:
        given = msgspec.json.decode(line, type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(
            f'{where} is not {{"prompt": text}}, {{"token_ids": [...]}} or {{"messages": [...]}}: {error}.'
        ) from error
    fields = [name for name in ("prompt", "token_ids", "messages") if getattr(given, name) is not None]
    if len(fields) != 1:
        raise MoetraceError(f"{where} needs one of prompt, token_ids and messages, but has {len(fields)}.")
    return given


class _Tokenizing:
    """Turns what a line holds into token ids; the tokenizer is loaded when a line first needs it."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._tokenizer: Any = None

    def ids(self, where: str, line: PromptLine) -> list[int]:
        if line.token_ids is not None:
            return line.token_ids
        if line.prompt is not None:
            return self._of_text(where, line.prompt)
        return self._of_messages(where, msgspec.to_builtins(line.messages))

    def _of_text(self, where: str, text: str) -> list[int]:
        tokenizer = self._loaded()
        try:
            return list(tokenizer(text)["input_ids"])
        except Exception as error:  # a tokenizer may refuse a text in any way
            raise MoetraceError(f"{where} could not be tokenized: {in_short(error)}.") from error

    def _of_messages(self, where: str, messages: list[dict[str, str]]) -> list[int]:
        tokenizer = self._loaded()
        if not getattr(tokenizer, "chat_template", None):
            raise MoetraceError(f"{where} has messages, but the model's tokenizer has no chat template.")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # the template is a program of its own
            raise MoetraceError(f"{where}: the chat template refused it: {in_short(error)}.") from error

    def _loaded(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._load()
        return self._tokenizer


def _is_object(line: bytes) -> bool:
    """Whether a line is a JSON object with one of the fields of a prompt."""
    try:
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return bool(fields.keys() & set(PromptLine.__struct_fields__))


def _decoded(where: str, line: bytes) -> str:
    try:
        return line.decode().rstrip("\r\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise MoetraceError(f"{where} is not UTF-8 text.") from error


def _checked(where: str, ids: list[int], vocabulary: int) -> np.ndarray:
    if not ids:
        raise MoetraceError(f"{where} is an empty prompt: it has no token.")
    if (highest := max(ids)) >= vocabulary:
        raise MoetraceError(
            f"{where}: token {ids.index(highest)} is {highest}, but the model knows 0 to {vocabulary - 1}."
        )
    return np.array(ids, np.int32)


def in_short(error: Exception) -> str:
    """The message of another library's error, as the end of a sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= 240 else f"{text[:240]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
