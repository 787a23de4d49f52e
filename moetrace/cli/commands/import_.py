"""`moetrace import`: what an engine recorded becomes a trace file."""

from pathlib import Path

import click

from moetrace.cli.commands.lint import drop_options, say_found, say_left_out
from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.presets import MODEL
from moetrace.cli.options.range_list import RangeList
from moetrace.cli.options.targets import check_targets
from moetrace.cli.tables.output import said_of, say
from moetrace.spec.errors import UsageError, printable

# The keys of moetrace.importers.formats.FORMATS, which is not imported here so that `--help` stays instant.
FORMATS = (
    "sglang",
    "router-logits",
    "npz",
    "bigmoeonedge",
    "colibri",
    "fiddler",
    "counts-table",
    "imatrix",
    "jsonl",
    "lattice",
    "llamacpp",
    "mbolt",
    "megatron",
    "moe-cache-eval",
    "moe-policylang",
    "moe-cache-lab",
    "trtllm",
    "vllm",
    "npy-layers",
    "sglang-request",
    "oracle-general",
    "any-table",
)


@click.command("import")
@click.argument("sources", nargs=-1, required=True, type=ANY_PATH, metavar="SOURCE...")
@click.option("-o", "--output", "out", required=True, type=ANY_PATH, metavar="OUT.h5")
@click.option(
    "--from",
    "form",
    type=click.Choice(FORMATS),
    metavar="FORMAT",
    help=f"Format of the sources, one of {', '.join(FORMATS)}; detected from their content if not given.",
)
@click.option(
    "--model",
    type=MODEL,
    metavar="M",
    help="Model that was traced: preset or model file; else the source's own name decides.",
)
@click.option(
    "--as",
    "as_phase",
    type=click.Choice(["decode"]),
    help="Take rows after the prompt (--prompt) or some passes (--steps) as decode.",
)
@click.option(
    "--prompt", type=click.IntRange(min=0), metavar="P", help="With --as decode: rows of each request's prompt."
)
@click.option(
    "--steps",
    type=RangeList(),
    metavar="A:B,...",
    help="With --as decode: passes that decode, by their order in the source from 0; the others are prefill.",
)
@click.option(
    "--columns",
    metavar="layer=L,token=T,experts=X,...",
    help="Columns of a table: layer, token, experts; gates, request, step, phase, position, slot, token_id, resident.",
)
@click.option(
    "--router",
    metavar="RULE",
    help="How to choose from logits: softmax or sigmoid, then ,norm ,scale=S ,groups=G:M ,bias=FILE.npy.",
)
@click.option("--experts", type=click.IntRange(min=1), metavar="E", help="Experts a layer, if the source can't tell.")
@click.option("--top-k", type=click.IntRange(min=1), metavar="K", help="Experts a token, if the source can't tell.")
@click.option(
    "--absent-from",
    type=click.IntRange(min=0),
    metavar="N",
    help="Ids from N on carry no expert (padding, zero or shared experts): absent.",
)
@click.option(
    "--absent",
    "absent_ids",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="ID",
    help="This id carries no expert either; may be given several times.",
)
@click.option(
    "--layers",
    type=RangeList(),
    metavar="A:B,...",
    help="Layers to take, by their numbers in the source: A:B (A to B - 1), A:, :B or one number.",
)
@click.option(
    "--first-layer",
    type=click.IntRange(0, 65534),
    metavar="N",
    help="Number in the model of the first layer that is taken.",
)
@click.option("--keep-cached", is_flag=True, help="Keep the rows of cached prompts, which no forward pass computed.")
@click.option("--strict", is_flag=True, help="Refuse a source with a bad record instead of leaving it out.")
@drop_options
@click.option("--compress", type=click.Choice(["zstd", "gzip"]), help="Smaller, but slower to read.")
def command(
    sources: tuple[Path, ...],
    out: Path,
    form: str | None,
    model: str | None,
    as_phase: str | None,
    prompt: int | None,
    steps: list[tuple[int, int | None]] | None,
    columns: str | None,
    router: str | None,
    experts: int | None,
    top_k: int | None,
    absent_from: int | None,
    absent_ids: tuple[int, ...],
    layers: list[tuple[int, int | None]] | None,
    first_layer: int | None,
    keep_cached: bool,
    strict: bool,
    compress: str | None,
    **drop: bool,
) -> None:
    """Turn what an engine recorded into the trace file OUT.h5.

    SOURCE is a file, or a folder for all its files of one format. Several sources follow one another in one trace,
    their requests renumbered. Values that a format does not hold, such as the number of experts, come from --model, or
    from --experts and --top-k.

    Where a source does not say its steps, consecutive prefill rows of a request become one step, each decode row a
    step of its own. `--as decode --prompt P` makes decode steps of all rows of a request after the first P, for
    captures whose text was fed in at once. Passes that a source records stay steps. `--as decode --steps A:B` says
    which of them decode, where the source knows no requests.

    With --model, layers get the model's numbers, and those of multi-token prediction (MTP) are left out. --layers takes
    part of the layers, which may be one of a large model.

    Logits of routers need --top-k K and --router RULE: scores are the softmax over all experts or the sigmoid of each,
    and the K experts with the greatest score + bias are chosen, of the M best of G groups. Gates are the scores,
    divided by their sum with norm, times S.

    Rows of cached prompts, padding and answers without routing are left out, answers that continue an earlier one
    join its request; a note says how many.

    Findings of `moetrace lint` in the new trace go to stderr, and do not change the exit code.
    """
    if (as_phase is None) != (prompt is None and steps is None):
        raise UsageError("--as decode and --prompt P need each other, or --as decode and --steps A:B.")
    from moetrace.cli.progress import LateBar
    from moetrace.importers.captured import Hints
    from moetrace.importers.columns import said_columns
    from moetrace.importers.importing import import_traces
    from moetrace.importers.reading.router_rule import said_router
    from moetrace.lints.leave_out import import_and_leave_out
    from moetrace.trace.format import Trace

    check_targets({"-o": out}, [*sources, model, said_router(router).bias if router else None])
    left_out = None
    notes: list[str] = []
    with LateBar("bytes read", sum(map(_size_bytes, sources))) as bar:
        said = said_columns(columns) if columns else None
        hints = Hints(
            num_experts=experts,
            top_k=top_k,
            reading=bar.advance,
            columns=said,
            router=router,
            note=notes.append,
            strict=strict,
            keep_cached=keep_cached,
            absent_from=absent_from,
            absent_ids=absent_ids,
            only_layers=layers,
            first_layer=first_layer,
        )
        options = {"format": form, "model": model, "hints": hints, "decode_after": prompt, "compress": compress}
        options |= {} if steps is None else {"decode_steps": steps}
        if drop["drop_warmup"] or drop["drop_dense"]:
            options |= {"warmup": drop["drop_warmup"], "dense": drop["drop_dense"]}
            left_out = import_and_leave_out(list(sources), out, **options)
        else:
            import_traces(list(sources), out, **options)
    with Trace.open(out) as trace:
        say(said_of(out, trace))
        for note in notes:
            say(f"  note: {printable(note)}")
        if left_out:
            say(f"{out}: {say_left_out(left_out)}.")
        say_found(trace)


def _size_bytes(source: Path) -> int:
    """Bytes of a file, or of the files of a folder, whether they will be read or not."""
    files = source.iterdir() if source.is_dir() else [source]
    return sum(path.stat().st_size for path in files if path.is_file())
