"""Fill a schedule with what a drawer draws: a file, or a trace in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.generators.batch_schedule import BatchSchedule
from moetrace.generators.imitate import ProfileDrawer
from moetrace.generators.profile import Profile, load_profile
from moetrace.generators.zipf import ZipfDrawer
from moetrace.spec import check_shape, load_model
from moetrace.spec.errors import UsageError
from moetrace.spec.model import Model
from moetrace.trace.format import Trace
from moetrace.trace.schema import BLOCK_BYTES, expert_dtype
from moetrace.trace.writer import Writer
from moetrace.version import __version__

DEFAULT_ZIPF, DEFAULT_STICK = 0.6, 0.3


class _Plan(NamedTuple):
    """What fills which schedule, and what the trace says of itself."""

    name: str
    layers: int
    experts: int
    top_k: int
    schedule: BatchSchedule
    drawer: ZipfDrawer | ProfileDrawer
    source: dict[str, Any]

    @property
    def block_rows(self) -> int:
        return max(1, BLOCK_BYTES // (self.layers * self.top_k * expert_dtype(self.experts).itemsize))


def generate(
    path: str | Path,
    model: Model | str | Path | None = None,
    *,
    requests: int,
    prompt: int,
    output: int,
    batch: int = 1,
    zipf: float | None = None,
    stick: float | None = None,
    profile: Profile | str | Path | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a synthetic trace to `path`, block by block in constant memory; the same arguments give the same bytes.

    `model` is a Model, a preset or a TOML file. Experts are drawn by Zipf's law (`zipf` 0.6 and `stick` 0.3 if they are
    not given), or as `profile` says: a Profile, the name of a shipped one or a TOML file. It knows its layers, experts
    and top_k, so that it needs no model; one that is given must have as many layers and experts, and its top_k counts.
    `progress` is told the rows of each block once they are written.
    Raises UsageError for a value that makes no sense and MoetraceError or OSError where the file cannot be written.
    """
    plan = _prepare(model, BatchSchedule(requests, prompt, output, batch), zipf, stick, profile, seed)
    with Writer(
        path,
        model=plan.name,
        num_experts=plan.experts,
        top_k=plan.top_k,
        layers=plan.layers,
        rows=plan.schedule.rows,
        steps=plan.schedule.steps,
        source=plan.source,
    ) as writer:
        for block in plan.schedule.blocks(plan.block_rows):
            experts = plan.drawer.draw(block.request, block.position)
            writer.append(experts, block.request, block.position, block.step_rows, block.phase)
            if progress:
                progress(len(experts))


def generate_trace(
    model: Model | str | Path | None = None,
    *,
    requests: int,
    prompt: int,
    output: int,
    batch: int = 1,
    zipf: float | None = None,
    stick: float | None = None,
    profile: Profile | str | Path | None = None,
    seed: int = 0,
) -> Trace:
    """Return in memory the trace that `generate` would write."""
    plan = _prepare(model, BatchSchedule(requests, prompt, output, batch), zipf, stick, profile, seed)
    blocks = list(plan.schedule.blocks(plan.block_rows))
    request, position, step_rows, phase = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return Trace.from_arrays(
        plan.drawer.draw(request, position),
        num_experts=plan.experts,
        model=plan.name,
        source=plan.source,
        request=request,
        position=position,
        steps=step_rows,
        phase=phase,
    )


def _prepare(
    model: Model | str | Path | None,
    schedule: BatchSchedule,
    zipf: float | None,
    stick: float | None,
    profile: Profile | str | Path | None,
    seed: int,
) -> _Plan:
    """Check everything and return what fills which schedule."""
    if profile is not None and (zipf is not None or stick is not None):
        option = "zipf" if zipf is not None else "stick"
        raise UsageError(f"{option} is for traces by Zipf's law, but a profile was given: leave one of them out.")
    if profile is None and model is None:
        raise UsageError("a model is missing: name one, or a profile, which knows its own.")
    if profile is not None:
        return _prepare_profile(load_profile(profile), model, schedule, seed)
    assert model is not None
    model = load_model(model)
    schedule.check()
    zipf, stick = DEFAULT_ZIPF if zipf is None else zipf, DEFAULT_STICK if stick is None else stick
    drawer = ZipfDrawer(model, zipf, stick, seed, slots=min(schedule.batch, schedule.requests))
    parameters = {**schedule._asdict(), "zipf": float(zipf), "stick": float(stick), "seed": seed}
    source = {"generator": "zipf", "moetrace": __version__, "parameters": parameters}
    return _Plan(model.name, model.moe_layers, model.experts, model.top_k, schedule, drawer, source)


def _prepare_profile(profile: Profile, model: Model | str | Path | None, schedule: BatchSchedule, seed: int) -> _Plan:
    name, top_k = profile.model, profile.top_k
    if model is not None:
        model = load_model(model)
        check_shape(f"Profile {profile.name}", profile.layers, profile.experts, model)
        name, top_k = model.name, model.top_k
    schedule.check()
    slots = min(schedule.batch, schedule.requests)
    drawer = ProfileDrawer(profile, seed, prompt=schedule.prompt, slots=slots, top_k=top_k)
    source = {
        "generator": "profile",
        "moetrace": __version__,
        "parameters": {**schedule._asdict(), "seed": seed},
        "profile": {"name": profile.name, "model": profile.model, "sha256": profile.sha256},
    }
    return _Plan(name, profile.layers, profile.experts, top_k, schedule, drawer, source)
