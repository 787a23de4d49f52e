"""What an answer of an engine says of its tokens, and which position its first row of routing therefore has."""

from collections.abc import Sequence
from typing import NamedTuple

from moetrace.spec.errors import MoetraceError


class Told(NamedTuple):
    """What an answer says beside its routing. Numbers are of tokens; None is not said."""

    prompt: int | None = None
    output: int | None = None  # of all `choices` together
    choices: int = 1
    cached: int | None = None  # leading tokens of the prompt that came from a prefix cache
    start: int | None = None  # position of the first row
    id: str = ""
    choice: int = 0  # its number
    chunk: bool = False  # of a stream
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()


def first_position(where: str, rows: int, told: Told) -> int:
    """The position of the first of `rows`: they end at the last token but one, since the last is never routed.

    An engine that generated nothing may route the whole prompt. Raises MoetraceError, beginning with `where`, if there
    are more rows than tokens.
    """
    start = told.start or 0
    if told.prompt is None or told.output is None:
        return start
    # Of several choices that share a number, each has one token or more.
    stop = told.prompt + told.output - told.choices
    if told.output == 0 and rows in (told.prompt - start, told.prompt - (told.cached or 0)):
        stop = told.prompt
    if rows + start > stop:
        begins = f" from position {start} on" if start else ""
        of = "this answer" if told.choices == 1 else f"its {told.choices} choices"
        raise MoetraceError(
            f"{where} holds routing of {rows} tokens{begins}, but says that there are {told.prompt} tokens of the "
            f"prompt and {told.output} of {of}, which allow {max(stop - start, 0)}: check the file, or --top-k and "
            f"--model if its layers are not said."
        )
    return start if told.start is not None or told.choices > 1 else stop - rows


def shared_out(where: str, rows: Sequence[int], told: Sequence[Told]) -> list[Told]:
    """Each choice's own numbers, where `usage` counts the tokens of all choices of an answer together.

    All choices begin at one position, which their rows together tell. If the rows are those of as many prompts, no
    prompt's length is known.
    """
    first, count = told[0], len(told)
    if count < 2 or first.choices != count or first.prompt is None or first.output is None:
        return list(told)
    most = count * (first.prompt - 1) + first.output
    if sum(rows) == first.prompt + first.output - count != most:
        return [one._replace(prompt=None, output=None, choices=1) for one in told]
    start, rest = divmod(most - sum(rows), count)
    if start < 0:
        raise MoetraceError(
            f"{where} holds routing of {sum(rows)} tokens in {count} choices, but says that there are {first.prompt} "
            f"tokens of the prompt and {first.output} of all choices, which allow {most}: check the file."
        )
    if rest:
        return list(told)
    return [
        one._replace(output=max(own + start - first.prompt + 1, 0), choices=1)
        for one, own in zip(told, rows, strict=True)
    ]
