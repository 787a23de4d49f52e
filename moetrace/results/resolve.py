"""From what a user names (presets, files, functions, overrides) to the specs that are replayed."""

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType

import msgspec

from moetrace.engine.setup import Setup
from moetrace.spec import (
    Model,
    PolicySpec,
    System,
    check_policy,
    default_policies,
    list_presets,
    load_model,
    load_policy,
    load_system,
)
from moetrace.spec.cluster_policy import fields_read
from moetrace.spec.errors import UsageError
from moetrace.spec.fits import dense_misfit
from moetrace.spec.model_files.quantization import precision_name
from moetrace.spec.named import nearest
from moetrace.spec.policy import UnreadParameterError
from moetrace.trace import Trace

# A policy of `replay`: a preset's name, a TOML file, `file.py:function`, a spec, or a function.
Policy = str | Path | PolicySpec | Callable


def resolve(
    trace: Trace,
    model: str | Path | Model | None,
    system: str | Path | System,
    policies: Policy | Sequence[Policy] | None,
    overrides: Mapping[str, object],
    code: bool = True,
) -> tuple[Setup, list[str]]:
    """Return the specs that were named, with their overrides, and sentences about what may not be meant so.

    Without ``code``, a policy that names a Python file is refused.
    """
    changes = by_spec(overrides)
    the_model = load_model(model_of(trace) if model is None else model, changes["model"])
    the_system = load_system(system, changes["system"])
    if policies is None:
        policies = default_policies(the_system)
    misfit = dense_misfit(the_model, the_system)
    warnings = [misfit] if misfit else []
    several = list(policies) if isinstance(policies, Sequence) and not isinstance(policies, str) else [policies]
    hooks: dict[str, Callable] = {}
    try:
        specs = _load_policies(several, changes["policy"], hooks, warnings, code)
    except UnreadParameterError as error:
        raise _elsewhere(error, several, the_system) if error.field in changes["policy"] else error from None
    return Setup(model=the_model, system=the_system, policies=specs, hooks=hooks), warnings


def _elsewhere(error: UnreadParameterError, sources: Sequence[Policy], system: System) -> UsageError:
    """Say of a parameter that was set in every policy which of the replay's reads it, else which preset would.

    Presets that a replay on the system compares by default come first, then those that set the parameter themselves.
    """
    field = error.field
    named = [source for source in sources if isinstance(source, str)]
    default = getattr(PolicySpec(name=""), field)
    presets = sorted(list_presets("policies"), key=lambda name: getattr(load_policy(name), field) == default)
    known = (*named, *default_policies(system), *presets)
    reading = next((name for name in known if _reads(name, field, system)), None)
    if reading is None:
        return error
    and_take = "" if reading in named else f"--policy {reading} "
    return UsageError(
        f"{error.where}: {field} applies to {error.read_by} only; set it in a policy that reads it, as with "
        f"{and_take}--set policy.{reading}.{field}=VALUE."
    )


def _reads(name: str, field: str, system: System) -> bool:
    """Whether a preset policy reads a parameter, and can run on the system."""
    if name not in list_presets("policies"):
        return False
    policy = load_policy(name)
    try:
        check_policy(policy, system)
    except UsageError:
        return False
    if policy.schedule is not None:  # what is not set counts as unread
        return field in fields_read(policy.placement, policy.schedule, policy.copies, policy.migrate)
    return field not in policy.unread


def by_spec(overrides: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Sort overrides by `model`, `system` and `policy`, the paths without that; raise UsageError for any other."""
    by_spec: dict[str, dict[str, object]] = {"model": {}, "system": {}, "policy": {}}
    if not isinstance(overrides, Mapping):
        raise UsageError(f"overrides is a mapping of paths to values, got {type(overrides).__name__}.")
    for path, value in overrides.items():
        kind, _, field = str(path).partition(".")
        if kind not in by_spec or not all(field.split(".")):
            raise UsageError(f"An override is model.FIELD, system.FIELD or policy.FIELD, got {path!r}.")
        by_spec[kind][field] = value
    return by_spec


def model_of(trace: Trace) -> str:
    """Return the preset that the trace names; a stranger's file may not name another file."""
    presets = list_presets("models")
    if trace.model in presets:
        return trace.model
    quantized = " and its bits with --set model.weight_bits=BITS" if precision_name(trace.model) else ""
    raise UsageError(
        f"{trace.path or 'The trace in memory'} is of model {trace.model!r}, which is no preset"
        f"{nearest(trace.model, presets)}: name one{quantized}, or a TOML, config.json or GGUF file, with --model."
    )


def _load_policies(
    sources: Sequence[Policy],
    changes: Mapping[str, object],
    hooks: dict[str, Callable],
    warnings: list[str],
    code: bool,
) -> list[PolicySpec]:
    """Load the policies; changes of the form NAME.FIELD go to the policy of that name."""
    if not sources:
        raise UsageError("A replay needs at least one policy.")
    everywhere = {field: value for field, value in changes.items() if "." not in field}
    own: dict[str, dict[str, object]] = {}
    for path in changes.keys() - everywhere.keys():
        name, _, field = path.rpartition(".")
        own.setdefault(name, {})[field] = changes[path]
    specs = []
    for source in sources:
        spec = _load_policy(source, everywhere, hooks, code)
        specs.append(_load_policy(source, everywhere | own[spec.name], hooks, code) if spec.name in own else spec)
    names = [spec.name for spec in specs]
    for name in own.keys() - set(names):
        near = difflib.get_close_matches(name, names, 1, 0.0)
        raise UsageError(f"No policy of this replay is called {name!r} (the nearest is {near[0]!r}).")
    return _distinct(specs, warnings)


def _distinct(specs: list[PolicySpec], warnings: list[str]) -> list[PolicySpec]:
    """Number the second and later policies of a name, as in `mine-2`, so that every table distinguishes them."""
    taken = {spec.name for spec in specs}
    seen: Counter[str] = Counter()
    distinct = []
    for spec in specs:
        name, number = spec.name, 1
        seen[name] += 1
        while seen[spec.name] > 1 and name in taken:
            number += 1
            name = f"{spec.name}-{number}"
        if name != spec.name:
            warnings.append(f"more than one policy is called {spec.name}; one of them appears as {name}.")
        taken.add(name)
        distinct.append(msgspec.structs.replace(spec, name=name))
    return distinct


def _load_policy(source: Policy, changes: Mapping[str, object], hooks: dict[str, Callable], code: bool) -> PolicySpec:
    """Load one policy; a function becomes the dispatch beside `on-demand`'s other choices, and joins `hooks`."""
    if isinstance(source, str | Path | PolicySpec):
        return load_policy(source, changes, code=code)
    function = getattr(source, "py_func", source)
    if not isinstance(function, FunctionType):
        raise UsageError(
            "A policy is the name of a preset, the path of a TOML file, file.py:function, a PolicySpec or a function, "
            f"got {type(source).__name__}."
        )
    written = function.__code__
    spec = msgspec.structs.replace(load_policy("on-demand"), name=written.co_name)
    spec = load_policy(spec, changes, code=code)
    name, number = f"{Path(written.co_filename).name}:{written.co_name}", 1
    while hooks.setdefault(name, source) is not source:
        number += 1
        name = f"{Path(written.co_filename).name}:{written.co_name}-{number}"
    return msgspec.structs.replace(spec, dispatch=name)
