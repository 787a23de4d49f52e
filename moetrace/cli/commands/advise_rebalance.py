"""`moetrace advise rebalance`: how many redundant experts a cluster should hold, and how often it should plan again."""

from pathlib import Path

import click

from moetrace.cli.options.number_list import NumberList
from moetrace.cli.options.overrides import set_option, split_settings
from moetrace.cli.options.paths import ANY_PATH, FOLDER
from moetrace.cli.options.presets import MODEL, POLICY, SYSTEM
from moetrace.cli.tables.output import format_option, print_csv, print_json, say
from moetrace.spec.cores import cores


@click.command("rebalance")
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@click.option("--system", required=True, type=SYSTEM, metavar="S", help="Preset or TOML file of a cluster.")
@click.option(
    "--model",
    type=MODEL,
    metavar="M",
    help="Preset, TOML, config.json or GGUF file; by default the preset that the trace names.",
)
@click.option(
    "--policy",
    type=POLICY,
    default="eplb",
    show_default=True,
    metavar="P",
    help="Preset or TOML file: schedule and all else that is the same in every row.",
)
@click.option(
    "--redundant",
    type=NumberList(),
    metavar="N,N",
    help="Redundant experts of a layer; by default up to four numbers that the GPUs share equally and have room for.",
)
@click.option(
    "--interval",
    type=NumberList(),
    metavar="N,N",
    help="Steps from one plan to the next, 0: one plan only; by default 0 and up to three that fit the trace.",
)
@click.option(
    "--migrate",
    type=click.Choice(["pause", "async"]),
    help="Whether steps wait for experts to move; by default what the policy says, else pause.",
)
@set_option
@click.option("-o", "--output", "folder", type=FOLDER, metavar="DIR", help="Keep replays and the advice here.")
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Processes; by default one a core.")
@format_option
def command(
    trace: Path,
    system: str,
    model: str | None,
    policy: str,
    redundant: list[int] | None,
    interval: list[int] | None,
    migrate: str | None,
    settings: tuple[str, ...],
    folder: Path | None,
    jobs: int | None,
    form: str,
) -> None:
    """Say how many redundant experts a cluster should hold, and how often it should plan again.

    Replays the trace without plans, and for each number of redundant experts and each interval between plans: a row
    each, with the time of all steps, the median and 99th percentile of a step, the moves, and their cost. In
    one sentence: plan again, plan once, or nothing to win.

    A row whose experts do not fit a GPU's memory is marked with ! and never the best.

    -o DIR keeps the replays as a sweep does, rebalance.json, and policy.toml, the best.
    """
    jobs = jobs or cores()
    if jobs > 1:
        from moetrace.batch.processes import start_early

        start_early()
    from moetrace.batch.rebalance import RebalanceQuestion
    from moetrace.batch.sweep import farm_of
    from moetrace.batch.sweep_folder import SweepFolder
    from moetrace.cli.progress import LateBar

    changes = split_settings(settings, ["model", "system", "policy"])
    overrides = {f"{kind}.{field}": value for kind in changes for field, value in changes[kind].items()}
    question = RebalanceQuestion(trace, system, model, policy, redundant, interval, migrate, overrides)
    kept = None if folder is None else SweepFolder(folder)
    with farm_of(jobs, None) as (farm, _), LateBar("replays", question.rows) as bar:
        advice = question.answer(farm, kept, bar.advance)
    for note in advice.notes:
        say(f"moetrace: note: {note}")
    if form == "json":
        print_json(advice.to_dict() | {"command": advice.command})
    elif form == "csv":
        print_csv(advice.frame)
    else:
        from moetrace.cli.tables.rebalance_table import print_rebalance

        print_rebalance(advice, str(trace))
