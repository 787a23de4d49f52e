"""Policies: placement, dispatch, residency and prefetch, and which go together (timing model, section 5)."""

import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import msgspec
from msgspec import Meta

from moetrace.spec import cluster_policy
from moetrace.spec.choices import (
    KINDS,
    USER,
    Residency,
    choices_of,
    find,
    go_together,
    legal,
    prefetches_of,
    residencies_of,
)
from moetrace.spec.errors import MoetraceError, UsageError, printable
from moetrace.spec.host_memory import host_residencies, host_residency_of
from moetrace.spec.load import FUNCTION_FIELDS, Loaded, convert, read
from moetrace.spec.named import nearest
from moetrace.spec.remote import FIELDS as REMOTE_FIELDS

SCOPES = {
    "layer": "each layer has its own share of the slots",
    "global": "all layers share the slots",
    "request": "all layers share the slots, which are emptied when no request is under way",
}
# Parameters that a user's own function may read.
_OWN_READS = {"residency": ("half_life", "alpha"), "dispatch": ("with_cpu",)}
# Parameters that name a file, which a choice that reads it needs.
NEEDED_FILES = {
    "loads": "the path of a CSV file of loads, which {} needs",
    "plan": "the path of a plan file (.json of SGLang, vLLM or vllm-ascend, .yaml of TensorRT-LLM), which it needs",
    "static": "the path of a CSV file of layer,expert lines, which {} needs",
}


class PolicySpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Four independent choices and the parameters of those that have some; texts as in the TOML.

    A policy with a `schedule` is one of a cluster: it has a placement, and no other of the four choices. `dispatch` and
    `residency` may be a user's own, `"/path/file.py:function"`. `loads` (of placements `ep-lpt` and `eplb`, and of
    `remote`) and `static` (of residency `static`) are paths of CSV files, `plan` (of placement `plan`) of a plan file,
    `layout` (of placement `mixed`) of a CSV file.
    """

    name: str
    placement: str = "ep"
    dispatch: str = "gpu"
    residency: str = "none"
    prefetch: str = "none"
    scope: str = "layer"
    budget: str | None = None
    half_life: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    alpha: Annotated[float, Meta(ge=1e-6, le=1)] = 0.3
    p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    loads: str | None = None
    plan: str | None = None
    layout: str | None = None
    static: str | None = None
    prefetch_blocks: bool = False
    gpu_rows: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    gpu_layers: Annotated[int, Meta(ge=0, le=65535)] | None = None
    gpu_layers_end: Literal["first", "last"] | None = None
    most_count: Annotated[float, Meta(ge=1, le=10**9)] | None = None
    evicted_share: Annotated[float, Meta(ge=0, le=1)] | None = None
    margin: Annotated[float, Meta(ge=0, le=1000)] | None = None
    ahead_layers: Annotated[int, Meta(ge=0, le=65535)] | None = None
    follows: bool | None = None
    now_weight: Annotated[float, Meta(ge=0, le=1000)] | None = None
    long_weight: Annotated[float, Meta(ge=0, le=1000)] | None = None
    with_cpu: bool | None = None
    host_residency: str | None = None
    remote: Annotated[float, Meta(ge=0, le=1)] | None = None
    plan_steps: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    replicas: Annotated[int, Meta(ge=1, le=65535)] | None = None
    deadline_ms: Annotated[float, Meta(ge=1e-6, le=1e9)] | None = None
    schedule: str | None = None
    order: Literal["asas", "aass"] | None = None
    shared: Literal["with-attention", "apart", "auto"] | None = None
    execution: Literal["bulk", "fused"] | None = None
    kernels_per_layer: Annotated[int, Meta(ge=1, le=10**6)] | None = None
    redundant: Annotated[int, Meta(ge=0, le=65535)] | None = None
    interval: Annotated[int, Meta(ge=0, le=10**9)] | None = None
    window: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    copies: Literal["even", "row", "random", "nearest"] | None = None
    migrate: Literal["pause", "async"] | None = None
    migrate_share: Annotated[float, Meta(ge=1e-6, le=0.999)] | None = None
    nodes: Annotated[int, Meta(ge=1, le=4096)] | None = None
    groups: Annotated[int, Meta(ge=1, le=4096)] | None = None

    def group_size(self, units: int) -> int:
        """Number of units that share an expert when there are `units`: g."""
        placement, size = find("placement", self.placement), self.placement.partition(":")[2]
        return 1 if placement is None or not placement.splits else int(size) if size else units

    @property
    def prefetch_depth(self) -> int:
        """The m of `online:m` and the d of `oracle:d`; else 0."""
        return int(self.prefetch.partition(":")[2] or 0)

    @property
    def unread(self) -> list[str]:
        """Parameters that none of the choices reads; of a policy of a cluster also the parameters that are not set."""
        if self.schedule is not None:
            read = cluster_policy.fields_read(self.placement, self.schedule, self.copies, self.migrate)
            unread = [field for field in parameters() if field not in read or getattr(self, field) is None]
            return [*cluster_policy.ONE_GPU, *unread]
        read = {field for kind, fields in _OWN_READS.items() if _split(getattr(self, kind)) for field in fields}
        # These go with a scope, a system and any policy, not with a choice.
        read |= {field for field in ("budget", "host_residency", "deadline_ms") if getattr(self, field) is not None}
        read |= set(host_residency_of(self.host_residency).parameters if self.host_residency else ())
        read |= {"remote", "loads", *REMOTE_FIELDS} if self.remote is not None else set()
        for kind in KINDS:
            record = find(kind, getattr(self, kind))
            read |= set(record.parameters) if record else set()
        return [field for field in parameters() if field not in read]


class UnreadParameterError(UsageError):
    """A parameter was set that none of a policy's choices reads."""

    def __init__(self, where: str, field: str, read_by: str) -> None:
        super().__init__(f"{where}: {field} applies to {read_by} only; remove it or choose that.")
        self.where, self.field, self.read_by = where, field, read_by

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Come back whole from another process."""
        return type(self), (self.where, self.field, self.read_by)


def parameters() -> list[str]:
    """Return the fields of a policy that only some choices read."""
    return [field for field in PolicySpec.__struct_fields__ if field not in ("name", *KINDS, "scope")]


def readers(parameter: str) -> str:
    """Say which choices read a parameter: `residency ewma or file.py:function`."""
    if parameter in cluster_policy.FIELDS and parameter not in REMOTE_FIELDS:
        return "policies of a cluster, which have a schedule,"
    said = []
    for kind in KINDS:
        known = [record for record in choices_of(kind).values() if not record.instead]
        others = [record for record in known if parameter not in record.parameters]
        names = [form for record in known if record not in others for form in record.forms]
        if names and len(others) == 1:
            said.append(f"a {kind} other than {others[0].name}")
            continue
        names += [USER] if parameter in _OWN_READS.get(kind, ()) else []
        said += [f"{kind} {' or '.join(names)}"] if names else []
    said += ["policies with remote"] if parameter in (*REMOTE_FIELDS, "loads") else []
    said += [f"schedule {cluster_policy.AUTO}"] if parameter in cluster_policy.FIELDS else []
    return " or ".join(said)


def load_policy(
    source: str | Path | PolicySpec, overrides: Mapping[str, object] | None = None, *, code: bool = True
) -> PolicySpec:
    """Load a policy from a preset's name, a TOML file or an instance, with dotted `overrides`, and check it.

    `file.py:function` stands for the preset `on-demand` with that function as its dispatch. Nothing is run here. A note
    on stderr names a Python file that a TOML file names, as a replay runs it.

    Args:
        source: The preset, the file or the instance.
        overrides: New values of single fields.
        code: False refuses a policy that names a Python file.

    Returns:
        The policy.

    Raises:
        UsageError: a wrong value, choices that do not go together, a parameter where it does not apply.
        MoetraceError: a file that cannot be read, or that names a Python file where `code` is False.

    Examples:
        >>> import moetrace as mt
        >>> mt.load_policy("monde", {"scope": "global"}, code=False).scope
        'global'
    """
    policy, files = read_policy(source, overrides)
    for file in files:
        if not code:
            refuse_code(f"{file.where}: {file.kind}", file.path)
        if file.in_file:
            note_code(file.where, file.path)
    return policy


class CodeFile(NamedTuple):
    """A Python file that a policy names; ``in_file``: in its own file, and not by who asked for it."""

    where: str  # what says so
    kind: str
    path: str
    in_file: bool


def read_policy(
    source: str | Path | PolicySpec, overrides: Mapping[str, object] | None = None
) -> tuple[PolicySpec, list[CodeFile]]:
    """Load a policy as `load_policy` does, say nothing, and return with it the Python files that it names."""
    overrides = overridden = dict(overrides or {})
    if isinstance(source, str) and _split(source):
        overrides = {"dispatch": source} | overrides
        loaded = read("policies", "on-demand", overrides)._replace(where=f"policy {printable(source)}")
        if "name" not in overrides:  # set here, so that `true` and `nan` stay names
            loaded.raw["name"] = source.rpartition(":")[2]
    elif isinstance(source, str | Path) and str(source).endswith(".py"):
        shown = printable(str(source))
        raise UsageError(f"{shown} is a Python file: name the function in it, too, as {shown}:NAME.")
    else:
        loaded = read("policies", source, overrides)
    policy = convert(loaded, PolicySpec)
    given = _changed(policy) | set(overrides) if isinstance(source, PolicySpec) else set(loaded.raw)
    if policy.schedule is not None:
        _check_of_cluster(policy, loaded, given)
        return policy, []
    _check_choices(policy, loaded, overridden)
    _check_partners(policy, loaded)
    _check_scope(policy, loaded)
    _check_parameters(policy, loaded, given)
    is_file = isinstance(source, str | Path) and loaded.where == str(source)
    return policy, [
        CodeFile(loaded.where, kind, user[0], is_file and kind not in overrides)
        for kind in FUNCTION_FIELDS
        if (user := _split(getattr(policy, kind)))
    ]


def refuse_code(where: str, file: str) -> NoReturn:
    """Raise the MoetraceError that says where a Python file is named although no code is to run."""
    raise MoetraceError(f"{where} names the Python file {_from_here(file)}, and no code is to run (--no-code).")


@cache
def note_code(where: str, file: str) -> None:
    """Say on stderr, once, that a file names a Python file, which a replay runs."""
    if sys.stderr is not None:
        print(
            printable(f"moetrace: note: {_from_here(where)} names {_from_here(file)}: a replay runs its code."),
            file=sys.stderr,
        )


def names_code(policy: PolicySpec) -> bool:
    """Whether a replay of the policy runs a Python file that it names."""
    return any(_split(getattr(policy, kind)) for kind in FUNCTION_FIELDS)


def _split(choice: str) -> tuple[str, str] | None:
    file, separator, function = choice.rpartition(":")
    return (file, function) if separator and file.endswith(".py") else None


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # as for a name that is too long
        return False


def _from_here(file: str) -> str:
    return file.removeprefix(f"{Path.cwd()}{os.sep}")


def shown(choice: str) -> str:
    """Return a choice as messages name it: of a function's file the last part of its path."""
    user = _split(choice)
    return f"{Path(user[0]).name}:{user[1]}" if user else choice


