"""Record: ask a running server for completions of prompts, with their routing, and write the trace."""

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moetrace.importers.captured import Capture, Hints
from moetrace.importers.formats import read_captures
from moetrace.importers.importing import hints_of, write_captures
from moetrace.live.asks import GENERATE, Ask, Asks, Settings, count_prompts
from moetrace.live.checking import FORMATS, Checker
from moetrace.live.crew import in_parallel, persistent
from moetrace.live.exchange import Client, RequestError, address_of
from moetrace.live.journal import Journal, journal_of, marked
from moetrace.live.serving import Served, served
from moetrace.spec import load_model
from moetrace.spec.errors import MoetraceError, UsageError, counted
from moetrace.trace.naming import presets_in

# A run ends when this number of prompts, and all that are under way, fail one after the other.
_IN_A_ROW = 8


class _Failures:
    """Prompts without a usable answer."""

    def __init__(self, in_a_row: int) -> None:
        self.count = 0
        self.first = ""
        self._in_a_row, self._most = 0, in_a_row

    def add(self, error: MoetraceError) -> None:
        """Count one; raise MoetraceError if it says that no other prompt will be answered either."""
        self.count += 1
        self.first = self.first or str(error)
        self._in_a_row += 1
        if isinstance(error, RequestError) and error.of_all:
            raise error
        if self._in_a_row >= self._most:
            raise MoetraceError(f"{counted(self._in_a_row, 'prompt')} failed in a row, the last because {error}")

    def answered(self) -> None:
        self._in_a_row = 0


def record(
    url: str,
    prompts: Path,
    out: Path,
    *,
    engine: str | None = None,
    served_model: str | None = None,
    model: str | None = None,
    hints: Hints | None = None,
    settings: Settings | None = None,
    headers: Mapping[str, str] | None = None,
    concurrency: int = 8,
    timeout_s: float = 600.0,
    retries: int = 3,
    keep_answers: bool = False,
    compress: str | None = None,
    asking: Callable[[int], Callable[[int], object]] = lambda _: lambda _: None,
) -> int:
    """Ask the server at `url` for a completion of each prompt, and write the trace of all of them to `out`.

    Answers are kept in `OUT.answers.jsonl` beside the trace until all are there, so that a run that ends early can go
    on: called again, it asks only for the missing answers. The trace is what `import_traces` makes of that file.

    Args:
        url: Address of a vLLM or SGLang server.
        prompts: The file of prompts.
        out: The trace. It is whole, or nothing is written.
        engine: "vllm" or "sglang". By default the server says it.
        served_model: How the server calls its model. By default its first one.
        model: A preset or a TOML file: the model's name, and sizes that answers do not say. By default the preset that
            is named in what the server calls its model, if `hints` say no sizes.
        hints: Sizes, whether to keep cached rows, whether a failed prompt refuses all (`strict`), and who gets notes.
        settings: Settings that are the same for all prompts.
        headers: Headers of each request.
        concurrency: Prompts that are asked at the same time.
        timeout_s: Longest wait for a whole answer.
        retries: How often a prompt is asked again if the server fails.
        keep_answers: Whether the file of answers stays.
        compress: As of `import_traces`.
        asking: A function that gets the number of prompts to ask for, and returns one that gets the number of those
            that were answered since its last call.

    Returns:
        The number of prompts that have no usable answer. Then the file of answers stays.

    Raises:
        UsageError: The settings make no sense, or do not fit the answers that are kept.
        MoetraceError: The server can't be reached, or sends no usable answer.
    """
    settings, hints = settings or Settings(), hints or Hints()
    total = count_prompts(prompts)
    with journal_of(out, [prompts]) as journal:
        client = Client(address_of(url), headers or {}, timeout_s)
        try:
            server = served(client, engine, served_model)
            hints = _sized(hints, server, model, out)
            asks = Asks(prompts, server.engine, server.model, settings)
            _check_kept(journal, asks, total)
            checker = Checker(server.engine, hints)
            if len(journal):
                checker.check(journal.first(), f"the first answer in {journal.path}")
            ask_one = _Asking(client, server, checker, retries)
            failures = _Failures(max(_IN_A_ROW, concurrency))
            answered = asking(total - len(journal))
            missing = (ask for ask in asks if journal.key(ask.number) is None)
            for ask, result in in_parallel(missing, ask_one, concurrency, ask_one.stop):
                if isinstance(result, MoetraceError):
                    failures.add(result)
                else:
                    journal.add(ask.number, ask.key, result)
                    failures.answered()
                answered(1)
            _check_answered(journal, failures, hints)
        except BaseException:
            if len(journal):
                kept = f"{len(journal):,} of {counted(total, 'answer')}"
                hints.note(f"{journal.path} keeps {kept}: the same command asks for the others.")
            raise
        journal.put_in_order()
        facts = _facts(prompts, total, failures, server, settings)
        _write(journal, out, FORMATS[server.engine], hints, facts, model=model, compress=compress)
        if failures.count:
            hints.note(
                f"{counted(failures.count, 'prompt')} of {total:,} failed, the first because {failures.first[:-1]}; "
                f"{journal.path} keeps the answers of the others, and the same command asks for the missing ones."
            )
        journal.close(keep=keep_answers or failures.count > 0)
    return failures.count


