"""What a trace runs on: models, systems and policies as TOML.

Importing this package needs nothing heavier than NumPy and msgspec, and reads no file.
"""

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.load import canonical, list_presets
from moetrace.spec.model import Model, load_model
from moetrace.spec.policy import PolicySpec, check_policy, load_loads, load_policy, load_static
from moetrace.spec.system import Cpu, Gpu, Link, Ndp, System, check_fits, gpu_slots, load_system

__all__ = [
    "Cpu",
    "Gpu",
    "Link",
    "Model",
    "MoetraceError",
    "Ndp",
    "PolicySpec",
    "System",
    "UsageError",
    "canonical",
    "check_fits",
    "check_policy",
    "gpu_slots",
    "list_presets",
    "load_loads",
    "load_model",
    "load_policy",
    "load_static",
    "load_system",
]
