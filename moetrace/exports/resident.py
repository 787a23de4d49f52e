"""The experts that an engine should keep: counts, or a set, from a trace or from a file.

The counts are the choices of the trace's steps (of one phase, if asked for). The set is a file's, or the experts that
were chosen most often: of all layers together, or in each layer. Ties go to the lower layer, then to the lower expert.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrace.analyze.balance.loads import add, loads_of, steps_of_phase
from moetrace.exports.blocks import check_objects
from moetrace.spec import list_presets, load_model
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.policy_files import load_static
from moetrace.trace.format import Trace

PHASES = ("all", "prefill", "decode", "mixed")


class KeptChoice(NamedTuple):
    """What to take of a trace.

    Attributes:
        phase: The steps whose choices count.
        slots: Experts that fit, of all layers together.
        layer_slots: Experts of each layer that fit.
        held: A CSV file of lines `layer,expert`, as residency `static` reads it: the set itself.
        dram_slots: For a format with three tiers: further experts that fit into main memory.
        pairs: The set itself (layer entry, expert), int64 [n, 2].
    """

    phase: str = "all"
    slots: int | None = None
    layer_slots: int | None = None
    held: str | os.PathLike[str] | None = None
    dram_slots: int | None = None
    pairs: np.ndarray | None = None

    @property
    def is_set(self) -> bool:
        """Whether a set is asked for, and not counts."""
        return self.holds_set or not (self.slots is None and self.layer_slots is None)

    @property
    def holds_set(self) -> bool:
        """Whether it says the set itself, and not how many."""
        return self.held is not None or self.pairs is not None


def check_choice(choice: KeptChoice, form: str, *, counts: bool, sets: bool, tiers: bool) -> None:
    """Raise UsageError if `choice` is not for the format `form`, which takes counts, sets, or sets of three tiers."""
    given = [choice.slots, choice.layer_slots, choice.held]
    if choice.phase not in PHASES:
        raise UsageError(f"phase is {choice.phase!r}: give {', '.join(PHASES)}.")
    if sum(value is not None for value in given) > 1:
        raise UsageError("--slots, --layer-slots and --set each say which experts are kept: give one of them.")
    if choice.is_set and not sets:
        raise UsageError(f"{form} holds the whole trace: give no --slots, --layer-slots or --set.")
    if choice.phase != "all" and not (counts or sets):
        raise UsageError(f"{form} holds the whole trace: give no --phase.")
    if not choice.is_set and not counts:
        raise UsageError(f"{form} holds a set of experts: give --slots N, --layer-slots N or --set FILE.csv.")
    if choice.dram_slots is not None and not tiers:
        raise UsageError(f"{form} has no tier of main memory: give no --dram-slots.")
    for name in ("slots", "layer_slots", "dram_slots"):
        value = getattr(choice, name)
        if value is not None and value < 0:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: give 0 or more.")


class KeptTally(NamedTuple):
    """The choices in the steps of a trace; `active` are distinct experts, summed over the steps."""

    counts: np.ndarray  # int64 [layers, experts]
    active: np.ndarray  # int64 [layers]


class ResultTally(NamedTuple):
    """A replay's record of its trace, for exports in the place of the trace."""

    shown: str
    layer_index: np.ndarray  # [layers]
    num_experts: int
    expert_bytes: np.ndarray | None
    tally: KeptTally
    model_layers: int  # of the model, with experts

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self.layer_index)


Counted = Trace | ResultTally


def tallied(trace: Counted, choice: KeptChoice, progress: Callable[[int], object]) -> KeptTally:
    """Count the choices of the steps of the phase; raise MoetraceError without such steps."""
    if isinstance(trace, ResultTally):
        return trace.tally
    check_objects(trace, int(trace.layer_index[-1]) + 1)
    steps = steps_of_phase(trace, choice.phase)
    found = KeptTally(np.zeros((trace.layers, trace.num_experts), np.int64), np.zeros(trace.layers, np.int64))
    for loads in loads_of(trace, steps):
        add(loads, found.counts)
        found.active[:] += np.diff(loads.start).reshape(-1, trace.layers).sum(axis=0)
        progress(loads.all_rows)
    if not found.counts.any():
        raise MoetraceError(f"{trace.shown} has no choices in {choice.phase} steps.")
    return found


def check_whole(trace: Counted, why_all: str) -> None:
    """Raise MoetraceError unless the layers are all of their model that have experts; `why_all` ends the sentence."""
    whole = trace.model_layers if isinstance(trace, ResultTally) else _moe_layers(trace.model)
    if whole != trace.layers and not (whole is None and np.array_equal(trace.layer_index, np.arange(trace.layers))):
        why = "which of a model's layers these are is not known" if whole is None else f"its model has {whole}"
        raise MoetraceError(f"{trace.shown} has {trace.layers} MoE layers, and {why}: {why_all}.")


def _moe_layers(model: str) -> int | None:
    """How many layers of a model have experts, if it is a preset."""
    return load_model(model).moe_layers if model in list_presets("models") else None


def hottest(counts: np.ndarray) -> np.ndarray:
    """All experts int64 [layers * experts, 2] (layer entry, expert), those of the greatest counts first."""
    order = np.argsort(-counts, axis=None, kind="stable")
    return np.stack(np.unravel_index(order, counts.shape), axis=1)


def kept(trace: Counted, choice: KeptChoice, counts: np.ndarray) -> np.ndarray:
    """The set int64 [n, 2] (layer entry, expert): a file's in its order, else the hottest first."""
    layers, experts = counts.shape
    if choice.pairs is not None:
        order = np.lexsort((choice.pairs[:, 1], choice.pairs[:, 0], -counts[choice.pairs[:, 0], choice.pairs[:, 1]]))
        return choice.pairs[order]
    if choice.held is not None:
        return load_static(Path(choice.held), layers, experts)
    order = hottest(counts)
    if choice.slots is not None:
        return order[: choice.slots]
    rank = np.empty((layers, experts), np.int64)  # of each expert in its layer
    np.put_along_axis(rank, np.argsort(-counts, axis=1, kind="stable"), np.arange(experts)[None], axis=1)
    return order[rank[order[:, 0], order[:, 1]] < (choice.layer_slots or 0)]


def ranks(pairs: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A set as counts int64 [layers, experts]: n for its first expert, 1 for its last, 0 for all others."""
    found = np.zeros(shape, np.int64)
    found[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs), 0, -1)
    return found


def in_model(trace: Counted, counts: np.ndarray) -> np.ndarray:
    """Counts of MoE layers [layers, experts] as of all layers of the model up to the last of them."""
    found = np.zeros((int(trace.layer_index[-1]) + 1, trace.num_experts), np.int64)
    found[trace.layer_index] = counts
    return found
