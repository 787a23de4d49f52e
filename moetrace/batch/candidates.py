"""The policies worth a try on a machine: the search space of `advise`, read from the records of choices."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import msgspec

from moetrace.spec import PolicySpec, check_policy, default_policies, list_presets, load_policy
from moetrace.spec.choices import Dispatch, Placement, choices_of, find, go_together
from moetrace.spec.errors import MoetraceError
from moetrace.spec.policy import NEEDED_FILES, names_code
from moetrace.spec.system import System

# The m of online:m and the d of oracle:d.
_NUMBERS = (1, 2, 4)
# Parameters that are off by default, and what else is tried: as the presets on-demand-lfu and n-cpu-moe have them.
_SETTINGS: dict[str, Any] = {"half_life": 64, "gpu_rows": 32}
# Presets that are others by another name, as a paper calls them: `ktransformers` and `resident`.
_SAME = ("all-cpu", "all-gpu")
# Presets that people know, by which others are named first.
_PLAIN = ("on-demand", "on-demand-lfu", "hybrid", "n-cpu-moe", "ktransformers", "monde", "edge-ndp", "foresee")
# Sizes of groups of units, beside one unit and all of them.
_MOST_GROUPS = 3


class Candidate(NamedTuple):
    """A policy to be tried.

    Attributes:
        policy: Its name is a preset's, or that of the preset that it differs least from.
        preset: The preset that a command can name.
        changes: Fields in which it differs from that.
        is_oracle: Whether it uses later parts of the trace, which no engine can: a bound, and no advice.
    """

    policy: PolicySpec
    preset: str
    changes: dict[str, Any]
    is_oracle: bool

    @property
    def label(self) -> str:
        """`foresee`, or `foresee dispatch=split`."""
        return " ".join([self.preset, *(f"{field}={_text(value)}" for field, value in self.changes.items())])

    @property
    def cache(self) -> tuple:
        """The fields that decide the content of the GPU's memory: residency, prefetch, scope and their parameters."""
        policy = self.policy
        return policy.residency, policy.prefetch, policy.scope if _has_scope(policy) else "", policy.half_life

    @property
    def split(self) -> tuple:
        """The fields that decide which device runs an expert: placement, dispatch and its parameters."""
        return self.policy.placement, self.policy.dispatch, self.policy.gpu_rows


def knows_future(policy: PolicySpec) -> bool:
    """Whether a policy uses later parts of the trace: `belady`, a set by hindsight, `oracle:d`."""
    records = (find(kind, getattr(policy, kind)) for kind in ("dispatch", "residency", "prefetch"))
    return any(record is not None and record.knows_future for record in records)


def candidates(system: System) -> list[Candidate]:
    """Return every real policy that may be best on a machine: presets first, then all that its records allow.

    A choice that needs a file is left out, and so is what differs in nothing that the machine has: a placement without
    units, a scope of what all layers share. Without a link there is nothing to choose. No oracle is among them.
    """
    presets = _presets(system)
    if system.link is None:
        return [one for one in presets if one.preset in default_policies(system)]
    found = {_identity(one.policy, system): one for one in presets if not one.is_oracle}
    for dispatch in _usable("dispatch"):
        caches = [{"residency": "none"}] if dispatch.ignores_residency else _caches(False)
        for split in _splits(dispatch, system):
            for content in caches:
                _add(found, split | content, system)
    return list(found.values())


def oracles(best: Candidate, system: System) -> list[Candidate]:
    """Return what a policy would be if it knew the future: its split of the work beside each oracle's cache.

    A prefetch that knows the future stands beside the best policy's residency, or beside `lru` if it does not go with
    that.
    """
    if system.link is None:
        return []
    presets = _presets(system)
    found = {_identity(one.policy, system): one for one in presets if one.is_oracle}
    split = {field: getattr(best.policy, field) for field in ("placement", "dispatch", "gpu_rows")}
    dispatch = find("dispatch", best.policy.dispatch)
    if dispatch is not None and dispatch.ignores_residency:
        split |= {"dispatch": "balance" if system.home else "gpu", "gpu_rows": None}
    caches = [content for content in _caches(True) if content.get("half_life") is None]
    own = [content for content in caches if content["residency"] == best.policy.residency]
    for content in caches:
        if content["prefetch"] == "none" or content in own or (not own and content["residency"] == "lru"):
            _add(found, split | content, system)
    return list(found.values())


def _named(policy: PolicySpec, system: System) -> Candidate:
    """Name a policy by the preset from which the fewest fields differ; of equal ones by the first of `_nearest`."""
    changes = [(preset, _changes(policy, _all_presets()[preset], system)) for preset in _nearest()]
    sayable = [pair for pair in changes if None not in pair[1].values()]  # TOML has no word for "never"
    preset, least = min(sayable, key=lambda pair: len(pair[1]))
    of = _all_presets()[preset]
    unsaid = {field: getattr(of, field) for field in ("scope", "placement") if field not in least}
    return Candidate(msgspec.structs.replace(policy, name=preset, **unsaid), preset, least, knows_future(policy))


