"""`moetrace capture`: a local Hugging Face model reads prompts and continues them; its routing becomes a trace."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from moetrace.cli.commands.lint import say_found
from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.presets import MODEL
from moetrace.cli.options.targets import check_targets
from moetrace.cli.options.without_effect import refuse
from moetrace.cli.tables.output import said_of, say
from moetrace.spec.errors import counted


class _TokenCount(click.types.IntParamType):
    """A number of tokens; in other commands --output is the long name of -o."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is no number of tokens; -o names the file", param, ctx)


@click.command()
@click.argument("model_dir", type=ANY_PATH, metavar="MODEL_DIR")
@click.option("--prompts", required=True, type=ANY_PATH, metavar="FILE", help="Text or JSONL.")
@click.option("-o", "out", required=True, type=ANY_PATH, metavar="OUT.h5", help="The trace.")
@click.option(
    "--output",
    type=_TokenCount(),
    default=128,
    show_default=True,
    metavar="N",
    help="Most output tokens of each request; 0: prefill only.",
)
@click.option("--batch", default=1, show_default=True, help="Requests that decode together.")
@click.option("--max-prompt", type=int, metavar="N", help="Cut prompts to their first N tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="Temperature of the sampling; 0: greedy.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling.")
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bfloat16", "float16", "float32", "float64"]),
    help="Data type of the weights; auto: as they are stored.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto: cuda if there is one.")
@click.option(
    "--model", type=MODEL, metavar="M", help="Preset or model file of the model; else the folder's name decides."
)
@click.option("--compress", type=click.Choice(["zstd", "gzip"]), help="Smaller, but slower to read.")
def command(
    model_dir: Path,
    prompts: Path,
    out: Path,
    dtype: str,
    device: str,
    model: str | None,
    compress: str | None,
    **sampling: Any,
) -> None:
    """Run the Hugging Face model in MODEL_DIR on prompts, and write what its routers choose to OUT.h5.

    A line of FILE is a prompt; or, in JSONL, {"prompt": text}, {"token_ids": [...]} or {"messages": [...]}. Each
    prompt is one prefill step. Then --batch requests decode together with a KV cache, one row of each a step.

    Needs PyTorch and Transformers: pip install '.[capture]'. Nothing is downloaded, no code of the model's is
    run, and weights are read from safetensors only. Findings of `moetrace lint` in the new trace go to stderr, and do
    not change the exit code.
    """
    # Transformers downloads kernels for some quantizations, even with local_files_only.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from rich.console import Console
    from rich.progress import Progress

    from moetrace.capture.session import Sampling, capture
    from moetrace.trace.format import Trace

    _check_options(sampling)
    check_targets({"-o": out}, [prompts, model_dir, model])
    hidden = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("load the model", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, description="rows", completed=done, total=total)

        options = {"dtype": dtype, "device": device, "model": model, "compress": compress}
        capture(model_dir, prompts, out, Sampling(**sampling), **options, progress=advance)
    with Trace.open(out) as trace:
        if cut := trace.source["prompts_cut"]:
            say(f"moetrace: {counted(cut, 'prompt')} cut to {counted(sampling['max_prompt'], 'token')}.")
        say(said_of(out, trace))
        say_found(trace)


def _check_options(sampling: dict[str, Any]) -> None:
    """Refuse what would have no effect."""
    if sampling["output"] == 0:
        refuse(("batch", "temperature", "seed", "ignore_eos"), "is for output tokens, but --output is 0.")
    if sampling["temperature"] == 0:
        refuse(("seed",), "is for sampling: give a --temperature above 0.")
