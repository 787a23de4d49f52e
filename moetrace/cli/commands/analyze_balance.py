"""`moetrace analyze balance`: how evenly placements and plans spread the work of experts over units."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetrace.cli.options.listing import ListingOption
from moetrace.cli.options.overrides import set_option, split_settings
from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.presets import MODEL, SYSTEM
from moetrace.cli.options.targets import check_picture, check_targets
from moetrace.cli.options.without_effect import refuse
from moetrace.cli.tables.output import print_csv, print_json, safe_csv_option
from moetrace.spec.choices import planned_placements
from moetrace.spec.errors import UsageError

if TYPE_CHECKING:
    from moetrace.analyze.balance.plans import Plan, Tier
    from moetrace.analyze.balance.units import Balance
    from moetrace.spec import Model
    from moetrace.trace import Trace

# The frames of moetrace.analyze.balance.units, which takes too long to import for --help.
FRAMES = ("summary", "layers", "staleness", "over_time")


@click.command("balance")
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@click.option(
    "--placement",
    "placements",
    cls=ListingOption,
    listed=planned_placements,
    multiple=True,
    metavar="P",
    help="One of {listed}; may be repeated. By default ep, ep-block, ep-lpt and eplb.",
)
@click.option(
    "--plan",
    "files",
    multiple=True,
    type=ANY_PATH,
    metavar="FILE",
    help="A plan in use: SGLang's, vLLM's or vllm-ascend's .json, TensorRT-LLM's .yaml; may be repeated.",
)
@click.option("--units", type=int, metavar="N", help="Units that hold experts; by default the system's, else 8.")
@click.option(
    "--redundant", type=int, metavar="R", help="EPLB's further copies a layer; by default one a unit or more."
)
@click.option(
    "--nodes", type=int, default=1, show_default=True, help="Nodes of units, for eplb-hierarchical and --fan-out."
)
@click.option("--groups", type=int, default=1, show_default=True, help="Groups of experts, for eplb-hierarchical.")
@click.option(
    "--window",
    type=int,
    metavar="W",
    help="Steps that a plan is made from, and that are not judged; by default half of them, and 0 of a single step.",
)
@click.option(
    "--interval",
    "intervals",
    type=int,
    multiple=True,
    metavar="I",
    help="Steps from one new plan to the next; may be repeated. By default an eighth of the judged ones.",
)
@click.option(
    "--phase",
    type=click.Choice(["all", "prefill", "decode", "mixed"]),
    default="all",
    show_default=True,
    help="The steps to look at, as if there were no others.",
)
@click.option(
    "--copies",
    type=click.Choice(["even", "row", "random"]),
    default="even",
    show_default=True,
    help="How rows choose a copy of their expert: shared evenly; by place in the batch, as engines do; or drawn.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of --copies random."
)
@click.option("--fan-out", is_flag=True, help="Count on how many units, and nodes, the experts of one row are.")
@click.option("--system", type=SYSTEM, metavar="S", help="Preset or TOML file of the units, for figures in seconds.")
@click.option(
    "--model",
    type=MODEL,
    metavar="M",
    help="Preset or model file of the model, if not the one that the trace names.",
)
@set_option
@click.option(
    "--export",
    "out",
    type=ANY_PATH,
    metavar="FILE",
    help="Write the plan of the only --placement, made from the last W steps (W = 0: from all): .json (SGLang), .yaml "
    "(TensorRT-LLM); of ep-lpt and eplb also .csv, the loads that a policy of `moetrace replay` makes it from.",
)
@click.option("--plot", "picture", type=ANY_PATH, metavar="FILE", help="Draw it: FILE.png or .html.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="Tables to read; everything as JSON; or one frame as CSV.",
)
@safe_csv_option
@click.option("--frame", type=click.Choice(FRAMES), help="The frame to print, with --format csv.  [default: layers]")
def command(trace: Path, out: Path | None, picture: Path | None, form: str, frame: str | None, **asked: Any) -> None:
    """Say how evenly placements and plans spread the work of experts over units, and what a new plan is worth.

    The steps after the first W are judged. A plan that is made from loads is judged three times: made from the first W
    steps and kept, re-made every I steps from the last W, and clairvoyant: made from the steps that it is judged on.
    With W = 0, as of a trace of one step (a table of counts), all steps are judged, and such plans are clairvoyant
    only. Imbalance is the busiest unit's rows over the mean, of each step and layer; balancedness is what vLLM and
    SGLang log under that name. docs/balance.md defines every figure.
    """
    from moetrace.cli.progress import LateBar
    from moetrace.trace import Trace
    from moetrace.trace.atomic import write_whole

    if form != "csv" and frame is not None:
        raise UsageError("--frame goes with --format csv: a table and JSON hold what there is.")
    _check_options(asked)
    check_targets({"--export": out, "--plot": picture}, [trace, *asked["files"], asked["system"], asked["model"]])
    _check_export(out, asked["placements"])
    check_picture(picture)
    with Trace.open(trace) as opened, LateBar("rows", opened.rows) as bar:
        from moetrace.analyze.balance.plans import DEFAULT_PLACEMENTS
        from moetrace.analyze.balance.units import balance
        from moetrace.spec import load_model, load_system

        settings = split_settings(asked["settings"], ("model", "system"))
        system = load_system(asked["system"], settings["system"]) if asked["system"] else None
        model = asked["model"] or (opened.model if settings["model"] else None)
        model = load_model(model, settings["model"]) if model else None
        if settings["system"] and system is None:
            raise UsageError("--set system.FIELD needs --system.")
        tier = _tier(asked, (system and system.units) or 8)  # a system without units is refused below
        placements = asked["placements"] or (() if asked["files"] else DEFAULT_PLACEMENTS)
        files = {out: _exported(opened, placements, tier, asked, out)} if out else {}  # first: it may be refused
        found = balance(
            opened,
            placements,
            tier=tier,
            window=asked["window"],
            interval=asked["intervals"] or None,
            phase=asked["phase"],
            plans=_plans(opened, asked["files"], tier, model),
            copies=asked["copies"],
            seed=asked["seed"],
            fan_out=asked["fan_out"],
            model=model,
            system=system,
            progress=bar.advance,
        )
    if picture is not None:
        from moetrace.show.plots.balance_plot import plot

        files[picture] = plot(found, picture.suffix[1:].lower(), trace.name)
    write_whole(files)
    _print(found, str(trace), form, frame or "layers")


def _check_options(asked: dict[str, Any]) -> None:
    """Refuse what would have no effect, and one file as two plans."""
    from moetrace.analyze.balance.plans import DEFAULT_PLACEMENTS

    placements = asked["placements"] or (() if asked["files"] else DEFAULT_PLACEMENTS)
    if "eplb-hierarchical" not in asked["placements"]:
        refuse(("groups",), "is for --placement eplb-hierarchical.")
        if not asked["fan_out"]:
            refuse(("nodes",), "is for --placement eplb-hierarchical or --fan-out.")
    if not any(placement.startswith("eplb") for placement in placements):
        refuse(("redundant",), "is for --placement eplb or eplb-hierarchical.")
        if not asked["files"]:
            refuse(("copies",), "is for plans with copies: --placement eplb or eplb-hierarchical, or a --plan.")
    if not any(placement.startswith(("eplb", "ep-lpt")) for placement in placements):
        refuse(("intervals",), "is for placements that are re-made from loads: ep-lpt, eplb or eplb-hierarchical.")
    if asked["copies"] != "random":
        refuse(("seed",), "is for --copies random.")
    from moetrace.trace.atomic import real_path

    if len(set(map(real_path, asked["files"]))) < len(asked["files"]):
        raise UsageError("--plan was given the same file twice.")


def _check_export(out: Path | None, placements: tuple[str, ...]) -> None:
    """Refuse at once what would only fail after the work."""
    if out is None:
        return
    from moetrace.spec.plan import form_of

    if len(placements) != 1:
        raise UsageError("--export writes the plan of one placement: give one --placement.")
    if out.suffix.lower() != ".csv":
        form_of(out)
    elif placements[0] not in ("ep-lpt", "eplb"):
        raise UsageError(f"--export {out}: .csv is for the loads of ep-lpt and eplb; plans are .json or .yaml.")


def _tier(asked: dict[str, Any], units: int) -> "Tier":
    from moetrace.analyze.balance.plans import Tier, check_tier

    units = units if asked["units"] is None else asked["units"]
    tier = Tier(units, asked["redundant"], asked["nodes"], asked["groups"])
    check_tier(tier)
    return tier


def _plans(trace: "Trace", files: tuple[Path, ...], tier: "Tier", model: "Model | None") -> "dict[str, Plan]":
    from moetrace.analyze.balance.plan_files import read_plan
    from moetrace.spec import list_presets, load_model

    if files and model is None and trace.model in list_presets("models"):
        model = load_model(trace.model)
    alone = len({file.name for file in files}) == len(files)
    return {
        file.name if alone else str(file): read_plan(file, trace.layer_index, trace.num_experts, tier.units, model)
        for file in files
    }


def _exported(trace: "Trace", placements: tuple[str, ...], tier: "Tier", asked: dict[str, Any], out: Path) -> bytes:
    from moetrace.analyze.balance.plan_files import plan_bytes
    from moetrace.analyze.balance.units import loads_for_next, plan_for_next
    from moetrace.spec.plan import form_of

    if out.suffix.lower() == ".csv":
        loads = loads_for_next(trace, asked["window"], asked["phase"])
        return "".join(",".join(map(str, row)) + "\n" for row in loads.tolist()).encode()
    plan = plan_for_next(trace, placements[0], tier, asked["window"], asked["phase"])
    return plan_bytes(plan, trace.layer_index, trace.num_experts, form_of(out))


def _print(found: "Balance", name: str, form: str, frame: str) -> None:
    if form == "table":
        from moetrace.cli.tables.balance_table import print_balance

        print_balance(found, name)
    elif form == "json":
        print_json(found.to_dict())
    else:
        print_csv(getattr(found, frame))