@cache
def _all_presets() -> dict[str, PolicySpec]:
    return {name: load_policy(name) for name in list_presets("policies") if name not in _SAME}


@cache
def _nearest() -> list[str]:
    """The presets in the order in which they name others: plain ones, the rest by name, and last the oracles.

    `on-demand residency=ewma` explains itself; `trimoe-static dispatch=gpu prefetch=none`, which is the same policy,
    does not: its other fields have to be looked up.
    """
    rest = sorted({*_all_presets()} - {*_PLAIN}, key=lambda name: (knows_future(_all_presets()[name]), name))
    return [*_PLAIN, *rest]


def _presets(system: System) -> list[Candidate]:
    """The presets that run on a machine, its defaults first."""
    specs = {name: _all_presets()[name] for name in default_policies(system)} | _all_presets()
    return [Candidate(spec, name, {}, knows_future(spec)) for name, spec in specs.items() if _runs(spec, system)]


def _add(found: dict[tuple, Candidate], fields: dict[str, Any], system: System) -> None:
    """Add the policy of these fields, if it is one and the machine runs it, and it is not there yet."""
    try:
        policy = load_policy(PolicySpec(name="candidate", **fields))
    except MoetraceError:
        return
    if _runs(policy, system) and not names_code(policy):
        found.setdefault(_identity(policy, system), _named(policy, system))


def _runs(policy: PolicySpec, system: System) -> bool:
    try:
        check_policy(policy, system)
    except MoetraceError:
        return False
    return True


def _identity(policy: PolicySpec, system: System) -> tuple:
    """The fields that distinguish two policies on a machine: not their names, nor fields without effect there."""
    scope = policy.scope if _has_scope(policy) else ""
    placement = "" if system.ndp is None else policy.placement
    return msgspec.structs.astuple(msgspec.structs.replace(policy, name="", scope=scope, placement=placement))


def _usable(kind: str) -> Iterator[Any]:
    """Records that a replay takes, that need no file, and that decide for time, not for what may get lost."""
    for record in choices_of(kind).values():
        weighs = getattr(record, "weighs", False)
        if not record.instead and not weighs and not set(record.parameters) & set(NEEDED_FILES):
            yield record


def _splits(dispatch: Dispatch, system: System) -> Iterator[dict[str, Any]]:
    partners = dict(dispatch.partners)
    placements = ["ep"] if system.ndp is None or dispatch.without_units else _placements(system)
    placements = [one for one in placements if partners.get("placement") in (None, one.partition(":")[0])]
    for placement in placements or [partners.get("placement", "ep")]:
        yield {"placement": placement, "dispatch": dispatch.name}
        for field in set(dispatch.parameters) & set(_SETTINGS):
            yield {"placement": placement, "dispatch": dispatch.name, field: _SETTINGS[field]}


def _placements(system: System) -> list[str]:
    """Every placement; where an expert is split over a group, all units and a few of the sizes that divide them."""
    found: list[str] = []
    records: Iterable[Placement] = _usable("placement")
    for record in records:
        found += [record.name] if record.bare else []
        if record.letter and record.splits:
            sizes = [size for size in range(2, system.units) if system.units % size == 0]
            found += [f"{record.name}:{size}" for size in sizes[:_MOST_GROUPS]]
    return found


def _caches(future: bool) -> list[dict[str, Any]]:
    """Every residency with each prefetch that goes with it, in each scope: those that know the future, or the rest."""
    found = []
    for residency in _usable("residency"):
        for prefetch in _usable("prefetch"):
            if not go_together(prefetch, residency.name) or future != (residency.knows_future or prefetch.knows_future):
                continue
            for form in [f"{prefetch.name}:{number}" for number in _NUMBERS] if prefetch.letter else [prefetch.name]:
                content = {"residency": residency.name, "prefetch": form}
                scopes = ["global"] if residency.shares_slots or residency.name == "none" else ["global", "layer"]
                settings = [{field: _SETTINGS[field]} for field in residency.parameters if field in _SETTINGS]
                found += [content | {"scope": scope} | setting for scope in scopes for setting in ({}, *settings)]
    return found


def _changes(policy: PolicySpec, of: PolicySpec, system: System) -> dict[str, Any]:
    """The fields in which a policy differs from another, except its name, and a scope or placement of nothing."""
    fields = [field for field in PolicySpec.__struct_fields__ if field != "name"]
    changed = {f: getattr(policy, f) for f in fields if getattr(policy, f) != getattr(of, f)}
    if not _has_scope(policy):
        changed.pop("scope", None)
    placement = find("placement", of.placement)
    if system.ndp is None and placement is not None and not placement.needs_units:
        changed.pop("placement", None)
    return changed


def _has_scope(policy: PolicySpec) -> bool:
    """Whether it matters which layers share slots."""
    residency = find("residency", policy.residency)
    return policy.residency != "none" and not (residency is not None and residency.shares_slots)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
