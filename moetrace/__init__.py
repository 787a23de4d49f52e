"""moetrace: replay Mixture-of-Experts routing traces through serving policies on a described machine."""

from importlib import import_module

from moetrace.version import __version__

TYPE_CHECKING = False  # to import typing takes as long as all the rest of this
if TYPE_CHECKING:
    from moetrace.analyze.balance.plans import Tier
    from moetrace.analyze.balance.units import Balance, balance
    from moetrace.analyze.cache.hits import cache_hits
    from moetrace.analyze.cache.observed import explain_hit_rate
    from moetrace.analyze.locality.measure import Locality, locality
    from moetrace.analyze.prefetch.value import prefetch_value
    from moetrace.batch.advice import Advice
    from moetrace.batch.advise import advise
    from moetrace.batch.gate import Gate, gate
    from moetrace.batch.rebalance import advise_rebalance
    from moetrace.batch.rebalance_advice import RebalanceAdvice
    from moetrace.batch.search import Search, search
    from moetrace.batch.sweep import Sweep, sweep
    from moetrace.calibration import Calibrated, calibrate
    from moetrace.engine.plugin import policy
    from moetrace.exports import export
    from moetrace.generators import Profile, generate, generate_trace, load_profile, save_profile
    from moetrace.generators.fit import fit_profile
    from moetrace.importers.captured import Hints
    from moetrace.importers.importing import import_traces
    from moetrace.lints import Finding, lint
    from moetrace.results.replay import replay
    from moetrace.results.result import Result
    from moetrace.show.report import report
    from moetrace.spec import (
        Model,
        MoetraceError,
        PolicySpec,
        System,
        UsageError,
        load_model,
        load_policy,
        load_system,
    )
    from moetrace.trace import Trace, Writer
    from moetrace.trace.rebatch import rebatch
    from moetrace.trace.select import select

__all__ = [
    "Advice",
    "Balance",
    "Calibrated",
    "Finding",
    "Gate",
    "Hints",
    "Locality",
    "Model",
    "MoetraceError",
    "PolicySpec",
    "Profile",
    "RebalanceAdvice",
    "Result",
    "Search",
    "Sweep",
    "System",
    "Tier",
    "Trace",
    "UsageError",
    "Writer",
    "__version__",
    "advise",
    "advise_rebalance",
    "balance",
    "cache_hits",
    "calibrate",
    "explain_hit_rate",
    "export",
    "fit_profile",
    "gate",
    "generate",
    "generate_trace",
    "import_traces",
    "lint",
    "load_model",
    "load_policy",
    "load_profile",
    "load_system",
    "locality",
    "policy",
    "prefetch_value",
    "rebatch",
    "replay",
    "report",
    "save_profile",
    "search",
    "select",
    "sweep",
]

# Each is imported when it is first asked for, so that `import moetrace` takes no time.
_HOMES = {
    "moetrace.analyze.balance.units": ("Balance", "balance"),
    "moetrace.analyze.cache.hits": ("cache_hits",),
    "moetrace.analyze.cache.observed": ("explain_hit_rate",),
    "moetrace.generators.fit": ("fit_profile",),
    "moetrace.analyze.locality.measure": ("Locality", "locality"),
    "moetrace.analyze.balance.plans": ("Tier",),
    "moetrace.analyze.prefetch.value": ("prefetch_value",),
    "moetrace.batch.advice": ("Advice",),
    "moetrace.batch.advise": ("advise",),
    "moetrace.batch.gate": ("Gate", "gate"),
    "moetrace.batch.rebalance": ("advise_rebalance",),
    "moetrace.batch.rebalance_advice": ("RebalanceAdvice",),
    "moetrace.batch.search": ("Search", "search"),
    "moetrace.batch.sweep": ("Sweep", "sweep"),
    "moetrace.calibration": ("Calibrated", "calibrate"),
    "moetrace.engine.plugin": ("policy",),
    "moetrace.results.replay": ("replay",),
    "moetrace.results.result": ("Result",),
    "moetrace.show.report": ("report",),
    "moetrace.spec": (
        "Model",
        "MoetraceError",
        "PolicySpec",
        "System",
        "UsageError",
        "load_model",
        "load_policy",
        "load_system",
    ),
    "moetrace.trace": ("Trace", "Writer"),
    "moetrace.importers.captured": ("Hints",),
    "moetrace.exports": ("export",),
    "moetrace.generators": ("Profile", "generate", "generate_trace", "load_profile", "save_profile"),
    "moetrace.importers.importing": ("import_traces",),
    "moetrace.lints": ("Finding", "lint"),
    "moetrace.trace.select": ("select",),
    "moetrace.trace.rebatch": ("rebatch",),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module 'moetrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
