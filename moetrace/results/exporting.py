"""The experts that a policy of a result keeps on the GPU, or their placement, in the formats that engines read.

A result holds the specs and how often each expert was wanted. From these follow the sets of residencies whose set never
changes, and every placement; the numbers of layers are those of the model, or of the trace if it is at hand.
"""

import os
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import polars as pl

from moetrace.analyze.balance.plan_files import plan_bytes
from moetrace.analyze.balance.plans import Plan
from moetrace.engine.placement import place_experts
from moetrace.engine.static_set import StaticRoom
from moetrace.exports import FORMATS, PLAN_FORMS, SET_FORMATS, write_kept
from moetrace.exports.resident import KeptChoice, KeptTally, ResultTally
from moetrace.results.folder import existing_folder, read_summary
from moetrace.results.publish import file_in
from moetrace.results.read_parquet import whole_frame
from moetrace.results.record import SUMMARY_FILE, Summary
from moetrace.spec import Model, PolicySpec, System
from moetrace.spec.choices import choices_of, find
from moetrace.spec.errors import MoetraceError, UsageError, printable
from moetrace.trace.atomic import keep_inputs, whole_file
from moetrace.trace.format import Trace

_EXPERTS_FILE = "experts.parquet"
_COLUMNS = {"layer": pl.Int64, "expert": pl.Int64, "rows": pl.Int64, "steps": pl.Int64}


class _PolicyOfResult(NamedTuple):
    """One policy, as the folder describes it."""

    policy: PolicySpec
    model: Model
    system: System
    slots: int
    rows: np.ndarray  # int64 [layers, experts]: how often each expert was chosen
    steps: np.ndarray  # int64 [layers, experts]: in how many steps
    layer_index: np.ndarray | None  # of the model's layers with experts; None: not known
    expert_bytes: np.ndarray | None


def export_result(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    to: str,
    policy: str | None = None,
    trace: str | os.PathLike[str] | None = None,
    dram_slots: int | None = None,
) -> None:
    """Write what a policy of a result keeps, or its placement, in the format `to`.

    Args:
        folder: A folder that `moetrace replay -o` wrote.
        path: The new file. It is whole or not there.
        to: A format of sets or of plans.
        policy: The policy's name. By default the only one.
        trace: The trace that was replayed, which knows the numbers of its layers and sizes of experts.
        dram_slots: As of `KeptChoice`.

    Raises:
        UsageError: The policy keeps no set for good, or has no units, or there are several; or nothing says which
            number a layer has.
        MoetraceError: A file cannot be read or is damaged, or the trace is another one.
    """
    folder, path = existing_folder(folder), Path(path)
    if to not in (*SET_FORMATS, *PLAN_FORMS):
        known = ", ".join((*SET_FORMATS, *PLAN_FORMS))
        what = "is of a whole trace" if to in FORMATS else "is no format"
        raise UsageError(f"{to} {what}, and {folder} is a replay's result, which can be exported to {known}.")
    found = _found(folder, policy, trace)
    inputs = [file_in(folder, SUMMARY_FILE), file_in(folder, _EXPERTS_FILE), *([Path(trace)] if trace else [])]
    keep_inputs(path, inputs)
    if to in PLAN_FORMS:
        if dram_slots is not None:
            raise UsageError(f"{to} has no tier of main memory: give no --dram-slots.")
        data = plan_bytes(_plan(found), _numbers(found), found.rows.shape[1], PLAN_FORMS[to])
        with whole_file(path) as file:
            file.write(data)
        return
    keys = _kept_keys(found)
    pairs = np.stack(np.divmod(keys, found.rows.shape[1]), axis=1).astype(np.int64)
    layer_index = np.arange(len(found.rows)) if to in ("static-csv", "e4b-placement") else _numbers(found)
    tally = KeptTally(found.rows, found.steps.sum(axis=1))
    source = ResultTally(
        str(folder), layer_index, found.rows.shape[1], found.expert_bytes, tally, found.model.moe_layers
    )
    write_kept(source, path, to, KeptChoice(dram_slots=dram_slots, pairs=pairs))


