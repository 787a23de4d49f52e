"""The specs of a replay: models, systems and policies as TOML.

Importing this package loads nothing but its errors, which every command needs; the rest, and with it NumPy and msgspec,
comes when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING

from moetrace.spec.errors import MoetraceError, UsageError

if TYPE_CHECKING:
    from moetrace.spec.fits import check_fits, gpu_slots
    from moetrace.spec.load import canonical
    from moetrace.spec.model import Model, check_shape, load_model
    from moetrace.spec.named import list_presets
    from moetrace.spec.network import Cluster, Network
    from moetrace.spec.participants import check_policy, default_policies
    from moetrace.spec.policy import PolicySpec, load_policy
    from moetrace.spec.policy_files import load_loads, load_static
    from moetrace.spec.system import Cpu, Gpu, Host, Link, Ndp, Remote, System, load_system
    from moetrace.spec.weights import WeightBits

__all__ = [
    "Cluster",
    "Cpu",
    "Gpu",
    "Host",
    "Link",
    "Model",
    "MoetraceError",
    "Ndp",
    "Network",
    "PolicySpec",
    "Remote",
    "System",
    "UsageError",
    "WeightBits",
    "canonical",
    "check_fits",
    "check_policy",
    "check_shape",
    "default_policies",
    "gpu_slots",
    "list_presets",
    "load_loads",
    "load_model",
    "load_policy",
    "load_static",
    "load_system",
]


_MODULES = ("load", "named", "model", "network", "system", "fits", "policy", "policy_files", "participants", "weights")


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in _MODULES:
            home = importlib.import_module(f"moetrace.spec.{module}")
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
