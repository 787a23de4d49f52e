"""`moetrace export`: a trace, or what a policy keeps, in a format of other tools."""

from pathlib import Path

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.targets import check_targets
from moetrace.cli.tables.output import say
from moetrace.spec.errors import UsageError, counted

# The keys of moetrace.exports.FORMATS, which is not imported here so that `--help` stays instant.
FORMATS = (
    "npz",
    "parquet",
    "oracle-general",
    "eplb",
    "ktransformers",
    "moe-cache-profile",
    "static-csv",
    "moe-l2",
    "e4b-placement",
    "llama-args",
    "vllm-map",
    "vllm-ascend-map",
)


@click.command()
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5|RESULT")
@click.option("-o", "--output", "out", required=True, type=ANY_PATH, metavar="OUT")
@click.option(
    "--to",
    "form",
    type=click.Choice(FORMATS),
    metavar="FORMAT",
    help="Format of OUT, as named above; seen from its ending if not given.",
)
@click.option(
    "--phase",
    type=click.Choice(["all", "prefill", "decode", "mixed"]),
    help="Steps whose choices count.  [default: all]",
)
@click.option("--slots", type=click.IntRange(min=0), metavar="N", help="Keep the N experts that are chosen most often.")
@click.option("--layer-slots", type=click.IntRange(min=0), metavar="N", help="The same, N in each layer.")
@click.option(
    "--set",
    "held",
    type=ANY_PATH,
    metavar="FILE.csv",
    help="Keep these experts, as `analyze cache --export` writes them.",
)
@click.option("--policy", metavar="NAME", help="With a RESULT: the policy, if there are several.")
@click.option(
    "--trace",
    "replayed",
    type=ANY_PATH,
    metavar="TRACE.h5",
    help="With a RESULT: the trace that was replayed, if the model does not say which layers have experts.",
)
@click.option("--units", type=click.IntRange(min=1), metavar="N", help="For an expert map: units that share the slots.")
@click.option(
    "--redundant",
    type=click.IntRange(min=0),
    metavar="R",
    help="For an expert map: EPLB's further copies a layer; by default one a unit or more.",
)
@click.option(
    "--plan",
    type=ANY_PATH,
    metavar="FILE",
    help="For an expert map: write this plan (SGLang's, vLLM's or vllm-ascend's .json, TensorRT-LLM's .yaml) instead "
    "of EPLB's.",
)
@click.option(
    "--dram-slots",
    type=click.IntRange(min=0),
    metavar="N",
    help="For e4b-placement: experts that main memory holds; by default all others.",
)
def command(
    trace: Path,
    out: Path,
    form: str | None,
    phase: str | None,
    slots: int | None,
    layer_slots: int | None,
    held: Path | None,
    units: int | None,
    redundant: int | None,
    plan: Path | None,
    dram_slots: int | None,
    policy: str | None,
    replayed: Path | None,
) -> None:
    """Write a trace to OUT in a format of other tools, or what a policy of a replay's RESULT keeps.

    \b
    npz                .npz            NumPy arrays, as `import` reads them
    parquet            .parquet        a row for each choice of an expert
    oracle-general     .oracleGeneral  accesses, for libCacheSim (or .bin)
    eplb               .json           counts of each expert, for SGLang and EPLB
    ktransformers      .pt             counts of each expert, or a set as ranks
    moe-cache-profile                  the same, for forks of llama.cpp
    static-csv                         a set of experts, for residency static
    moe-l2                             a set of experts, for moe-l2
    e4b-placement                      a set of experts, for experts4bit
    llama-args                         --n-cpu-moe or -ot, for llama.cpp
    vllm-map                           which expert is in each slot, for vLLM
    vllm-ascend-map                    the same, for vllm-ascend

    A set is what --slots, --layer-slots or --set says. A map is EPLB's plan for --units, or that of --plan, which must
    have that number of units. A trace that holds only counts can be written in all formats except the first three.

    For a RESULT, a folder of `moetrace replay -o`, the set is the experts that the policy keeps permanently, and a map
    is its placement; --to gives the format.
    """
    from moetrace.cli.progress import LateBar
    from moetrace.exports import export
    from moetrace.exports.planned import PlanChoice
    from moetrace.exports.resident import KeptChoice
    from moetrace.trace.format import Trace

    check_targets({"-o": out}, [trace, *([held] if held else []), *([plan] if plan else [])])
    kept = (slots, layer_slots, held, dram_slots)
    if trace.is_dir():
        if phase or units or redundant is not None or plan or kept[:3] != (None,) * 3:
            raise UsageError(
                f"{trace} is a replay's result, whose policy decides the experts: give no --phase, --slots, "
                f"--layer-slots, --set, --units, --redundant and --plan."
            )
        if form is None:
            raise UsageError(f"{trace} is a replay's result: say with --to what of it is wanted.")
        from moetrace.results.exporting import export_result

        check_targets({"-o": out}, [replayed])
        export_result(trace, out, to=form, policy=policy, trace=replayed, dram_slots=dram_slots)
        say(f"{out}: {out.stat().st_size / 1e6:,.1f} MB.")
        return
    if policy is not None or replayed is not None:
        raise UsageError(f"--policy and --trace are of a replay's result, and {trace} is no folder.")
    if units is not None and kept == (None,) * 4:
        choice = PlanChoice(units, redundant, plan, phase or "all")
    elif units is not None or redundant is not None or plan is not None:
        raise UsageError(
            "--redundant and --plan go with --units, and none of these with --slots, --layer-slots, --set and "
            "--dram-slots."
        )
    else:
        choice = KeptChoice(phase or "all", *kept) if phase or kept != (None,) * 4 else None
    with Trace.open(trace) as opened, LateBar("rows", opened.rows) as bar:
        export(opened, out, to=form, choice=choice, progress=bar.advance)
        rows = opened.rows
    say(f"{out}: {counted(rows, 'row')}, {out.stat().st_size / 1e6:,.1f} MB.")
