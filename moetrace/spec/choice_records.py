"""The records of a policy's choices: the name of each, its meaning, the parameters that it reads, and its partners."""

from collections.abc import Callable
from typing import ClassVar

import msgspec

_LAST = 1000  # place in lists of a record without one

# Victim of a residency: the least score (by age, its count is scaled, and its score may become the pool's age); the
# first of the ring, by touch or by admission; or the first by admission that a hand finds not visited (Sieve).
BY_AGE, BY_SCORE, BY_TOUCH, BY_ADMISSION, BY_HAND = -1, 0, 1, 2, 3


class PolicyChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of every record.

    Attributes:
        name: lower-case letters, digits and dashes.
        meaning: one line, for `--help`, `moetrace list`, `moetrace show` and the documentation.
        hook: what does it, a plain function; see the record's own class.
        parameters: fields of `PolicySpec` that it reads. It needs those that name files.
        letter, largest: of a choice with a number behind a colon (`online:m`): the number's letter and largest value.
        bare: whether it is also a choice without that number.
        instead: why a replay refuses it and what to use instead, if only `moetrace analyze` knows it.
        knows_future: whether it uses later parts of the trace, which no engine can.
        list_order: its position in lists: lower numbers come first, equal numbers by name.
    """

    name: str
    meaning: str
    hook: Callable | None = None
    parameters: tuple[str, ...] = ()
    letter: str = ""
    largest: int = 0
    bare: bool = True
    instead: str = ""
    knows_future: bool = False
    list_order: int = _LAST
    kind: ClassVar[str]

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms in which a policy may name it: `tp` and `tp:g`."""
        numbered = (f"{self.name}:{self.letter}",) if self.letter else ()
        return (*((self.name,) if self.bare else ()), *numbered)


class Placement(PolicyChoice, frozen=True, kw_only=True):
    """Units of an expert. Its hook takes a `moetrace.engine.placement.Placing`, which says what it returns.

    Attributes:
        splits: whether each expert is split over a group of units: its number is the group's size, else all units.
        mixes: whether some experts may be split over all units while others are whole on one.
        needs_units: whether it says nothing on a system without NDP units.
        planner: `module:name` of the `Planner` that makes plans for `moetrace analyze balance`; "" if it makes none.
    """

    splits: bool = False
    mixes: bool = False
    needs_units: bool = False
    planner: str = ""
    kind: ClassVar[str] = "placement"


class Dispatch(PolicyChoice, frozen=True, kw_only=True):
    """Who runs an active expert. Its hook is one of `moetrace.policy`.

    Attributes:
        partners: choices that it goes with only, as pairs of kind and name.
        without_units: whether it runs on a system where nothing but the GPU runs experts: it sends all of them there.
        beside_units: whether a CPU takes part beside NDP units.
        uses_cpu: whether it runs experts on that CPU.
        ignores_residency: whether its decision does not depend on what the GPU holds.
        reads_state: whether it looks at `state`, and not only at `view`.
        splits: whether one expert may run in part on the GPU and in part at home; with `launch = "expert"` only.
        weighs: whether it reads the sums of gates.
        counts_fallbacks: whether it searches up to `OPTIMAL_UP_TO` active experts, and layers with more are counted.
        tiers_hook: what does it on a machine with more tiers or another link (`moetrace.engine.tiers`), if not `hook`;
            a dispatch without a hook always takes this one.
    """

    partners: tuple[tuple[str, str], ...] = ()
    without_units: bool = False
    beside_units: bool = False
    uses_cpu: bool = False
    ignores_residency: bool = False
    reads_state: bool = True
    splits: bool = False
    weighs: bool = False
    counts_fallbacks: bool = False
    tiers_hook: Callable | None = None
    kind: ClassVar[str] = "dispatch"


class CachePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A residency as `moetrace analyze cache` replays it.

    Attributes:
        replays: `module:name` of the function that makes its `Replay` from budgets and demands.
        one_at_a_time: whether it is defined for one access at a time and equal sizes only.
        next_use: whether it reads when each key is accessed next.
        row_counts: whether it reads how many rows chose each key.
        totals: whether it reads how often each key is accessed in the whole trace.
        list_order: its position in lists of cache policies, as in `PolicyChoice`.
    """

    replays: str
    one_at_a_time: bool = False
    next_use: bool = False
    row_counts: bool = False
    totals: bool = False
    list_order: int = _LAST


class Residency(PolicyChoice, frozen=True, kw_only=True):
    """The GPU's resident experts. Its hook, of `moetrace.policy`, runs after each layer; None keeps the ring's order.

    Attributes:
        order: what is evicted: BY_SCORE (of the hook), BY_AGE, BY_TOUCH, BY_ADMISSION or BY_HAND.
        admits: whether a copy that arrives may be kept as long as nothing else is said.
        begin: `begin(policy, state, decoded)`, called before the first step of a system with a link.
        keeps: of a residency whose set never changes, `keeps(policy, room)`: the keys that it keeps, int64 [n].
        starts_full: whether `begin` puts experts on the GPU, free of charge.
        shares_slots: whether all layers share the slots, regardless of `scope`.
        prefetches: names of those that it goes with, beside `none` and those that name it themselves.
        next_steps: whether it reads when an expert is demanded next.
        counts_prompts: whether the engine counts what the prompts chose, and lets it keep that.
        foresees: whether the engine learns from rows to predict experts, and keeps those of the greatest worth.
        cache: how `moetrace analyze cache` replays it; None if that does not offer it.
    """

    order: int = BY_SCORE
    admits: bool = True
    begin: Callable | None = None
    keeps: Callable | None = None
    starts_full: bool = False
    shares_slots: bool = False
    prefetches: tuple[str, ...] = ()
    next_steps: bool = False
    counts_prompts: bool = False
    foresees: bool = False
    cache: CachePolicy | None = None
    kind: ClassVar[str] = "residency"


class Prefetch(PolicyChoice, frozen=True, kw_only=True):
    """The experts that move to the GPU without being demanded.

    Attributes:
        rule: what the engine does: one of the constants in `moetrace.engine.prefetch`.
        residencies: names of those that it is made for; others may name it themselves.
        any_residency: whether it goes with every residency, also of a user.
        users: whether it goes with a residency of a user.
        ahead: whether its number is how many layers the blocks of a trace must carry more.
        partners: choices that it goes with only, beside a residency, as pairs of kind and name.
    """

    rule: int
    residencies: tuple[str, ...] = ()
    any_residency: bool = False
    users: bool = False
    ahead: bool = False
    partners: tuple[tuple[str, str], ...] = ()
    kind: ClassVar[str] = "prefetch"
