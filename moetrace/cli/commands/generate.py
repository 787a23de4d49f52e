"""``moetrace generate``: a synthetic trace, by Zipf's law or in imitation of a capture."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.presets import MODEL, PROFILE
from moetrace.cli.options.targets import check_targets
from moetrace.cli.options.without_effect import refuse
from moetrace.cli.tables.output import say
from moetrace.spec.errors import UsageError, counted, printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from moetrace.generators import Profile

_FILE = click.Path(dir_okay=False, readable=False, path_type=Path)


@click.command()
@click.argument("out", type=_FILE, metavar="OUT.h5")
@click.option(
    "--model",
    type=MODEL,
    metavar="M",
    help="Preset or model file; see `moetrace list models`. A profile knows its own.",
)
@click.option("--requests", required=True, type=int, help="Number of requests.")
@click.option("--prompt", required=True, type=int, help="Prompt tokens of each request; 0: no prefill steps.")
@click.option("--output", required=True, type=int, help="Output tokens of each request; 0: no decode steps.")
@click.option("--batch", default=1, show_default=True, help="Requests that decode together.")
@click.option(
    "--zipf",
    type=float,
    help="Popularity of the expert of rank r: (r + 1) ** -ZIPF; 0: uniform.  [default: 0.6]",
)
@click.option("--stick", type=float, help="Share of experts kept from the request's previous token.  [default: 0.3]")
@click.option("--like", type=ANY_PATH, metavar="TRACE.h5", help="Fit a profile to a trace and use it.")
@click.option("--profile", type=PROFILE, metavar="NAME", help="Draw as a profile says: a shipped one, or a TOML file.")
@click.option("--top-k", type=int, metavar="K", help="Experts that a token takes in a layer.  [default: the model's]")
@click.option(
    "--drift",
    type=int,
    metavar="STEPS",
    help="Steps in which the popularity of experts turns over.  [default: it stays]",
)
@click.option("--save-profile", type=_FILE, metavar="P.toml", help="Keep the profile that --like fits.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same bytes.")
def command(out: Path, like: Path | None, save_profile: Path | None, **parameters: Any) -> None:
    """Write a synthetic routing trace to OUT.h5.

    By default each layer ranks the experts by an own random permutation, and each token takes top-k distinct experts
    with the distribution of Gumbel top-k. --stick first keeps each expert of the request's previous token in that layer
    with this probability; the rest is drawn from the others.

    --like and --profile draw as a captured model routes: how unequal popularity is, what a request prefers and
    remembers, what one layer says about the next. A fit takes a minute or so; --save-profile keeps it for --profile.
    Shipped profiles: deepseek-v2-lite, gpt-oss-20b, mixtral-8x7b, qwen3-30b-a3b, tiny-olmoe.

    --drift lets which experts are popular move from step to step, smoothly: two steps that are STEPS or more apart have
    nothing in common. How unequal popularity is stays.

    Each request's prompt is one prefill step. --batch requests then decode together, one token of each a step; as
    they are of equal length they end together, and the next group starts.
    """
    _check_exclusive(out, like, save_profile, parameters)
    from rich.console import Console
    from rich.progress import Progress

    from moetrace.generators import BatchSchedule, check_seed, generate

    schedule = BatchSchedule(*(parameters[name] for name in BatchSchedule._fields))
    schedule.check()
    check_seed(parameters["seed"])
    hidden = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        if like is not None:
            parameters["profile"] = _fitted(like, save_profile, parameters, bar)
        task = bar.add_task("rows", total=schedule.rows)
        generate(out, **parameters, progress=lambda count: bar.advance(task, count))
    size_mb = out.stat().st_size / 1e6
    say(f"{out}: {counted(schedule.rows, 'row')} in {counted(schedule.steps, 'step')}, {size_mb:,.1f} MB.")
    _note_top_k(**parameters)
    if parameters["profile"] is None:
        _note_memory(**parameters)


def _check_exclusive(out: Path, like: Path | None, save_profile: Path | None, parameters: dict[str, Any]) -> None:
    """Raise a UsageError for options that exclude or need each other."""
    given = [f"--{name}" for name in ("zipf", "stick", "profile") if parameters[name] is not None]
    if like is not None and given:
        raise UsageError(f"--like and {given[0]} exclude each other: each says how experts are drawn.")
    if parameters["profile"] is not None and len(given) > 1:
        raise UsageError(f"--profile and {given[0]} exclude each other: each says how experts are drawn.")
    if like is None and save_profile is not None:
        raise UsageError("--save-profile keeps what --like fits: give --like TRACE.h5 too.")
    if like is None and not given[-1:] == ["--profile"] and parameters["model"] is None:
        raise UsageError("--model is missing: name a model, or give --profile or --like, which know theirs.")
    if parameters["output"] == 0:
        refuse(("batch",), "is for decode steps, but --output is 0.")
    if save_profile is not None and save_profile.suffix != ".toml":
        raise UsageError(f"--save-profile {save_profile}: the name must end with .toml, so that --profile takes it.")
    read = (like, parameters["profile"], parameters["model"])
    check_targets({"OUT.h5": out, "--save-profile": save_profile}, read)


def _fitted(like: Path, save_profile: Path | None, parameters: dict[str, Any], bar: "Progress") -> "Profile":
    """Fit a profile to the trace at `like`, and keep it if it is wanted."""
    from moetrace.generators import save_profile as save
    from moetrace.generators.fit import fit_profile
    from moetrace.spec import check_shape, load_model
    from moetrace.trace import Trace
    from moetrace.version import __version__

    with Trace.open(like) as trace:
        if parameters["model"] is not None:
            model = load_model(parameters["model"])
            check_shape(f"Trace {like}", trace.layers, trace.num_experts, model)
        if bar.disable:
            say(f"moetrace: fitting a profile to {printable(str(like))}, which takes up to a minute or two.")
        task = bar.add_task("fitting", total=None)
        profile = fit_profile(
            trace, seed=parameters["seed"], progress=lambda text: bar.update(task, description=f"fitting: {text}")
        )
        bar.remove_task(task)
    if save_profile is not None:
        save(profile, save_profile, f"Fitted by moetrace {__version__} (generate --like), seed {parameters['seed']}.")
    return profile


def _note_top_k(model: str | None, profile: Any, top_k: int | None, **_: Any) -> None:
    """Say so if the trace has another number of experts a token than the profile was fitted to."""
    if profile is None or top_k is not None:
        return
    from moetrace.generators import load_profile, top_k_of
    from moetrace.spec import load_model

    fitted = load_profile(profile)
    name, ours = (fitted.model, top_k_of(fitted)) if model is None else (model, load_model(model).most_top_k)
    if ours is not None and ours != fitted.top_k:
        say(
            f"Note: profile {fitted.name} was fitted to top {fitted.top_k}; {printable(name)} takes the top {ours} of "
            f"the same router logits (--top-k {fitted.top_k}: as fitted)."
        )


def _note_memory(stick: float | None, **_: Any) -> None:
    """Say so if tokens have nothing to do with each other."""
    if stick == 0:
        say(
            "Note: with --stick 0 each token is drawn independently, and only popularity can be learned: caches and "
            "prefetches do worse than on real routing. --profile draws as a captured model routes."
        )
