"""moetrace: replay Mixture-of-Experts routing traces through serving policies on a described machine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetrace.analyze.fit import fit_profile
    from moetrace.analyze.locality import Locality, locality
    from moetrace.engine.plugin import policy
    from moetrace.results import Result, replay
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
    from moetrace.trace.generate import Profile, generate, generate_trace, load_profile, save_profile

__version__ = "0.1.0"

__all__ = [
    "Locality",
    "Model",
    "MoetraceError",
    "PolicySpec",
    "Profile",
    "Result",
    "System",
    "Trace",
    "UsageError",
    "Writer",
    "__version__",
    "fit_profile",
    "generate",
    "generate_trace",
    "load_model",
    "load_policy",
    "load_profile",
    "load_system",
    "locality",
    "policy",
    "replay",
    "save_profile",
]

# Each is imported when it is first asked for, so that `import moetrace` takes no time.
_HOMES = {
    "moetrace.analyze.fit": ("fit_profile",),
    "moetrace.analyze.locality": ("Locality", "locality"),
    "moetrace.engine.plugin": ("policy",),
    "moetrace.results": ("Result", "replay"),
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
    "moetrace.trace.generate": ("Profile", "generate", "generate_trace", "load_profile", "save_profile"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module 'moetrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
