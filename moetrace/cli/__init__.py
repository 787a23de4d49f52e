"""The command line: one file per command, each imported only when it is used, so that ``--help`` stays instant."""

import contextlib
import itertools
import os
import re
import signal
import sys
from typing import NoReturn

import click

from moetrace.cli.lazy_group import LazyGroup
from moetrace.cli.standard_streams import open_missing_streams, outlive_readers
from moetrace.spec.errors import MoetraceError, harmless, stop_behind
from moetrace.version import __version__

# Command -> its one-line help; the module is moetrace.cli.commands.<command>, of `import` import_.
COMMANDS = {
    "advise": "Say which policy a machine should run, and what would help.",
    "analyze": "Answer questions about a trace that need no hardware.",
    "calibrate": "Fit the constants of a system to measured times.",
    "capture": "Run a local Hugging Face MoE model, and trace its routing.",
    "export": "Write a trace in a format of other tools.",
    "gate": "Compare results with a committed baseline.",
    "generate": "Write a synthetic routing trace.",
    "import": "Turn what an engine recorded into a trace file.",
    "info": "Say what a trace file holds.",
    "lint": "Say what is wrong or suspicious in a trace file.",
    "list": "List presets, choices of a policy, profiles and formats, with their meaning.",
    "rebatch": "Recombine the requests of traces into larger batches.",
    "record": "Ask a running server for completions, and trace their routing.",
    "replay": "Replay a trace through policies on a described machine.",
    "report": "Make one HTML page of a result.",
    "select": "Copy a part of a trace, or everything except that part.",
    "show": "Print a resolved spec and what follows from it.",
    "sweep": "Replay a grid of traces, systems, policies and settings.",
    "warm": "Compile what commands need, before they need it.",
}


def _module_of(command: str) -> str:
    return f"moetrace.cli.commands.{'import_' if command == 'import' else command}"


@click.group(
    cls=LazyGroup,
    one_lines=COMMANDS,
    module_of=_module_of,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="moetrace")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _group(debug: bool) -> None:
    """Replay Mixture-of-Experts routing traces through serving policies.

    For latency, utilization of every unit and distance from the best possible, see `moetrace replay --help`.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line; an error is one sentence on stderr, and exit code 1; 2 for wrong usage, 130 for Ctrl-C."""
    if "_MOETRACE_COMPLETE" in os.environ:  # a shell asks what may stand here, or for the lines that make it ask
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(_group, {}, "moetrace", "_MOETRACE_COMPLETE", os.environ["_MOETRACE_COMPLETE"]))
    args = sys.argv[1:] if args is None else args
    debug = "--debug" in itertools.takewhile(lambda arg: arg.startswith("-"), args)
    open_missing_streams()
    outlive_readers()
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminated)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(signal.SIGHUP, _terminated)
    try:
        _run(args)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        _end(stop)
    except (MoetraceError, click.ClickException, OSError) as error:
        if debug:
            raise
        if not args and isinstance(error, click.UsageError):
            error.show()  # the help of a bare `moetrace`
        else:
            click.echo(harmless(f"moetrace: {_sentence(error)}"), err=True)
        sys.exit(getattr(error, "exit_code", 1))
    except MemoryError:
        if debug:
            raise
        click.echo("moetrace: there is not enough memory for this.", err=True)
        sys.exit(1)
    except Exception as error:
        stop = stop_behind(error)
        if debug or stop is None:
            raise
        _end(stop)


def _run(args: list[str]) -> None:
    # Not click's own main: it ends with 1 where a pipe breaks.
    with _group.make_context("moetrace", [*args]) as context:  # `list` is a command here
        _group.invoke(context)
    sys.stdout.flush()


class _Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C's asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


def _terminated(number: int, _: object) -> None:
    raise _Stopped(number)


def _end(stop: BaseException) -> NoReturn:
    """End as a signal asked; a function that still runs somewhere cannot hold the process."""
    code, how = 128 + signal.SIGINT, "interrupted"
    if isinstance(stop, _Stopped):
        code, how = 128 + stop.signal, f"ended by {stop.signal.name}"
    with contextlib.suppress(OSError):  # SIGHUP: the terminal is gone
        click.echo(harmless(f"moetrace: {how}; no file was left half-written."), err=True)
    if "moetrace.jit.apart" in sys.modules:
        sys.modules["moetrace.jit.apart"].end_process(code)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f" See `{context.command_path} --help`." if context else ""
        return f"{' '.join(_what(error).split()).rstrip('.')}.{hint}"
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"the system refused{where}: {error.strerror}."
    return str(error)


def _what(error: click.ClickException) -> str:
    """The message of click, with the nearest name to an unknown one."""
    from moetrace.spec.named import nearest

    if isinstance(error, click.NoSuchOption):
        return f"there is no option {error.option_name}{nearest(error.option_name, list(error.possibilities or []))}"
    said = error.format_message()
    wrong = re.search(r": (?:'(.*)' is not one of |'(.*)' is not )('.*')\.?$", said)
    if not isinstance(error, click.BadParameter) or error.param is None or wrong is None:
        return said
    names = re.findall(r"'(.*?)'", wrong[3])
    value, is_option = wrong[1] or wrong[2] or "", isinstance(error.param, click.Option)
    asked = error.param.opts[0] if is_option else (error.param.name or "").upper()
    return f"{asked} must be one of {', '.join(names)}, but is {value!r}{nearest(value, names)}"
