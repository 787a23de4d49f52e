"""The result of a replay: figures, frames and files, made from the engine's logs when they are asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrace.engine.run import Run
from moetrace.results import decision_file, frames, publish, summary, timeline, timeline_file, write
from moetrace.results.record import FIGURES, TIMELINE_FILE, value_in
from moetrace.spec.html_table import html_table
from moetrace.spec.later import Later
from moetrace.trace.atomic import whole_file

if TYPE_CHECKING:
    import polars as pl

    from moetrace.show.plot import Plots
else:
    pl = Later("polars")


_SHOWN = (
    "total_s",
    "speedup",
    "ttft_s.p50",
    "tpot_s.p50",
    "itl_s.p99",
    "tokens_per_s",
    "hit_rate",
    "utilization.gpu",
    "utilization.ndp",
    "utilization.cpu",
    "utilization.link_in",
    "demand_bytes",
    "prefetch_bytes",
    "energy_j",
    "price_usd",
    "host_hit_rate",
    "disk_bytes",
    "disk_busy",
    "regret",
    "remote_s",
    "remote_usd",
    "cold_s",
)


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a replay. It makes each frame when you first ask for it; docs/results.md explains the columns.

    Attributes:
        run: The engine's own record.
        warnings: Sentences about what may not be meant so.
    """

    run: Run
    warnings: tuple[str, ...]
    _trace: dict[str, Any]
    _break_even: list[float | None] | None = None

    def __repr__(self) -> str:
        names = ", ".join(lane.policy.name for lane in self.run.lanes)
        return f"<Result of {names}: .summary, .steps, .units, .layers, .requests, .experts are frames>"

    def _repr_html_(self) -> str:
        """HTML for a notebook: a row for each policy, with its main figures."""
        figures = {name: FIGURES[name] for name in _SHOWN}
        values = {
            name: [_times(figure.shown[0], value_in(policy, name)) for policy in self._policies]
            for name, figure in figures.items()
        }
        shown = [name for name in figures if any(values[name])]
        names = [policy["name"] for policy in self._policies]
        rows = zip(names, *(values[name] for name in shown), strict=True)
        below = f"{self.run.model.name} on {self.run.system.name}, {self.run.slots:,} slots"
        return html_table(["policy", *(figures[name].column for name in shown)], rows, below)

    @cached_property
    def summary(self) -> pl.DataFrame:
        """One row a policy: times, speed-up against the first policy, hits, bytes, utilization, both bounds."""
        return summary.summary_frame(self._policies)

    @cached_property
    def steps(self) -> pl.DataFrame:
        """One row a policy and step. `write` streams them, and needs memory for a slice of them only."""
        return pl.concat(frames.step_slices(self.run))

    @cached_property
    def units(self) -> pl.DataFrame:
        """One row a policy and unit: `gpu`, `ndp0` .., `cpu`, `link_in`, `link_out`."""
        return frames.unit_frame(self.run)

    @cached_property
    def layers(self) -> pl.DataFrame:
        """One row a policy and MoE layer."""
        return frames.layer_frame(self.run)

    @cached_property
    def requests(self) -> pl.DataFrame:
        """One row a policy and request."""
        return frames.request_frame(self.run)

    @cached_property
    def experts(self) -> pl.DataFrame:
        """One row a MoE layer and expert, for all policies: how much it was wanted."""
        return frames.expert_frame(self.run)

    @cached_property
    def accounts(self) -> pl.DataFrame:
        """One row a policy and part of the machine that has a rate: its energy and price; see docs/energy.md.

        It has no rows if the system has neither `[energy]` nor `[price]`.
        """
        return frames.account_frame(self.run)

    @property
    def plot(self) -> Plots:
        """Charts for a notebook: `result.plot.latency()` and others, of Altair (the extra `report`)."""
        from moetrace.show.plot import Plots

        return Plots(self)

    @cached_property
    def timeline(self) -> pl.DataFrame:
        """One row a slice of work in the steps that `replay(timeline=...)` named; see `results.timeline`.

        Raises UsageError if it named none.
        """
        return timeline.timeline_frame(self.run)

    @cached_property
    def timeline_counters(self) -> pl.DataFrame:
        """Experts resident and queued over time, in the steps of the timeline. Raises UsageError like `timeline`."""
        return timeline.counter_frame(self.run)

    def write_timeline(self, path: str | os.PathLike[str]) -> None:
        """Write the timeline to a file that Perfetto and chrome://tracing open.

        Args:
            path: The new file; its name ends in .json.gz.

        Raises:
            UsageError: `replay(timeline=...)` named no steps.
            MoetraceError: The system refuses.
        """
        with whole_file(Path(path)) as file:
            timeline_file.write_timeline(self.run, file, write.sha256_of(write.to_json(self.to_dict())))

    @cached_property
    def decisions(self) -> pl.DataFrame:
        """One row a policy and active expert of a layer: costs, where it ran, where `optimal` would have run it.

        `write_decisions` needs memory for a slice of it only. Raises UsageError without `replay(decisions=True)`.
        """
        return decision_file.decision_frame(self.run)

    def write_decisions(self, path: str | os.PathLike[str]) -> None:
        """Write the rows of `decisions` into a Parquet file: the whole file, or on any error none.

        Args:
            path: The new file.

        Raises:
            UsageError: The replay did not have `decisions=True`.
            MoetraceError: The system refuses.
        """
        with whole_file(Path(path)) as file:
            decision_file.write_decisions(self.run, file)

    def to_dict(self) -> dict[str, Any]:
        """Return what `summary.json` holds."""
        return summary.summary_dict(self.run, self._trace, self._policies)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `summary.json` and the Parquet files into a folder: all of them or none.

        Files of the same names are replaced, others stay; a kill in between leaves the older result or this one. A
        timeline that was recorded is written too; one of an earlier replay does not stay. The same trace, specs and
        version give the same bytes.

        Args:
            folder: The folder, which is made if it does not exist.

        Raises:
            UsageError: `folder` is a file.
            MoetraceError: The system refuses.
        """
        with publish.staged(folder) as temporary:
            self.write_into(temporary)

    def write_into(self, folder: Path) -> None:
        """Write the files into `folder`, which exists, one after another."""
        tables = {"units": self.units, "layers": self.layers, "requests": self.requests, "experts": self.experts}
        more = (
            {}
            if self.run.lanes[0].recording is None
            else {TIMELINE_FILE: partial(timeline_file.write_timeline, self.run)}
        )
        write.write_files(folder, self.to_dict(), lambda: frames.step_slices(self.run), tables, more)

    @cached_property
    def _policies(self) -> list[dict[str, Any]]:
        return summary.policy_figures(self.run, self._break_even)
