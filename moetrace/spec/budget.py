"""A budget of memory for experts: a number of experts, a share of all, or bytes."""

import re

import numpy as np

from moetrace.spec.errors import UsageError, printable

_UNITS = {"B": 1} | {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_AMOUNT = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,15}))? ?((?:[KMGT]I?)?B|%)?", re.IGNORECASE | re.ASCII)


def parse_amount(text: str) -> tuple[int, int, str] | None:
    """Read `400`, `25%` or `1.5 GiB` exactly.

    Returns:
        Numerator and denominator of the number, in experts, shares of 1 or bytes, and which of these: `""`, `"%"` or
        `"B"`. None for anything else, also for a fraction of experts.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        return None
    whole, fraction, unit = match[1], match[2] or "", (match[3] or "").upper()
    if fraction and not unit:
        return None
    number, parts = int(whole + fraction), 10 ** len(fraction)
    if unit == "%":
        return number, 100 * parts, "%"
    return number * _UNITS.get(unit, 1), parts, "B" if unit else ""


def check_slots(slots: int | str) -> None:
    """Raise a UsageError unless it is a number of experts from 0, a share of all of them, or bytes."""
    amount = (slots, 1, "") if isinstance(slots, int) else parse_amount(slots)
    if amount is None or amount[0] < 0 or (amount[2] == "%" and amount[0] > amount[1]):
        shown = slots if isinstance(slots, int) else repr(printable(slots[:100]))
        raise UsageError(
            "slots wants a number of experts of at least 0, a share of all of them up to 100%, or memory as 4000MiB, "
            f"got {shown}."
        )


def slots_of(slots: int | str, expert_bytes: np.ndarray) -> int:
    """Return how many experts the GPU may hold.

    Args:
        slots: A number, `"25%"` of all experts, or memory (`"4000MiB"`, `"4GB"`) for experts only.
        expert_bytes: [layers, experts], bytes of each.

    Returns:
        The number, rounded down. Memory is counted in the largest expert, so that it suffices for any set of experts;
        memory for all of them holds all.

    Raises:
        UsageError: It is none of these, or more than nothing that yet holds not one expert.
    """
    check_slots(slots)
    if isinstance(slots, int):
        return slots
    number, parts, unit = parse_amount(slots) or (0, 1, "")
    largest = float(np.max(expert_bytes))
    if unit == "B":
        budget = number / parts
        enough = budget >= float(np.sum(expert_bytes))
        held = expert_bytes.size if enough else int(budget // largest)
    else:
        held = number * (expert_bytes.size if unit == "%" else 1) // parts
    if number and not held:
        raise UsageError(
            f"slots = {slots} holds not one of the {expert_bytes.size:,} experts, the largest of which takes "
            f"{largest / 1e6:,.4g} MB: give more, or 0 for none."
        )
    return held
