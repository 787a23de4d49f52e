"""`moetrace advise`: the policy that a machine should run for a trace, and whether more memory would win more."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from moetrace.cli.default_group import DefaultGroup
from moetrace.cli.options.figures import slo_option
from moetrace.cli.options.overrides import set_option, split_settings
from moetrace.cli.options.paths import ANY_PATH, FOLDER
from moetrace.cli.options.presets import MODEL, SYSTEM
from moetrace.cli.tables.output import format_option, print_csv, print_json, say
from moetrace.spec.cores import cores

if TYPE_CHECKING:
    from moetrace.batch.advice import Advice

# Other questions -> their one-line help; the module is moetrace.cli.commands.advise_<question>.
QUESTIONS = {"rebalance": "How many redundant experts a cluster should hold, and how often to plan again."}


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the other questions where a word begins as they do, else files."""
    found = [CompletionItem(name) for name in QUESTIONS if incomplete and name.startswith(incomplete)]
    return found or ANY_PATH.shell_complete(ctx, param, incomplete)


@click.command()
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5", shell_complete=_complete)
@click.option("--system", required=True, type=SYSTEM, metavar="S", help="Preset or TOML file.")
@click.option(
    "--model",
    type=MODEL,
    metavar="M",
    help="Preset, TOML, config.json or GGUF file; by default the preset that the trace names.",
)
@slo_option
@click.option(
    "--budget-usd-hour",
    "budget",
    type=float,
    metavar="X",
    help="The most that the machine may cost an hour, by the sum of its [price].",
)
@click.option(
    "--slots", metavar="N", help="Experts that the GPU holds: 48, 25% or 4000MiB; by default as many as have room."
)
@set_option
@click.option("-o", "--output", "folder", type=FOLDER, metavar="DIR", help="Keep replays and the advice here.")
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Processes; by default one a core.")
@format_option
def policy(
    trace: Path,
    system: str,
    model: str | None,
    slos: tuple[str, ...],
    budget: float | None,
    slots: str | None,
    settings: tuple[str, ...],
    folder: Path | None,
    jobs: int | None,
    form: str,
) -> None:
    """Say which policy a machine should run for a trace, and what would help most.

    Every policy that goes with the machine is tried, but none that knows the future: these are bounds. Prints the best
    with its figures, what it wins over the default, how far it is from the bounds, what other sizes of GPU memory
    would win, and the command that replays it. In one sentence: change the policy, buy memory, or nothing to win.

    --slo is a hard constraint: the best is the fastest policy that keeps all of them. If none does, it is the one that
    misses them least, and the exit code is 3.

    -o DIR keeps the replays of the whole trace as a sweep does, and advice.json.

    `moetrace advise rebalance TRACE.h5` is about clusters: how many redundant experts, and how often to plan again.
    """
    from moetrace.batch.processes import start_early

    if (jobs or cores()) > 1:
        start_early()
    from moetrace.batch.advise import Question
    from moetrace.batch.sweep import farm_of
    from moetrace.batch.sweep_folder import SweepFolder
    from moetrace.cli.progress import LateBar

    changes = split_settings(settings, ["model", "system"])
    overrides = {f"{kind}.{field}": value for kind in changes for field, value in changes[kind].items()}
    question = Question(trace, system, model, slos, slots, overrides, budget)
    kept = None if folder is None else SweepFolder(folder)
    with farm_of(jobs or cores(), None) as (farm, _), LateBar("policies", 2 * len(question.candidates)) as bar:
        advice = question.answer(farm, kept, bar.advance)
    _print(advice, str(trace), form)
    if advice.best.miss > 0:
        sys.stdout.flush()
        raise click.exceptions.Exit(3)


def _print(advice: "Advice", trace: str, form: str) -> None:
    for note in advice.notes:
        say(f"moetrace: note: {note}")
    if form == "json":
        print_json(advice.to_dict() | {"command": advice.command})
    elif form == "csv":
        print_csv(advice.frame)
    else:
        from moetrace.cli.tables.advice_table import print_advice

        print_advice(advice, trace)


command = DefaultGroup(
    "advise", default=policy, one_lines=QUESTIONS, module_of="moetrace.cli.commands.advise_{}".format
)