def _changed(policy: PolicySpec) -> set[str]:
    return {name for name, default in _defaults().items() if getattr(policy, name) != default}


@cache
def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(PolicySpec)}


def _check_choices(policy: PolicySpec, loaded: Loaded, overridden: Mapping[str, object]) -> None:
    """Each choice is one that a replay takes; a message about an override does not blame the policy that it changes."""
    for kind in KINDS:
        where = f"an override of {loaded.where}" if kind in overridden else loaded.where
        _check_choice(loaded._replace(where=where), kind, getattr(policy, kind))
    if policy.host_residency is not None and policy.host_residency not in (able := host_residencies()):
        near = nearest(policy.host_residency, list(able))
        loaded.refuse("host_residency", f"one of {', '.join(able)}, which learn from demands so far{near}")
    if policy.scope not in SCOPES:
        loaded.refuse("scope", f"one of {', '.join(SCOPES)}{nearest(policy.scope, list(SCOPES))}")


def _check_of_cluster(policy: PolicySpec, loaded: Loaded, given: set[str]) -> None:
    """Refuse a policy of a cluster with a wrong placement or schedule, or with fields that it does not read."""
    if policy.placement not in cluster_policy.PLACEMENTS:
        near = nearest(policy.placement, list(cluster_policy.PLACEMENTS))
        loaded.refuse("placement", f"one of {', '.join(cluster_policy.PLACEMENTS)} on a cluster{near}")
    if not cluster_policy.is_schedule(str(policy.schedule)):
        loaded.refuse("schedule", cluster_policy.SCHEDULES)
    if policy.shared == "auto" and policy.schedule != cluster_policy.AUTO:
        loaded.refuse("shared", f"with-attention or apart; auto goes with schedule {cluster_policy.AUTO}")
    for field in policy.unread:
        if field in given and getattr(policy, field) is not None:
            raise UnreadParameterError(loaded.where, field, cluster_policy.reader_of(field))
    if policy.placement == "plan" and policy.plan is None:
        loaded.refuse("plan", NEEDED_FILES["plan"])


