"""`moetrace record`: a running server is asked for completions with their routing, which becomes a trace."""

import os
from pathlib import Path
from typing import Any

import click

from moetrace.cli.commands.lint import say_found
from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.presets import MODEL
from moetrace.cli.options.targets import check_targets
from moetrace.cli.options.without_effect import refuse
from moetrace.cli.tables.output import said_of, say
from moetrace.spec.errors import printable


class _Number(click.FloatRange):
    """A number in a range, in which NaN is not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is no number", param, ctx)
        return number


_COUNT = click.IntRange(min=1, max=2**31 - 1)


@click.command()
@click.argument("url", metavar="URL")
@click.option("--prompts", required=True, type=ANY_PATH, metavar="FILE", help="Text or JSONL.")
@click.option("-o", "--output", "out", required=True, type=ANY_PATH, metavar="OUT.h5", help="The trace.")
@click.option("--engine", type=click.Choice(["vllm", "sglang"]), help="Else the server says it.")
@click.option("--served-model", metavar="NAME", help="How the server calls its model; else its first one.")
@click.option(
    "--model", type=MODEL, metavar="M", help="Preset or model file of the model; else the server's name for it decides."
)
@click.option("--experts", type=_COUNT, metavar="E", help="Experts a layer, without --model.")
@click.option("--top-k", type=_COUNT, metavar="K", help="Experts a token, without --model; vLLM says it.")
@click.option(
    "--layers", type=_COUNT, metavar="L", help="Layers with experts, without --model, if some layers have no experts."
)
@click.option("--max-tokens", type=_COUNT, default=128, show_default=True, help="Most output tokens of each prompt.")
@click.option(
    "--temperature",
    type=_Number(0, 100),
    default=0.0,
    show_default=True,
    help="Temperature of the sampling; 0: greedy.",
)
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), help="Seed of the sampling; else the server's own.")
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@click.option("--prefix-cache", is_flag=True, help="Let prompts share the server's prefix cache.")
@click.option("--keep-cached", is_flag=True, help="Keep the rows of cached prompts, which no forward pass computed.")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1024),
    default=8,
    show_default=True,
    help="Prompts that are asked at the same time.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=_Number(0.1, 86400),
    default=600.0,
    show_default=True,
    metavar="S",
    help="Seconds to wait for a whole answer.",
)
@click.option(
    "--retries",
    type=click.IntRange(0, 100),
    default=3,
    show_default=True,
    help="How often a prompt is asked again if the server fails.",
)
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="'Name: value'",
    help="Header of each request; may be given several times.",
)
@click.option("--strict", is_flag=True, help="Write no trace if a prompt failed.")
@click.option("--keep-answers", is_flag=True, help="Keep OUT.h5.answers.jsonl when the trace is written.")
@click.option("--compress", type=click.Choice(["zstd", "gzip"]), help="Smaller, but slower to read.")
def command(url: str, prompts: Path, out: Path, model: str | None, headers: tuple[str, ...], **given: Any) -> None:
    """Ask the vLLM or SGLang server at URL for completions, and write their routing to OUT.h5.

    The server must run with --enable-return-routed-experts. A line of FILE is a prompt; or, in JSONL,
    {"prompt": text}, {"token_ids": [...]} or {"messages": [...]}, each with "max_tokens" if it is to differ. Requests
    of the trace are in the order of the prompts.

    Answers are kept in OUT.h5.answers.jsonl until the trace is written. After an interruption, or if the server ended,
    the same command asks only for the missing answers. A prompt that failed is left out, and a note says why.

    A key comes from --header 'Authorization: Bearer ...' or from OPENAI_API_KEY, and goes to URL only. Findings of
    `moetrace lint` in the new trace go to stderr, and do not change the exit code.
    """
    from moetrace.cli.progress import LateBar
    from moetrace.importers.captured import Hints
    from moetrace.live.asks import Settings
    from moetrace.live.exchange import address_of, headers_of
    from moetrace.live.recorder import record
    from moetrace.trace.format import Trace

    if not given["prefix_cache"]:
        refuse(("keep_cached",), "is for --prefix-cache: without it, no prompt is cached.")
    address_of(url)
    given["headers"] = headers_of(headers, os.environ.get("OPENAI_API_KEY"))
    check_targets({"-o": out}, [prompts, model])
    notes: list[str] = []
    sizes = {"num_experts": given.pop("experts"), "top_k": given.pop("top_k"), "layers": given.pop("layers")}
    kept = {"strict": given.pop("strict"), "keep_cached": given.pop("keep_cached")}
    settings = Settings(**{name: given.pop(name) for name in Settings._fields})
    bars: list[LateBar] = []

    def asking(count: int) -> Any:
        bars.append(LateBar("prompts", count))
        return bars[0].__enter__().advance

    try:
        options = {"model": model, "settings": settings, "asking": asking}
        record(url, prompts, out, hints=Hints(**sizes, **kept, note=notes.append), **options, **given)
    except BaseException:
        for note in notes:
            say(f"moetrace: note: {printable(note)}")
        raise
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
    with Trace.open(out) as trace:
        say(said_of(out, trace))
        for note in notes:
            say(f"  note: {printable(note)}")
        say_found(trace)
