"""From router logits to choices and gates, by a rule that the user states.

A score is the softmax of the logits over all experts, or the sigmoid of each. The `top_k` greatest of score + bias are
chosen, the lower id first among equals. Where experts stand in groups, only those of the best groups are: a group is
as good as its greatest score with softmax (DeepSeek-V2), as its two greatest together with sigmoid (DeepSeek-V3). A
gate is the score without bias; `norm` divides the gates of a row by their sum, `scale` multiplies them.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrace.importers.reading import npy
from moetrace.spec.errors import MoetraceError, UsageError, printable
from moetrace.spec.ordinary_file import read_ordinary

SCORES = ("softmax", "sigmoid")
_FORM = "softmax or sigmoid, then norm, scale=S, groups=G:M and bias=FILE.npy, with commas between"
_MOST_BIAS_BYTES = 64 << 20
_ROUNDED = 0.01  # off 1 are sums of 512 scores in bfloat16 at most


class RouterRule(NamedTuple):
    """How a router chooses; see the module."""

    score: str
    norm: bool = False
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    bias: Path | None = None


class RuledChoices(NamedTuple):
    """The choices of some cells, best first."""

    experts: np.ndarray  # int64 [cells, top_k]
    gates: np.ndarray  # float64 [cells, top_k]
    ties: int  # cells whose last choice is as good as an expert that was not chosen


def said_router(text: str) -> RouterRule:
    """The rule in `--router`. Raises UsageError."""
    score, *rest = (part.strip() for part in text.split(","))
    if score not in SCORES:
        raise UsageError(f"--router {printable(text[:80])!r} must be {_FORM}.")
    rule = RouterRule(score)
    for part in rest:
        name, _, value = (piece.strip() for piece in part.partition("="))
        if part == "norm":
            rule = rule._replace(norm=True)
        elif name == "scale" and (scale := _number(value)):
            rule = rule._replace(scale=scale)
        elif name == "groups" and (found := re.fullmatch(r"([1-9]\d{0,4}):([1-9]\d{0,4})", value)):
            groups, kept = int(found[1]), int(found[2])
            if kept > groups:
                raise UsageError(f"--router keeps {kept} of {groups} groups: groups=G:M needs M of 1 to G.")
            rule = rule._replace(groups=groups, kept_groups=kept)
        elif name == "bias" and value:
            rule = rule._replace(bias=Path(value))
        else:
            raise UsageError(f"--router does not know {printable(part[:80])!r}: it must be {_FORM}.")
    return rule


def _number(text: str) -> float:
    """A number above 0, or 0 for any other text."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < float("inf") else 0.0


def bias_of(rule: RouterRule, layers: int, experts: int) -> np.ndarray:
    """The rule's bias, float64 [layers, experts]. Raises MoetraceError if its file does not hold one of that shape."""
    if rule.bias is None:
        return np.zeros((layers, experts))
    where = f"{rule.bias}, the bias of --router,"
    bias = npy.from_bytes(where, read_ordinary(rule.bias, _MOST_BIAS_BYTES))
    if bias.dtype.kind != "f" or bias.shape not in ((experts,), (layers, experts)):
        raise MoetraceError(
            f"{where} holds {bias.dtype} {bias.shape}, not floats [{experts}] or [{layers}, {experts}]."
        )
    if not np.isfinite(bias).all():
        raise MoetraceError(f"{where} holds NaN or infinity.")
    return np.broadcast_to(bias.astype(np.float64), (layers, experts))


def check_rule(where: str, rule: RouterRule, experts: int, top_k: int) -> None:
    """Raise UsageError if groups do not divide the experts, or those that are kept have fewer than `top_k`."""
    if experts % rule.groups:
        raise UsageError(f"{where} has {experts} experts, which --router can't cut into {rule.groups} equal groups.")
    if experts // rule.groups * rule.kept_groups < top_k:
        raise UsageError(
            f"--router keeps {rule.kept_groups} of {rule.groups} groups, {experts // rule.groups * rule.kept_groups} "
            f"experts, of which {top_k} can't be chosen."
        )


def choose(logits: np.ndarray, bias: np.ndarray, rule: RouterRule, top_k: int) -> RuledChoices:
    """Choose for cells: logits finite [cells, experts], bias float64 of that shape or [1]."""
    logits = logits.astype(np.float64)
    if rule.score == "softmax":
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = np.exp(-np.logaddexp(0, -logits))
    # Without bias and groups the order is the logits' own: scores of different logits may round to the same number.
    plain = rule.bias is None and rule.groups == 1
    wanted = logits if plain else scores + bias
    if rule.groups > 1:
        _leave_groups(wanted, rule)
    rows = np.arange(len(wanted))
    experts, last = np.empty((len(wanted), top_k), np.int64), np.empty(len(wanted))
    for slot in range(top_k):  # the first of equal ones; a full stable sort takes several times as long
        experts[:, slot] = wanted.argmax(axis=1)
        last = wanted[rows, experts[:, slot]]
        wanted[rows, experts[:, slot]] = -np.inf
    ties = int(np.count_nonzero(wanted.max(axis=1) == last))
    gates = np.take_along_axis(scores, experts, axis=1)
    if rule.norm:
        with np.errstate(invalid="ignore"):
            gates /= gates.sum(axis=1, keepdims=True)
    return RuledChoices(experts, gates * rule.scale, ties)


def _leave_groups(wanted: np.ndarray, rule: RouterRule) -> None:
    """Put -infinity in place of the experts outside the best groups."""
    grouped = wanted.reshape(len(wanted), rule.groups, -1)
    if rule.score == "softmax" or grouped.shape[2] == 1:
        good = grouped.max(axis=2)
    else:
        good = np.partition(grouped, -2, axis=2)[..., -2:].sum(axis=2)
    best = np.argsort(-good, axis=1, kind="stable")[:, : rule.kept_groups]
    kept = np.zeros(good.shape, bool)
    np.put_along_axis(kept, best, True, axis=1)
    grouped[~kept] = -np.inf


class ScoresAsLogits:
    """Looks whether what should be logits are scores already, as some models return under that name."""

    def __init__(self) -> None:
        self.shares = self.sigmoids = True

    def look(self, piece: np.ndarray) -> None:
        """Look at logits [rows, layers, experts]."""
        if not (self.shares or self.sigmoids) or not piece.size:
            return
        low, high = piece.min(), piece.max()
        self.shares &= bool(low >= 0) and bool((np.abs(piece.sum(2, dtype=np.float64) - 1) < _ROUNDED).all())
        self.sigmoids &= bool(low > 0) and bool(high < 1)

    def found(self) -> str | None:
        """A sentence on their form, with advice."""
        if self.shares:
            like, what = "none is negative and those of each cell sum to 1", "their logarithms with softmax"
        elif self.sigmoids:
            like, what = "all are between 0 and 1", "log(x / (1 - x)) of each with sigmoid"
        else:
            return None
        return (
            f"these look like scores, not logits, as {like}: if so, gates come out wrong, and with bias or groups the "
            f"choices too; import {what}."
        )
