"""Options that name figures, and `--slo`: limits that they must keep."""

import click
from click.shell_completion import CompletionItem


class _Limit(click.ParamType):
    """A text as `tpot_s.p99<=50ms`, which is read elsewhere."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the figures that begin so, with the sign of their limit."""
        from moetrace.results.record import METRICS

        signs = {"lower": "<=", "higher": ">="}
        return [
            CompletionItem(f"{name}{signs[figure.better]}")
            for name, figure in METRICS.items()
            if figure.better and name.startswith(incomplete)
        ]


class _Figures(click.ParamType):
    """A figure, or several with commas between them, which are read elsewhere."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the figures that the last of them may be."""
        from moetrace.results.record import COSTS, FIGURES

        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}") for name in (*FIGURES, *COSTS) if name.startswith(last)]


FIGURE = _Figures()
slo_option = click.option(
    "--slo",
    "slos",
    multiple=True,
    type=_Limit(),
    metavar="LIMIT",
    help="A figure's limit, as in 'tpot_s.p99<=50ms'; may be repeated.",
)
