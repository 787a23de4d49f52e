"""`moetrace replay`: a trace through policies on a described machine, side by side."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetrace.cli.options.code import code_option
from moetrace.cli.options.overrides import set_option, split_settings
from moetrace.cli.options.paths import ANY_PATH, FOLDER
from moetrace.cli.options.presets import MODEL, POLICY, SYSTEM
from moetrace.cli.options.targets import check_targets
from moetrace.cli.tables.output import format_option, print_csv, print_json, print_text, say
from moetrace.spec.choices import KINDS, legal
from moetrace.spec.errors import UsageError

if TYPE_CHECKING:
    from moetrace.results.result import Result


def _window(timeline: bool, window: str | None, folder: Path | None) -> bool | tuple[int | None, int | None]:
    """The values of `--timeline` and `--window`, as `moetrace.replay` takes them."""
    if window is not None and not timeline:
        raise UsageError("--window says which steps a timeline covers: add --timeline.")
    if timeline and folder is None:
        raise UsageError("--timeline writes a file into the folder of the result: name one with -o DIR.")
    if window is None:
        return timeline
    match = re.fullmatch(r"([-+]?\d{1,18})?:([-+]?\d{1,18})?", window.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"--window wants steps A:B, from A up to B without it, as in 100:116, got {window!r}.")
    first, stop = (None if number is None else int(number) for number in match.groups())
    return first, stop


def choices() -> str:
    """The choices that a policy may make, from their records."""
    said = [f"{kind} {', '.join(legal(kind))}" for kind in KINDS]
    return f"A policy's choices: {'; '.join(said)}. `moetrace list residencies` says what each residency means."


class _Command(click.Command):
    """The command; the choices at the end of its help are read when the help is printed, not before a run."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(choices())


@click.command(cls=_Command)
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@click.option(
    "--model",
    type=MODEL,
    metavar="M",
    help="Preset, TOML, config.json or GGUF file; by default the preset that the trace names.",
)
@click.option("--system", type=SYSTEM, default="edge-ndp", show_default=True, metavar="S", help="Preset or TOML file.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=POLICY,
    metavar="P",
    help="Preset, TOML file or file.py:function; may be repeated. By default two that suit the system, as monde and "
    "edge-ndp with NDP units. Speed-ups are against the first.",
)
@click.option(
    "--slots", metavar="N", help="Experts that the GPU holds: 48, 25% or 4000MiB; by default as many as have room."
)
@set_option
@click.option("--jobs", type=int, metavar="N", help="Threads; by default one a policy, at most one a core.")
@click.option(
    "-o",
    "--output",
    "folder",
    type=FOLDER,
    metavar="DIR",
    help="Write the result here.",
)
@click.option("--timeline", is_flag=True, help="With -o, also write timeline.json.gz, for Perfetto (ui.perfetto.dev).")
@click.option(
    "--window", metavar="A:B", help="Steps of the timeline, from A up to B without it; by default the first 16."
)
@click.option(
    "--energy", is_flag=True, help="Also show energy and price by part, from [energy] and [price] of the system."
)
@click.option("--regret", is_flag=True, help="Also solve each layer by dispatch optimal, and show what decisions cost.")
@click.option(
    "--export-decisions",
    "decisions",
    type=ANY_PATH,
    metavar="FILE.parquet",
    help="Write every decision beside that of optimal, to learn a dispatch from; includes --regret.",
)
@click.option(
    "--ignore-capacity",
    is_flag=True,
    help="Replay even if the experts do not fit the NDP units, or the GPUs of a cluster.",
)
@code_option
@format_option
def command(
    trace: Path,
    model: str | None,
    system: str,
    policies: tuple[str, ...],
    slots: str | None,
    settings: tuple[str, ...],
    jobs: int | None,
    folder: Path | None,
    timeline: bool,
    window: str | None,
    energy: bool,
    regret: bool,
    decisions: Path | None,
    ignore_capacity: bool,
    code: bool,
    form: str,
) -> None:
    """Replay a trace through policies on a described machine.

    Prints a row for each policy: how long it takes, how busy the machine is, and how much time a better policy could
    still save. -o DIR also writes summary.json (which --format json prints) and steps, units, layers, requests
    and experts as Parquet files. --timeline records what each unit and link did in a window of steps.

    --energy adds what each part of the machine draws and costs: a second table, `accounts` in JSON, and with
    --format csv these rows instead.

    --regret solves each layer by dispatch optimal, too, from the same state: what the decisions cost beside the best.

    --set model.FIELD, system.FIELD and policy.FIELD change the specs, the last in every policy; policy.NAME.FIELD
    changes only the policy of that name.
    """
    from moetrace.cli.progress import LateBar
    from moetrace.trace import Trace

    changes = split_settings(settings, ["model", "system", "policy"])
    steps = _window(timeline, window, folder)
    if energy:
        from moetrace.cli.tables.account_table import check_rates
        from moetrace.spec import load_system

        check_rates(load_system(system, changes["system"]))
    if decisions is not None:
        if decisions.suffix.lower() != ".parquet":
            raise UsageError(f"--export-decisions {decisions}: the name must end with .parquet.")
        check_targets({"--export-decisions": decisions}, [trace, model, system, *policies])
    with Trace.open(trace) as opened:
        from moetrace.results.break_even import verified_batch
        from moetrace.results.publish import staged
        from moetrace.results.replay import replay

        # The folder first: who can't write there should not wait for a replay to learn it.
        with staged(folder) if folder else nullcontext() as temporary:
            with LateBar("rows", opened.rows * (2 if verified_batch(opened) else 1)) as bar:
                result = replay(
                    opened,
                    model=model,
                    system=system,
                    policies=policies or None,
                    overrides={f"{kind}.{field}": value for kind in changes for field, value in changes[kind].items()},
                    slots=slots,
                    ignore_capacity=ignore_capacity,
                    jobs=jobs,
                    progress=bar.advance,
                    timeline=steps,
                    regret=regret,
                    decisions=decisions is not None,
                    code=code,
                )
            if decisions is not None:
                result.write_decisions(decisions)
            if temporary is not None:
                result.write_into(temporary)
    for warning in result.warnings:
        say(f"moetrace: note: {warning}")
    _print(result, str(trace), form, energy)


def _print(result: "Result", name: str, form: str, energy: bool) -> None:
    """Print a result in a form; `name` is what the user called the trace."""
    if form == "json":
        print_json(result.to_dict() | ({"accounts": result.accounts.to_dicts()} if energy else {}))
    elif form == "csv":
        print_csv(result.accounts if energy else result.summary)
    else:
        from moetrace.cli.tables.replay_table import print_comparison

        print_comparison(result.to_dict(), name)
        if energy:
            from moetrace.cli.tables.account_table import print_accounts

            print_text("")
            print_accounts(result.accounts, result.to_dict(), result.run.system)