class _Asking:
    """Asks for the completion of one prompt, until it is there or can't be had."""

    def __init__(self, client: Client, server: Served, checker: Checker, retries: int) -> None:
        self._client, self._server, self._checker, self._retries = client, server, checker, retries
        self._stopped = threading.Event()

    def __call__(self, ask: Ask) -> bytes:
        """The line of the journal for the answer; raises MoetraceError, which names the line of the prompt."""
        try:
            answer = persistent(lambda: self._client.post(ask.path, ask.sent()), self._retries, self._stopped)
        except RequestError as error:
            if error.of_all:
                raise
            raise MoetraceError(f"{ask.where}: {error}") from None
        more = {"model": self._server.model} if ask.path == GENERATE else None
        where = f"the answer to {ask.where}"
        try:
            line = marked(ask.number, ask.key, answer, more)
        except MoetraceError as error:
            raise MoetraceError(f"{where} can't be read: {error}") from None
        self._checker.check(line, where)
        return line

    def stop(self) -> None:
        """End the requests under way."""
        self._stopped.set()
        self._client.close()


def _sized(hints: Hints, server: Served, model: str | None, out: Path) -> Hints:
    """The hints with the sizes of the model, which the answers of an engine do not say; UsageError if they lack."""
    hints = hints_of(hints, model, out)
    if model is None and hints.num_experts is None and (known := presets_in(server.model)):
        hints = hints.of_model(load_model(known[0]))
        hints.note(f"the server calls its model {server.model}: taken as {known[0]}; --model says otherwise.")
    named = {"num_experts": "--experts"} | ({"top_k": "--top-k"} if server.engine == "sglang" else {})
    missing = [option for name, option in named.items() if getattr(hints, name) is None]
    if missing:
        raise UsageError(
            f"the answers of {server.model[:200]} do not say its sizes: give --model or {' and '.join(missing)}."
        )
    return hints


def _check_kept(journal: Journal, asks: Asks, total: int) -> None:
    """Raise UsageError unless the answers that are kept are those of these prompts, asked in this way."""
    if not len(journal):
        return
    others = journal.most >= total
    others = others or any(journal.key(ask.number) not in (None, ask.key) for ask in asks)
    if others:
        raise UsageError(
            f"{journal.path} keeps answers to other prompts, or to the same ones asked in another way: give "
            f"the earlier options to go on, or remove the file to begin again."
        )


def _check_answered(journal: Journal, failures: _Failures, hints: Hints) -> None:
    if failures.count and (hints.strict or not len(journal)):
        raise MoetraceError(f"{counted(failures.count, 'prompt')} failed, the first because {failures.first}")


def _facts(prompts: Path, total: int, failures: _Failures, server: Served, settings: Settings) -> dict[str, Any]:
    """The entries of `source` beside those of an import: without the server's address or the user."""
    with prompts.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts: dict[str, Any] = {"recorded": "live", "prompts": total, "prompts_sha256": digest, **settings._asdict()}
    facts |= {"engine_version": server.version} if server.version else {}
    return facts | ({"failed_prompts": failures.count} if failures.count else {})


def _write(journal: Journal, out: Path, format: str, hints: Hints, facts: dict[str, Any], **options: Any) -> None:
    captures = read_captures([journal.path], format, hints._replace(strict=False))
    told = [capture._replace(facts=capture.facts | facts) for capture in captures if isinstance(capture, Capture)]
    write_captures(told, out, hints, **options)
