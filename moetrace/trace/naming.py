"""Which preset a capture's own name of its model means."""

import re

from moetrace.spec import check_shape, list_presets, load_model


def model_name(where: str, said: str, layers: int, experts: int, model: str | None = None) -> str:
    """The preset that is meant: `model` if given, else the longest whose name is part of `said` and that fits.

    If none does, what was said, or "unknown". Raises UsageError, beginning with `where`, if `model` (a preset or a
    TOML file) has other layers or experts.
    """
    if model is not None:
        spec = load_model(model)
        check_shape(where, layers, experts, spec)
        return spec.name
    for name in sorted(list_presets("models"), key=len, reverse=True):
        if _plain(name) in _plain(said):
            spec = load_model(name)
            if (spec.moe_layers, spec.experts) == (layers, experts):
                return name
    return said[:200] or "unknown"


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.lower())
