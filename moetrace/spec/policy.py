"""What is decided: placement, dispatch, residency and prefetch, and which go together (timing model, section 5)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.load import Loaded, convert, data_lines, nearest, read, read_table
from moetrace.spec.system import System

PLACEMENTS = ("ep", "ep-block", "ep-lpt", "eplb", "plan", "tp", "tp:g")
DISPATCHES = ("ndp", "gpu", "hot", "balance", "optimal")
RESIDENCIES = ("none", "static", "static-hindsight", "prefill", "lru", "fifo", "sieve", "lfu", "lfu-in-cache", "ewma")
RESIDENCIES += ("least-stale", "belady")
PREFETCHES = ("none", "prefill", "online:m", "oracle:d")
SCOPES = ("layer", "global")
USER = "file.py:function"

# What `moetrace analyze` knows and a replay does not -> why, and what there is instead.
_ELSEWHERE = {
    "s3-fifo": "is of moetrace analyze cache alone, where accesses come one at a time; take residency sieve or fifo",
    "arc": "is of moetrace analyze cache alone, where accesses come one at a time; take residency lru or lfu",
    "static-prefill": "is of moetrace analyze cache alone; take residency prefill, which also forgets who has left",
    "eplb-hierarchical": "is of moetrace analyze balance alone; take placement plan with what that exports",
}

# The largest number behind the colon. Blocks of a trace carry as many layers more as `oracle` looks ahead.
_LARGEST = {"tp": 65535, "online": 65535, "oracle": 4096}

# Prefetch -> the built-in residencies that it goes with; it goes with a user's own where USER is among them.
_PARTNERS = {
    "none": (*RESIDENCIES, USER),
    "prefill": ("prefill",),
    "online": ("ewma", "lfu", USER),
    "oracle": ("lru", "fifo", "sieve", "lfu", "ewma", "least-stale", USER),
}


class PolicySpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Four independent choices and the parameters of those that have some; texts as in the TOML.

    `dispatch` and `residency` may be a user's own, `"/path/file.py:function"`. `loads` (of placements `ep-lpt` and
    `eplb`) and `static` (of residency `static`) are paths of CSV files, `plan` (of placement `plan`) of a plan file.
    """

    name: str
    placement: str = "ep"
    dispatch: str = "gpu"
    residency: str = "none"
    prefetch: str = "none"
    scope: str = "layer"
    half_life: Annotated[int, Meta(ge=1)] | None = None
    alpha: Annotated[float, Meta(gt=0, le=1)] = 0.3
    p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0)] = 0
    loads: str | None = None
    plan: str | None = None
    static: str | None = None
    prefetch_blocks: bool = False

    def group_size(self, units: int) -> int:
        """Number of units that share an expert when there are `units`: g."""
        kind, _, size = self.placement.partition(":")
        return 1 if kind != "tp" else int(size) if size else units

    @property
    def prefetch_kind(self) -> str:
        """`none`, `prefill`, `online` or `oracle`."""
        return self.prefetch.partition(":")[0]

    @property
    def prefetch_depth(self) -> int:
        """The m of `online:m` and the d of `oracle:d`; else 0."""
        return int(self.prefetch.partition(":")[2] or 0)

    @property
    def unread(self) -> dict[str, str]:
        """Parameters that none of the choices reads, each with the choice that would."""
        own = _split(self.residency) is not None  # reads what it likes of the view
        oracle = self.prefetch_kind == "oracle"
        readers = {
            "half_life": (own or self.residency == "lfu", f"residency lfu or {USER}"),
            "alpha": (own or self.residency == "ewma", f"residency ewma or {USER}"),
            "p": (oracle, "prefetch oracle:d"),
            "seed": (oracle, "prefetch oracle:d"),
            "loads": (self.placement in ("ep-lpt", "eplb"), "placement ep-lpt or eplb"),
            "plan": (self.placement == "plan", "placement plan"),
            "static": (self.residency == "static", "residency static"),
            "prefetch_blocks": (self.prefetch != "none", "a prefetch other than none"),
        }
        return {field: reader for field, (reads, reader) in readers.items() if not reads}


def load_policy(source: str | Path | PolicySpec, overrides: Mapping[str, object] | None = None) -> PolicySpec:
    """Load a policy from a preset's name, a TOML file or an instance, with dotted `overrides`, and check it.

    `file.py:function` stands for the preset `on-demand` with that function as its dispatch.

    Raises:
        UsageError: a wrong value, choices that do not go together, a parameter where it does not apply.
        MoetraceError: a file that cannot be read.
    """
    overrides = dict(overrides or {})
    if isinstance(source, str) and _split(source):
        overrides = {"dispatch": source, "name": source.rpartition(":")[2]} | overrides
        source = "on-demand"
    loaded = read("policies", source, overrides)
    policy = convert(loaded, PolicySpec)
    _check_choices(policy, loaded)
    _check_partners(policy, loaded)
    given = _changed(policy) | set(overrides) if isinstance(source, PolicySpec) else set(loaded.raw)
    _check_parameters(policy, loaded, given)
    return policy


def check_policy(policy: PolicySpec, system: System) -> None:
    """Raise a UsageError if the policy cannot run on the system.

    `tp:g` wants a g that divides the number of NDP units. Without any, `gpu` is the only dispatch: there is nothing
    to decide, so a user's own is refused too (and `placement`, which then places nothing, is not looked at).
    """
    if system.ndp is None:
        if policy.dispatch != "gpu":
            raise UsageError(
                f"Policy {policy.name}: dispatch {_show(policy.dispatch)} needs NDP units, and system {system.name} "
                'has none; only dispatch = "gpu" (as in on-demand) runs there.'
            )
        return
    size = policy.group_size(system.ndp.units)
    if system.ndp.units % size:
        raise UsageError(
            f"Policy {policy.name}: placement {policy.placement} wants a group size that divides the "
            f"{system.ndp.units} NDP units of system {system.name}, got {size}."
        )


