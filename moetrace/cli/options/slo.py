"""The option `--slo`: limits that figures must keep."""

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


slo_option = click.option(
    "--slo",
    "slos",
    multiple=True,
    type=_Limit(),
    metavar="LIMIT",
    help="A figure's limit, as in 'tpot_s.p99<=50ms'; may be repeated.",
)
