"""The token counts in an engine's answer, and the position that follows for its first row of routing."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moetrace.spec.errors import MoetraceError


class Told(NamedTuple):
    """The fields of an answer beside its routing. Numbers are of tokens; None is not said."""

    prompt: int | None = None
    output: int | None = None  # of all `choices` together
    choices: int = 1
    cached: int | None = None  # leading tokens of the prompt that came from a prefix cache
    start: int | None = None  # position of the first row
    id: str = ""
    choice: int = 0  # its number
    chunk: bool = False  # of a stream
    aborted: bool = False
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()


# More choices are not compared, each with all others: 500 of them would take 16 s.
MOST_ALIGNED = 64

# Rows of one token in two computations are the same if this share of their cells is: kernels that run another batch
# flip a few choices, while unrelated tokens agree in few cells.
ALIKE = 0.75


def first_position(where: str, rows: int, told: Told) -> int:
    """The position of the first of `rows`: they end at the last token but one, since the last is never routed.

    An engine that generated nothing may route the whole prompt, or the beginning of it if it was stopped. Raises
    MoetraceError, beginning with `where`, if there are more rows than tokens.
    """
    start = told.start or 0
    if told.prompt is None or told.output is None:
        return start
    stop = told.prompt + told.output - 1
    if told.output == 0 and rows in (told.prompt - start, told.prompt - (told.cached or 0)):
        stop = told.prompt
    if rows + start > stop:
        begins = f" from position {start} on" if start else ""
        raise MoetraceError(
            f"{where} holds routing of {rows} tokens{begins}, but says that there are {told.prompt} tokens of the "
            f"prompt and {told.output} of this answer, which allow {max(stop - start, 0)}: check the file, or --top-k "
            f"and --model if its layers are not said."
        )
    if stopped_in_prompt(rows, told):
        return 0
    return stop - rows if told.start is None else start


def stopped_in_prompt(rows: int, told: Told) -> bool:
    """Whether an answer was aborted before all of its prompt was routed, so that its rows are the first ones."""
    return told.aborted and told.output == 0 and told.start is None and 0 < rows < (told.prompt or 0) - 1


def shared_out(where: str, arrays: Sequence[np.ndarray], told: Sequence[Told]) -> list[Told]:
    """Each choice's own numbers, where `usage` counts the tokens of all choices of an answer together.

    `arrays` [rows, planes, top_k] are those of the choices that have routing. Where their rows do not tell at which
    position each begins, or are those of several prompts, the numbers of none are known.
    """
    if not told or told[0].choices == 1 or told[0].prompt is None or told[0].output is None:
        return list(told)
    if not all(map(len, arrays)):  # no routing, as of a choice that was aborted
        some = [pair for pair in zip(arrays, told, strict=True) if len(pair[0])]
        shared = iter(shared_out(where, *zip(*some, strict=True)) if some else ())
        return [next(shared) if len(own) else one for own, one in zip(arrays, told, strict=True)]
    if any(one.choices != told[0].choices for one in told):  # some tell numbers of their own
        return [one if one.choices == 1 else _unknown(one) for one in told]
    starts = _starts(where, arrays, told)
    if starts is None:
        return [_unknown(one) for one in told]
    return [
        one._replace(output=len(own) + start - (one.prompt or 0) + 1, start=start, choices=1)
        for one, own, start in zip(told, arrays, starts, strict=True)
    ]


def _unknown(told: Told) -> Told:
    return told._replace(prompt=None, output=None, choices=1, cached=None)


def _starts(where: str, arrays: Sequence[np.ndarray], told: Sequence[Told]) -> list[int] | None:
    """The position at which each choice begins; None if that can't be known."""
    count, choices, output = len(told), told[0].choices, told[0].output or 0
    rows, prompts = [len(own) for own in arrays], [one.prompt or 0 for one in told]
    outputs = np.array(rows) - prompts + 1  # if all begin at 0
    lacking = output - int(outputs.sum())
    if lacking < 0:
        raise MoetraceError(
            f"{where} holds routing of {sum(rows)} tokens in {count} choices, but says that there are "
            f"{prompts[0]} tokens of the prompt and {output} of its {choices} choices, which allow "
            f"{sum(rows) + lacking}: check the file."
        )
    if all(one.start is not None for one in told):
        return [one.start or 0 for one in told]
    if count < choices:  # tokens of the others are counted, and not known
        cached = told[0].cached or 0
        found = [start for start in {0, cached} if (outputs + start > 0).all() and count * start <= lacking]
        return [found[0]] * count if len(found) == 1 else None
    if lacking == 0:
        return [0] * count if outputs.min() >= 0 else None
    prompt = prompts[0]
    if any(one.prompt != prompt or one.prompt_ids != told[0].prompt_ids for one in told):
        return None
    # This number of rows may be missing because there are several prompts, whose lengths `usage` adds up.
    batch = any(choices % of == 0 and lacking == (choices - choices // of) * prompt for of in range(2, choices + 1))
    start, rest = divmod(lacking, count)
    even = not rest and start < prompt and outputs.min() + start >= 0 and (not batch or start == told[0].cached)
    if even and all(_alike(arrays[0][: prompt - start], own[: prompt - start]) for own in arrays[1:]):
        return [start] * count
    return None if batch else _aligned(arrays, prompt, lacking)


def _aligned(arrays: Sequence[np.ndarray], prompt: int, lacking: int) -> list[int] | None:
    """Where each choice begins if some begin later in the prompt than others: their rows of the prompt are the same."""
    if len(arrays) > MOST_ALIGNED:
        return None
    for one in arrays:
        shifts: list[int] = []
        for other in arrays:
            if not len(other) or other.shape[1:] != one.shape[1:]:
                return None
            same = (one[:prompt] == other[:1]).mean(axis=(1, 2)) >= ALIKE
            if not same.any():
                break
            shifts.append(int(same.argmax()))
        start, rest = divmod(lacking - sum(shifts), len(arrays))
        if len(shifts) < len(arrays) or rest or start < 0 or start + max(shifts) >= prompt:
            continue
        stop = prompt - start
        if all(_alike(one[at:stop], other[: stop - at]) for other, at in zip(arrays, shifts, strict=True)):
            return [start + at for at in shifts]
    return None


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the leading rows that both have are the same."""
    rows = min(len(one), len(other))
    return one.shape[1:] != other.shape[1:] or rows == 0 or float((one[:rows] == other[:rows]).mean()) >= ALIKE


def of_parts(where: str, parts: Sequence[tuple[int, int]], told: Sequence[Told]) -> list[Told]:
    """Numbers of choices whose routing comes as rows of the prompt and rows of the output, `parts` of each choice.

    The first part ends with the prompt. Raises MoetraceError, beginning with `where`, if that contradicts the numbers.
    """
    found: list[Told] = []
    rows_of_prompts, rows_of_outputs = (sum(rows) for rows in zip(*parts, strict=True)) if parts else (0, 0)
    for (rows, own), one in zip(parts, told, strict=True):
        prompt, cached, choices = one.prompt, one.cached or 0, one.choices
        if prompt is None or one.chunk:
            found.append(one._replace(prompt=rows, output=None, choices=1))
            continue
        # `of` prompts, each of choices / of choices, whose lengths `usage` adds up
        of, rest = divmod(choices * prompt, rows_of_prompts) if rows_of_prompts else (choices, prompt)
        batch = not rest and 2 <= of <= choices and choices % of == 0
        start = 0 if batch else prompt - rows
        generated = own if choices == 1 else rows_of_outputs
        least = (one.output or 0) - choices if choices in (1, len(parts)) else 0
        if start not in (0, cached, one.start) or (one.output is not None and not least <= generated <= one.output):
            raise MoetraceError(
                f"{where} holds routing of {rows} tokens of a prompt and {generated} of the output, but says that "
                f"there are {prompt} ({cached} of them cached) and {one.output}: check the file."
            )
        found.append(one._replace(prompt=rows + start, output=None, start=start, choices=1))
    return found