def load_loads(path: str | Path, layers: int, experts: int) -> np.ndarray:
    """Read the loads of placements `ep-lpt` and `eplb`: a CSV of one line per layer, one number per expert.

    Returns float64 `[layers, experts]`; raises a MoetraceError that names the line.
    """
    return read_table(path, layers, experts)


def load_static(path: str | Path, layers: int, experts: int) -> np.ndarray:
    """Read the experts of residency `static`: a CSV of lines `layer,expert`, with or without that header.

    Returns int64 `[n, 2]` in the file's order; raises a MoetraceError that names the line.
    """
    pairs: dict[tuple[int, int], None] = {}
    for number, cells in data_lines(path):
        if [cell.strip() for cell in cells] == ["layer", "expert"] and not pairs:
            continue
        try:
            layer, expert = (int(cell) for cell in cells)
        except ValueError:
            raise MoetraceError(f"{path}, line {number}: wants a layer and an expert, as in 0,17.") from None
        if not (0 <= layer < layers and 0 <= expert < experts):
            raise MoetraceError(
                f"{path}, line {number}: wants a layer below {layers} and an expert below {experts}, "
                f"got {layer},{expert}."
            )
        if (layer, expert) in pairs:
            raise MoetraceError(f"{path}, line {number}: expert {expert} of layer {layer} is there twice.")
        pairs[layer, expert] = None
    return np.array(list(pairs), np.int64).reshape(-1, 2)


def _split(choice: str) -> tuple[str, str] | None:
    file, separator, function = choice.rpartition(":")
    return (file, function) if separator and file.endswith(".py") else None


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # as for a name that is too long
        return False


def _show(choice: str) -> str:
    user = _split(choice)
    return f"{Path(user[0]).name}:{user[1]}" if user else choice


def _changed(policy: PolicySpec) -> set[str]:
    fields = msgspec.structs.fields(PolicySpec)
    return {field.name for field in fields if getattr(policy, field.name) != field.default}


def _check_choices(policy: PolicySpec, loaded: Loaded) -> None:
    _check_choice(loaded, "placement", policy.placement, PLACEMENTS)
    _check_choice(loaded, "dispatch", policy.dispatch, (*DISPATCHES, USER))
    _check_choice(loaded, "residency", policy.residency, (*RESIDENCIES, USER))
    _check_choice(loaded, "prefetch", policy.prefetch, PREFETCHES)
    _check_choice(loaded, "scope", policy.scope, SCOPES)


def _check_choice(loaded: Loaded, field: str, choice: str, legal: tuple[str, ...]) -> None:
    """`choice` is one of `legal`, where `kind:x` stands for a kind and a whole number of at least 1."""
    if choice in _ELSEWHERE and field in ("placement", "residency"):
        raise UsageError(f"{loaded.where}: {field} {choice} {_ELSEWHERE[choice]}.")
    if choice in legal and choice != USER and ":" not in choice:
        return
    kind, _, number = choice.partition(":")
    letter = next((name.partition(":")[2] for name in legal if name.startswith(f"{kind}:")), None)
    if letter:
        if re.fullmatch("[0-9]{1,9}", number) and 1 <= int(number) <= _LARGEST[kind]:
            return
        loaded.refuse(field, f"{kind}:{letter} with a whole number {letter} from 1 to {_LARGEST[kind]}")
    if USER in legal and (user := _split(choice)):
        if not user[1].isidentifier():
            loaded.refuse(field, f"the name of a function after {user[0]}:")
        if not _is_file(user[0]):
            raise MoetraceError(f"{loaded.where}: {field} names {user[0]}, and there is no such file.")
        return
    loaded.refuse(field, f"one of {', '.join(legal)}{nearest(choice, list(legal))}")


def _check_partners(policy: PolicySpec, loaded: Loaded) -> None:
    residency = USER if _split(policy.residency) else policy.residency
    if policy.dispatch == "hot" and (policy.residency, policy.prefetch) != ("none", "none"):
        raise UsageError(
            f"{loaded.where}: dispatch hot goes with residency none and prefetch none only, "
            f"got residency {_show(policy.residency)} and prefetch {policy.prefetch}."
        )
    partners = _PARTNERS[policy.prefetch_kind]
    if residency not in partners:
        legal = [name for name in PREFETCHES if residency in _PARTNERS[name.partition(":")[0]]]
        raise UsageError(
            f"{loaded.where}: prefetch {policy.prefetch} goes with residency {' or '.join(partners)} only, "
            f"got residency {_show(policy.residency)}, which goes with prefetch {' or '.join(legal)}."
        )


def _check_parameters(policy: PolicySpec, loaded: Loaded, given: set[str]) -> None:
    """Each parameter of `given` stands beside the choice that reads it, and each choice has the file that it needs."""
    for field, reader in policy.unread.items():
        if field in given:
            raise UsageError(f"{loaded.where}: {field} applies to {reader} only; remove it or choose that.")
    if policy.placement in ("ep-lpt", "eplb") and policy.loads is None:
        loaded.refuse("loads", f"the path of a CSV file of loads, which placement {policy.placement} needs")
    if policy.placement == "plan" and policy.plan is None:
        loaded.refuse("plan", "the path of a plan file (.json of SGLang, .yaml of TensorRT-LLM), which it needs")
    if policy.residency == "static" and policy.static is None:
        loaded.refuse("static", "the path of a CSV file of layer,expert lines, which residency static needs")
