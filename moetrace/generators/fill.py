"""Fill a schedule with what a drawer draws: a file, or a trace in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.generators.batch_schedule import BatchSchedule, StepBlock
from moetrace.generators.drift import Drift
from moetrace.generators.imitate import ProfileDrawer
from moetrace.generators.profile import Profile, load_profile
from moetrace.generators.zipf import ZipfDrawer
from moetrace.spec import check_shape, list_presets, load_model
from moetrace.spec.errors import UsageError
from moetrace.spec.model import Model
from moetrace.trace.format import Trace
from moetrace.trace.schema import BLOCK_BYTES, check_sizes, expert_dtype
from moetrace.trace.writer import Writer
from moetrace.version import __version__

DEFAULT_ZIPF, DEFAULT_STICK = 0.6, 0.3


class _Plan(NamedTuple):
    """The drawer for each schedule, and the trace's description of itself."""

    name: str
    layers: int
    experts: int
    top_k: int
    schedule: BatchSchedule
    drawer: ZipfDrawer | ProfileDrawer
    source: dict[str, Any]
    drift: Drift | None = None

    @property
    def block_rows(self) -> int:
        return max(1, BLOCK_BYTES // (self.layers * self.top_k * expert_dtype(self.experts).itemsize))

    def draw(self, block: StepBlock, first: int) -> np.ndarray:
        """Return the experts [rows, layers, top_k] of a block whose first step has the number `first`."""
        if self.drift is None:
            return self.drawer.draw(block.request, block.position)
        parts = []
        for rows, expert_of_rank in self.drift.parts(first, block.step_rows):
            self.drawer.rank(expert_of_rank)
            parts.append(self.drawer.draw(block.request[rows], block.position[rows]))
        return np.concatenate(parts)

    def drifting(self, steps: int | None, seed: int) -> _Plan:
        """Return the plan with popularity that turns over within `steps`, if that is not None."""
        if steps is None:
            return self
        source = self.source | {"parameters": self.source["parameters"] | {"drift": steps}}
        return self._replace(drift=Drift(steps, seed, self.layers, self.experts), source=source)


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
    top_k: int | None = None,
    drift: int | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a synthetic trace, block by block in constant memory. The same arguments give the same bytes.

    Experts are drawn by Zipf's law (`zipf`, `stick`), or as a `profile` says that a captured model routes.
    docs/generate.md has the formulas.

    Args:
        path: The new trace file.
        model: A preset's name, a TOML file or a Model. A profile has its own; a model beside it must have
            the same numbers of layers and experts.
        requests: Number of requests.
        prompt: Prompt rows of each request; they are one prefill step.
        output: Output rows of each request; each is a row of a decode step.
        batch: The most requests that decode together.
        zipf: Exponent of popularity over rank, from 0 (uniform) to 20. By default 0.6.
        stick: Chance, from 0 to 1, that each expert of the request's previous row stays. By default 0.3.
        profile: A shipped profile's name, a TOML file or a Profile. It goes without `zipf` and `stick`.
        top_k: Experts that a row takes in a layer. By default the model's, also with a profile that was fitted to
            another number; a profile of a model that is no preset takes its own.
        drift: Steps in which the popularity of experts turns over, from 1: popular experts change, and after that
            number of steps they are independent of those before. By default popularity stays.
        seed: Seed of all draws, from 0.
        progress: A function that gets the number of rows of each block once they are written.

    Raises:
        UsageError: A value makes no sense, or values do not go together.
        MoetraceError: A file cannot be read or written.

    Examples:
        >>> import moetrace as mt
        >>> mt.generate("made.h5", "tiny-olmoe", requests=2, prompt=4, output=3, batch=2)
        >>> with mt.Trace.open("made.h5") as trace:
        ...     print(trace.rows, trace.steps, trace.phase)
        14 5 [0 0 1 1 1]
    """
    plan = _prepare(model, BatchSchedule(requests, prompt, output, batch), zipf, stick, profile, top_k, seed)
    plan = plan.drifting(drift, seed)
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
        first = 0
        for block in plan.schedule.blocks(plan.block_rows):
            experts = plan.draw(block, first)
            first += len(block.step_rows)
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
    top_k: int | None = None,
    drift: int | None = None,
    seed: int = 0,
) -> Trace:
    """Return in memory the trace that `generate` would write.

    Args:
        model: As in `generate`: a preset's name, a TOML file or a Model; not needed with a profile.
        requests: Number of requests.
        prompt: Prompt rows of each request.
        output: Output rows of each request.
        batch: The most requests that decode together.
        zipf: Exponent of popularity over rank. By default 0.6.
        stick: Chance that each expert of the request's previous row stays. By default 0.3.
        profile: A shipped profile's name, a TOML file or a Profile, instead of `zipf` and `stick`.
        top_k: Experts that a row takes in a layer. By default the model's.
        drift: Steps in which the popularity of experts turns over. By default it stays.
        seed: Seed of all draws, from 0.

    Returns:
        The trace.

    Raises:
        UsageError: A value makes no sense, or values do not go together.
        MoetraceError: A file cannot be read.

    Examples:
        >>> import moetrace as mt
        >>> trace = mt.generate_trace(profile="gpt-oss-20b", requests=2, prompt=8, output=8)
        >>> trace.model, trace.rows, trace.layers, trace.num_experts, trace.top_k
        ('gpt-oss-20b', 32, 24, 32, 4)
    """
    plan = _prepare(model, BatchSchedule(requests, prompt, output, batch), zipf, stick, profile, top_k, seed)
    plan = plan.drifting(drift, seed)
    blocks = list(plan.schedule.blocks(plan.block_rows))
    whole = StepBlock(*(np.concatenate(column) for column in zip(*blocks, strict=True)))
    return Trace.from_arrays(
        plan.draw(whole, 0),
        num_experts=plan.experts,
        model=plan.name,
        source=plan.source,
        request=whole.request,
        position=whole.position,
        steps=whole.step_rows,
        phase=whole.phase,
    )


def _prepare(
    model: Model | str | Path | None,
    schedule: BatchSchedule,
    zipf: float | None,
    stick: float | None,
    profile: Profile | str | Path | None,
    top_k: int | None,
    seed: int,
) -> _Plan:
    """Check everything and return what fills which schedule."""
    if profile is not None and (zipf is not None or stick is not None):
        option = "zipf" if zipf is not None else "stick"
        raise UsageError(f"{option} is for traces by Zipf's law, but a profile was given: leave one of them out.")
    if profile is None and model is None:
        raise UsageError("a model is missing: name one, or a profile, which knows its own.")
    if profile is not None:
        return _prepare_profile(load_profile(profile), model, schedule, top_k, seed)
    assert model is not None
    model = load_model(model, {} if top_k is None else {"top_k": top_k})
    schedule.check()
    _check_sizes(model.name, model.moe_layers, model.most_experts, model.most_top_k, schedule)
    zipf, stick = DEFAULT_ZIPF if zipf is None else zipf, DEFAULT_STICK if stick is None else stick
    drawer = ZipfDrawer(model, zipf, stick, seed, slots=min(schedule.batch, schedule.requests))
    parameters = {**schedule._asdict(), "zipf": float(zipf), "stick": float(stick), "seed": seed} | _given(top_k)
    source = {"generator": "zipf", "moetrace": __version__, "parameters": parameters}
    return _Plan(model.name, model.moe_layers, model.most_experts, model.most_top_k, schedule, drawer, source)


def _check_sizes(name: str, layers: int, experts: int, top_k: int, schedule: BatchSchedule) -> None:
    """Raise MoetraceError if no trace may be so large, before tables are made of these sizes."""
    check_sizes(f"a trace of {name}", experts, top_k, layers, schedule.rows, schedule.steps)


def _given(top_k: int | None) -> dict[str, int]:
    return {} if top_k is None else {"top_k": top_k}


def top_k_of(profile: Profile) -> int | None:
    """Return the top-k of the model that a profile describes; None if that is no preset, or one of another shape."""
    if profile.model not in list_presets("models"):
        return None
    model = load_model(profile.model)
    is_alike = (model.moe_layers, model.most_experts) == (profile.layers, profile.experts)
    return model.most_top_k if is_alike else None


def _prepare_profile(
    profile: Profile, model: Model | str | Path | None, schedule: BatchSchedule, asked: int | None, seed: int
) -> _Plan:
    name, top_k = profile.model, top_k_of(profile) or profile.top_k
    if model is not None:
        model = load_model(model)
        check_shape(f"Profile {profile.name}", profile.layers, profile.experts, model)
        name, top_k = model.name, model.most_top_k
    if asked is not None:
        top_k = _checked_top_k(asked, profile)
    schedule.check()
    _check_sizes(name, profile.layers, profile.experts, top_k, schedule)
    slots = min(schedule.batch, schedule.requests)
    drawer = ProfileDrawer(profile, seed, prompt=schedule.prompt, slots=slots, top_k=top_k)
    source = {
        "generator": "profile",
        "moetrace": __version__,
        "parameters": {**schedule._asdict(), "seed": seed} | _given(asked),
        "profile": {"name": profile.name, "model": profile.model, "sha256": profile.sha256},
    }
    return _Plan(name, profile.layers, profile.experts, top_k, schedule, drawer, source)


def _checked_top_k(top_k: int, profile: Profile) -> int:
    if not 1 <= top_k <= profile.experts:
        raise UsageError(f"top_k is {top_k}, but must be 1 to the {profile.experts} experts of profile {profile.name}.")
    return top_k