def _found(folder: Path, name: str | None, trace: str | os.PathLike[str] | None) -> _PolicyOfResult:
    summary, sha256 = read_summary(folder)
    names = [policy.name for policy in summary.policies]
    if name is None and len(names) > 1:
        raise UsageError(
            f"{folder} holds {len(names)} policies: name one with --policy ({printable(', '.join(names))})."
        )
    if name is not None and name not in names:
        raise UsageError(f"{folder} has no policy {name!r}: it holds {printable(', '.join(names))}.")
    chosen = summary.policies[0 if name is None else names.index(name)]
    where = file_in(folder, SUMMARY_FILE)
    try:
        policy = msgspec.convert({"name": chosen.name} | chosen.choices, PolicySpec)
        model, system = msgspec.convert(summary.model, Model), msgspec.convert(summary.system, System)
    except msgspec.ValidationError as error:
        raise MoetraceError(f"{where} has a spec that cannot be read: {str(error)[:200]}.") from None
    rows, steps = _wanted(folder, summary, sha256)
    if model.has_expert.shape != rows.shape:
        raise MoetraceError(f"{where}: model and trace differ in layers or experts.")
    numbers, sizes = model.layer_index, None
    if trace is not None:
        with Trace.open(trace) as opened:
            if summary.trace.sha256 is not None and opened.content_sha256 != summary.trace.sha256:
                raise MoetraceError(f"{opened.shown} is not the trace that {folder} is of: their sha256s differ.")
            numbers, sizes = opened.layer_index.astype(np.int64), opened.expert_bytes
    if numbers is not None and len(numbers) != len(rows):
        numbers = None
    return _PolicyOfResult(policy, model, system, summary.slots, rows, steps, numbers, sizes)


def _wanted(folder: Path, summary: Summary, sha256: str) -> tuple[np.ndarray, np.ndarray]:
    """How often, and in how many steps, each expert was wanted."""
    path = file_in(folder, _EXPERTS_FILE)
    frame = whole_frame(path, _COLUMNS, of=sha256)
    if frame is None:
        raise MoetraceError(
            f"{folder} has no {_EXPERTS_FILE}, which says how often each expert was chosen: replay again."
        )
    shape = summary.trace.layers, summary.trace.experts
    numbers = {name: frame[name].to_numpy() for name in _COLUMNS}
    expected = np.divmod(np.arange(frame.height), max(shape[1], 1))
    if frame.height != shape[0] * shape[1] or not all(
        np.array_equal(numbers[name], of) for name, of in zip(("layer", "expert"), expected, strict=True)
    ):
        raise MoetraceError(f"{path} must have a row for each of {shape[0]} x {shape[1]} experts, in order.")
    return numbers["rows"].reshape(shape), numbers["steps"].reshape(shape)


def _numbers(found: _PolicyOfResult) -> np.ndarray:
    if found.layer_index is None:
        raise UsageError(
            f"Model {found.model.name} does not say which of its layers have experts: name the replayed trace with "
            f"--trace TRACE.h5."
        )
    return found.layer_index


def _kept_keys(found: _PolicyOfResult) -> np.ndarray:
    """The keys of what the policy keeps for good."""
    policy = found.policy
    exists, record = found.model.has_expert, find("residency", policy.residency)
    if found.system.link is None:
        raise UsageError(f"System {found.system.name} has no link: the GPU holds all experts, and none is chosen.")
    if record is None or record.keeps is None:
        fixed = ", ".join(name for name, other in choices_of("residency").items() if other.keeps)
        why = "keeps no expert" if policy.residency == "none" else "keeps no fixed set"
        raise UsageError(
            f"Policy {policy.name} {why}: its residency is {printable(policy.residency)}; sets are of {fixed}, or of "
            f"the trace (moetrace export TRACE.h5 --slots {found.slots})."
        )
    if policy.static is not None:
        raise UsageError(
            f"Policy {policy.name} keeps the set of {printable(policy.static)}, which a result does not hold: take "
            f"moetrace export TRACE.h5 --set FILE.csv."
        )
    if policy.budget is not None:
        raise UsageError(
            f"Policy {policy.name} has slots by {printable(policy.budget)}, which a result does not hold: take "
            f"moetrace export TRACE.h5 --set FILE.csv."
        )
    pools = len(exists) if policy.scope == "layer" and not record.shares_slots else 1
    return record.keeps(policy, StaticRoom(exists, np.full(pools, found.slots // pools), pools, found.steps.ravel()))


def _plan(found: _PolicyOfResult) -> Plan:
    """The placement of the policy, as a plan."""
    policy, units = found.policy, found.system.units
    if not units:
        raise UsageError(f"System {found.system.name} has no units, so policy {policy.name} places no experts on them.")
    if file := policy.plan or policy.loads:
        raise UsageError(
            f"Policy {policy.name} places experts by {printable(file)}, which a result does not hold: take moetrace "
            f"export TRACE.h5 with --units and --plan, or moetrace analyze balance."
        )
    layers, experts = found.rows.shape
    share = policy.group_size(units)
    groups = place_experts(policy, np.arange(layers), experts, units, found.model)
    sizes = np.stack([np.bincount(row, minlength=units // share) for row in groups])
    slots = np.full((layers, units // share, int(sizes.max())), -1, np.int32)
    for layer, row in enumerate(groups):
        for group in range(units // share):
            own = np.flatnonzero(row == group)
            slots[layer, group, : own.size] = own
    return Plan(share, slots)