def _check_choice(loaded: Loaded, kind: str, choice: str) -> None:
    """`choice` is one that a replay takes, with a whole number of at least 1 where its record has one."""
    name, colon, number = choice.partition(":")
    record = find(kind, choice)
    if record and choice == record.name:
        colon = ""
    if record and record.instead and not colon:
        raise UsageError(f"{loaded.where}: {kind} {choice} {record.instead}.")
    if record and record.bare and not record.instead and not colon:
        return
    if record and record.letter:
        if re.fullmatch("[0-9]{1,9}", number) and 1 <= int(number) <= record.largest:
            return
        letter = record.letter
        loaded.refuse(kind, f"{name}:{letter} with a whole number {letter} from 1 to {record.largest}")
    if kind in FUNCTION_FIELDS and (user := _split(choice)):
        if not user[1].isidentifier():
            loaded.refuse(kind, f"the name of a function after {user[0]}:")
        if not _is_file(user[0]):
            raise MoetraceError(f"{loaded.where}: {kind} names {user[0]}, and there is no such file.")
        return
    known = legal(kind)
    loaded.refuse(kind, f"one of {', '.join(known)}{nearest(choice, list(known))}")


def _check_partners(policy: PolicySpec, loaded: Loaded) -> None:
    prefetch = find("prefetch", policy.prefetch)
    for record in (find("dispatch", policy.dispatch), prefetch):
        partners = record.partners if record else ()
        if any(getattr(policy, kind) != name for kind, name in partners):
            raise UsageError(
                f"{loaded.where}: {record.kind} {record.name} goes with {_joined(partners)} only, "
                f"got {_joined((kind, shown(getattr(policy, kind))) for kind, _ in partners)}."
            )
    residency = USER if _split(policy.residency) else policy.residency
    if not go_together(prefetch, residency):
        raise UsageError(
            f"{loaded.where}: prefetch {policy.prefetch} goes with residency "
            f"{' or '.join(residencies_of(prefetch))} only, got residency {shown(policy.residency)}, which goes with "
            f"prefetch {' or '.join(prefetches_of(residency))}."
        )


def _check_scope(policy: PolicySpec, loaded: Loaded) -> None:
    """Slots of each layer are of scope layer; a residency that learns across requests is not of scope request."""
    residency: Residency | None = find("residency", policy.residency)
    shared = residency is not None and residency.shares_slots
    if policy.budget is not None and (policy.scope != "layer" or shared):
        why = f"in residency {policy.residency} all layers share the slots" if shared else f"scope is {policy.scope}"
        raise UsageError(f"{loaded.where}: budget gives each layer slots of its own, but {why}; remove one of them.")
    if policy.scope == "request" and residency is not None and residency.foresees:
        raise UsageError(
            f"{loaded.where}: residency {policy.residency} learns from one request for the next, so its cache is not "
            'emptied between them; use scope = "global".'
        )


def _joined(choices: Iterable[tuple[str, str]]) -> str:
    return " and ".join(f"{kind} {name}" for kind, name in choices)


def _check_parameters(policy: PolicySpec, loaded: Loaded, given: set[str]) -> None:
    """Each parameter of `given` stands beside the choice that reads it, and each choice has the file that it needs."""
    for field in policy.unread:
        if field in given:
            raise UnreadParameterError(loaded.where, field, readers(field))
    placement = find("placement", policy.placement)
    places = placement is not None and "loads" in placement.parameters
    if policy.remote is not None and policy.plan_steps is not None and policy.loads is not None and not places:
        raise UsageError(
            f"{loaded.where}: remote experts are planned by rows of the first plan_steps steps or by loads; remove one."
        )
    for kind in KINDS:
        record = find(kind, getattr(policy, kind))
        for field, wanted in NEEDED_FILES.items():
            if record and field in record.parameters and getattr(policy, field) is None:
                loaded.refuse(field, wanted.format(f"{kind} {record.name}"))
