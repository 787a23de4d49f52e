"""`result.plot`: charts of a replay for a notebook, one method a question."""

from typing import TYPE_CHECKING, Any

from moetrace.results.replayed import replayed_of
from moetrace.show import charts
from moetrace.show.charts.style import check_can_draw
from moetrace.spec.errors import UsageError

if TYPE_CHECKING:
    import altair as alt

    from moetrace.results.result import Result

_WIDTH = 380  # of a panel; two of them are beside each other


class Plots:
    """Charts of a result: each method returns an Altair chart, which a notebook shows and `.save(FILE)` writes.

    Raises MoetraceError, with the command that installs it, if altair is missing.
    """

    def __init__(self, result: "Result"):
        self._result = result

    def __repr__(self) -> str:
        return f"<charts of {self._result!r}: {', '.join(f'.{name}()' for name in charts.QUESTIONS)}>"

    def __dir__(self) -> list[str]:
        return list(charts.QUESTIONS)

    def bounds(self) -> "alt.VConcatChart":
        """Total time of each policy beside the work bound and the clairvoyant run."""
        return self._draw("bounds")

    def latency(self) -> "alt.VConcatChart":
        """Distribution of step time in each phase, of TTFT and of TPOT, a curve for each policy."""
        return self._draw("latency")

    def parts(self) -> "alt.VConcatChart":
        """Time of each policy, split into dense layers, experts, head and waiting."""
        return self._draw("parts")

    def utilization(self) -> "alt.VConcatChart":
        """Busy share of the GPU, each NDP unit and each direction of the link."""
        return self._draw("utilization")

    def over_time(self) -> "alt.VConcatChart":
        """Mean time of a step and hit rate, from the first step to the last."""
        return self._draw("over_time")

    def layers(self) -> "alt.VConcatChart":
        """Time, imbalance and hit rate of each layer."""
        return self._draw("layers")

    def load(self) -> "alt.VConcatChart":
        """How often each expert of each layer is chosen, as a map."""
        return self._draw("load")

    def _draw(self, name: str) -> "alt.VConcatChart":
        check_can_draw()
        import altair as alt

        figure = charts.QUESTIONS[name](replayed_of(self._result))
        if figure is None:
            raise UsageError(f"This result has nothing that {name} could draw.")
        panels = [chart.properties(width=_WIDTH, title=title) for title, chart in figure.panels]
        if len(panels) == 1:
            panels = [panels[0].properties(title="")]  # the figure's own says it
        rows = [alt.hconcat(*panels[i : i + 2], spacing=50) for i in range(0, len(panels), 2)]
        whole = alt.vconcat(*rows, spacing=30, title=alt.Title(figure.title, fontSize=16, anchor="start", offset=14))
        selections: Any = [] if whole.params is alt.Undefined else whole.params
        for selection in selections:
            selection.views = selection.views[-1:]  # Altair 6 gives one layer's to all layers, which Vega refuses
        return whole
