"""`moetrace warm`: compile what commands need, before they need it."""

import importlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import click

from moetrace.cli.tables.output import say
from moetrace.spec.errors import UsageError

# A small model. Kernels are compiled for ids of one byte and for those of two, so there is one of each.
_MODEL = """
name = "warm"
moe_layers = 3
experts = {experts}
top_k = 2
hidden = 64
expert_intermediate = 64
weight_bits = 16
dense_weight_bits = 16
dense_params_per_layer = 64
once_params = 64
kv_bytes_per_token_layer = 64
"""
_EXPERTS = (16, 300)
_SIZES = ("--requests", "4", "--prompt", "8", "--output", "12", "--batch", "2")
_COMMANDS = ("analyze", "generate", "replay", "sweep", "advise")


@click.command()
@click.argument("commands", nargs=-1, type=click.Choice(_COMMANDS), metavar="[COMMAND]...")
def command(commands: tuple[str, ...]) -> None:
    """Compile what commands need, so that nobody has to wait later: of all, or of those that you name.

    Analyze, generate, replay, sweep and advise compile; others do not, except exports of plans. Compiled code is kept
    in your cache folder, or in the one that NUMBA_CACHE_DIR names, until moetrace, Numba or the processor changes. It
    takes some minutes, and a few seconds if all is there already.
    """
    wanted = dict.fromkeys("replay" if name in ("advise", "sweep") else name for name in commands or _COMMANDS)
    with tempfile.TemporaryDirectory(prefix="moetrace-") as folder:
        for name in wanted:
            begun = time.perf_counter()
            say(f"{name}: getting ready ...")
            for experts in _EXPERTS:
                for line in _LINES[name](Path(folder) / str(experts)):
                    _run(*line)
            say(f"{name}: ready, after {time.perf_counter() - begun:.1f} s.")


_OF_SHARED = ("--set", "model.shared_params_per_layer=8")  # which a policy of a cluster asks for


def _generate(folder: Path) -> Iterator[list[str]]:
    yield [*_trace(folder), *_SIZES]
    yield ["generate", f"{folder}-profile.h5", "--profile", "tiny-olmoe", *_SIZES]


def _replay(folder: Path) -> Iterator[list[str]]:
    from moetrace.spec import list_presets, load_policy, load_system
    from moetrace.spec.participants import check_policy

    yield [*_trace(folder), *_SIZES]
    trace, more = ["replay", f"{folder}.h5", "--model", f"{folder}.toml"], ["--slots", "20"]
    for system in ("edge-ndp", "rtx4090-ddr5", "rtx4090-offload", "h100-x8"):
        policies = []
        for name in list_presets("policies"):
            with suppress(UsageError):
                check_policy(load_policy(name), load_system(system))
                policies += ["--policy", name]
        yield [*trace, "--system", system, *policies, *(more if system != "h100-x8" else _OF_SHARED)]
    for policy in ("edge-ndp", "foresee"):
        yield [*trace, "--policy", policy, "--timeline", "-o", f"{folder}-{policy}", *more]
    yield [*trace, "--system", "h100-x8", "--policy", "ep-serial", "--timeline", "-o", f"{folder}-cluster"]


def _analyze(folder: Path) -> Iterator[list[str]]:
    from moetrace.cli.commands.analyze_prefetch import DEFAULT_PREDICTORS
    from moetrace.spec.choices import cache_policies, planned_placements

    yield [*_trace(folder), *_SIZES]
    trace, policies = f"{folder}.h5", cache_policies()
    at_once = _each("--policy", (name for name, policy in policies.items() if not policy.one_at_a_time))
    in_turn = ["--sequential", *_each("--policy", policies)]
    for scope in ("global", "layer"):
        cache = ["analyze", "cache", trace, "--scope", scope]
        yield [*cache, "--capacity", "20", *at_once]
        yield [*cache, "--capacity", "20"]  # of at most eight caches, which rows hit wholly is counted in bytes
        yield [*cache, "--capacity", "20", *in_turn]
        yield [*cache, "--curve"]
        yield [*cache, "--curve", "--sequential"]
        predictors = _each("--predictor", DEFAULT_PREDICTORS)
        yield ["analyze", "prefetch", trace, "--capacity", "20", "--scope", scope, *predictors]
    placements = _each("--placement", (form for form in planned_placements() if ":" not in form))
    balance = ["analyze", "balance", trace, "--units", "4", "--window", "4"]
    yield [*balance, "--nodes", "2", "--groups", "4", *placements]
    for copies in ("even", "row", "random"):
        yield [*balance, "--redundant", "4", "--placement", "eplb", "--copies", copies, "--fan-out"]
    yield ["analyze", "balance", trace, "--system", "edge-ndp", "--model", f"{folder}.toml", "--window", "4"]
    yield ["analyze", "locality", trace]


_LINES = {"generate": _generate, "replay": _replay, "analyze": _analyze}


def _trace(folder: Path) -> list[str]:
    """Options of generate for a trace with the number of experts in the folder's name."""
    model = folder.with_suffix(".toml")
    model.write_text(_MODEL.format(experts=folder.name), encoding="utf-8")
    return ["generate", f"{folder}.h5", "--model", str(model)]


def _each(option: str, names: Iterable[str]) -> list[str]:
    return [word for name in names for word in (option, name)]


def _run(name: str, *arguments: str) -> None:
    """Run a command as if it had been typed, in silence."""
    found = importlib.import_module(f"moetrace.cli.commands.{name}").command
    with Path(os.devnull).open("w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        found.main([*arguments], prog_name=f"moetrace {name}", standalone_mode=False)
